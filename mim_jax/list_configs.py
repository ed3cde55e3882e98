"""Lists the configs that come with the package, by paper.

    mim-jax configs
    mim-jax configs cifar     # configs with this word in their name or description

Each is the name that --config takes. `mim-jax keys --config=NAME` lists its keys.
"""

import re
from collections import defaultdict

from mim_jax import UserError, cli, config_files

OTHER = "Other recipes and small examples"


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("configs", __doc__)
    parser.add_argument("word", nargs="?", default="", help="a part of a name or description")
    options = parser.parse_args(argv)
    return cli.exit_code(lambda: show(options.word), "")


def show(word: str) -> int:
    """Prints the configs that contain a word, grouped by the paper that they follow."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in config_files.names():
        summary = config_files.summary(config_files.folder() / f"{name}.py")
        if word.lower() in f"{name} {summary}".lower():
            group, text = split(summary)
            groups[group].append((name, text))
    if not groups:
        raise UserError(f"no config has {word!r} in its name or description.")
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    for group in sorted(groups, key=lambda group: (group == OTHER, group)):
        print(f"{group}:")
        for name, text in groups[group]:
            print(f"  {name:{width}}  {text}")
        print()
    return 0


def split(summary: str) -> tuple[str, str]:
    """Splits "MAE (He et al., 2021, table 3)." -> "He et al., 2021", "MAE (table 3)"."""
    source = re.search(r" \(([^()]*?\b(?:19|20)\d\d)(?:, ([^()]*))?\)", summary)
    if not source:
        return OTHER, summary.rstrip(".")
    place = f" ({source[2]})" if source[2] else ""
    return source[1], summary.replace(source[0], place).rstrip(".")
