"""Training objectives, one per file. `objective.name` in a config is the name of the file.

Each file defines `objective`, a function that returns an `Objective`. Its keyword arguments are the
keys of the config's block `objective`, except that `recipe.build` supplies `model`, `tokenizer` and
properties of the data such as `num_labels`.
"""

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mim_jax import UserError
from mim_jax.models.vit import ViT
from mim_jax.normalize import normalize


class Objective(NamedTuple):
    """A training objective: a collection of pure functions, like optax.GradientTransformation.

    `batch` is a dict of arrays (b, ...): always `image`, `index` and `valid`, and further fields
    such as `label` if the data set has them. `params["encoder"]` are the parameters of the ViT.
    `buffers` are part of the state but not trained. All randomness of an example must be drawn from
    `per_example(rng, batch["index"])`, so that results do not depend on the number of devices.

    Attributes:
        init: (rng, batch) -> params, buffers.
        loss: (params, buffers, batch, rng, step) -> total (), weight (), (metrics, buffers).
            The sum of the losses and its weight; the step adds up both over microbatches and
            devices, and divides once. Metrics are means with the same weight. The change of a
            buffer must be a mean over rows.
        evaluate: (params, buffers, batch, rng) -> {name: (b, ...)}; train.evaluate averages these
            over valid examples.
        pictures: (params, buffers, batch, rng) -> {caption: images (b, H, W, c) in [0, 1]}.
        predict: (params, buffers, batch) -> logits of the classes (b, k); None if the objective
            does not classify images.
        summarize: {name: mean} -> {name: number or array}, after an evaluation.
        needs: buffers that must come from another run, by their keys in `init_from`.
        warn: (step, metrics) -> a warning that names the key to change, or "".
        after: (params, buffers, step) -> buffers, called once per update with the updated
            parameters, outside the gradient, on arrays sharded like the state. Use it for moving
            averages.
        head: prefixes of the parameters and buffers that are copied together with the encoder
            when a run starts from another run of the same objective.
        describe: (images: ShapeDtypeStruct of an image batch) -> text printed when a run starts.
    """

    init: Callable
    loss: Callable
    evaluate: Callable
    pictures: Callable
    summarize: Callable = lambda means: means
    needs: tuple[str, ...] = ()
    warn: Callable = lambda step, metrics: ""
    after: Callable = lambda params, buffers, step: buffers
    head: tuple[str, ...] = ()
    describe: Callable = lambda images: ""
    predict: Callable | None = None


def objective_of(methods: type) -> Callable[..., Objective]:
    """Returns a function that takes the arguments of a class and returns an Objective.

    The class has methods and attributes named after the fields of Objective.
    """

    @functools.wraps(methods, updated=())
    def objective(*networks: Any, **settings: Any) -> Objective:
        instance = methods(*networks, **settings)
        fields = (name for name in Objective._fields if hasattr(instance, name))
        return Objective(**{name: getattr(instance, name) for name in fields})

    return objective


def per_example(rng: jax.Array, index: jax.Array) -> jax.Array:
    """Derives one key for each example: rng (), index (b,) -> keys (b,)."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, index)


def image_encoder(encoder: ViT, mean: tuple, std: tuple) -> Callable:
    """Returns a function (params, images (b, H, W, c)) -> tokens (b, 1 + n, d).

    It encodes all patches, without stochastic depth. Images are integers in their type's range or
    floats in [0, 1]. The final norm is applied if the parameters include one.
    """

    def encode(params: dict, images: jax.Array) -> jax.Array:
        layers = () if "norm" in params else (encoder.depth - 1,)
        images = normalize(jnp.asarray(images), mean, std)
        tokens: Any = encoder.apply({"params": params}, images, layers=layers)
        return tokens[0] if layers else tokens

    return encode


EXTERNAL: dict[str, ModuleType] = {}  # objectives outside the package, by `objective.name`


def packaged() -> list[str]:
    """Returns the names of the objectives in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def names() -> list[str]:
    """Returns the names of the objectives in this package and of loaded external ones."""
    return sorted({*packaged(), *EXTERNAL})


def find(name: str) -> Callable:
    """Returns the function `objective` from the file of an objective.

    Modules outside the package must be imported with `load_external` first.

    Raises:
        UserError: if there is no objective of this name.
    """
    if name not in names():
        raise UserError(
            f"objective.name = {name!r} is unknown; choose one of {', '.join(names())}, a module "
            "such as my_package.my_objective, or the name of a file next to the config."
        )
    module = EXTERNAL.get(name) or importlib.import_module(f"{__name__}.{name}")
    return module.objective


def load_external(name: str, folder: Path) -> None:
    """Imports an objective from outside the package, which executes its code.

    `name` is a module such as "my_package.my_objective", or "my_objective" for a file in `folder`.
    If the objective is built in, or there is no such file, nothing is imported; `find` reports a
    missing file.

    Raises:
        UserError: if the module cannot be imported or does not define `objective`.
    """
    if name in names():
        return
    path = folder / f"{name}.py"
    if "." in name:
        sys.path.insert(0, str(folder))
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"objective.name = {name!r} cannot be imported: {error}.") from error
        finally:
            sys.path.remove(str(folder))
    elif path.is_file():
        spec = importlib.util.spec_from_file_location(f"external_objectives.{name}", path)
        assert spec is not None  # the file exists
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        return
    if not callable(getattr(module, "objective", None)):
        raise UserError(
            f"objective.name = {name!r}: {module.__file__} does not define `objective`."
        )
    EXTERNAL[name] = module


def code_of(name: str) -> str:
    """Returns the path of an external objective's file, "" for a built-in objective."""
    return str(EXTERNAL[name].__file__) if name in EXTERNAL else ""
