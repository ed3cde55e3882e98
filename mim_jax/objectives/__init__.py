"""Training objectives. Each file here is one objective, named in a config by the file's name.

A file defines `objective`, a function that returns an `Objective`. Its keyword arguments are the
keys of the config's block `objective`; the networks `model` and `tokenizer` and the data's
`num_labels` are passed to a function with these arguments.
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
    """A training objective as pure functions, as optax.GradientTransformation is for updates.

    `batch` is a dict of arrays (b, ...), one for each of the data set's fields: `image`, `index`
    and `valid` always, `label` and others where the data has them. `params["encoder"]` is the ViT.
    `buffers` are carried from step to step but not trained. Draw all randomness of an example from
    `per_example(rng, batch["index"])`: the result then does not depend on the devices.

    Fields with their arguments and results:
        init: (rng, batch) -> params, buffers.
        loss: (params, buffers, batch, rng, step) -> total (), weight (), (metrics, buffers).
            The sum of the losses and its weight; the step adds both over microbatches and devices
            and divides once. Metrics are means over the same weight. A buffer that changes must
            change by a mean over rows.
        evaluate: (params, buffers, batch, rng) -> {name: (b, ...)}, which the loop averages over
            the examples with batch["valid"].
        pictures: (params, buffers, batch, rng) -> {caption: images (b, H, W, c) in [0, 1]}.
        predict: (params, buffers, batch) -> logits of the classes (b, k); None if the objective
            does not classify images.
        summarize: {name: mean} -> {name: number or array}, after an evaluation.
        needs: the buffers that must come from another run, named as keys of `init_from`.
        warn: (step, metrics) -> a warning that says what to change, or "".
        after: (params, buffers, step) -> buffers, once per update, with the updated parameters,
            outside the gradient, on arrays sharded like the state. For moving averages.
        head: prefixes of the parameters and buffers that accompany an encoder when a run starts
            from a run of the same objective.
        describe: (images: the shape of an image batch) -> text for the start of a run.
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
    """Turns a class, whose attributes are fields of an Objective, into a function returning one.

    The function takes the arguments of the class.
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


def whole_images(encoder: ViT, mean: tuple, std: tuple) -> Callable:
    """Returns an encoder as a function (params, images (b, H, W, c)) -> tokens (b, 1 + n, d).

    No patch is hidden and no branch dropped. Images are integers in their type's range or floats
    in [0, 1]. Tokens are normalized if params have a final norm.
    """

    def encode(params: dict, images: jax.Array) -> jax.Array:
        layers = () if "norm" in params else (encoder.depth - 1,)
        images = normalize(jnp.asarray(images), mean, std)
        tokens: Any = encoder.apply({"params": params}, images, layers=layers)
        return tokens[0] if layers else tokens

    return encode


EXTERNAL: dict[str, ModuleType] = {}  # objectives outside the package, by their names in a config


def names() -> list[str]:
    """Returns the names of the objectives in this package and of the external ones loaded."""
    return sorted({*(module.name for module in pkgutil.iter_modules(__path__)), *EXTERNAL})


def find(name: str) -> Callable:
    """Returns what the file of an objective calls `objective`. Raises UserError if there is none.

    Nothing outside the package is imported here: see `load_external`.
    """
    if name not in names():
        raise UserError(
            f"objective.name = {name!r} is unknown; choose one of {', '.join(names())}, a module "
            "as my_package.my_objective, or a file next to the config."
        )
    module = EXTERNAL.get(name) or importlib.import_module(f"{__name__}.{name}")
    return module.objective


def load_external(name: str, folder: Path) -> None:
    """Imports an objective from outside the package: it executes code that the user wrote.

    `name` is a module as "my_package.my_objective", or "my_objective" for a file in `folder`.
    Names of built-in objectives and of files that do not exist are left to `find`.
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
    """Returns the file of an external objective, "" for one of this package."""
    return str(EXTERNAL[name].__file__) if name in EXTERNAL else ""
