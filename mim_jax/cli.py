"""The command line, `mim-jax COMMAND`, and functions that all commands share.

    mim-jax train --config=configs/mae_emoji.py      the same as python -m mim_jax.main
    mim-jax evaluate runs/mae_base_finetune

Exit codes: 0 done, 1 failed, 2 user error, reported in one sentence, 130 interrupted.
"""

import argparse
import difflib
import errno
import gc
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from mim_jax import UserError, __version__
from mim_jax.bucket import BucketError, failures
from mim_jax.storage import in_bucket

COMMANDS = {  # name: module with main(argv), what it does
    "train": ("main", "train a config, or continue a run"),
    "check": ("check", "check data, memory and disk of a run before it starts"),
    "plan": ("plan.__main__", "predict memory and time of a run on TPUs, without the hardware"),
    "evaluate": ("evaluate", "evaluate a run"),
    "embed": ("embed", "write the features of a data set"),
    "probe": ("probe_command", "probe the features of an encoder: k-NN, linear, rank"),
    "tokenize": ("tokenize", "write the visual tokens of a data set"),
    "pictures": ("pictures", "draw what a checkpoint computes for images"),
    "report": ("report.__main__", "write an HTML page about one or more runs"),
    "runs": ("runs", "list the runs below a directory"),
    "prepare": ("data.prepare", "pack a folder of images, or prepare a data set of TFDS"),
    "statistics": ("data.statistics", "compute the mean and std of a data set"),
    "convert": ("convert.__main__", "convert weights from and to PyTorch"),
    "replay": ("replay", "repeat a step whose loss was not finite"),
    "inspect": ("inspect", "describe a run or a file of weights"),
    "configs": ("list_configs", "list the configs that come with mim_jax"),
    "keys": ("list_keys", "list the keys of a config and what they mean"),
}
TRAINING_KEYS = (  # keys and blocks that other commands do not use
    *("steps", "epochs", "optimizer", "log", "evaluate", "pictures", "probe", "save"),
    *("divergence", "ema"),
)
owns_process = False  # whether this process runs a single command, see exit_with
NO_WRITE = (  # errors of a path that cannot be written
    *(errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EFBIG, errno.ELOOP),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mim-jax COMMAND ...` and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    lines = "\n".join(f"  {name:11s} {purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mim-jax",
        description="Masked image modeling in JAX.",
        epilog=f"commands:\n{lines}\n\n`mim-jax COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mim_jax {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    options = parser.parse_args(argv[:1])
    return module_of(options.command).main(argv[1:])


def module_of(command: str) -> ModuleType:
    """Imports the module of a command."""
    return importlib.import_module(f"mim_jax.{COMMANDS[command][0]}")


def parser_of(command: str, text: str) -> argparse.ArgumentParser:
    """Returns a parser for a command, described by the docstring of its module."""
    return argparse.ArgumentParser(
        prog=f"mim-jax {command}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config(
    parser: argparse.ArgumentParser, text: str = "", required: bool = True, several: bool = False
) -> None:
    """Adds --config and --trust-code to a parser. A required config may omit "--config=".

    With `several`, the option is a list of one or more configs.
    """
    text = text or "a config file, a name that `mim-jax configs` lists, or a run directory"
    if several:
        parser.add_argument("sources", nargs="*", default=[], metavar="CONFIG", help=text)
        parser.add_argument("--config", action="append", default=[], help="the same as CONFIG")
    else:
        if required:
            parser.add_argument("source", nargs="?", default="", metavar="CONFIG", help=text)
            text = "the same as CONFIG"
        parser.add_argument("--config", default="", help=text)
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="allow a run to import its objective from outside mim_jax, which executes that code",
    )
    parser.epilog = (
        "--config.KEY=VALUE changes a key of the config, for example --config.optimizer.b2=0.99"
    )


def workdir_of(options: argparse.Namespace) -> str:
    """Returns the run directory that --workdir names.

    By default it is the run that --config names, or runs/NAME for a config NAME. A rehearsal has
    another default, because the run itself could not continue from it.
    """
    from mim_jax import workdir  # late, so that --help is fast

    if not options.workdir and workdir.is_run(options.config):
        return os.path.expanduser(options.config)
    name = Path(options.config).stem + ("_smoke" if getattr(options, "smoke", False) else "")
    return os.path.expanduser(options.workdir or f"runs/{name}")


def require_suffix(parser: argparse.ArgumentParser, to: str, suffix: str) -> None:
    """Ends with an error if the value of --to has another suffix."""
    if Path(to).suffix.lower() not in ("", suffix):
        parser.error(f"--to={to} must end with {suffix}")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, unused: Collection[str] = ()
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the parsed options, and the arguments --config.key=value as overrides "key=value".

    With --help and --config, the keys of the config are listed too. Keys and blocks in `unused`
    are errors, because they would have no effect.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv) and any(word.startswith("--config") for word in argv):
        parser.print_help()
        print("\nkeys of the config:\n")
        config = [word for word in argv if word.startswith("--config")]
        parser.exit(module_of("keys").main(config))
    rest, overrides, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            rest.append(word)
            continue
        if word.removeprefix("--config.").split("=")[0].split(".")[0] in unused:
            parser.error(f"{word} has no effect: only training uses that key")
        separate = "=" not in word and words and not words[0].startswith("--")
        overrides.append(word.removeprefix("--config.") + (f"={words.pop(0)}" if separate else ""))
    options, unknown = parser.parse_known_args(rest)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}: {hint_for(unknown[0], parser)}")
    if "source" in options:
        if bool(options.source) == bool(options.config):
            parser.error("pass one config: CONFIG or --config=CONFIG")
        options.config = options.config or options.source
    if "sources" in options:
        options.config = [*options.sources, *options.config]
        if not options.config:
            parser.error("pass one config or more: CONFIG or --config=CONFIG")
    return options, overrides


