"""Labels of images from a CSV table, or from files next to the images, as in WebDataset."""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from mim_jax import UserError
from mim_jax.data.layout import split_of

HEADERS = ("path", "file", "filename", "file_name", "image", "name")  # headers of columns of paths
LABELS = {  # headers of columns of labels
    *("label", "labels", "label_name", "class", "classes", "class_name", "classname", "category"),
    *("category_name", "target", "finding labels"),
}
LONGEST = 256  # characters of a label
# An integer: "3", or "3.0" as pandas writes it in a column with gaps.
WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")
OTHERS = {  # headers of columns without labels
    *("split", "set", "subset", "fold", "width", "height", "size", "date", "time", "url", "md5"),
    *("id", "index", "caption", "text", "description", "bbox", "x", "y", "w", "h"),
}
DELIMITERS = (",", ";", "\t", " ")  # delimiters of cells, in order of preference
SAMPLE = 1000  # lines that determine which column names images
MANY_LABELS = 100_000  # larger numbers are probably dates or ids


def from_table(
    path: str, names: Sequence[str], roots: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Reads the labels of images from a CSV file.

    Args:
        names: paths of the images from the root. The table's paths may be these, absolute ones, or
            paths from the folder of the table.
        roots: absolute paths of the root, with and without links.

    Returns the label of each name, "" for none, and the paths of the table that are not images.
    Raises UserError if the columns are ambiguous, or if a line has no label.
    """
    where = f"data.labels = {path!r}"
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(path)))
    image_of = finder(names, roots, folder)
    lines, hits = read_table(path, image_of)
    if not lines:
        raise UserError(
            f"{where} contains no path of an image in {roots[0]}: use paths relative to that "
            f"folder, for example {names[0]!r}."
        )
    if hits.count(max(hits)) > 1:
        raise UserError(f"{where} has several columns that name images: keep one of them.")
    at = hits.index(max(hits))
    header = lines.pop(0) if is_header(lines, at, image_of) else None
    column = label_column(where, lines, header, at)
    of_image: dict[str, str] = {}
    missing = []
    for line in lines:
        if max(at, column) >= len(line) or line[column].lower() in ("", "nan"):
            raise UserError(f"{where}: the line {','.join(line)!r} has no label.")
        image, label = image_of(line[at]), line[column]
        if image is None:
            missing.append(line[at])
            image = line[at]
        if of_image.setdefault(image, label) != label:
            raise UserError(
                f"{where}: {image!r} has two labels, {of_image[image]!r} and {label!r}."
            )
    if all(split_of(label) for label in of_image.values()):
        raise UserError(
            f"{where}: its labels {sorted(set(of_image.values()))} are names of splits."
        )
    return [of_image.get(name, "") for name in names], missing


def read_table(path: str, image_of: Callable) -> tuple[list[list[str]], list[int]]:
    """Returns the lines of a table, and the number of cells in each column that name an image.

    Cells are separated by the first of DELIMITERS with which any of them names an image; the lines
    are [] if none does.
    """
    for sample in (SAMPLE, None):
        for delimiter in DELIMITERS:
            lines = read_csv(path, delimiter)
            hits = count_images(lines[:sample], image_of)
            if any(hits):
                return lines, hits
    return [], []


def read_csv(path: str, delimiter: str) -> list[list[str]]:
    """Returns the lines of a CSV file that are not empty, with cells without surrounding spaces."""
    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8-sig") as file:
            lines = [
                [cell.strip() for cell in line] for line in csv.reader(file, delimiter=delimiter)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"data.labels = {path!r} cannot be read ({error}): set it to '', 'folder', 'cls', "
            "'json:KEY' or the path of a CSV file."
        ) from error
    return [line for line in lines if any(line)]


def count_images(lines: Sequence[list[str]], image_of: Callable) -> list[int]:
    """Returns the number of cells in each column that name an image."""
    count = max(map(len, lines), default=0)
    return [sum(c < len(x) and image_of(x[c]) is not None for x in lines) for c in range(count)]


def finder(names: Iterable[str], roots: Sequence[str], folder: str) -> Callable[[str], str | None]:
    """Returns a function from a cell of a table to the name of an image, None if it names none."""
    known = set(names)

    def image_of(cell: str) -> str | None:
        for text in dict.fromkeys((cell, cell.replace("\\", "/"))):
            path = os.path.normpath(text) if text else ""
            if path in known:
                return path
            full = os.path.normpath(os.path.join(folder, path))
            for root in roots:
                if full.startswith(root + "/") and full[len(root) + 1 :] in known:
                    return full[len(root) + 1 :]
        return None

    return image_of


def is_header(lines: Sequence[list[str]], at: int, image_of: Callable) -> bool:
    """Returns whether the first line is a header, not a line of an image that is missing."""
    cell = lines[0][at] if at < len(lines[0]) else ""
    if image_of(cell) is not None:
        return False
    suffixes = {
        os.path.splitext(line[at])[1].lower()
        for line in lines[1:]
        if at < len(line) and image_of(line[at]) is not None
    }
    suffix = os.path.splitext(cell)[1].lower()
    is_image = suffix in suffixes - {""} or suffix in Image.registered_extensions()
    return cell.lower() in HEADERS or not is_image


def label_column(where: str, lines: Sequence[list[str]], header: list[str] | None, at: int) -> int:
    """Returns the index of the column of labels. Raises UserError if it is ambiguous."""
    count = max(map(len, [header or [], *lines]))
    columns = [c for c in range(count) if c != at]
    if header is None:
        if len(columns) == 1:
            return columns[0]
        problem = f"has {count} columns and no line that names them" if columns else "has no labels"
        raise UserError(f"{where} {problem}: add a first line such as 'path,label'.")
    named = {c: header[c].lower() for c in columns if c < len(header)}
    named = {c: name for c, name in named.items() if name and name not in OTHERS}
    for fitting in (
        [c for c, name in named.items() if name == "label"],
        [c for c, name in named.items() if name in LABELS],
        list(named),
    ):
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    raise UserError(
        f"{where} has the columns {', '.join(map(repr, header))}: name the one with the labels "
        "'label'."
    )


def number_labels(where: str, texts: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Returns the names of labels in order, and the number of each text.

    Integers are used as labels unchanged; other texts are numbered in sorted order.

    Args:
        where: the origin of the texts for messages, for example "data.labels = 'cls'".
        texts: labels as they are written in files.
    """
    different = sorted(set(texts) - {""})
    if not all(WHOLE.fullmatch(text) for text in different):
        if all(is_number(text) for text in different):
            raise UserError(f"{where}: the label {first_fraction(different)!r} is not an integer.")
        return different, {text: number for number, text in enumerate(different)}
    numbers = {text: int(text.split(".")[0]) for text in different}
    smallest, largest = min(numbers.values(), default=0), max(numbers.values(), default=-1)
    if smallest < 0:
        raise UserError(f"{where}: the label {smallest} is negative: use 0, 1, 2, ... or names.")
    if largest > max(MANY_LABELS, 10 * len(numbers)):
        raise UserError(
            f"{where}: labels that are numbers are class indices; the largest is {largest}, but "
            f"there are only {len(numbers)} of them: use 0, 1, 2, ... or names."
        )
    return [str(number) for number in range(largest + 1)], numbers


def is_number(text: str) -> bool:
    """Returns whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def first_fraction(texts: Iterable[str]) -> str:
    """Returns the first text that is not an integer."""
    return next(text for text in texts if not WHOLE.fullmatch(text))


def label_in(content: bytes, how: str) -> str:
    """Returns the label in a file next to an image.

    Args:
        how: "cls" for a file that holds only the label, or "json:KEY" with KEY = "label" or "a.b".

    Raises ValueError if there is none.
    """
    text = content.decode("utf-8-sig")
    if how == "cls":
        return short(text)
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    for key in how.removeprefix("json:").split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"it has no {key!r}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a label")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a label")
    return short(str(value))


def short(text: str) -> str:
    """Returns a label without surrounding spaces. Raises ValueError if it is too long."""
    if len(label := text.strip()) > LONGEST:
        raise ValueError(f"its label has {len(label):,} characters")
    return label
