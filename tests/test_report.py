"""The report: whole and harmless for every kind of run, and right where it computes."""

import base64
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mim_jax import cli, main, schema
from mim_jax.report import __main__ as page_of_runs
from mim_jax.report import charts, facts, findings, images
from mim_jax.runs import read_run
from tests.conftest import ROOT

VOID = {"meta", "link", "img", "input", "br", "path", "circle"}
HOSTILE = '"><script>alert(1)</script>'


class Page(HTMLParser):
    """The elements of a page, which must be well-formed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.ids: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def make(folder, lines=(), *, config="mae_base", overrides=(), events=(), record=None):
    """Writes the files of a run that has logged these lines."""
    settings = schema.load(str(ROOT / f"configs/{config}.py"), overrides, smoke=True).to_dict()
    folder.mkdir(parents=True)
    written = dict(config=settings, trajectory={}, versions={"jax": "0"}, devices="1 x cpu")
    (folder / "config.json").write_text(json.dumps(written | (record or {})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    return folder


def written(*folders, options=("--files-only",), to=None):
    """Writes a report and returns its page, after checks that every page must pass."""
    to = to or folders[0] / "report.html"
    assert cli.main(["report", *map(str, folders), f"--to={to}", *options]) == 0
    text = to.read_text()
    assert len(text.encode()) < page_of_runs.LARGEST
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    links = [x.get("href", "") for x in (*page.of("a"), *page.of("link"))]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(page.ids)
    assert all(x["src"].startswith("data:") for x in page.of("img"))
    assert all("alt" in x for x in page.of("img"))
    assert not any("style" in x or "src" in x for _, x in page.elements if "alt" not in x)
    assert not re.search(r"url\(|@import|https?://", text)
    (policy,) = (x["content"] for x in page.of("meta") if "http-equiv" in x)
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert all(
        x.get("role") == "img" and x["aria-label"]
        for x in page.of("svg")
        if "key" not in x["class"]
    )
    return text, page


def training(count, every=10, **more):
    return [dict(step=every * (i + 1), loss=2 / (i + 1), **more) for i in range(count)]


def charts_of(page):
    return [x for x in page.of("svg") if x["class"] == "chart"]


def test_a_run_without_records(tmp_path):
    text, page = written(make(tmp_path / "run"))
    assert "No metrics have been recorded yet" in text
    assert not charts_of(page)


def test_a_run_with_one_metric(tmp_path):
    text, page = written(make(tmp_path / "run", [dict(step=5, loss=0.25)]))
    assert len(charts_of(page)) == 1
    assert "0.25" in text


def test_not_finite_losses_are_reported(tmp_path):
    lines = [*training(3), dict(step=40, loss=float("nan"))]
    text, page = written(make(tmp_path / "run", lines))
    assert "loss is not finite in 1 record" in text
    assert "1 values not finite" in charts_of(page)[0]["aria-label"]


def test_two_hundred_thousand_records(tmp_path):
    lines = training(200_000, 1, grad_norm=1.0, lr=0.1, images_per_second=100.0)
    text, page = written(make(tmp_path / "run", lines))
    assert len(text) < 400_000
    assert len(charts_of(page)) == 4


def test_a_run_that_was_killed(tmp_path):
    events = [dict(time=1.0, step=0, event="start")]
    folder = make(tmp_path / "run", training(3), events=events, overrides=["steps=100"])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    (folder / "pictures").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "pictures" / "step_0000010.png")
    (folder / "pictures" / "step_0000020.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    for path in folder.glob("*.jsonl"):
        os.utime(path, (1e9, 1e9))
    text, page = written(folder)
    assert "The process ended unexpectedly" in text
    assert len(page.of("img")) == 1


def test_warnings_and_faults(tmp_path):
    events = [
        dict(time=1.0, step=0, event="start", text=""),
        dict(time=2.0, step=10, event="warning", text="the codebook has collapsed"),
        dict(time=2.5, step=15, event="rollback", text="returning to step 10"),
        dict(time=3.0, step=20, event="failed", text="the disk is full"),
    ]
    folder = make(tmp_path / "run", training(2), events=events)
    (folder / "bad_files.jsonl").write_text('{"file": "a.jpg", "reason": "broken"}\n')
    (folder / "checkpoints" / "10.corrupt-1").mkdir(parents=True)
    text, _ = written(folder)
    for words in ("codebook has collapsed", "disk is full", "first a.jpg", "was corrupt"):
        assert words in text
    assert "returning to step 10" in text
    many = [dict(time=2.0, step=i, event="failure", text=f"fault {i}") for i in range(100)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in many))
    text, _ = written(folder)
    assert "fault 99" in text
    assert "fault 79" not in text
    assert "80 more, in events.jsonl" in text


@pytest.mark.parametrize(
    "config", ["mae_base", "beit_base", "simmim_base", "dvae", "mae_base_finetune"]
)
def test_every_objective(config, tmp_path):
    text, page = written(make(tmp_path / "run", training(3), config=config))
    assert "objective.name" in text
    assert len(charts_of(page)) == 1


def test_hostile_names(tmp_path):
    record = dict(data=dict(images=1, class_names=[HOSTILE]), git=dict(commit=HOSTILE))
    record |= dict(versions={HOSTILE: HOSTILE}, devices=HOSTILE)
    line = {"step": 1, "loss": 1.0, HOSTILE: 2.0}
    event = dict(time=1.0, step=1, event="warning", text=HOSTILE)
    overrides = [f"data.name=folder:{HOSTILE}"]
    name = "<script>alert(1)<" + "script>"
    folder = make(tmp_path / name, [line], record=record, overrides=overrides, events=[event])
    (folder / "bad_files.jsonl").write_text(json.dumps(dict(file=HOSTILE)) + "\n")
    (folder / "evaluation.json").write_text('{"step": 1, "by_class": [[1.0, 0.5]]}')
    text, page = written(folder, to=tmp_path / "report.html")
    assert text.count("<script") == 1
    assert len(page.of("script")) == 1
    assert "&lt;script&gt;alert(1)" in text


def test_an_objective_that_is_not_installed(tmp_path):
    folder = make(tmp_path / "run", training(2))
    record = json.loads((folder / "config.json").read_text())
    record["config"]["objective"] = {"name": "theirs", "width": 3}
    (folder / "config.json").write_text(json.dumps(record | dict(code="/their/theirs.py")))
    text, _ = written(folder, options=())
    assert "nothing can be computed from the checkpoint" in text
    assert "/their/theirs.py" in text


def test_runs_are_compared(tmp_path):
    first = make(tmp_path / "a" / "run", training(3), overrides=["seed=1"])
    second = make(tmp_path / "b" / "run", training(5), overrides=["optimizer.b2=0.9"])
    text, page = written(first, second)
    (label,) = (x["aria-label"] for x in charts_of(page))
    assert "run (1), training" in label
    assert "run (2), training" in label
    (table,) = re.findall(r'aria-label="keys that differ">(.*?)</table>', text, re.DOTALL)
    assert set(re.findall(r"<code>(.*?)</code>", table)) == {"seed", "optimizer.b2"}


def test_published_figures_are_for_their_data(tmp_path):
    """Those of ImageNet-1k are drawn for ImageNet-1k alone, and name keys that exist."""
    lines = [dict(step=10 * i, loss=0.9 - 0.1 * i) for i in range(1, 5)]
    label = "official code after 15 epochs"
    imagenet = ["data.name=imagenet2012", "objective.target=normalized_pixels"]
    assert label in written(make(tmp_path / "imagenet", lines, overrides=imagenet))[0]
    assert label not in written(make(tmp_path / "emoji", lines, overrides=imagenet[1:]))[0]
    for entry in json.loads(charts.PUBLISHED.read_text()):
        name, where = entry["where"]["objective.name"], entry["where"]
        config = dict(mae="mae_base", beit="beit_base", classify="mae_base_finetune")[name]
        values = schema.flatten(schema.load(str(ROOT / f"configs/{config}.py")))
        assert where == {key: values[key] for key in where}
        assert entry["low"] <= entry["high"]


def test_keys_that_differ_from_their_defaults(tmp_path):
    run = read_run(make(tmp_path / "run", overrides=["objective.mask_ratio=0.5", "log.wandb="]))
    changed = {setting.key: setting for setting in facts.settings(run) if setting.changed}
    assert changed["objective.mask_ratio"].value == "0.5"
    assert changed["objective.mask_ratio"].default == "0.75"
    assert "share of hidden patches" in changed["objective.mask_ratio"].meaning
    assert "log.wandb" not in changed
    assert "batch_size" in changed  # it has no default


def test_pictures_leave_a_page_below_its_size(tmp_path, monkeypatch):
    folder = make(tmp_path / "run", training(2))
    (folder / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 300, 300, 3), np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(folder / "pictures" / f"step_{i:07d}.png")
    _, page = written(folder)
    assert len(page.of("img")) == page_of_runs.FRAMES
    assert page.of("img")[-1]["alt"] == "step 19"
    monkeypatch.setattr(page_of_runs, "LARGEST", 400_000)
    _, page = written(folder)
    assert 0 < len(page.of("img")) < page_of_runs.FRAMES


def test_damaged_pictures_are_left_out(tmp_path, monkeypatch):
    folder = make(tmp_path / "run", training(2)) / "pictures"
    folder.mkdir()
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    for name in ("step_1.png", "step_all.png"):
        image.save(folder / name)
    image.resize((400, 400)).save(folder / "step_2.png")  # above the limit below
    (folder / "step_3.png").write_bytes((folder / "step_1.png").read_bytes()[:60])
    (folder / "step_4.png").symlink_to("/dev/zero")
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    _, page = written(folder.parent)
    assert [image["alt"] for image in page.of("img")] == ["step 1"]


def test_a_link_in_place_of_the_page_is_replaced(tmp_path):
    """A stranger's directory may have links to files outside."""
    folder, file = make(tmp_path / "run", training(2)), tmp_path / "file"
    file.write_text("content")
    for name in ("report.html", "report.part"):
        (folder / name).symlink_to(file)
    assert cli.main(["report", str(folder), "--files-only"]) == 0
    assert file.read_text() == "content"
    assert "<html" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"by_class": [[1, 2]], "step": "x"}',
        '{"by_class": [[[1, 2], [1, 2]]]}',
        '{"by_class": [[1, 1%s]]}' % ("0" * 400),
        "[5]",
    ],
    ids=range(5),
)
def test_damaged_results_by_class_are_left_out(tmp_path, text):
    folder = make(tmp_path / "run", training(2))
    (folder / "evaluation.json").write_text(text)
    written(folder)


def test_many_runs_leave_out_what_was_computed(tmp_path, monkeypatch):
    runs = [read_run(make(tmp_path / f"run_{i}", training(2))) for i in range(3)]
    noise = np.random.default_rng(0).random((8, 128, 128, 3))
    examined = [findings.Findings(attention={"image": noise, "average": noise})] * 3
    assert page_of_runs.fitted(runs, examined).count("data:image") == 48
    monkeypatch.setattr(page_of_runs, "LARGEST", 300_000)
    text = page_of_runs.fitted(runs, examined)
    assert len(text) < page_of_runs.LARGEST
    assert text.count("the page would be too large") == 3


def test_time_and_goodput(tmp_path):
    spent = dict(start=100, compile=50, step=700, input=50, save=20, evaluate=30, lost=50)
    lines = [
        {"step": i, "loss": 1.0} | {f"goodput/{kind}": i * x for kind, x in spent.items()}
        for i in (1, 2)
    ]
    run = read_run(make(tmp_path / "run", lines))
    rows = {label: (value, note) for label, value, note in facts.numbers(run)}
    assert rows["Goodput"][0] == "70.0%"
    assert rows["Time"][0] == "33 min 20 s"
    assert rows["Time"][1].startswith("of all processes: 70.0% step, 10.0% start, 5.0% lost")
    text, _ = written(tmp_path / "run")
    assert "Goodput/" not in text  # no charts of them
    older = read_run(make(tmp_path / "older", [{"step": 1, "loss": 1.0}]))
    assert not {"Time", "Goodput"} & {label for label, _, _ in facts.numbers(older)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns a folder with tiny runs of a classifier and a tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["--config.steps=3", "--config.evaluate.limit=40", "--config.pictures.count=2"]
    for name in ("mae_base_finetune", "dvae"):
        config = [f"--config=configs/{name}.py", f"--workdir={folder / name}", "--smoke"]
        assert main.main([*config, *short]) == 0
    return folder


def test_a_classifier(runs):
    folder = runs / "mae_base_finetune"
    examined = findings.examine(str(folder))
    assert not examined.missing
    count = examined.predictions.confusion.sum()
    record = json.loads((folder / "config.json").read_text())
    assert count == min(findings.PREDICTED, record["data"]["evaluation_images"])
    chances = [hard.probability for hard in examined.predictions.hardest]
    assert chances == sorted(chances)
    assert len(chances) == findings.HARDEST
    images = np.stack([hard.image for hard in examined.predictions.hardest])
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.1
    text, page = written(folder, options=())
    assert "Confusion matrix" in text
    assert record["data"]["class_names"][0] in text
    assert "Hardest examples" in text
    assert "attention maps" in text
    assert len(page.of("meter")) == len(record["data"]["class_names"])


def test_a_tokenizer(runs):
    examined = findings.examine(str(runs / "dvae"))
    assert not examined.missing
    assert examined.attention is None
    assert examined.predictions is None
    assert (
        examined.codebook.counts.sum()
        == 16
        * min(
            findings.TOKENIZED,
            json.loads((runs / "dvae" / "config.json").read_text())["data"]["evaluation_images"],
        )
        * (examined.codebook.columns["original"].shape[1] // 32) ** 2
    )
    assert 1 <= examined.codebook.used <= 64
    assert 1 <= examined.codebook.perplexity <= examined.codebook.used + 1e-6
    text, _ = written(runs / "dvae", options=())
    assert "codes occur in" in text


def test_the_default_place_and_users_mistakes(runs, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(runs / "dvae", folder)
    assert cli.main(["report", f"{folder}/", "--files-only"]) == 0
    assert (folder / "report.html").is_file()
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not the directory of a training run" in capsys.readouterr().err
