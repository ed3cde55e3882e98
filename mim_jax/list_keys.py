"""Lists the keys of a config: their values, types, ranges, defaults and meanings.

mim-jax keys mae_base                        # the same as mim-jax keys --config=mae_base
mim-jax keys mae_base mask ratio             # keys with these words in name or meaning
mim-jax keys --markdown > docs/keys.md       # the keys of all objectives and optimizers
"""

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from mim_jax import UserError, cli, objectives, optim, schema
from mim_jax.keys import FREE, Key, Range


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("keys", __doc__)
    cli.add_config(parser, required=False)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG WORD",
        help="a config, unless --config names it, then parts of the name or meaning of keys",
    )
    parser.add_argument("--markdown", action="store_true", help="print tables of all keys")
    options, overrides = cli.parse(parser, argv)
    if not options.config and not options.markdown:
        if not options.words:
            parser.error("pass a config, which `mim-jax configs` lists, or --markdown")
        options.config = options.words.pop(0)

    def command() -> int:
        if options.markdown:
            print(markdown())
            return 0
        config = schema.load(options.config, overrides, trust_code=options.trust_code)
        lines = list(describe(config, options.words))
        if not lines:
            raise UserError(
                f"no key of {options.config} has {' '.join(options.words)!r} in its name or "
                f"meaning: `mim-jax keys --config={options.config}` lists them all."
            )
        print("\n".join(lines))
        return 0

    return cli.exit_code(command, "")


def describe(config: Mapping, words: Sequence[str] = ()) -> Iterator[str]:
    """Yields two lines of text for each key whose name and meaning contain all of the words."""
    values = schema.flatten(config)
    for name, key in schema.keys_of(config).items():
        text = f"{name} {key.meaning}".lower()
        if all(word.lower() in text for word in words):
            default = "" if key.default in (values[name], inspect.Parameter.empty) else key.default
            note = f", default {default!r}" if default != "" else ""
            yield f"{name} = {values[name]!r}\n    {key.meaning} ({kind(key)}{note})"


def kind(key: Key) -> str:
    """Returns the type and range of a key as text: "float, at least 0 and at most 1"."""
    bounds = f", {key.range}" if key.range != Range() else ""
    return type_text(key.kind) + bounds


def type_text(kind: Any) -> str:
    """Returns a type as text; choices are listed."""
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if isinstance(kind, types.UnionType):
        return " or ".join(type_text(part) for part in get_args(kind))
    return getattr(kind, "__name__", str(kind))


def markdown() -> str:
    """Returns tables of the keys of every block, objective and optimizer."""
    blocks: dict[str, tuple] = {}
    for name in objectives.packaged():
        choices = {"objective": {"name": name}, "optimizer": {"name": "adamw"}, "data": {}}
        for block, functions in schema.functions(choices).items():
            known = blocks.get(block, ())
            blocks[block] = (*known, *(x for x in functions if x not in known))
    sections = [
        "# Config keys\n",
        "`mim-jax keys --markdown` generates this page. `mim-jax keys --config=NAME` lists the",
        "keys and values of one config. Keys marked *free* do not affect what is learned: they may",
        "change when a run continues.\n",
    ]
    for block, functions in blocks.items():
        if block in schema.CHOICES:
            continue
        title = f"`{block}`" if block else "Top level"
        sections += table(title, [schema.keys_of_function(function) for function in functions])
    for name in objectives.packaged():
        keys = schema.keys_of_function(objectives.find(name), every=True)
        sections += table(f'`objective`, with `name = "{name}"`', [keys])
    sections += table("`optimizer`", [schema.keys_of_function(schema.Schedule)])
    for name, function in optim.OPTIMIZERS.items():
        keys = schema.keys_of_function(function)
        sections += table(f'`optimizer`, with `name = "{name}"`', [keys])
    return "\n".join(sections).rstrip()


def table(title: str, parts: list[dict[str, Key]]) -> list[str]:
    """Returns the lines of a section of keys."""
    keys = {name: key for part in parts for name, key in part.items()}
    lines = [f"## {title}\n", "| key | default | type | meaning |", "|---|---|---|---|"]
    for name, key in keys.items():
        default = "" if key.default is inspect.Parameter.empty else f"`{key.default!r}`"
        free = " *free*" if FREE in key.markers else ""
        cells = (f"`{name}`", default, kind(key), key.meaning + free)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]
