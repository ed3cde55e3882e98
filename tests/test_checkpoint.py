"""Checkpoints: exact restarts, on other devices too; corrupt files are never restored."""

import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath

from mim_jax import UserError
from mim_jax.checkpoint import Checkpoints
from mim_jax.checkpoint.files import digests, find_fault, newest
from mim_jax.checkpoint.saved import load
from mim_jax.checkpoint.trees import abstract
from mim_jax.sharding import make_mesh, replicated
from mim_jax.train import train
from tests.tiny_run import OBJECTIVE, OPTIMIZER, STEPS, batches_from, numbers, run, start


@pytest.fixture(scope="module")
def reference():
    return run(1)


def save_after(last, mesh, folder):
    """A run that saves after step `last` and gets no further."""
    checkpoints = Checkpoints(folder, keep=1)
    steps = train(
        OBJECTIVE, OPTIMIZER, batches_from, state=start(mesh), mesh=mesh, steps=STEPS, seed=0
    )
    for step, state, _ in steps:
        if step == last:
            checkpoints.save(state)
            break
    checkpoints.close()


def test_a_restart_is_exact(reference, tmp_path):
    """Killed after step 3 and restored in memory that knows nothing: the last bit is the same."""
    mesh = make_mesh(jax.devices()[:1])
    like = jax.tree.map(abstract, start(mesh, seed=1))
    save_after(3, mesh, tmp_path)
    again = run(1, state=Checkpoints(tmp_path, keep=1).restore(like))
    assert [row[0] for row in again] == [4, 5]
    assert (numbers(again) == numbers(reference)[3:]).all()
    same = jax.tree.map(lambda a, b: (a == b).all(), again[-1][1], reference[-1][1])
    assert all(jax.tree.leaves(same))


def test_a_checkpoint_moves_to_other_devices(reference, tmp_path):
    mesh = make_mesh(jax.devices()[:8])
    save_after(2, mesh, tmp_path)
    two = replicated(make_mesh(jax.devices()[:2]))
    like = jax.tree.map(lambda x: abstract(x, two), start(mesh))
    again = run(2, state=Checkpoints(tmp_path, keep=1).restore(like))
    np.testing.assert_allclose(numbers(again), numbers(reference)[2:], rtol=1e-5)


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = start(make_mesh(jax.devices()[:1]))
    for step in range(4):
        checkpoints.save(state._replace(step=jnp.int32(step)))
    checkpoints.close()
    steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert steps == ["2", "3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=2, record={"config": {"seed": 7}})
    state = start(make_mesh(fsdp=8))
    for step in (1, 2):
        checkpoints.save(state._replace(step=jnp.int32(step)))
    checkpoints.close()
    return folder


def test_a_checkpoint_describes_itself(saved):
    metadata = json.loads((saved / "checkpoints" / "2" / "metadata" / "metadata").read_text())
    assert metadata["config"] == {"seed": 7}
    assert metadata["parts"]["params"]["encoder/block_0/qkv/kernel"] == [16, 48]
    assert metadata["skips"] == []


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def cut(path, rng):
    os.truncate(path, rng.integers(path.stat().st_size))


@pytest.mark.parametrize("harm", [flip, cut, lambda path, rng: path.unlink()])
def test_a_corrupt_file_is_never_restored(saved, harm, tmp_path, capsys):
    """One bit of any file of the newest checkpoint, or more: the one before is used, unharmed."""
    folder, rng = tmp_path / "checkpoints", np.random.default_rng(0)
    harmed = 0
    for path in sorted((saved / "checkpoints" / "2").rglob("*")):
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
            harm(tmp_path / path.relative_to(saved), rng)
            assert newest(folder) == 1
            harmed += 1
    assert harmed > 8
    capsys.readouterr()
    state = start(make_mesh())
    restored = Checkpoints(tmp_path, keep=2).restore(jax.tree.map(abstract, state))
    assert restored.step == 1
    same = jax.tree.map(lambda a, b: (a == b).all(), restored.params, state.params)
    assert all(jax.tree.leaves(same))
    assert f"checkpoint 2 in {folder} is corrupt: " in capsys.readouterr().err
    assert len(list(folder.glob("2.corrupt-*"))) == 1
    harm(folder / "1" / "digests.json", rng)
    with pytest.raises(UserError, match="is corrupt: delete the folder to start from step 0"):
        Checkpoints(tmp_path, keep=2)


def test_files_that_orbax_writes_last_may_be_lost(saved, tmp_path):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
        cut(tmp_path / "checkpoints" / "2" / name, np.random.default_rng(0))
        checkpoints = Checkpoints(tmp_path, keep=2)
        assert checkpoints.restore(jax.tree.map(abstract, start(make_mesh()))).step == 2
        checkpoints.close()


def test_two_runs_do_not_share_a_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*: wait until"):
        Checkpoints(tmp_path, keep=1)
    checkpoints.close()
    Checkpoints(tmp_path, keep=1).close()


@pytest.mark.parametrize("name", ["lr=1e-3 [seed 1]", "a*b?", "~"])
def test_names_with_wildcards(name, tmp_path):
    """Orbax expands wildcards of paths: it saved no arrays there, and reported success."""
    state = start(make_mesh(jax.devices()[:1]))
    checkpoints = Checkpoints(str(tmp_path / name), keep=1)
    checkpoints.save(state._replace(step=jnp.int32(1)))
    checkpoints.close()
    checkpoints = Checkpoints(str(tmp_path / name), keep=1)
    restored = checkpoints.restore(jax.tree.map(abstract, state))
    checkpoints.close()
    same = jax.tree.map(lambda a, b: (a == b).all(), restored.params, state.params)
    assert all(jax.tree.leaves(same))


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    """A file system that loses what is written is noticed at the first save."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = start(make_mesh(jax.devices()[:1]))
    finish = checkpoints.manager.wait_until_finished

    def lose():
        finish()
        for path in (tmp_path / "checkpoints" / "1" / "state").rglob("d/*"):
            path.unlink()

    monkeypatch.setattr(checkpoints.manager, "wait_until_finished", lose)
    with pytest.raises(UserError, match=r"step 1 in .* cannot be read back"):
        checkpoints.save(state._replace(step=jnp.int32(1)))


def resave(folder, change):
    """Replaces the arrays of the newest checkpoint, as the author of a hostile run may do."""
    step = folder / "checkpoints" / "2"
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.restore(step / "state")
    shutil.rmtree(step / "state")
    checkpointer.save(step / "state", change(tree) or tree)
    resign(folder)


def resign(folder):
    step = epath.Path(folder / "checkpoints" / "2")
    (step / "digests.json").write_text(json.dumps(digests(step, "sha256")))


def replaced(value):
    """A function that replaces the bias of the patch embedding in a tree of arrays."""
    return lambda tree: tree["params"]["encoder"]["embed"].update(bias=value)


ARRAYS = {
    "missing": lambda tree: tree["params"]["encoder"].pop("embed"),
    "a list": replaced([np.zeros(2), np.zeros(3)]),
    "another shape": replaced(np.zeros((4, 4), np.float32)),
    "complex": replaced(np.zeros(16, np.complex64)),
    "integers": replaced(np.zeros(16, np.int32)),
    "text": replaced("text"),
    "one array": lambda tree: tree | {"params": np.zeros(3, np.float32)},
    "no optimizer": lambda tree: tree.pop("opt_state"),
    "another step": lambda tree: tree.update(step=np.int32(77)),
    "no step": lambda tree: tree.pop("step"),
}


@pytest.fixture
def hostile(saved, tmp_path):
    """A copy of a run, with only the checkpoint 2."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    return tmp_path


def restored(folder):
    """Restores the newest state of a run as training does."""
    checkpoints = Checkpoints(folder, keep=2)
    try:
        return checkpoints.restore(jax.tree.map(abstract, start(make_mesh())))
    finally:
        checkpoints.close()


@pytest.mark.parametrize("case", ARRAYS)
def test_other_arrays_are_refused(hostile, case):
    """Orbax would convert complex numbers, and leave missing arrays out."""
    resave(hostile, ARRAYS[case])
    with pytest.raises(UserError, match=r"checkpoint 2 in .* (is of a different|cannot be read)"):
        restored(hostile)


@pytest.mark.parametrize("case", ["a list", "complex", "text", "one array"])
def test_weights_of_other_types_are_refused(hostile, case):
    resave(hostile, ARRAYS[case])
    with pytest.raises(UserError, match=r"checkpoint 2 in .* cannot be read: "):
        load(hostile)


@pytest.mark.parametrize("key", ["shape", "chunks"])
def test_huge_arrays_in_small_files_are_refused(hostile, key):
    """Before memory is allocated: tensorstore would abort the process."""
    state = hostile / "checkpoints" / "2" / "state"
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}).result()
    name = b"params.encoder.embed.bias/.zarray"
    store[name] = json.dumps(json.loads(store[name]) | {key: [10**12]}).encode()
    resign(hostile)
    with pytest.raises(UserError, match=r"parts that are larger|more than its files can hold"):
        load(hostile)
    with pytest.raises(UserError, match=r"parts that are larger|different network"):
        restored(hostile)


METADATA = {
    "metadata/metadata": ['{"skips": [1]}', '{"largest": {"a": 1}}', '{"unfinished": 3}', "[]"],
    "state/_METADATA": ["[]", "{", "[" * 100_000, '{"tree_metadata": {}}'],
    "_CHECKPOINT_METADATA": ['{"item_handlers": 3}', "[]"],
}


@pytest.mark.parametrize(("name", "text"), [(k, x) for k, texts in METADATA.items() for x in texts])
def test_malformed_metadata_are_refused(hostile, name, text):
    (hostile / "checkpoints" / "2" / name).write_text(text)
    resign(hostile)
    with pytest.raises(UserError, match="cannot be read: "):
        restored(hostile)


UNUSUAL = {
    "a pipe": (os.mkfifo, "is not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
    "a folder elsewhere": (lambda path: path.symlink_to("/"), "is not a file"),
    "a long file": (lambda path: path.write_bytes(bytes(2**24 + 1)), "is longer than 16 MiB"),
}


@pytest.mark.parametrize("case", UNUSUAL)
@pytest.mark.parametrize("name", ["state/_METADATA", "_CHECKPOINT_METADATA", "digests.json"])
def test_files_that_may_not_end_are_not_read(hostile, case, name):
    create, reason = UNUSUAL[case]
    path = hostile / "checkpoints" / "2" / name
    path.unlink()
    create(path)
    assert find_fault(epath.Path(path.parents[len(name.split("/")) - 1])) == f"{name} {reason}"
    with pytest.raises(UserError, match=r"every checkpoint in .* is corrupt"):
        newest(hostile / "checkpoints")


def test_arrays_that_are_longer_than_the_disk_are_not_read(hostile, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=1))
    reason = find_fault(epath.Path(hostile / "checkpoints" / "2"))
    assert reason.endswith(" is longer than the disk")


@pytest.mark.parametrize("name", ["007", "9" * 30, str(2**31), "5²", "a_9", "9.5"])
def test_folders_with_other_names_are_not_checkpoints(hostile, name):
    shutil.copytree(hostile / "checkpoints" / "2", hostile / "checkpoints" / name)
    assert newest(epath.Path(hostile / "checkpoints")) == 2
    assert restored(hostile).step == 2
