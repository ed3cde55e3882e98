"""The table of benchmarks/all.py."""

import pytest

from benchmarks import all as benchmarks


def test_lines_of_code_leave_out_text():
    text = '"""Module,\nlong."""\n\nimport os  # why\n\n\ndef f():\n    """It."""\n    # a\n'
    text += '    return (\n        """a\n        b"""\n    )\n'
    assert benchmarks.code_lines(text) == 6  # import, def, and four lines of the statement


def test_the_table_names_parts_that_fail(monkeypatch, capsys):
    def fail(smoke):
        raise RuntimeError("no | network")

    monkeypatch.setitem(benchmarks.PARTS, "install", fail)
    benchmarks.main(["--only", "objective", "install"])
    head, _, titles, _, *rows = capsys.readouterr().out.splitlines()
    assert "jax " in head
    assert titles.count("|") == 5
    assert {row.count("|") for row in rows} == {5}
    assert any(
        row.startswith("| objective | lines of code of the objective mae | ") for row in rows
    )
    assert rows[-1] == "| install | not measured | no / network |  |"


def test_the_time_of_a_step(capsys):
    pytest.importorskip("transformers")
    benchmarks.main(["--only", "step_finetune", "--smoke"])
    *_, rate, ratio = capsys.readouterr().out.splitlines()
    assert rate.startswith("| step_finetune | finetune, ViT-B/16, batch 2: images/s | ")
    assert "times PyTorch, eager" in ratio
