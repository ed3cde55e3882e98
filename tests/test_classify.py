"""Classification against timm, Hugging Face and PyTorch; what is trained and what is not."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mim_jax import UserError, main, optim
from mim_jax.models.batch_norm import BatchNorm
from mim_jax.models.vit import vit
from mim_jax.objectives import beit, classify, mae
from mim_jax.sharding import make_mesh
from mim_jax.train import TrainState, evaluate, train_step
from tests import official
from tests.timm_models import timm_models

MODEL = dict(width=32, depth=3, heads=4, patch=8, positions="learned")
PLAIN = dict(mean=(0.0,), std=(1.0,))
CLASSES = 10
NAMES = {"pos_embed": "encoder/positions", "head.weight": "head/kernel", "head.bias": "head/bias"}
NAMES |= {"fc_norm.weight": "fc_norm/scale", "fc_norm.bias": "fc_norm/bias"}


def images(count=4, size=32, channels=3):
    return np.random.default_rng(0).normal(size=(count, size, size, channels))


def a_batch(count=8):
    label = np.random.default_rng(1).integers(0, CLASSES, count).astype(np.int32)
    pixels = np.random.default_rng(2).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return {"image": pixels, "label": label, "index": np.arange(count, dtype=np.int32)}


def randomized(module, scale=0.2):
    """A torch module with weights drawn anew: at its initialisation a network hides mistakes."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator).double()
    return module.double().eval()


def to_params(module) -> dict:
    """The weights of timm's ViT or BEiT as ours."""
    params = {}
    for name, value in module.named_parameters():
        value = value.detach().numpy()
        place = NAMES.get(name)
        if place is None and name.endswith("relative_position_bias_table"):
            place = f"encoder/block_{name.split('.')[1]}/relative_position_bias/table"
        elif place is None and name.endswith(("gamma_1", "gamma_2", "q_bias", "v_bias")):
            place = f"encoder/block_{name.split('.')[1]}/{name.split('.')[-1]}"
        place = place or official.our_name(name)
        params[place] = value if "table" in place else official.our_value(value)
    return nested(params)


def nested(flat: dict) -> dict:
    tree = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(value)
    return tree


def logits_of(objective_options, model, params, pixels):
    """Through what `evaluate` calculates there is no way back to logits: through the network."""
    encoder = vit(**model)
    network = classify.Classifier(encoder, CLASSES, **objective_options)
    return network.apply({"params": params}, pixels)[:, 0]


PROBE = dict(batch_norm=0, head_std=0.01)


@pytest.mark.parametrize(("pooling", "theirs"), [("mean", "avg"), ("cls", "token")])
def test_logits_equal_timm(pooling, theirs):
    torch, models = pytest.importorskip("torch"), timm_models()
    network = models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=CLASSES,
        global_pool=theirs,
    )  # fmt: skip
    network, pixels = randomized(network), images()
    expected = network(torch.tensor(pixels).permute(0, 3, 1, 2)).detach().numpy()
    with jax.enable_x64(True):
        model = MODEL | dict(dtype="float64")
        ours = logits_of(dict(pooling=pooling) | PROBE, model, to_params(network), pixels)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_logits_equal_beit():
    torch, models = pytest.importorskip("torch"), timm_models()
    network = models.beit.Beit(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=CLASSES,
        init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True,
    )  # fmt: skip
    network, pixels = randomized(network), images()
    expected = network(torch.tensor(pixels).permute(0, 3, 1, 2)).detach().numpy()
    with jax.enable_x64(True):
        model = dict(positions="none", relative_bias="own", layer_scale=0.1, key_bias=False)
        model = MODEL | model | dict(dtype="float64")
        ours = logits_of(dict(pooling="mean") | PROBE, model, to_params(network), pixels)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_a_stem_cannot_hide_patches():
    model = dict(MODEL, patch=16, stem="resnet50")
    for objective in (
        mae.objective(vit(**model)),
        beit.objective(vit(**model), target="pixels", num_masked=2, min_block=1),
    ):
        with pytest.raises(UserError, match=r"model.stem mixes visible and hidden patches"):
            jax.eval_shape(objective.init, jax.random.key(0), a_batch())
    with pytest.raises(UserError, match=r"needs model\.patch = 16"):
        classify.objective(vit(**MODEL, stem="resnet50"), CLASSES)


