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


TRAIN = """
from mim_jax import main
options = ["--config=mae_emoji", "--smoke", "--config.log.every_steps=1", "--config.probe.images=0"]
code = main.main([*options, "--config.steps=100000", "--workdir={}"])
print(f"exit code {{code}}")
"""


def test_an_interruption_saves_the_run_and_keeps_the_kernel(tmp_path):
    manager = nbclient.client.KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel(cwd=str(ROOT))
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=120)

    def execute(code: str, interrupt_at: str = "") -> str:
        """Returns what the code prints; interrupts the kernel once when it has printed a text."""
        request, text, interrupted = client.execute(code), "", not interrupt_at
        while True:
            message = client.get_iopub_msg(timeout=300)
            if message["parent_header"].get("msg_id") != request:
                continue
            text += message["content"].get("text", "")
            if interrupt_at in text and not interrupted:
                manager.interrupt_kernel()
                interrupted = True
            if message["content"].get("execution_state") == "idle":
                return text

    try:
        text = execute(TRAIN.format(tmp_path / "run"), interrupt_at="/100000  loss")
        assert "stopped and saved after step" in text
        assert "exit code 130" in text
        assert execute("print(code + 1)") == "131\n"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_every_notebook_is_tested():
    assert [path.stem for path in NOTEBOOKS] == ["features", "reconstruct"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_no_path_of_a_machine(path):
    text = path.read_text()
    assert "/home/" not in text
    assert "/tmp/" not in text
