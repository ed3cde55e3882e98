"""The launchers, and what else is started by hand."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from mim_jax import cli, config_files
from tests.conftest import ROOT, environment

SMOKE = ["--config=configs/mae_base.py", "--smoke", "--config.log.every_steps=1"]


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def local(workdir, *arguments):
    """What launch/local.sh says of a run of two processes."""
    call = ["launch/local.sh", "2", *arguments, f"--workdir={workdir}"]
    env = environment(1) | {"WORK": str(workdir.parent)}
    pair = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert pair.returncode == 0, pair.stdout + pair.stderr
    return pair.stdout


def test_a_run_continues_on_other_devices(tmp_path, command):
    """Begun on 8 devices that share the state, then two processes, then 4 devices: as on one."""
    arguments = [*SMOKE, "--config.steps=9", "--config.save.every_steps=3"]

    def train(folder, devices, *more):
        done = command(
            "mim_jax.main", *arguments, *more, f"--workdir={tmp_path / folder}", devices=devices
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stopped_after(step):
        for later in (tmp_path / "moved" / "checkpoints").glob("[0-9]"):
            if int(later.name) > step:
                shutil.rmtree(later)

    arguments.append("--config.batch_size=16")
    train("one", 1)
    train("moved", 8, "--config.fsdp=0")
    stopped_after(3)
    said = local(tmp_path / "moved", *arguments, "--config.fsdp=2")
    assert "batch = 2 x 1 x 8 (devices x parts x images)" in said
    assert "continuing after step 3" in said
    stopped_after(6)
    assert "continuing after step 6" in train("moved", 4, "--config.accumulate=2")
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "moved" / "pictures" / "step_0000009.png").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_of_two_processes_gets_a_signal(number, tmp_path):
    """The other says what happened and ends, at once where they meet; or both save and stop."""
    port = 20000 + os.getpid() % 20000
    call = [sys.executable, "-m", "mim_jax.main", *SMOKE, "--config.steps=100000"]
    call += ["--config.save.every_steps=20", "--config.evaluate.every_steps=0"]
    call += ["--config.pictures.every_steps=0"]
    call += [f"--workdir={tmp_path}", f"--distributed=localhost:{port},2,"]
    env = environment(1) | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    pair = [
        subprocess.Popen(
            [*call[:-1], f"{call[-1]}{i}"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    first, second = pair
    try:
        for line in first.stdout:
            if re.match(r"step +41/", line):  # the second save is in progress
                break
        second.send_signal(number)
        said, error = first.communicate(timeout=90)
        second.wait(timeout=90)
    finally:
        for process in pair:
            process.kill()
    if number == signal.SIGKILL:
        assert first.returncode == 1
        assert "failed: process 0 of 2 lost another process" in error
        assert "run the same command again to continue from the newest checkpoint" in error
        assert "Traceback" not in error
    else:
        assert first.returncode == second.returncode == 143
        assert "stopped and saved after step" in said
        assert len(list((tmp_path / "checkpoints").glob("[0-9]*"))) > 0


def test_a_process_that_fails_ends_the_others(tmp_path):
    call = ["launch/local.sh", "2", "--config=configs/mae_base.py", "--config.seed=x"]
    env = environment(1) | {"WORK": str(tmp_path)}
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "seed = 'x' must be int" in done.stdout + done.stderr  # whichever was the first


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


SLICE = dict(PROJECT="p", ZONE="us-east5-a", MACHINE="ct6e-standard-4t", TOPOLOGY="4x8", BUCKET="b")
LAUNCHERS = {  # script: its environment, the command that a dry run prints
    "gce_group.sh": (
        SLICE,
        "gcloud compute instance-groups managed create mim-jax --project=p --zone=us-east5-a "
        "--template=mim-jax --size=8 --target-size-policy-mode=bulk "
        "--default-action-on-vm-failure=do-nothing "
        "--workload-policy=projects/p/regions/us-east5/resourcePolicies/mim-jax",
    ),
    "gke.sh": (
        dict(CLUSTER="c", LOCATION="l", PROJECT="p", COMPUTE="v6e-16", BUCKET="b", IMAGE="i"),
        "gcluster job submit --project=p --cluster=c --location=l --name=mim-jax --image=i "
        "--compute-type=v6e-16 --num-slices=1 --mount=gs://b:/bucket:rw --grace-period=2m "
        "--restarts=100 --restart-on-exit-codes=1,130,134,143 --command=python -m mim_jax.main "
        "--config=a.py --config.data.name=folder:/x\\ y --distributed",
    ),
    "slurm.sh": (
        {},
        "srun --kill-on-bad-exit=1 python -m mim_jax.main --config=a.py "
        "--config.data.name=folder:/x y --distributed",
    ),
    "tpu_vm.sh": (
        dict(TPU="t", ZONE="z"),
        "gcloud compute tpus tpu-vm scp --recurse . t:mim_jax_checkout --zone=z --worker=all",
    ),
    "local.sh": ({}, "--distributed=localhost:"),
}


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_dry_run_prints_the_command(script):
    variables, expected = LAUNCHERS[script]
    count = ["2"] if script == "local.sh" else []
    call = ["bash", f"launch/{script}", "--dry-run", *count, "--config=a.py"]
    call.append("--config.data.name=folder:/x y")
    env = environment(1) | variables
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    if variables:  # each is required
        name = next(iter(variables))
        env = {key: value for key, value in env.items() if key != name}
        done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
        assert done.returncode != 0
        assert name in done.stderr


def test_a_host_of_an_instance_group_starts_the_run(tmp_path):
    """Runs the launcher and then the script of a host, with stand-ins of all vendors' commands."""
    stand_ins = {
        "gcloud": """
            case "$1 $2" in
              "storage cp") cp "$3" "$STORE" ;;
              "storage cat") cat "$STORE" ;;
              "compute instance-templates")
                for word; do case $word in *startup-script=*) cp "${word#*script=}" "$SCRIPT";; esac
                done ;;
            esac
            echo "$*" >> "$SAID" """,
        "systemd-run": 'printf "%s\n" "$@" > "$SAID.run"',
        "mkdir": "",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    names = {"STORE": "program.tar.gz", "SCRIPT": "start.sh", "SAID": "said"}
    env = environment(1) | SLICE | {name: str(tmp_path / file) for name, file in names.items()}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "TEMPLATE_FLAGS": "--provisioning-model=SPOT"}
    call = ["bash", "launch/gce_group.sh", "--config=a.py", "--config.data.name=folder:/x y"]
    subprocess.run(call, cwd=ROOT, env=env, check=True, timeout=60)
    said = (tmp_path / "said").read_text()
    assert "--type=HIGH_THROUGHPUT --accelerator-topology=4x8" in said
    assert "--provisioning-model=SPOT" in said

    host = tmp_path / "host"
    host.mkdir()
    script = (tmp_path / "start.sh").read_text()
    assert "\ncd /mim_jax\n" in script
    script = script.replace("\ncd /mim_jax\n", "\n").replace("launch/install.sh", "echo")
    subprocess.run(["bash", "-c", script], cwd=host, env=env, check=True, timeout=60)
    assert (host / "mim_jax" / "main.py").is_file()
    assert (host / "launch" / "install.sh").is_file()
    started = (tmp_path / "said.run").read_text().splitlines()
    start = started.index("/root/venv/bin/python")
    assert started[start + 1 :] == [
        "-m",
        "mim_jax.main",
        "--config=a.py",
        "--config.data.name=folder:/x y",
        "--distributed",
    ]
    # systemd's rule: all exit codes but 0 are failures, and 2 is not repeated
    assert {"--property=Restart=on-failure", "--property=RestartPreventExitStatus=2"} < set(started)

    subprocess.run([*call[:2], "--delete"], cwd=ROOT, env=env, check=True, timeout=60)
    last = (tmp_path / "said").read_text().splitlines()[-3:]
    assert [line.split()[:4] for line in last] == [
        ["compute", "instance-groups", "managed", "delete"],
        ["compute", "instance-templates", "delete", "mim-jax"],
        ["compute", "resource-policies", "delete", "mim-jax"],
    ]


