"""Weights under the official MAE's names, for comparison with golden numbers and oracles."""

import re

import numpy as np

BLOCK = {"norm1": "norm1", "attn.qkv": "qkv", "attn.proj": "proj", "norm2": "norm2"}
BLOCK |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
TOP = {"patch_embed.proj": "encoder/embed", "norm": "encoder/norm"}
TOP |= {"decoder_embed": "decoder/embed", "decoder_norm": "decoder/norm"}
TOP |= {"decoder_pred": "decoder/pred"}


def our_name(name: str) -> str:
    """ "blocks.3.mlp.fc1.weight" -> "encoder/block_3/fc1/kernel"."""
    if name in ("cls_token", "mask_token"):
        return f"encoder/{name}" if name == "cls_token" else f"decoder/{name}"
    module, leaf = name.rsplit(".", 1)
    if found := re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", module):
        place, is_norm = BLOCK[found[3]], "norm" in found[3]
        place = f"{'decoder' if found[1] else 'encoder'}/block_{found[2]}/{place}"
    else:
        place, is_norm = TOP[module], module.endswith("norm")
    return f"{place}/{'bias' if leaf == 'bias' else 'scale' if is_norm else 'kernel'}"


def our_value(value: np.ndarray) -> np.ndarray:
    """A torch weight in our layout."""
    if value.ndim == 4:  # a convolution (d, c, p, q) is a matrix on (p, q, c) vectors
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.T if value.ndim == 2 else value


def to_params(state: dict[str, np.ndarray]) -> dict:
    params = {}
    for name, value in state.items():
        node = params
        *folders, leaf = our_name(name).split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = our_value(np.asarray(value))
    return params


def golden_state(shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    """The weights for which the reference numbers were computed: sines by rank of the name."""
    state = {}
    for n, name in enumerate(sorted(shapes)):
        i = np.arange(np.prod(shapes[name]))
        value = 0.1 * np.sin(0.37 * (i + 1) + 0.5 * n)
        value += 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else 0.0
        value += 0.5 if "gamma_" in name else 0.0
        state[name] = value.reshape(shapes[name])
    return state


def mae_shapes(*, width, depth, decoder_width, decoder_depth, patch, channels) -> dict[str, tuple]:
    """The trainable tensors of the official MAE."""
    p, q = patch

    def linear(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name, size):
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    def block(name, d):
        return (
            norm(f"{name}.norm1", d)
            | linear(f"{name}.attn.qkv", d, 3 * d)
            | linear(f"{name}.attn.proj", d, d)
            | norm(f"{name}.norm2", d)
            | linear(f"{name}.mlp.fc1", d, 4 * d)
            | linear(f"{name}.mlp.fc2", 4 * d, d)
        )

    d, e = width, decoder_width
    shapes = {"cls_token": (1, 1, d), "mask_token": (1, 1, e)}
    shapes |= {"patch_embed.proj.weight": (d, channels, p, q), "patch_embed.proj.bias": (d,)}
    shapes |= norm("norm", d) | linear("decoder_embed", d, e) | norm("decoder_norm", e)
    shapes |= linear("decoder_pred", e, p * q * channels)
    for i in range(depth):
        shapes |= block(f"blocks.{i}", d)
    for i in range(decoder_depth):
        shapes |= block(f"decoder_blocks.{i}", e)
    return shapes
