"""From the arrays of PyTorch's models to our parameters, and back: dicts of numpy arrays.

Shapes: d width, (p, q) patch, c channels, O and I what a convolution gives and takes.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import einops
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import UserError
from mim_jax.convert.fit import fit
from mim_jax.convert.network import Network, describe, expected, leaves, square
from mim_jax.convert.tables import BUFFERS, LAYOUTS, PREFIXES, SPELLINGS
from mim_jax.models.patches import relative_index, sincos2d
from mim_jax.models.stem import STRIDE

HEADLESS = (
    *(r"(vit\.)?pooler\.dense\.\w+", r"head\.\d+\..*", r"(student|predictor)\..*"),
    r"(fpn\d?|decode_head|auxiliary_head)\..*",  # of a segmentation
)
UPWARDS = r"decoder/layer_\d+/kernel"  # of the transposed convolutions
EMBED = "encoder/embed/kernel"
FIXED = 1e-5  # how far a table may be from sines and cosines; transformers computes it in float32


def from_torch(
    state: Mapping[str, Any], *, size: tuple[int, int] | None = None, **known: Any
) -> tuple[dict, Network]:
    """The arrays of a state dict {"blocks.0.norm1.weight": ..., ...} -> our parameters, of what.

    Takes the layouts of tables.LAYOUTS, alone or within a checkpoint. `known` is what else is
    known, as for `describe`: heads, decoder_heads, grid; images may be of `size`, and are taken to
    be square if the tables of positions are not of it. Raises UserError for a layout that is none
    of these, and for arrays that are missing, too many or of a wrong shape.

        params, network = from_torch(torch.load("mae_pretrain_vit_base.pth", weights_only=True))
    """
    layout, named, left_out = recognize(arrays(state))
    flat, extra = {}, []
    for name, value in fused(named).items() if layout.startswith("hf_") else named.items():
        if (path := rename(name, layout)) is None:
            extra.append(name)
        else:
            flat[path] = our_value(path, name, value)
    if layout == "dalle":  # its halves have the same names
        half = "tokenizer" if named["blocks.input.weight"].shape[-1] > 1 else "decoder"
        flat = {f"{half}/{path}": value for path, value in flat.items()}
    if EMBED in flat:
        kernel = next(v for name, v in named.items() if rename(name, layout) == EMBED)
        patch = (STRIDE, STRIDE) if "encoder/stem/conv/kernel" in flat else kernel.shape[-2:]
        known = {"patch": patch, **known}
        grid = known.get("grid") or grid_of(flat, known["patch"], size)
        had = "encoder/positions" in flat
        flat, known["grid"] = without_fixed(flat, grid)
        if not known.get("heads") and is_moco_small(flat.get("encoder/positions"), known["grid"]):
            known["heads"] = 12
        known["positions"] = "sincos" if had and "encoder/positions" not in flat else "none"
    params = unflatten_dict(flat, sep="/")
    network = describe(params, layout=layout, left_out=tuple(left_out), **known)
    compare(params, network, extra)
    return params, network


def to_torch(params: dict, network: Network | None = None, *, layout: str) -> dict[str, np.ndarray]:
    """Our parameters -> the arrays of a layout: "mae", "beit", "timm", "hf", or one of LAYOUTS.

    `network` is what `from_torch` found out; without it the shapes must say everything. timm's have
    the encoder alone. Raises UserError where the layout cannot say what they are.
    """
    network = network or describe(params)
    layout, params = fit(params, network, layout)
    flat = {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}
    if layout == "dalle":
        flat = {path.split("/", 1)[1]: value for path, value in flat.items()}
    elif network.kind != "dvae":
        flat |= fixed(params, network, flat[EMBED].dtype)
    state, homeless = {}, []
    for path, value in flat.items():
        if name := rename(path, layout, back=True):
            state[name] = their_value(path, value, network)
        else:
            homeless.append(path)
    if homeless:
        raise UserError(
            f"{LAYOUTS[layout].title} has no place for {len(homeless)} of the arrays, as "
            f"{', '.join(homeless[:3])}."
        )
    if layout == "dalle":
        return {re.sub(r"\.(w|b)\w+$", r".\1", name): value for name, value in state.items()}
    if layout in ("beit", "beit_finetuned"):
        return state | index_buffers(network)
    if layout.startswith("hf_"):
        bare = r"^(vit|beit)\." if "head" not in params and "decoder" not in params else "^$"
        return {re.sub(bare, "", name): value for name, value in split(state).items()}
    return state


def arrays(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of nested dicts by their names joined with dots."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": x for inner, x in arrays(value).items()}
        elif hasattr(value, "shape"):
            tensor = value.detach().cpu() if hasattr(value, "detach") else value
            flat[name] = np.asarray(tensor)
    return flat


def recognize(state: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray], list[str]]:
    """-> the layout, its arrays as its table calls them, the names of those that are none of it."""
    left_out = []

    def keep(names):
        left_out.extend(name for name in state if name not in names)
        return {new: state[old] for old, new in names.items()}

    while prefix := next((p for p in PREFIXES if any(k.startswith(p) for k in state)), None):
        state = keep({k: k.removeprefix(prefix) for k in state if k.startswith(prefix)})
    if "embeddings.cls_token" in state:  # an encoder of Hugging Face, alone
        key = r"layer\w*\.0\.attention\.(attention\.key|k_proj)\.bias"
        name = "vit" if any(re.search(key, k) for k in state) else "beit"
        state = {f"{name}.{k}": value for k, value in state.items()}
    state = {spelled(k): value for k, value in state.items()}
    for name, layout in LAYOUTS.items():
        if all(sign in state for sign in layout.signs):
            state = keep({k: k for k in state if k.rsplit(".", 1)[-1] not in BUFFERS})
            if name != "mae_linear":
                state = keep({k: k for k in state if not re.fullmatch("|".join(HEADLESS), k)})
            return name, state, left_out
    some = ", ".join(list(state)[:3]) or "none"
    raise UserError(f"no layout has arrays of these names ({some}, ...): is it another model?")


def spelled(name: str) -> str:
    """A name as the tables have it."""
    for pattern, usual in SPELLINGS.items():
        name = re.sub(pattern, usual, name)
    return name


@functools.cache
def rules(layout: str, back: bool) -> list[tuple[re.Pattern, str]]:
    """The rows of a table as patterns and what they are replaced by."""
    found = []
    for theirs, ours in LAYOUTS[layout].table.items():
        kernel = "scale" if "norm" in ours else "kernel"
        for weight, our_weight in (("weight", kernel), ("bias", "bias")):
            row = theirs.replace("*", weight), ours.replace("*", our_weight)
            here, there = reversed(row) if back else row
            pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(here))
            found.append((re.compile(pattern), re.sub(r"{(\w)}", r"\\g<\1>", there)))
    return found


def rename(name: str, layout: str, back: bool = False) -> str | None:
    """Our name for theirs by a layout's table, or `back`; None if it has none."""
    for pattern, there in rules(layout, back):
        if match := pattern.fullmatch(name):
            return match.expand(there)
    return None


