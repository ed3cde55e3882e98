"""Results by token or class for a report: codes in use, confusions, IoU."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mim_jax import workdir
from mim_jax.report.findings import Codebook, Predictions
from mim_jax.report.images import grid_of, tile
from mim_jax.report.svg import Reference, Series, chart
from mim_jax.runs import RecordedRun
from mim_jax.sheets import to_rgb

MATRIX = 24  # largest number of classes for which a confusion matrix is shown


def codebook_of(book: Codebook) -> dict[str, Any]:
    """Returns the use of a codebook, and images with their tokens."""
    counts = np.sort(book.counts)[::-1]
    shares = counts / max(1, counts.sum())
    places = np.unique(np.linspace(0, len(shares) - 1, 400).round().astype(int))
    points = [(int(i) + 1, float(shares[i])) for i in places if shares[i] > 0]
    even = [Reference(1 / len(shares), "even use")]
    return dict(
        grid=grid_of(book.columns),
        svg=chart("Share of each code", [Series("share", points)], even, axis="rank"),
        used=book.used,
        vocabulary=len(shares),
        perplexity=book.perplexity,
        tokens=int(counts.sum()),
    )


def predictions_of(predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """Returns the confusion matrix, or the most frequent confusions, and the hardest images."""
    confusion = predictions.confusion
    totals = np.maximum(1, confusion.sum(1, keepdims=True))
    k = len(confusion)
    labels = [named(i, names) for i in range(k)]
    matrix = [
        [(int(n), round(10 * n / total[0])) for n in row]
        for row, total in zip(confusion, totals, strict=True)
    ]
    mistakes = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:20]
    pairs = [(int(i // k), int(i % k)) for i in order if mistakes.flat[i]]
    hardest = [
        (
            tile(to_rgb(hard.image[None])[0], "", 112),
            hard.name,
            named(hard.label, names),
            named(hard.guess, names),
            hard.probability,
        )
        for hard in predictions.hardest
    ]
    return dict(
        accuracy=float(np.trace(confusion) / max(1, confusion.sum())),
        images=int(confusion.sum()),
        labels=labels,
        matrix=matrix if k <= MATRIX else None,
        confusions=[(labels[i], labels[j], int(mistakes[i, j])) for i, j in pairs],
        hardest=hardest,
    )


def by_class(run: RecordedRun, names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the results by class of the newest evaluation, the worst class first."""
    path = run.path / "evaluation.json"
    try:
        written = workdir.read_json(path)
        table, step = np.array(written["by_class"], np.float64), int(written.get("step", 0))
        heads = ["accuracy", "IoU"][: table.shape[1] - 1]
        if table.ndim != 2:
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError, OverflowError):  # or without classes
        return None
    rows = [
        (named(i, names), float(row[0]), [float(x) for x in row[1:3]])
        for i, row in enumerate(table)
        if row[0] > 0 and np.isfinite(row).all()
    ]
    rows.sort(key=lambda row: row[2][-1])
    return dict(heads=heads, rows=rows[:60], all=len(rows), step=step)


def named(label: int, names: Sequence[str]) -> str:
    """Returns the name of a class, or its number."""
    return names[label] if label < len(names) else str(label)
