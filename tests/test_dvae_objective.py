"""What the dVAE learns from: the paper's figures, the same on any devices, and its own alarm."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import UserError, main, optim
from mim_jax.models.dvae import dvae as network_of
from mim_jax.objectives import dvae, per_example
from mim_jax.sharding import make_mesh, replicated
from mim_jax.train import evaluate, initialize, train

V, ROWS, SIZE = 16, 16, 8
TOKENIZER = dict(kind="small", vocabulary=V, width=8, layers=1, codebook=8)
EXAMPLE = {
    "image": jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8),
    "index": jax.ShapeDtypeStruct((1,), jnp.int32),
}


def batch_of(seed=0, rows=ROWS):
    images = np.random.default_rng(seed).integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8)
    images[:, :2, :2] = 255  # one token of a single color
    return {"image": images, "index": np.arange(rows, dtype=np.int32)}


def test_logit_laplace_at_golden_values():
    """-ln 2 - ln b - ln x - ln(1 - x) - |logit x - mu| / b, by hand."""
    with jax.enable_x64(True):
        for (x, location, log_scale), ln_f in [
            ((0.1, 0.0, 0.0), -0.48242615),
            ((0.25, -1.0, -0.5), 1.31824508),
            ((0.5, 0.5, 0.3), 0.02273807),
            ((0.9, 2.0, -1.0), 2.17868644),
        ]:
            painted = jnp.array([location, location, log_scale, log_scale])
            likelihood = dvae.logit_laplace(jnp.array([x, x]), painted)
            np.testing.assert_allclose(likelihood, ln_f, atol=5e-9)


def test_logit_laplace_is_a_density():
    """Over (0, 1) it integrates to one."""
    x = (np.arange(200_000) + 0.5) / 200_000
    painted = np.broadcast_to([0.7, -0.3], (len(x), 2))
    with jax.enable_x64(True):
        density = jnp.exp(dvae.logit_laplace(jnp.array(x)[:, None], jnp.array(painted)))
        assert float(density.mean()) == pytest.approx(1, abs=1e-6)


def test_smooth_l1_equals_torch():
    torch = pytest.importorskip("torch")
    x, painted = np.random.default_rng(0).normal(size=(2, 50)) * 2
    theirs = torch.nn.functional.smooth_l1_loss(
        torch.tensor(painted), torch.tensor(x), reduction="none"
    )
    with jax.enable_x64(True):
        np.testing.assert_allclose(-dvae.smooth_l1(x, painted), theirs, atol=1e-12)


def test_schedules_of_the_paper():
    """Half cosines, then constant: not the quarter wave of well-known copies."""
    beta = [float(dvae.cosine(0.0, 6.6, 5_000, step)) for step in (0, 1_250, 2_500, 5_000, 9_999)]
    assert beta == pytest.approx([0, 6.6 * (1 - math.sqrt(0.5)) / 2, 3.3, 6.6, 6.6], abs=1e-5)
    tau = [float(dvae.cosine(1.0, 1 / 16, 150_000, s)) for s in (0, 50_000, 75_000, 150_000)]
    assert tau == pytest.approx([1, 1 / 16 + 0.75 * 15 / 16, 17 / 32, 1 / 16], abs=1e-6)
    assert float(dvae.cosine(0.0, 6.6, 0, 0)) == pytest.approx(6.6)


def test_the_loss_is_the_bound_per_value():
    """-(sum ln f - beta * sum KL) / (H * W * c), for one sample: all by hand, in float64."""
    with jax.enable_x64(True):
        objective = dvae.objective(network_of(**TOKENIZER, dtype="float64"), kl_warmup_steps=10)
        batch, rng = batch_of(rows=2), jax.random.key(3)
        batch["image"] = images = batch["image"] / 255
        params, buffers = objective.init(jax.random.key(0), batch)
        to64 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)  # noqa: E731
        params, buffers = to64(params), to64(buffers)
        total, weight, (metrics, _) = objective.loss(params, buffers, batch, rng, 5)
        network = network_of(**TOKENIZER, dtype="float64")
        logits = np.asarray(network.logits(params["tokenizer"], images))
        noise = [
            jax.random.gumbel(key, logits.shape[1:]) for key in per_example(rng, jnp.arange(2))
        ]
        tau = dvae.cosine(1.0, 1 / 16, 150_000, 5)
        codes = jax.nn.softmax((logits + np.stack(noise)) / tau)
        painted = network.paint(params["decoder"], codes)
        ln_f = float(dvae.logit_laplace(0.1 + 0.8 * images, painted).sum())
        q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        kl = (q * np.log(q * V)).sum()
    values, tokens = SIZE * SIZE * 3, (SIZE // 2) ** 2
    assert weight == 2
    assert float(total) == pytest.approx(-(ln_f - 3.3 * kl) / values, rel=1e-8)
    assert float(metrics["reconstruction"]) == pytest.approx(-ln_f / values / 2, rel=1e-8)
    assert float(metrics["kl"]) == pytest.approx(kl / tokens / 2, rel=1e-8)


def test_samples_soft_and_straight_through():
    """Straight-through is one-hot where the noise says, and has the soft sample's gradient."""
    rng = np.random.default_rng(0)
    logits, noise, weights = rng.normal(size=(3, 7, V))

    def value(hard):
        return jax.value_and_grad(
            lambda x: (dvae.relax(x, noise, 0.7, hard) * weights).sum()
        )(logits)  # fmt: skip

    with jax.enable_x64(True):
        (soft, soft_grad), (hard, hard_grad) = value(False), value(True)
    picked = (logits + noise).argmax(-1)
    assert float(hard) == pytest.approx(weights[np.arange(7), picked].sum(), rel=1e-9)
    odds = np.exp((logits + noise) / 0.7)
    odds /= odds.sum(-1, keepdims=True)
    assert float(soft) == pytest.approx((odds * weights).sum(), rel=1e-9)
    by_hand = odds * (weights - (odds * weights).sum(-1, keepdims=True)) / 0.7
    np.testing.assert_allclose(soft_grad, by_hand, atol=1e-9)
    np.testing.assert_allclose(hard_grad, by_hand, atol=1e-9)


