"""The loss against PyTorch, mean IoU against a count in NumPy, on one device and on eight."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from mim_jax import UserError, check, embed, main
from mim_jax import evaluate as evaluate_command
from mim_jax.data.emoji_masks import EMOJI
from mim_jax.models.vit import vit
from mim_jax.objectives import segment
from mim_jax.optim import layer_scales
from mim_jax.sharding import make_mesh
from mim_jax.train import TrainState, evaluate

K = 5  # classes; in the masks, 3 never occurs and 255 is ignored
NAMES, COLORS = tuple("abcde"), tuple((40 * i, 100, 200) for i in range(K))
SIZE = 32
STRIDE = 19


def model(**settings):
    return vit(width=32, depth=4, heads=2, patch=8, drop_path=0.1, **settings)


def objective(**settings):
    defaults = dict(layers=(0, 1, 2, 3), stride=STRIDE / SIZE, batch_norm=2)
    defaults |= dict(channels=16, auxiliary_channels=8)
    return segment.objective(model(), NAMES, COLORS, (SIZE, SIZE), **defaults | settings)


def masks(rng, *shape) -> np.ndarray:
    return rng.choice(np.array([0, 1, 2, 4, 255], np.uint8), shape)


def training_batch(count: int = 4) -> dict:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8),
        "segmentation": masks(rng, count, SIZE, SIZE),
        "index": np.arange(count, dtype=np.int32),
    }


def evaluation_batch(count: int = 8, padding: int = 0) -> dict:
    """Images of odd sizes in one shape, masks of other sizes in another; the last are padding."""
    rng = np.random.default_rng(1)
    batch = {
        "image": rng.integers(0, 256, (count, 40, 61, 3), np.uint8),
        "image_size": np.stack([rng.integers(33, 41, count), rng.integers(33, 62, count)], 1),
        "segmentation": masks(rng, count, 75, 90),
        "segmentation_size": np.stack([rng.integers(50, 76, count), rng.integers(9, 91, count)], 1),
        "index": np.arange(count, dtype=np.int32),
        "valid": (np.arange(count) < count - padding).astype(np.float32),
    }
    for labels, (height, width) in zip(
        batch["segmentation"], batch["segmentation_size"], strict=True
    ):
        labels[height:], labels[:, width:] = 255, 255
    return batch


def begin(ours) -> tuple[dict, dict]:
    """Parameters and buffers, of deviations that make a network say something."""
    params, buffers = jax.jit(ours.init)(jax.random.key(0), training_batch())
    key = jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), params)
    return params, buffers


@pytest.mark.parametrize("average", ["all", "labeled"])
def test_loss_equals_torch(average):
    torch = pytest.importorskip("torch")
    ours, batch = objective(average=average, dropout=0.0), training_batch()
    params, buffers = begin(ours)
    network = segment.Segmenter(model(), K, "upernet", (0, 1, 2, 3), 16, 2, 0.0, 8)
    rng = jax.random.key(2)
    total, weight, (metrics, after) = ours.loss(params, buffers, batch, rng, 0)
    images = (batch["image"] / 255 - np.array(segment.MEAN)) / np.array(segment.STD)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.split(rng)[0], batch["index"])
    variables = {"params": params} | buffers
    (logits, auxiliary), _ = network.apply(
        variables, images.astype(np.float32), keys, None, True, mutable=["batch_statistics"]
    )
    labels = torch.from_numpy(batch["segmentation"].astype(np.int64))
    losses = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy()),
            labels,
            ignore_index=255,
            reduction="none",
        )
        for x in (logits, *auxiliary)
    ]
    main, beside = (
        x.mean() if average == "all" else x.sum() / (labels < 255).sum() for x in losses
    )
    np.testing.assert_allclose(total / weight, main + 0.4 * beside, rtol=1e-5)
    np.testing.assert_allclose(metrics["auxiliary_loss"], beside, rtol=1e-5)
    before = buffers["batch_statistics"]["head"]["fusion"]["norm"]["mean"]
    assert (before != after["batch_statistics"]["head"]["fusion"]["norm"]["mean"]).any()


def counted(ours, params, buffers, batch) -> tuple[np.ndarray, float]:
    """-> confusion of all that counts, one pixel after the other, and the mean loss.

    Of scores by the objective's own network, interpolated by PyTorch.
    """
    torch = pytest.importorskip("torch")
    confusion, losses = np.zeros((K, K), int), []
    for i in range(int(batch["valid"].sum())):
        scores = scored(ours, params, buffers, batch, i)
        x = torch.from_numpy(np.moveaxis(scores, -1, 0).copy())[None]
        height, width = (int(side) for side in batch["segmentation_size"][i])
        x = torch.nn.functional.interpolate(x, (height, width), mode="bilinear")[0]
        guess, log = x.argmax(0).numpy(), x.log_softmax(0).numpy()
        for row in range(height):
            for column in range(width):
                label = batch["segmentation"][i, row, column]
                if label != 255:
                    confusion[label, guess[row, column]] += 1
                    losses.append(-log[label, row, column])
    return confusion, float(np.mean(losses))


def scored(ours, params, buffers, batch, i) -> np.ndarray:
    """The mean logits of the windows of one image, cut out without padding."""
    network = segment.Segmenter(model(), K, "upernet", (0, 1, 2, 3), 16, 2, 0.0, 8)
    height, width = batch["image_size"][i]
    images = (batch["image"] / 255 - np.array(segment.MEAN)) / np.array(segment.STD)
    image = images[i, :height, :width].astype(np.float32)
    total, times = np.zeros((height, width, K)), np.zeros((height, width, 1))
    for top in sorted({*range(0, height - SIZE, STRIDE), height - SIZE}):
        for left in sorted({*range(0, width - SIZE, STRIDE), width - SIZE}):
            part = np.s_[top : top + SIZE, left : left + SIZE]
            variables = {"params": params} | buffers
            total[part] += np.asarray(network.apply(variables, image[part][None])[0][0])
            times[part] += 1
    return total / times


def test_mean_iou_is_a_count():
    """With ignored pixels, a class that is absent, and padding; on 1 device and on 8."""
    ours, batch = objective(), evaluation_batch(padding=3)
    params, buffers = begin(ours)
    state = TrainState(jnp.zeros((), int), params, buffers, ())
    results = []
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        results.append(evaluate(ours, state, [batch], mesh=mesh, seed=0))
    confusion, loss = counted(ours, params, buffers, batch)
    right, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    iou = [r / (u - r) for r, u in zip(right, union, strict=True) if u]
    accuracy = [r / t for r, t in zip(right, confusion.sum(1), strict=True) if t]
    assert len(accuracy) == K - 1
    assert len(set(np.nonzero(confusion)[1])) > 2  # it does not always guess the same
    for result in results:
        np.testing.assert_allclose(result["miou"], np.mean(iou), rtol=1e-12)
        np.testing.assert_allclose(result["class_accuracy"], np.mean(accuracy), rtol=1e-12)
        np.testing.assert_allclose(
            result["pixel_accuracy"], right.sum() / confusion.sum(), rtol=1e-12
        )
        np.testing.assert_allclose(result["loss"], loss, rtol=1e-5)


def test_absent_classes():
    """A class that is neither in the labels nor guessed does not count."""
    confusion = np.array([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    result = objective().summarize({"confusion": confusion / 7, "loss": 3 / 7})
    np.testing.assert_allclose(result["miou"], (6 / 8 + 4 / 6) / 2)
    np.testing.assert_allclose(result["class_accuracy"], (6 / 8 + 1) / 2)
    np.testing.assert_allclose(result["loss"], 3 / 12)
    np.testing.assert_allclose(result["by_class"][:2, 2], [6 / 8, 4 / 6])
    assert np.isnan(result["by_class"][2, 1:]).all()
    confusion[0, 2] = 1
    result = objective().summarize({"confusion": confusion, "loss": 0.0})
    np.testing.assert_allclose(result["miou"], (6 / 9 + 4 / 6 + 0) / 3)
    with pytest.raises(UserError, match="no pixel has a label"):
        objective().summarize({"confusion": confusion * 0, "loss": 0.0})


def mirrored(batch: dict) -> dict:
    """The batch with images and masks mirrored within their sizes."""
    batch = {name: x.copy() for name, x in batch.items()}
    for name in ("image", "segmentation"):
        for x, (_, width) in zip(batch[name], batch[f"{name}_size"], strict=True):
            x[:, :width] = x[:, :width][:, ::-1]
    return batch


def test_scales_and_flips_are_averaged():
    """With flips, what is counted in mirrored images is the same; without, it is not."""
    batch = evaluation_batch(4)
    params, buffers = begin(objective())

    def confusion(batch, **settings):
        evaluate = jax.jit(objective(**settings).evaluate)
        counts = evaluate(params, buffers, batch, jax.random.key(0))["confusion"]
        assert counts.sum() == (batch["segmentation"] < K).sum()
        return counts

    several = dict(scales=(0.5, 1.0, 1.3), mirror=True)
    assert (confusion(batch) != confusion(mirrored(batch))).any()
    assert (confusion(batch) != confusion(batch, **several)).any()
    difference = confusion(batch, **several) - confusion(mirrored(batch), **several)
    assert abs(difference).sum() <= 4  # pixels of nearly equal scores


@pytest.mark.parametrize("decoder", ["upernet", "setr_pup", "setr_naive", "linear"])
def test_decoders_learn_one_image(decoder):
    """And only what is to be trained moves."""
    batch = training_batch(2)
    batch["segmentation"][:] = np.arange(SIZE) > SIZE // 2
    ours = objective(decoder=decoder, frozen=decoder == "linear", dropout=0.0)
    params, buffers = jax.jit(ours.init)(jax.random.key(0), batch)
    assert ("encoder" in buffers) == (decoder == "linear")
    tx = optax.adam(1e-2)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, buffers, opt_state):
        def loss(params):
            total, weight, (_, after) = ours.loss(params, buffers, batch, jax.random.key(0), 0)
            return total / weight, after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), after, opt_state, value

    losses = []
    for _ in range(40):
        params, buffers, opt_state, value = step(params, buffers, opt_state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_pictures():
    ours, batch = objective(), evaluation_batch(3)
    params, buffers = begin(ours)
    columns = jax.jit(ours.pictures)(params, buffers, batch, jax.random.key(0))
    assert {x.shape for x in columns.values()} == {(3, 40, 61, 3)}
    black = (np.asarray(columns["truth"]) == 0).all(-1)
    assert 0.1 < black.mean() < 0.8
    height, width = batch["image_size"][0]
    outside = np.asarray(columns["prediction"])[0].copy()
    outside[:height, :width] = 0
    assert not outside.any()


def test_colors():
    """Those of the data set, and black for any other label."""
    painted = np.asarray(segment.paint(jnp.array([[[0, 4, 5, 255]]], jnp.uint8), COLORS)) * 255
    np.testing.assert_allclose(painted[0, 0], [COLORS[0], COLORS[4], (0, 0, 0), (0, 0, 0)])


def test_pictures_of_training_images():
    """They have no sizes in the batch, because none is padded beyond its shape."""
    ours, batch = objective(), training_batch()
    params, buffers = begin(ours)
    truth = ours.pictures(params, buffers, batch, jax.random.key(0))["truth"]
    np.testing.assert_array_equal(truth, segment.paint(batch["segmentation"], COLORS))


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (4, (0, 1, 2, 3)), (2, (0, 0, 1, 1))],
)
def test_default_layers(depth, expected):
    """As BEiT's configs for ViT-B and ViT-L."""
    encoder = model().clone(depth=depth)
    ours = segment.Segmentation(encoder, NAMES, COLORS, (SIZE, SIZE))
    assert ours.decoded == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(layers=(0, 1, 2, 4)), "blocks from 0 to 3"),
        (dict(layers=(1, 3)), "must be four blocks for UPerNet"),
        (dict(scales=()), "at least one scale"),
    ],
)
def test_refused(settings, words):
    with pytest.raises(UserError, match=words):
        objective(**settings)


