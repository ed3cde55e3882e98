"""The command as a user types it: a run from start to end, its files, its exit codes."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, check, evaluate, inspect, main, recipe, schema, training
from mim_jax.goodput import KINDS, REPEATED
from tests.conftest import ROOT, environment

MAE = "--config=configs/mae_base.py"
TINY = ["--config.batch_size=8", "--config.log.every_steps=1"]


def smoke(workdir, *more):
    return ["mim_jax.main", MAE, "--smoke", f"--workdir={workdir}", *TINY, *more]


def records(workdir, key="loss"):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines) if key in line}


def losses(workdir):
    return {step: line["loss"] for step, line in records(workdir).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a smoke run of the paper's config, and what it said."""
    workdir = tmp_path_factory.mktemp("run") / "smoke"
    done = subprocess.run(
        [sys.executable, "-m", *smoke(workdir)],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_a_run_leaves_its_files(finished):
    workdir, said = finished
    assert sorted(p.name for p in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "events.jsonl",
        "metrics.jsonl",
        "pictures",
    ]
    line = records(workdir)[20]
    assert set(line) == {
        *("step", "loss", "lr", "grad_norm", "epoch", "time", "host_memory_gib"),
        *("images_per_second", "images_per_second_per_chip", "input_wait"),
        *(f"goodput/{kind}" for kind in KINDS),
    }
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("done", 20)]
    assert len(records(workdir)) == 20
    assert records(workdir)[1]["lr"] == 0.0
    assert sorted(records(workdir, "evaluate/loss")) == [10, 20]
    written = json.loads((workdir / "config.json").read_text())
    assert written["config"]["objective"]["mask_ratio"] == 0.75
    assert set(written["versions"]) >= {"jax", "flax", "mim-jax", "python"}
    assert written["trajectory"]["data set's examples"] == 1340
    picture = Image.open(workdir / "pictures" / "step_0000020.png")
    assert np.asarray(picture).std() > 10
    assert "lr = base_lr x batch / 256 = 0.00015 x 8 / 256 = 4.6875e-06" in said
    assert "ETA" in said


def test_the_same_command_reports_that_the_run_is_complete(finished, command):
    workdir, _ = finished
    again = command(*smoke(workdir))
    assert again.returncode == 0
    assert "is complete: it is at step 20 of 20" in again.stdout
    assert len(records(workdir)) == 20


def test_another_trajectory_is_refused(finished, command):
    workdir, _ = finished
    other = command(*smoke(workdir, "--config.seed=3", "--config.optimizer.b2=0.9"))
    assert other.returncode == 2
    assert "seed is 3, was 0" in other.stderr
    assert "optimizer.b2 is 0.9, was 0.95" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_run_older_than_a_key_continues(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "config.json").read_text())
    for keys in (record["trajectory"], record["config"]["optimizer"]):
        for key in ("schedule", "optimizer.schedule"):
            keys.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert main.main(smoke(tmp_path)[1:]) == 0
    assert "is complete" in capsys.readouterr().out
    assert main.main(smoke(tmp_path, "--config.optimizer.schedule=beit")[1:]) == 2
    assert "optimizer.schedule is 'beit', was 'mae'" in capsys.readouterr().err


