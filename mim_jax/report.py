"""Writes one HTML page about a run, or about several to compare them.

    mim-jax report runs/mae_emoji
    mim-jax report runs/a runs/b --to=compare.html

The page is self-contained: it loads no other files. Sections that are computed from the newest
checkpoint (attention, tokens, predictions) need the run's data; --files-only leaves them out. A
report can also be written for a run that is still running or was killed. Extra: [report].

Exit codes: 0 done, 2 user error.
"""

import base64
import hashlib
import inspect
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from mim_jax import UserError, __version__, cli, goodput, schema, workdir
from mim_jax.curves import Reference, Series, chart
from mim_jax.findings import Codebook, Findings, Predictions, examine
from mim_jax.runs import RecordedRun, best, headline, is_better, read_run
from mim_jax.sheets import to_rgb

LARGEST = 5_000_000  # bytes of a page
FRAMES = 9  # sheets of pictures over time
MATRIX = 24  # largest number of classes for which a confusion matrix is shown
MOST_FAULTS = 20  # warnings and failures that are listed
EVALUATION = "evaluate/"
ABSENT = "-"  # shown for a key that a run does not have
TEMPLATES = epath.Path(__file__).parent / "templates"

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
    "lr": ("Learning rate", "after warm-up and decay"),
    "grad_norm": ("Gradient norm", "before clipping; peaks mark unstable steps"),
    "images_per_second": ("Speed", "images per second, over all chips"),
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
HIDDEN = ("step", "epoch", "time", "images_per_second_per_chip")  # not drawn


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, local or a bucket")
    parser.add_argument("--to", default="", help="the HTML file; default: RUN/report.html")
    parser.add_argument(
        "--files-only", action="store_true", help="compute nothing from the checkpoint"
    )
    parser.add_argument("--trust-code", action="store_true", help="as in mim-jax train")
    options = parser.parse_args(argv)
    to = workdir.open_path(options.to or f"{options.runs[0].rstrip('/')}/report.html")

    def command() -> int:
        template()  # fail early if Jinja is missing
        recorded = [read_run(path) for path in options.runs]
        findings = [
            Findings() if options.files_only else examine(str(run.path), options.trust_code)
            for run in recorded
        ]
        page = fitted(recorded, findings)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(page)
        print(f"{to}: {len(page.encode()) / 1e6:.1f} MB")
        return 0

    return cli.exit_code(command, str(to))


def fitted(runs: Sequence[RecordedRun], findings: Sequence[Findings]) -> str:
    """Returns the page, with as many pictures as the size limit allows."""
    frames = FRAMES
    while len((page := render(runs, findings, frames)).encode()) > LARGEST and frames:
        frames //= 2
    if len(page.encode()) > LARGEST:  # many runs
        reason = "attention, tokens and predictions: the page would be too large"
        page = render(runs, [Findings(missing=(reason,))] * len(runs), frames)
    return page


def template():
    """Returns the page's template, which escapes every value."""
    try:
        import jinja2
    except ImportError:
        raise UserError("a report needs Jinja: pip install 'mim-jax[report]'.") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html")


def render(runs: Sequence[RecordedRun], findings: Sequence[Findings], frames: int = FRAMES) -> str:
    """Returns the HTML page of some runs and the findings of each."""
    style, script = (TEMPLATES.joinpath(f"report.{kind}").read_text() for kind in ("css", "js"))
    names = distinct([run.name for run in runs])
    sections = [
        section(run, result, name, color, frames)
        for color, (run, result, name) in enumerate(zip(runs, findings, names, strict=True))
    ]
    return template().render(
        title=" and ".join(names) if len(names) < 3 else f"{len(names)} runs",
        runs=sections,
        charts=charts(runs, names),
        differences=differences(runs),
        names=names,
        style=style,
        script=script,
        digests={kind: digest(text) for kind, text in (("style", style), ("script", script))},
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )


def digest(text: str) -> str:
    """Returns the hash of an inline script or style for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def distinct(names: Sequence[str]) -> list[str]:
    """Returns names, numbered where they are equal."""
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


# --- Curves ---


class Chart(NamedTuple):
    """A chart with its heading."""

    title: str
    meaning: str
    svg: str
    keys: list[tuple[str, int, bool]]  # label, color and whether it is dashed


def charts(runs: Sequence[RecordedRun], names: Sequence[str]) -> list[Chart]:
    """Returns a chart of each metric that any run has, known ones first."""
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
            title, meaning = TITLES.get(metric, (spelled(metric), ""))
            zero = metric in FROM_ZERO
            scale = False if metric in (*LINEAR, *FROM_ZERO) else None
            marks = references(metric, runs)
            svg = chart(title, lines, marks, scale, last=last, from_zero=zero)
            keys = [(line.label, line.color % 8, line.dashed) for line in lines]
            both = len(runs) > 1 or len(keys) > 1
            drawn.append(Chart(title, meaning, svg, keys if both else []))
    return drawn


def spelled(metric: str) -> str:
    """Returns the name of a metric as words."""
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def references(metric: str, runs: Sequence[RecordedRun]) -> list[Reference]:
    """Returns reference values of a metric: the chance level, limits, and what others published."""
    published = json.loads((TEMPLATES / "published.json").read_text())
    marks = set()
    for run in runs:
        values = schema.flatten(run.config)
        for entry in published:
            same = all(values.get(key) == value for key, value in entry["where"].items())
            if metric == entry["metric"] and same:
                marks.add(Reference(entry["low"], entry["label"], entry["high"]))
        objective, classes = run.config["objective"], len(class_names(run))
        vocabulary = run.config["tokenizer"]["vocabulary"] if "tokenizer" in run.config else 0
        if metric in ("accuracy", "probe_knn", "probe_linear") and classes:
            marks.add(Reference(1 / classes, f"chance: 1 of {classes}"))
        if metric == "loss" and objective.get("target") == "normalized_pixels":
            marks.add(Reference(1.0, "each patch in its mean color"))
        if metric == "loss" and objective.get("target") == "tokens" and vocabulary:
            marks.add(Reference(math.log(vocabulary), "all tokens equally likely"))
        if metric == "perplexity" and vocabulary:
            marks.add(Reference(float(vocabulary), "all codes in even use"))
        if metric == "input_wait":
            marks.add(Reference(0.1, "slow input"))
    return sorted(marks)


def class_names(run: RecordedRun) -> list[str]:
    """Returns the names of the classes of a run's data."""
    return [str(name) for name in workdir.class_names_of(run.record)]


# --- Keys ---


class Setting(NamedTuple):
    """A key of a config."""

    key: str
    value: str
    default: str  # "" if every config must set it
    changed: bool
    meaning: str


def settings(run: RecordedRun) -> list[Setting]:
    """Returns the keys of a run's config, and whether each has its default."""
    try:
        keys = schema.keys_of(run.config)
    except Exception:  # an objective that this installation does not have
        keys = {}
    rows = []
    for key, value in schema.flatten(run.config).items():
        entry = keys.get(key)
        unset = inspect.Parameter.empty
        default_value = unset if entry is None else entry.default
        required = default_value is unset
        default = "" if required else plain(default_value)
        changed = required or default != plain(value)
        rows.append(Setting(key, plain(value), default, changed, entry.meaning if entry else ""))
    return rows