def test_logits_equal_hugging_face():
    """Its ViT, with the weights of timm's: it has a head on the class token alone."""
    torch, models = pytest.importorskip("torch"), timm_models()
    transformers = pytest.importorskip("transformers")
    source = models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=CLASSES
    )
    source, pixels = randomized(source), images()
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        image_size=32, patch_size=8, num_labels=CLASSES, layer_norm_eps=1e-6,
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config).double().eval()
    state = {}
    for name, value in source.state_dict().items():
        module, _, leaf = name.rpartition(".")
        place = {
            "cls_token": "vit.embeddings.cls_token",
            "pos_embed": "vit.embeddings.position_embeddings",
            "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
            "norm": "vit.layernorm",
            "head": "classifier",
        }.get(module or name)
        if place:
            state[f"{place}.{leaf}" if module else place] = value
            continue
        _, index, inner = module.split(".", 2)
        block = f"vit.layers.{index}."
        if inner == "attn.qkv":
            for part, third in zip("qkv", value.chunk(3), strict=True):
                state[f"{block}attention.{part}_proj.{leaf}"] = third
        else:
            names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
            names |= {"attn.proj": "attention.o_proj"}
            state[f"{block}{names.get(inner, inner)}.{leaf}"] = value
    network.load_state_dict(state)
    expected = network(torch.tensor(pixels).permute(0, 3, 1, 2)).logits.detach().numpy()
    with jax.enable_x64(True):
        model = MODEL | dict(dtype="float64")
        ours = logits_of(dict(pooling="cls") | PROBE, model, to_params(source), pixels)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_batch_norm_equals_pytorch():
    """Of two groups of rows, that of two devices, whose running statistics are averaged."""
    torch = pytest.importorskip("torch")
    theirs = [torch.nn.BatchNorm1d(5, affine=False, eps=1e-6).double() for _ in range(2)]
    rng, norm = np.random.default_rng(0), BatchNorm(7, 1e-6, affine=False)
    with jax.enable_x64(True):
        variables = norm.init(jax.random.key(0), jnp.zeros((1, 5)), False)
        for _ in range(3):
            x = rng.normal(2.0, 3.0, size=(14, 5))
            ours, variables = norm.apply(variables, x, True, mutable=["batch_statistics"])
            expected = [
                n(torch.tensor(rows)) for n, rows in zip(theirs, (x[:7], x[7:]), strict=True)
            ]
            np.testing.assert_allclose(ours, torch.cat(expected).numpy(), atol=1e-12)
        measured = variables["batch_statistics"]
        for name, running in (("mean", "running_mean"), ("variance", "running_var")):
            expected = sum(getattr(n, running).numpy() for n in theirs) / 2
            np.testing.assert_allclose(measured[name], expected, atol=1e-12)
        x = rng.normal(size=(4, 5))
        expected = (x - measured["mean"]) / np.sqrt(measured["variance"] + 1e-6)
        np.testing.assert_allclose(norm.apply(variables, x, False), expected, atol=1e-12)


def test_the_loss_with_smoothed_labels_equals_pytorch():
    torch = pytest.importorskip("torch")
    objective = classify.objective(vit(**MODEL), CLASSES, smoothing=0.1, head_std=1.0, **PLAIN)
    batch = a_batch()
    params, buffers = objective.init(jax.random.key(0), batch)
    total, weight, _ = objective.loss(params, buffers, batch, jax.random.key(0), 0)
    logits = logits_of(
        dict(pooling="mean", batch_norm=0, head_std=1.0), MODEL, params, batch["image"] / 255
    )
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)), torch.tensor(batch["label"]).long(), label_smoothing=0.1
    )
    assert weight == 8
    assert float(total) / 8 == pytest.approx(float(theirs), rel=1e-5)