def test_a_killed_run_continues_exactly(finished, tmp_path):
    """SIGKILL between two checkpoints: the log's tail goes, and the losses are the same numbers."""
    call = [sys.executable, "-m", *smoke(tmp_path, "--config.save.every_steps=4")]
    first = subprocess.Popen(call, cwd=ROOT, env=environment(1), stdout=subprocess.DEVNULL)
    for _ in range(6000):
        if (tmp_path / "checkpoints" / "4").exists() and len(losses(tmp_path)) >= 7:
            break
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "loss": 1.0}\n{"step": 8, "lo')  # what a killed run may leave
    second = subprocess.run(call, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "continuing after step" in second.stdout
    assert losses(tmp_path) == losses(finished[0])


def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_used(finished, tmp_path):
    """One bit of the newest: what was logged after the one before goes, and comes again."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    largest = max((tmp_path / "checkpoints" / "20").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    call = [sys.executable, "-m", *smoke(tmp_path)]
    again = subprocess.run(call, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"checkpoint 20 in {tmp_path}/checkpoints is corrupt: state/" in again.stderr
    assert "continuing after step 10" in again.stdout
    assert losses(tmp_path) == losses(finished[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_continues(finished, tmp_path, number):
    call = [sys.executable, "-m", *smoke(tmp_path)]
    first = subprocess.Popen(
        call,
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in first.stdout:
        if line.startswith("step "):
            break
    first.send_signal(number)
    said, error = first.communicate()
    assert "Traceback" not in error
    if first.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert first.returncode == 128 + number
    assert "stopped and saved after step" in said
    second = subprocess.run(call, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "continuing after step" in second.stdout
    assert losses(tmp_path) == losses(finished[0])


def test_init_from_a_run(finished, tmp_path, command):
    done = command(
        *smoke(tmp_path, f"--config.init_from.encoder={finished[0]}", "--config.steps=3")
    )
    assert done.returncode == 0, done.stderr
    assert "encoder: 29 arrays from step 20" in done.stdout
    assert losses(tmp_path)[1] != losses(finished[0])[1]


def test_named_settings_may_change_on_purpose(finished, tmp_path, capsys):
    """A finished run is extended, at another rate; what changed is recorded."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    more = ["--config.steps=23", "--config.optimizer.min_lr=1e-6"]
    again = smoke(tmp_path, *more)[1:]
    assert main.main(again) == 2
    assert "allow the change: --change=optimizer.min_lr,steps." in capsys.readouterr().err
    assert main.main([*again, "--change=steps"]) == 2
    assert "optimizer.min_lr is 1e-06, was 0.0." in capsys.readouterr().err
    assert main.main([*again, "--change=stepz,optimizer.min_lr"]) == 2
    assert "--change=stepz: the config has no key stepz" in capsys.readouterr().err
    assert main.main([*again, "--change=steps,optimizer.min_lr"]) == 0
    assert "continuing after step 20" in capsys.readouterr().out
    assert max(losses(tmp_path)) == 23
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["history"] == [{"changes": {"optimizer.min_lr": [0.0, 1e-6], "steps": [20, 23]}}]
    assert main.main(again) == 0
    assert "is complete" in capsys.readouterr().out


def test_a_run_continues_from_a_chosen_checkpoint(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    arguments = smoke(tmp_path)[1:]
    assert main.main([*arguments, "--from-step=11"]) == 2
    assert "there is no checkpoint of step 11 in" in capsys.readouterr().err
    assert main.main([*arguments, "--from-step=10"]) == 0
    assert "continuing after step 10" in capsys.readouterr().out
    assert losses(tmp_path) == pytest.approx(losses(finished[0]), rel=1e-5)
    assert list((tmp_path / "checkpoints").glob("20.set-aside-*"))
    before, after = (
        list(records(folder, "goodput/step").values()) for folder in (finished[0], tmp_path)
    )
    at_10 = next(line for line in before if line["step"] == 10)
    repeated = sum(before[-1][f"goodput/{kind}"] - at_10[f"goodput/{kind}"] for kind in REPEATED)
    assert after[-1]["goodput/lost"] == pytest.approx(repeated, abs=0.01)
    assert inspect.main([str(tmp_path)]) == 0
    assert re.search(r"time: \d+ s of all processes: .*% step", capsys.readouterr().out)


def test_lines_of_a_killed_process_are_survived(finished, tmp_path, capsys):
    """Half a line, binary bytes, foreign objects: left out, and the file is complete again."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    damage = b'\xff\xfe\x00\n[1, 2]\n{"loss": 1.0}\n"text"\n{"step": 9, "lo'
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    (tmp_path / "bad_files.jsonl").write_bytes(damage)
    assert main.main(smoke(tmp_path)[1:]) == 0
    assert losses(tmp_path) == pytest.approx(losses(finished[0]), rel=1e-5)
    assert not list(tmp_path.glob("*.part"))


def test_a_lost_config_is_read_from_the_checkpoint(finished, tmp_path, capsys):
    """Without config.json, other settings are still refused, and the same still accepted."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").unlink()
    assert main.main([*smoke(tmp_path)[1:], "--config.seed=5"]) == 2
    assert "holds a run with other settings: seed is 5, was 0" in capsys.readouterr().err
    assert main.main(smoke(tmp_path)[1:]) == 0
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "config.json").exists()


def test_a_run_does_not_choose_where_compiled_programs_are(finished, tmp_path):
    """A stranger's run could bring a compiled step of its own."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"]["compile_cache"] = str(tmp_path / "cache")
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert schema.load(str(tmp_path)).compile_cache == "~/.cache/mim_jax"
    assert schema.load(str(tmp_path), ["compile_cache=/x"]).compile_cache == "/x"


def test_a_run_that_could_not_start_leaves_its_folder_free(finished, tmp_path, capsys):
    """Where something else must be said, another folder need not be."""
    arguments = ["--config.steps=3", f"--config.init_from.encoder={finished[0]}"]
    heads = ["--config.model.heads=4"]
    assert main.main([*smoke(tmp_path, *arguments, *heads)[1:]]) == 2
    assert "its model.heads is 2, this run's is 4" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()
    assert main.main([*smoke(tmp_path, *arguments)[1:]]) == 0
    assert main.main([*smoke(tmp_path, *arguments, *heads)[1:]]) == 2
    assert "holds a run with other settings: model.heads is 4, was 2" in capsys.readouterr().err


def test_training_imports_neither_tensorflow_nor_torch(tmp_path, command):
    code = (
        "import sys; from mim_jax.main import main; "
        f"code = main({smoke(tmp_path, '--config.steps=3')[1:]!r}); "
        "sys.exit(code or any(name in sys.modules for name in ('tensorflow', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=configs/mae_bse.py"], "did you mean configs/mae_base.py?"),
        ([MAE, "--config.optimiser.b2=1"], "did you mean optimizer.b2?"),
        ([MAE, "--config.optimizer.b2=x"], "optimizer.b2 = 'x' must be float"),
        ([MAE, "--smoke", "--config.batch_size=-4"], "batch_size = -4 must be at least 1"),
        ([MAE, "--smoke", "--config.data.size=100"], "100 x 100 pixels cannot be cut"),
        ([MAE, "--smoke", "--config.data.name=nothing"], "there is no data set 'nothing'"),
        ([MAE], "'imagenet2012' is not prepared in"),
        ([MAE, "--smoke", "--profile=5"], "--profile=5 must be FIRST:LAST"),
        ([MAE, "--smoke", "--profile=4:3"], "--profile=4:3 must be FIRST:LAST"),
        (["--config=README.md"], "README.md, line"),
        ([MAE, "--smoke", "--distributed=3"], "must be ADDRESS:PORT,PROCESSES,PROCESS"),
        ([MAE, "--smoke", "--workdir=s3://bucket/run"], "only buckets of Google Cloud Storage"),
        ([MAE, "--smoke", "--workdir=/proc/here/run"], "cannot create the folder /proc/here/run"),
        ([MAE, "--smoke", "--workdir=README.md/run"], "cannot create the folder"),
        ([MAE, "--smoke", "--config.init_from.encoder=configs"], "is not a run directory"),
        (
            ["--config=configs/beit_emoji.py", "--config.init_from.tokenizer=nowhere"],
            "init_from.tokenizer = nowhere is not a run directory: train one first, or",
        ),
    ],
)
def test_mistakes_exit_with_code_2_and_one_sentence(arguments, sentence, tmp_path, capsys):
    if not any(argument.startswith("--workdir") for argument in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], [MAE, "--smok"], [MAE, "seed=3"]])
def test_unknown_arguments_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_full_disk_is_noticed_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 2**20}))
    assert main.main([MAE, "--smoke", f"--workdir={tmp_path}"]) == 2
    assert "has 0.0 GiB free, but two checkpoints need" in capsys.readouterr().err


def test_a_full_disk_is_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    def save(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 3 bytes: No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", save)
    assert main.main(smoke(tmp_path, "--config.steps=3")[1:]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"error: cannot write to {tmp_path}/checkpoints: No space left on device."


def test_losses_that_stay_nan_end_the_run(tmp_path, capsys):
    arguments = smoke(tmp_path, "--config.optimizer.base_lr=1e30", "--config.batch_size=8")[1:]
    assert main.main(arguments) == 1
    assert "failed: all steps from" in capsys.readouterr().err


class StandIn:
    """A package of a logging service that writes down what it is told."""

    def __init__(self):
        self.told = []

    def SummaryWriter(self, *args, **kwargs):  # noqa: N802
        return self

    def init(self, **kwargs):
        return self

    def flush(self):
        pass

    def add_scalar(self, name, value, step):
        self.told.append((name, value, step))

    def log(self, values, step):
        self.told += [(name, value, step) for name, value in values.items()]


@pytest.mark.parametrize(
    ("package", "override"),
    [
        ("tensorboardX", "log.tensorboard=true"),
        ("wandb", "log.wandb=my_project"),
        ("trackio", "log.trackio=my_project"),
    ],
)
def test_other_sinks_get_the_same_records(package, override, tmp_path, monkeypatch, capsys):
    arguments = smoke(tmp_path, f"--config.{override}", "--config.steps=3")[1:]
    monkeypatch.setitem(sys.modules, package, None)
    assert main.main(arguments) == 2
    assert f"needs {package}: pip install" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, package, StandIn())
    assert main.main(arguments) == 0
    told = {(step, value) for name, value, step in sys.modules[package].told if name == "loss"}
    assert told == set(losses(tmp_path).items())


def test_a_trace_is_written(tmp_path, command):
    done = command(*smoke(tmp_path, "--profile=2:4", "--config.steps=5"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(("steps", "ends"), [("2:4", 4), ("2:30", 5)])
def test_a_trace_ends_with_its_last_step_or_with_the_run(steps, ends, monkeypatch):
    told, step = [], 0
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: told.append(("start", step)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: told.append(("stop", step)))
    trace = main.Trace(steps, "run", last=5)
    for step in range(6):
        trace.after(step, {})
    trace.end({})
    assert told == [("start", 1), ("stop", ends)]


def test_a_trace_after_the_run_is_refused():
    with pytest.raises(UserError, match="--profile=6:9: the run ends after step 5"):
        main.Trace("6:9", "run", last=5)


def test_missing_evaluation_labels_are_reported_at_the_start(monkeypatch, capsys):
    @functools.wraps(recipe.data.make)
    def unlabelled(**settings):
        made = make(**settings)
        examples = [made.evaluation.examples[0] | {"label": -1}]
        return dataclasses.replace(made, evaluation=made.evaluation._replace(examples=examples))

    make = recipe.data.make
    monkeypatch.setattr(recipe.data, "make", unlabelled)
    for command in (main, check, evaluate):
        source = ["--config.init_from.encoder=nowhere"] if command is evaluate else []
        assert command.main(["--config=configs/emoji_scratch.py", *source]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: the images of validation have no labels: choose another")


def test_a_smoke_run_is_possible_on_any_number_of_devices(monkeypatch):
    for devices in range(1, 20):
        monkeypatch.setattr("jax.device_count", lambda devices=devices: devices)
        config = schema.load("configs/mae_base_finetune.py", [], smoke=True)
        assert config.batch_size % devices == 0
        assert config.objective.mixup_group * devices == config.batch_size
        assert config.objective.mixup_group % 2 == 0


@pytest.mark.parametrize("step", [10, 20])
def test_a_signal_during_an_evaluation(tmp_path, monkeypatch, capsys, step):
    """The run saves before it stops, and the next start repeats the evaluation."""
    evaluate, folder = training.evaluate, tmp_path / "run"

    def interrupted(objective, state, *arguments, **options):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(objective, state, *arguments, **options)

    monkeypatch.setattr(training, "evaluate", interrupted)
    arguments = ["--config=configs/mae_base.py", "--smoke", f"--workdir={folder}"]
    assert main.main(arguments) == 128 + signal.SIGTERM
    assert f"stopped and saved after step {step}" in capsys.readouterr().out
    assert (folder / "checkpoints" / str(step) / "digests.json").is_file()
    monkeypatch.setattr(training, "evaluate", evaluate)

    def failing(*arguments):
        raise RuntimeError

    with monkeypatch.context() as failed:  # an error after the evaluation
        failed.setattr(training.Training, "loop" if step == 10 else "end", failing)
        with pytest.raises(RuntimeError):
            main.main(arguments)
    for said in ("done: ", "is complete") if step == 10 else ("is complete",):
        assert main.main(arguments) == 0
        assert said in capsys.readouterr().out
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "evaluate/loss" in line] == [10, 20]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == [
        "step_0000010.png",
        "step_0000020.png",
    ]
