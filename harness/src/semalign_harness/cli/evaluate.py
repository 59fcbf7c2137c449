"""`semalign evaluate`: one model on benchmarks."""

import argparse
import os
from pathlib import Path

from semalign_geometry.base import SemalignError

from ..results.files import EXPERIMENT, RESULT
from ._options import benchmark_arguments, console_of, given_benchmarks, output_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "model", nargs="?", help="hub id, model folder, run folder or .gguf file; or in a --config file"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="further settings, such as backend=vllm")
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file merged on top; repeatable"
    )
    parser.add_argument("--source", metavar="MODEL", help="also measure KL and top-1 agreement to this model")
    parser.add_argument("--seed", type=int, metavar="N", help="seed that draws the documents (default: 0)")
    benchmark_arguments(
        parser,
        tasks="default: the first four",
        limit=", drawn by --seed",
        sandbox="run the programs of humaneval and mbpp on a machine that offers resource limits only",
    )
    output_arguments(parser, "folder of the result (default: evaluations/NAME)")


def run(options: argparse.Namespace) -> int:
    """Evaluate the model, and print the table."""
    from ..results.evaluation import EvaluationConfig
    from ..util.settings import merged, parse_overrides, read_tree

    overrides = list(options.overrides)
    if options.model is not None and "=" in options.model and not Path(options.model).exists():
        overrides.insert(0, options.model)
        options.model = None
    tree: dict[str, object] = {}
    for config in options.config:
        tree = merged(tree, read_tree(Path(config)))
    given = given_benchmarks(options)
    given |= {role: {"path": _model_of(path)} for role in ("model", "source") if (path := getattr(options, role))}
    given |= {} if options.seed is None else {"seed": options.seed}
    tree = merged(merged(tree, given), parse_overrides(overrides))
    if "model" not in tree:
        raise SemalignError("evaluate needs a model: a hub id, a model folder or a .gguf file")
    config = EvaluationConfig.parse(tree, origin=str(options.config[-1]) if options.config else "evaluation")
    folder = options.out or Path("evaluations") / _name(config.model.path)
    console = console_of(options)
    from ..evaluation import evaluate, evaluation_table

    result = evaluate(config, folder, console=console)
    if result is not None:
        print(evaluation_table(result))
        print(f"evaluation folder: {folder.resolve()}")
    return 0


def _model_of(path: str) -> str:
    """Return the path of a model: for a run folder, that of its trained target.

    Raises:
        SemalignError: the run is not finished.
    """
    folder = Path(path).expanduser()
    if not (folder / EXPERIMENT).is_file():
        return path
    if not (folder / RESULT).is_file():
        raise SemalignError(f"the run in {path} is not finished: repeat its command, which resumes")
    return str(folder / "model")


def _name(model: str) -> str:
    """Last two parts of a hub id or path, without the ending of a GGUF file."""
    place = Path(model)
    if not place.name or ".." in place.parts:
        place = Path(os.path.abspath(place))
    if place.suffix.lower() == ".gguf":
        place = place.with_suffix("")
    return "-".join(place.parts[bool(place.anchor) :][-2:]).replace(":", "-") or "model"