def test_straight_through_starts_after_soft_steps():
    objective = dvae.objective(network_of(**TOKENIZER), straight_through=True, soft_steps=5)
    soft = dvae.objective(network_of(**TOKENIZER))
    params, buffers = objective.init(jax.random.key(0), batch_of())

    def errors(objective, step):
        _, _, (metrics, _) = objective.loss(params, buffers, batch_of(), jax.random.key(0), step)
        return float(metrics["error_soft"])

    assert errors(objective, 4) == errors(soft, 4)
    assert errors(objective, 5) != errors(soft, 5)


def run(devices, *, accumulate=1, steps=3, lr=1e-2, **settings):
    """-> state, and the metrics of each step."""
    objective = dvae.objective(network_of(**TOKENIZER), **settings)
    optimizer = optim.adamw(
        optim.warmup_and_decay(lr, min_lr=0.0, warmup_steps=1, steps=steps, code="mae")
    )
    mesh = make_mesh(jax.devices()[:devices])
    begin = jax.jit(
        lambda: initialize(objective, optimizer, EXAMPLE, 0), out_shardings=replicated(mesh)
    )
    history = []
    batches_from = lambda step: map(batch_of, range(step, steps))  # noqa: E731
    settings = dict(mesh=mesh, steps=steps, seed=0, accumulate=accumulate)
    for step in train(objective, optimizer, batches_from, state=begin(), **settings):
        history.append({name: float(value) for name, value in step[2].items()})
    return objective, jax.device_get(step[1]), history


