"""Preemption notices of Compute Engine, from a stand-in for its metadata server."""

import json
import subprocess
import sys
import threading

import pytest

from mim_jax import preemption
from tests.conftest import ROOT, environment
from tests.metadata_server import MetadataServer

NORMAL = dict(preempted="FALSE", maintenance_event="NONE")


@pytest.fixture
def notices(monkeypatch):
    """Signals that this process would have received."""
    received = []
    monkeypatch.setattr(preemption.os, "kill", lambda process, number: received.append(number))
    monkeypatch.setattr(preemption, "PAUSE", 0.05)
    return received


@pytest.mark.parametrize(
    ("product", "variable", "host"),
    [
        ("Google Compute Engine\n", None, "metadata.google.internal"),
        ("Google\n", None, "metadata.google.internal"),
        ("Google\n", "127.0.0.1:80", "127.0.0.1:80"),
        ("Standard PC (Q35 + ICH9, 2009)\n", None, ""),
        ("Standard PC (Q35 + ICH9, 2009)\n", "127.0.0.1:80", "127.0.0.1:80"),
        (None, None, ""),
    ],
)
def test_the_kind_of_machine(product, variable, host, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "PRODUCT", tmp_path / "product_name")
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    if product:
        (tmp_path / "product_name").write_text(product)
    if variable:
        monkeypatch.setenv("GCE_METADATA_HOST", variable)
    assert preemption.metadata_host() == host


def test_other_machines_wait_for_nothing(monkeypatch):
    monkeypatch.setattr(preemption, "metadata_host", lambda: "")
    before = threading.active_count()
    preemption.watch(threading.Event())
    assert threading.active_count() == before


@pytest.mark.parametrize("key", preemption.NOTICES)
def test_a_notice_is_sigterm(key, notices, capsys):
    """Also after other values, and although the server fails at first."""
    with MetadataServer(failures=1, **NORMAL) as server:
        thread = threading.Thread(
            target=preemption.wait_for, args=[server.host, key, threading.Event()], daemon=True
        )
        thread.start()
        with server.changed:
            assert server.changed.wait_for(lambda: len(server.requests) >= 3, timeout=60)
        server.set(key, "MIGRATE_ON_HOST_MAINTENANCE")
        with server.changed:
            assert server.changed.wait_for(lambda: len(server.requests) >= 4, timeout=60)
        assert not notices
        server.set(key, preemption.NOTICES[key])
        thread.join(60)
    assert notices == [preemption.signal.SIGTERM]
    assert capsys.readouterr().err == (
        f"warning: Compute Engine announces {key} = {preemption.NOTICES[key]}: the run stops\n"
    )


def test_notices_before_the_start(notices):
    """A preempted machine ends soon; one with scheduled maintenance can still be used."""
    ended = threading.Event()
    with MetadataServer(
        preempted="TRUE", maintenance_event="TERMINATE_ON_HOST_MAINTENANCE"
    ) as server:
        preemption.wait_for(server.host, "preempted", ended)
        assert len(notices) == 1
        arguments = [server.host, "maintenance-event", ended]
        thread = threading.Thread(target=preemption.wait_for, args=arguments, daemon=True)
        thread.start()
        with server.changed:
            twice = lambda: server.requests.count("maintenance-event") == 2  # noqa: E731
            assert server.changed.wait_for(twice, timeout=60)
        assert len(notices) == 1
        ended.set()  # the end of the run
        server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        thread.join(60)
    assert len(notices) == 1


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no such host", "["])
def test_servers_that_do_not_exist(host, notices, monkeypatch, capfd):
    monkeypatch.setattr(preemption, "LONGEST_PAUSE", 0.1)
    ended = threading.Event()
    thread = threading.Thread(target=preemption.wait_for, args=[host, "preempted", ended])
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    ended.set()
    thread.join(60)
    assert not thread.is_alive()
    assert not notices
    assert capfd.readouterr().err == ""


def test_a_run_saves_at_a_notice(tmp_path):
    call = [sys.executable, "-m", "mim_jax", "train", "mae_base", "--smoke"]
    call += ["--config.steps=100000", "--config.log.every_steps=1", f"--workdir={tmp_path}"]
    with MetadataServer(**NORMAL) as server:
        run = subprocess.Popen(
            call,
            cwd=ROOT,
            env=environment(1) | {"GCE_METADATA_HOST": server.host},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            for line in run.stdout:
                if line.startswith("step "):
                    break
            server.set("preempted", "TRUE")
            printed, error = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == 143, error
    assert "stopped and saved after step" in printed
    assert "warning: Compute Engine announces preempted = TRUE: the run stops" in error
    assert "Traceback" not in error
    steps = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["step"]) == ("stopped", max(steps))
