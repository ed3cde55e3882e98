"""Converts state dicts of PyTorch models to the parameters of mim_jax and back, in NumPy.

Shapes: b batch, n patches, d width, (p, q) patch or kernel, c channels, o outputs, i inputs.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import UserError
from mim_jax.convert.fit import fit
from mim_jax.convert.names import BARE, find, shortened, spelled, unwrap
from mim_jax.convert.network import Network, describe, expected, leaves, square
from mim_jax.convert.tables import LAYOUTS
from mim_jax.models.patches import relative_index, sincos2d
from mim_jax.models.stem import STRIDE

BUFFERS = r"(.*\.)?(relative_position_index|num_batches_tracked|k_bias)"  # computed, not learned
NOT_PARTS = "|".join(  # arrays of other models that do not belong to the encoder
    (
        r"(vit\.)?pooler\.dense\.\w+|head\.\d+\..*|(student|predictor)\..*",
        r"(fpn\d?|decode_head|auxiliary_head)\..*",  # segmentation
    )
)
UPWARDS = r"decoder/layer_\d+/kernel"  # transposed convolutions
POINTWISE = r"(head|auxiliary)/classes/conv/kernel"  # a linear layer, a 1 x 1 convolution there
EMBED = "encoder/embed/kernel"
FIXED = 1e-5  # tolerance for sine-cosine positions, which transformers computes in float32


def from_torch(
    state: Mapping[str, Any],
    *,
    size: tuple[int, int] | None = None,
    entry: str = "",
    encoder_only: bool = False,
    **options: Any,
) -> tuple[dict, Network]:
    """Converts a state dict {"blocks.0.norm1.weight": ..., ...} to our parameters.

        params, network = from_torch(torch.load("mae_pretrain_vit_base.pth", weights_only=True))

    Args:
        state: arrays by the names of a layout of tables.LAYOUTS, possibly inside a checkpoint.
        size: height and width of the images, if they are not square. Ignored if the positions are
            for another size.
        entry: the entry of the checkpoint to take, if there are several networks.
        encoder_only: ignore the decoder's arrays, if there is an encoder.
        options: arguments of `describe` that arrays do not determine: heads, decoder_heads, grid.

    Returns:
        The parameters and their network.

    Raises:
        UserError: if no layout has these names, or if arrays are missing, unexpected or of a wrong
            shape.
    """
    layout, state, left_out, entry = recognize(arrays(state), entry)
    state = fused(state) if layout.startswith("hf_") else state
    flat, unexpected = {}, []
    for name, value in state.items():
        if path := rename(name, layout):
            flat[path] = our_value(path, name, value)
        else:
            unexpected.append(name)
    if layout == "dalle":  # both halves have the same names
        half = "tokenizer" if state["blocks.input.weight"].shape[-1] > 1 else "decoder"
        flat = {f"{half}/{path}": value for path, value in flat.items()}
    kernel = next((x for name, x in state.items() if rename(name, layout) == EMBED), None)
    options |= dict(layout=layout, left_out=tuple(left_out), entry=entry)
    try:
        if kernel is not None:
            if encoder_only:
                flat = {path: x for path, x in flat.items() if not path.startswith("decoder/")}
            flat = positioned(flat, kernel.shape[-2:], size, options)
        params = unflatten_dict(flat, sep="/")
        network = describe(params, **options)
    except UserError as error:
        if not unexpected:
            raise
        names = f"{len(unexpected)} unexpected: {shortened(unexpected)}"  # the likely reason
        raise UserError(f"this is not {LAYOUTS[layout].title}: {names}.") from error
    compare(params, network, unexpected)
    return params, network


def positioned(
    flat: dict, patch: tuple[int, int], size: tuple[int, int] | None, options: dict
) -> dict:
    """Sets the options that positions determine. Returns the arrays without fixed positions."""
    patch = (STRIDE, STRIDE) if "encoder/stem/conv/kernel" in flat else patch
    grid = options.get("grid") or grid_of(flat, patch, size)
    learned, grid = without_fixed(flat, grid)
    is_fixed = "encoder/positions" in flat.keys() - learned.keys()
    options |= dict(patch=patch, grid=grid, positions="sincos" if is_fixed else "none")
    if is_moco_small(learned.get("encoder/positions"), grid):
        options["heads"] = options.get("heads") or 12
    return learned


def to_torch(params: dict, network: Network | None = None, *, layout: str) -> dict[str, np.ndarray]:
    """Converts our parameters to a state dict.

    Args:
        network: the result of `from_torch`; by default, derived from the shapes.
        layout: "mae", "beit", "timm" (the encoder and its head), "hf", or a key of LAYOUTS.

    Raises:
        UserError: if the layout cannot hold the network.
    """
    network = network or describe(params)
    layout, params = fit(params, network, layout)
    flat = {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}
    if layout == "dalle":
        flat = {path.split("/", 1)[1]: value for path, value in flat.items()}
    elif network.kind != "dvae":
        flat |= fixed(params, network, flat[EMBED].dtype)
    state, unnamed = {}, []
    for path, value in flat.items():
        if name := rename(path, layout, back=True):
            state[name] = their_value(path, value, network)
        else:
            unnamed.append(path)
    if unnamed:
        raise UserError(
            f"{LAYOUTS[layout].title} has no names for {len(unnamed)} arrays, for example "
            f"{', '.join(unnamed[:3])}."
        )
    if layout == "dalle":
        return {re.sub(r"\.(w|b)\w+$", r".\1", name): value for name, value in state.items()}
    if layout in ("beit", "beit_finetuned"):
        return state | index_buffers(network)
    if layout.startswith("hf_"):
        means = [name for name in state if name.endswith("running_mean")]
        count = np.zeros((), np.int64)  # which PyTorch stores and does not use
        state |= {name.replace("running_mean", "num_batches_tracked"): count for name in means}
        bare = r"^(vit|beit)\." if "head" not in params and "decoder" not in params else "^$"
        return {re.sub(bare, "", name): value for name, value in split(state).items()}
    return state


def arrays(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of nested dicts, by their names joined with dots."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": x for inner, x in arrays(value).items()}
        elif hasattr(value, "shape"):
            tensor = value.detach().cpu() if hasattr(value, "detach") else value
            flat[name] = np.asarray(tensor)
    return flat


def recognize(
    state: dict[str, np.ndarray], entry: str
) -> tuple[str, dict[str, np.ndarray], list[str], str]:
    """Returns the layout, its arrays by the names of its table, all other names, and the entry."""
    names = unwrap(state)
    prefix, layout, entry = find(names, entry)
    if not layout:
        raise UserError(
            f"no supported layout has arrays of these names: {shortened(list(state), 3)}; it may "
            "be another model."
        )
    inside = {
        short.removeprefix(prefix): name
        for short, name in names.items()
        if short.startswith(prefix)
    }
    if BARE in inside:
        key = r"layer\w*\.0\.attention\.(attention\.key|k_proj)\.bias"
        kind = "vit" if any(re.search(key, name) for name in names) else "beit"
        inside = {f"{kind}.{short}": name for short, name in inside.items()}
        layout = find(inside)[1]
    inside = {spelled(short): name for short, name in inside.items()}
    parts = layout in ("mae_linear", "hf_beit_segment", "hf_upernet")  # that NOT_PARTS names
    unneeded = BUFFERS if parts else f"{BUFFERS}|{NOT_PARTS}"
    inside = {short: name for short, name in inside.items() if not re.fullmatch(unneeded, short)}
    left_out = state.keys() - inside.values()
    state_of_layout = {short: state[name] for short, name in inside.items()}
    return layout, state_of_layout, [name for name in state if name in left_out], entry


@functools.cache
def rules(layout: str, back: bool) -> list[tuple[re.Pattern, str]]:
    """Returns the rows of a table as patterns and their replacements."""
    rows = []
    for theirs, ours in LAYOUTS[layout].table.items():
        kernel = "scale" if "norm" in ours else "kernel"
        for weight, our_weight in (("weight", kernel), ("bias", "bias")):
            row = theirs.replace("*", weight), ours.replace("*", our_weight)
            source, target = reversed(row) if back else row
            pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(source))
            rows.append((re.compile(pattern), re.sub(r"{(\w)}", r"\\g<\1>", target)))
    return rows


def rename(name: str, layout: str, back: bool = False) -> str | None:
    """Returns our name for a layout's name, or with `back` the reverse; None if there is none."""
    for pattern, replacement in rules(layout, back):
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return None