def test_the_commands_of_the_walk_through(tmp_path):
    """Runs docs/pod.md, from the bucket to the deletion, with stand-ins of the programs."""
    text = (ROOT / "docs" / "pod.md").read_text().partition("### What to watch")[0]
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    script = "\n".join(blocks).replace("launch/local.sh 2", "launch/local.sh --dry-run 2")
    for name in ("gcloud", "mim-jax", "pip"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/said\n')
        (tmp_path / name).chmod(0o755)
    env = environment(1) | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=ROOT, env=env, check=True, timeout=60)
    said = (tmp_path / "said").read_text().splitlines()
    assert {line.split()[1] for line in said if line.startswith("mim-jax")} <= set(cli.COMMANDS)
    assert any("managed create mim-jax --project=my-project" in line for line in said)
    assert "resource-policies delete mim-jax" in said[-1]


def test_python_is_installed_beside_that_of_the_machine(tmp_path):
    """Runs the installation with a stand-in of uv."""
    uv = tmp_path / "uv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    uv.chmod(0o755)
    env = environment(1) | {"HOME": str(tmp_path)}
    subprocess.run(["launch/install.sh", "tpu,gcs"], cwd=ROOT, env=env, check=True, timeout=30)
    assert (tmp_path / "said").read_text().splitlines() == [
        f"venv --quiet --allow-existing --python=3.12 {tmp_path}/venv",
        f"pip install --quiet --python={tmp_path}/venv/bin/python --editable .[tpu,gcs]",
    ]


def test_launchers_are_sound():
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("needs shellcheck")
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_a_run_ends_after_its_minutes(tmp_path, command):
    """As after SIGTERM: it saves, or exits at once if no step is done."""
    arguments = [*SMOKE, "--config.steps=100000", f"--workdir={tmp_path}"]
    done = command("mim_jax.main", *arguments, "--max-minutes=0.4")
    assert done.returncode == 143, done.stderr
    saved = (tmp_path / "checkpoints").is_dir() and list((tmp_path / "checkpoints").glob("[0-9]*"))
    assert ("stopped and saved after step" in done.stdout) == bool(saved)
    assert saved or "stopped: nothing new was saved" in done.stderr


@pytest.mark.slow
def test_the_benchmark_of_a_step(command):
    pytest.importorskip("transformers")
    done = command("benchmarks.step_time", "--size=Ti", "--batch=2", "--rounds=2")
    assert done.returncode == 0, done.stderr
    assert "ours / theirs:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", config_files.names())
def test_every_config_has_a_smoke_run(name, tmp_path, command):
    done = command("mim_jax.main", f"--config={name}", "--smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "done:" in done.stdout
