"""What benchmarks.soak compares, and the moments and meshes it draws. It runs for half an hour."""

import json
import random

from benchmarks import soak


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(changed=(), steps=soak.STEPS):
    """The metrics of a run; `changed` replaces the lines of some steps."""
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, steps + 1)]
    lines += [{"step": step, "evaluate/loss": 2.0} for step in range(7, steps + 1, 7)]
    return [line for line in lines if line["step"] not in dict(changed)] + [
        {"step": step, "loss": loss} for step, loss in changed
    ]


def compared(tmp_path, lines, complete=True):
    test = soak.Soak(tmp_path, tmp_path / "cache", seed=0)
    write(tmp_path / "mae_reference", run())
    test.reference("mae")  # is there already
    write(tmp_path / "mae", lines)
    test.compare("mae", complete)
    return test.summary()


def test_equal_runs(tmp_path, capsys):
    counts = compared(tmp_path, run())
    assert counts["compared values"] == soak.STEPS + soak.STEPS // 7
    assert counts["complete runs"] == 1
    assert (
        counts["missing or repeated lines"] == counts["mismatches"] == counts["other problems"] == 0
    )
    counts = compared(tmp_path, run(steps=10), complete=False)
    assert counts["compared values"] == 9 + 1  # the last step may be incomplete
    assert counts["missing or repeated lines"] == 0


def test_differences_and_missing_lines(tmp_path, capsys):
    counts = compared(tmp_path, run([(5, 0.2001), (6, 1 / 6 * (1 + 5e-5))]))
    assert counts["mismatches"] == 1
    assert counts["largest relative difference"] == "5.0e-04"
    assert "mae: (5, 'loss') is 0.2001, expected 0.2" in capsys.readouterr().out
    counts = compared(tmp_path, [*run()[1:], {"step": 9, "loss": 1 / 9}])
    assert counts["missing or repeated lines"] == 2  # one is not there, another twice


def test_meshes_and_lines():
    rng = random.Random(0)
    for _ in range(100):
        mesh = soak.random_mesh(rng)
        rows = soak.BATCH // (mesh["devices"] * mesh["accumulate"])
        assert soak.BATCH % (mesh["devices"] * mesh["accumulate"]) == 0
        assert rows % 2 == 0
        assert mesh["devices"] % mesh["fsdp"] == mesh["devices"] % mesh["processes"] == 0
    assert soak.step_of("step  7/40  loss 1.0139  lr 1.00e-03  9 images/s") == 7
    assert soak.step_of("step  7/40  evaluation: loss 1.0139") == 0
