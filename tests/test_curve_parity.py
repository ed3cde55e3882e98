"""Training curves next to PyTorch's: benchmarks/curve_parity.py over few steps."""

import csv

import numpy as np
import pytest

from tests.timm_models import timm_models

torch_pairs = pytest.importorskip("benchmarks.torch_pairs", exc_type=ImportError)
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from benchmarks import curve_parity  # noqa: E402 - needs PyTorch and matplotlib

SIZES = torch_pairs.Sizes(width=16, depth=2, batch=4, steps=20)


def relative_difference(model: str, sizes=SIZES) -> float:
    ours, theirs = curve_parity.curves(model, "float64", sizes).values()
    assert len(ours) == len(theirs) == sizes.steps
    return curve_parity.relative(ours, theirs)


@pytest.mark.parametrize("model", torch_pairs.PAIRS)
def test_losses_are_those_of_pytorch(model):
    if model == "finetune":
        timm_models()
    assert relative_difference(model) < 1e-6


def test_another_optimizer_is_seen(monkeypatch):
    """The limit is narrow enough for a mistake in the optimizer."""
    optimizer_of = curve_parity.optimizer_of
    monkeypatch.setattr(
        curve_parity,
        "optimizer_of",
        lambda recipe, steps: optimizer_of(recipe._replace(weight_decay=0.0), steps),
    )
    assert relative_difference("mae") > 1e-6


def test_the_command_writes_curves(tmp_path, capsys):
    arguments = ["--model=mae", "--dtype=bfloat16", "--steps=11", "--batch=2", "--width=16"]
    curve_parity.main([*arguments, f"--to={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mean difference from float32: ours ")
    assert lines[-1].startswith("max relative difference: ")
    assert lines[-1].endswith(" over 11 steps")
    with (tmp_path / "mae_bfloat16.csv").open() as file:
        head, *rows = csv.reader(file)
    runs = ["mim_jax, bfloat16", "PyTorch, autocast", "mim_jax, float32", "PyTorch, float32"]
    assert head == ["step", *runs]
    losses = np.array(rows, float)
    assert losses.shape == (11, 5)
    assert (losses[:, 1] != losses[:, 3]).any()
    assert (tmp_path / "mae_bfloat16.png").stat().st_size > 1000
