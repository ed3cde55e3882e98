"""Full disks, run directories that disappear, and errors while a checkpoint is written."""

import json
import resource
import signal
import time

import pytest

from mim_jax import checkpoint, main, training
from mim_jax.checkpoint import files

SMOKE = ["--config=configs/mae_base.py", "--smoke", "--config.log.every_steps=1"]
SMOKE += ["--config.pictures.count=0", "--config.batch_size=8", "--config.evaluate.limit=8"]


def at_the_evaluation(monkeypatch, action):
    """Calls a function when the evaluation after step 10 begins."""
    evaluate = training.evaluate

    def changed(*arguments, **options):
        action()
        return evaluate(*arguments, **options)

    monkeypatch.setattr(training, "evaluate", changed)


@pytest.fixture
def file_limit():
    """A function that limits the bytes of a file, as a full disk or a quota does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_files_that_may_not_grow(tmp_path, monkeypatch, file_limit, capsys):
    """Checkpoints cannot be written: that is reported, and later the run starts again."""
    work = tmp_path / "run"
    at_the_evaluation(monkeypatch, lambda: file_limit(20_000))
    assert main.main([*SMOKE, f"--workdir={work}"]) == 2
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    error = capsys.readouterr().err
    assert f"error: cannot write to {work}" in error
    assert "Traceback" not in error


def test_a_run_directory_that_disappears(tmp_path, monkeypatch, capsys):
    work = tmp_path / "run"
    at_the_evaluation(monkeypatch, lambda: work.rename(tmp_path / "elsewhere"))
    assert main.main([*SMOKE, f"--workdir={work}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write to {work}")
    assert error.count("\n") == 1


def test_an_error_waits_for_the_save_in_progress(tmp_path, monkeypatch):
    """The checkpoint that is being written when a step raises an error is complete."""
    sign, after = checkpoint.sign, training.Failures.after

    def slow(folder):
        time.sleep(2)
        sign(folder)

    def failing(self, step, metrics):
        after(self, step, metrics)
        if step == 12:
            saved = [path.name for path in (tmp_path / "checkpoints").glob("10*")]
            assert saved != ["10"]  # still being written
            raise RuntimeError("an error of the step")

    monkeypatch.setattr(checkpoint, "sign", slow)
    monkeypatch.setattr(training.Failures, "after", failing)
    with pytest.raises(RuntimeError, match="an error of the step"):
        main.main([*SMOKE, f"--workdir={tmp_path}", "--config.save.every_steps=5"])
    assert files.find_fault(tmp_path / "checkpoints" / "10") == ""
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    assert [event["event"] for event in events] == ["start", "failed"]
