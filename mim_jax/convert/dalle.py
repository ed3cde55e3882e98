"""The dVAEs of others by our names: DALL-E's encoder and decoder, and the one of BEiT's code."""

import re

import numpy as np

from mim_jax import UserError

DALLE = {  # a pattern of their names: how we call it
    r"blocks\.(input|output)(?:\.conv)?\.([wb])": r"\1/\2",
    r"blocks\.group_(\d)\.block_(\d)\.(id_path)\.([wb])": r"group_\1_block_\2/\3/\4",
    r"blocks\.group_(\d)\.block_(\d)\.res_path\.(conv_\d)\.([wb])": r"group_\1_block_\2/\3/\4",
}
KERNELS = {"w": "kernel", "b": "bias"}


def from_dalle(state: dict[str, np.ndarray]) -> dict:
    """DALL-E's encoder or decoder {"blocks.input.w": (O, I, k, k), ...} -> our parameters of it."""
    params = {}
    for name, value in state.items():
        *modules, leaf = renamed(name, DALLE).split("/")
        put(params, (*modules, KERNELS[leaf]), convolution(value))
    return params


def from_beit(state: dict[str, np.ndarray]) -> dict:
    """BEiT's dVAE {"encoder.0.0.weight": ...} -> {"tokenizer": ..., "decoder": ...}."""
    layers = max(int(name.split(".")[1]) for name in state if name.startswith("encoder.")) // 2
    params = {"tokenizer": {}, "decoder": {}}
    for name, value in state.items():
        if name == "codebook.weight":
            params["decoder"]["codebook"] = value
            continue
        match = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(?:(0|net\.[024])\.)?(weight|bias)", name)
        if not match:
            raise UserError(f"{name} is not an array of BEiT's dVAE.")
        half, place, inner, leaf = match.groups()
        layer = f"layer_{int(place) // 2 + 1}"
        if int(place) == 2 * layers:
            modules = ["output"]
        elif inner == "0":
            modules = [layer]
        else:
            modules = [f"{layer}_block_1", f"conv_{int(inner[-1]) // 2 + 1}"]
        if half == "decoder" and inner == "0" and leaf == "weight":
            value = value.transpose(2, 3, 0, 1)[::-1, ::-1]  # transposed: in before out, and turned
        else:
            value = convolution(value)
        path = ({"encoder": "tokenizer"}.get(half, half), *modules)
        put(params, (*path, {"weight": "kernel"}.get(leaf, leaf)), value)
    return params


def renamed(name: str, patterns: dict[str, str]) -> str:
    """`name` by the first of the patterns that it has."""
    for pattern, ours in patterns.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise UserError(f"{name} is not an array of DALL-E's encoder or decoder.")


def convolution(value: np.ndarray) -> np.ndarray:
    """A kernel (O, I, k, k) -> (k, k, I, O); a bias as it is."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def put(tree: dict, path: tuple[str, ...], value: np.ndarray) -> None:
    """Sets tree[path[0]][path[1]]... to value."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
