"""Builds the objects of a run from its config. Everything below takes keyword arguments."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mim_jax import UserError, data, objectives, optim, schema
from mim_jax.data.class_names import list_names
from mim_jax.data.examine import size_warnings
from mim_jax.data.statistics import observe, range_problem
from mim_jax.models.dvae import DVAE
from mim_jax.models.vit import ViT
from mim_jax.sharding import make_mesh

OBSERVED = 64  # images whose values are checked before a run


class Run(NamedTuple):
    """The objects that a config describes."""

    objective: objectives.Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # step -> learning rate
    data: data.Data
    mesh: jax.sharding.Mesh
    model: ViT | None
    tokenizer: DVAE | None
    steps: int
    steps_per_epoch: float
    rows: int  # images processed at once, over all devices: a batch, or one part of it
    labeled: bool  # whether the objective needs labels
    summary: str  # text printed at the start, see `describe`

    @property
    def dtype(self) -> str:
        """The compute dtype of the networks; float32 if there is none."""
        network = self.model or self.tokenizer
        return network.dtype if network else "float32"

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of one."""
        return {
            field.name: jax.ShapeDtypeStruct((1, *field.shape), field.dtype)
            for field in self.data.fields
        }

    def require_labels(self, split: str) -> None:
        """Raises UserError if the objective needs labels and the evaluation split has none."""
        if self.labeled and not self.data.evaluation_labeled:
            raise UserError(
                f"the images of {split} have no labels: choose another data.evaluation_split."
            )


