"""Class names: matching classes by name, because data sets number them differently."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mim_jax import UserError
from mim_jax.data.sources import Source

FIRST = 8  # number of names that are listed


def are_numbers(names: Sequence[str]) -> bool:
    """Returns whether the names of the classes are only their numbers."""
    return all(name == str(number) for number, name in enumerate(names))


def list_names(names: Sequence[str]) -> str:
    """Formats the first names, and the number of the others."""
    more = f" and {len(names) - FIRST:,} more" if len(names) > FIRST else ""
    return ", ".join(names[:FIRST]) + more


def numbers_in(known: Sequence[str], names: Sequence[str], where: str) -> np.ndarray:
    """Returns the number of each of `names` among the `known` names (len(names),).

    There may be fewer names than known ones. If either set has only numbers, both must have the
    same number of classes, which are assumed to be in the same order.

    Args:
        known: the names in the order of their numbers.
        names: the names to look up.
        where: the data set with `names`, for messages.

    Raises UserError if some names are unknown.
    """
    if are_numbers(names) != are_numbers(known):
        if len(names) != len(known):
            raise UserError(
                f"{where} has {len(names):,} classes, but the run was trained on {len(known):,}."
            )
        print(
            f"warning: the classes of {where} are {list_names(names)}, those of the run "
            f"{list_names(known)}: assuming the same order",
            file=sys.stderr,
        )
        return np.arange(len(names))
    numbers = {name: number for number, name in enumerate(known)}
    if unknown := [name for name in names if name not in numbers]:
        raise UserError(
            f"{where} has other classes than those that the run was trained on: "
            f"{list_names(unknown)} {'is' if len(unknown) == 1 else 'are'} not among "
            f"{list_names(known)}."
        )
    return np.array([numbers[name] for name in names])


class Renumbered:
    """Examples whose labels are mapped by a table."""

    def __init__(self, examples: Any, numbers: np.ndarray):
        self.examples, self.numbers = examples, numbers.astype(np.int32)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict:
        example = self.examples[i]
        label = example["label"]
        in_table = 0 <= label < len(self.numbers)  # others are reported when they are used
        return example | {"label": self.numbers[label] if in_table else np.int32(-1)}


def renumber(source: Source, known: Sequence[str], where: str) -> Source:
    """Returns a source whose labels are indices into the `known` names.

    Raises UserError if it has other classes.
    """
    if masks := source.classes:
        numbers = numbers_in(known, masks.names, where)
        if len(numbers) < len(known):
            missing = [name for name in known if name not in masks.names]
            raise UserError(
                f"{where} lacks classes that the run was trained on: {list_names(missing)}."
            )
        order = np.argsort(numbers)
        columns = {
            name: tuple(getattr(masks, name)[i] for i in order)
            for name in ("names", "colors", "values")
        }
        return source._replace(classes=masks._replace(**columns))
    if not source.num_labels or tuple(known) == tuple(source.class_names):
        return source
    return source._replace(
        examples=Renumbered(source.examples, numbers_in(known, source.class_names, where)),
        num_labels=len(known),
        class_names=tuple(known),
    )
