"""What is asked of features while an encoder is trained."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mim_jax import UserError, embed, main, probe, recipe, schema
from mim_jax.sharding import make_mesh
from mim_jax.train import TrainState

RNG = np.random.default_rng(0)


def test_neighbors_vote_by_cosine():
    """Against the formula written out for one image after the other."""
    train, test = RNG.normal(size=(50, 8)), RNG.normal(size=(9, 8))
    labels = RNG.integers(0, 4, 50)
    expected = []
    for x in test:
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in train]
        votes = {}
        for c, label in sorted(zip(cosines, labels, strict=True), reverse=True)[:5]:
            votes[label] = votes.get(label, 0) + np.exp(c / 0.07)
        expected.append(max(votes, key=votes.get))
    np.testing.assert_array_equal(probe.neighbors(train, labels, test, k=5), expected)


def test_the_temperature_weighs_neighbors():
    """Two neighbors outvote a nearer one if it is nearer by less than 0.07 ln 2 = 0.0485."""
    test = np.array([[1.0, 0.0]])
    for cosine, winner in ((0.9 - 0.047, 1), (0.9 - 0.050, 0)):
        cosines = np.array([0.9, cosine, cosine])
        train = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
        assert probe.neighbors(train, np.array([0, 1, 1]), test, k=3)[0] == winner


def test_the_linear_classifier_is_independent_of_scale():
    train, test = RNG.normal(size=(400, 6)), RNG.normal(size=(300, 6))
    weights = RNG.normal(size=(6, 3))
    labels, asked = (train @ weights).argmax(1), (test @ weights).argmax(1)
    scale, shift = 10.0 ** np.arange(-3, 3), 100 * RNG.normal(size=6)
    for x, y in ((train, test), (train * scale + shift, test * scale + shift)):
        assert (probe.linear(x, labels, y) == asked).mean() > 0.85


def test_rank_counts_directions():
    one = np.outer(RNG.normal(size=100), RNG.normal(size=16))
    assert probe.rank(one) == pytest.approx(1, abs=0.01)
    many, _ = np.linalg.qr(RNG.normal(size=(100, 16)))
    assert probe.rank(many) == pytest.approx(16, rel=0.01)
    assert probe.rank(7 * many) == pytest.approx(probe.rank(many))


@pytest.mark.parametrize("config", ["mae_emoji", "emoji_linear"])  # all trained; all frozen
def test_probes_use_unmasked_images(config, tmp_path):
    """The figures of a run are those of the features that `embed` writes of its last state."""
    run = str(tmp_path / "run")
    small = ["--config.probe.images=96", "--config.probe.every_steps=20", "--config.data.size=32"]
    arguments = [f"--config=configs/{config}.py", "--smoke", *small, f"--workdir={run}"]
    assert main.main(arguments) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    *_, said = [line for line in lines if "evaluate/probe_knn" in line]
    features = {}
    for split in ("train", "validation"):
        to = str(tmp_path / f"{split}.npz")
        assert (
            embed.main(
                [f"--config={run}", f"--to={to}", f"--config.data.evaluation_split={split}[:96]"]
            )
            == 0
        )
        features[split] = np.load(to)
    train, test = features["train"], features["validation"]
    for name, predict in (("knn", probe.neighbors), ("linear", probe.linear)):
        told = predict(train["mean"], train["label"], test["mean"])
        assert said[f"evaluate/probe_{name}"] == pytest.approx(
            (told == test["label"]).mean(), abs=0.03
        )
    assert said["evaluate/probe_rank"] == pytest.approx(probe.rank(train["mean"]), rel=1e-3)


def test_embedding_with_a_tokenizer_is_refused():
    config = schema.load("configs/dvae_emoji.py", ["probe.images=10"])
    with pytest.raises(UserError, match="dvae has no encoder"):
        recipe.encoder_of(recipe.build(config), config)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_without_labels_only_the_rank_is_reported(split):
    def batches(batch_size, *, limit, of_training):
        label = np.arange(8) % 3
        if split == ("train" if of_training else "validation"):
            label = np.full(8, -1)
        image = RNG.normal(size=(8, 4, 4, 3)).astype(np.float32)
        yield {"image": image, "label": label, "valid": np.ones(8, np.float32)}

    data = SimpleNamespace(evaluation_batches=batches)
    mesh = make_mesh()
    ask = probe.Probe(lambda params, x: x.reshape(8, 4, 12), data, mesh, batch_size=8, images=8)
    state = TrainState(0, {"encoder": {"x": np.zeros(1)}}, {}, ())
    assert ask(state).keys() == {"probe_rank"}

    def guard(batches):  # as of a run that receives a signal
        yield next(batches)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        ask(state, guard)
