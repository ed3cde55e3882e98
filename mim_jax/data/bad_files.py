"""Files that turn out, in a run, to be no images: replaced, noted, and if many, refused."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mim_jax import UserError
from mim_jax.data.decode import BadImageError, decode
from mim_jax.data.sources import Source

TRIES = 100  # images one after the other: a source is out of order that has so many bad ones


def usable(see: Callable[[dict], dict], examples: Sequence[dict], i: int) -> dict:
    """see(examples[i]), or, where that cannot be, of the next example that can be seen.

    `bad` is then i, else -1: the batch brings it from whatever thread or process looked.
    """
    for j in range(i, i + TRIES):
        try:
            seen = see(examples[j % len(examples)])
        except BadImageError as error:
            reason = str(error)
        else:
            return seen | {"bad": np.int64(-1 if j == i else i)}
    raise UserError(f"{TRIES} images one after the other cannot be used; the last one: {reason}.")


class BadFiles:
    """Takes note of the bad files of a source; UserError when they are more than a share of it."""

    def __init__(self, source: Source, channels: int, dtype: str, most: float):
        self.source, self.channels, self.dtype, self.most = source, channels, dtype, most
        self.seen = set()

    def noted(self, batches: Iterable[dict], on_bad: Callable[[str, str], None]) -> Iterator[dict]:
        """The batches without `bad`. `on_bad` gets the name and the reason of each file once."""
        for batch in batches:
            for i in set(batch.pop("bad").tolist()) - self.seen - {-1}:
                self.seen.add(i)
                name, reason = self.source.name_of(i), self.reason(i)
                on_bad(name, reason)
                count, total = len(self.seen), len(self.source.examples)
                if count > self.most * total:
                    raise UserError(
                        f"{count:,} of {total:,} images cannot be used, more than "
                        f"data.max_bad_fraction = {self.most:g}; the last was {name}: {reason}. "
                        "Remove them, or allow for more."
                    )
            yield batch

    def reason(self, i: int) -> str:
        """Why example i cannot be used: it is tried again, here where it can be reported."""
        try:
            decode(self.source.examples[i]["image"], self.channels, self.dtype)
        except BadImageError as error:
            return str(error)
        return "it could not be read; now it can"
