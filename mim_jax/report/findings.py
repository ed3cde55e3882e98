"""Examines a run's newest checkpoint on images of its evaluation split, for a report.

Shapes: b images, k classes, v codes, (h, w) a grid of tokens.
"""

import heapq
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mim_jax import UserError, pictures, recipe, schema
from mim_jax.checkpoint.saved import peek
from mim_jax.normalize import unit
from mim_jax.recipe import Run
from mim_jax.sharding import all_gather, replicated, to_global
from mim_jax.start import Start

SHOWN = 4  # images whose attention maps are drawn
HARDEST = 12  # images whose label is least expected
TOKENIZED = 256  # images whose tokens are counted
PREDICTED = 5000  # images that are classified, at most
SMALLEST = 224  # side of images whose attention is drawn: smaller ones are enlarged


class Hard(NamedTuple):
    """An image whose label has a low predicted probability."""

    image: np.ndarray  # (H, W, c) in [0, 1]
    name: str
    label: int
    guess: int
    probability: float  # predicted probability of the label


class Predictions(NamedTuple):
    """The classes that a classifier predicts."""

    confusion: np.ndarray  # (k, k) numbers of images by label and prediction
    hardest: list[Hard]  # by increasing probability of the label


class Codebook(NamedTuple):
    """The use of a tokenizer's codes."""

    counts: np.ndarray  # (v,) of each code
    columns: pictures.Columns  # images, their tokens, and the decoded images

    @property
    def used(self) -> int:
        """Number of codes in use."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """The exponential of the entropy of the codes' frequencies."""
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))


class Findings(NamedTuple):
    """Results of an examination; None for those that do not apply to a run."""

    attention: pictures.Columns | None = None
    codebook: Codebook | None = None
    predictions: Predictions | None = None
    missing: tuple[str, ...] = ()  # what could not be computed, and why


def examine(path: str, trust_code: bool = False) -> Findings:
    """Examines the newest checkpoint of a run.

    Errors do not stop a report: their messages are listed in `missing`.
    """
    results: dict[str, Any] = {}
    missing = []
    try:
        config = recipe.fit_to_devices(schema.load(path, trust_code=trust_code))
        run = recipe.build(config)
        images = first_images(run, TOKENIZED)
    except Exception as error:  # for example missing data, or code that is not trusted
        return Findings(missing=(f"nothing can be computed from the checkpoint: {error}",))
    parts = {
        "attention": lambda: attention_of(path, run, images[:SHOWN]),
        "codebook": lambda: codebook_of(path, run, images),
        "predictions": lambda: predictions_of(path, run, config),
    }
    for name, compute in parts.items():
        try:
            results[name] = compute()
        except Exception as error:
            missing.append(f"{name}: {error or type(error).__name__}")
    return Findings(**results, missing=tuple(missing))


def first_images(run: Run, count: int) -> np.ndarray:
    """Returns the first images of the evaluation split, at the size of training."""
    batch = next(run.data.evaluation_batches(count, limit=count))
    return batch["image"][batch["valid"] > 0]


def attention_of(path: str, run: Run, images: np.ndarray) -> pictures.Columns | None:
    """Draws attention maps of the class token and of the central patch."""
    if run.model is None:
        return None
    if run.model.stem != "none":
        raise UserError("attention maps of encoders with a ResNet stem are not supported")
    size = max(SMALLEST, *run.data.image.size)
    p, q = run.model.patch
    middle = size // p // 2, size // q // 2
    return pictures.attend(path, list(images), queries=[middle], size=size)


def codebook_of(path: str, run: Run, images: np.ndarray) -> Codebook | None:
    """Counts the codes of images, and draws some of them."""
    if run.tokenizer is None:
        return None
    network, parts, data = pictures.tokenizer_of(path)
    tokens_of = jax.jit(network.tokens)
    counts = np.zeros(network.encoder.vocabulary, np.int64)
    for start in range(0, len(images), 32):
        batch = pictures.batch_of(list(images[start : start + 32]), data)
        tokens = tokens_of(parts["tokenizer"], unit(batch["image"]))
        counts += np.bincount(np.asarray(tokens).reshape(-1), minlength=len(counts))
    return Codebook(counts, pictures.tokenize(path, list(images[:SHOWN])))


def predictions_of(path: str, run: Run, config: ConfigDict) -> Predictions | None:
    """Classifies images of the evaluation split."""
    if run.objective.predict is None:
        return None
    run.require_labels(config.data.evaluation_split)
    state = peek(path, Start(run, config).like)
    params, buffers = all_gather((state.averaged, state.buffers), run.mesh)
    predict = jax.jit(run.objective.predict, out_shardings=replicated(run.mesh))
    k = run.data.num_labels
    confusion = np.zeros((k, k), np.int64)
    hardest: list[tuple] = []
    for batch in run.data.evaluation_batches(run.rows, limit=PREDICTED):
        logits = np.asarray(predict(params, buffers, to_global(batch, run.mesh)), np.float64)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        shares = odds / odds.sum(1, keepdims=True)
        for i in np.flatnonzero(batch["valid"] > 0):
            label, guess = int(batch["label"][i]), int(shares[i].argmax())
            if not 0 <= label < k:
                continue
            confusion[label, guess] += 1
            index = int(batch["index"][i])
            example = -shares[i, label], index, label, guess, batch["image"][i]
            (heapq.heappush if len(hardest) < HARDEST else heapq.heappushpop)(hardest, example)
    worst = [
        Hard(np.asarray(unit(image)), run.data.evaluation.name_of(index), label, guess, -negative)
        for negative, index, label, guess, image in sorted(hardest, reverse=True)
    ]
    return Predictions(confusion, worst)
