"""Failed steps: not applied, recorded, rolled back, repeated."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, divergence, main, recipe, replay, schema
from mim_jax.divergence import Failures, RollbackError, Spikes, data_step
from mim_jax.train import NO_LIMITS
from tests.tiny_run import OBJECTIVE, STEPS, numbers, run

OBJECTIVE_FILE = """
import jax.numpy as jnp
from mim_jax.objectives import mae
from mim_jax.train import NO_LIMITS

def objective(model, tokenizer=None, *, decoder_width: int = 16, factor: float = 0.0):
    \"\"\"MAE whose loss is multiplied by a factor or NaN for a batch with a white image.\"\"\"
    base = mae.objective(model, decoder_width=decoder_width, decoder_depth=1, decoder_heads=2)

    def loss(params, buffers, batch, rng, step):
        total, weight, rest = base.loss(params, buffers, batch, rng, step)
        white = (batch["image"] == 255).all((1, 2, 3)).any()
        return total * jnp.where(white, factor or jnp.nan, 1.0), weight, rest

    return base._replace(loss=loss)
"""
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict(dict(batch_size=8, steps=16))
    c.model = dict(width=32, depth=1, heads=2, patch=8)
    c.objective = dict(name="white", decoder_width=16)
    c.data = dict(name="folder:{data}", split="all", evaluation_split="all", size=16, flip=False)
    c.optimizer = dict(name="adamw", lr=1e-3)
    c.evaluate = dict(limit=8)
    c.save = dict(every_steps=2)
    c.log = dict(every_steps=1)
    c.divergence = dict(patience=2)
    return c
"""
NAMES = [f"{i:03d}.png" for i in range(200)]


