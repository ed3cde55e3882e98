"""Meshes, and the collectives of the compiled step."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mim_jax import UserError
from mim_jax.plan.compiled import collectives
from mim_jax.sharding import by_row, line_length, make_mesh, scatter
from mim_jax.train import jit_step, train
from tests.tiny_run import EXAMPLE, OBJECTIVE, OPTIMIZER, batches_from, start


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
    with pytest.raises(
        UserError, match="fsdp = 3 does not divide the 8 devices: set it to a divisor"
    ):
        make_mesh(fsdp=3)


@pytest.mark.parametrize("line", [2, 4, 8])
def test_scatters_over_lines_give_every_device_its_part(line):
    x = np.random.default_rng(0).normal(size=(8, 16, 3))
    mesh = make_mesh(fsdp=8)
    add = jax.shard_map(
        lambda x: scatter(x[0], 0, 8, line),
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    np.testing.assert_allclose(jax.jit(add)(x), x.sum(0), atol=1e-5)


@pytest.mark.parametrize(
    ("places", "length"),
    [
        ([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)], 4),
        ([(0, 0), (0, 1), (1, 0), (1, 1)], 2),
        ([(0, 0), (1, 0), (2, 0), (3, 0)], 4),
        ([(0, 0), (0, 1), (1, 0)], 3),  # two do not divide three
        ([(), (), ()], 3),  # no TPUs
    ],
)
def test_line_length(places, length):
    mesh = SimpleNamespace(devices=[[SimpleNamespace(coords=place) for place in places]])
    assert line_length(mesh) == length
