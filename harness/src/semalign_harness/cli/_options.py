"""Arguments that several commands have, and the experiment that they name."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semalign_geometry.base import SemalignError

from ..util.console import Console, take_handler

if TYPE_CHECKING:
    from ..experiment import Experiment


def experiment_arguments(parser: argparse.ArgumentParser, *, settings: str = "settings of the experiment") -> None:
    """Add the experiment, its task, overrides and further files."""
    parser.add_argument("experiment", nargs="?", help="pair of models (see semalign presets), or path of a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="TASK | key.key=value",
        help=f"task of the pair (see semalign presets; default: the pair's own); {settings}",
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file merged on top; repeatable"
    )


def named_experiment(options: argparse.Namespace, command: str) -> tuple[str, str | None, list[str]]:
    """The pair or file that the arguments name, its task, and the overrides.

    Raises:
        SemalignError: no experiment is named.
    """
    if options.experiment is None:
        raise SemalignError(
            f"{command} needs an experiment: a pair, such as tiny (semalign presets lists all), or a YAML file"
        )
    words = list(options.overrides)
    task = words.pop(0) if words and not {"=", ":"} & set(words[0]) else None
    return options.experiment, task, words


def read_experiment(
    options: argparse.Namespace, command: str, *, overrides: Sequence[str] | None = None
) -> "Experiment":
    """Load the experiment that the arguments name, with other overrides where they are given."""
    from ..loading import load_experiment

    base, task, own = named_experiment(options, command)
    return load_experiment(base, task, configs=options.config, overrides=own if overrides is None else overrides)


def over_argument(parser: argparse.ArgumentParser) -> None:
    """Add the settings to vary."""
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="key.key=value,value",
        help="setting to vary; repeatable, every combination is run",
    )


def output_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the place of the output, and how much is printed."""
    parser.add_argument("--out", metavar="DIR", help=out)
    volume_arguments(parser, "result")


def volume_arguments(parser: argparse.ArgumentParser, result: str) -> None:
    """Add how much is printed."""
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help=f"print only the {result} and warnings")
    volume.add_argument("--verbose", action="store_true", help="print log lines with their time on standard error")


def track_argument(parser: argparse.ArgumentParser) -> None:
    """Add the trackers."""
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="NAMES",
        help="send every step to tensorboard, wandb or trackio; with commas, repeatable",
    )


def benchmark_arguments(parser: argparse.ArgumentParser, *, tasks: str, limit: str, sandbox: str) -> None:
    """Add the benchmarks, and how they are asked; the settings that were given are `given_benchmarks`."""
    parser.add_argument(
        "--tasks", metavar="NAMES", help=f"benchmarks of mmlu, gsm8k, humaneval, mbpp, arithmetic ({tasks})"
    )
    parser.add_argument("--data", metavar="DIR", help="read their rows from DIR/<task>/test.jsonl.gz, not from the hub")
    parser.add_argument("--limit", type=int, metavar="N", help=f"documents of each benchmark{limit} (default: all)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest response (default: each benchmark's own)"
    )
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument("--chat", action="store_const", const=True, help="put prompts through the chat template")
    chat.add_argument("--plain", dest="chat", action="store_const", const=False, help="use prompts as they are")
    parser.add_argument("--allow-weak-sandbox", action="store_const", const=True, help=sandbox)


def given_benchmarks(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of benchmarks that were given."""
    found = {name: getattr(options, name) for name in ("data", "limit", "max_new_tokens", "chat", "allow_weak_sandbox")}
    found["tasks"] = None if options.tasks is None else [name.strip() for name in options.tasks.split(",")]
    return {name: value for name, value in found.items() if value is not None}


def console_of(options: argparse.Namespace) -> Console:
    """The console that the arguments choose, with libraries silenced: `transformers` is imported."""
    quiet_libraries()
    return Console(quiet=options.quiet)


def quiet_libraries() -> None:
    """Silence the libraries where the console shows the same more clearly."""
    take_handler()
    import transformers

    transformers.logging.disable_progress_bar()
    for chatty in ("datasets", "huggingface_hub", "lm_eval", "lm-eval"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def check_alone(command: str) -> None:
    """Refuse a launcher of several processes: runs of a matrix are processes of their own, which would join it.

    Raises:
        SemalignError: one has started this process.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise SemalignError(
            f"WORLD_SIZE is {size}, but torchrun shares the work of run and evaluate only: start semalign {command} "
            "once, without torchrun, with --jobs for several runs at a time"
        )


def folder_of(options: argparse.Namespace, name: str) -> Path:
    """`--out`, or the folder of that name in `runs`."""
    return options.out or Path("runs") / name