@pytest.mark.parametrize(("devices", "accumulate"), [(8, 1), (2, 4)])
def test_devices_and_parts_change_nothing(devices, accumulate):
    """Losses, metrics and what is watched, the codes' use too."""
    settings = dict(balance=3.0, window=2)
    _, one, reference = run(1, **settings)
    _, eight, history = run(devices, accumulate=accumulate, **settings)
    for ours, theirs in zip(history, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name, value in one.buffers.items():
        np.testing.assert_allclose(eight.buffers[name], value, rtol=1e-4, atol=1e-6)


def test_usage_of_codes():
    """Over a split: perplexity of busy cells and of all, and the share of codes in use."""
    objective = dvae.objective(network_of(**TOKENIZER))
    params, buffers = objective.init(jax.random.key(0), batch_of())
    batches = [batch_of(seed) | {"valid": np.ones(ROWS, np.float32)} for seed in range(3)]
    state = initialize(objective, optim.adamw(lambda _: 0.0), EXAMPLE, 0)
    state = state._replace(params=params, buffers=buffers)
    means = evaluate(objective, state, batches, mesh=make_mesh(jax.devices()[:2]), seed=0)
    network = network_of(**TOKENIZER)
    tokens = [
        network.tokens(params["tokenizer"], batch["image"] / np.float32(255)) for batch in batches
    ]
    tokens = np.concatenate(tokens)

    def perplexity(tokens):
        share = np.bincount(tokens.ravel(), minlength=V) / tokens.size
        return math.exp(-sum(p * math.log(p) for p in share if p))

    assert means["perplexity_all"] == pytest.approx(perplexity(tokens), rel=1e-5)
    assert means["perplexity"] == pytest.approx(perplexity(tokens[:, 1:]), rel=1e-5)
    assert means["used"] == len(np.unique(tokens)) / V
    pixels = np.concatenate([b["image"] for b in batches]).reshape(-1, 4, 2, 4, 2, 3) / 255
    error = pixels.var((2, 4)).mean()
    assert means["error_cell_means"] == pytest.approx(error, rel=1e-5)
    assert means["error_hard_to_cell_means"] == pytest.approx(means["error_hard"] / error, rel=1e-5)


def test_balance_weighs_codes_by_their_use():
    """What it adds: how much more than evenly the codes of busy tokens have been used, by hand."""
    totals = []
    for weight in (0.0, 2.0):
        objective = dvae.objective(network_of(**TOKENIZER), balance=weight)
        params, buffers = objective.init(jax.random.key(0), batch_of())
        buffers["usage"] = jnp.arange(V, dtype=jnp.float32)
        totals.append(objective.loss(params, buffers, batch_of(), jax.random.key(0), 0)[0])
    logits = network_of(**TOKENIZER).logits(params["tokenizer"], batch_of()["image"] / 255)
    q = np.asarray(jax.nn.softmax(logits)).reshape(ROWS, -1, V)[:, 1:]
    surplus = np.log(0.99 * V * np.arange(V) / np.arange(V).sum() + 0.01)
    added = 2.0 * (q @ surplus).sum() / (SIZE * SIZE * 3)
    assert float(totals[1] - totals[0]) == pytest.approx(added, rel=1e-3)


def test_when_a_collapse_is_reported():
    warn = dvae.objective(network_of(**TOKENIZER)).warn
    healthy = dict(entropy=0.5, perplexity=0.3 * V)
    assert warn(1000, healthy) == ""
    assert "is close to collapse" in warn(1000, healthy | dict(perplexity=0.1 * V))
    assert "has collapsed: few codes are in use" in warn(1000, healthy | dict(perplexity=0.02 * V))
    assert "Raise objective.balance" in warn(1000, healthy | dict(perplexity=0.02 * V))
    assert "Lower objective.kl_weight" in warn(1000, healthy | dict(entropy=0.96 * math.log(V)))
    assert warn(999, healthy | dict(perplexity=0.1 * V)) == ""


def test_an_excessive_kl_weight_is_reported_as_collapse(tmp_path, capsys):
    """By the run itself, once."""
    settings = dict(kl_weight=1e5, kl_warmup_steps=1, window=2)
    overrides = [f"--config.objective.{name}={value}" for name, value in settings.items()]
    overrides += ["--config.steps=40", "--config.pictures.count=0", "--config.evaluate.limit=8"]
    arguments = ["--config=configs/dvae_emoji.py", "--smoke", f"--workdir={tmp_path}", *overrides]
    assert main.main(arguments) == 0
    said = capsys.readouterr().out
    collapse = "warning: the codebook has collapsed: all codes are equally likely, independently"
    assert said.count(collapse) == 1
    assert "Lower objective.kl_weight" in said


def test_pictures_are_the_tokens():
    objective = dvae.objective(network_of(**TOKENIZER))
    params, buffers = objective.init(jax.random.key(0), batch_of())
    columns = objective.pictures(params, buffers, batch_of(), jax.random.key(0))
    assert {x.shape for x in columns.values()} == {(ROWS, SIZE, SIZE, 3)}
    network = network_of(**TOKENIZER)
    tokens = network.tokens(params["tokenizer"], batch_of()["image"] / np.float32(255))
    colors = dvae.code_colors(V)[np.asarray(tokens)].reshape(ROWS, 4, 4, 3)
    drawn = list(columns.values())[2]
    np.testing.assert_allclose(drawn[:, ::2, ::2], colors, atol=1e-6)
    np.testing.assert_allclose(drawn[:, 1::2, 1::2], colors, atol=1e-6)
    assert len(np.unique((dvae.code_colors(8192) * 255).round(), axis=0)) > 8000
    np.testing.assert_allclose(
        list(columns.values())[1], network.decode(params["decoder"], tokens), atol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(min_temperature=0.0), "objective.min_temperature = 0.0 must be greater than 0"),
        (dict(min_temperature=2.0), "at most objective.temperature = 1.0"),
    ],
)
def test_invalid_requests(settings, sentence):
    with pytest.raises(UserError) as error:
        dvae.objective(network_of(**TOKENIZER), **settings)
    assert sentence in str(error.value)
