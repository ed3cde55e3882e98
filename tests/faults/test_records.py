"""Damaged files of a run directory: the run continues exactly, or one sentence says why not."""

import json
import shutil

import pytest

from mim_jax import cli, main
from mim_jax.runs import read_run

SMOKE = ["--config=configs/mae_base.py", "--smoke", "--config.log.every_steps=1"]
SMOKE += ["--config.pictures.count=0", "--config.batch_size=8", "--config.evaluate.limit=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 20 steps with checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("faults") / "run"
    assert main.main([*SMOKE, f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


HALF = b'{"config": {"batch_size": 8, "objective": {"na'


@pytest.mark.parametrize("content", [HALF, b"", b"[]", b"null", b"\xff\x00", b'{"config": {}}'])
def test_a_damaged_config(copied, content, capsys):
    """The record in the checkpoints is used, and written to config.json again."""
    (copied / "config.json").write_bytes(content)
    shutil.rmtree(copied / "checkpoints" / "20")
    assert main.main([*SMOKE, f"--workdir={copied}", "--config.seed=5"]) == 2
    error = capsys.readouterr().err
    assert "config.json is damaged" in error
    assert "holds a run with other settings: seed is 5, was 0" in error
    assert cli.main(["report", str(copied), "--files-only"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {copied}/config.json is damaged: ")
    if content == HALF:  # once is enough
        expected = losses(copied)
        assert main.main([*SMOKE, f"--workdir={copied}"]) == 0
        assert losses(copied) == pytest.approx(expected, rel=1e-5)
        assert read_run(copied).status == "finished"


@pytest.mark.parametrize("content", [b"[]", b'{"state": 1', b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_digests(copied, content, capsys):
    """The checkpoint before is used."""
    (copied / "checkpoints" / "20" / "digests.json").write_bytes(content)
    assert cli.main(["inspect", str(copied)]) == 0
    text = capsys.readouterr()
    assert "checkpoint 20 in" in text.err
    assert "is corrupt" in text.err
    assert '"step": 10' in text.out or "step: 10" in text.out


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "bad_files.jsonl"])
def test_damaged_lines(copied, name, capsys):
    with (copied / name).open("ab") as file:
        file.write(b'\x00\xff\n[]\n3\nnull\n{"step": []}\n{"step": 20, "loss": {}}\n{"st')
    assert cli.main(["runs", str(copied)]) == 0
    assert "20/20" in capsys.readouterr().out
    assert cli.main(["report", str(copied), "--files-only"]) == 0
    assert cli.main(["inspect", str(copied)]) == 0
    assert main.main([*SMOKE, f"--workdir={copied}"]) == 0
    assert "is complete" in capsys.readouterr().out


def test_links_that_lead_out_of_a_run(copied, tmp_path, capsys):
    """A stranger's run may hold them; the files that they point to are never changed."""
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    shutil.rmtree(copied / "checkpoints" / "20")
    lock = copied / "checkpoints" / "lock"
    lock.unlink()
    lock.symlink_to(precious)
    assert main.main([*SMOKE, f"--workdir={copied}"]) == 2
    assert f"error: {lock} is not a regular file: remove it." in capsys.readouterr().err
    lock.unlink()
    (copied / "events.jsonl").unlink()
    (copied / "events.jsonl").symlink_to(precious)
    assert main.main([*SMOKE, f"--workdir={copied}"]) == 2
    assert "error: cannot write to" in capsys.readouterr().err
    (copied / "events.jsonl").unlink()
    picture = copied / "pictures" / "step_0000020.png"
    picture.parent.mkdir()
    picture.symlink_to(precious)
    arguments = [*SMOKE, f"--workdir={copied}", "--config.pictures.count=1"]
    assert main.main(arguments) == 0
    assert picture.is_file()
    assert not picture.is_symlink()
    assert precious.read_text() == "precious\n"