def fused(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Concatenates Hugging Face's query, key and value arrays. BEiT has no key bias."""
    fused: dict[str, np.ndarray] = {}
    parts: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.*\.)(query|key|value)\.(weight|bias)", name):
            parts.setdefault((match[1], match[3]), {})[match[2]] = value
        else:
            fused[name] = value
    for (place, leaf), thirds in parts.items():
        if len(thirds) == 3 and len({x.shape for x in thirds.values()}) == 1:
            order = [thirds[part] for part in ("query", "key", "value")]
            fused[f"{place}qkv.{leaf}"] = np.concatenate(order)
        elif leaf == "bias" and "key" not in thirds:
            fused |= {f"{place}{part[0]}_bias": x for part, x in thirds.items()}
        else:  # unknown names are reported as unexpected
            fused |= {f"{place}{part}.{leaf}": x for part, x in thirds.items()}
    return fused


def split(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverts `fused`."""
    parts: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.*\.)qkv\.(weight|bias)", name):
            thirds = zip(("query", "key", "value"), np.split(value, 3), strict=True)
            parts |= {f"{match[1]}{part}.{match[2]}": np.array(x) for part, x in thirds}
        elif match := re.fullmatch(r"(.*\.)(q|v)_bias", name):
            parts[f"{match[1]}{dict(q='query', v='value')[match[2]]}.bias"] = value
        else:
            parts[name] = value
    return parts


def our_value(path: str, name: str, value: np.ndarray) -> np.ndarray:
    """Transposes kernels of linear layers and convolutions; the patch embedding's to a matrix.

    Raises UserError for arrays of another shape, and for quantized, complex or boolean weights.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(
            f"{name} has the type {value.dtype}, but weights are floating-point numbers."
        )
    try:
        if path == EMBED:
            value = einops.rearrange(value, "d c p q -> (p q c) d")
        elif re.fullmatch(UPWARDS, path):  # torch's transposed kernels are flipped
            value = einops.rearrange(value, "i o p q -> p q i o")[::-1, ::-1]
        elif re.fullmatch(POINTWISE, path):
            value = einops.rearrange(value, "o i 1 1 -> i o")
        elif path.endswith("/kernel"):
            value = value.T if value.ndim == 2 else einops.rearrange(value, "o i p q -> p q i o")
    except (einops.EinopsError, ValueError):
        raise UserError(f"{name} has the shape {value.shape}, which does not fit {path}.") from None
    return np.array(value, order="C")  # a copy: the source may be a model in training


def their_value(path: str, value: np.ndarray, network: Network) -> np.ndarray:
    """Inverts `our_value`."""
    return np.array(transposed(path, value, network), order="C")


def transposed(path: str, value: np.ndarray, network: Network) -> np.ndarray:
    """Returns a view of one of our arrays with the axes of another library."""
    if path == EMBED:
        p, q = network.encoder.patch if network.encoder.stem == "none" else (1, 1)
        value = einops.rearrange(value, "(p q c) d -> d c p q", p=p, q=q)
    elif re.fullmatch(UPWARDS, path):
        value = einops.rearrange(value[::-1, ::-1], "p q i o -> i o p q")
    elif re.fullmatch(POINTWISE, path):
        value = einops.rearrange(value, "i o -> o i 1 1")
    elif path.endswith("/kernel"):
        value = value.T if value.ndim == 2 else einops.rearrange(value, "p q i o -> o i p q")
    return value


def grid_of(flat: dict, patch: tuple[int, int], size: tuple[int, int] | None) -> tuple | None:
    """Returns the grid of images of `size`, or None if a table of positions has another grid."""
    if size is None:
        return None
    rows, columns = (side // p for side, p in zip(size, patch, strict=True))
    lengths = {
        "positions": 1 + rows * columns,
        "table": (2 * rows - 1) * (2 * columns - 1) + 3,
    }
    for path, x in flat.items():
        part, leaf = path.split("/")[0], path.rsplit("/", 1)[-1]
        if part == "encoder" and leaf in lengths and lengths[leaf] not in x.shape:
            return None
    return rows, columns


def without_fixed(flat: dict, grid: tuple[int, int] | None) -> tuple[dict, tuple | None]:
    """Drops tables of sine-cosine positions, which mim_jax computes. Returns arrays and grid.

    A table with other values was learned: the encoder keeps it; in MAE's decoder it is an error.
    """
    for part in ("encoder", "decoder"):
        table = flat.get(f"{part}/positions")
        if table is None:
            continue
        if table.ndim != 3:
            raise UserError(f"positions of shape {table.shape} must have shape (1, 1 + n, d).")
        grid = grid or square(table.shape[1] - 1, "positions")
        if far_from_fixed(table, grid) <= FIXED:
            flat = {path: value for path, value in flat.items() if path != f"{part}/positions"}
        elif part == "decoder":
            raise UserError(
                "the decoder's positions are not MAE's sines and cosines: "
                "`mim-jax convert --encoder-only` converts only the encoder."
            )
    return flat, grid


def far_from_fixed(table: np.ndarray, grid: tuple[int, int], shift: int = 0) -> float:
    """Returns the largest difference between a table (1, 1 + n, d) and MAE's rolled by `shift`."""
    usual = table.shape[2] % 4 == 0 and table.shape[1] == 1 + grid[0] * grid[1]
    return np.abs(table - np.roll(sines(grid, table.shape[2]), shift, 2)).max() if usual else np.inf


def is_moco_small(table: np.ndarray | None, grid: tuple[int, int] | None) -> bool:
    """Returns whether positions are those of MoCo v3's ViT-S, which has 12 heads instead of 6."""
    if table is None or grid is None or table.shape[2] != 384:
        return False
    return far_from_fixed(table, grid, 192) <= FIXED


def sines(grid: tuple[int, int], width: int) -> np.ndarray:
    """Returns MAE's positions (1, 1 + n, d), zero for the class token."""
    return np.pad(sincos2d(grid, width), ((0, 0), (1, 0), (0, 0)))


def fixed(params: dict, network: Network, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Returns the tables of fixed positions, which other libraries store, by our names."""
    tables = {}
    if network.encoder.positions == "sincos":
        tables["encoder/positions"] = network.encoder.width
    if network.decoder and "decoder" in params:
        tables["decoder/positions"] = network.decoder.width
    return {path: sines(network.known_grid, d).astype(dtype) for path, d in tables.items()}


def index_buffers(network: Network) -> dict[str, np.ndarray]:
    """Returns the buffers that BEiT's code stores with tables of relative positions."""
    bias = network.encoder.relative_bias
    places = ["rel_pos_bias"] if bias == "shared" else []
    if bias == "own":
        places = [f"blocks.{i}.attn" for i in range(network.encoder.depth)]
    if not places:
        return {}
    index = relative_index(network.known_grid).astype(np.int64)
    return {f"{place}.relative_position_index": index for place in places}


def compare(params: dict, network: Network, unexpected: list[str]) -> None:
    """Raises UserError unless the arrays are exactly those of the network."""
    wanted, given = expected(params, network), leaves(params)

    def theirs(path):
        inner = path.split("/", 1)[1] if network.layout == "dalle" else path
        return rename(inner, network.layout, back=True) or path

    def their_shape(path, shape):
        return transposed(path, np.broadcast_to(np.zeros(()), shape), network).shape

    different = [
        f"{theirs(path)} {their_shape(path, given[path])}, must be {their_shape(path, shape)}"
        for path, shape in wanted.items()
        if path in given and given[path] != shape
    ]
    missing = [theirs(path) for path in wanted if path not in given]
    unexpected = unexpected + [theirs(path) for path in given if path not in wanted]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": different}
    if any(kinds.values()):
        lists = [f"{len(x)} {kind}: {shortened(x)}" for kind, x in kinds.items() if x]
        wide = any("/fc1/" in path and given.get(path, x) != x for path, x in wanted.items())
        hint = " Hidden layers of an MLP must be 4 times as wide as its input." if wide else ""
        raise UserError(f"this is not {LAYOUTS[network.layout].title}: {'; '.join(lists)}.{hint}")