@pytest.fixture
def config(tmp_path):
    """A config whose data are 200 images, and the function that makes some of them white."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 200, (16, 16, 3), np.uint8)).save(data / name)
    (tmp_path / "white.py").write_text(OBJECTIVE_FILE)
    (tmp_path / "config.py").write_text(CONFIG.format(data=data))
    return tmp_path / "config.py"


def whiten(config, steps):
    """Makes an image in the batch of each of these steps white. Returns their names."""
    built = recipe.build(schema.load(str(config), ["data.name=" + f"folder:{config.parent}/data"]))
    names = [built.data.training_names(8, seed=0, step=step - 1)[3] for step in steps]
    for name in names:
        Image.new("RGB", (16, 16), "white").save(config.parent / "data" / Path(name).name)
    return names


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_failed_step_changes_nothing():
    """The parameters, moments and their averages are those of before; only counters advance."""

    def loss(params, buffers, batch, rng, step):
        total, weight, rest = OBJECTIVE.loss(params, buffers, batch, rng, step)
        return jnp.where(step == 2, jnp.nan, total), weight, rest

    history = run(objective=OBJECTIVE._replace(loss=loss))
    assert np.isnan(numbers(history)[2, 0])
    assert np.isfinite(np.delete(numbers(history), 2, axis=0)).all()
    before, after = history[1][1], history[2][1]
    assert (before.step, after.step) == (2, 3)
    for old, new in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True):
        if np.issubdtype(old.dtype, np.inexact):
            np.testing.assert_array_equal(old, new)
    assert len(history) == STEPS


def test_without_limits_every_step_is_applied(tmp_path):
    """As a run whose first failure ends it asks for."""

    def loss(params, buffers, batch, rng, step):
        total, weight, rest = OBJECTIVE.loss(params, buffers, batch, rng, step)
        return total * jnp.where(step == 2, jnp.nan, 1), weight, rest

    options = dict(first=0, names_of=lambda step: [], skips=[], say=print, spikes=Spikes(0.0))
    assert Failures(tmp_path, patience=1, **options).limits(3) is NO_LIMITS
    limits = Failures(tmp_path, patience=0, **options).limits
    history = run(objective=OBJECTIVE._replace(loss=loss), limits=limits)
    assert np.isnan(numbers(history)[2:]).any(1).all()
    np.testing.assert_allclose(numbers(run(limits=limits)), numbers(run()), rtol=1e-6)


def test_a_spike_changes_nothing():
    """A step over its limit is computed, but not applied."""

    def loss(params, buffers, batch, rng, step):
        total, weight, rest = OBJECTIVE.loss(params, buffers, batch, rng, step)
        return jnp.where(step == 2, 1e6 * total, total), weight, rest

    def limits(step):
        return np.array([10.0, np.inf], np.float32)

    objective = OBJECTIVE._replace(loss=loss)
    history = run(objective=objective, limits=limits)
    assert np.isfinite(numbers(history)).all()
    assert numbers(history)[2, 0] > 1e5
    for old, new in zip(*map(jax.tree.leaves, (history[1][1][1:], history[2][1][1:])), strict=True):
        if np.issubdtype(old.dtype, np.inexact):
            np.testing.assert_array_equal(old, new)
    assert np.abs(numbers(run(objective=objective))[3:] / numbers(history)[3:] - 1).min() > 1e-3


def test_limits_follow_the_largest_recent_losses_and_norms(monkeypatch):
    monkeypatch.setattr(divergence, "WARM_UP", 3)
    monkeypatch.setattr(divergence, "DECAY", 0.5)
    spikes = Spikes(10.0)
    sizes = [(1, 2), (-3, 1), (1, 1), (2, 2), (31, 1), (2, 31), (1e5, 1), (np.nan, 1), (1, 1)]
    found, limits = [], []
    for step, (loss, norm) in enumerate(sizes, start=1):
        limits.append(spikes.limits(step).tolist())
        found.append(bool(spikes.check(step, dict(loss=loss, grad_norm=norm))))
    unlimited = [float(np.finfo(np.float32).max)] * 2
    assert limits[:4] == [unlimited] * 4
    assert limits[4:] == [[15, 10], [20, 20], [20, 20], [20, 20], [20, 20]]
    assert found == [False] * 4 + [True] * 4 + [False]
    assert Spikes(0.0, spikes.largest).limits(20).tolist() == unlimited
    again = Spikes(10.0, json.loads(json.dumps(spikes.largest)))  # as a checkpoint stores it
    for step in (9, 10, 11):
        assert again.limits(step).tolist() == spikes.limits(step).tolist()


def test_a_run_survives_spikes(config, tmp_path, capsys, monkeypatch):
    """They are left out, named and repeated exactly, also by a restart and by `replay`."""
    monkeypatch.setattr(divergence, "WARM_UP", 3)
    (bad, _) = whiten(config, [7, 12])
    work = tmp_path / "run"
    arguments = [f"--config={config}", f"--workdir={work}", "--config.objective.factor=1e6"]
    assert main.main([*arguments, "--config.save.keep=9"]) == 0
    text = capsys.readouterr().out
    assert "warning: step 7: the loss is" in text
    assert "more than 100 times that of recent steps: the step is not applied" in text
    expected = losses(work)
    assert [step for step, loss in expected.items() if loss > 1e4] == [7, 12]
    capture = json.loads((work / "captures" / "step_0000007.json").read_text())
    assert bad in capture["images"]
    assert replay.main([f"--config={work}", "--trust-code", "--step=13"]) == 0
    assert "trained from step 12 to 12" in capsys.readouterr().out

    for step in (12, 14, 16):
        (work / "checkpoints" / str(step)).rename(tmp_path / str(step))
    assert main.main(arguments) == 0
    assert losses(work) == expected
    assert (
        main.main([*arguments[::2], f"--workdir={tmp_path / 'off'}", "--config.divergence.spike=0"])
        == 0
    )
    assert losses(tmp_path / "off")[16] != expected[16]


def test_one_bad_batch_is_left_out_and_named(config, tmp_path, capsys):
    (bad,) = whiten(config, [5])
    work = tmp_path / "run"
    assert main.main([f"--config={config}", f"--workdir={work}"]) == 0
    text = capsys.readouterr().out
    assert "warning: step 5: the loss is nan" in text
    loss_of_step = losses(work)
    assert sorted(step for step, loss in loss_of_step.items() if np.isnan(loss)) == [5]
    assert loss_of_step[16] < loss_of_step[1]
    capture = json.loads((work / "captures" / "step_0000005.json").read_text())
    assert bad in capture["images"]
    assert len(capture["images"]) == 8

    assert replay.main([f"--config={work}", "--trust-code"]) == 0
    text = capsys.readouterr().out
    assert "trained from step 0 to 4" in text  # older checkpoints are not kept
    assert "float32: loss nan" in text
    assert bad in text

    capsys.readouterr()
    assert replay.main([f"--config={work}", "--trust-code", "--step=1000"]) == 2
    assert f"step 1,000 is not a step of {work}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 9999,
        "{}",
        '{"step": "x", "skips": []}',
        '{"step": 1e999, "skips": []}',
        '{"step": 3, "skips": 3}',
        '{"step": 3, "skips": [[1, -1]]}',
    ],
)
def test_a_damaged_record_of_a_step_is_named(tmp_path, text):
    path = tmp_path / "captures" / "step_0000003.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path} is not the record of a failed step"):
        replay.capture_of(str(tmp_path), 3)


def test_several_return_to_a_checkpoint_and_skip_the_data(config, tmp_path, capsys):
    """Steps 5 to 7 fail: after 6 the run is at the checkpoint of 4 again, with later data."""
    whiten(config, [5, 6])
    work = tmp_path / "run"
    assert main.main([f"--config={config}", f"--workdir={work}"]) == 0
    text = capsys.readouterr().out
    assert "all steps from 5 to 6 failed: returning to step 4" in text
    assert sorted(losses(work)) == list(range(1, 17))
    assert np.isfinite(list(losses(work).values())).all()
    metadata = json.loads((work / "checkpoints" / "16" / "metadata" / "metadata").read_text())
    assert metadata["skips"] == [[4, 2]]
    events = [json.loads(line)["event"] for line in (work / "events.jsonl").open()]
    assert events == ["start", "failure", "rollback", "done"]

    # Without the last checkpoints, on another number of parts: the same data are skipped.
    for step in (14, 16):
        (work / "checkpoints" / str(step)).rename(tmp_path / str(step))
    expected = losses(work)
    again = [f"--config={config}", f"--workdir={work}", "--config.accumulate=1"]
    assert main.main(again) == 0
    assert losses(work) == pytest.approx(expected, rel=1e-5)


def test_a_run_that_cannot_go_on_ends(config, tmp_path, capsys):
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    whiten(config, range(1, 17))
    assert main.main([*arguments, "--config.divergence.rollbacks=1"]) == 1
    assert "failed: all steps from" in capsys.readouterr().err
    whiten(config, [1])
    assert main.main([*arguments, "--config.divergence.patience=0"]) == 1
    assert "the loss is nan" in capsys.readouterr().err


def test_failures_are_counted_in_a_row(tmp_path):
    said = []
    failures = Failures(
        tmp_path,
        first=0,
        patience=3,
        names_of=lambda step: [f"image of {step}"],
        skips=[],
        say=lambda step, text: said.append(step),
        spikes=Spikes(0.0),
    )
    good, bad = ({"loss": x, "grad_norm": 1.0} for x in (1.0, np.inf))
    for step, metrics in enumerate([good, bad, bad, good, bad, good, bad, bad], start=1):
        failures.after(step, metrics)
    failures.after(9, dict(good, grad_norm=np.nan))
    with pytest.raises(RollbackError, match="all steps from 7 to 9 failed"):
        failures.check()
    assert said == [2, 5, 7]


def test_positions_in_the_data():
    skips = [(4, 2), (10, 3)]
    assert [data_step(step, skips) for step in (0, 3, 4, 9, 10, 11)] == [0, 3, 6, 11, 15, 16]
