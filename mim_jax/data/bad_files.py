"""Images that cannot be used: they are replaced and reported; too many are an error."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mim_jax import UserError
from mim_jax.data.decode import BadImageError, decode
from mim_jax.data.sources import Source

# Offsets of the examples to try after a bad one: neighbors, then distant ones, because a whole file
# of examples may be damaged. If none of them can be used, the source itself is broken.
OFFSETS = (*range(16), *(16 << power for power in range(20)))


def usable(view: Callable[[dict], dict], examples: Sequence[dict], i: int) -> dict:
    """Returns view(examples[i]), or the view of the next example that can be decoded.

    The result has a field `bad`: i if example i was replaced, else -1. It is part of the batch,
    because examples may be decoded in other threads or processes.
    Raises UserError if none of the examples at OFFSETS can be decoded.
    """
    for offset in OFFSETS:
        try:
            example = view(examples[(i + offset) % len(examples)])
        except BadImageError as error:
            reason = str(error)
        else:
            return example | {"bad": np.int64(i if offset else -1)}
    raise UserError(f"none of {len(OFFSETS)} images can replace a bad one; the last one: {reason}.")


class BadFiles:
    """Counts the bad files of a source, and raises UserError if there are too many.

    Args:
        most: the largest allowed share of the source's examples.
    """

    def __init__(self, source: Source, channels: int, dtype: str, most: float):
        self.source, self.channels, self.dtype, self.most = source, channels, dtype, most
        self.seen: set[int] = set()

    def noted(self, batches: Iterable[dict], on_bad: Callable[[str, str], None]) -> Iterator[dict]:
        """Yields the batches without `bad`; calls on_bad(name, reason) once for each bad file."""
        for batch in batches:
            for i in set(batch.pop("bad").tolist()) - self.seen - {-1}:
                self.seen.add(i)
                name, reason = self.source.name_of(i), self.reason(i)
                on_bad(name, reason)
                count, total = len(self.seen), len(self.source.examples)
                if count > self.most * total:
                    raise UserError(
                        f"{count:,} of {total:,} images cannot be used, more than "
                        f"data.max_bad_fraction = {self.most:g}; the last one is {name}: {reason}. "
                        "Remove them or raise data.max_bad_fraction."
                    )
            yield batch

    def reason(self, i: int) -> str:
        """Decodes example i again, in the main process, and returns why it cannot be used."""
        try:
            decode(self.source.examples[i]["image"], self.channels, self.dtype)
        except BadImageError as error:
            return str(error)
        return "it could not be read at first, but it can now"
