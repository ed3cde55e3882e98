"""Compares the CPU time of our input pipeline with that of the official code's in PyTorch.

    python -m benchmarks.input [--data=FOLDER_OR_TAR] [--rounds=5] [--images=1280] [--resizer=simd]

Both read the same files and compute MAE's views of 224 x 224 in batches of 64: a random crop of 20
to 100 % of the area, resized by Pillow with bicubic interpolation and antialiasing, and flipped
with a probability of one half. PyTorch's is a DataLoader with two workers, which also converts
images to float tensors and normalizes them on the host, like torchvision's ToTensor and Normalize;
ours yields bytes, which the device normalizes. Without --data they read JPEGs of ImageNet's usual
size, 500 x 375 and about 100 kB, generated from the built-in emoji and noise.

The result is the CPU time of all processes from the fifth batch on, which does not depend on the
number of free cores. Each round measures both pipelines one after the other, in separate processes;
the ratio is the median over the rounds. For another resizer, the differences of its pixels from
Pillow's are printed too. Linux only.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mim_jax import data
from mim_jax.data.transforms import resize

BATCH, SIZE, WARM_UP = 64, 224, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(folder: str, workers: int, resizer: str):
    """Returns the batches of our pipeline, computed in threads or in `workers` processes."""
    source = dict(name=f"folder:{folder}", split="all", evaluation_split="all")
    images = data.make(**source, size=SIZE, workers=workers, resizer=resizer)
    return images.training_batches(BATCH, seed=0, start=0, stop=10**6)


class Photographs(torch.utils.data.Dataset):
    """The images as torchvision's ImageFolder and the transforms of main_pretrain.py give them."""

    def __init__(self, folder: str):
        self.files = sorted(path for path in Path(folder).rglob("*") if path.is_file())

    def __len__(self):
        return 10**6

    def __getitem__(self, i: int):
        with self.files[i % len(self.files)].open("rb") as file:
            image = Image.open(file).convert("RGB")
        image = image.crop(self.box(*image.size)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        pixels = pixels.view(SIZE, SIZE, 3).permute(2, 0, 1).contiguous().float().div(255)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
        return pixels.sub_(mean).div_(std), 0

    def box(self, width: int, height: int):
        for _ in range(10):
            area = width * height * torch.empty(1).uniform_(0.2, 1.0).item()
            low, high = math.log(3 / 4), math.log(4 / 3)
            aspect = torch.exp(torch.empty(1).uniform_(low, high)).item()
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = torch.randint(0, height - h + 1, (1,)).item()
                left = torch.randint(0, width - w + 1, (1,)).item()
                return left, top, left + w, top + h
        return 0, 0, width, height


def theirs(folder: str, *_):
    """Returns the batches of the official pipeline, with two workers."""
    torch.set_num_threads(1)
    settings = dict(batch_size=BATCH, shuffle=True, drop_last=True, num_workers=2)
    return iter(torch.utils.data.DataLoader(Photographs(folder), **settings))


def cpu_seconds() -> float:
    """Returns the CPU time of this process and its workers until now."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(batches, images: int) -> float:
    """Returns the milliseconds of CPU time per image, after the first batches."""
    for _ in range(WARM_UP):
        next(batches)
    start, count = cpu_seconds(), -(-images // BATCH)
    for _ in range(count):
        next(batches)
    return (cpu_seconds() - start) / (count * BATCH) * 1e3


def distances(folder: str, resizer: str) -> list[float]:
    """Returns the mean absolute difference from Pillow's pixels, of 255, in a crop of each file."""
    torch.manual_seed(0)
    theirs, measurements = Photographs(folder), []
    for file in theirs.files:
        image = Image.open(file).convert("RGB")
        image = image.crop(theirs.box(*image.size))
        pillow, other = (
            resize(image, (SIZE, SIZE), "bicubic", kind).astype(int) for kind in ("pillow", resizer)
        )
        measurements.append(float(np.abs(pillow - other).mean()))
    return measurements


def photographs(folder: Path, count: int = 200) -> None:
    """Writes JPEGs of ImageNet's usual size in pixels and bytes: enlarged emoji with noise."""
    emoji = data.make(name="emoji", size=64, crop_fraction=1.0)
    images = next(emoji.evaluation_batches(count))["image"]
    rng = np.random.default_rng(0)
    for i, pixels in enumerate(images):
        large = Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(large) + rng.normal(0, 30, (375, 500, 1))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        (folder / f"{i}.jpg").write_bytes(file.getvalue())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="", help="a folder of JPEGs, or a tar file of them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1280, help="number of images in a round")
    parser.add_argument("--workers", type=int, default=0, help="of ours; 0: threads")
    parser.add_argument("--resizer", choices=("pillow", "simd"), default="pillow", help="of ours")
    parser.add_argument("--measure", choices=("ours", "theirs"), help="measure one pipeline once")
    flags = parser.parse_args()
    if flags.measure:
        pipeline = dict(ours=ours, theirs=theirs)[flags.measure]
        batches = pipeline(flags.data, flags.workers, flags.resizer)
        print(json.dumps(measure(batches, flags.images)), flush=True)
        os._exit(0)  # without waiting for prefetched batches

    with tempfile.TemporaryDirectory() as folder:
        if not flags.data:
            photographs(Path(folder))
        elif os.path.isfile(flags.data):
            with tarfile.open(flags.data) as tar:
                tar.extractall(folder, filter="data")
        else:
            folder = flags.data
        print(", ".join(f"{n} {version(n)}" for n in ("grain", "pillow", "torch", "numpy")))
        sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
        print(
            f"{len(sizes)} files of {statistics.mean(sizes) / 1e3:.0f} kB; {os.cpu_count()} cores"
        )
        if flags.resizer != "pillow":
            far = distances(folder, flags.resizer)
            print(
                f"mean difference from Pillow's pixels, of 255: {statistics.mean(far):.3f}, at "
                f"most {max(far):.2f} in an image; over 0.2 in {sum(x > 0.2 for x in far)} of "
                f"{len(far)} images"
            )
        call = [sys.executable, "-m", "benchmarks.input", f"--data={folder}"]
        call += [f"--images={flags.images}", f"--workers={flags.workers}"]
        call += [f"--resizer={flags.resizer}"]
        times = {"ours": [], "theirs": []}
        for i in range(flags.rounds):
            for name, measurements in times.items():
                done = subprocess.run(
                    [*call, f"--measure={name}"], check=True, stdout=subprocess.PIPE, text=True
                )
                measurements.append(json.loads(done.stdout.splitlines()[-1]))
            a, b = times["ours"][-1], times["theirs"][-1]
            print(
                f"round {i + 1}: ours {a:.2f} ms, theirs {b:.2f} ms, ratio {b / a:.2f}", flush=True
            )
    for name, measurements in times.items():
        print(f"{name}: {1e3 / statistics.median(measurements):.0f} images per CPU second (median)")
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    print(
        f"ours / theirs: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"median and range of {flags.rounds} rounds"
    )


if __name__ == "__main__":
    main()
