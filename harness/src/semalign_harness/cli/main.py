"""The command `semalign`: choose a command, and import its module alone.

No module here imports torch or transformers before it needs a tensor or a model: help, lists and mistakes in the
input are answered at once.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

COMMANDS = {
    "run": "transfer from a source into a target, and measure the target before and after",
    "doctor": "check a pair of models for problems, in seconds",
    "submit": "run a matrix of experiments, here or as Slurm jobs, and print one table",
    "presets": "list the built-in pairs of models and tasks",
    "models": "list the models that have a name, fetch one, or print its path",
    "store": "list or delete the supervision that is kept for further runs",
    "compare": "run several methods on the same rows with the same budget, and print one table",
    "sweep": "vary settings, and rank them by the KL on rows that no run reports",
    "evaluate": "measure a model on MMLU, GSM8K, HumanEval and MBPP",
    "report": "write runs or comparisons as one page, in HTML and Markdown",
    "compare-evaluations": "compare two evaluations item by item, or several over their seeds",
}
"""Each command's help in a line; its module here has `add_arguments` and `run`."""
EXAMPLES = """\
examples:
  semalign presets
  semalign run tiny
  semalign run qwen2.5-coder gsm8k train.passes=1 --dry-run
  semalign doctor source.gguf target.gguf --data train.jsonl.gz data.train.completion=answer
  semalign submit tiny --over train.seed=0,1,2 --over train.passes=1,2
  semalign models pull qwen2.5-coder-0.5b-instruct-q4_k_m
  semalign store prune --unused-for 14
  semalign compare tiny --methods all --seeds 0,1,2
  semalign compare tiny --methods kd,kd.slow kd.slow:train.learning_rate=1e-4
  semalign sweep tiny --over train.learning_rate=1e-3,3e-3
  semalign evaluate runs/tiny/model --tasks gsm8k --limit 100
  semalign report runs/tiny runs/tiny-2 --out tiny.html
  semalign compare-evaluations evaluations/before evaluations/after
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 success, 1 the doctor found an error, 2 an input cannot be used, 3 a bug, 130
        interrupted.
    """
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        command = _top_parser().parse_args(given[:1]).command
        from ._execute import execute  # with pydantic, which help does without

        return execute(command, given, COMMANDS[command])
    except KeyboardInterrupt:  # before the command has begun
        print("semalign: interrupted", file=sys.stderr)
        return 130


class _Version(argparse.Action):
    """Look up the version only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        from importlib.metadata import version

        parser.exit(message=f"semalign {version('semalign-harness')}\n")


def _top_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:20} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="semalign",
        description="Transfer knowledge from a larger language model into a smaller one, and measure the result.",
        epilog=f"commands:\n{commands}\n\n{EXAMPLES}\nsemalign COMMAND --help explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
