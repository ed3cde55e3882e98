"""Where arrays live and gradients meet: the mesh, the one rule that places arrays on it.

A mesh has two axes. Rows of a batch lie over both. The devices along `fsdp` share one copy of the
state, each keeping a part (FSDP, ZeRO 3); along `data` copies are repeated.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mim_jax import UserError

AXES = ("data", "fsdp")


def make_mesh(devices: list | None = None, *, fsdp: int = 1) -> Mesh:
    """All devices of all processes, `fsdp` of them to a copy of the state; 0: all of a slice.

    No copy spans two TPU slices: the network between them is slow.
    """
    devices = jax.devices() if devices is None else devices
    slices = {}
    for device in devices:
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(index, []).append(device)
    in_slice = len(devices) // len(slices)
    fsdp = fsdp or in_slice
    if fsdp < 0 or in_slice % fsdp:
        of = f" of each of the {len(slices)} slices" if len(slices) > 1 else ""
        raise UserError(
            f"fsdp = {fsdp} does not divide the {in_slice} devices{of}: make it a divisor, "
            "or 0 for all of them."
        )
    shape = (in_slice // fsdp, fsdp)
    grids = [
        mesh_utils.create_device_mesh(shape, each, allow_split_physical_axes=True)
        for each in slices.values()
    ]
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * 2)


def by_row(mesh: Mesh) -> NamedSharding:
    """Batches: each device holds its rows."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Each device holds a copy."""
    return NamedSharding(mesh, P())


def split(x: jax.Array | jax.ShapeDtypeStruct, mesh: Mesh) -> P:
    """The rule: matrices are split along the first side that `fsdp` divides, vectors are copied."""
    sides = [i for i, side in enumerate(x.shape) if side % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] == 1 or not sides or sum(side > 1 for side in x.shape) < 2:
        return P()
    return P(*[None] * sides[0], "fsdp")


def place(tree, mesh: Mesh):
    """The state, or a part of it: the sharding of each array, by the rule."""
    return jax.tree.map(lambda x: NamedSharding(mesh, split(x, mesh)), tree)


def over_devices(gradient: Callable, mesh: Mesh, accumulate: int) -> Callable:
    """Of `gradient(params, buffers, rows) -> grads, (sums, changed)`, the same over all rows.

    Each device gathers the parameters and takes its own rows, in `accumulate` parts in turn; then
    devices meet, once: gradients and sums are added, changed buffers averaged. XLA is not left to
    find this: it would gather activations, and add up gradients after every part. Parameters
    and gradients outside are placed by the rule. On a TPU it does gather each parameter where it is
    used, in the type that it is used in, and once a step. To gather it again for the gradient, by a
    checkpoint policy around the loss, took 1.8 times the memory (ViT-H of 8 blocks, v5e): of all
    else that is then kept.
    """
    wide = [axis for axis in AXES if mesh.shape[axis] > 1]

    def gather(x, spec):
        for side, axis in enumerate(spec):
            if axis:
                x = jax.lax.all_gather(x, axis, axis=side, tiled=True)
        return x

    def add_up(x, spec):
        for side, axis in enumerate(spec):
            if axis:
                x = jax.lax.psum_scatter(x, axis, scatter_dimension=side, tiled=True)
        return jax.lax.psum(x, tuple(axis for axis in wide if axis not in tuple(spec)))

    def call(params, buffers, batch):
        specs = jax.tree.map(lambda x: split(x, mesh), params)

        def on_a_device(params, buffers, rows):
            grads, (sums, changed) = in_parts(gradient, accumulate)(
                jax.tree.map(gather, params, specs), buffers, rows
            )
            sums, changed = jax.lax.psum(sums, wide), jax.lax.pmean(changed, wide)
            return jax.tree.map(add_up, grads, specs), (sums, changed)

        here = dict(mesh=mesh, in_specs=(specs, P(), P(AXES)), out_specs=(specs, P()))
        return jax.shard_map(on_a_device, **here, check_vma=False)(params, buffers, batch)

    return call


def in_parts(gradient: Callable, parts: int) -> Callable:
    """The same gradient, in less memory: of one part of the rows after the other.

    What a part makes of the buffers is averaged, as over devices: so a buffer that moves by a mean
    over rows moves alike with any parts.
    """
    if parts == 1:
        return gradient

    def call(params, buffers, rows):
        def add(totals, part):
            return jax.tree.map(jnp.add, totals, gradient(params, buffers, part)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, buffers, rows))
        rows = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
        (grads, (sums, changed)), _ = jax.lax.scan(add, zeros, rows)
        return grads, (sums, jax.tree.map(lambda x: x / parts, changed))

    return call


def whole(tree, mesh: Mesh):
    """Arrays that were placed by the rule, gathered: a copy on each device."""
    return jax.device_put(tree, replicated(mesh))


def to_global(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of a batch (host arrays) -> global arrays over all devices."""
    sharding = by_row(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