def plain(value: Any) -> str:
    """Formats a value of a config; tuples and lists are equal."""
    if isinstance(value, tuple | list):
        return f"({', '.join(plain(x) for x in value)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """Returns the keys whose values differ between runs: (key, value of each run)."""
    settings = [{k: plain(x) for k, x in schema.flatten(run.config).items()} for run in runs]
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    rows = [(key, [of_run.get(key, ABSENT) for of_run in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


# --- One run ---


def section(
    run: RecordedRun, findings: Findings, name: str, color: int, frames: int
) -> dict[str, Any]:
    """Returns the template's variables for one run."""
    names = class_names(run)
    return dict(
        name=name,
        color=color % 8,
        run=run,
        numbers=numbers(run),
        problems=problems(run),
        sheets=sheets(run, frames),
        attention=grid_of(findings.attention) if findings.attention else None,
        codebook=codebook_of(findings.codebook) if findings.codebook else None,
        predictions=(predictions_of(findings.predictions, names) if findings.predictions else None),
        by_class=by_class(run, names),
        missing=findings.missing,
        settings=settings(run),
        facts=facts(run),
        class_names=names,
    )


def numbers(run: RecordedRun) -> list[tuple[str, str, str]]:
    """Returns the figures at the top: label, value and a note."""
    rows = []
    metric = headline(run)
    wanted = ["loss", metric, "evaluate/probe_knn", "evaluate/probe_linear"]
    for key in dict.fromkeys(wanted):
        points = run.series(key)
        if not points:
            continue
        title = TITLES.get(key.removeprefix(EVALUATION), (key, ""))[0]
        note = "in training" if key == "loss" else "on the evaluation split"
        if (top := best(key, points)) and top[0] != points[-1][0]:
            word = "lowest" if is_better(key, 0, 1) else "highest"
            note += f"; {word} {top[1]:.4g} at step {top[0]:,}"
        rows.append((title, f"{points[-1][1]:.4g}", note))
    speeds = [y for _, y in run.series("images_per_second")]
    if speeds:
        note = "images per second, median"
        if chips := [y for _, y in run.series("images_per_second_per_chip")]:
            note += f"; {np.median(chips):,.4g} per chip"
        rows.append(("Speed", f"{np.median(speeds):,.4g}", note))
    seconds = goodput.newest(run.metrics)
    if total := sum(seconds.values()):
        rows.append(("Time", duration(total), f"of all processes: {goodput.describe(seconds)}"))
        rows.append(("Goodput", f"{seconds['step'] / total:.1%}", "of the time in training steps"))
    return rows


def duration(seconds: float) -> str:
    """Formats a duration with two units."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours % 24)} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(minutes)} min {int(seconds % 60)} s" if minutes >= 1 else f"{seconds:.0f} s"


def problems(run: RecordedRun) -> list[tuple[str, str]]:
    """Returns warnings and failures: (place, text)."""
    rows = []
    if run.status == "stale":
        rows.append(
            (f"step {run.step:,}", "The process ended without a word. Run the same command again.")
        )
    usual = ("start", "stopped", "done")
    faults = [event for event in run.events if event["event"] not in usual]
    for event in faults[-MOST_FAULTS:]:
        rows.append((f"step {event['step']:,}", str(event.get("text", ""))))
    if len(faults) > MOST_FAULTS:
        rows.append(("before", f"{len(faults) - MOST_FAULTS:,} more, in events.jsonl"))
    for key in dict.fromkeys(name for record in run.metrics for name in record):
        bad = [step for step, value in run.series(key) if not math.isfinite(value)]
        if bad:
            rows.append((f"step {bad[0]:,}", f"{key} is not finite in {len(bad):,} record(s)."))
    bad_files = workdir.read_lines(run.path / "bad_files.jsonl")
    if bad_files:
        first = ", ".join(str(record.get("file", "")) for record in bad_files[:3])
        count = f"{len(bad_files):,} file{'s' if len(bad_files) > 1 else ''}"
        rows.append(("data", f"{count} could not be used, first {first}."))
    for path in sorted((run.path / "checkpoints").glob("*.corrupt-*")):
        rows.append((f"step {path.name.split('.')[0]}", "A checkpoint was corrupt: set aside."))
    return rows


def facts(run: RecordedRun) -> list[tuple[str, str]]:
    """Returns facts about the run's code, devices and data."""
    record, data = run.record, run.record.get("data", {})
    git = record.get("git") or {}
    commit = str(git.get("commit", ""))[:12] + (" with changes" if git.get("changed") else "")
    names = class_names(run)
    shown = ", ".join(names[:40]) + (f", ... ({len(names):,})" if len(names) > 40 else "")
    versions = ", ".join(f"{k} {x}" for k, x in record.get("versions", {}).items())
    starts = sum(event["event"] == "start" for event in run.events)
    rows = [
        ("Directory", str(run.path)),
        ("Objective", run.objective),
        ("Data", str(run.config["data"].get("name", ""))),
        ("Images", f"{data['images']:,} for training" if "images" in data else ""),
        ("Evaluation images", f"{data.get('evaluation_images', 0):,}" if data else ""),
        ("Classes", shown),
        ("Devices", str(record.get("devices", ""))),
        ("Processes started", f"{starts}" if starts else ""),
        ("Versions", versions),
        ("Commit", commit),
        ("Code of the objective", str(record.get("code", ""))),
    ]
    return [(name, text) for name, text in rows if text]


