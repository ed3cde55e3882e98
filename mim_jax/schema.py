"""Config keys: collecting their types, ranges, defaults and meanings, and setting them.

Every block of a config configures one or two functions (or NamedTuples); their keyword arguments
are the block's keys. A config may leave out keys that have a default.
"""

import ast
import copy
import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import jax
import numpy as np
from ml_collections import ConfigDict

from mim_jax import UserError, config_files, data, objectives, optim, workdir
from mim_jax.keys import (
    BELOW_ONE,
    FREE,
    NOT_NEGATIVE,
    PER_DEVICE,
    POSITIVE,
    Key,
    Range,
    Smoke,
    key_of,
)
from mim_jax.models.dvae import dvae
from mim_jax.models.vit import ViT, vit

Epochs = Annotated[float, NOT_NEGATIVE, FREE, "interval in epochs"]
Steps = Annotated[int, NOT_NEGATIVE, FREE, "interval in steps; overrides every_epochs"]


class Top(NamedTuple):
    """Keys outside any block."""

    batch_size: Annotated[int, Range(1, 2**24), "images per update, over all devices"]
    seed: Annotated[int, Range(0, 2**32 - 1), "seed of all random numbers"] = 0
    epochs: Annotated[float, NOT_NEGATIVE, "length of the run"] = 0.0
    steps: Annotated[int, NOT_NEGATIVE, Smoke(20), "length in steps; overrides epochs"] = 0
    accumulate: Annotated[
        int, POSITIVE, FREE, Smoke(1), "parts of a batch that are processed one after another"
    ] = 1
    fsdp: Annotated[
        int, NOT_NEGATIVE, FREE, "devices that share one copy of the state; 0: all of a slice"
    ] = 1
    compile_cache: Annotated[str, FREE, "folder for compiled programs"] = "~/.cache/mim_jax"
    stall_minutes: Annotated[
        float, NOT_NEGATIVE, FREE, "minutes without progress after which a process ends; 0: never"
    ] = 60.0
    ema: Annotated[
        float, BELOW_ONE, "decay of the moving average of parameters for evaluation; 0: none"
    ] = 0.0


class InitFrom(NamedTuple):
    """Runs that a run starts from."""

    encoder: Annotated[
        str, Smoke(""), "run directory to copy the encoder from; random: initialize it randomly"
    ] = ""
    tokenizer: Annotated[
        str,
        Smoke("random"),
        "run directory to copy the tokenizer from; random: initialize it randomly",
    ] = ""


class Schedule(NamedTuple):
    """The learning rate, the part of the optimizer block that all optimizers share."""

    base_lr: Annotated[
        float, NOT_NEGATIVE, "learning rate for 256 images: lr = base_lr x batch / 256"
    ] = 0.0
    lr: Annotated[float, NOT_NEGATIVE, "learning rate after warm-up; overrides base_lr"] = 0.0
    min_lr: Annotated[float, NOT_NEGATIVE, Smoke(0.0), "learning rate at the end"] = 0.0
    warmup_epochs: Annotated[float, NOT_NEGATIVE, Smoke(0.0), "length of the warm-up in epochs"] = (
        0.0
    )
    warmup_steps: Annotated[
        int, NOT_NEGATIVE, Smoke(2), "length of the warm-up in steps; overrides warmup_epochs"
    ] = 0
    decay_epochs: Annotated[
        float, NOT_NEGATIVE, Smoke(0.0), "epoch at which the rate reaches min_lr; 0: the last"
    ] = 0.0
    decay_steps: Annotated[
        int, NOT_NEGATIVE, Smoke(0), "the same as a step; overrides decay_epochs"
    ] = 0
    schedule: Annotated[
        optim.Schedule,
        "codebase whose schedule is used: mae and beit decay by a cosine, mmseg linearly",
    ] = "mae"
    clip_norm: Annotated[
        float, NOT_NEGATIVE, "largest norm of the gradient, to which it is clipped; 0: no clipping"
    ] = 0.0


