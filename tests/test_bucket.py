"""Run directories in a bucket, which an emulator on the loopback address serves."""

import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mim_jax import (
    UserError,
    bucket,
    evaluate,
    inspect,
    main,
    pictures,
    replay,
    runs,
    storage,
    workdir,
)
from mim_jax.checkpoint import Checkpoints, files
from mim_jax.checkpoint.saved import load
from mim_jax.checkpoint.trees import flat
from mim_jax.convert import __main__ as convert
from mim_jax.data import sources
from mim_jax.data.decode import BadImageError
from mim_jax.report import __main__ as report
from mim_jax.train import TrainState
from tests.conftest import ROOT, environment
from tests.images import jpeg, tar

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
MAE = "--config=configs/mae_emoji.py"


@pytest.fixture(scope="module")
def server():
    """Starts the emulator; yields its process."""
    command = [sys.executable, "-m", "tests.bucket_server", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    settings = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google for the kind of a bucket
        "NO_GCE_CHECK": "true",
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # for array_record
        "GOOGLE_CLOUD_PROJECT": "test",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    bucket.client.cache_clear()
    yield process
    process.kill()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    bucket.client.cache_clear()
    bucket.check_access_once.cache_clear()


@pytest.fixture
def place(server, request):
    """Returns an empty folder of the bucket."""
    return f"gs://runs/{request.node.name}"


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(bucket, "LEASE", 6.0)


def state_of(step: int) -> TrainState:
    import jax

    params = {"layer": {"kernel": np.full((64, 64), step, np.float32)}}
    return jax.device_put(TrainState(np.int32(step), params, {}, (), None))


def saved(place: str, *steps: int) -> None:
    """Saves checkpoints of some steps."""
    checkpoints = Checkpoints(place, keep=9, record=dict(config={}, trajectory={}))
    for step in steps:
        checkpoints.save(state_of(step))
    checkpoints.close()


# --- A whole run. ---


def test_a_killed_run_continues_and_every_command_reads_it(place, capsys):
    arguments = [MAE, "--smoke", "--config.steps=30", "--config.save.every_steps=10"]
    arguments += ["--config.log.every_steps=10", "--config.probe.images=0"]
    arguments += ["--config.evaluate.every_steps=30", "--config.pictures.every_steps=30"]
    command = [sys.executable, "-m", "mim_jax.main", *arguments, f"--workdir={place}"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not files.has_checkpoints(place):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert main.main([*arguments, f"--workdir={place}"]) == 0
    assert "continuing after step" in capsys.readouterr().out

    assert [step for step, _ in runs.read_run(place).series("loss")] == [10, 20, 30]
    names = {path.name for path in workdir.open_path(place).iterdir()}
    assert {"metrics-00000-000.jsonl", "metrics-00001-000.jsonl", "config.json"} <= names
    assert "tensorflow" not in sys.modules

    capsys.readouterr()
    assert evaluate.main([f"--config={place}", f"--to={place}/result.json"]) == 0
    assert "step 30" in capsys.readouterr().out
    result = json.loads((workdir.open_path(place) / "result.json").read_text())
    assert math.isfinite(result["loss"])
    assert inspect.main([place]) == 0
    assert "encoder" in capsys.readouterr().out
    assert runs.main(["gs://runs"]) == 0
    assert "finished  30/30" in capsys.readouterr().out
    assert report.main([place, "--files-only"]) == 0
    assert (workdir.open_path(place) / "report.html").is_file()
    weights = f"{place}/weights.safetensors"
    assert convert.main([place, weights, "--to=mae"]) == 0
    assert convert.main([weights, f"{place}-converted", "--to=mim_jax"]) == 0
    ours, _, _ = load(place)
    theirs, _, _ = load(f"{place}-converted")
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(theirs[name], value)


def test_options_of_a_run_work_in_a_bucket(place, monkeypatch, capsys):
    """A trace, another log, a failed step that is repeated, and a picture of an image there."""
    records = []
    stand_in = SimpleNamespace(
        init=lambda **_: SimpleNamespace(log=lambda values, step: records.append(step))
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    arguments = [MAE, "--smoke", "--config.steps=4", "--config.probe.images=0"]
    arguments += ["--config.evaluate.every_steps=0", "--config.pictures.every_steps=0"]
    arguments += ["--config.save.every_steps=2"]
    arguments += [f"--workdir={place}", "--profile=2:3", "--config.log.wandb=project"]
    assert main.main(arguments) == 0
    assert 4 in records
    root = workdir.open_path(place)
    traces = [name for name, *_ in storage.objects(f"{place}/profile")]
    assert any(name.endswith(".xplane.pb") for name in traces)

    (root / "captures" / "step_0000003.json").write_text(json.dumps(dict(step=3, skips=[])))
    capsys.readouterr()
    assert replay.main([place]) == 0
    assert f"step 3 of {place}" in capsys.readouterr().out
    (root / "image.jpg").write_bytes(jpeg(0))
    drawn = ["reconstruct", place, f"{place}/image.jpg", f"--to={place}/drawn.png"]
    assert pictures.main(drawn) == 0
    assert (root / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert pictures.main(["reconstruct", place, f"{place}/no.jpg", f"--to={place}/x.png"]) == 2
    assert f"cannot read the image {place}/no.jpg" in capsys.readouterr().err

    assert main.main([*arguments, "--config.log.tensorboard=true"]) == 2
    assert "log.tensorboard = True needs a run directory on a disk" in capsys.readouterr().err


# --- Data. ---


def test_images_are_read_from_a_bucket(place):
    local = sources.BUILTIN["emoji"]
    with workdir.staged(place) as folder:
        shutil.copytree(local, folder, dirs_exist_ok=True)
    theirs, ours = (
        sources.builder_of(name, "").as_data_source(split="validation")
        for name in ("emoji", f"tfds:{place}")
    )
    assert len(ours) == len(theirs)
    for i in (0, 77, 565):
        np.testing.assert_array_equal(ours[i]["image"], theirs[i]["image"])
        assert ours[i]["label"] == theirs[i]["label"]
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="must be local or mounted: mount the bucket with gcsf"):
        sources.open_sources("hf:gs://runs/table", ["train"])


def write_images(folder: Path) -> None:
    """Writes WebDataset shards, a tar in a tar, images in folders, and a file that is not one."""
    for shard in range(3):
        pictures = {f"{shard}{i}.jpg": jpeg(10 * shard + i) for i in range(4)}
        labels = {f"{shard}{i}.cls": str(i % 2).encode() for i in range(4)}
        tar(folder / "train" / f"shard-{shard}.tar", pictures | labels)
    inner = folder / "inner.tar"
    tar(inner, {"cat/a.png": jpeg(77), "cat/a.cls": b"1"})
    tar(folder / "validation.tar", {"inner.tar": inner.read_bytes()})
    inner.unlink()
    for name, content in {"b.png": jpeg(5), "b.cls": b"0", "c.txt": b"not an image"}.items():
        (folder / "train" / name).write_bytes(content)


def test_shards_and_images_are_read_from_a_bucket(place, tmp_path, monkeypatch):
    write_images(tmp_path / "set")
    with workdir.staged(place) as folder:
        shutil.copytree(tmp_path / "set", folder, dirs_exist_ok=True)
    requests = []
    read = bucket.Bucket.read
    monkeypatch.setattr(bucket.Bucket, "read", lambda *x: requests.append(x[1:]) or read(*x))
    for attempt in range(2):
        theirs, ours = (
            sources.open_sources(f"folder:{root}", ["train", "validation"], labels="cls")
            for root in (tmp_path / "set", place)
        )
        scanned = len(requests)
        for local, remote in zip(theirs, ours, strict=True):
            assert remote.fingerprint == local.fingerprint
            assert remote.unread == local.unread
            for i in range(len(local.examples)):
                assert remote.name_of(i) == local.name_of(i)
                assert remote.examples[i] == local.examples[i]
        assert [len(x.examples) for x in ours] == [13, 1]
        assert len(requests) == scanned + 14  # one for each image
        if attempt:  # the list of images was kept; only labels are read
            assert {size for *_, size in requests[:scanned]} == {1}
        requests.clear()
    (workdir.open_path(place) / "train" / "d.png").write_bytes(jpeg(1))
    (workdir.open_path(place) / "train" / "d.cls").write_bytes(b"1")
    [train] = sources.open_sources(f"folder:{place}", ["train"], labels="cls")
    assert len(train.examples) == 14
    [alone] = sources.open_sources(f"folder:{place}/train/shard-1.tar", ["all"])
    assert len(alone.examples) == 4


def test_a_missing_image_is_bad_and_a_failing_bucket_is_not(place, monkeypatch):
    aiohttp = pytest.importorskip("aiohttp")
    folder = workdir.open_path(place)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(jpeg(i))
    [images] = sources.open_sources(f"folder:{place}", ["all"])
    (folder / images.name_of(0)).unlink()
    with pytest.raises(BadImageError, match="cannot be read: it does not exist"):
        images.examples[0]
    (folder / images.name_of(1)).write_bytes(b"longer than the image was" * 1000)
    with pytest.raises(BadImageError, match="changed since the folder was scanned"):
        images.examples[1]

    def fail(*_):
        raise aiohttp.ClientConnectionError("cut")

    monkeypatch.setattr(bucket, "file_system", lambda: SimpleNamespace(cat_file=fail))
    with pytest.raises(bucket.BucketError, match="does not respond or fails"):
        images.examples[2]
    (folder / "a.tar").write_bytes(b"a tar, which must not be listed as damaged")
    with pytest.raises(bucket.BucketError):
        sources.open_sources(f"folder:{place}", ["all"])


def test_a_record_is_not_bad_because_its_bucket_fails(place, monkeypatch):
    class Failing:
        message = "Retry policy exhausted, with a last message of PerformWork()"

        def __getitem__(self, i):
            raise RuntimeError(self.message)

    records = sources.Records(Failing(), labeled=False, place=place)
    with pytest.raises(bucket.BucketError, match="gs://runs does not respond or fails"):
        records[0]
    Failing.message = "Corrupted chunk"
    with pytest.raises(BadImageError, match="its record cannot be read: Corrupted chunk"):
        records[0]
    records.place = "gs://gone/set"  # a bucket that was deleted meanwhile
    with pytest.raises(UserError, match="gs://gone does not exist"):
        records[0]


def test_batches_continue_after_a_pause_of_the_bucket_and_end_without_it(server, place, tmp_path):
    shutil.copytree(sources.BUILTIN["emoji"], tmp_path / "packed")
    tar(tmp_path / "tars" / "0.tar", {f"{i}.jpg": jpeg(i) for i in range(32)})
    with workdir.staged(place) as folder:
        shutil.copytree(tmp_path, folder, dirs_exist_ok=True)
    script = f"""
from mim_jax import data
from mim_jax.watchdog import Watchdog

names = "folder:{place}/tars", "tfds:{place}/packed"
sets = [data.make(name=name, size=16) for name in names]
streams = [x.training_batches(4, seed=0, start=0, stop=10**6) for x in sets]
with Watchdog(0.2) as watchdog:
    for number, _ in enumerate(watchdog.each("a batch", zip(*streams))):
        print(number, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(1) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def wait_for(number: int) -> None:
        assert any(line == f"{number}\n" for line in process.stdout)

    wait_for(3)
    server.send_signal(signal.SIGSTOP)
    try:
        time.sleep(2)
        server.send_signal(signal.SIGCONT)
        wait_for(40)  # far more than were read ahead
        server.send_signal(signal.SIGSTOP)
        _, errors = process.communicate(timeout=120)
    finally:
        server.send_signal(signal.SIGCONT)
        process.kill()
    assert process.returncode == 1
    [line] = [line for line in errors.splitlines() if line.startswith("failed: ")]
    assert "a batch has taken" in line
    assert "the storage of the data may be stuck" in line
    assert "Traceback" not in errors


# --- Checkpoints. ---


def test_a_corrupt_checkpoint_is_detected_and_set_aside(place, capsys):
    saved(place, 1, 2)
    folder = workdir.open_path(place) / "checkpoints"
    table = json.loads((folder / "2" / "digests.json").read_text())
    assert all(value.startswith("crc32c:") for value in table.values())
    name = next(name for name in table if name.startswith("state/d/"))
    content = bytearray((folder / "2" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "2" / name).write_bytes(bytes(content))
    checkpoints = Checkpoints(place, keep=9)
    assert checkpoints.latest == 1
    checkpoints.close()
    assert f"{name} has changed since it was written" in capsys.readouterr().err
    assert any(path.name.startswith("2.corrupt-") for path in folder.iterdir())
    assert load(place)[2]["step"] == 1


def test_checkpoints_can_be_copied_between_a_disk_and_a_bucket(place, tmp_path):
    saved(str(tmp_path / "run"), 1)
    with workdir.staged(place) as folder:
        shutil.copytree(tmp_path / "run", folder, dirs_exist_ok=True)
    params, _, metadata = load(place)
    assert metadata["step"] == 1
    assert params["layer"]["kernel"][0, 0] == 1
    saved(place, 2)  # a writer does not delete the copy
    copy = workdir.fetched(place)
    assert load(str(copy))[2]["step"] == 2
    assert files.steps_in(files.folder_of(str(copy))) == [1, 2]
    data = next((copy / "checkpoints" / "2" / "state" / "d").iterdir())
    data.write_bytes(data.read_bytes()[:-1])
    assert files.newest(files.folder_of(str(copy))) == 1


def test_a_bucket_that_stops_during_a_save_ends_the_run_with_one_sentence(server, place):
    script = f"""
import sys
from mim_jax.checkpoint import Checkpoints
from mim_jax.watchdog import Watchdog
from tests.test_bucket import state_of

checkpoints = Checkpoints({place!r}, keep=9, record=dict(config={{}}, trajectory={{}}))
checkpoints.save(state_of(1))
checkpoints.manager.wait_until_finished()
print("saved", flush=True)
sys.stdin.readline()
with Watchdog(0.05) as watchdog, watchdog.during("a save"):
    checkpoints.save(state_of(2))
    checkpoints.close()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(8) | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "saved\n"
    server.send_signal(signal.SIGSTOP)
    try:
        _, errors = process.communicate("\n", timeout=120)
    finally:
        server.send_signal(signal.SIGCONT)
    assert process.returncode == 1
    [line] = [line for line in errors.splitlines() if line.startswith("failed: ")]
    assert "the storage of the run directory may be stuck" in line
    assert "Traceback" not in errors
    checkpoints = Checkpoints(place, keep=9, record=dict(config={}, trajectory={}))
    assert checkpoints.latest == 1
    checkpoints.save(state_of(2))
    checkpoints.close()
    assert load(place)[2]["step"] == 2


# --- The lock. ---


def test_two_processes_cannot_use_one_run_directory(place, short_lease):
    folder = workdir.open_path(place) / "checkpoints"
    first = workdir.storage_of(folder).lock(folder)
    with pytest.raises(UserError, match=f"{place} is in use by process {os.getpid()} on "):
        workdir.storage_of(folder).lock(folder)
    first.check()
    assert workdir.is_locked(place)
    first.close()
    assert workdir.is_locked(place) is False
    workdir.storage_of(folder).lock(folder).close()


def test_a_lock_that_is_not_renewed_counts_as_released(place, short_lease):
    (workdir.open_path(place) / "checkpoints" / "lock").write_text("{}")
    for _ in range(600):
        if not workdir.is_locked(place):
            break
        time.sleep(0.1)
    assert workdir.is_locked(place) is False


def test_a_lock_that_is_not_renewed_is_taken_over(place, short_lease, capsys):
    folder = workdir.open_path(place) / "checkpoints"
    (folder / "lock").write_text(json.dumps({"name": "process 1 on another", "id": "1"}))
    lock = workdir.storage_of(folder).lock(folder)
    assert "is locked by process 1 on another: waiting" in capsys.readouterr().out
    lock.check()
    lock.close()


def test_the_lock_of_a_process_that_was_killed_here_is_taken_over_at_once(place, capsys):
    folder = workdir.open_path(place) / "checkpoints"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    holder = {"name": "killed", "id": "1", "machine": bucket.machine(), "process": ended.pid}
    (folder / "lock").write_text(json.dumps(holder))
    workdir.storage_of(folder).lock(folder).close()
    assert "waiting" not in capsys.readouterr().out


def test_a_process_that_lost_its_lock_does_not_save(place, short_lease):
    checkpoints = Checkpoints(place, keep=9, record=dict(config={}, trajectory={}))
    checkpoints.lock.blob.upload_from_string("{}")  # as a process that takes it over would do
    checkpoints.lock.thread.join(60)
    with pytest.raises(UserError, match="was taken over by another process"):
        checkpoints.save(state_of(1))
    checkpoints.close()
    assert not files.has_checkpoints(place)


# --- Failures. ---


@pytest.mark.parametrize(
    "url, sentence",
    [
        ("s3://bucket/run", "only buckets of Google Cloud Storage"),
        ("gs://runs/[a]", "without any of"),
        ("gs://missing/run", "gs://missing does not exist"),
        ("gs://runs/nothing", "gs://runs/nothing does not exist"),
    ],
)
def test_mistakes_are_one_sentence(server, url, sentence, capsys):
    assert inspect.main([url]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_a_bucket_that_does_not_respond_is_reported(monkeypatch, server, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setattr(bucket, "TIMEOUT", 2.0)
    bucket.client.cache_clear()
    try:
        assert inspect.main(["gs://silent/run"]) == 1
    finally:
        bucket.client.cache_clear()
    error = capsys.readouterr().err
    assert error.startswith("failed: gs://silent does not respond or fails")
    assert len(error.splitlines()) == 1


def test_errors_of_a_forbidden_bucket_name_the_roles(server):
    exceptions = pytest.importorskip("google.api_core.exceptions")
    for error in (exceptions.Forbidden("no access"), exceptions.Unauthorized("who")):
        denied = pytest.raises(UserError, match=r"gs://b is denied: .* Storage Object User")
        with denied, bucket.failures("gs://b"):
            raise error
    with pytest.raises(ZeroDivisionError), bucket.failures():
        math.log(1 / 0)


def test_lines_survive_a_failed_upload(capsys):
    uploaded = []

    class Blob:
        works = False

        def upload_from_string(self, text, *_, **__):
            if not self.works:
                raise bucket.BucketError("the bucket does not respond.")
            uploaded.append(text)

    lines = bucket.UploadedLines(Blob(), "metrics-00000-000.jsonl")
    lines.append({"step": 1})
    lines.flush()
    assert "metrics-00000-000.jsonl could not be uploaded (BucketError)" in capsys.readouterr().err
    Blob.works = True
    lines.append({"step": 2})
    lines.flush()
    lines.flush()
    assert uploaded == ['{"step": 1}\n{"step": 2}\n']


def test_checksums_are_those_of_the_bucket(server):
    path = workdir.open_path("gs://runs/checksums/file")
    content = np.random.default_rng(0).bytes(3_000_000)
    path.write_bytes(content)
    table = workdir.storage_of(path).checksums(path.parent, "crc32c", but=())
    assert table == {"file": bucket.checksum_of(io.BytesIO(content), "crc32c")}


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    bucket.client.cache_clear()
    bucket.check_access_once.cache_clear()
    try:
        assert inspect.main(["gs://runs/run"]) == 2
    finally:
        bucket.client.cache_clear()
    assert "pip install 'mim-jax[gcs]'" in capsys.readouterr().err