# --- Whole runs, from a config. ---

CONFIG = "--config=configs/camvid_tiny.py"
SMOKE = [CONFIG, "--smoke", "--config.steps=4", "--config.save.every_steps=2"]
SMOKE += ["--config.data.evaluation_split=validation[:20]", "--config.log.every_steps=1"]


def records(run) -> list[dict]:
    """The losses and the evaluations of a run."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    keep = ("step", "loss", "evaluate/miou", "evaluate/loss")
    kept = [{k: x for k, x in json.loads(line).items() if k in keep} for line in lines]
    return [record for record in kept if len(record) > 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segment") / "run"
    assert main.main([*SMOKE, f"--workdir={folder}"]) == 0
    return folder


def test_a_run_continues_exactly(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    assert main.main([*SMOKE, f"--workdir={again}"]) == 0
    assert records(again) == records(run)


def test_table_by_class(run, tmp_path, capsys):
    to = tmp_path / "found.json"
    assert evaluate_command.main([f"--config={run}", f"--to={to}"]) == 0
    said = capsys.readouterr().out
    assert "class  of all  accuracy       IoU" in said
    rows = [line.split() for line in said.splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["background", "gray", "red", "yellow", "green", "blue"]
    evaluation = json.loads(to.read_text())
    assert evaluation["miou"] == pytest.approx(records(run)[-1]["evaluate/miou"], rel=1e-6)
    shares, _, iou = np.array(evaluation["by_class"], float).T
    assert shares.sum() == pytest.approx(1)
    assert np.nanmean(iou) == pytest.approx(evaluation["miou"])


def test_sheets_have_a_legend(run):
    """Each class's color occurs at the bottom of the sheet."""
    sheet = np.asarray(Image.open(run / "pictures" / "step_0000004.png"))
    bottom = {tuple(color) for color in sheet[-40:].reshape(-1, 3).tolist()}
    assert bottom >= set(EMOJI.colors)