def fused(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's query, key and value as one array qkv; without a bias of keys, two of BEiT."""
    fused, parts = {}, {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.*\.)(query|key|value)\.(weight|bias)", name):
            parts.setdefault((match[1], match[3]), {})[match[2]] = value
        else:
            fused[name] = value
    for (place, leaf), found in parts.items():
        if len(found) == 3 and len({x.shape for x in found.values()}) == 1:
            whole = [found[part] for part in ("query", "key", "value")]
            fused[f"{place}qkv.{leaf}"] = np.concatenate(whole)
        elif leaf == "bias" and "key" not in found:
            fused |= {f"{place}{part[0]}_bias": x for part, x in found.items()}
        else:  # which no table has: reported as too many
            fused |= {f"{place}{part}.{leaf}": x for part, x in found.items()}
    return fused


def split(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undoes `fused`."""
    parts = {}
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
    """A linear map transposed; a convolution (O, I, p, q) turned, of patches made a matrix."""
    try:
        if path == EMBED:
            value = einops.rearrange(value, "d c p q -> (p q c) d")
        elif re.fullmatch(UPWARDS, path):  # (I, O, p, q), and torch reads it from its end
            value = einops.rearrange(value, "i o p q -> p q i o")[::-1, ::-1]
        elif path.endswith("/kernel"):
            value = value.T if value.ndim == 2 else einops.rearrange(value, "o i p q -> p q i o")
    except (einops.EinopsError, ValueError):
        raise UserError(f"{name} has the shape {value.shape}, which cannot be {path}.") from None
    return np.array(value, order="C")  # a copy: the other model may go on training


def their_value(path: str, value: np.ndarray, network: Network) -> np.ndarray:
    """Undoes `our_value`."""
    if path == EMBED:
        p, q = network.encoder.patch if network.encoder.stem == "none" else (1, 1)
        value = einops.rearrange(value, "(p q c) d -> d c p q", p=p, q=q)
    elif re.fullmatch(UPWARDS, path):
        value = einops.rearrange(value[::-1, ::-1], "p q i o -> i o p q")
    elif path.endswith("/kernel"):
        value = value.T if value.ndim == 2 else einops.rearrange(value, "p q i o -> o i p q")
    return np.array(value, order="C")


def grid_of(flat: dict, patch: tuple[int, int], size: tuple[int, int] | None) -> tuple | None:
    """The grid of images of `size`, unless a table is of another."""
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
    """The arrays without tables of sines and cosines that are ours, and the grid they are of.

    A table that differs is one that was learned: the encoder keeps it, MAE's decoder has none.
    """
    for part in ("encoder", "decoder"):
        table = flat.get(f"{part}/positions")
        if table is None:
            continue
        if table.ndim != 3:
            raise UserError(f"a table of positions has the shape {table.shape}, not (1, 1 + n, d).")
        grid = grid or square(table.shape[1] - 1, "positions")
        if far_from_fixed(table, grid) <= FIXED:
            flat = {path: value for path, value in flat.items() if path != f"{part}/positions"}
        elif part == "decoder":
            raise UserError(
                "the decoder's positions are not MAE's sines and cosines, and ours has no others: "
                "convert the encoder alone, by leaving out the arrays whose names begin so."
            )
    return flat, grid


def far_from_fixed(table: np.ndarray, grid: tuple[int, int], turn: int = 0) -> float:
    """max|difference| of a table (1, 1 + n, d) from MAE's; by a turn of d / 2, rows first."""
    usual = table.shape[2] % 4 == 0 and table.shape[1] == 1 + grid[0] * grid[1]
    return np.abs(table - np.roll(sines(grid, table.shape[2]), turn, 2)).max() if usual else np.inf


def is_moco_small(table: np.ndarray | None, grid: tuple[int, int]) -> bool:
    """Whether positions are of MoCo v3's ViT-S, which has 12 heads, where all others have 6."""
    return table is not None and table.shape[2] == 384 and far_from_fixed(table, grid, 192) <= FIXED


def sines(grid: tuple[int, int], width: int) -> np.ndarray:
    """MAE's positions (1, 1 + n, d): zero for the class token."""
    return np.pad(sincos2d(grid, width), ((0, 0), (1, 0), (0, 0)))


def fixed(params: dict, network: Network, dtype: np.dtype) -> dict[str, np.ndarray]:
    """By our names, the tables that others keep and we compute."""
    tables = {}
    if network.encoder.positions == "sincos":
        tables["encoder/positions"] = network.encoder.width
    if "decoder" in params:
        tables["decoder/positions"] = network.decoder.width
    if tables and not network.grid:
        raise UserError("the image size is unknown: set --image-size, for example 224.")
    return {path: sines(network.grid, d).astype(dtype) for path, d in tables.items()}


def index_buffers(network: Network) -> dict[str, np.ndarray]:
    """What the official BEiT keeps beside each table of relative positions."""
    bias = network.encoder.relative_bias
    places = ["rel_pos_bias"] if bias == "shared" else []
    if bias == "own":
        places = [f"blocks.{i}.attn" for i in range(network.encoder.depth)]
    index = relative_index(network.grid).astype(np.int64) if places else None
    return {f"{place}.relative_position_index": index for place in places}


def compare(params: dict, network: Network, extra: list[str]) -> None:
    """Raises UserError unless the arrays are those of the network that they are said to be of."""
    wanted = expected(params, network)
    found = leaves(params)

    def theirs(path):
        inner = path.split("/", 1)[1] if network.layout == "dalle" else path
        return rename(inner, network.layout, back=True) or path

    def listed(title, names):
        more = f", and {len(names) - 6} more" if len(names) > 6 else ""
        return [f"{len(names)} {title}: {', '.join(names[:6])}{more}"] if names else []

    def turned(path, shape):
        """A shape as in their layout; what converts arrays converts it."""
        nothing = np.broadcast_to(np.zeros(()), shape)
        return their_value(path, nothing, network).shape

    wrong = [
        f"{theirs(path)} {turned(path, found[path])}, should be {turned(path, shape)}"
        for path, shape in wanted.items()
        if path in found and found[path] != shape
    ]
    story = listed("missing", [theirs(path) for path in wanted if path not in found])
    story += listed("too many", extra + [theirs(path) for path in found if path not in wanted])
    story += listed("of another shape", wrong)
    if story:
        raise UserError(
            f"this is not {LAYOUTS[network.layout].title} as we know it: {'; '.join(story)}."
        )
