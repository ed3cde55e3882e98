"""From a config to the objects of a run. Config stops here: below, all are keyword arguments.

A block of a config may say what the function that it is for takes, and what it leaves out is that
function's default. What no function takes stands in DEFAULTS.
"""

import ast
import copy
import difflib
import importlib
import inspect
import json
import math
import pkgutil
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mim_jax import UserError, data, objectives, optim
from mim_jax.models.dvae import dvae
from mim_jax.models.vit import vit
from mim_jax.sharding import make_mesh

DEFAULTS = dict(  # a type stands for a value of that type that each config must give
    seed=0,
    batch_size=int,  # images an update, over all devices
    epochs=0.0,
    steps=0,  # if given, the epochs do not count; so it is with every pair *_steps, *_epochs
    accumulate=1,  # parts that a batch is taken in, one after the other
    fsdp=1,  # devices that share a copy of the state, each keeping a part; 0: all of a slice
    compile_cache="~/.cache/mim_jax",
    init_from=dict(encoder="", tokenizer=""),  # the folders of runs; "random": none, to rehearse
    objective=dict(name=str),
    optimizer=dict(
        name=str,
        base_lr=0.0,  # the rate is lr, or base_lr x batch_size / 256
        lr=0.0,
        min_lr=0.0,
        warmup_epochs=0.0,
        warmup_steps=0,
        decay_epochs=0.0,  # when it is min_lr; 0: at the end
        decay_steps=0,
        schedule="mae",  # or "beit": by whose code, see optim.warmup_cosine
        clip_norm=0.0,  # 0: gradients are not clipped
    ),
    ema=0.0,  # decay of the average of the parameters that is evaluated; 0: there is none
    log=dict(every_epochs=0.0, every_steps=50, tensorboard=False, wandb=""),
    evaluate=dict(every_epochs=0.0, every_steps=0, limit=0),  # limit: so many examples, 0: all
    pictures=dict(every_epochs=0.0, every_steps=0, count=12),
    probe=dict(every_epochs=0.0, every_steps=0, images=0),  # images of each split, 0: no probe
    save=dict(every_epochs=0.0, every_steps=0, keep=3),
)
NETWORKS = {"model": vit, "tokenizer": dvae}  # an objective has those that it takes
DTYPES = ("auto", "bfloat16", "float32", "float64")  # float16 would need its loss scaled
# Arguments that no config gives.
SUPPLIED = (*NETWORKS, "num_labels", "learning_rate", "labelled", "process", "processes")
# What may change while a run goes on; all else is compared with what it was begun with.
FREE = (
    *("accumulate", "fsdp", "compile_cache", "model.remat"),
    *("log", "evaluate", "pictures", "probe", "save"),
    *("data.name", "data.data_dir", "data.labels"),  # what is in it decides, its fingerprint
    *("data.threads", "data.workers", "data.evaluation_split", "data.max_bad_fraction"),
    *("data.crop_fraction", "data.evaluation_interpolation"),
)


class Range(NamedTuple):
    """Where the numbers of a key must lie."""

    holds: Callable[[float], bool]
    words: str


