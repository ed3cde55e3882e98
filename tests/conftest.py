"""Test setup: eight virtual devices on the CPU, fast compilation, a compile cache for all tests."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"
CACHE = Path(tempfile.gettempdir()) / "mim_jax_tests"

os.environ["XLA_FLAGS"] = FLAGS.format(8)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--config", default="", help="test_contract.py: the config to test")


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process with this number of devices.

    XLA prints fatal errors only: version 0.10.0 of jaxlib prints 2 kB for each program that it
    reads from its cache, which fills a pipe that a test does not read, and blocks the process.
    """
    interpreter = str(Path(sys.executable).parent)  # launchers call `python`
    path = os.pathsep.join([interpreter, os.environ.get("PATH", "")])
    flags = FLAGS.format(devices)
    return os.environ | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3", "PATH": path}


@pytest.fixture
def command():
    """Runs `python -m MODULE ARGUMENTS` from the checkout, on a number of devices."""

    def call(*arguments: str, devices: int = 1, **kwargs) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment(devices),
            capture_output=True,
            text=True,
            timeout=300,
            **kwargs,
        )

    return call


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """Returns an empty folder that holds the caches of this test, for example of manifests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder
