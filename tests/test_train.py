"""The loop: the same run on any devices, in any parts, after any stop."""

import dataclasses
import functools
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.pod import collectives
from mim_jax import UserError, optim
from mim_jax.checkpoint import Checkpoints, abstract, newest
from mim_jax.models.vit import vit
from mim_jax.objectives import Objective, mae, per_example
from mim_jax.sharding import by_row, make_mesh, place, replicated
from mim_jax.train import evaluate, initialize, jit_step, train

SIZE, ROWS = 16, 16
EXAMPLE = {
    "image": jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8),
    "index": jax.ShapeDtypeStruct((1,), jnp.int32),
}
STEPS = 5
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)
OBJECTIVE = mae.objective(vit(width=16, depth=1, heads=2, patch=4), **DECODER)
OPTIMIZER = optim.adamw(
    optim.warmup_and_decay(1e-2, min_lr=0.0, warmup_steps=1, steps=STEPS, code="mae")
)


def batches_from(step):
    for i in range(step, STEPS):
        images = np.random.default_rng(i).integers(0, 256, (ROWS, SIZE, SIZE, 3), np.uint8)
        yield {"image": images, "index": np.arange(ROWS, dtype=np.int32)}


def start(mesh, objective=OBJECTIVE, seed=0):
    begin = functools.partial(initialize, objective, OPTIMIZER, EXAMPLE, seed)
    return jax.jit(begin, out_shardings=place(jax.eval_shape(begin), mesh))()


def run(devices=1, *, fsdp=1, state=None, accumulate=1, objective=OBJECTIVE, batches=batches_from):
    """-> [(step, state on the host, loss, gradient's norm), ...]"""
    mesh = make_mesh(jax.devices()[:devices], fsdp=fsdp)
    state = start(mesh, objective) if state is None else state
    steps = train(
        objective, OPTIMIZER, batches, state=state, mesh=mesh, steps=STEPS, seed=0,
        accumulate=accumulate,
    )  # fmt: skip
    return [
        (step, jax.device_get(state), float(metrics["loss"]), float(metrics["grad_norm"]))
        for step, state, metrics in steps
    ]


@pytest.fixture(scope="module")
def reference():
    return run(1)


def numbers(history):
    return np.array([row[2:] for row in history])


def test_the_loss_falls(reference):
    assert [row[0] for row in reference] == [1, 2, 3, 4, 5]
    losses = numbers(reference)[:, 0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("devices", "fsdp", "accumulate"),
    [(2, 1, 1), (8, 1, 1), (1, 1, 4), (2, 1, 8), (8, 1, 2), (8, 8, 1), (8, 4, 2)],
)
def test_devices_and_parts_change_nothing(reference, devices, fsdp, accumulate):
    other = run(devices, fsdp=fsdp, accumulate=accumulate)
    np.testing.assert_allclose(numbers(other), numbers(reference), rtol=1e-5)


def compiled(mesh, accumulate):
    """The compiled step as text."""
    state = start(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((64, *x.shape[1:]), x.dtype, sharding=by_row(mesh))
        for name, x in EXAMPLE.items()
    }
    step = jit_step(OBJECTIVE, OPTIMIZER, state, mesh=mesh, accumulate=accumulate)
    return step.lower(state, batch, jax.random.key(0)).compile().as_text()


def entry(text):
    """What a program does once, in no loop."""
    return text[text.index("\nENTRY ") :]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_leave_a_device_once_a_step(accumulate):
    """The compiled step has one collective, an all-reduce, and not in the loop over the parts."""
    text = compiled(make_mesh(), accumulate)
    assert set(collectives(text)) == {"all-reduce f32"}
    assert text.count(" all-reduce(") == entry(text).count(" all-reduce(") == 1


@pytest.mark.parametrize(("fsdp", "accumulate"), [(8, 1), (8, 4), (4, 1)])
def test_fsdp_moves_what_theory_says(fsdp, accumulate):
    """Parameters gathered at most twice, gradients scattered once, nothing in the loop."""
    mesh = make_mesh(fsdp=fsdp)
    text = compiled(mesh, accumulate)
    total = sum(x.nbytes for x in jax.tree.leaves(start(mesh).params))
    moved = {kind: size for kind, (_, size) in collectives(text).items()}
    assert set(moved) == {"all-gather f32", "reduce-scatter f32", "all-reduce f32"}
    assert 0.9 * total < moved["all-gather f32"] < 1.1 * 2 * total
    assert 0.9 * total < moved["reduce-scatter f32"] < 1.1 * total
    copies = 8 // fsdp  # a device's part of the gradient is added over these; and vectors, sums
    assert moved["all-reduce f32"] < (0.1 + (copies > 1) / fsdp) * total
    assert collectives(entry(text)) == collectives(text)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_fsdp_gathers_no_activations(accumulate):
    """All that is gathered has the shape of a parameter: activations would be few bytes here."""
    mesh = make_mesh(fsdp=8)
    gathered = re.findall(r" = (.*?) all-gather(?:-done)?\(", compiled(mesh, accumulate))
    shapes = {sides for result in gathered for sides in re.findall(r"\[([\d,]+)\]", result)}
    params = jax.tree.leaves(start(mesh).params)
    assert shapes
    assert shapes <= {",".join(map(str, x.shape)) for x in params}


