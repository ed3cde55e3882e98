"""The step of a run on a target: tracing and compiling it, with cached results."""

import functools
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from mim_jax import UserError, flops, recipe, schema
from mim_jax.data import described
from mim_jax.plan import cache
from mim_jax.plan.hardware import Target
from mim_jax.progress import Bar
from mim_jax.sharding import split
from mim_jax.start import Start, model_flops

UNITS = dict(K=2**10, M=2**20, G=2**30, T=2**40)


class Compiled(NamedTuple):
    """The compiler's results for a step. If the step does not fit, only `peak` is known."""

    fits: bool
    peak: float  # bytes of memory on a device
    memory: dict[str, float]  # bytes by kind
    flops: float  # the body of a loop counts once
    text: str  # of the compiled program
    seconds: float  # that compilation took


class Step:
    """The step of a run on the devices of a target."""

    def __init__(self, config: ConfigDict, target: Target):
        self.config, self.target = config, target
        self.run = recipe.build(config, target.devices)
        self.start = Start(self.run, config)

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        """The traced step."""
        return self.start.trace_step()

    @functools.cached_property
    def flops(self) -> float:
        """The FLOPs of matrix products and convolutions on a device.

        All iterations of loops count, and so do operations repeated by rematerialization.
        """
        return flops.step_flops(self.traced.jaxpr)

    @functools.cached_property
    def model_flops(self) -> float:
        """The same without the operations repeated by rematerialization."""
        return self.flops if self.remat == "none" else model_flops(self.run, self.config)

    @property
    def remat(self) -> str:
        """The encoder's rematerialization policy, "none" if there is no encoder."""
        return self.run.model.remat if self.run.model else "none"

    @property
    def images(self) -> int:
        """Images of a step on each device."""
        return self.config.batch_size // self.run.mesh.size

    @property
    def state_bytes(self) -> dict[str, float]:
        """The bytes of the parts of the state on each device."""
        names = dict(params="parameters", buffers="buffers", opt_state="optimizer", ema="average")
        sizes = {
            name: sum(map(bytes_on_device, jax.tree.leaves(getattr(self.start.like, part))))
            for part, name in names.items()
        }
        return {name: size for name, size in sizes.items() if size}

    @property
    def batch_bytes(self) -> float:
        """The bytes of a batch on each device."""
        fields = self.run.example.values()
        return self.images * sum(x.size * x.dtype.itemsize for x in fields)

    @property
    def split_parameters(self) -> int:
        """Parameters in arrays that are split over devices."""
        return sum(x.size for x in self.split_arrays(self.start.like.params))

    @property
    def split_buffer_bytes(self) -> int:
        """The bytes of all buffers, such as a frozen tokenizer, that are split over devices."""
        return sum(x.size * x.dtype.itemsize for x in self.split_arrays(self.start.like.buffers))

    def split_arrays(self, tree: Any) -> list[jax.ShapeDtypeStruct]:
        """Returns the arrays of a tree that are split over devices."""
        return [x for x in jax.tree.leaves(tree) if tuple(split(x, self.run.mesh))]

    def compile(self) -> Compiled:
        """Compiles the step, or returns the cached result for the same program.

        Raises UserError if compilation fails for a reason other than memory.
        """
        lowered = self.traced.lower()
        key = [self.target.name, *cache.versions(), lowered.as_text()]
        file = cache.file_of(self.config.compile_cache, key)
        if content := cache.read(file):
            return Compiled(**json.loads(content))
        text = f"compiling the step for {self.target.name}"
        print(f"{text} ...", file=sys.stderr, flush=True)
        with Bar(text):
            result = compile_lowered(lowered, dump=self.target.chip.clock > 0)
        cache.write(file, json.dumps(result._asdict()).encode())
        return result


def load(
    path: str,
    overrides: Sequence[str],
    target: Target,
    *,
    images: int = 0,
    classes: int = 0,
    trust_code: bool = False,
) -> ConfigDict:
    """Returns the config of a run on a target.

    The data set need not be present if it is well known, or if the number of training `images` (and
    of `classes`) is given. The networks' dtype is set to bfloat16 for GPUs, which CPUs represent.
    """
    config = schema.load(path, overrides, trust_code=trust_code)
    if not target.compiled:
        for name in schema.NETWORKS:
            if name in config and config[name].dtype == "auto":
                config[name].dtype = "bfloat16"
    sizes = (images, classes) if images else described.known_sizes(config.data.name)
    if sizes[0]:
        config.data.update(name=described.name_of(*sizes), labels="", data_dir="", classes="")
    for part, source in config.init_from.items():
        config.init_from[part] = source and "random"
    return config


def compile_lowered(lowered: jax.stages.Lowered, dump: bool = False) -> Compiled:
    """Compiles a step.

    Args:
        lowered: the step.
        dump: whether the compiler for TPUs writes the program to a file. JAX cannot read all of
            its programs, such as those that use the SparseCores of a v5p or v6e.

    Raises:
        UserError: if compilation fails for a reason other than memory.
    """
    start = time.perf_counter()
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot be read without the device
    with tempfile.TemporaryDirectory() as folder:
        options: Any = dict(xla_dump_to=folder, xla_dump_hlo_as_text=True) if dump else None
        try:
            compiled = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            if peak := needed(str(error)):
                return Compiled(False, peak, {}, 0.0, "", time.perf_counter() - start)
            raise UserError(f"the step does not compile: {reason}") from None
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
        files = sorted(Path(folder).glob("*.after_codegen.txt"))
        text = files[-1].read_text() if files else compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    kinds = dict(
        state_and_batch=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
    )
    peak = memory.peak_memory_in_bytes or sum(kinds.values())
    seconds = time.perf_counter() - start
    return Compiled(True, peak, kinds, costs.get("flops", 0.0), text, seconds)


def needed(message: str) -> float:
    """Returns the bytes that a step needs, from the compiler's out-of-memory message, or 0."""
    size = r"([\d.]+)([KMGT])"
    match = re.search(rf"Used {size} of", message)
    match = match or re.search(rf"memory required[^(]*\({size}\)", message)
    return float(match[1]) * UNITS[match[2]] if match else 0.0


def bytes_on_device(x: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of a sharded array on one device."""
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    size = x.dtype.itemsize
    for side in shape:
        size *= side
    return size
