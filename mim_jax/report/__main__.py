"""Writes an HTML page about a run, or about several runs to compare them.

    mim-jax report runs/mae_emoji
    mim-jax report runs/a runs/b --to=compare.html

The page is self-contained: it loads no other files. Sections that are computed from the newest
checkpoint (attention, tokens, predictions) need the run's data; --files-only leaves them out. A
report can also be written for a run that is still running or was killed. Requires the extra
[report]. Exit codes: 0 done, 2 user error.
"""

import base64
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from mim_jax import UserError, __version__, cli, workdir
from mim_jax.report.charts import charts
from mim_jax.report.facts import differences, facts, numbers, problems, settings
from mim_jax.report.findings import Findings, examine
from mim_jax.report.images import grid_of, sheets
from mim_jax.report.results import by_class, codebook_of, predictions_of
from mim_jax.runs import RecordedRun, read_run

LARGEST = 5_000_000  # bytes of a page
FRAMES = 9  # sheets of pictures over time
TEMPLATES = epath.Path(__file__).parent / "templates"


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("report", __doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run directory, local or in a bucket"
    )
    parser.add_argument("--to", default="", help="the HTML file; default: RUN/report.html")
    parser.add_argument(
        "--files-only", action="store_true", help="compute nothing from the checkpoint"
    )
    parser.add_argument("--trust-code", action="store_true", help="as in mim-jax train")
    options = parser.parse_args(argv)
    cli.require_suffix(parser, options.to, ".html")
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
        if options.to:
            to.write_text(page)
        else:  # a stranger's directory may have a link in its place
            workdir.write_text(to, page)
        print(f"{to}: {len(page.encode()) / 1e6:.1f} MB")
        return 0

    return cli.exit_code(command, str(to))


def fitted(runs: Sequence[RecordedRun], findings: Sequence[Findings]) -> str:
    """Returns the page, with fewer pictures if it would exceed the size limit."""
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


def section(
    run: RecordedRun, findings: Findings, name: str, color: int, frames: int
) -> dict[str, Any]:
    """Returns the template's variables for one run."""
    names = run.class_names
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


def digest(text: str) -> str:
    """Returns the hash of an inline script or style for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def distinct(names: Sequence[str]) -> list[str]:
    """Returns names, numbered where they are equal."""
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


if __name__ == "__main__":
    cli.exit_with(main)