def hint_for(word: str, parser: argparse.ArgumentParser) -> str:
    """Returns advice for an argument that a parser does not know."""
    if not word.startswith("--"):
        return f"`{parser.prog} --help` lists the arguments"
    options = re.findall(r"--[\w-]+", parser.format_usage())
    near = difflib.get_close_matches(word.split("=")[0], options, 1, cutoff=0.75)
    return (
        f"did you mean {near[0]}?" if near else "keys of the config are set by --config.KEY=VALUE"
    )


def exit_code(command: Callable[[], int], workdir: str) -> int:
    """Runs a command and returns its exit code; expected errors are printed as one sentence."""
    import jax  # late, so that --help is fast

    handle_interrupts()
    try:
        with failures():
            return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `mim-jax inspect RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, BucketError) as error:
        return report(error)
    except OSError as error:
        on_disk = bool(workdir) and not in_bucket(workdir)
        removed = error.errno == errno.ENOENT and on_disk and not os.path.isdir(workdir)
        if error.errno not in NO_WRITE and not removed:
            raise
        path = error.filename or workdir
        print(f"error: cannot write to {path}: {error.strerror}.", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(
            f"failed: this machine has too little memory ({error}): reduce the sizes of the model, "
            "of the images or of the batch.",
            file=sys.stderr,
        )
        return 1
    except jax.errors.JaxRuntimeError as error:
        if not is_loss_of_process(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"failed: process {jax.process_index()} of {jax.process_count()} lost another process "
            f"({reason}): run the same command again to continue from the newest checkpoint.",
            file=sys.stderr,
        )
        return 1


def is_loss_of_process(error: Exception) -> bool:
    """Returns whether an error was raised because another process of a run was lost."""
    import jax  # late, so that --help is fast

    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    return is_of_jax and jax.process_count() > 1 and "RESOURCE_EXHAUSTED" not in str(error)


def report(error: UserError | BucketError) -> int:
    """Prints an error in one sentence and returns the exit code."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"failed: {error}", file=sys.stderr)
    return 1


def handle_interrupts() -> None:
    """Installs `interrupt` as the handler of SIGINT, unless there is another one."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; later if the garbage collector runs JAX, which swallows it."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks:
            threading.Timer(0.01, signal.raise_signal, (number,)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Runs the main function of a process and exits with its code.

    A process that fails does not wait for the others, because they may be waiting for it.
    """
    global owns_process
    owns_process = True
    handle_interrupts()  # before JAX is imported
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (UserError, BucketError) as error:
        code = report(error)
    except Exception:
        traceback.print_exc()
        code = 1
    jax = sys.modules.get("jax")
    if code not in (0, 128 + signal.SIGTERM) and jax and jax.distributed.is_initialized():
        from mim_jax import processes  # late, so that --help is fast

        processes.leave(code)
    sys.exit(code)


def entry() -> NoReturn:
    """The console script `mim-jax`."""
    exit_with(main)
