"""The command `mim-jax`, and the lists of configs and keys."""

import gc
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from mim_jax import UserError, cli, config_files, list_keys, main, schema
from tests.conftest import ROOT, environment


def test_configs_are_listed_by_paper(capsys):
    assert cli.main(["configs"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", text, re.M) for name in config_files.names())
    assert text.index("Bao et al., 2021:") < text.index("He et al., 2021:")
    assert cli.main(["configs", "ade20k"]) == 0
    assert "mae_emoji" not in capsys.readouterr().out
    assert cli.main(["configs", "qqq"]) == 2


def test_keys_are_listed_with_values_and_meanings(capsys):
    arguments = ["keys", "--config=mae_emoji", "--config.objective.mask_ratio=0.5"]
    assert cli.main([*arguments, "mask_ratio"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "objective.mask_ratio = 0.5"
    assert lines[1].endswith("(float, at least 0 and at most 1, default 0.75)")
    assert cli.main(arguments) == 0
    keys = schema.keys_of(schema.load("mae_emoji"))
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(keys)
    assert cli.main([*arguments, "mask", "share"]) == 0
    assert capsys.readouterr().out.startswith("objective.mask_ratio = 0.5\n")
    assert cli.main(["keys", "mae_emoji", "mask", "share"]) == 0
    assert capsys.readouterr().out.startswith("objective.mask_ratio = 0.75\n")
    assert cli.main([*arguments, "mask", "qqq"]) == 2
    assert "`mim-jax keys --config=mae_emoji` lists them all" in capsys.readouterr().err


def test_an_unknown_argument_is_refused_with_a_hint(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--config=mae_emoji", "--mask_ratio=0.5"])
    assert done.value.code == 2
    assert "keys of the config are set by --config.KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "mae_emoji", "--smok"], "unknown argument --smok: did you mean --smoke?"),
        (["train", "mae_emoji", "mae_base"], "argument mae_base: `mim-jax train --help` lists"),
        (["keys"], "pass a config, which `mim-jax configs` lists"),
        (["train", "mae_emoji", "--max-minutes=-1"], "--max-minutes=-1 must be at least 0"),
        (["train", "mae_emoji", "--max-minutes=nan"], "--max-minutes=nan must be at least 0"),
        (["evaluate", "run", "--to=x.csv"], "--to=x.csv must end with .json"),
        (["tokenize", "run", "--to=x.csv"], "--to=x.csv must end with .npz"),
        (["report", "run", "--to=x.pdf"], "--to=x.pdf must end with .html"),
        (["pictures", "attend", "run", "a.png", "--to=x.txt"], "--to=x.txt must end with .png"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments, hint, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 2
    assert hint in capsys.readouterr().err


def test_a_very_long_time_is_no_error(monkeypatch):
    errors = []
    monkeypatch.setattr("threading.excepthook", errors.append)
    monkeypatch.setattr("os.kill", lambda *_: errors.append("killed"))
    before = set(threading.enumerate())
    main.stop_after(float("inf"))
    (timer,) = set(threading.enumerate()) - before
    timer.join(0.2)
    timer.cancel()
    assert not errors


def test_help_with_a_config_lists_its_keys(capsys):
    with pytest.raises(SystemExit) as done:
        main.main(["--config=mae_emoji", "--help"])
    assert done.value.code == 0
    assert "objective.mask_ratio = 0.75" in capsys.readouterr().out


def test_the_page_of_keys_is_current():
    page = (ROOT / "docs" / "keys.md").read_text()
    assert page == list_keys.markdown() + "\n", "run `mim-jax keys --markdown > docs/keys.md`"


def test_a_dry_run_checks_the_sources(capsys):
    arguments = ["train", "--config=mae_emoji", "--dry-run", "--config.init_from.encoder=nowhere"]
    assert cli.main(arguments) == 2
    assert "init_from.encoder = nowhere is not a run directory" in capsys.readouterr().err


def test_a_dry_run_prints_the_config_and_the_arithmetic(capsys, tmp_path):
    arguments = ["train", "--config=mae_emoji", "--dry-run", f"--workdir={tmp_path / 'run'}"]
    assert cli.main([*arguments, "--config.steps=1e3"]) == 0
    text = capsys.readouterr().out
    assert "objective.mask_ratio = 0.75\n" in text
    assert "objective.mean = (0.5,)\n" in text
    assert "= 1,000, including 100 of warm-up" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a is wrong."), 2, "error: a is wrong.\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "cannot write to /x: Permission"),
        (FileNotFoundError(2, "No such file", "runs/x/log"), 2, "cannot write to runs/x/log: No"),
        (MemoryError("Unable to allocate"), 1, "too little memory (Unable to allocate): reduce"),
        (FloatingPointError("the loss is nan."), 1, "failed: the loss is nan.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_expected_errors_are_one_sentence(capsys, error, code, text):
    def command():
        raise error

    assert cli.exit_code(command, "runs/x") == code
    assert text in capsys.readouterr().err


def test_a_closed_pipe_is_not_an_error():
    words = [sys.executable, "-m", "mim_jax", "keys", "--markdown"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, cwd=ROOT, env=environment(1), **pipes)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) in (0, 128 + signal.SIGPIPE)


def test_a_run_is_continued_where_it_is(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {}}')
    parser = cli.parser_of("train", "")
    parser.add_argument("--workdir", default="")
    parser.add_argument("--smoke", action="store_true")
    cli.add_config(parser)
    for words, expected in [
        ([f"--config={tmp_path}"], str(tmp_path)),
        (["--config=configs/mae_emoji.py"], "runs/mae_emoji"),
        (["--config=mae_emoji"], "runs/mae_emoji"),
        (["--config=mae_emoji", "--smoke"], "runs/mae_emoji_smoke"),
        (["--config=mae_emoji", "--workdir=x"], "x"),
        (["--config.seed", "1", "mae_emoji"], "runs/mae_emoji"),
    ]:
        assert cli.workdir_of(cli.parse(parser, words)[0]) == expected


@pytest.mark.parametrize("words", [[], ["mae_emoji", "--config=beit_emoji"]])
def test_exactly_one_config(words, capsys):
    parser = cli.parser_of("train", "")
    cli.add_config(parser)
    with pytest.raises(SystemExit):
        cli.parse(parser, words)
    assert "pass one config: CONFIG or --config=CONFIG" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "embed", "tokenize"])
def test_keys_without_effect_are_refused(command, capsys):
    arguments = ["--config=mae_emoji", "--config.optimizer.lr=1"]
    with pytest.raises(SystemExit) as done:
        cli.main([command, *arguments, *([] if command == "evaluate" else ["--to=x"])])
    assert done.value.code == 2
    assert "--config.optimizer.lr=1 has no effect:" in capsys.readouterr().err


def test_an_interruption_during_garbage_collection_is_not_lost():
    """Python ignores exceptions in callbacks of the garbage collector, of which JAX has one."""
    sent = []

    def callback(*_):
        if not sent:
            sent.append(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def command():
        gc.callbacks.append(callback)
        gc.collect()
        gc.callbacks.remove(callback)
        time.sleep(10)
        return 0

    gc.collect()  # so that no finalizer, which loses exceptions too, runs in the command
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.exit_code(command, "") == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert sent


def test_interruptions_are_handled_before_jax_is_imported(monkeypatch):
    monkeypatch.setattr(cli, "owns_process", False)
    handlers = []

    def command():
        handlers.append(signal.getsignal(signal.SIGINT))
        return 0

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            cli.exit_with(command)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert handlers == [cli.interrupt]