def build(config: ConfigDict, devices: list | None = None, class_names: Sequence[str] = ()) -> Run:
    """Builds a run on all devices or on the given ones. Opens data sets, but compiles nothing.

    With `class_names`, labels are indices into these names.

    Raises:
        UserError: if the config cannot be run on these devices.
    """
    mesh = make_mesh(devices, fsdp=config.fsdp)
    if config.batch_size % (mesh.size * config.accumulate):
        raise UserError(
            f"batch_size = {config.batch_size} cannot be split over {mesh.size} devices x "
            f"{config.accumulate} parts: make it a multiple of {mesh.size * config.accumulate}."
        )
    function = objectives.find(config.objective.name)
    takes = inspect.signature(function).parameters
    labeled = "num_labels" in takes
    dataset = data.make(
        **config.data.to_dict(),
        labeled=labeled,
        segmented="segmentation_classes" in takes,
        class_names=class_names if takes.keys() & {"num_labels", "segmentation_classes"} else (),
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    networks = schema.networks(with_dtypes(config, mesh))
    objective = build_objective(config, function, networks, dataset)
    steps_per_epoch = dataset.examples / config.batch_size
    steps = config.steps or int(config.epochs * steps_per_epoch)
    if steps < 1:
        raise UserError("the config must set epochs or steps.")
    schedule = build_schedule(config, steps, steps_per_epoch)
    run = Run(
        objective=objective,
        optimizer=build_optimizer(config, schedule),
        schedule=schedule,
        data=dataset,
        mesh=mesh,
        model=networks.get("model"),
        tokenizer=networks.get("tokenizer"),
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        rows=config.batch_size // config.accumulate,
        labeled=labeled,
        summary="",
    )
    return run._replace(summary=describe(run, config))


def with_dtypes(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict:
    """Returns the config as a dict, with the networks' dtype "auto" resolved."""
    default = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    settings = config.to_dict()
    for name in schema.NETWORKS:
        if settings.get(name, {}).get("dtype") == "auto":
            settings[name]["dtype"] = default
    return settings


def build_objective(config, function, networks: Mapping, dataset) -> objectives.Objective:
    """Builds an objective from its networks and its block of the config."""
    settings = {name: value for name, value in config.objective.to_dict().items() if name != "name"}
    takes = inspect.signature(function).parameters
    supplied = {name: getattr(dataset, name) for name in schema.FROM_DATA if name in takes}
    objective = function(**networks, **supplied, **settings)
    for part in objective.needs:
        if not config.init_from[part]:
            raise UserError(
                f"{config.objective.name} needs a trained {part}: set --config.init_from.{part} to "
                "the directory of a run that trained one."
            )
    return objective


def rebuild_objective(run: Run, config: ConfigDict) -> objectives.Objective:
    """Returns the objective of a changed config, for the data and the devices of a run."""
    networks = schema.networks(with_dtypes(config, run.mesh))
    return build_objective(config, objectives.find(config.objective.name), networks, run.data)


def build_schedule(config, steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Returns the learning rate by step."""
    rate = learning_rate(config)
    if not rate > 0:
        raise UserError("the config must set optimizer.base_lr or optimizer.lr.")
    return optim.warmup_and_decay(
        rate,
        min_lr=config.optimizer.min_lr,
        warmup_steps=warmup_of(config, steps, steps_per_epoch),
        steps=in_steps(config.optimizer, "decay", steps_per_epoch) or steps,
        code=config.optimizer.schedule,
    )


def build_optimizer(config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer, preceded by gradient clipping if the config sets `clip_norm`."""
    function = optim.OPTIMIZERS[config.optimizer.name]
    takes = inspect.signature(function).parameters
    settings = {name: x for name, x in config.optimizer.to_dict().items() if name in takes}
    optimizer = function(schedule, **settings)
    if not config.optimizer.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.optimizer.clip_norm), optimizer)


def in_steps(block: Mapping, name: str, steps_per_epoch: float) -> int:
    """Returns a duration in steps: the block's `name`_steps if given, else its `name`_epochs."""
    return block[f"{name}_steps"] or round(block[f"{name}_epochs"] * steps_per_epoch)


def warmup_of(config: ConfigDict, steps: int, steps_per_epoch: float) -> int:
    """Returns the length of the warm-up in steps.

    If a run is too short for the configured warm-up, for example a trial of a large recipe, it is a
    tenth of the run; `describe` reports it.
    """
    warmup = in_steps(config.optimizer, "warmup", steps_per_epoch)
    return warmup if warmup < steps else steps // 10


def learning_rate(config: ConfigDict) -> float:
    """Returns the learning rate after warm-up: `lr`, or `base_lr` for 256 images."""
    return config.optimizer.lr or config.optimizer.base_lr * config.batch_size / 256


def describe(run: Run, config: ConfigDict) -> str:
    """Summarizes a recipe as text: batch, epochs, learning rate, masked patches."""
    image, size, steps = run.example["image"], config.batch_size, run.steps
    _, height, width, channels = image.shape
    warmup = warmup_of(config, steps, run.steps_per_epoch)
    recipes = in_steps(config.optimizer, "warmup", run.steps_per_epoch)
    shortened = f" (the recipe's {recipes:,} do not fit)" if recipes > warmup else ""
    base = f"base_lr x batch / 256 = {config.optimizer.base_lr:g} x {size} / 256 = "
    device = run.mesh.devices.flat[0]
    lines = [
        f"{run.data.examples:,} images, resized to {height} x {width} x {channels}, "
        f"{run.steps_per_epoch:.1f} batches of {size} per epoch",
        f"steps = {steps / run.steps_per_epoch:.1f} epochs x {run.data.examples:,} / {size} = "
        f"{steps:,}, including {warmup:,} of warm-up{shortened}",
        f"lr = {'' if config.optimizer.lr else base}{learning_rate(config):g}",
        f"batch = {run.mesh.size} x {config.accumulate} x {run.rows // run.mesh.size} (devices x "
        f"parts x images) on {device.device_kind}, computed in {run.dtype}",
    ]
    if run.mesh.shape["fsdp"] > 1:
        shards = run.mesh.shape["fsdp"]
        lines.append(f"parameters and optimizer state are split over {shards} devices")
    if names := run.data.class_names:
        lines.append(f"{len(names):,} classes: {list_names(names)}")
    if run.data.bands:
        lines.append(f"bands: {', '.join(run.data.bands)}")
    sizes = run.data.examples, len(run.data.evaluation.examples), size
    lines += [f"warning: {text}" for text in size_warnings(*sizes)]
    if run.model:
        rows, columns = run.model.grid(image)
        p, q = run.model.patch
        patches = f"patches = {height} / {p} x {width} / {q} = {rows * columns}"
        lines.insert(0, ", ".join(filter(None, (patches, run.objective.describe(image)))))
    return "\n".join(lines)


def observe_values(run: Run, config: ConfigDict) -> tuple[str, str]:
    """Describes the values of some training images, and why they do not fit the objective.

    The second text is "" if they fit.
    """
    values = observe(run.data.train, run.data.image.shape[2], limit=OBSERVED)
    settings = config.objective
    if "mean" in settings and "std" in settings:
        return str(values), range_problem(values, settings.mean, settings.std)
    if range_problem(values, (0.5,), (0.5,)):  # it takes images in [0, 1] as they are
        return str(values), f"{config.objective.name} needs images in [0, 1], these have {values}."
    return str(values), ""


def encoder_of(run: Run, config: ConfigDict):
    """Returns objectives.image_encoder for the run's encoder, in at least float32.

    Raises UserError if the run has no encoder.
    """
    if run.model is None:
        raise UserError(f"{config.objective.name} has no encoder.")
    if not {"mean", "std"} <= set(config.objective):
        raise UserError(f"{config.objective.name} has no mean and std to normalize images with.")
    dtype = jnp.promote_types(run.model.dtype, jnp.float32).name
    model = run.model.clone(dtype=dtype)
    return objectives.image_encoder(model, config.objective.mean, config.objective.std)


def fit_to_devices(config: ConfigDict) -> ConfigDict:
    """Changes fsdp and batch_size of a config so that they fit the local devices."""
    devices, parts = jax.device_count(), jax.device_count() * config.accumulate
    config.update(
        fsdp=math.gcd(config.fsdp or devices, devices),
        batch_size=-(-config.batch_size // parts) * parts,
    )
    return config
