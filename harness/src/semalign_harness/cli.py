"""The command `semalign`."""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from semalign_geometry import SemalignError

EXAMPLES = """\
examples:
  semalign run tiny
  semalign run tiny train.passes=2 train.weights.geometry=0.5 --out runs/mine
  semalign run qwen2.5-coder --dry-run
  semalign run qwen2.5-coder source.path=source.gguf target.path=target.gguf data.train.path=train.jsonl.gz
  semalign run my-experiment.yaml --config my-machine.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 input that cannot be used, 130 interrupted."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.command == "presets":
            return _presets()
        return _run(options)
    except SemalignError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(_disk_message(error))
    except KeyboardInterrupt:
        print("semalign: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="semalign",
        description="Transfer knowledge from a larger language model into a smaller one, and measure what arrived.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "presets"], help="run an experiment, or list the presets")
    parser.add_argument("experiment", nargs="?", help="name of a preset, or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="settings that override the experiment's")
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file merged on top; repeatable"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/NAME, numbered when taken)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved experiment and the plan, run nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    return parser


def _presets() -> int:
    from .experiment import load_experiment, preset_names

    for name in preset_names():
        experiment = load_experiment(name)
        print(f"{name:20} {experiment.source.path} → {experiment.target.path}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from .experiment import load_experiment, preset_names

    if options.experiment is None:
        raise SemalignError(f"run needs an experiment: a preset ({', '.join(preset_names())}) or a YAML file")
    experiment = load_experiment(options.experiment, configs=options.config, overrides=options.overrides)
    folder = options.out or _free_folder(Path("runs"), experiment.name)
    if options.dry_run:
        print(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        data, train = experiment.data, experiment.train
        amount = f"{train.passes:g} passes in all" if train.steps is None else f"steps {train.steps}"
        stages = "each layer" if train.layers is None else f"layers {list(train.layers)}"
        print(
            f"plan: attribute on {data.attribution_rows} rows, supervise {data.train_rows} rows, "
            f"one stage for {stages} ({amount}), measure on {data.held_out_rows} rows, into {folder}"
        )
        return 0

    import transformers

    from .console import Console
    from .pipeline import run_experiment
    from .table import result_table

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for chatty in ("datasets", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    result = run_experiment(experiment, folder, console=Console(quiet=options.quiet))
    print(result_table(result))
    print(f"run folder: {folder.resolve()}")
    return 0


def _free_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or the first of `parent/name-2`, `parent/name-3`, … that does not exist."""
    folder, number = parent / name, 1
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def _disk_message(error: OSError) -> str:
    if error.errno == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        return f"the disk is full ({error}): free some space, or choose another place with --out"
    return str(error)


def _fail(message: str) -> int:
    print(f"semalign: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
