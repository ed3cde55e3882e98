"""Measures images per second read from an emulated bucket with latency, and from a local disk.

    python -m benchmarks.bucket [--latency=0.02] [--threads 1 16] [--images=512]

The bucket is an emulator on this machine (tests/bucket_server.py), which delays every response. It
holds JPEGs of about 100 kB in a WebDataset shard and in array_record. They are read in random order
and not decoded. The emulator shares the cores with the reader, so a real bucket serves more
requests per second; the CPU time of the reader per image does not depend on that.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.input import photographs
from mim_jax import workdir
from mim_jax.data import prepare, sources

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def emulator(latency: float = 0) -> Iterator[None]:
    """A context in which gs:// is an emulator with the bucket `runs`.

    With a latency, it handles several requests at a time; then uploads fail now and then.
    """
    command = [sys.executable, "-m", "tests.bucket_server", "0"]
    command += [str(latency)] if latency else []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        os.environ |= {
            "STORAGE_EMULATOR_HOST": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "test",
        }
        try:
            yield
        finally:
            process.kill()


def measure(read: Callable[[int], object], count: int, threads: int) -> str:
    """Returns images per second and the reader's CPU time, in random order."""
    order = np.random.default_rng(0).permutation(count).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))  # opens connections and indices
        start, cpu = time.perf_counter(), time.process_time()
        list(pool.map(read, order))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return f"{count / seconds:,.0f} images/s, {cpu / count * 1e3:.2f} ms of CPU time per image"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, emulator(options.latency):
        folder = Path(name)
        for part in ("photographs", "shards"):
            (folder / part).mkdir()
        photographs(folder / "photographs", options.images)
        with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
            tar.add(folder / "photographs", arcname="")
        prepare.main([f"folder:{folder}/photographs", f"--to={folder}/packed"])
        for part in ("shards", "packed"):
            with workdir.staged(f"gs://runs/{part}") as staged:
                shutil.copytree(folder / part, staged, dirs_exist_ok=True)
        for place in (name, "gs://runs"):
            for source in (f"folder:{place}/shards", f"tfds:{place}/packed"):
                start = time.perf_counter()
                [images] = sources.open_sources(source, ["all"])
                opened = time.perf_counter() - start
                for threads in options.threads:
                    figures = measure(images.examples.__getitem__, len(images.examples), threads)
                    print(f"{source}, opened in {opened:.1f} s, {threads} threads: {figures}")


if __name__ == "__main__":
    main()
