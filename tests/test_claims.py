"""The sweeps of benchmarks/claims.py: resuming, spread, and keys that exist."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import claims
from mim_jax import schema
from mim_jax.data.classes import parse_classes
from mim_jax.plan.hardware import target_of
from mim_jax.plan.step import Step, load


def test_every_key_of_a_sweep_exists():
    for settings in claims.claims().values():
        for setting in settings.values():
            for stage in setting.stages:
                config = schema.load(str(claims.ROOT / "configs" / f"{stage.config}.py"))
                keys = config.to_dict()
                for key in (*stage.keys, *(f"init_from.{name}" for name in stage.init_from)):
                    node = keys
                    for part in key.split("."):
                        assert part in node, (stage.config, key)
                        node = node[part]


def stages():
    """Returns one stage of all claims for each config, by name."""
    settings = [setting for sweep in claims.claims().values() for setting in sweep.values()]
    by_config = {stage.config: stage for setting in settings for stage in setting.stages}
    return {stage.name: stage for stage in by_config.values()}


def test_only_stages_that_predict_tokens_have_a_tokenizer():
    settings = [setting for sweep in claims.claims().values() for setting in sweep.values()]
    stages = {x.name: x for setting in settings for x in setting.stages if x.config == "beit_emoji"}
    assert len(stages) == 5
    for stage in stages.values():
        pixels = stage.keys.get("objective.target") == "pixels"
        assert (stage.keys.get("init_from.tokenizer") == "") == pixels
        assert ("tokenizer" in stage.init_from) != pixels


@pytest.mark.parametrize("stage", stages().values(), ids=stages())
def test_stages_can_be_traced(stage):
    path = str(claims.ROOT / "configs" / f"{stage.config}.py")
    keys = claims.overrides(stage.keys | {"data.name": "folder:/data/images"})
    target = target_of("cpu:1")
    Step(load(path, keys, target, images=1000, classes=10), target).traced  # noqa: B018


def test_a_stage_on_camvid_lists_the_classes(tmp_path, monkeypatch):
    """Of CamVid in its usual form, which has no list of classes."""
    (stage,) = [stage for stage in stages().values() if stage.config == "camvid_tiny"]
    (tmp_path / "camvid" / "images").mkdir(parents=True)
    (tmp_path / "camvid" / "masks").mkdir()
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    claims.perform(stage, 0, tmp_path, tmp_path)
    (path,) = [x.split("=")[1] for x in commands[0] if x.startswith("--config.data.classes=")]
    classes = parse_classes(Path(path).read_text(), path)
    assert classes.values == tuple(range(11))
    assert classes.ignored == (11,)


def test_stages_of_one_name_are_the_same():
    """Claims share runs by name."""
    stages = {}
    for settings in claims.claims().values():
        for setting in settings.values():
            for stage in setting.stages:
                assert stages.setdefault(stage.name, stage) == stage, stage.name


def test_a_sweep_continues_where_it_ended(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    computed = []

    def compute(name, row, data, runs):
        if len(computed) == 5:
            raise KeyboardInterrupt
        computed.append((row["setting"], row["seed"]))
        value = 0.5 + 0.01 * row["seed"]
        return row | dict(
            metric="accuracy", value=value, pretraining_steps=1, tuning_steps=1, cpu_seconds=1
        )

    monkeypatch.setattr(claims, "compute", compute)
    arguments = ["mask_ratio", f"--data={tmp_path}", f"--to={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        claims.main(arguments)
    claims.main([*arguments, "--table"])
    assert "| 90 % | 0.5 | 0.5, 0.5 | 1 of 3 |" in capsys.readouterr().out
    first, computed = computed, []
    claims.main(arguments)
    assert len(first) == 5
    assert len(computed) == 4
    assert not set(first) & set(computed)
    assert "| 90 % | 0.51 | 0.5, 0.52 | 3 of 3 |" in capsys.readouterr().out
    assert (tmp_path / "mask_ratio.png").exists()


def test_the_smallest_difference_is_that_of_a_t_test():
    """Two samples of three: their difference is significant at 5 % exactly beyond the limit."""
    statistics = pytest.importorskip("scipy.stats")
    a = np.array([0.50, 0.53, 0.51])
    b = np.array([0.40, 0.44, 0.42])
    limit = claims.smallest_difference([list(a), list(b)])
    for factor, significant in ((1.001, True), (0.999, False)):
        shifted = b - b.mean() + a.mean() - factor * limit
        assert (statistics.ttest_ind(a, shifted).pvalue < 0.05) == significant
    assert np.isnan(claims.smallest_difference([[0.1], [0.2]]))