class Logging(NamedTuple):
    """Lines on the screen and in metrics.jsonl."""

    every_epochs: Epochs = 0.0
    every_steps: Annotated[Steps, Smoke(5)] = 50
    tensorboard: Annotated[bool, FREE, "also write TensorBoard events"] = False
    wandb: Annotated[str, FREE, "also log to this project of Weights & Biases"] = ""
    trackio: Annotated[str, FREE, "also log to this project of Trackio, which needs no account"] = (
        ""
    )


class Evaluate(NamedTuple):
    """Evaluation of the evaluation split."""

    every_epochs: Annotated[Epochs, Smoke(0.0)] = 0.0
    every_steps: Annotated[Steps, Smoke(10)] = 0
    limit: Annotated[int, NOT_NEGATIVE, FREE, Smoke(100), "number of examples; 0: all"] = 0


class Pictures(NamedTuple):
    """The objective's pictures of evaluation images, as PNG files."""

    every_epochs: Annotated[Epochs, Smoke(0.0)] = 0.0
    every_steps: Annotated[Steps, Smoke(10)] = 0
    count: Annotated[  # overrides the method of NamedTuple
        int, NOT_NEGATIVE, FREE, "number of images; 0: no pictures"
    ] = 12  # type: ignore[assignment]


class Probe(NamedTuple):
    """Probes of the features: k-NN, a linear classifier and their rank."""

    every_epochs: Annotated[Epochs, Smoke(0.0)] = 0.0
    every_steps: Annotated[Steps, Smoke(10)] = 0
    images: Annotated[int, NOT_NEGATIVE, FREE, "number of images of each split; 0: no probe"] = 0


class Divergence(NamedTuple):
    """Steps whose loss or gradient is not finite or a spike. Their updates are skipped."""

    patience: Annotated[
        int,
        NOT_NEGATIVE,
        FREE,
        "failures in a row before a rollback; 0: skip no update, and end at the first failure",
    ] = 10
    rollbacks: Annotated[
        int,
        NOT_NEGATIVE,
        FREE,
        "number of times that a run may return to a checkpoint and skip data",
    ] = 3
    spike: Annotated[
        float,
        NOT_NEGATIVE,
        FREE,
        "a step fails if its loss or gradient norm is over this many times the largest of recent "
        "steps; 0: only if it is not finite",
    ] = 100.0


class Save(NamedTuple):
    """Checkpoints."""

    every_epochs: Annotated[Epochs, Smoke(0.0)] = 0.0
    every_steps: Annotated[Steps, Smoke(10)] = 0
    keep: Annotated[int, POSITIVE, FREE, "number of checkpoints that are kept"] = 3


# Built once, and passed to an objective that has these arguments.
NETWORKS: dict[str, Callable] = {"model": vit, "tokenizer": dvae}
FROM_DATA = ("num_labels", "segmentation_classes", "segmentation_colors", "image_size")
SUPPLIED = (*NETWORKS, *FROM_DATA)  # arguments of an objective that are not keys
INTEGERS = 2**32  # bound of integer keys, so that shapes do not overflow
CHOICES = ("objective", "optimizer")  # blocks whose key `name` determines the other keys


def functions(config: Mapping) -> dict[str, tuple[Callable, ...]]:
    """Returns the functions and classes that each block configures; "" is the top level."""
    for block in (*CHOICES, "data"):
        if block not in config:
            raise UserError(f"the config has no block {block!r}.")
    for block in CHOICES:
        if "name" not in config[block]:
            raise UserError(f"the config must set {block}.name.")
    objective = objectives.find(config["objective"]["name"])
    optimizer = choose("optimizer.name", config["optimizer"]["name"], optim.OPTIMIZERS)
    takes = inspect.signature(objective).parameters
    networks = {"model": (vit, ViT), "tokenizer": (dvae,)}
    return {
        "": (Top,),
        "init_from": (InitFrom,),
        **{name: network for name, network in networks.items() if name in takes},
        "objective": (objective,),
        "data": (data.make, *data.views_of(segmented="segmentation_classes" in takes)),
        "optimizer": (Schedule, optim.OPTIMIZERS[optimizer]),
        "log": (Logging,),
        "evaluate": (Evaluate,),
        "pictures": (Pictures,),
        "probe": (Probe,),
        "save": (Save,),
        "divergence": (Divergence,),
    }


