"""The charts of a report: the metrics of runs over their steps, with reference values."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from mim_jax import goodput, schema
from mim_jax.report.svg import Reference, Series, chart
from mim_jax.runs import RecordedRun

EVALUATION = "evaluate/"
TITLES = {  # titles and meanings of the metrics that are shown first
    "loss": ("Loss", "what is minimized"),
    "accuracy": ("Accuracy", "share of predictions that are right"),
    "miou": ("Mean IoU", "intersection over union, averaged over classes"),
    "probe_knn": ("k-NN", "accuracy by the 20 nearest training images in feature space"),
    "probe_linear": ("Linear probe", "accuracy of a linear classifier on the features"),
    "probe_rank": ("Rank of the features", "effective dimensions in use; low: collapse"),
    "perplexity": ("Perplexity of the codebook", "number of codes in even use"),
    "used": ("Codes in use", "share of the codebook"),
    "reconstruction": ("Reconstruction", "negative log-likelihood of the pixels, per value"),
    "kl": ("KL divergence", "nats per token; ln of the vocabulary once tokens are certain"),
    "entropy": ("Entropy of a token", "nats; 0 once tokens are certain"),
    "lr": ("Learning rate", "with warm-up and decay"),
    "grad_norm": ("Gradient norm", "before clipping; peaks mark unstable steps"),
    "images_per_second": ("Speed", "images per second, all chips together"),
    "mfu": ("Utilization", "share of the chips' peak (MFU)"),
    "input_wait": ("Input wait", "share of the time spent waiting for data"),
    "device_memory_gib": ("Device memory", "peak in GiB"),
    "host_memory_gib": ("Host memory", "peak in GiB"),
}
LINEAR = ("lr",)  # metrics that a logarithmic scale would distort
FROM_ZERO = (  # metrics whose small changes are not meaningful
    *("images_per_second", "mfu", "input_wait", "device_memory_gib", "host_memory_gib"),
    "used",
)
PUBLISHED = epath.Path(__file__).parent / "published.json"
HIDDEN = ("step", "epoch", "time", "images_per_second_per_chip")  # not drawn


class Chart(NamedTuple):
    """A chart with its heading."""

    title: str
    meaning: str
    svg: str
    keys: list[tuple[str, int, bool]]  # label, color and whether it is dashed


def charts(runs: Sequence[RecordedRun], names: Sequence[str]) -> list[Chart]:
    """Returns a chart of each metric that any of the runs has, those in TITLES first."""
    recorded = {name: None for run in runs for record in run.metrics for name in record}
    metrics = dict.fromkeys(name.removeprefix(EVALUATION) for name in recorded)
    order = [name for name in TITLES if name in metrics]
    order += sorted(
        name
        for name in metrics
        if name not in (*TITLES, *HIDDEN) and not name.startswith(goodput.PREFIX)
    )
    drawn, last = [], max((run.step for run in runs), default=0)
    for metric in order:
        lines = []
        for color, (run, name) in enumerate(zip(runs, names, strict=True)):
            for prefix, where in (("", "training"), (EVALUATION, "evaluation")):
                if points := run.series(f"{prefix}{metric}"):
                    label = where if len(runs) == 1 else f"{name}, {where}"
                    lines.append(Series(label, points, color, dashed=bool(prefix)))
        if lines:
            title, meaning = TITLES.get(metric, (in_words(metric), ""))
            zero = metric in FROM_ZERO
            scale = False if metric in (*LINEAR, *FROM_ZERO) else None
            marks = references(metric, runs)
            svg = chart(title, lines, marks, scale, last=last, from_zero=zero)
            keys = [(line.label, line.color % 8, line.dashed) for line in lines]
            both = len(runs) > 1 or len(keys) > 1
            drawn.append(Chart(title, meaning, svg, keys if both else []))
    return drawn


def in_words(metric: str) -> str:
    """Returns the name of a metric in words."""
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def references(metric: str, runs: Sequence[RecordedRun]) -> list[Reference]:
    """Returns reference values of a metric: chance level, limits and published values."""
    published = json.loads(PUBLISHED.read_text())
    marks = set()
    for run in runs:
        values = schema.flatten(run.config)
        for entry in published:
            same = all(values.get(key) == value for key, value in entry["where"].items())
            if metric == entry["metric"] and same:
                marks.add(Reference(entry["low"], entry["label"], entry["high"]))
        objective, classes = run.config["objective"], len(run.class_names)
        vocabulary = run.config["tokenizer"]["vocabulary"] if "tokenizer" in run.config else 0
        if metric in ("accuracy", "probe_knn", "probe_linear") and classes:
            marks.add(Reference(1 / classes, f"chance: 1 of {classes}"))
        if metric == "loss" and objective.get("target") == "normalized_pixels":
            marks.add(Reference(1.0, "predicting each patch's mean color"))
        if metric == "loss" and objective.get("target") == "tokens" and vocabulary:
            marks.add(Reference(math.log(vocabulary), "all tokens equally likely"))
        if metric == "perplexity" and vocabulary:
            marks.add(Reference(float(vocabulary), "all codes in even use"))
        if metric == "input_wait":
            marks.add(Reference(0.1, "slow input"))
    return sorted(marks)
