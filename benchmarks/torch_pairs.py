"""Pairs of the same small network in mim_jax and in PyTorch, for curve_parity.

MAE, BEiT and BEiT's segmentation are those of transformers, fine-tuning is timm's; the dVAE is
written in plain PyTorch from its paper. The weights are converted by `mim_jax.convert`. Random
masks, dropped branches and Gumbel noise are drawn by our objectives and given to PyTorch.

Shapes: b images, n patches, v vocabulary, h and w rows and columns of tokens, (p, q) patch.
"""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from mim_jax import masking
from mim_jax.convert import Network, to_torch
from mim_jax.convert.files import save_weights
from mim_jax.models.decoder import Decoder
from mim_jax.models.dvae import dvae as build_dvae
from mim_jax.models.transformer import drop_paths
from mim_jax.models.vit import vit
from mim_jax.objectives import Objective, beit, classify, dvae, mae, per_example, segment

MEAN = STD = 0.5  # of all channels
VOCABULARY, SMOOTHING, CLASSES = 64, 0.1, 5
# The paper's temperature (appendix A.2) falls to 1/16 in 150,000 steps. Within 300 steps, losses
# below about 0.1 are chaotic: rounding errors of PyTorch alone grow by the factor 2.5 a step.
TEMPERATURE, MIN_TEMPERATURE, KL_WEIGHT = 1.0, 0.5, 6.6


class Recipe(NamedTuple):
    """An optimizer and its schedule, described for both libraries."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    undecayed: tuple[str, ...] = ()  # our names of parameters without weight decay
    layer_decay: float = 1.0
    clip_norm: float = 0.0
    schedule: str = "mae"


class Sizes(NamedTuple):
    """The sizes of the networks and of a batch."""

    width: int = 32
    depth: int = 3
    heads: int = 2
    patch: int = 8
    image: int = 32
    batch: int = 16
    steps: int = 300
    seed: int = 0


class Pair(NamedTuple):
    """An objective of ours, and how PyTorch computes the same loss.

    Fields:
        objective: ours.
        module: (params, buffers) -> the PyTorch module with these weights, in their dtype.
        draw: (rng of a step, batch) -> the random numbers of the step, {name: array}.
        loss: (module, batch, draws, step) -> loss (); batch and draws of tensors.
        groups: (module, recipe) -> parameter groups with an `lr_scale` each.
        recipe: the optimizer.
    """

    objective: Objective
    module: Callable
    draw: Callable
    loss: Callable
    groups: Callable
    recipe: Recipe


NAMES = {  # of parameters in PyTorch, by ours
    "cls_token": ("cls_token",),
    "positions": ("pos_embed", "position_embeddings"),
}


def by_axes(module: nn.Module, recipe: Recipe) -> list[dict]:
    """Returns two groups: parameters with one axis, or excluded by name, do not decay."""
    undecayed = tuple(name for ours in recipe.undecayed for name in NAMES[ours])
    groups: dict[bool, list] = {True: [], False: []}
    for name, x in module.named_parameters():
        if x.requires_grad:
            groups[x.ndim > 1 and not name.endswith(undecayed or ("\0",))].append(x)
    return [
        dict(params=params, weight_decay=recipe.weight_decay * decays, lr_scale=1.0)
        for decays, params in groups.items()
    ]


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Normalizes images (b, H, W, c) in [0, 1] -> (b, c, H, W)."""
    return ((images - MEAN) / STD).permute(0, 3, 1, 2)


def from_hugging_face(params: dict, network: Network) -> nn.Module:
    """Returns the model of transformers with converted weights, in their dtype."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, np.asarray(jax.tree.leaves(params)[0]).dtype.name)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder), jax.tree.map(np.asarray, params), network, "hf")
        [name] = json.loads((Path(folder) / "config.json").read_text())["architectures"]
        return getattr(transformers, name).from_pretrained(folder, dtype=dtype).train()


class GivenDropPath(nn.Module):
    """Multiplies branches by the factors (2, b) in `factors`: attention's first, then the MLP's."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors.pop(0)[:, None, None].to(x.dtype)


def statistics() -> dict[str, tuple]:
    return dict(mean=(MEAN,), std=(STD,))