def keys_of(config: Mapping) -> dict[str, Key]:
    """Returns all keys of a config by their full names, such as "optimizer.b2"."""
    required = inspect.Parameter.empty
    keys = {
        f"{block}.name": Key(str, required, Range(), f"name of the {block}", None, ())
        for block in CHOICES
    }
    for block, configured in functions(config).items():
        for function in configured:
            own = keys_of_function(function, every=block == "objective")
            keys |= {f"{block}.{name}".lstrip("."): key for name, key in own.items()}
    for block in NETWORKS.keys() & functions(config):
        keys[f"{block}.dtype"] = keys[f"{block}.dtype"]._replace(default="auto")
    return keys


def keys_of_function(function: Callable, every: bool = False) -> dict[str, Key]:
    """Returns the keys of a function or NamedTuple: its arguments annotated with `Annotated`.

    With `every`, arguments without annotation are keys too, unless the builder supplies them. This
    is for objectives, which may be a user's.
    """
    hints = get_type_hints(function, include_extras=True)
    keys = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, type(parameter.default))
        if get_origin(hint) is Annotated or (every and name not in SUPPLIED):
            keys[name] = key_of(hint, parameter.default)
    return keys


def choose(key: str, name: str, options: Iterable[str]) -> str:
    """Returns `name` if it is one of the options, otherwise raises a UserError that lists them."""
    if name not in (options := sorted(options)):
        near = difflib.get_close_matches(name, options, 1)
        hint = f"did you mean {near[0]}? Choose" if near else "choose"
        raise UserError(f"{key} = {name!r} is unknown; {hint} one of {', '.join(options)}.")
    return name


# --- Reading configs. ---


def load(
    path: str, overrides: Sequence[str] = (), smoke: bool = False, trust_code: bool = False
) -> ConfigDict:
    """Returns the complete config of a Python file or of a run, changed by overrides "key=value".

    With `smoke` the config is first reduced to a tiny model, the built-in images and 20 steps. An
    objective outside the package is imported if a config file or an override names it; if only a
    run names it, `trust_code` is required.

    Raises:
        UserError: if the file is missing, a key does not exist, or a value has a wrong type or is
            out of range.
    """
    changes = []
    for override in overrides:
        if "=" not in override:
            raise UserError(f"--config.{override} has no value: write --config.{override}=VALUE.")
        changes.append(override.split("=", 1))
    given = read(path)
    for block in CHOICES:
        if not isinstance(given.get(block, {}), dict):
            raise UserError(f"{path}: {block} is a block: set {block}.name.")
    named_by_user = not workdir.is_run(path)
    changed = ""
    for key, text in changes:
        if key in [f"{block}.name" for block in CHOICES]:
            block = given.get(key.split(".")[0], {})
            if block.get("name", text) != text:
                changed = f"it is for {block['name']}, and {text} has no key "
            block["name"] = text
            named_by_user |= key == "objective.name"
    load_objective(given, path, named_by_user, trust_code)
    try:
        foreign = sorted(flatten(given).keys() - keys_of(given))
        if changed and foreign:
            raise UserError(f"{changed}{foreign[0]}: write a config for the latter.")
        config = complete(given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if smoke:
        shrink(config)
    keys = keys_of(config)
    if workdir.is_run(path):  # an untrusted run must not choose the folder of compiled programs
        config.compile_cache = keys["compile_cache"].default
    for key, text in changes:
        set_key(config, keys, key, text, typed=True)
    if not smoke:  # which sets the widths
        require_effect(config, dict(changes))
    return config


def require_effect(config: ConfigDict, changed: Collection[str]) -> None:
    """Raises UserError if model.size was changed but no other key is derived from it."""
    shape = [f"model.{name}" for name in ("width", "depth", "heads")]
    if "model.size" in changed and config.model.size and all(flatten(config)[x] for x in shape):
        raise UserError(
            f"model.size = {config.model.size!r} has no effect, because the config sets "
            f"{', '.join(shape)}: set them to 0, or change them instead."
        )


def load_objective(given: dict, path: str, named_by_user: bool, trust_code: bool) -> None:
    """Imports the objective of a config if it is outside the package and may be imported."""
    name = str(given.get("objective", {}).get("name", ""))
    if not name or name in objectives.names():
        return
    folder = Path(path).absolute().parent
    if not named_by_user:
        code = workdir.read(path).get("code", "")
        if not trust_code:
            raise UserError(
                f"{path} was trained by {name!r}, which is not part of mim_jax ({code}), and "
                "loading it executes that code: pass --trust-code if you trust it."
            )
        folder = Path(code).parents[name.count(".")] if code else folder
    try:
        objectives.load_external(name, folder)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"objective.name = {name!r}: {config_files.explain(error, '')}.") from error