# --- Pictures ---


class Picture(NamedTuple):
    """An image inside the page."""

    source: str  # a data URI
    width: int
    height: int
    text: str = ""


def embedded(image: Image.Image, text: str = "", lossless: bool = False) -> Picture:
    """Returns an image as part of the page."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=80, lossless=lossless, method=4)
    source = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(source, *image.size, text)


def sheets(run: RecordedRun, frames: int) -> list[Picture]:
    """Returns sheets of pictures over time, evenly spread, with the last one."""
    paths = sorted((run.path / "pictures").glob("step_*.png"))
    if not paths or not frames:
        return []
    places = np.linspace(0, len(paths) - 1, min(frames, len(paths))).round().astype(int)
    drawn = []
    for path in (paths[i] for i in dict.fromkeys(places.tolist())):
        try:
            image = Image.open(io.BytesIO(path.read_bytes()))
            image.thumbnail((1100, 1400))
        except OSError:  # it is being written
            continue
        drawn.append(embedded(image, f"step {int(path.name[5:-4]):,}"))
    return drawn


class Grid(NamedTuple):
    """A table of images."""

    captions: list[str]
    rows: list[list[Picture]]


def grid_of(columns: Mapping[str, np.ndarray], most: int = 14) -> Grid:
    """Returns columns of images as a table, of which at most `most` columns are shown."""
    captions = list(columns)[:most]
    side = min(176, max(112, 1080 // len(captions)))
    rows: list[list[Picture]] = []
    for images in zip(*(to_rgb(np.asarray(columns[name])) for name in captions), strict=True):
        rows.append([])
        for caption, image in zip(captions, images, strict=True):
            rows[-1].append(tile(image, caption, side))
    return Grid(captions, rows)


def tile(image: np.ndarray, text: str, side: int) -> Picture:
    """Returns an image (H, W, 3) at most `side` pixels wide; small ones are enlarged."""
    zoom = max(1, side // max(image.shape[:2]))
    enlarged = Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1))
    enlarged.thumbnail((side, side))
    return embedded(enlarged, text)


# --- Tokens and classes ---


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


def named(label: int, names: Sequence[str]) -> str:
    """Returns the name of a class, or its number."""
    return names[label] if label < len(names) else str(label)


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
        written = json.loads(path.read_text()) if path.exists() else {}
        table = np.array(written["by_class"], np.float64)
        heads = ["accuracy", "IoU"][: table.shape[1] - 1]
    except (ValueError, KeyError, IndexError, TypeError):  # incomplete, or without classes
        return None
    rows = [
        (named(i, names), float(row[0]), [float(x) for x in row[1:3]])
        for i, row in enumerate(table)
        if row[0] > 0 and np.isfinite(row).all()
    ]
    rows.sort(key=lambda row: row[2][-1])
    return dict(heads=heads, rows=rows[:60], all=len(rows), step=written.get("step", 0))


if __name__ == "__main__":
    cli.exit_with(main)
