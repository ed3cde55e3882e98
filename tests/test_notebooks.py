"""The notebooks run from the first cell to the last."""

import re
import sys

import pytest

from tests.conftest import ROOT

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(path, folder, steps=10):
    """Executes a notebook with a short training, in a run directory of its own."""
    notebook = nbformat.read(path, as_version=4)
    options = "--config.probe.images=0 --config.pictures.count=0 --config.evaluate.limit=64"
    changes = {
        "../runs/": f"{folder}/",
        "STEPS = 400": f"STEPS = {steps}",
        "--config.probe.images=0": f"{options} --config.optimizer.warmup_steps=2",
    }
    for cell in notebook.cells:
        for old, new in changes.items():
            cell.source = cell.source.replace(old, new)
    resources = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=300, resources=resources)
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # not the kernel that is installed for a user
    client.execute()
    return notebook


def texts(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def images(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_reconstruct(tmp_path):
    notebook = run(ROOT / "notebooks" / "reconstruct.ipynb", tmp_path)
    text = texts(notebook)
    assert f"done: {tmp_path}/notebook" in text
    assert text.count("squared error of a hidden pixel") == 4
    assert images(notebook) == 1


def test_features(tmp_path):
    notebook = run(ROOT / "notebooks" / "features.ipynb", tmp_path)
    text = texts(notebook)
    assert "images (4, 64, 64, 3) -> tokens (4, 65, 128)" in text
    assert "1340 training images, 566 validation images" in text
    for line in ("features", "random", "pixels", "most frequent"):
        assert re.search(rf"^{line} +\d+\.\d%$", text, re.MULTILINE), line
    assert images(notebook) == 1


def test_every_notebook_is_tested():
    assert [path.stem for path in NOTEBOOKS] == ["features", "reconstruct"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_no_path_of_a_machine(path):
    text = path.read_text()
    assert "/home/" not in text
    assert "/tmp/" not in text
