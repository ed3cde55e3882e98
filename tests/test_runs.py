"""The table of runs below a directory."""

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from mim_jax import UserError, runs, workdir
from tests.conftest import ROOT

CONFIG = dict(
    objective=dict(name="mae"), batch_size=8, steps=100, epochs=0.0, data=dict(name="emoji")
)


def make(folder, steps=(), *, events=(), config=CONFIG, age=0.0, **metrics):
    """Writes the files of a run as they are `age` seconds after its last record."""
    folder.mkdir(parents=True)
    record = dict(config=config, trajectory={"data set's examples": 1000})
    (folder / "config.json").write_text(json.dumps(record))
    now = time.time() - age
    lines = [
        dict(step=step, time=now - 10 * (len(steps) - i)) | {k: x[i] for k, x in metrics.items()}
        for i, step in enumerate(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [dict(time=now, step=step, event=event, text="") for event, step in events]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in folder.glob("*.jsonl"):
        os.utime(path, (now, now))
    return folder


@pytest.mark.parametrize(
    "options, status",
    [
        (dict(steps=[50, 100]), "finished"),
        (dict(steps=[10], events=[("start", 0), ("done", 10)]), "finished"),
        (dict(steps=[10], events=[("start", 0), ("stopped", 10)], age=1e6), "stopped"),
        (dict(steps=[10], events=[("start", 0), ("failed", 10)]), "failed"),
        (dict(steps=[10], events=[("stopped", 10), ("start", 10)]), "running"),
        (dict(steps=[10, 20], age=500), "running"),
        (dict(steps=[10, 20], age=5000), "stale"),
        (dict(age=5000), "stale"),
    ],
)
def test_status(options, status, tmp_path):
    steps = options.pop("steps", [])
    run = runs.read_run(make(tmp_path / "a", steps, **options, loss=[1.0] * len(steps)))
    assert run.status == status


def test_a_slow_run_is_not_stale(tmp_path):
    folder = make(tmp_path / "a", [1, 2], age=3000, loss=[1.0, 1.0])
    lines = [dict(step=i, time=time.time() - 3000 - 1000 * (2 - i)) for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "metrics.jsonl", (time.time() - 3000,) * 2)
    assert runs.read_run(folder).status == "running"


@pytest.mark.parametrize("age", [10, 5000])
def test_a_killed_run_is_stale(tmp_path, age):
    """A run that holds its lock is running; one that was killed on this machine is not."""
    folder = make(tmp_path / "a", [10, 20], age=age, loss=[1.0, 1.0], events=[("start", 0)])
    script = f"""
import time
from mim_jax import workdir

folder = workdir.open_path({str(folder / "checkpoints")!r})
lock = workdir.storage_of(folder).lock(folder)
print("locked", flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            assert runs.read_run(folder).status == "running"
        finally:
            process.kill()
    assert runs.read_run(folder).status == "stale"
    lock = folder / "checkpoints" / "lock"
    lock.write_text("process 1 on another machine")
    assert runs.read_run(folder).status == ("running" if age < runs.QUIET else "stale")


def test_looking_at_a_lock_does_not_prevent_a_start(tmp_path, monkeypatch):
    disk = workdir.storage_of(workdir.open_path(tmp_path))
    disk.lock(tmp_path).close()
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `locked` does, for a moment
        release = lambda seconds: fcntl.flock(file, fcntl.LOCK_UN)  # noqa: E731
        monkeypatch.setattr("mim_jax.storage.time.sleep", release)
        disk.lock(tmp_path).close()


def test_the_table(tmp_path, capsys):
    make(tmp_path / "b", [10, 20, 30], loss=[3.0, 1.0, 2.0])
    accuracy = {"evaluate/accuracy": [0.5, 0.7, 0.6]}
    make(tmp_path / "sub" / "a", [40, 90, 100], loss=[3.0, 1.0, 2.0], **accuracy)
    make(tmp_path / "empty")
    make(tmp_path / "weights", config={})
    record = dict(config={}, trajectory={"converted from": "timm"})
    (tmp_path / "weights" / "config.json").write_text(json.dumps(record))
    (tmp_path / "other").mkdir()
    assert runs.main([str(tmp_path)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["run", "objective", "status", "step", "metric"]
    cells = [row.split("  ") for row in rows]
    cells = [[cell.strip() for cell in row if cell] for row in cells]
    assert [row[0] for row in cells] == ["b", "empty", "sub/a"]
    assert cells[0][1:7] == ["mae", "running", "30/100", "loss", "2", "1 at 20"]
    assert cells[2][1:7] == ["mae", "finished", "100/100", "evaluate/accuracy", "0.6", "0.7 at 90"]
    assert runs.main([str(tmp_path), "--metric=loss"]) == 0
    assert "evaluate" not in capsys.readouterr().out


def test_the_directory_is_runs_by_default(tmp_path, capsys, monkeypatch):
    make(tmp_path / "runs" / "b", [10, 20], loss=[3.0, 1.0])
    monkeypatch.chdir(tmp_path)
    assert runs.main([]) == 0
    assert "20/100" in capsys.readouterr().out


def test_a_damaged_run_does_not_hide_the_others(tmp_path, capsys):
    make(tmp_path / "a", [10], loss=[3.0])
    make(tmp_path / "b", [20], loss=[3.0])
    (tmp_path / "a" / "config.json").write_text("{")
    assert runs.main([str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "20/100" in printed.out
    assert "10/100" not in printed.out
    assert "warning: " in printed.err
    assert "config.json is damaged" in printed.err


def test_where_there_are_no_runs(tmp_path, capsys):
    assert runs.main([str(tmp_path)]) == 2
    assert "there are no runs below" in capsys.readouterr().err
    assert runs.main([str(tmp_path / "nowhere")]) == 2
    with pytest.raises(UserError, match="is not the directory of a training run"):
        runs.read_run(tmp_path)


def test_lines_that_are_incomplete(tmp_path):
    folder = make(tmp_path / "a", [10, 20], loss=[3.0, float("nan")])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"loss": 1.0}\n{"step": 15, "loss": "much"}\n{"step": 30, "lo')
    (folder / "events.jsonl").write_text('{"step": 1}\n')
    run = runs.read_run(folder)
    assert run.events == []
    assert [step for step, _ in run.series("loss")] == [10, 20]
    assert run.step == 20
    assert runs.best("loss", run.series("loss")) == (10, 3.0)


def test_epochs_are_the_length(tmp_path):
    folder = make(tmp_path / "a", config=CONFIG | dict(steps=0, epochs=2.5))
    assert runs.read_run(folder).steps == 312


def test_the_state_of_the_checkout(tmp_path, monkeypatch):
    """Runs record the commit of the code, where it lies in a git checkout."""
    monkeypatch.setattr(workdir, "__file__", str(tmp_path / "workdir.py"))
    assert workdir.git_state() == {}
    (tmp_path / "workdir.py").write_text("1")

    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *arguments], check=True)

    git("init", "--quiet")
    assert workdir.git_state() == {}  # a file that the checkout does not track
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    state = workdir.git_state()
    assert len(state["commit"]) == 40
    assert not state["changed"]
    (tmp_path / "workdir.py").write_text("2")
    assert workdir.git_state()["changed"]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ([1], "its config is not an object"),
        ({"objective": {"name": "mae"}, "steps": 5}, "it lacks batch_size, epochs"),
        (CONFIG | {"batch_size": 0}, "batch_size = 0 must be at least 1"),
        (CONFIG | {"objective": "mae"}, "its objective is not an object"),
        (CONFIG | {"objective": {}}, "it lacks objective.name"),
        (CONFIG | {"data": []}, "its data is not an object"),
        (CONFIG | {"steps": "many"}, "steps = 'many' must be a number of at least 0"),
        (CONFIG | {"steps": float("nan")}, "steps = nan must be a number"),
        (CONFIG | {"epochs": 1e308}, r"epochs = 1e\+308 must be a number"),
        (CONFIG | {"steps": 10**400}, "it has an integer of 401 digits"),
        (CONFIG | {"tokenizer": {"vocabulary": "x"}}, "vocabulary = 'x' must be a number"),
    ],
)
def test_incomplete_configs_are_reported(tmp_path, config, problem):
    make(tmp_path / "a", config=config)
    with pytest.raises(UserError, match=rf"config\.json is damaged: {problem}"):
        runs.read_run(tmp_path / "a")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"trajectory": 5}, "its trajectory is not an object"),
        ({"trajectory": {"data set's examples": "x"}}, "data set's examples = 'x' must be"),
        ({"data": "x"}, "its data is not an object"),
        ({"data": {"class_names": 5}}, "its class_names are not a list"),
        ({"data": {"images": "x"}}, "images = 'x' must be a number"),
        ({"versions": []}, "its versions is not an object"),
        ({"git": "x"}, "its git is not an object"),
    ],
)
def test_records_with_other_types_are_reported(tmp_path, entry, problem):
    folder = make(tmp_path / "a")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | entry))
    with pytest.raises(UserError, match=rf"config\.json is damaged: {problem}"):
        runs.read_run(folder)


def test_a_config_that_is_nested_deeply_or_endless(tmp_path):
    folder = make(tmp_path / "a")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged: it is nested too deeply"):
        workdir.read(folder)
    os.truncate(folder / "config.json", 2**25)
    with pytest.raises(UserError, match="is damaged: it is longer than 16 MiB"):
        workdir.read(folder)
    for create in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        (folder / "config.json").unlink()
        create(folder / "config.json")
        assert not workdir.is_run(folder)
        assert workdir.read(folder) == {}


def test_records_with_other_values_are_left_out(tmp_path):
    folder = make(tmp_path / "a", steps=[10], loss=[1.0], events=[("start", 0)])
    for name, values in {
        "metrics.jsonl": ["[" * 100_000, '{"step": 1e300}', '{"step": 1%s}' % ("0" * 30)],
        "events.jsonl": [
            '{"step": 1, "event": "done", "time": "x"}',
            '{"step": 1, "event": [], "time": 1}',
        ],
    }.items():
        with (folder / name).open("a") as file:
            file.write("\n".join(values) + "\n")
    run = runs.read_run(folder)
    assert [record["step"] for record in run.metrics] == [10]
    assert [event["event"] for event in run.events] == ["start"]
    assert runs.row_of(run, str(tmp_path), "")["step"] == "10/100"
    for name, create in {
        "metrics.jsonl": lambda path: path.symlink_to("/dev/zero"),
        "events.jsonl": os.mkfifo,
    }.items():
        (folder / name).unlink()
        create(folder / name)
    run = runs.read_run(folder)
    assert (run.metrics, run.events) == ([], [])


def test_links_to_the_directory_that_contains_them(tmp_path):
    """Each level would multiply the number of directories."""
    make(tmp_path / "run", steps=[10])
    for i in range(3):
        (tmp_path / f"a_loop_{i}").symlink_to(tmp_path)
    assert [run.name for run in runs.runs_below(tmp_path)] == ["run"]


def test_names_are_escaped(tmp_path, capsys):
    make(tmp_path / "run", config=CONFIG | {"objective": {"name": "\x1b[31mred"}})
    assert runs.main([str(tmp_path)]) == 0
    assert r"\x1b[31mred" in capsys.readouterr().out