def make_mae(sizes: Sizes, dtype: str, num_labels: int) -> Pair:
    """Returns the pair of masked autoencoding."""
    model = vit(
        width=sizes.width, depth=sizes.depth, heads=sizes.heads, patch=sizes.patch, dtype=dtype
    )
    decoder = dict(width=sizes.width // 2, depth=2, heads=2)
    ratio, side = 0.75, sizes.image // sizes.patch
    settings = {f"decoder_{name}": value for name, value in decoder.items()}

    def module(params: dict, buffers: dict) -> nn.Module:
        network = Network(
            model,
            "mae",
            Decoder(**decoder, dtype=dtype, remat="none"),
            grid=(side, side),
            metadata=statistics() | dict(target="normalized_pixels", mask_ratio=ratio),
        )
        theirs = from_hugging_face(params, network)
        for name, x in theirs.named_parameters():  # from_pretrained makes fixed positions trainable
            x.requires_grad_("pos" not in name.split(".")[-1])
        return theirs

    def draw(rng: jax.Array, batch: dict) -> dict:
        order = masking.hide(per_example(rng, batch["index"]), (side, side), ratio)
        return dict(noise=jnp.argsort(jnp.concatenate(order, axis=1)))  # it sorts into this order

    def loss(module: nn.Module, batch: dict, draws: dict, step: int) -> torch.Tensor:
        return module(normalized(batch["image"]), noise=draws["noise"]).loss

    objective = mae.objective(model, mask_ratio=ratio, **settings, **statistics())
    recipe = Recipe(lr=2e-3, betas=(0.9, 0.95))
    return Pair(objective, module, draw, loss, by_axes, recipe)


def make_beit(sizes: Sizes, dtype: str, num_labels: int) -> Pair:
    """Returns the pair of BEiT: relative positions, LayerScale, stochastic depth and clipping."""
    rate, side = 0.1, sizes.image // sizes.patch
    model = vit(
        width=sizes.width,
        depth=sizes.depth,
        heads=sizes.heads,
        patch=sizes.patch,
        positions="none",
        relative_bias="shared",
        layer_scale=0.1,
        key_bias=False,
        drop_path=rate,
        initializer="beit",
        dtype=dtype,
    )
    tokenizer = build_dvae(width=16, layers=2, blocks=1, codebook=16, vocabulary=VOCABULARY)
    wide = "float64" if dtype == "float64" else "float32"
    settings = dict(num_masked=round(0.4 * side**2), min_block=2, **statistics())
    methods = beit.MaskedImageModeling(model, tokenizer.with_dtype(wide), **settings)

    def module(params: dict, buffers: dict) -> nn.Module:
        network = Network(model, "beit", grid=(side, side), metadata=statistics())
        theirs = from_hugging_face(params, network)
        for layer in theirs.beit.layers:
            layer.drop_path = GivenDropPath()
        theirs.tokenizer = DalleEncoder(buffers["tokenizer"]).requires_grad_(False)
        return theirs

    def draw(rng: jax.Array, batch: dict) -> dict:
        keys = per_example(jax.random.fold_in(rng, 1), batch["index"])
        masked = methods.mask(batch, rng).mask_tokens
        return dict(masked=masked, keep=drop_paths(keys, rate, sizes.depth))

    def loss(module: Any, batch: dict, draws: dict, step: int) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            view = 0.1 + 0.8 * batch["tokenizer_image"].permute(0, 3, 1, 2)
            tokens = module.tokenizer(view).argmax(1).flatten(1)  # (b, n)
        for layer, keep in zip(module.beit.layers, draws["keep"], strict=True):
            layer.drop_path.factors = list(keep)
        masked = draws["masked"]
        logits = module(normalized(batch["image"]), bool_masked_pos=masked).logits
        return F.cross_entropy(logits[masked], tokens[masked])

    recipe = Recipe(lr=2e-3, undecayed=("cls_token",), clip_norm=1.0, schedule="beit")
    objective = beit.objective(model, tokenizer.with_dtype(wide), **settings)
    return Pair(objective, module, draw, loss, by_axes, recipe)


def make_finetune(sizes: Sizes, dtype: str, num_labels: int) -> Pair:
    """Returns the pair of fine-tuning: layer decay, stochastic depth, smoothed labels."""
    rate, side = 0.1, sizes.image // sizes.patch
    shape = dict(width=sizes.width, depth=sizes.depth, heads=sizes.heads, patch=sizes.patch)
    options = dict(positions="learned", initializer="timm", drop_path=rate)
    model = vit(**shape, **options, dtype=dtype)

    def module(params: dict, buffers: dict) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        network = Network(model, "classify", grid=(side, side), metadata=statistics())
        state = to_torch(jax.tree.map(np.asarray, params), network, layout="timm")
        theirs = VisionTransformer(
            img_size=sizes.image,
            patch_size=sizes.patch,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            num_classes=num_labels,
            global_pool="avg",
        )
        tensors = {name: torch.tensor(x) for name, x in state.items()}
        theirs = theirs.to(next(iter(tensors.values())).dtype)
        theirs.load_state_dict(tensors)
        for block in theirs.blocks:
            block.drop_path1 = block.drop_path2 = GivenDropPath()
        return theirs.train()

    def draw(rng: jax.Array, batch: dict) -> dict:
        keys = per_example(jax.random.split(rng)[1], batch["index"])
        return dict(keep=drop_paths(keys, rate, sizes.depth))

    def loss(module: Any, batch: dict, draws: dict, step: int) -> torch.Tensor:
        for block, keep in zip(module.blocks, draws["keep"], strict=True):
            block.drop_path1.factors = list(keep)
        logits = module(normalized(batch["image"]))
        return F.cross_entropy(logits, batch["label"].long(), label_smoothing=SMOOTHING)

    def groups(module: nn.Module, recipe: Recipe) -> list[dict]:
        from timm.optim import param_groups_layer_decay

        return param_groups_layer_decay(
            module,
            weight_decay=recipe.weight_decay,
            no_weight_decay_list=module.no_weight_decay(),
            layer_decay=recipe.layer_decay,
        )

    recipe = Recipe(lr=2e-3, undecayed=("cls_token", "positions"), layer_decay=0.65)
    objective = classify.objective(model, num_labels, smoothing=SMOOTHING, **statistics())
    return Pair(objective, module, draw, loss, groups, recipe)


def make_segment(sizes: Sizes, dtype: str, num_labels: int) -> Pair:
    """Returns the pair of BEiT's segmentation by UPerNet with an auxiliary decoder."""
    depth, side = max(sizes.depth, 4), sizes.image // sizes.patch
    shape = dict(width=sizes.width, depth=depth, heads=sizes.heads, patch=sizes.patch)
    relative = dict(positions="none", relative_bias="own", layer_scale=0.1, key_bias=False)
    model = vit(**shape, **relative, initializer="beit_finetune", dtype=dtype)
    settings = dict(
        layers=segment.default_layers(depth) if depth > 5 else (0, 1, 2, 3),
        channels=sizes.width,
        auxiliary_channels=16,
        batch_norm=sizes.batch,
        dropout=0.0,
        average="labeled",
        **statistics(),
    )
    classes, colors = tuple("abcde"), ((0, 0, 0),) * CLASSES
    objective = segment.objective(model, classes, colors, (sizes.image,) * 2, **settings)

    def module(params: dict, buffers: dict) -> nn.Module:
        metadata = statistics() | dict(layers=settings["layers"])
        network = Network(model, "segment", grid=(side, side), metadata=metadata)
        return from_hugging_face(params | buffers, network)

    def draw(rng: jax.Array, batch: dict) -> dict:
        return {}

    def loss(module: nn.Module, batch: dict, draws: dict, step: int) -> torch.Tensor:
        return module(normalized(batch["image"]), labels=batch["segmentation"].long()).loss

    recipe = Recipe(lr=7e-4, schedule="mmseg")  # the rate of ade20k_beit_base
    return Pair(objective, module, draw, loss, by_axes, recipe)


def make_dvae(sizes: Sizes, dtype: str, num_labels: int) -> Pair:
    """Returns the pair of the dVAE."""
    tokenizer = build_dvae(
        width=8, layers=2, blocks=1, codebook=16, vocabulary=VOCABULARY, dtype=dtype
    )
    cooling, warmup = 2 * sizes.steps // 3, sizes.steps // 3
    objective = dvae.objective(
        tokenizer,
        temperature=TEMPERATURE,
        min_temperature=MIN_TEMPERATURE,
        temperature_steps=cooling,
        kl_weight=KL_WEIGHT,
        kl_warmup_steps=warmup,
    )
    wide = "float64" if dtype == "float64" else "float32"
    side = sizes.image // 4

    def module(params: dict, buffers: dict) -> nn.Module:
        parts = dict(encoder=DalleEncoder(params["tokenizer"]))
        return nn.ModuleDict(parts | dict(decoder=DalleDecoder(params["decoder"])))

    def draw(rng: jax.Array, batch: dict) -> dict:
        keys = per_example(rng, batch["index"])
        shape = side, side, VOCABULARY
        return dict(noise=jax.vmap(lambda key: jax.random.gumbel(key, shape, wide))(keys))

    def loss(module: Any, batch: dict, draws: dict, step: int) -> torch.Tensor:
        x = 0.1 + 0.8 * batch["image"].permute(0, 3, 1, 2)
        logits = module["encoder"](x).to(x.dtype)  # (b, v, h, w)
        noise = draws["noise"].permute(0, 3, 1, 2)
        temperature = half_cosine(TEMPERATURE, MIN_TEMPERATURE, cooling, step)
        codes = ((logits + noise) / temperature).softmax(1)
        mean, log_scale = module["decoder"](codes).to(x.dtype).chunk(2, 1)
        density = -(2 * x * (1 - x)).log() - log_scale
        density = density - (x.logit() - mean).abs() / log_scale.exp()
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(VOCABULARY))).sum()
        return (half_cosine(0.0, KL_WEIGHT, warmup, step) * kl - density.sum()) / x.numel()

    recipe = Recipe(lr=1e-4, weight_decay=1e-4)  # the rate of the paper, A.2
    return Pair(objective, module, draw, loss, by_axes, recipe)


