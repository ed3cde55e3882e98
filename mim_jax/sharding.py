"""The device mesh, the rule that shards arrays over it, and the reduction of gradients.

A mesh has two axes. The rows of a batch are split over both. The devices along `fsdp` share one
copy of the state, each holding a part (FSDP, ZeRO 3); along `data` the state is replicated.
"""

import functools
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
    """Returns a mesh in which `fsdp` devices share a copy of the state; 0: all of a slice.

    No copy spans two TPU slices, because the network between them is slow.

    Raises:
        UserError: if `fsdp` does not divide the devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(x, "slice_index", 0) for x in devices if x.platform == "tpu"}) or 1
    in_slice = len(devices) // slices
    fsdp = fsdp or in_slice
    if fsdp < 0 or in_slice % fsdp:
        of = f" of each of the {slices} slices" if slices > 1 else ""
        raise UserError(
            f"fsdp = {fsdp} does not divide the {in_slice} devices{of}: set it to a divisor, or to "
            "0 for all of them."
        )
    shape = (in_slice // fsdp, fsdp)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, (slices, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    rows = [sorted(row, key=coordinates) for row in grid]
    return Mesh(np.array(rows), AXES, axis_types=(AxisType.Auto,) * 2)


def coordinates(device: jax.Device) -> tuple[int, ...]:
    """Returns the coordinates of a TPU in its slice; () for other devices."""
    return tuple(getattr(device, "coords", None) or ())


def line_length(mesh: Mesh) -> int:
    """Returns the number of consecutive devices along `fsdp` that are on one line of a TPU slice.

    For other devices, or if the lines do not divide the axis evenly, it is the length of the axis.
    """
    first, *others = (coordinates(device) for device in mesh.devices[0])
    count, directions = 1, set()
    for other in others:
        directions |= {
            i for i, pair in enumerate(zip(first, other, strict=True)) if len({*pair}) > 1
        }
        if len(directions) > 1:
            break
        count += 1
    return count if len(mesh.devices[0]) % count == 0 else len(mesh.devices[0])


def scatter(x: jax.Array, side: int, count: int, line: int) -> jax.Array:
    """Reduce-scatters x along axis `side` over the `count` devices along `fsdp`.

    If the devices are on several lines, x is scattered across the lines and then along them: the
    TPU compiler turns a single scatter over 16 chips on two axes into an all-reduce of the array.
    """
    options = dict(scatter_dimension=side, tiled=True)
    if line == count:
        return jax.lax.psum_scatter(x, "fsdp", **options)
    across = [list(range(i, count, line)) for i in range(line)]
    along = [list(range(i, i + line)) for i in range(0, count, line)]
    for groups in (across, along):
        x = jax.lax.psum_scatter(x, "fsdp", axis_index_groups=groups, **options)
    return x


def by_row(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches, by rows."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, P())


def split(x: jax.Array | jax.ShapeDtypeStruct, mesh: Mesh) -> P:
    """Returns the sharding of an array of the state.

    Matrices are split along the first axis that `fsdp` divides; other arrays are replicated.
    """
    sides = [i for i, side in enumerate(x.shape) if side % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] == 1 or not sides or sum(side > 1 for side in x.shape) < 2:
        return P()
    return P(*[None] * sides[0], "fsdp")


def place(tree, mesh: Mesh):
    """Returns the sharding of each array of a tree, by the rule of `split`."""
    return jax.tree.map(lambda x: NamedSharding(mesh, split(x, mesh)), tree)


def over_devices(gradient: Callable, mesh: Mesh, accumulate: int) -> Callable:
    """Returns `gradient` computed over the rows of all devices.

    `gradient` is a function (params, buffers, rows) -> grads, (sums, changed buffers). Each device
    gathers parameters and buffers and processes its own rows, in `accumulate` parts. Then gradients
    and sums are added up, and changed buffers averaged, over devices, once. Arguments and gradients
    are sharded by the rule of `split`.

    Without an explicit `shard_map`, XLA gathers activations and adds up gradients after every part.
    With it, XLA gathers each parameter once per step, on TPUs in the dtype in which it is used.
    Gathering again in the backward pass, by a checkpoint policy, took 1.8 times the memory (ViT-H
    with 8 blocks, v5e).
    """
    axes = [axis for axis in AXES if mesh.shape[axis] > 1]
    line = line_length(mesh)

    def gather(x, spec):
        for side, axis in enumerate(spec):
            if axis:
                x = jax.lax.all_gather(x, axis, axis=side, tiled=True)
        return x

    def add_up(x, spec):
        for side, axis in enumerate(spec):
            if axis:
                x = scatter(x, side, mesh.shape[axis], line)
        return jax.lax.psum(x, tuple(axis for axis in axes if axis not in tuple(spec)))

    def call(params, buffers, batch):
        specs, buffer_specs = jax.tree.map(lambda x: split(x, mesh), (params, buffers))

        def on_a_device(params, buffers, rows):
            params = jax.tree.map(gather, params, specs)
            buffers = jax.tree.map(gather, buffers, buffer_specs)
            grads, (sums, changed) = in_parts(gradient, accumulate)(params, buffers, rows)
            sums, changed = jax.lax.psum(sums, axes), jax.lax.pmean(changed, axes)
            return jax.tree.map(add_up, grads, specs), (sums, changed)

        on_devices = jax.shard_map(
            on_a_device,
            mesh=mesh,
            in_specs=(specs, buffer_specs, P(AXES)),
            out_specs=(specs, P()),
            check_vma=False,
        )
        return on_devices(params, buffers, batch)

    return call


def in_parts(gradient: Callable, parts: int) -> Callable:
    """Returns `gradient` computed in parts of the rows, one after another.

    Changed buffers are averaged over parts, as over devices, so a buffer whose change is a mean
    over rows does not depend on the number of parts.
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


@functools.cache
def gather_step(mesh: Mesh) -> Callable:
    """Returns a function that gathers a list of sharded arrays."""
    return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))


def all_gather(tree, mesh: Mesh):
    """Gathers sharded arrays, so that each device has a complete copy.

    One program gathers all of them: `device_put` runs one for each, which can block each other if
    a process has several CPU devices.
    """
    arrays, structure = jax.tree.flatten(tree)
    sharded = [isinstance(x, jax.Array) and not x.is_fully_replicated for x in arrays]
    gathered = iter(gather_step(mesh)([x for x, flag in zip(arrays, sharded, strict=True) if flag]))
    arrays = [
        next(gathered) if flag else jax.device_put(x, replicated(mesh))
        for x, flag in zip(arrays, sharded, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def to_global(batch: dict, mesh: Mesh) -> dict:
    """Returns a batch as global arrays over all devices, given this process's rows on the host."""
    sharding = by_row(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
