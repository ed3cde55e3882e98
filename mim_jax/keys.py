"""Annotations for config keys: the range, the meaning and the rehearsal value of a key.

A config key is a keyword argument of the function that its block configures. Everything else about
the key is written next to the argument:

    mask_ratio: Annotated[float, Range(0, 1), "share of patches hidden from the encoder"] = 0.75

The string is the key's meaning. Only numbers need a range; `Smoke` and the markers are optional.
"""

import math
from typing import Any, Literal, NamedTuple


class Range(NamedTuple):
    """The interval in which every number of a key must lie. Numbers must be finite."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # exclude `low`
    below: bool = False  # exclude `high`

    def allows(self, x: float) -> bool:
        """Returns whether `x` is finite and inside the interval."""
        low = x > self.low if self.above else x >= self.low
        high = x < self.high if self.below else x <= self.high
        return math.isfinite(x) and low and high

    def __str__(self) -> str:
        low = f"{'greater than' if self.above else 'at least'} {self.low}"
        high = f"{'less than' if self.below else 'at most'} {self.high}"
        bounds = [low] * (self.low > -math.inf) + [high] * (self.high < math.inf)
        return " and ".join(bounds) or "finite"


class Smoke(NamedTuple):
    """The value of a key in a rehearsal (`--smoke`)."""

    value: Any


class Marker(NamedTuple):
    """A property of a key, such as `FREE`."""

    name: str


Dtype = Literal["auto", "bfloat16", "float32", "float64"]  # float16 would need loss scaling
POSITIVE = Range(1)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
BELOW_ONE = Range(0, 1, below=True)
DEPTH = Range(1, 1000)  # numbers of blocks
WIDTH = Range(1, 2**20)  # numbers of channels
# A number of images that must divide the number of images that a device processes at once.
# `--smoke` and `mim-jax check` set such a key to the latter, unless it is 0.
PER_DEVICE = Marker("per device")
# A key that does not change what a run learns; a run may continue with another value.
FREE = Marker("free")


class Key(NamedTuple):
    """A config key, as its annotation describes it."""

    kind: Any  # a type, a union of types or a Literal
    default: Any  # `inspect.Parameter.empty` if every config must set the key
    range: Range
    meaning: str
    smoke: Smoke | None
    markers: tuple[Marker, ...]


def key_of(annotation: Any, default: Any) -> Key:
    """Returns the key that an annotated argument describes."""
    metadata = getattr(annotation, "__metadata__", ())

    def first(kind: type, otherwise: Any) -> Any:
        return next((x for x in metadata if isinstance(x, kind)), otherwise)

    return Key(
        kind=annotation.__origin__ if metadata else annotation,
        default=default,
        range=first(Range, Range()),
        meaning=first(str, ""),
        smoke=first(Smoke, None),
        markers=tuple(x for x in metadata if isinstance(x, Marker)),
    )