def half_cosine(start: float, end: float, steps: int, step: int) -> float:
    """Half a cosine from `start` to `end`, then constant."""
    share = min(step / steps, 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


# --- DALL-E's networks, with the names of OpenAI's arrays (appendix A.1 of the paper). ---


class Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(outputs, inputs, side, side))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, sides: tuple[int, ...], gain: float):
        super().__init__()
        widths, self.gain = (inputs, *[outputs // 4] * 3, outputs), gain
        self.id_path = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.res_path = nn.ModuleDict(
            {f"conv_{i + 1}": Convolution(widths[i], widths[i + 1], sides[i]) for i in range(4)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for convolution in self.res_path.values():
            y = convolution(y.relu())
        return self.id_path(x) + self.gain * y


class Groups(nn.Module):
    """Input, groups of blocks with a change of resolution between them, and output."""

    sides: tuple[int, ...]

    def __init__(self, params: dict):
        super().__init__()
        network = Network(None, "dvae", layout="dalle")  # the layout needs no sizes
        part = type(self).__name__.removeprefix("Dalle").lower()
        tree = {"tokenizer" if part == "encoder" else part: jax.tree.map(np.asarray, params)}
        state = {k: torch.tensor(x) for k, x in to_torch(tree, network, layout="dalle").items()}
        shapes = {name.removeprefix("blocks."): x.shape for name, x in state.items()}
        self.count = len({name.split(".")[0] for name in shapes if name.startswith("group")})
        blocks = len({name.split(".")[1] for name in shapes if name.startswith("group_1.")})
        gain = (self.count * blocks) ** -2
        parts: dict[str, nn.Module] = {"input": Convolution(*sizes(shapes["input.w"]))}
        for group in range(1, self.count + 1):
            parts[f"group_{group}"] = nn.ModuleDict()
            for i in range(1, blocks + 1):
                name = f"group_{group}.block_{i}.res_path"
                inputs, outputs = shapes[f"{name}.conv_1.w"][1], shapes[f"{name}.conv_4.w"][0]
                block = ResidualBlock(inputs, outputs, self.sides, gain)
                parts[f"group_{group}"][f"block_{i}"] = block
        parts["output"] = nn.ModuleDict(dict(conv=Convolution(*sizes(shapes["output.conv.w"]))))
        self.blocks = nn.ModuleDict(parts)
        self.to(next(iter(state.values())).dtype).load_state_dict(state)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        """Changes the resolution."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks["input"](x)
        for group in range(1, self.count + 1):
            x = self.between(x) if group > 1 else x
            for block in self.blocks[f"group_{group}"].values():
                x = block(x)
        return self.blocks["output"]["conv"](x.relu())


class DalleEncoder(Groups):
    """Images in [0.1, 0.9] (b, c, H, W) -> logits (b, v, h, w)."""

    sides = (3, 3, 3, 1)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 2)


class DalleDecoder(Groups):
    """Codes (b, v, h, w) -> parameters of pixels (b, 2c, H, W)."""

    sides = (1, 3, 3, 3)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


def sizes(shape: torch.Size) -> tuple[int, int, int]:
    """Returns inputs, outputs and side of a convolution of this shape."""
    return shape[1], shape[0], shape[2]


PAIRS: dict[str, Callable[[Sizes, str, int], Pair]] = dict(
    mae=make_mae, beit=make_beit, finetune=make_finetune, segment=make_segment, dvae=make_dvae
)
