"""Lists the members of tar files, so that they can be read without unpacking."""

import os
import tarfile
from typing import BinaryIO, NamedTuple

from mim_jax.data.layout import split_of

JUNK = {  # folders and files that operating systems and tools create, in lower case
    *("__macosx", "@eadir", "#recycle", "#snapshot", "lost+found", "$recycle.bin", "__pycache__"),
    *("system volume information", "thumbs.db", "desktop.ini", "recycler", "@recycle"),
    *("@recently-snapshot", "network trash folder", "temporary items"),
}
REST = 2**16  # bytes that are read at a time after the end of an archive
PADDING = 2**26  # most zeros after the end of an archive


class Members(NamedTuple):
    """The members of a tar; paths are those in the tar."""

    files: dict[str, tuple[int, int]]  # name: size and offset; the last file of a name counts
    links: dict[str, str]  # name: name of the file it points to
    unread: list[tuple[str, str]]  # name and reason


def is_tar(path: str) -> bool:
    """Returns whether a file is a tar file, compressed or not."""
    return tarfile.is_tarfile(path)


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is hidden, or created by an operating system."""
    return name.startswith(".") or name.lower() in JUNK


def list_tar(file: BinaryIO, tar: str) -> tuple[list[tuple[str, int, int]], list[tuple[str, str]]]:
    """Lists the files in a tar and in the tars in it (as ImageNet has them).

    Args:
        file: the tar.
        tar: its path from the root, "" if the root is the tar.

    Returns name, size and offset of each file, and name and reason of unreadable ones. Names are
    paths from the root, as if the tar were unpacked in place.
    """
    members, stem = Members({}, {}, []), tar.removesuffix(".tar")
    problems = []
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as opened:
            add_members(opened, size, members)
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
        problems.append((tar, f"not a complete tar file: {error}"))
    follow_links(members)
    files = [(unpacked(stem, name), *place) for name, place in members.files.items()]
    problems += [(unpacked(stem, name), reason) for name, reason in members.unread]
    return files, problems


def add_members(
    file: tarfile.TarFile, size: int, members: Members, prefix: str = "", start: int = 0
) -> None:
    """Adds the members of an open tar, also of one in a tar.

    Args:
        size: size of the tar in bytes.
        prefix, start: path and offset in the outer tar.

    Raises tarfile.TarError if it is truncated or damaged; members before that point are added.
    """
    for member in file:
        name = os.path.normpath(member.name.lstrip("/"))
        parts = name.split("/")
        if member.isdir() or (parts[0] != ".." and any(map(is_hidden, parts))):
            continue
        full = unpacked(prefix, name)
        if parts[0] == "..":
            members.unread.append((full, "its path leads out of the tar"))
        elif member.issparse() or not (member.isfile() or member.islnk() or member.issym()):
            members.unread.append((full, "not a regular file"))
        elif not member.isfile():
            folder = os.path.dirname(name) if member.issym() else ""
            target = os.path.normpath(os.path.join(folder, member.linkname))
            members.files.pop(full, None)
            members.links[full] = unpacked(prefix, target)
        elif member.offset_data + member.size > size:
            raise tarfile.ReadError("it is truncated")
        elif name.endswith(".tar"):
            add_inner(file, member, members, full, start)
        else:
            members.links.pop(full, None)
            members.files[full] = (member.size, start + member.offset_data)
    if has_data(file, size):
        raise tarfile.ReadError("more data follows its end, which is not read")


def add_inner(
    file: tarfile.TarFile, member: tarfile.TarInfo, members: Members, name: str, start: int
) -> None:
    """Adds the members of a tar in a tar; a damaged one is listed as not read."""
    place = start + member.offset_data
    try:
        with tarfile.open(fileobj=file.extractfile(member), mode="r:") as inner:
            add_members(inner, member.size, members, name.removesuffix(".tar"), place)
    except (tarfile.TarError, ValueError, EOFError, RecursionError) as error:
        members.unread.append((name, f"not a complete tar file: {error}"))


def has_data(file: tarfile.TarFile, size: int) -> bool:
    """Returns whether data follow the end of an archive, as in concatenated ones."""
    if size - file.offset > PADDING:  # perhaps a file with holes, whose zeros never end
        return True
    file.fileobj.seek(file.offset)
    return any(file.fileobj.read(REST).strip(b"\0") for _ in range(file.offset, size, REST))


def follow_links(members: Members) -> None:
    """Replaces links by the files they point to; others are listed as not read."""
    while reached := {name for name, to in members.links.items() if to in members.files}:
        for name in reached:
            members.files[name] = members.files[members.links.pop(name)]
    for name, target in members.links.items():
        members.unread.append((name, f"a link to {target!r}, which is not a file in the tar"))


def unpacked(tar: str, name: str) -> str:
    """Returns the path of a member when its tar, whose path without `.tar` is given, is unpacked.

    Members in folders are unpacked next to the tar, others into a folder of its name. If the tar is
    named as a split and the members' folders are not, that folder is used for all members.
    """
    place, _, stem = tar.rpartition("/")
    first, slash, _ = name.partition("/")
    next_to_tar = slash and (not split_of(stem, is_tar=True) or split_of(first))
    return os.path.join(place, "" if next_to_tar else stem, name)
