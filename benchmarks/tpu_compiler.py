"""Training steps compiled for TPUs that are not there, by the TPU's own compiler (libtpu)."""

import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from mim_jax import UserError, recipe, schema
from mim_jax.start import Start

DATA = ("name=emoji", "split=train", "evaluation_split=validation", "data_dir=", "labels=")
ENVIRONMENT = dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")


class Step(NamedTuple):
    """A step that is ready to be compiled."""

    run: recipe.Run
    config: Any
    parameters: int
    traced: jax.stages.Traced

    def compile(self) -> tuple[jax.stages.Compiled, float]:
        """Returns the compiled step and how many seconds it took.

        Raises UserError with the compiler's sentence, as where the step does not fit.
        """
        start = time.perf_counter()
        try:
            compiled = self.traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the step does not compile: {reason}") from None
        return compiled, time.perf_counter() - start


def trace(path: str, overrides: list[str], devices: Sequence) -> Step:
    """Traces the step of a config on these devices.

    Data are not needed: their shapes are the built-in emoji's, at the size of the config.
    """
    rest = ["init_from.tokenizer=random", "steps=10000"]
    config = schema.load(path, [*(f"data.{word}" for word in DATA), *rest, *overrides])
    run = recipe.build(config, devices)
    start = Start(run, config)
    return Step(run, config, start.parameters, start.trace_step())


def chips(topology: str) -> list:
    """Returns the devices of a slice that need not be there, as of v5e:4x4.

    Raises UserError if there is no compiler for it.
    """
    kind, _, shape = topology.partition(":")
    count = math.prod(int(side) for side in shape.split("x") if side.isdigit())
    name = {"v5e": "v5litepod"}.get(kind, kind)
    jax.config.update("jax_platforms", "cpu")  # no chip is looked for, nor kept from others
    os.environ |= ENVIRONMENT
    os.environ |= dict(TPU_ACCELERATOR_TYPE=f"{name}-{count}", TPU_WORKER_HOSTNAMES="localhost")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of many kinds, depending on what is wrong
        raise UserError(
            f"there is no compiler for --topology={topology}: pip install -e '.[tpu]', and name "
            f"one as v5e:4x4 ({str(error).splitlines()[0]})."
        ) from None
