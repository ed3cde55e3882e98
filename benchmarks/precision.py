"""Measures the errors of bfloat16 relative to float64, next to those of PyTorch's autocast.

    pip install -e '.[torch]'
    python -m benchmarks.precision [--width=256] [--depth=24] [--images=8]

All use the same weights. The reference is plain PyTorch in float64; autocast is the same code in
bfloat16 on the CPU, with float32 weights. The relative error of an array is the norm of its
difference from the reference, divided by the norm of the reference. Columns:

- loss and output: the loss, and the logits or predictions that it is computed from;
- blocks: the sum of all branches after the first block;
- gradient: the median and the largest error over all parameters;
- biases: the largest error among the gradients of biases, tokens and gains.

The last row is for two narrow blocks with as many tokens as a chip processes in a step, so that
gradients of biases are sums over 25,000 rows.

Shapes: b images, n patches, k visible, d width, h heads, (p, q) patch.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict
from torch.nn import functional as F  # noqa: N812 - its usual name

from mim_jax.models.decoder import Decoder
from mim_jax.models.patches import patchify, relative_index, sincos2d, take
from mim_jax.models.vit import vit
from mim_jax.objectives.beit import BEiT
from mim_jax.objectives.classify import Classifier
from mim_jax.objectives.mae import MAE
from mim_jax.targets import statistics

PATCH, VALUES = 8, 512  # VALUES: the vocabulary, or the labels
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SHARED = ("bias", "q_bias", "v_bias", "scale", "gamma_1", "gamma_2", "cls_token", "mask_token")


class Case(NamedTuple):
    """A network and its training data."""

    objective: str  # beit, mae or classify
    model: dict  # arguments of `vit`, without dtype
    decoder: dict | None  # width, depth and heads of MAE's
    batch: dict  # images (b, H, W, 3), and masks, tokens or labels


class Outcome(NamedTuple):
    """The quantities of a network that are compared."""

    loss: np.ndarray  # ()
    output: np.ndarray  # the logits or predictions
    first: np.ndarray  # the residual stream after the first block (b, n, d)
    last: np.ndarray  # the same after the last block
    gradients: dict  # by the name of a parameter


def make_case(objective: str, *, width: int, depth: int, images: int, size: int = 64, **options):
    """Returns a case with images of random waves, and random masks, tokens or labels."""
    rng, n = np.random.default_rng(0), (size // PATCH) ** 2
    model = dict(width=width, depth=depth, heads=max(width // 64, 1), patch=PATCH, **options)
    y, x = np.mgrid[:size, :size] / size
    waves = rng.normal(size=(4, images, 1, 1, 3)) * 6
    pictures = np.sin(waves[0] * y[..., None] + waves[1] * x[..., None] + waves[2])
    pictures = pictures + 0.1 * rng.normal(size=pictures.shape)
    order = np.argsort(rng.random((images, n)), axis=1)
    batch = dict(
        images=pictures,
        order=order,
        masked=order < 0.4 * n,
        tokens=rng.integers(VALUES, size=(images, n)),
        labels=rng.integers(VALUES, size=images),
    )
    decoder = dict(width=width // 2, depth=4, heads=4) if objective == "mae" else None
    return Case(objective, model, decoder, batch)


def cases(width: int, depth: int, images: int) -> dict[str, Case]:
    """Returns the networks that are compared, by name."""
    sizes = dict(width=width, depth=depth, images=images)
    beit = dict(initializer="beit", key_bias=False, relative_bias="shared", positions="none")
    return {
        "BEiT": make_case("beit", **sizes, **beit),
        "BEiT, LayerScale 0.1": make_case("beit", **sizes, **beit, layer_scale=0.1),
        "BEiT, LayerScale 1e-5": make_case("beit", **sizes, **beit, layer_scale=1e-5),
        "MAE": make_case("mae", **sizes),
        "ViT": make_case("classify", **sizes, initializer="timm", positions="learned"),
    }


def many_rows() -> Case:
    """Returns a case of 128 x 197 tokens."""
    beit = dict(initializer="beit", key_bias=False, positions="learned", layer_scale=0.1)
    return make_case("beit", width=64, depth=2, images=128, size=14 * PATCH, **beit)


# --- Ours. ---


def network(case: Case, dtype: str):
    """Returns the network, its inputs, and a function params -> output, both residual streams."""
    encoder, batch = vit(**case.model, dtype=dtype), case.batch
    images, ends = jnp.asarray(batch["images"]), (0, case.model["depth"] - 1)
    n = batch["order"].shape[1]
    order = jnp.asarray(batch["order"])
    if case.objective == "beit":
        module, seen = BEiT(encoder, VALUES), dict(masked=jnp.asarray(batch["masked"]))
        places = jnp.broadcast_to(jnp.arange(n), (len(images), n))
        inputs = images, seen["masked"], places
    elif case.objective == "mae":
        module = MAE(encoder, Decoder(**case.decoder, dtype=dtype, remat="none"))
        seen = dict(visible=order[:, : n // 4])
        inputs = images, seen["visible"], order[:, n // 4 :]
    else:
        module = Classifier(encoder, VALUES, "mean", batch_norm=0, head_std=0.02)
        inputs, seen = (images,), {}

    def apply(params):
        streams = encoder.apply({"params": params["encoder"]}, images, layers=ends, **seen)
        return module.apply({"params": params}, *inputs), streams

    return module, inputs, apply


def loss_of(case: Case, output: jax.Array) -> jax.Array:
    """Returns the mean loss of the network's output."""
    batch = {name: jnp.asarray(x) for name, x in case.batch.items()}
    if case.objective == "mae":
        n = batch["order"].shape[1]
        target = take(patchify(batch["images"], (PATCH, PATCH)), batch["order"][:, n // 4 :])
        mean, deviation = statistics(target)
        return jnp.square(output - (target - mean) / deviation).mean()
    if case.objective == "classify":
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        return cross_entropy(output[:, 0], batch["labels"]).mean()
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(output, batch["tokens"])
    return (losses * batch["masked"]).sum() / batch["masked"].sum()


def initial(case: Case) -> dict:
    """Returns the parameters before training, in float32."""
    module, inputs, _ = network(case, "float32")
    params = jax.jit(module.init)(jax.random.key(0), *inputs)["params"]
    return jax.tree.map(np.asarray, params)


def ours(case: Case, params: dict, dtype: str) -> Outcome:
    """Returns the outcome of our network in a dtype; for float64, all inputs are float64 too."""
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        inputs = {k: x.astype(wide) if x.dtype.kind == "f" else x for k, x in case.batch.items()}
        case = case._replace(batch=inputs)
        _, _, apply = network(case, dtype)

        @jax.jit
        def compute(params):
            def loss(params):
                output, streams = apply(params)
                return loss_of(case, output), (output, streams)

            return jax.value_and_grad(loss, has_aux=True)(params)

        params = jax.tree.map(lambda x: jnp.asarray(x, wide), params)
        (loss, (output, (first, last))), gradients = compute(params)
        flat = flatten_dict(gradients, sep="/")
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), (loss, output, first, last))
    return Outcome(*arrays, {name: np.asarray(x, np.float64) for name, x in flat.items()})


