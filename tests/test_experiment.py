"""Runs in Python."""

import itertools
import signal

import jax
import numpy as np
import pytest

import mim_jax
from mim_jax import UserError, config_files, main

TINY = {
    "model.size": "",
    "model.width": 32,
    "model.depth": 1,
    "model.heads": 2,
    "objective.decoder_width": 32,
    "objective.decoder_depth": 1,
    "objective.decoder_heads": 2,
    "data.size": 32,
}


@pytest.fixture(scope="module")
def experiment():
    return mim_jax.build("mae_emoji", TINY, steps=4, batch_size=16)


def test_the_loop_is_that_of_the_command(experiment, tmp_path):
    """Interrupted in Python after two steps and continued, and by the command: the same losses."""
    history = list(itertools.islice(experiment.train(), 2))
    history += experiment.train(history[-1][1])
    assert [step for step, _, _ in history] == [1, 2, 3, 4]
    state = history[-1][1]

    overrides = [f"--config.{key}={value}" for key, value in TINY.items()]
    overrides += ["--config.steps=4", "--config.batch_size=16"]
    assert main.main(["--config=mae_emoji", *overrides, f"--workdir={tmp_path}"]) == 0
    restored = experiment.restore(str(tmp_path))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        state.params,
        restored.params,
    )
    means = experiment.evaluate(restored, limit=20)
    assert means["loss"] == pytest.approx(experiment.evaluate(state, limit=20)["loss"], rel=1e-5)
    again = mim_jax.build(str(tmp_path))
    assert again.config.model.width == 32


def test_the_last_state_survives_an_interruption(experiment, monkeypatch):
    """Ctrl-C while a step is computed, which reuses the memory of the state before it."""
    complete = [float(metrics["loss"]) for _, _, metrics in experiment.train()]
    training_batches = experiment.run.data.training_batches

    def batches(*arguments, **options):
        for number, batch in enumerate(training_batches(*arguments, **options)):
            if number == 2:  # requested during the second step
                signal.raise_signal(signal.SIGINT)
            yield batch

    steps, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(type(experiment.run.data), "training_batches", staticmethod(batches))
        with pytest.raises(KeyboardInterrupt):
            steps.extend(step for step in experiment.train())
    assert [step for step, _, _ in steps] == [1, 2]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    again = [float(metrics["loss"]) for _, _, metrics in experiment.train(steps[-1][1])]
    assert again == complete[2:]


def test_pictures(experiment):
    columns = experiment.pictures(experiment.start.state(), count=8)
    assert set(columns) >= {"image", "masked"} or len(columns) >= 3
    for images in columns.values():
        assert images.shape == (8, 32, 32, 3)
        assert np.isfinite(images).all()


def test_mistakes():
    with pytest.raises(UserError, match=r"no key optimizer\.rate"):
        mim_jax.build("mae_emoji", {"optimizer.rate": 1.0})
    with pytest.raises(UserError, match="steps = -1 must be at least 0"):
        mim_jax.build("mae_emoji", steps=-1)
    with pytest.raises(UserError, match="changes = 'steps=3' must be a dict"):
        mim_jax.build("mae_emoji", "steps=3")
    with pytest.raises(UserError, match="did you mean mae_emoji"):
        mim_jax.build("mae_emojy")
    with pytest.raises(UserError, match=r"no key optimizer\.rate"):
        mim_jax.build("mae_emoji", optimizer={"rate": 1.0})
    for config in (3, {}):
        with pytest.raises(UserError, match="build needs the name of a config"):
            mim_jax.build(config)


def test_a_state_is_needed(experiment):
    with pytest.raises(UserError, match=r"train\(5\): pass a state, .*steps=N"):
        next(experiment.train(5))
    with pytest.raises(UserError, match=r"evaluate\(None\): pass a state"):
        experiment.evaluate(None)


def test_counts_are_checked(experiment):
    state = experiment.start.state()
    with pytest.raises(UserError, match="limit = -1 must be at least 0"):
        experiment.evaluate(state, limit=-1)
    with pytest.raises(UserError, match="count = 0 must be at least 1"):
        experiment.pictures(state, count=0)


def test_a_config_may_be_a_path():
    path = config_files.folder() / "mae_emoji.py"
    assert mim_jax.build(path, steps=3).config.steps == 3


def test_nested_changes():
    config = mim_jax.build("mae_emoji", {"optimizer": {"b2": 0.5}}, data={"size": 32}).config
    assert (config.optimizer.b2, config.data.size) == (0.5, 32)