@pytest.mark.parametrize("fsdp", [2, 8])
def test_fsdp_splits_the_state(fsdp):
    """Each device holds its share of the parameters and of the optimizer's moments."""
    mesh = make_mesh(fsdp=fsdp)
    state = start(mesh)
    for _, after, _ in train(
        OBJECTIVE, OPTIMIZER, batches_from, state=state, mesh=mesh, steps=1, seed=0
    ):
        for tree in (after.params, after.opt_state):
            leaves = jax.tree.leaves(tree)
            here = sum(x.addressable_data(0).nbytes for x in leaves)
            whole = sum(x.nbytes for x in leaves)
            assert here < whole / fsdp + 0.1 * whole  # vectors are copied


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the mesh asks of a TPU's device."""

    id: int
    slice_index: int
    coords: tuple
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "imagined"
    process_index: int = 0


def test_copies_do_not_span_slices():
    chips = [Chip(i, i // 4, (i % 2, i // 2 % 2, 0)) for i in range(8)]
    for fsdp, shape in ((0, (2, 4)), (2, (4, 2)), (1, (8, 1))):
        devices = make_mesh(chips, fsdp=fsdp).devices
        assert devices.shape == shape
        assert all(len({chip.slice_index for chip in copy}) == 1 for copy in devices)
    slice_of_4_by_4 = [Chip(i, 0, (i % 4, i // 4, 0)) for i in range(16)]
    assert make_mesh(slice_of_4_by_4, fsdp=8).devices.shape == (2, 8)
    with pytest.raises(UserError, match="fsdp = 8 does not divide the 4 devices of each of the 2"):
        make_mesh(chips, fsdp=8)
    with pytest.raises(UserError, match="fsdp = 3 does not divide the 8 devices: make it"):
        make_mesh(fsdp=3)


def test_every_step_draws_new_masks():
    """The same images in every batch and a step of length zero: only the masks differ."""

    def loss(params, buffers, batch, rng, step):
        total, _, rest = OBJECTIVE.loss(params, buffers, batch, rng, step)
        return total * 0 + jax.random.uniform(per_example(rng, batch["index"])[3]), 1, rest

    def same_batches(step):
        yield from [next(batches_from(0))] * (STEPS - step)

    seen = numbers(run(objective=OBJECTIVE._replace(loss=loss), batches=same_batches))[:, 0]
    assert len(set(seen.tolist())) == STEPS


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
    checkpoints = Checkpoints(folder, keep=2, about={"config": {"seed": 7}})
    state = start(make_mesh(fsdp=8))
    for step in (1, 2):
        checkpoints.save(state._replace(step=jnp.int32(step)))
    checkpoints.close()
    return folder


def test_a_checkpoint_says_what_it_is(saved):
    about = json.loads((saved / "checkpoints" / "2" / "metadata" / "metadata").read_text())
    assert about["config"] == {"seed": 7}
    assert about["parts"]["params"]["encoder/block_0/qkv/kernel"] == [16, 48]
    assert about["skips"] == []


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def cut(path, rng):
    os.truncate(path, rng.integers(path.stat().st_size))


@pytest.mark.parametrize("harm", [flip, cut, lambda path, rng: path.unlink()])
def test_a_harmed_file_is_never_restored(saved, harm, tmp_path, capsys):
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
    assert f"checkpoint 2 in {folder} is broken: " in capsys.readouterr().err
    assert len(list(folder.glob("2.broken-*"))) == 1
    harm(folder / "1" / "digests.json", rng)
    with pytest.raises(UserError, match="is as it was written: remove it to begin anew"):
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
    with pytest.raises(
        UserError, match=rf"is in use, by process {os.getpid()} on .*: wait or stop"
    ):
        Checkpoints(tmp_path, keep=1)
    checkpoints.close()
    Checkpoints(tmp_path, keep=1).close()


@pytest.mark.parametrize(("devices", "rows"), [(1, 7), (2, 8), (8, 16)])
def test_evaluation_counts_each_example_once(devices, rows):
    """13 examples in batches of any size: the mean is over 13, and padding of NaN never counts."""
    values = np.arange(13, dtype=np.float32)

    def batches():
        for first in range(0, 13, rows):
            index = np.arange(first, first + rows)
            value = np.where(index < 13, values[np.minimum(index, 12)], np.nan)
            yield {"value": value.astype(np.float32), "valid": (index < 13).astype(np.float32)}

    def measure(params, buffers, batch, rng):
        return {"mean": batch["value"], "pair": jnp.stack([batch["value"], 2 * batch["value"]], 1)}

    objective = Objective(None, None, measure, None, lambda means: means | {"more": 1.0})
    mesh = make_mesh(jax.devices()[:devices])
    state = start(mesh)
    means = evaluate(objective, state, batches(), mesh=mesh, seed=0)
    assert means["mean"] == 6.0
    assert means["pair"].tolist() == [6.0, 12.0]
    assert means["more"] == 1.0


# --- How to step. ---


def test_learning_rates_are_the_recipes():
    """The golden values of the reference at 312 steps an epoch, 800 epochs, 40 of warm-up."""
    schedule = optim.warmup_and_decay(
        2.4e-3, min_lr=0.0, warmup_steps=40 * 312, steps=800 * 312, code="mae"
    )
    with jax.enable_x64(True):
        for epoch, lr in {
            0: 0.0,
            0.5: 3e-5,
            20: 0.0012,
            40: 0.0024,
            41: 0.002399989748,
            100: 0.002363280319,
            400: 0.001299095215,
            420: 0.0012,
            799: 1.0252344e-8,
        }.items():
            assert float(schedule(jnp.float64(epoch * 312))) == pytest.approx(lr, rel=1e-6)
    with pytest.raises(UserError, match="must end before"):
        optim.warmup_and_decay(1.0, min_lr=0.0, warmup_steps=5, steps=5, code="mae")


def test_schedule_of_mmsegmentation():
    """mmcv's policy "poly" with power 1 and linear warm-up, but for a ratio of 1e-6 at step 0."""
    lr, least, warmup, steps = 7e-4, 1e-6, 1500, 160_000
    schedule = optim.warmup_and_decay(
        lr, min_lr=least, warmup_steps=warmup, steps=steps, code="mmseg"
    )
    for step in (0, 1, 750, 1499, 1500, 80_000, 159_999):
        regular = (lr - least) * (1 - step / steps) + least
        expected = regular * (1 - (1 - step / warmup) * (1 - 1e-6)) if step < warmup else regular
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    constant = optim.warmup_and_decay(lr, min_lr=lr, warmup_steps=0, steps=9, code="mmseg")
    assert float(constant(0)) == float(constant(8)) == pytest.approx(lr)


def test_learning_rates_are_beit_s():
    """The golden values of the reference's table: 100 steps, 20 of warm-up."""
    schedule = optim.warmup_and_decay(1.5e-3, min_lr=1e-5, warmup_steps=20, steps=100, code="beit")
    golden = {0: 0.0, 1: 7.8947e-5, 19: 0.0015, 20: 0.0015, 21: 0.00149943, 99: 1.05744e-5}
    for step, lr in golden.items():
        assert float(schedule(step)) == pytest.approx(lr, rel=1e-5)


def test_what_decays():
    """ViT-B: of the reference's 252 trainable tensors 85 decay, class and mask token among them."""
    objective = mae.objective(vit(size="B"))
    example = {
        "image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8),
        "index": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    params, _ = jax.eval_shape(objective.init, jax.random.key(0), example)
    decays = optim.matrices(params)
    counts = np.unique(jax.tree.leaves(decays), return_counts=True)[1].tolist()
    assert counts == [167, 85]
    assert decays["encoder"]["cls_token"]
    assert decays["decoder"]["mask_token"]
    assert not decays["encoder"]["norm"]["scale"]


def test_adamw_decays_by_the_learning_rate():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = optim.adamw(lambda step: 0.1, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert jnp.allclose(new["kernel"], 1 - 0.1 * 0.5)
    assert (new["bias"] == 1).all()


def test_named_matrices_do_not_decay():
    params = {"encoder": {"cls_token": jnp.ones((1, 1, 4)), "kernel": jnp.ones((4, 4))}}
    decays = optim.matrices(params, but=("cls_token", "positions"))
    assert decays == {"encoder": {"cls_token": False, "kernel": True}}


def test_the_average_follows_the_parameters_and_is_what_is_evaluated():
    mesh = make_mesh(jax.devices()[:1])
    begin = functools.partial(initialize, OBJECTIVE, OPTIMIZER, EXAMPLE, 0, True)
    state = jax.jit(begin, out_shardings=place(jax.eval_shape(begin), mesh))()
    expected = jax.device_get(state.params)
    steps = train(
        OBJECTIVE, OPTIMIZER, batches_from, state=state, mesh=mesh, steps=STEPS, seed=0, ema=0.9
    )
    for _, after, _ in steps:
        now = jax.device_get(after.params)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, now)
        state = jax.device_get(after)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7),
        state.ema,
        expected,
    )
    assert state.averaged is state.ema
    batch = dict(next(iter(batches_from(0))), mask=np.ones(ROWS, np.float32))
    whole = evaluate(OBJECTIVE, state, [batch], mesh=mesh, seed=0)
    plain = evaluate(OBJECTIVE, state._replace(ema=None), [batch], mesh=mesh, seed=0)
    assert whole["loss"] != plain["loss"]
