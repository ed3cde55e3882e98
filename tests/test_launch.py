"""The launchers, and what else is started by hand."""

import json
import subprocess

import pytest

from tests.conftest import ROOT, environment

SMOKE = ["--config=configs/mae_base.py", "--smoke", "--config.log.every_steps=1"]


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_two_processes_train_as_one(tmp_path, command):
    """The same losses, one log, one set of checkpoints; one process goes on where two stopped."""
    arguments = [*SMOKE, "--config.steps=6", "--config.save.every_steps=3"]
    alone = command("mim_jax.main", *arguments, f"--workdir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    call = ["launch/local.sh", "2", *arguments, f"--workdir={tmp_path / 'two'}"]
    env = environment(1) | {"WORK": str(tmp_path)}
    pair = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert pair.returncode == 0, pair.stdout + pair.stderr
    assert "batch = 2 devices" in pair.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "two" / "pictures" / "step_0000006.png").exists()


def test_a_process_that_fails_ends_the_others(tmp_path):
    call = ["launch/local.sh", "2", "--config=configs/mae_base.py", "--config.seed=x"]
    env = environment(1) | {"WORK": str(tmp_path)}
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "seed = 'x' must be int" in done.stdout


@pytest.mark.parametrize(
    ("script", "program", "words"),
    [
        (
            "slurm.sh",
            "srun",
            "--kill-on-bad-exit=1 python -m mim_jax.main --config=a.py --distributed",
        ),
        ("tpu_vm.sh", "gcloud", "python -m mim_jax.main --config=a.py  --distributed"),
    ],
)
def test_cluster_launchers_start_the_command(script, program, words, tmp_path):
    stand_in = tmp_path / program
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    stand_in.chmod(0o755)
    env = environment(1) | {"TPU": "pod", "ZONE": "here", "GCLOUD": str(stand_in)}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    call = [f"launch/{script}", "--config=a.py"]
    assert subprocess.run(["bash", *call], cwd=ROOT, env=env, timeout=30).returncode == 0
    assert words in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_the_benchmark_of_a_step(command):
    pytest.importorskip("transformers")
    done = command("benchmarks.step_time", "--size=Ti", "--batch=2", "--rounds=2")
    assert done.returncode == 0, done.stderr
    assert "ours / theirs:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "configs").glob("*.py")))
def test_every_config_has_a_smoke_run(path, tmp_path, command):
    done = command("mim_jax.main", f"--config=configs/{path}", "--smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "done:" in done.stdout
