"""The log: speed, the time that is left, memory, events, and arrays of an evaluation."""

import json
import time

import numpy as np
import pytest

from mim_jax import log


def logger(tmp_path, **options):
    settings = dict(step=0, steps=100, batch_size=8, tensorboard=False, wandb="", trackio="")
    return log.Log(str(tmp_path), warn=lambda step, metrics: "", **settings | options)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "every, step, expected",
    [(10, 0, 10), (10, 99, 1), (10, 100, 0), (30, 0, 4), (30, 90, 1), (0, 5, 1), (0, 100, 0)],
)
def test_actions_that_remain(every, step, expected):
    due = [s for s in range(step + 1, 101) if s == 100 or (every > 0 and s % every == 0)]
    assert len(due) == expected
    assert log.Pace(100, {"save": every}).remaining("save", step) == expected


def test_the_time_that_is_left():
    pace = log.Pace(100, {"save": 10, "evaluate": 50})
    assert pace.seconds_left(50, 2.0) == 100
    pace.seconds["save"] = [60.0]
    assert pace.seconds_left(50, 2.0) == 100 + 5 * 60
    pace.seconds["save"] = [60.0, 2.0, 4.0]  # the first includes compilation
    assert pace.seconds_left(50, 2.0) == 100 + 5 * 3
    with pace.action("evaluate"):
        time.sleep(0.05)
    assert 0.05 < pace.seconds_left(50, 2.0) - 115 < 1


def test_speed_by_chip_and_utilization(tmp_path, capsys):
    lines = logger(tmp_path, devices=4, peak_share=1e-4)
    for step in (1, 2):
        lines.training += 0.1
        lines.train(step, {"loss": 1.0}, due=step == 2, lr=0.1)
    lines.flush()
    (record,) = records(tmp_path / "metrics.jsonl")
    assert record["images_per_second"] == pytest.approx(80)
    assert record["images_per_second_per_chip"] == pytest.approx(20)
    assert record["mfu"] == pytest.approx(20e-4)
    assert abs(record["time"] - time.time()) < 60
    assert 0.01 < record["host_memory_gib"] < 1000
    assert "80 images/s (20 per chip)  MFU 0.2%  input wait 0.0%" in capsys.readouterr().out


def test_device_memory(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 3 * 2**30}

    assert "device_memory_gib" not in log.memory()  # a CPU
    monkeypatch.setattr(log.jax, "local_devices", lambda: [Device()])
    assert log.memory()["device_memory_gib"] == 3


def test_warnings_and_arrays_are_kept(tmp_path):
    lines = logger(tmp_path)
    lines.warn = lambda step, metrics: "look out"
    for step in (1, 2):
        lines.training += 1.0
        lines.train(step, {"loss": 1.0}, due=True, lr=0.1)
    lines.flush()
    (event,) = records(tmp_path / "events.jsonl")  # once, as long as it stays the same
    assert (event["event"], event["step"], event["text"]) == ("warning", 1, "look out")
    lines.evaluation(2, {"loss": 1.0, "by_class": np.eye(2)})
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == {"step": 2, "by_class": [[1.0, 0.0], [0.0, 1.0]]}
    assert "evaluate/by_class" not in records(tmp_path / "metrics.jsonl")[-1]