# --- How to step. ---


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0.65, {"positions": 0.0036972059, "block_0": 0.0056880091, "block_11": 0.65, "norm": 1}),
        (0.75, {"embed": 0.023757264, "cls_token": 0.023757264, "block_11": 0.75}),
    ],
)
def test_layer_rates_equal_the_reference(decay, expected):
    objective = classify.objective(vit(size="B", positions="learned"), 1000, pooling="cls")
    example = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)}
    params, _ = jax.eval_shape(objective.init, jax.random.key(0), example)
    scales = optim.layer_scales(params, decay)
    for name, scale in expected.items():
        for leaf in jax.tree.leaves(scales["encoder"][name]):
            assert leaf == pytest.approx(scale, rel=1e-7)
    assert set(jax.tree.leaves(scales["head"])) == {1}
    assert len(set(jax.tree.leaves(scales))) == 14
    shared = {"encoder": {"block_1": 0, "relative_position_bias": {"table": 0}}, "head": 0}
    assert optim.layer_scales(shared, 0.5)["encoder"]["relative_position_bias"]["table"] == 1
    # With the decay of weights, 28 groups: the first 14 times with and without.
    decays = optim.matrices(params, but=("cls_token", "positions"))
    assert not decays["encoder"]["cls_token"]
    assert not decays["encoder"]["positions"]
    assert len(set(zip(*map(jax.tree.leaves, (scales, decays)), strict=True))) == 28


def test_layer_decay_scales_the_whole_step():
    params = {
        "encoder": {"block_0": jnp.ones((2, 2)), "embed": jnp.ones((2, 2))},
        "head": jnp.ones(2),
    }
    grads = jax.tree.map(lambda x: x * 3.0, params)
    plain, decayed = (
        optim.adamw(lambda step: 0.1, weight_decay=0.5, layer_decay=decay) for decay in (1.0, 0.5)
    )
    steps = [tx.update(grads, tx.init(params), params)[0] for tx in (plain, decayed)]
    ratio = jax.tree.map(lambda a, b: float(jnp.mean(a / b)), *reversed(steps))
    assert ratio == {"encoder": {"block_0": 0.5, "embed": 0.25}, "head": 1.0}