# --- The reference: the papers' networks in plain PyTorch, with our parameters. ---


def linear(x, params, bias=None):
    return F.linear(x, params["kernel"].T, params.get("bias", bias))


def norm(x, params):
    return F.layer_norm(x, x.shape[-1:], params["scale"], params["bias"], 1e-6)


def block(x, params, heads, bias=None):
    qkv_bias = None
    if "q_bias" in params:
        q, v = params["q_bias"], params["v_bias"]
        qkv_bias = torch.cat([q, torch.zeros_like(q), v])
    qkv = linear(norm(x, params["norm1"]), params["qkv"], qkv_bias)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (b, h, n, d)
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = (logits if bias is None else logits + bias).softmax(-1)
    y = linear((weights @ v).transpose(1, 2).flatten(2), params["proj"])
    x = x + y * params.get("gamma_1", 1)
    y = linear(F.gelu(linear(norm(x, params["norm2"]), params["fc1"])), params["fc2"])
    return x + y * params.get("gamma_2", 1)


def blocks(x, params, heads, bias=None):
    """Returns the residual stream after each block."""
    streams = []
    while (name := f"block_{len(streams)}") in params:
        x = block(x, params[name], heads, bias)
        streams.append(x)
    return streams


def positions(grid, width, like):
    return torch.tensor(np.pad(sincos2d(grid, width), ((0, 0), (1, 0), (0, 0)))).to(like)


