"""Line charts as SVG, colored by the style sheet of the page."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 14, 28  # margins in pixels
BINS = 260  # bins of steps: more than twice as many points are drawn as a band and a mean


class Series(NamedTuple):
    """A line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]  # (step, value), by increasing step
    color: int = 0  # number of the color in the style sheet
    dashed: bool = False


class Reference(NamedTuple):
    """A horizontal line that values can be compared with, or a band."""

    value: float
    label: str
    high: float | None = None  # the upper end of a band


def chart(
    title: str,
    lines: Sequence[Series],
    references: Sequence[Reference] = (),
    log_scale: bool | None = None,
    axis: str = "step",
    last: float = 1,
    from_zero: bool = False,
) -> str:
    """Returns an <svg> of some lines over a common axis, of steps or another, from 0 to `last`.

    With `from_zero` the vertical axis begins at 0, otherwise near the lowest value.

    Values that are not finite leave a gap and are marked at the top. The scale is logarithmic if
    positive values span more than two decades, unless `log_scale` is given.
    """
    arrays = [np.array(line.points, np.float64).reshape(-1, 2) for line in lines]
    finite = [a[np.isfinite(a[:, 1])] for a in arrays]
    values = np.concatenate([a[:, 1] for a in finite]) if finite else np.zeros(0)
    if log_scale is None:
        log_scale = bool(len(values) and values.min() > 0 and values.max() > 100 * values.min())
    last = max([last, *(a[:, 0].max() for a in arrays if len(a))])
    low, high = limits(values, [r.value for r in references], log_scale)
    axes = Axes((0.0, float(last)), (0.0 if from_zero else low, high), log_scale)
    parts = [axes.grid()]
    for reference in references:
        if axes.y[0] <= reference.value <= axes.y[1]:
            y = axes.down(reference.value)
            top = axes.down(min(reference.high or reference.value, axes.y[1]))
            parts.append(
                f'<g class="reference"><path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}V{top:.1f}H{LEFT}"/>'
                f'<text x="{WIDTH - RIGHT}" y="{top - 4:.1f}">{escape(reference.label)}</text></g>'
            )
    for line, points in zip(lines, arrays, strict=True):
        parts.append(axes.line(line, points))
    label = escape(f"{title}. {' '.join(summary(line, axis) for line in lines)}", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def limits(values: np.ndarray, marks: Sequence[float], log_scale: bool) -> tuple[float, float]:
    """Returns the range of the vertical axis, which covers most values and the marks near them."""
    if not len(values):
        return 0.0, 1.0
    low, high = values.min(), values.max()
    if len(values) > 50:  # a few outliers, such as the first steps, may be cut off
        calm_low, calm_high = np.percentile(values, (1, 99))
        room = 0.25 * (calm_high - calm_low)
        low, high = max(low, calm_low - room), min(high, calm_high + room)
    span = high - low
    near = [m for m in marks if low - 0.6 * span <= m <= high + 0.6 * span]
    low, high = min(low, *near) if near else low, max(high, *near) if near else high
    if log_scale:
        return low / 1.15, high * 1.15
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


class Axes(NamedTuple):
    """The scales of a chart."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_scale: bool

    def across(self, steps):
        """Returns horizontal positions in pixels."""
        low, high = self.x
        return LEFT + (steps - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, values):
        """Returns vertical positions in pixels; values outside the range are at the border."""
        scale = np.log if self.log_scale else np.asarray
        low, high = (float(scale(y)) for y in self.y)
        values = np.clip(values, *self.y)
        share = (scale(values) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        """Returns lines and labels at round numbers."""
        parts = []
        values = ticks_log(*self.y) if self.log_scale else ticks(*self.y, 4)
        for value, text in zip(values, labels(values), strict=True):
            y = self.down(value)
            parts.append(
                f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="y">{text}</text>'
            )
        for value in ticks(*self.x, 5, integers=True):
            x = self.across(value)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" class="x">{whole(value)}</text>')
        return f'<g class="grid">{"".join(parts)}</g>'

    def line(self, line: Series, points: np.ndarray) -> str:
        """Returns the path of a line, with a band behind it if there are many points."""
        bad = ~np.isfinite(points[:, 1])
        kind = f"c{line.color % 8}" + (" dashed" if line.dashed else "")
        parts = []
        if len(points) > 2 * BINS:
            bands, points = binned(points)
            upper = [(x, high) for x, _, high in bands]
            lower = [(x, low) for x, low, _ in reversed(bands)]
            outline = "L".join(self.place(x, y) for x, y in (*upper, *lower))
            parts.append(f'<path class="band {kind}" d="M{outline}Z"/>' if bands else "")
            ok = np.isfinite(points[:, 1])
        else:
            ok = ~bad
        run, path = [], ""
        for fine, (x, y) in zip([*ok, False], [*points, (0, 0)], strict=True):
            if fine:
                run.append(self.place(x, y))
            elif run:
                path += f"M{'L'.join(run)}" + ("h0.01" if len(run) == 1 else "")
                run = []
        parts.append(f'<path class="line {kind}" d="{path}"/>' if path else "")
        if 1 <= ok.sum() <= 12:
            dots = (self.place(x, y).split() for x, y in points[ok])
            parts += [f'<circle class="{kind}" r="3" cx="{x}" cy="{y}"/>' for x, y in dots]
        for x in binned_places(self.across(self.bad_steps(line))):
            parts.append(f'<path class="bad" d="M{x - 4:.1f} {TOP - 4}l8 8m0 -8l-8 8"/>')
        return f"<g><title>{escape(line.label)}</title>{''.join(parts)}</g>"

    def bad_steps(self, line: Series) -> np.ndarray:
        """Returns the steps whose values are not finite."""
        return np.array([x for x, y in line.points if not math.isfinite(y)])

    def place(self, x: float, y: float) -> str:
        """Returns a point in pixels, as in a path."""
        return f"{self.across(x):.1f} {float(self.down(y)):.1f}"


def binned(points: np.ndarray) -> tuple[list[tuple[float, float, float]], np.ndarray]:
    """Returns (step, lowest, highest) of each bin of steps, and the means (bins, 2).

    Bins without a finite value are not in the bands, and their mean is NaN.
    """
    edges = np.linspace(points[0, 0], points[-1, 0], BINS + 1)
    index = np.clip(np.searchsorted(edges, points[:, 0], "right") - 1, 0, BINS - 1)
    bands, means = [], []
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    for part in np.split(points, starts[1:]):
        values = part[np.isfinite(part[:, 1]), 1]
        x = part[:, 0].mean()
        means.append((x, values.mean() if len(values) else math.nan))
        if len(values):
            bands.append((x, values.min(), values.max()))
    return bands, np.array(means)


def binned_places(places: np.ndarray) -> list[float]:
    """Returns positions in pixels that are at least eight pixels apart."""
    kept: list[float] = []
    for x in places:
        if not kept or x - kept[-1] >= 8:
            kept.append(float(x))
    return kept


def ticks(low: float, high: float, count: int, integers: bool = False) -> list[float]:
    """Returns about `count` round numbers between two numbers, integers only if `integers`."""
    rough = (high - low) / count
    if integers and rough <= 1:
        return [float(i) for i in range(math.ceil(low), math.floor(high) + 1)]
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def ticks_log(low: float, high: float) -> list[float]:
    """Returns round numbers between two positive numbers, evenly spread in powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // 6)
    powers = [10.0**p for p in range(first, last + 1, every)]
    inside = [x for x in powers if low <= x <= high]
    return inside if len(inside) > 1 else ticks(low, high, 4)


def labels(values: Sequence[float]) -> list[str]:
    """Formats the ticks of an axis with enough digits to distinguish them."""
    texts = [short(value, 1) for value in values]
    spacing = min(np.diff(values), default=math.inf)
    for digits in range(1, 8):
        texts = [short(value, digits) for value in values]
        shown = [float(text.replace(",", "")) for text in texts]
        if all(abs(a - b) <= 0.01 * spacing for a, b in zip(shown, values, strict=True)):
            break
    return texts


def short(value: float, digits: int) -> str:
    """Formats a number with a few significant digits; large and small ones with an exponent."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(power)}"
    whole_digits = len(str(int(abs(value))))
    return f"{value:,.{max(digits, whole_digits)}g}"


def whole(value: float) -> str:
    """Formats a number of steps."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"


def summary(line: Series, axis: str) -> str:
    """Describes a line in a sentence, for screen readers."""
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    bad = len(line.points) - len(finite)
    if not finite:
        return f"{line.label}: no finite values."
    (first, start), (last, end) = finite[0], finite[-1]
    low, high = (select(finite, key=lambda p: p[1])[1] for select in (min, max))
    text = f"{line.label}: {start:.4g} at {axis} {first:,.0f}"
    if last != first:
        text += f", {end:.4g} at {axis} {last:,.0f}, lowest {low:.4g}, highest {high:.4g}"
    return text + (f", {bad} values not finite." if bad else ".")
