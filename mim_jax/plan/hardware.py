"""Devices that a run can be planned for: TPU slices, CPUs, and GPUs.

Figures of chips are from the vendors' data sheets; the clocks are those at which their peak is
reached. The memory of a TPU is what its compiler lets a program use.
"""

import contextlib
import importlib.util
import math
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from mim_jax import UserError, flops

GIB = 2**30


class Chip(NamedTuple):
    """The figures of one device."""

    kind: str  # its name in JAX, for flops.peak
    memory: float = math.inf  # bytes that a program can use
    bandwidth: float = 0.0  # of the memory, bytes/s
    link: float = 0.0  # of one link to a neighbor, in one direction, bytes/s
    clock: float = 0.0  # Hz

    @property
    def peak(self) -> float:
        """The bfloat16 operations per second, 0 if they are unknown."""
        return flops.peak(self.kind)


TPUS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1228e9, 45e9, 1.05e9),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819e9, 45e9, 1.5e9),
    "v5p": Chip("TPU v5", 95.73 * GIB, 2765e9, 90e9, 1.75e9),
    "v6e": Chip("TPU v6 lite", 31.24 * GIB, 1640e9, 90e9, 1.75e9),
}
GPUS = {  # memory without what the driver, cuDNN and NCCL take
    "a100": Chip("A100", 75 * GIB, 2039e9, 300e9),
    "h100": Chip("H100", 75 * GIB, 3350e9, 450e9),
    "h200": Chip("H200", 133 * GIB, 4800e9, 450e9),
    "b200": Chip("B200", 170 * GIB, 8000e9, 900e9),
    "l40s": Chip("L40S", 42 * GIB, 864e9, 32e9),
    "l4": Chip("L4", 20 * GIB, 300e9, 32e9),
    "a10g": Chip("A10G", 20 * GIB, 600e9, 32e9),
}
MACHINE = 8  # GPUs of a machine; between machines a GPU has the bandwidth of one NETWORK adapter
NETWORK = 50e9
FORM = "TPU slices such as v5e:4x4 or v5p:2x2x4, cpu:8, or GPUs such as h100:8"


class Target(NamedTuple):
    """The devices that a run is planned for."""

    name: str  # such as v5e:4x4
    chip: Chip
    devices: list  # CPU devices take the place of GPUs
    compiled: bool  # whether the step is compiled for it


def target_of(name: str) -> Target:
    """Returns the target "v5e:4x4", "cpu:8" or "h100:8". No such device needs to be present.

    Raises UserError if there is no such target, or no compiler for it.
    """
    kind, _, size = name.partition(":")
    jax.config.update("jax_platforms", "cpu")  # so that no accelerator is searched or occupied
    if kind in TPUS:
        return Target(name, TPUS[kind], tpus(name, kind, size), compiled=True)
    if kind not in ("cpu", *GPUS) or not size.isdecimal() or int(size) < 1:
        raise UserError(f"--target={name}: there is no such target; set it to {FORM}.")
    if kind == "cpu":
        return Target(name, Chip("cpu"), cpus(int(size)), compiled=True)
    chip = GPUS[kind]
    if int(size) > MACHINE:
        chip = chip._replace(link=NETWORK)
    return Target(name, chip, cpus(int(size)), compiled=False)


def tpus(name: str, kind: str, size: str) -> list:
    """Returns the devices of a TPU slice, which its compiler describes."""
    sides = size.split("x")
    if len(sides) < 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"--target={name}: there is no such slice; set it to {FORM}.")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--target={name} needs the TPU's compiler: pip install 'mim-jax[tpu]'")
    count = math.prod(map(int, sides))
    accelerator = {"v5e": "v5litepod"}.get(kind, kind)
    count *= 2 if kind in ("v4", "v5p") else 1  # cores, in the names of these
    os.environ |= dict(
        TPU_SKIP_MDS_QUERY="1",  # do not query the metadata server of a cloud
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several processes can plan at the same time
        TPU_ACCELERATOR_TYPE=f"{accelerator}-{count}",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    # A host has 2 x 2 chips, which a smaller slice does not fill.
    columns, rows = (min(int(side), 2) for side in sides[:2])
    options: dict[str, Any] = dict(chips_per_host_bounds=(columns, rows, 1))
    if kind == "v4":  # the two cores of a chip are one device, as on the machines of the cloud
        options["chip_config_name"] = "megacore"
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # of many kinds, depending on what is wrong
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--target={name}: the TPU's compiler has no such slice: {reason}"
        ) from None
    return list(description.devices)


def cpus(count: int) -> list:
    """Returns `count` CPU devices. Raises UserError if this process has fewer."""
    with contextlib.suppress(RuntimeError):  # JAX has devices already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"{count} devices are needed, but JAX was started with {len(devices)}: run the plan in "
            "a separate process."
        )
    return devices[:count]