@pytest.mark.parametrize(
    ("source", "model", "resized", "new"),
    [
        ("mae_emoji", dict(relative_bias="own"), "positions", "relative_position_bias/table"),
        (
            "beit_base_in22k_finetune",  # fine-tuned for classification in between
            dict(relative_bias="own", positions="none", key_bias=False, layer_scale=0.1),
            "block_0/relative_position_bias/table",
            "",
        ),
    ],
)
def test_a_run_starts_from_a_trained_encoder(source, model, resized, new, tmp_path, capsys):
    """Of a smaller grid and another objective: tables of positions are interpolated."""
    small = ["--smoke", "--config.steps=3", "--config.model.patch=16"]
    begun = [f"--config=configs/{source}.py", *small, f"--workdir={tmp_path / 'begun'}"]
    assert main.main(begun) == 0
    settings = [CONFIG, *small, f"--workdir={tmp_path / 'run'}", "--config.data.size=96"]
    settings += [f"--config.model.{key}={value}" for key, value in model.items()]
    capsys.readouterr()
    assert main.main([*settings, f"--config.init_from.encoder={tmp_path / 'begun'}"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("encoder: "))
    assert resized in line.partition("resized: ")[2].partition(";")[0]
    assert new in line.partition("new: ")[2]


def test_layers_decay_to_the_encoder():
    """The decoder has the whole rate, the embedding the smallest (BEiT's optimizer)."""
    params, _ = begin(objective())
    scales = layer_scales(params, 0.5)
    assert set(jax.tree.leaves({k: scales[k] for k in ("head", "pyramid", "auxiliary")})) == {1}
    encoder = scales["encoder"]
    assert set(jax.tree.leaves(encoder["block_3"])) == {0.5}
    assert set(jax.tree.leaves(encoder["block_0"])) == {0.5**4}
    assert encoder["embed"]["kernel"] == encoder["cls_token"] == 0.5**5


def test_a_wrong_mask_is_named_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("images", "masks"):
        for split in ("train", "val"):
            path = tmp_path / "set" / folder / split / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.zeros((40, 40), np.uint8)).save(path)
    (tmp_path / "set/classes.csv").write_text("1,a\n2,b\n")
    settings = [CONFIG, f"--config.data.name=folder:{tmp_path / 'set'}"]
    for command in (main.main, check.main):
        assert command([*settings, f"--workdir={tmp_path / 'run'}"]) == 2
        assert "masks/train/a.png has values without a class: 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_features_need_images_of_one_size(run, tmp_path, capsys):
    assert embed.main([f"--config={run}", f"--to={tmp_path / 'x.npz'}"]) == 2
    assert "features need a single" in capsys.readouterr().err
    probe = ["--config.probe.images=10", f"--workdir={tmp_path / 'probed'}"]
    assert main.main([*SMOKE, *probe]) == 2
    assert "features need a single" in capsys.readouterr().err