def test_lars_equals_mae_with_a_changing_rate():
    """Against its rule written in PyTorch: trust, then momentum, then the rate of the moment."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {
        "kernel": rng.normal(size=(4, 3)),
        "bias": rng.normal(size=3),
        "zero": np.zeros((2, 2)),
    }
    rates = [0.5, 6.4, 1.0, 0.1, 3.0]
    theirs = {name: torch.tensor(x) for name, x in start.items()}
    momenta = {name: torch.zeros_like(x) for name, x in theirs.items()}
    with jax.enable_x64(True):
        tx = optim.lars(lambda step: jnp.asarray(rates)[step], weight_decay=0.1)
        ours = jax.tree.map(jnp.asarray, start)
        opt_state = tx.init(ours)
        for rate in rates:
            grads = {name: rng.normal(size=x.shape) for name, x in start.items()}
            updates, opt_state = tx.update(jax.tree.map(jnp.asarray, grads), opt_state, ours)
            ours = optax.apply_updates(ours, updates)
            for name, p in theirs.items():
                g = torch.tensor(grads[name])
                if p.ndim > 1:
                    g = g + 0.1 * p
                    if p.norm() > 0 and g.norm() > 0:
                        g = g * 0.001 * p.norm() / g.norm()
                momenta[name] = 0.9 * momenta[name] + g
                theirs[name] = p - rate * momenta[name]
        for name, p in theirs.items():
            np.testing.assert_allclose(ours[name], p.numpy(), rtol=1e-12)


# --- What is trained. ---


def after_steps(objective, optimizer, batch, devices=1, steps=2):
    """-> the state before and after some steps."""
    mesh = make_mesh(jax.devices()[:devices])
    params, buffers = objective.init(jax.random.key(0), batch)
    if jax.config.jax_enable_x64:
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    state = TrainState(jnp.int32(0), params, buffers, optimizer.init(params))
    settings = dict(objective=objective, optimizer=optimizer, accumulate=1, mesh=mesh)
    step, before = jax.jit(functools.partial(train_step, **settings)), state
    for _ in range(steps):
        state, metrics = step(state, batch, jax.random.key(0))
        assert np.isfinite(metrics["loss"])
    return before, state


def moved(before, after) -> set[str]:
    flat = [
        flatten_dict({"params": x.params, "buffers": x.buffers}, sep="/") for x in (before, after)
    ]
    return {
        name for name, x in flat[0].items() if (np.asarray(x) != np.asarray(flat[1][name])).any()
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            dict(pooling="cls", batch_norm=4),
            {
                *("params/head/bias", "params/head/kernel"),
                "buffers/batch_statistics/head_norm/mean",
                "buffers/batch_statistics/head_norm/variance",
            },
        ),
        (
            dict(pooling="layers"),
            {f"params/head_{i}/{leaf}" for i in range(3) for leaf in ("bias", "kernel")},
        ),
    ],
)
def test_a_linear_probe_moves_the_head_and_the_batch_statistics(options, expected):
    objective = classify.objective(
        vit(**MODEL), CLASSES, tuned_blocks=0.0, head_std=0.01, **options
    )
    optimizer = optim.lars(lambda step: 1.0)
    before, after = after_steps(objective, optimizer, a_batch())
    assert moved(before, after) == expected
    assert set(before.params) == {name.split("/")[1] for name in expected if "params" in name}
    assert len(flatten_dict(before.buffers["encoder"])) == 40 + 2 * (options["pooling"] == "cls")


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (0.5, {f"block_2/{name}" for name in ("norm2", "fc1", "fc2")}),
        (1.0, {f"block_2/{name}" for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")}),
        (1.5, {"block_1/norm2", "block_1/fc1", "block_1/fc2"}
         | {f"block_2/{name}" for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")}),
        (3.0, {f"block_{i}/{name}" for i in range(3)
               for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")}),
    ],
)  # fmt: skip
def test_partial_fine_tuning_moves_exactly_the_last_blocks(blocks, expected):
    objective = classify.objective(vit(**MODEL), CLASSES, tuned_blocks=blocks, head_std=0.1)
    before, after = after_steps(objective, optim.adamw(lambda step: 1e-2), a_batch())
    changed = moved(before, after)
    blocks = {name.split("/", 2)[2].rsplit("/", 1)[0] for name in changed if "/encoder/" in name}
    assert blocks == expected
    rest = {name for name in changed if "/encoder/" not in name}
    assert rest == {
        f"params/{name}" for name in ("fc_norm/scale", "fc_norm/bias", "head/kernel", "head/bias")
    }
    assert not any(name.startswith("buffers") for name in changed)


def test_freezing_changes_no_value():
    """Frozen or not, the network is the same: so is its loss."""
    batch, losses = a_batch(), []
    for blocks in (-1.0, 0.0, 1.5):
        objective = classify.objective(vit(**MODEL), CLASSES, tuned_blocks=blocks, head_std=0.1)
        params, buffers = objective.init(jax.random.key(0), batch)
        losses.append(float(objective.loss(params, buffers, batch, jax.random.key(0), 0)[0]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_everything_at_once_on_eight_devices():
    """Erasing, mixing, smoothing, stochastic depth: the same step on one device and on eight.

    Without the keys' bias, whose true gradient is 0: AdamW would amplify its rounding errors.
    """
    with jax.enable_x64(True):
        objective = classify.objective(
            vit(**MODEL, drop_path=0.2, key_bias=False, dtype="float64"),
            CLASSES,
            smoothing=0.1,
            mixup=0.8,
            cutmix=1.0,
            mixup_group=2,
            erasing=0.5,
            head_std=0.1,
        )
        optimizer = optim.adamw(lambda step: 1e-3, layer_decay=0.75)
        assert_same_on_one_and_eight(objective, optimizer)
        probe = classify.objective(
            vit(**MODEL, dtype="float64"),
            CLASSES,
            pooling="cls",
            batch_norm=2,
            tuned_blocks=0.0,
            head_std=0.1,
        )
        assert_same_on_one_and_eight(probe, optim.lars(lambda step: 1.0))


def assert_same_on_one_and_eight(objective, optimizer):
    """Compares parameters and buffers after two steps in float64."""
    one, eight = (
        jax.device_get(after_steps(objective, optimizer, a_batch(16), n)[1]) for n in (1, 8)
    )
    for a, b in zip(jax.tree.leaves(one[1:3]), jax.tree.leaves(eight[1:3]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


# --- How it is judged. ---


@pytest.mark.parametrize("options", [dict(pooling="mean"), dict(pooling="layers")])
def test_accuracy_counts_each_example_once(options):
    objective = classify.objective(vit(**MODEL), CLASSES, head_std=1.0, **options)
    batch = a_batch(16) | {"valid": (np.arange(16) < 13).astype(np.float32)}
    params, buffers = objective.init(jax.random.key(3), batch)
    mesh = make_mesh(jax.devices()[:2])
    state = TrainState(jnp.int32(0), params, buffers, ())
    measured = evaluate(objective, state, [batch], mesh=mesh, seed=0)

    mean, std = (np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    network = classify.Classifier(vit(**MODEL), CLASSES, batch_norm=0, head_std=1.0, **options)
    logits = network.apply({"params": params}, (batch["image"] / np.float32(255) - mean) / std)
    logits, label = np.asarray(logits)[:13], batch["label"][:13]
    order = np.argsort(-logits, axis=-1)  # (b, l, k)
    top1 = (order[..., 0] == label[:, None]).mean(0)
    best = top1.argmax()
    assert measured["accuracy"] == pytest.approx(top1[best])
    top5 = (order[:, best, :5] == label[:, None]).any(-1).mean()
    assert measured["top5"] == pytest.approx(top5)
    if options["pooling"] == "layers":
        assert measured["best_layer"] == best + 1
        assert measured["accuracy_layer_2"] == pytest.approx(top1[1])
    right = order[:, best, 0] == label
    for k in range(CLASSES):
        share, accuracy = measured["by_class"][k]
        assert share == pytest.approx((label == k).mean())
        assert accuracy == pytest.approx(right[label == k].mean() if (label == k).any() else 0)


def test_invalid_labels_are_reported():
    """As those of ImageNet's test split, which are all -1."""
    objective = classify.objective(vit(**MODEL), CLASSES)
    batch = a_batch(16) | {"valid": np.ones(16, np.float32)}
    batch["label"][:4] = -1, CLASSES, 99, -1
    params, buffers = objective.init(jax.random.key(3), batch)
    state = TrainState(jnp.int32(0), params, buffers, ())
    with pytest.raises(UserError, match=r"25.0% of the images have a label outside 0 to 9"):
        evaluate(objective, state, [batch], mesh=make_mesh(jax.devices()[:1]), seed=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            dict(num_labels=0),
            "classify needs images with labels: this data set has no labels. For a",
        ),
        (dict(num_labels=1), "classify needs images with labels: this data set has only one label"),
        (dict(tuned_blocks=4.0), "tuned_blocks = 4 must be 0, 0.5, 1, 1.5, ... up to the 3 blocks"),
        (dict(tuned_blocks=0.3), "tuned_blocks = 0.3"),
        (dict(mixup=0.8, mixup_group=1), "mixup_group = 1 must be even"),
        (dict(cutmix=1.0, mixup_group=-8), "mixup_group = -8"),
        (dict(batch_norm=1), "batch_norm = 1 must be 0 or at least 2"),
    ],
)
def test_invalid_settings(options, sentence):
    with pytest.raises(UserError) as error:
        classify.objective(vit(**MODEL), **(dict(num_labels=CLASSES) | options))
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["mae_base_finetune", "mae_large_partial", "beit_base_linear"])
def test_recipes_are_rehearsed(name, tmp_path):
    arguments = [f"--config=configs/{name}.py", "--smoke", f"--workdir={tmp_path}"]
    assert main.main([*arguments, "--config.steps=3", "--config.pictures.count=2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [last] = [line for line in lines if line["step"] == 3 and "evaluate/accuracy" in line]
    assert 0 <= last["evaluate/accuracy"] <= last["evaluate/top5"] <= 1
    assert (tmp_path / "pictures" / "step_0000003.png").exists()