NOT_NEGATIVE = Range(lambda x: x >= 0, "0 or more")
POSITIVE = Range(lambda x: x > 0, "more than 0")
COUNT = Range(lambda x: x >= 1, "1 or more")
SHARE = Range(lambda x: 0 <= x <= 1, "0 to 1")
BELOW_1 = Range(lambda x: 0 <= x < 1, "0 or more, and less than 1")
RANGES = {  # of all that are not just 0 or more
    **dict.fromkeys(("batch_size", "accumulate", "save.keep", "data.channels"), COUNT),
    **dict.fromkeys(("data.size", "model.patch"), COUNT),
    **dict.fromkeys(("objective.min_block", "objective.mask_unit", "objective.window"), COUNT),
    **dict.fromkeys(("objective.decoder_width", "objective.decoder_heads"), COUNT),
    **dict.fromkeys(("tokenizer.vocabulary", "tokenizer.width", "tokenizer.stem"), COUNT),
    **dict.fromkeys(("ema", "optimizer.b1", "optimizer.b2", "optimizer.momentum"), BELOW_1),
    **dict.fromkeys(("data.max_bad_fraction", "data.crop_scale", "objective.mask_ratio"), SHARE),
    **dict.fromkeys(("objective.smoothing", "objective.erasing"), SHARE),
    "seed": Range(lambda x: 0 <= x < 2**32, f"0 to {2**32 - 1}"),
    "model.drop_path": BELOW_1,
    "optimizer.layer_decay": Range(lambda x: 0 < x <= 1, "more than 0, and 1 at most"),
    "objective.std": POSITIVE,
    "objective.mean": Range(math.isfinite, "a number"),
    "objective.tuned_blocks": Range(lambda x: x >= 0 or x == -1, "0 or more, or -1"),
    "data.fill": Range(lambda x: 0 <= x <= 255, "0 to 255"),
}
PAIRS = ("data.size", "data.tokenizer_size", "model.patch")  # one number, or two


class Run(NamedTuple):
    """What a config describes, built."""

    objective: objectives.Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # step -> learning rate
    data: data.Data
    mesh: jax.sharding.Mesh
    steps: int
    steps_per_epoch: float
    rows: int  # images computed at once, over all devices: a batch, or a part of it
    labelled: bool  # whether the objective needs labels
    story: str  # the arithmetic, for people

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of one."""
        batch = {
            name: jax.ShapeDtypeStruct((1, *shape), self.data.dtype)
            for name, shape in self.data.views.items()
        }
        for name in ("index", "label") if self.data.num_labels else ("index",):
            batch[name] = jax.ShapeDtypeStruct((1,), jnp.int32)
        return batch


def load(path: str, overrides: Sequence[str] = (), smoke: bool = False) -> ConfigDict:
    """The config of a file, made complete, then changed by overrides "key=value".

    With `smoke` it is made small before that: a tiny model, the built-in images, 20 steps.
    Raises UserError for a missing file, a key that does not exist, a value of a wrong type or out
    of range.
    """
    for override in overrides:
        if "=" not in override:
            raise UserError(f"--config.{override} has no value: say --config.{override}=VALUE.")
    given, changes = read(path), [override.split("=", 1) for override in overrides]
    changed = ""
    for key, text in changes:
        if key in ("objective.name", "optimizer.name"):  # which decide what other keys there are
            block = given.get(key.split(".")[0], {})
            if block.get("name", text) != text:
                changed = f" (it is for {block['name']}; for {text} write a config of its own)"
            block["name"] = text
    try:
        config = complete(given)
    except UserError as error:
        raise UserError(f"{path}: {error}{changed}") from None
    if smoke:
        shrink(config)
    for key, text in changes:
        set_key(config, key, parse(text, kind_of(config, key)))
    return config


def read(path: str) -> dict:
    """What get_config() of a Python file returns, or the config of a run, by its folder.

    A file may import its neighbours, as configs.x.
    """
    file = Path(path)
    if (file / "config.json").is_file():
        try:
            record = json.loads((file / "config.json").read_text())
        except ValueError as error:
            raise UserError(f"{file / 'config.json'} is damaged: {error}.") from None
        if "converted from" in record["trajectory"]:
            raise UserError(
                f"{path} holds converted weights, and no word of data: say a config file, and "
                f"--config.init_from.encoder={path}, or tokenizer."
            )
        return record["config"]
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [f.name for f in file.parent.glob("*.py")], 1)
        hint = f": did you mean {file.parent / near[0]}?" if near else "."
        raise UserError(f"there is no config file {path}{hint}")
    sys.path.insert(0, str(file.absolute().parent.parent))
    try:
        get_config = runpy.run_path(str(file)).get("get_config", lambda: None)
        config = get_config()
    except UserError:
        raise
    except Exception as error:  # of many kinds, by what stands in the file
        if isinstance(error, SyntaxError):
            line, what = error.lineno, error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == str(file)), 1)
            what = error
        raise UserError(
            f"{path}, line {line}: {type(error).__name__}: {what}: a config is a Python file with "
            "get_config()."
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} needs a function get_config() that returns a ConfigDict.")
    return config.to_dict()


def functions(config: Mapping) -> dict[str, Callable]:
    """The function that each block of a config is for."""
    for block in ("objective", "data", "optimizer"):
        if block not in config:
            raise UserError(f"the config has no block {block!r}.")
    for block in ("objective", "optimizer"):
        if "name" not in config[block]:
            raise UserError(f"the config must say {block}.name.")
    there = [module.name for module in pkgutil.iter_modules(objectives.__path__)]
    objective = choose("objective.name", config["objective"]["name"], there)
    optimizer = choose("optimizer.name", config["optimizer"]["name"], optim.OPTIMIZERS)
    objective = importlib.import_module(f"mim_jax.objectives.{objective}").objective
    takes = inspect.signature(objective).parameters
    return {name: network for name, network in NETWORKS.items() if name in takes} | {
        "objective": objective,
        "optimizer": optim.OPTIMIZERS[optimizer],
        "data": data.make,
    }


def choose(key: str, name: str, there: Iterable[str]) -> str:
    """`name`, if it is there; if it is not, UserError says what is."""
    if name not in (there := sorted(there)):
        raise UserError(f"{key} = {name!r} is unknown; there are {', '.join(there)}.")
    return name


def complete(given: dict) -> ConfigDict:
    """A config with all keys there are; those that are not given have their defaults."""
    full = copy.deepcopy(DEFAULTS)
    for block, function in functions(given).items():
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in SUPPLIED:
                full.setdefault(block, {}).setdefault(name, parameter.default)
    for block in ("objective", "optimizer"):
        full[block]["name"] = given[block]["name"]
    for block in full.keys() & NETWORKS:
        full[block]["dtype"] = "auto"  # bfloat16, but float32 on a CPU
    config = ConfigDict(full)
    for key, value in given.items():
        for name, inner in value.items() if isinstance(value, dict) else [("", value)]:
            set_key(config, f"{key}.{name}".strip("."), inner)
    for key, value in flatten(config).items():
        if isinstance(value, type):
            raise UserError(f"the config must say {key}.")
    return config


def kind_of(config: ConfigDict, key: str) -> Any:
    """The type that a key's value must have. Raises UserError if there is no such key."""
    known = flatten(config)
    if key not in known:
        if key in config:
            raise UserError(f"{key} is a block: say {key}.{next(iter(config[key]))} or another.")
        near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.endswith(key)]
        raise UserError(
            f"the config has no key {key}" + (f": did you mean {near[0]}?" if near else ".")
        )
    block, _, name = key.rpartition(".")
    function = functions(config).get(block)
    hints = get_type_hints(function) if function else {}
    value = known[key]
    return hints[name] if name in hints else value if isinstance(value, type) else type(value)


