"""Checks of a data set before a run: its channels and its size."""

import io
from collections.abc import Sequence

from mim_jax import UserError
from mim_jax.data.decode import BadImageError, channels_of, header, suits
from mim_jax.data.sources import Source

FIRST = 3  # examples to decode if the mode does not determine the channels


def require_channels(name: str, source: Source, channels: int) -> None:
    """Raises UserError if the images of a source have another number of channels.

    Args:
        name: data.name, for the message.
        source: the data set.
        channels: the expected number of channels.
    """
    if not suits(source.mode, channels):
        count = channels_of(source.mode)
        raise UserError(
            f"data.channels = {channels}, but the images of {name} have {count} ({source.mode}): "
            f"set --config.data.channels={count}."
        )
    if not source.mode.endswith(" array"):
        return
    for i in range(min(FIRST, len(source.examples))):
        try:
            header(io.BytesIO(source.examples[i]["image"]), channels)
        except BadImageError as error:
            problem = f"{source.name_of(i)}: {error}"
        else:
            return
    raise UserError(f"data.channels = {channels} does not fit the images of {name}; {problem}.")


def require_bands(bands: Sequence[str], channels: int) -> None:
    """Raises UserError unless `bands` is empty or has a different name for each channel."""
    if not bands:
        return
    if not all(isinstance(band, str) for band in bands) or len(set(bands)) < len(bands):
        raise UserError(
            f"data.bands = {bands!r} must be different names, for example ('red', 'nir')."
        )
    if len(bands) != channels:
        raise UserError(
            f"data.bands = {bands!r} has {len(bands)} names, but data.channels = {channels}."
        )


def size_warnings(examples: int, evaluation_examples: int, batch_size: int) -> list[str]:
    """Returns warnings about the sizes of a data set, one sentence each.

    Args:
        examples: size of the training split.
        evaluation_examples: size of the evaluation split.
        batch_size: images per update.
    """
    warnings = []
    if batch_size > examples:
        warnings.append(
            f"a batch of {batch_size:,} is larger than the training split, {examples:,} images: "
            "every batch holds some images several times, differently augmented"
        )
    if evaluation_examples == 1:
        warnings.append(
            "the evaluation split has one image, so its metrics mean little: "
            "set --config.data.evaluation_split"
        )
    elif evaluation_examples < 10:
        warnings.append(f"the evaluation split has only {evaluation_examples} images")
    return warnings
