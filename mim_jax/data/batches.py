"""Streams of batches: pure functions of the seed and the step, in threads or processes."""

import functools
import math
import os
import threading
import time
from collections.abc import Iterator

import grain
from absl import flags


def stream(
    dataset: grain.MapDataset,
    *,
    first: int,
    count: int,
    batch_size: int,
    process: int,
    processes: int,
    threads: int,
    workers: int,
) -> Iterator[dict]:
    """Yields this process's rows of global batches.

    Args:
        dataset: the rows of all batches.
        first: index of the first batch.
        count: number of batches.
        batch_size: rows of a global batch.
        process: index of this process.
        processes: number of processes that share a batch.
        threads: number of threads that make rows; 0: one per core.
        workers: number of subprocesses, each with these threads; 0: none.
    """
    local = batch_size // processes  # rows of a batch in this process
    rows = grain.MapDataset.range(first * local, (first + count) * local)
    rows = rows.map(lambda i: dataset[i // local * batch_size + process * local + i % local])
    if not threads:  # each worker makes batches of its own
        threads = math.ceil((os.cpu_count() or 1) / max(1, workers))
    options = grain.ReadOptions(threads, prefetch_buffer_size=max(4, threads))
    batches = rows.batch(local).to_iter_dataset(options)
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain reads flags when it starts a worker
        exit_with_parent = functools.partial(exit_with, os.getpid())
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers), exit_with_parent)
    return iter(batches)


def exit_with(parent: int, worker: int, workers: int) -> None:
    """Starts a thread that ends a worker process when its parent is gone, even if killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
