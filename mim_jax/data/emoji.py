"""The built-in image set: 1906 Noto emoji, 64x64 on white, in nine categories.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python -m mim_jax.data.emoji --package=package

rebuilds the shipped folder `builtin/emoji/1.0.0`, byte for byte with the same library versions.
The images are drawings: enough for trial runs without a download, but not to compare methods.

An emoji is in `validation` (566 images) if crc32(code) % 10 < 3, where `code` is its code points,
as in "1F469-200D-1F373"; all others are in `train` (1340 images). Skin-tone variants and the
category "Component" are left out. Different emoji can have the same image (two regions with one
flag, for example): 7 of the 566 validation images are also in `train`, pixel for pixel.
License: `builtin/LICENSE-noto-emoji.txt`.
"""

import argparse
import io
import json
import shutil
import tempfile
import zlib
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from mim_jax.data.records import SortedWriter


def split_of(code: str) -> str:
    """Returns the split of an emoji, which depends on its code points only."""
    return "validation" if zlib.crc32(code.encode()) % 10 < 3 else "train"


def png_on_white(path: Path) -> bytes:
    """Returns the image composited on white, as an optimized RGB PNG."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    png = io.BytesIO()
    Image.alpha_composite(white, image).convert("RGB").save(png, "PNG", optimize=True)
    return png.getvalue()


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Builds the set from `package`, the unpacked npm package `emoji-datasource-google`."""

    VERSION = tfds.core.Version("1.0.0")
    __module__ = __spec__.name  # TFDS stores it; under `python -m` it would be "__main__"

    def __init__(self, package: Path, **kwargs):
        self.images = package / "img/google/64"
        entries = json.loads((package / "emoji.json").read_text())  # skin tones are nested entries
        self.emoji = [entry for entry in entries if entry["category"] != "Component"]
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=sorted({e["category"] for e in self.emoji})),
            "name": tfds.features.Text(),
            "code": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Noto emoji 2.048, composited on white and labelled by category.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://github.com/googlefonts/noto-emoji",
            license="Apache-2.0",
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        for entry in self.emoji:
            code, label, name = entry["unified"], entry["category"], entry["name"].lower()
            if split_of(code) == split:
                image = io.BytesIO(png_on_white(self.images / entry["image"]))  # arrays need TF
                yield code, {"image": image, "label": label, "name": name, "code": code}

    def _example_writer(self):
        return SortedWriter(self.info.file_format)


def build(package: Path, to: Path) -> Path:
    """Writes the set to `to`/emoji/1.0.0, replacing that folder, and returns its path."""
    with tempfile.TemporaryDirectory() as scratch:  # a failure leaves the old set intact
        builder = Emoji(package, data_dir=scratch)
        builder.download_and_prepare()
        target = to / builder.data_path.relative_to(scratch)
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(builder.data_path, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, required=True, help="the unpacked npm package")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("builtin"))
    print(build(**vars(parser.parse_args())))