def read(path: str) -> dict:
    """Returns the config of a run directory, or the result of a config file's get_config()."""
    if not workdir.is_run(path):
        return config_files.load(path)
    record = workdir.read(path)
    if workdir.is_converted(record):
        raise UserError(
            f"{path} holds converted weights and names no data: pass a config file and "
            f"--config.init_from.encoder={path} (or tokenizer)."
        )
    return record["config"]


def require_networks(config: Mapping, network: str) -> None:
    """Raises UserError if the keys of a recorded config that describe networks have wrong values.

    The config may be that of converted weights, which has only some blocks, or a stranger's. It
    must have the block `network`, "model" or "tokenizer".
    """
    configured: dict[str, tuple[Callable, ...]] = {
        "model": (vit, ViT),
        "tokenizer": (dvae,),
        "data": (data.make, *data.views_of(segmented=False)),
        "objective": (),
    }
    for block, settings in config.items():
        if block not in configured:
            continue
        if not isinstance(settings, dict | ConfigDict):
            raise UserError(f"the config's {block} must be a block of keys.")
        keys: dict[str, Key] = {}
        for function in configured[block]:
            keys |= keys_of_function(function)
        for name, value in settings.items():
            if name in keys:
                set_key(
                    ConfigDict({block: {}}),
                    {f"{block}.{name}": keys[name]},
                    f"{block}.{name}",
                    value,
                )
    if missing := [block for block in ("objective", "data", network) if block not in config]:
        raise UserError(f"the config has no block {missing[0]!r}.")


def complete(given: Mapping) -> ConfigDict:
    """Returns a config with all keys, with defaults for those that are not in `given`."""
    keys: dict[str, Key] = keys_of(given)
    full: dict[str, Any] = {}
    for key, entry in keys.items():
        block, _, name = key.rpartition(".")
        (full.setdefault(block, {}) if block else full)[name] = copy.copy(entry.default)
    config = ConfigDict(full)
    for key, value in given.items():
        for name, inner in value.items() if isinstance(value, dict) else [("", value)]:
            set_key(config, keys, f"{key}.{name}".strip("."), inner)
    for key, value in flatten(config).items():
        if value is inspect.Parameter.empty:
            raise UserError(f"the config must set {key}.")
    return config


# --- Setting keys. ---


