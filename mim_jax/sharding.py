"""Where arrays live: the mesh, and the one rule that places them on it."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(devices: list | None = None) -> Mesh:
    """All devices of all processes along one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def by_row(mesh: Mesh) -> NamedSharding:
    """Batches: each device holds its rows."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Everything else: each device holds a copy."""
    return NamedSharding(mesh, P())


def by_device(function: Callable, mesh: Mesh) -> Callable:
    """`function` on each device's own rows; what it returns must be the same on all."""
    return jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)


def to_global(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of a batch (host arrays) -> global arrays over all devices."""
    place = by_row(mesh)
    return {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}
