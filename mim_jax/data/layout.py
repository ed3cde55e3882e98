"""Splits and labels, derived from the names of folders and tar files."""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

WORDS = {  # split: its names, in order of preference
    "train": ("train", "training", "trn", "trainset", "trainval"),
    "validation": (
        *("validation", "val", "valid", "validate", "validating", "vld", "valset", "dev"),
        *("devel", "development", "eval", "evaluation"),
    ),
    "test": ("test", "testing", "tests", "tst", "testset"),
}
SPLITS = {word: split for split, words in WORDS.items() for word in words}
NEUTRAL = {  # words that may occur together with these
    *("set", "sets", "split", "data", "dataset", "image", "images", "img", "imgs", "seg", "folder"),
    *("jpg", "jpeg", "png", "photo", "photos", "picture", "pictures", "files", "frames"),
}
PARTS = {"shard", "part", "chunk", "batch", "block", "fold", "bucket", "worker", "tar", "archive"}
NUMBERED = re.compile(r"(.*?)[-_. ]?\d+([-_. ]of[-_. ]\d+)?")
NUMBERED_TAR = re.compile(r"(.*[-_. ])?\d+([-_. ]of[-_. ]\d+)?")
DEPTH = 4  # folders below the root among which splits are searched


class Layout(NamedTuple):
    """The split and the label of each folder."""

    splits: list[str]  # names of their splits, "" for none; [] if no folders are splits
    labels: list[str]  # names of their labels, "" for none
    conflict: tuple[str, str] | None  # two folders on one path either of which could be the label


def split_of(name: str, is_tar: bool = False) -> str:
    """Returns the word in a folder's name that names a split, "" if there is none.

    "train", "TrainImages", "val2017", "test_set" name splits; "bullet_train" does not, but is_tar
    allows other words too: "ILSVRC2012_img_train", "imagenet-train-00012".
    """
    parts = re.findall(r"[a-z]+", name.lower())
    words = [word for part in parts for word in words_in(part)]
    splits = {word for word in words if word in SPLITS}
    others = {word for word in words if word not in SPLITS} - NEUTRAL - {"of"}
    return splits.pop() if len(splits) == 1 and (is_tar or not others) else ""


def words_in(compound: str) -> tuple[str, ...]:
    """Returns the words of a compound such as "trainimages", or any other word itself."""
    if compound not in SPLITS:
        for word in SPLITS:
            if compound.startswith(word) and compound.removeprefix(word) in NEUTRAL:
                return word, compound.removeprefix(word)
    return (compound,)


def is_shard(name: str, is_tar: bool = False) -> bool:
    """Returns whether a name is that of a numbered part of a set: "shard_3", "images_001".

    With is_tar, any number at the end marks a shard: "00012", "imagenet-train-00012".
    """
    if is_tar and NUMBERED_TAR.fullmatch(name):
        return True
    words = NUMBERED.fullmatch(name.lower())
    if words is None:
        return False
    return not (PARTS | NEUTRAL).isdisjoint(re.findall(r"[a-z]+", words[1]))


def layout(folders: Sequence[str], tars: Collection[str] = ()) -> Layout:
    """Finds splits and labels of the folders that hold images.

    Args:
        folders: paths from the root, "" for the root.
        tars: the folders and parents of folders that are tar files, without ".tar".

    Splits are searched from the root downwards, below folders that hold all the others, and one
    level below folders of different names. The label is the first folder below the split's that is
    not a shard and does not hold all images, or if there is none, the folder above the splits.
    """
    parts = [tuple(folder.split("/")) if folder else () for folder in folders]
    level = split_level(parts, tars)
    if level is None:
        start = shared(parts, [0] * len(parts))
        return Layout([], [first_label(part, start, tars) for part in parts], None)
    words = [word_at(part, level, tars) if len(part) > level else "" for part in parts]
    splits = [
        name_of_split(word, part[level], words) if len(part) > level else ""
        for word, part in zip(words, parts, strict=True)
    ]
    skip = repeated(parts, words, level)
    starts = [level + 1 + skip[word] for word in words]
    more = shared(parts, starts)
    below = [first_label(part, at + more, tars) for part, at in zip(parts, starts, strict=True)]
    above = [part[level - 1] if 0 < level < len(part) else "" for part in parts]
    if len(set(above) - {""}) < 2:  # one folder that holds the splits
        return Layout(splits, below, None)
    if not any(below):
        return Layout(splits, above, None)
    conflict = next(pair for pair in zip(above, below, strict=True) if pair[1])
    return Layout(splits, below, conflict)


def split_level(parts: Sequence[tuple[str, ...]], tars: Collection[str]) -> int | None:
    """Returns the depth at which folders are splits, None if there is none."""
    for level in range(DEPTH):
        deep = [part for part in parts if len(part) > level]
        if not deep:
            return None
        words = {part[level]: word_at(part, level, tars) for part in deep}
        splits = {SPLITS[word] for word in words.values() if word}
        all_are = all(words.values()) and (level == 0 or len(deep) == len(parts))
        if splits and (all_are or ("train" in splits and len(splits) > 1)):
            return level
        if splits and below_splits(deep, level, words):
            return level
        if len({part[:level] for part in deep}) > 1:  # one level below different folders is enough
            return None
    return None


def below_splits(deep: Sequence[tuple[str, ...]], level: int, words: dict[str, str]) -> bool:
    """Returns whether all folders of a level have subfolders in common with a named split."""
    below: dict[str, set[str]] = {name: set() for name in words}
    for part in deep:
        if len(part) > level + 1:
            below[part[level]].add(part[level + 1])
    named = set().union(*(below[name] for name, word in words.items() if word))
    return len(words) > 1 and all(below[name] & named for name in words)


def word_at(part: tuple[str, ...], level: int, tars: Collection[str]) -> str:
    """Returns the word of the split that a folder on a path names, "" for none."""
    return split_of(part[level], "/".join(part[: level + 1]) in tars)


def name_of_split(word: str, folder: str, words: Sequence[str]) -> str:
    """Returns the name of a folder's split: a folder that names none is a split of its own.

    If several folders name one split (val and eval), the preferred name is the split, and the
    others are splits of their own.
    """
    if word:
        split = SPLITS[word]
        best = min((w for w in words if w and SPLITS[w] == split), key=WORDS[split].index)
        return split if word == best else word
    name = re.sub(r"\W", "_", folder)
    return name if name.isidentifier() else f"_{name}"


def repeated(parts: Sequence[tuple[str, ...]], words: Sequence[str], level: int) -> dict[str, int]:
    """Returns {word: 1 if all folders of that split contain another one of the same name}."""
    skip = dict.fromkeys(words, 1)
    for part, word in zip(parts, words, strict=True):
        if len(part) < level + 2 or not word or split_of(part[level + 1]) != word:
            skip[word] = 0
    return skip


def shared(parts: Sequence[tuple[str, ...]], starts: Sequence[int]) -> int:
    """Returns the number of folders, from a depth on, that all paths share and that hold folders.

    Paths that end at that depth do not count.
    """
    rest = [part[at:] for part, at in zip(parts, starts, strict=True) if len(part) > at]
    count = 0
    while rest and all(len(x) > count + 1 and x[count] == rest[0][count] for x in rest):
        count += 1
    return count


def first_label(part: tuple[str, ...], start: int, tars: Collection[str]) -> str:
    """Returns the first folder of a path, from `start` on, that is not a shard, "" for none."""
    for level in range(start, len(part)):
        if not is_shard(part[level], "/".join(part[: level + 1]) in tars):
            return part[level]
    return ""