def set_key(
    config: ConfigDict, keys: Mapping[str, Key], key: str, value: Any, typed: bool = False
) -> None:
    """Sets a key to a value of its type and in its range; `typed` values are text to be parsed."""
    if key not in keys:
        raise UserError(unknown(key, keys))
    kind = keys[key].kind
    value = parse(value, kind) if typed else value
    value = tuple(value) if isinstance(value, list) else value
    value = float(value) if kind is float and type(value) is int else value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choose(key, str(value), filter(None, get_args(kind)))
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key} = {value!r} must be {getattr(kind, '__name__', kind)}.")
    numbers = [x for x in np.ravel(value).tolist() if isinstance(x, int | float)]
    default = keys[key].default if isinstance(keys[key].default, tuple) else ()
    numeric = keys[key].range != Range() or any(isinstance(x, int | float) for x in default)
    if numeric and isinstance(value, tuple) and len(numbers) < np.size(value):
        raise UserError(f"{key} = {value!r} must be numbers.")
    if not all(keys[key].range.allows(x) for x in numbers):
        raise UserError(f"{key} = {value!r} must be {keys[key].range}.")
    if kind == int | tuple and isinstance(value, tuple) and len(numbers) != 2:
        raise UserError(f"{key} = {value!r} must be one number, or two: (rows, columns).")
    if any(isinstance(x, int) and abs(x) >= INTEGERS for x in numbers):
        raise UserError(f"{key} = {value!r} must be less than {INTEGERS}.")
    block, _, name = key.rpartition(".")
    with config.ignore_type():
        (config[block] if block else config)[name] = value


def unknown(key: str, keys: Mapping[str, Key]) -> str:
    """Returns the message for a key that does not exist."""
    block = [name for name in keys if name.startswith(f"{key}.")]
    if block:
        return f"{key} is a block: set {block[0]} or another of its keys."
    near = difflib.get_close_matches(key, keys, 1) or [name for name in keys if name.endswith(key)]
    hint = f": did you mean {near[0]}?" if near else ": `mim-jax keys --config=CONFIG` lists them."
    return f"the config has no key {key}{hint}"


def parse(text: str, kind: Any) -> Any:
    """Parses a value from the command line: a Python literal, true, false, or plain text.

    Names in a tuple may be separated by commas: data.bands=red,nir.
    """
    if kind is str or get_origin(kind) is Literal:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        names = kind is tuple and "," in text
        return tuple(name.strip() for name in text.split(",")) if names else text
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns {"optimizer.base_lr": 1.5e-4, ...}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict | ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


# --- Operations on complete configs. ---


def networks(config: Mapping) -> dict[str, Any]:
    """Builds the networks of a config: {"model": ViT, "tokenizer": DVAE}, or one of them."""
    return {name: build(**config[name]) for name, build in NETWORKS.items() if name in config}


def shrink(config: ConfigDict) -> None:
    """Reduces a config to a rehearsal that takes less than a minute on two cores."""
    keys, devices = keys_of(config), jax.device_count()
    p, q = next(iter(networks(config).values())).patch
    rows = 2 * -(-8 // devices)  # per device, and even: mixup takes pairs
    for key, entry in keys.items():
        if PER_DEVICE in entry.markers and flatten(config)[key]:
            set_key(config, keys, key, rows)
        elif entry.smoke:
            set_key(config, keys, key, entry.smoke.value)
    config.batch_size = rows * devices
    if config.data.tokenizer_size:  # keep as many tokens as patches
        tokens = np.multiply(config.data.tokenizer_size, (4 * p, 4 * q)) // config.data.size
        set_key(config, keys, "data.tokenizer_size", tuple(tokens.tolist()))
    set_key(config, keys, "data.size", (4 * p, 4 * q))


def trajectory(config: ConfigDict, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that determine what a run learns, and the fingerprint of its data."""
    keys = keys_of(config)
    decisive = {k: v for k, v in flatten(config).items() if FREE not in keys[k].markers}
    return decisive | {f"data set's {k}": v for k, v in fingerprint.items()}