def reference_forward(case: Case, params: dict, batch: dict):
    """Returns the output, and the residual stream after the encoder's first and last block."""
    encoder, images = params["encoder"], batch["images"]
    b, height, width, c = images.shape
    grid = height // PATCH, width // PATCH
    patches = images.reshape(b, grid[0], PATCH, grid[1], PATCH, c).transpose(2, 3)
    patches = patches.reshape(b, grid[0] * grid[1], -1)
    n, order = patches.shape[1], batch["order"]
    x, bias = linear(patches, encoder["embed"]), None
    if case.objective == "beit":
        x = torch.where(batch["masked"][..., None], encoder["mask_token"].to(x.dtype), x)
    cls, kind = encoder["cls_token"], case.model.get("positions", "sincos")
    if kind != "none":
        fixed = kind == "sincos"
        table = positions(grid, case.model["width"], cls) if fixed else encoder["positions"]
        x, cls = x + table[:, 1:], cls + table[:, :1]
    if case.objective == "mae":
        x = x.take_along_dim(order[:, : n // 4, None], 1)
    x = torch.cat([cls.expand(b, -1, -1), x], 1)
    if "relative_position_bias" in encoder:
        table = encoder["relative_position_bias"]["table"]
        bias = table[torch.tensor(relative_index(grid)).long()].permute(2, 0, 1)
    streams = blocks(x, encoder, case.model["heads"], bias)
    ends = streams[0], streams[-1]
    if case.objective == "classify":
        pooled = norm(streams[-1][:, 1:].mean(1), params["fc_norm"])
        return linear(pooled, params["head"])[:, None], *ends
    x = norm(streams[-1], encoder["norm"])
    if case.objective == "beit":
        return linear(x[:, 1:], params["head"]), *ends
    decoder = params["decoder"]
    x = linear(x, decoder["embed"])
    tokens = torch.cat([x, decoder["mask_token"].to(x.dtype).expand(b, n - n // 4, -1)], 1)
    table = positions(grid, case.decoder["width"], decoder["mask_token"]).expand(b, -1, -1)
    patches = table[:, 1:].take_along_dim(order[..., None], 1)
    x = tokens + torch.cat([table[:, :1], patches], 1)
    x = norm(blocks(x, decoder, case.decoder["heads"])[-1], decoder["norm"])
    return linear(x, decoder["pred"])[:, 1 + n // 4 :], *ends


def reference(case: Case, params: dict, dtype: str) -> Outcome:
    """Returns the outcome of PyTorch in float64, in float32, or in bfloat16 by autocast."""
    wide = DTYPES.get(dtype, torch.float32)
    leaves = {
        name: torch.tensor(x, dtype=wide, requires_grad=True)
        for name, x in flatten_dict(params, sep="/").items()
    }
    tree: dict = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    batch = {name: torch.tensor(x) for name, x in case.batch.items()}
    batch["images"] = batch["images"].to(wide)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        output, first, last = reference_forward(case, tree, batch)
    read = output if dtype == "float64" else output.float()
    if case.objective == "mae":
        n = batch["order"].shape[1]
        target = patchify(case.batch["images"], (PATCH, PATCH))
        target = torch.tensor(np.asarray(target)).to(wide)
        target = target.take_along_dim(batch["order"][:, n // 4 :, None], 1)
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        loss = F.mse_loss(read, (target - mean) / (variance + 1e-6).sqrt())
    elif case.objective == "classify":
        loss = F.cross_entropy(read[:, 0], batch["labels"])
    else:
        loss = F.cross_entropy(read[batch["masked"]], batch["tokens"][batch["masked"]])
    loss.backward()
    arrays = (x.detach().double().numpy() for x in (loss, output, first, last))
    return Outcome(*arrays, {name: x.grad.double().numpy() for name, x in leaves.items()})


# --- The comparison. ---


def relative(x: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(x - right) / np.linalg.norm(right))


def errors(outcome: Outcome, right: Outcome) -> dict[str, float]:
    """Returns the relative error of each quantity."""
    gradients = {name: relative(x, right.gradients[name]) for name, x in outcome.gradients.items()}
    shared = [error for name, error in gradients.items() if name.split("/")[-1] in SHARED]
    return {
        "loss": relative(outcome.loss, right.loss),
        "output": relative(outcome.output, right.output),
        "blocks": relative(outcome.last - outcome.first, right.last - right.first),
        "gradient, median": float(np.median(list(gradients.values()))),
        "gradient, largest": max(gradients.values()),
        "biases, largest": max(shared),
    }


def compare(case: Case, compute: Callable = ours) -> dict[str, dict[str, float]]:
    """Returns the errors of a case in bfloat16: {"ours": {quantity: error}, "autocast": ...}."""
    params = initial(case)
    right = reference(case, params, "float64")
    return {
        "ours": errors(compute(case, params, "bfloat16"), right),
        "autocast": errors(reference(case, params, "bfloat16"), right),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--images", type=int, default=8)
    flags = parser.parse_args()
    rows = cases(flags.width, flags.depth, flags.images) | {"128 x 197 tokens": many_rows()}
    head = False
    for name, case in rows.items():
        for who, row in compare(case).items():
            if not head:
                print("| network | computed by |", " | ".join(row), "|")
                print("|---|---|" + "---|" * len(row))
                head = True
            print(f"| {name} | {who} |", " | ".join(f"{x:.2g}" for x in row.values()), "|")


if __name__ == "__main__":
    main()
