"""Finds a network among the names of a checkpoint: wrappers, containers and averages."""

import re
from collections.abc import Collection, Iterable

from mim_jax import UserError
from mim_jax.convert.tables import LAYOUTS, SPELLINGS

WRAPPERS = (  # modules that training code puts around others
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_forward_module",),
)
# Entries that are preferred: an average of the weights, then MoCo v3's encoder.
PREFERRED = (
    r"(?i)(^|[._])(ema|teacher|target_encoder|averaged?|swa)(?=[._])",
    r"(^|\.)base_encoder\.",
)
BARE = "embeddings.cls_token"  # an encoder of Hugging Face without a head


def unwrap(names: Iterable[str]) -> dict[str, str]:
    """Returns {name without wrappers: name}. Raises UserError if two names become equal."""
    unwrapped: dict[str, str] = {}
    for name in names:
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in unwrapped:
            raise UserError(
                f"{printable(name)} and {printable(unwrapped[short])} have the same name without "
                "wrappers."
            )
        unwrapped[short] = name
    return unwrapped


def spelled(name: str) -> str:
    """Returns a name as the tables spell it."""
    for pattern, usual in SPELLINGS.items():
        name = re.sub(pattern, usual, name)
    return name


def find(names: Collection[str], entry: str = "") -> tuple[str, str, str]:
    """Finds a network among unwrapped names.

    Args:
        names: the names of a checkpoint, {"model.blocks.0.norm1.weight", ...}.
        entry: the entry to take, for example "model", if there are several networks.

    Returns the prefix of its names ("model."), its layout ("" if there is no network), and the
    entry if there were several. An average of weights is preferred to the weights. Raises UserError
    if there are several networks without a preference, or if the entry has none.
    """
    networks = prefixes(names)
    if entry:
        inside = f"{entry}."
        chosen = [p for p in networks if p.startswith(inside) or f".{inside}" in f".{p}"]
        if not chosen:
            raise UserError(f"there is no network in the entry {entry}: {listed(networks)}.")
    else:
        chosen = list(networks)
        for pattern in PREFERRED:
            chosen = [p for p in chosen if re.search(pattern, p)] or chosen
    if len(chosen) > 1:
        raise UserError(f"there are several networks: {listed(chosen)}; set --entry to one.")
    [prefix] = chosen or [""]
    return prefix, networks.get(prefix, ""), prefix.strip(".") if len(networks) > 1 else ""


def prefixes(names: Collection[str]) -> dict[str, str]:
    """Returns {prefix: layout} of all networks among names."""
    names = dict.fromkeys(map(spelled, names))
    networks: dict[str, str] = {}
    for layout, (_, signs, _) in LAYOUTS.items():
        ends = [name for name in names if f".{name}".endswith(f".{signs[0]}")]
        for prefix in (name.removesuffix(signs[0]) for name in ends):
            if all(f"{prefix}{sign}" in names for sign in signs):
                networks.setdefault(prefix, layout)
    for name in names:
        if f".{name}".endswith(f".{BARE}"):
            prefix = name.removesuffix(BARE)
            segments = networks.get(prefix.removesuffix("backbone.")) == "hf_upernet"
            if not segments and not re.search(r"(^|\.)(vit|beit)\.$", prefix):
                networks.setdefault(prefix, "hf_vit")
    return networks


def listed(networks: Iterable[str]) -> str:
    """Returns the entries of networks as text."""
    return ", ".join(printable(prefix.strip(".")) or "the whole file" for prefix in networks)


def shortened(names: list[str], limit: int = 6) -> str:
    """Returns the first names of a list as text."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name) for name in names[:limit]) + more


def printable(text: object, limit: int = 200) -> str:
    """Returns text with control characters and invalid UTF-8 escaped, shortened to `limit`.

    Names in untrusted files may contain anything.
    """
    text = str(text)
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