def parse(text: str, kind: Any) -> Any:
    """A value as typed: a Python literal, true or false, or just text."""
    if kind is str or get_origin(kind) is Literal:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key that there is to a value of its type, in its range."""
    kind = kind_of(config, key)
    if isinstance(value, list):
        value = tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choose(key, value, filter(None, get_args(kind)))
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key} = {value!r} must be {getattr(kind, '__name__', kind)}.")
    numbers = [x for x in np.ravel(value).tolist() if isinstance(x, int | float)]
    where = RANGES.get(key, NOT_NEGATIVE)
    if not all(math.isfinite(x) and where.holds(x) for x in numbers):
        raise UserError(f"{key} = {value!r}: say {where.words}.")
    if key in PAIRS and len(numbers) != 2 and isinstance(value, tuple):
        raise UserError(f"{key} = {value!r}: say one number, or two: of rows and of columns.")
    block, _, name = key.rpartition(".")
    with config.ignore_type():
        (config[block] if block else config)[name] = value


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"optimizer.base_lr": 1.5e-4, ...}"""
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict | ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def shrink(config: ConfigDict) -> None:
    """Any config as a rehearsal: all that its run does, in under a minute on two cores."""
    if "model" in config:
        patch = config.model.patch
        p, q = (patch, patch) if isinstance(patch, int) else patch
    else:
        p = q = config.tokenizer.stem * 2**config.tokenizer.layers
    devices = jax.device_count()
    rows, there = 2 * -(-8 // devices), flatten(config)  # a device's, even: mixup takes pairs
    small = {
        "model": dict(size="", width=64, depth=2, heads=2),
        "tokenizer": dict(vocabulary=64, width=8, blocks=1, codebook=8),
        "init_from": dict(encoder="", tokenizer="random"),
        "objective": dict(
            mean=(0.5,),
            std=(0.5,),
            decoder_width=32,
            decoder_depth=1,
            decoder_heads=2,
            num_masked=6,
            min_block=2,
            mixup_group=rows,
            batch_norm=rows if there.get("objective.batch_norm") else 0,
        ),
        "data": dict(
            name="emoji", data_dir="", labels="", split="train", evaluation_split="validation"
        ),
        "optimizer": dict(
            warmup_epochs=0.0, warmup_steps=2, decay_epochs=0.0, decay_steps=0, min_lr=0.0
        ),
        "log": dict(every_steps=5),
        "evaluate": dict(every_epochs=0.0, every_steps=10, limit=100),
        "pictures": dict(every_epochs=0.0, every_steps=10),
        "probe": dict(every_epochs=0.0, every_steps=10),
        "save": dict(every_epochs=0.0, every_steps=10),
    }
    for block, values in small.items():
        for name, value in values.items():
            if f"{block}.{name}" in there:
                set_key(config, f"{block}.{name}", value)
    config.update(batch_size=rows * devices, steps=20, accumulate=1)
    if config.data.tokenizer_size:  # as many patches in the one as tokens in the other
        tokens = np.multiply(config.data.tokenizer_size, (4 * p, 4 * q)) // config.data.size
        set_key(config, "data.tokenizer_size", tuple(tokens.tolist()))
    set_key(config, "data.size", (4 * p, 4 * q))
    set_key(config, "data.channels", 3)


def in_steps(block: Mapping, what: str, steps_per_epoch: float) -> int:
    """A duration in steps: the block's `what_steps` if given, else its `what_epochs`."""
    return block[f"{what}_steps"] or round(block[f"{what}_epochs"] * steps_per_epoch)


def rate(config: ConfigDict) -> float:
    """The learning rate after warm-up: as it is given, or for 256 images."""
    return config.optimizer.lr or config.optimizer.base_lr * config.batch_size / 256


def build(config: ConfigDict, devices: list | None = None) -> Run:
    """The objects of a run, on all devices there are or on these. Nothing is compiled; data sets
    are opened.

    Raises UserError where the config cannot be run on these devices.
    """
    mesh = make_mesh(devices, fsdp=config.fsdp)
    device = mesh.devices.flat[0]
    batch_size, accumulate = config.batch_size, config.accumulate
    if batch_size % (mesh.size * accumulate):
        raise UserError(
            f"batch_size = {batch_size} cannot be split over {mesh.size} devices x {accumulate} "
            f"parts: make it a multiple of {mesh.size * accumulate}."
        )
    objective = functions(config)["objective"]
    labelled = "num_labels" in inspect.signature(objective).parameters
    dataset = data.make(
        **config.data.to_dict(), labelled=labelled,
        process=jax.process_index(), processes=jax.process_count(),
    )  # fmt: skip
    networks = {name: config[name].to_dict() for name in NETWORKS if name in config}
    for name, network in networks.items():
        if choose(f"{name}.dtype", network["dtype"], DTYPES) == "auto":
            network["dtype"] = "float32" if device.platform == "cpu" else "bfloat16"
    settings = {name: value for name, value in config.objective.to_dict().items() if name != "name"}
    if labelled:
        settings["num_labels"] = dataset.num_labels
    objective = objective(**networks, **settings)
    for part in objective.needs:
        if not config.init_from[part]:
            raise UserError(
                f"{config.objective.name} needs a trained {part}: say "
                f"--config.init_from.{part}=RUN, the folder of a run of configs/dvae_emoji.py or "
                "of configs/dvae.py."
            )

    steps_per_epoch = dataset.examples / batch_size
    steps = config.steps or int(config.epochs * steps_per_epoch)
    if steps < 1:
        raise UserError("the config must say epochs or steps.")
    lr = rate(config)
    if not lr > 0:
        raise UserError("the config must say optimizer.base_lr or optimizer.lr.")
    warmup = in_steps(config.optimizer, "warmup", steps_per_epoch)
    decay = in_steps(config.optimizer, "decay", steps_per_epoch) or steps
    schedule = optim.warmup_cosine(
        lr,
        min_lr=config.optimizer.min_lr,
        warmup_steps=warmup,
        steps=decay,
        code=choose("optimizer.schedule", config.optimizer.schedule, ("mae", "beit")),
    )
    takes = inspect.signature(optim.OPTIMIZERS[config.optimizer.name]).parameters
    optimizer = optim.OPTIMIZERS[config.optimizer.name](
        schedule, **{name: v for name, v in config.optimizer.to_dict().items() if name in takes}
    )
    if config.optimizer.clip_norm:
        clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
        optimizer = optax.chain(clip, optimizer)
    height, width, channels = dataset.views["image"]
    base = f"base_lr x batch / 256 = {config.optimizer.base_lr:g} x {batch_size} / 256 = "
    story = hidden(config, height, width) + (
        f"{dataset.examples:,} images, seen at {height} x {width} x {channels}, "
        f"{steps_per_epoch:.1f} batches of {batch_size} an epoch\n"
        f"steps = {steps / steps_per_epoch:.1f} epochs x {dataset.examples:,} / {batch_size} = "
        f"{steps:,}, of them {warmup:,} warm-up\n"
        f"lr = {'' if config.optimizer.lr else base}{lr:g}\n"
        f"batch = {mesh.size} devices ({device.device_kind}) x {accumulate} parts x "
        f"{batch_size // mesh.size // accumulate} images, computed in "
        f"{next(iter(networks.values()))['dtype']}"
    )
    if mesh.shape["fsdp"] > 1:
        story += f"\nparameters and optimizer state are split over {mesh.shape['fsdp']} devices"
    return Run(
        objective, optimizer, schedule, dataset, mesh, steps, steps_per_epoch,
        rows=batch_size // accumulate, labelled=labelled, story=story,
    )  # fmt: skip


def encoder(config: ConfigDict) -> Callable:
    """The run's encoder as `objectives.whole_images` has it.

    Raises UserError where the config's objective has none.
    """
    if "model" not in config:
        raise UserError(f"{config.objective.name} has no encoder.")
    settings = config.model.to_dict()
    if settings["dtype"] == "auto":
        settings["dtype"] = "float32"
    return objectives.whole_images(vit(**settings), config.objective.mean, config.objective.std)


def hidden(config: ConfigDict, height: int, width: int) -> str:
    """How many patches there are, and how many the objective hides, for people."""
    if "model" not in config:
        return ""
    p, q = np.broadcast_to(config.model.patch, 2)
    patches = height // p * (width // q)
    text = f"patches = {height} / {p} x {width} / {q} = {patches}"
    if "mask_ratio" in config.objective:
        visible = int(patches * (1 - config.objective.mask_ratio))
        ratio = f"mask_ratio = {config.objective.mask_ratio:g}"
        text += f", of them {patches - visible} hidden and {visible} visible ({ratio})"
    return f"{text}\n"


def trajectory(config: ConfigDict, dataset: data.Data) -> dict[str, Any]:
    """All that decides where training goes: two runs with the same go the same way."""
    keys = flatten(config)
    decisive = {k: v for k, v in keys.items() if k not in FREE and k.split(".")[0] not in FREE}
    return decisive | {f"data set's {k}": v for k, v in dataset.fingerprint.items()}
