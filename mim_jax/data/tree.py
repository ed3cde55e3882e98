"""The files of a folder or of a zip file, read in the same way."""

import io
import os
import zipfile
import zlib
from functools import cached_property
from typing import BinaryIO

from mim_jax import UserError
from mim_jax.data.arrays import LARGEST
from mim_jax.data.decode import BadImageError
from mim_jax.data.manifest import walk
from mim_jax.data.tars import is_hidden

ENCRYPTED = 1  # bit of a zip member's flags


class Tree:
    """The files of a folder or of a zip file, by name: paths with slashes from the root.

    A common top folder, as in most zip files, is not part of the names. `unread` has the names of
    broken links and other files that cannot be read, and the reasons.
    """

    def __init__(self, root: str):
        self.root = os.path.realpath(os.path.expanduser(root))
        if not os.path.exists(self.root):
            raise UserError(f"there is no data set {root}: set data.name to an existing folder.")
        self.zipped = os.path.isfile(self.root)
        if self.zipped and not zipfile.is_zipfile(self.root):
            raise UserError(f"{root} is neither a folder nor a zip file.")
        self.unread: list[tuple[str, str]] = []
        stamps = self.in_zip() if self.zipped else self.in_folder()
        tops = {name.partition("/")[0] for name in stamps}
        only = tops.pop() + "/" if len(tops) == 1 else ""
        self.prefix = only if all(name.startswith(only) for name in stamps) else ""
        self.stamps = {name[len(self.prefix) :]: stamp for name, stamp in sorted(stamps.items())}

    def in_folder(self) -> dict[str, tuple]:
        """Returns {name: (bytes, time of change)} of files that are not hidden."""
        files, self.unread, _ = walk(self.root)
        return {file.name: (file.bytes, file.changed) for file in files}

    def in_zip(self) -> dict[str, tuple]:
        """Returns {name: (bytes, checksum)} of files that are not hidden."""
        try:
            members = [member for member in self.zip.infolist() if not member.is_dir()]
        except zipfile.BadZipFile as error:
            raise UserError(f"{self.root} is not a complete zip file: {error}.") from error
        return {
            member.filename: (member.file_size, member.CRC)
            for member in members
            if not any(map(is_hidden, member.filename.split("/")))
        }

    @cached_property
    def zip(self) -> zipfile.ZipFile:
        """The open zip file, one for each process."""
        return zipfile.ZipFile(self.root)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "zip"}

    def open(self, name: str) -> BinaryIO:
        """Opens a file. Raises BadImageError if it cannot be opened or is too large."""
        if (size := self.stamps[name][0]) > LARGEST:
            raise BadImageError(f"it has {size:,} bytes, more than {LARGEST:,}")
        try:
            if self.zipped:
                return io.BytesIO(self.unzip(name))
            return open(os.path.join(self.root, self.prefix + name), "rb")
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise BadImageError(f"cannot be read: {error}") from error

    def unzip(self, name: str) -> bytes:
        """Returns the bytes of a file in the zip file, and never unpacks more than its size.

        That holds for `ZipFile.open` with deflate, but not for `ZipFile.read` or other methods.
        """
        member = self.zip.getinfo(self.prefix + name)
        if member.flag_bits & ENCRYPTED:
            raise BadImageError("it is encrypted: pack the zip file without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadImageError("it is not compressed by deflate: pack the zip file again")
        with self.zip.open(member) as file:
            return file.read(member.file_size)

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file. Raises BadImageError if it cannot be read."""
        with self.open(name) as file:
            return file.read()
