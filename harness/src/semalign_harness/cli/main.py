"""The command `semalign`."""

import argparse
import errno
import gc
import logging
import math
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import transformers
import yaml
from semalign_align import RaisedElsewhere
from semalign_geometry import SemalignError

from ..experiment import Experiment, load_experiment, preset_names
from ..methods import as_method
from ..models.shape import find_shape
from ..report import report_run
from ..report.result_tables import entries_table, result_table
from ..run.dry_run import DryRun
from ..run.estimate import describe, presets_table
from ..run.phase_cache import entries, prune
from ..run.pipeline import run_experiment
from ..run.run_folder import pick_folder
from ..run.tracking import find_trackers
from ..run.written_answers import describe_writing
from ..util.cache import cache_folder
from ..util.console import Console, interruptible, logged
from ..util.failures import is_full_memory, memory_message
from ..util.resources import join, leave
from ..util.settings import merged, parse_overrides, read_tree

COMMANDS = {
    "run": "transfer from a source into a target, and measure what arrived",
    "doctor": "what would trouble a pair of models, told in seconds",
    "submit": "a matrix of experiments, here or as an array of Slurm jobs, and one table of it",
    "presets": "list the experiments that come along",
    "models": "list the models that go by a name, fetch one, or tell where it lies",
    "store": "list or delete the supervision that is kept for further runs",
    "compare": "methods side by side: same rows, same budget, same evaluation, one table",
    "sweep": "vary settings of an experiment, and find the best by the KL on rows that no run reports",
    "evaluate": "put a model to MMLU, GSM8K, HumanEval and MBPP",
    "report": "runs or comparisons as one page, in HTML and Markdown",
    "compare-evaluations": "the second of two evaluations against the first, item by item; or several over their seeds",
}
_STARTS_RUNS = ("submit", "compare", "sweep")
EXAMPLES = """\
examples:
  semalign run tiny
  semalign run tiny train.passes=2 train.weights.geometry=0.5 --out runs/mine
  semalign run tiny --track tensorboard
  semalign run qwen2.5-coder --dry-run
  semalign run qwen2.5-coder source.path=source.gguf target.path=target.gguf data.train.path=train.jsonl.gz
  semalign run my-experiment.yaml --config my-machine.yaml
  semalign doctor source.gguf target.gguf --data train.jsonl.gz data.train.prompt=question data.train.completion=answer
  semalign submit tiny --over train.seed=0,1,2 --over train.passes=1,2
  semalign submit qwen2.5-coder --over train.seed=0,1 --executor slurm --slurm partition=gpu gpus_per_node=1
  semalign compare tiny --methods all --seeds 0,1,2
  semalign compare qwen2.5-coder --methods semalign,sft,kd sft:method.learning_rate=3e-4 --tasks gsm8k --limit 100
  semalign compare tiny --methods semalign,semalign.late --against semalign semalign.late:train.layers=[2,3]
  semalign sweep tiny --over train.learning_rate=1e-3,3e-3 --over train.weights.geometry=0,0.1 --rungs 2
  semalign models pull qwen2.5-coder-0.5b-instruct-q4_k_m
  semalign run qwen2.5-coder-gguf --dry-run
  semalign store list
  semalign store prune --unused-for 14
  semalign evaluate runs/qwen2.5-coder/model --tasks gsm8k --limit 100
  semalign evaluate target.gguf --source source.gguf --data benchmarks --limit 200 --out evaluations/before
  semalign report runs/tiny
  semalign report runs/tiny runs/tiny-2 --out tiny.html
  semalign report runs/gsm8k-comparison runs/mbpp-comparison --out tasks.html
  semalign compare-evaluations evaluations/before evaluations/after --source evaluations/source
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done, 1 pair refused, 2 input that cannot be used, 3 a bug of ours, 130 interrupted.
    """
    if arguments is None:
        gc.freeze()  # what was imported stays: a second is saved where it is not looked at again and again
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = _top_parser().parse_args(given[:1]).command
    parser = argparse.ArgumentParser(prog=f"semalign {command}", description=COMMANDS[command])
    add_arguments, run = {
        "run": (_run_arguments, _run),
        "doctor": (_doctor_arguments, _doctor),
        "submit": (_submit_arguments, _submit),
        "presets": (lambda parser: None, _presets),
        "models": (_models_arguments, _models),
        "store": (_store_arguments, _store),
        "compare": (_compare_arguments, _compare),
        "sweep": (_sweep_arguments, _sweep),
        "evaluate": (_evaluate_arguments, _evaluate),
        "report": (_report_arguments, _report),
        "compare-evaluations": (_pair_arguments, _pair),
    }[command]
    add_arguments(parser)
    # Each command has a parser of its own, as argparse does not intermix options and overrides of subcommands.
    options = parser.parse_intermixed_args(given[1:])
    try:
        with interruptible(), logged(verbose=getattr(options, "verbose", False)):
            if (out := getattr(options, "out", None)) is not None:
                options.out = _place(out)
            if command in _STARTS_RUNS:
                _check_alone(command)
            code = run(options)
            sys.stdout.flush()
            return code
    except RaisedElsewhere:
        return 2  # the first process tells
    except SemalignError as error:
        return _fail(str(error))
    except BrokenPipeError:  # who reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written when Python ends
        return 0
    except OSError as error:
        return _fail(_disk_message(error))
    except KeyboardInterrupt as interrupt:
        place = str(interrupt) if command == "run" else ""
        print(f"semalign: interrupted{_way_on(command, given, place)}", file=sys.stderr)
        return 130
    except Exception as error:
        if is_full_memory(error):
            return _fail(memory_message(error))
        traceback.print_exc()
        print("semalign: this is a bug: please report the lines above, and the command", file=sys.stderr)
        return 3
    finally:
        leave()


def _place(out: str) -> Path:
    if not out:
        raise SemalignError("--out is empty: name a place, or leave it out")
    return Path(out)


def _check_alone(command: str) -> None:
    """The runs of a matrix are processes of their own, which would take themselves for those of the launcher."""
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise SemalignError(
            f"WORLD_SIZE is {size}, but torchrun shares the work of run and evaluate only: start semalign {command} "
            "once, without torchrun, with --jobs for several runs at a time"
        )


def _top_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:20} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="semalign",
        description="Transfer knowledge from a larger language model into a smaller one, and measure what arrived.",
        epilog=f"commands:\n{commands}\n\n{EXAMPLES}\nsemalign COMMAND --help explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    return parser


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="?", help="name of a preset, or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="settings that override the experiment's")
    _track_argument(parser)
    _common_arguments(
        parser,
        "run folder, where an interrupted run goes on (default: runs/NAME, numbered when taken)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the run, print the resolved experiment and the plan, run nothing"
    )


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the larger model: hub id, model folder or .gguf file")
    parser.add_argument("target", help="the smaller model, likewise")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="settings of a run, which are looked at")
    parser.add_argument("--data", metavar="FILE", help="rows to train on, or id of a hub data set: check them too")
    parser.add_argument("--deep", action="store_true", help="load both models, and compare their layers on some rows")
    parser.add_argument("--out", metavar="FILE", help="heat map of --deep (default: layers.svg)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.epilog = "Exit code: 0 without errors, 1 where a run would be refused, 2 for input that cannot be read."


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="?", help="name of a preset, or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="settings of all cells")
    _over_argument(parser)
    parser.add_argument("--executor", default="local", help="local (default), slurm, or submitit-local to try slurm's")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time (default: 1 here, 256 on Slurm)")
    parser.add_argument(
        "--slurm", action="extend", nargs="+", default=[], metavar="key=value", help="partition=… gpus_per_node=… …"
    )
    parser.add_argument("--wait", action="store_true", help="wait for the jobs")
    parser.add_argument("--dry-run", action="store_true", help="check the cells, print where each stands, run nothing")
    _track_argument(parser)
    _common_arguments(parser, "folder of the matrix, which goes on there (default: runs/NAME-matrix)")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    from ..methods._named import describe_methods

    parser.add_argument("experiment", nargs="?", help="name of a preset, or path of a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="[METHOD:]key.key=value", help="settings of all methods, or of one"
    )
    parser.add_argument(
        "--methods",
        default="all",
        metavar="NAMES",
        help="with commas (default: all that are below); METHOD.NAME is a method once more, under settings of its own",
    )
    parser.add_argument(
        "--against", metavar="METHOD", help="what the others are tested against (default: each metric's best baseline)"
    )
    parser.add_argument(
        "--seeds", metavar="N,N", help="training seeds, of random pairings too (default: the experiment's train.seed)"
    )
    parser.add_argument(
        "--equal",
        choices=("tokens", "time"),
        default="tokens",
        help="what methods have alike: supervised tokens (default), or the wall time of semalign",
    )
    parser.add_argument("--tasks", metavar="NAMES", help="benchmarks of mmlu, gsm8k, humaneval, mbpp (default: none)")
    parser.add_argument("--data", metavar="DIR", help="take their rows from DIR/<task>/test.jsonl.gz, not from the hub")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    _chat_arguments(parser)
    parser.add_argument("--allow-weak-sandbox", action="store_const", const=True, help="see semalign evaluate --help")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    _track_argument(parser)
    _common_arguments(
        parser,
        "folder of the comparison, which goes on there, and takes further methods and seeds (default: "
        "runs/NAME-comparison)",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"methods, and the settings that make them:\n\n{describe_methods()}"


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="?", help="name of a preset, or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="settings of all cells")
    _over_argument(parser)
    parser.add_argument(
        "--rungs", type=int, default=1, metavar="N", help="halve the cells N − 1 times, passes doubling (default: 1)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (default: 1)")
    _track_argument(parser)
    _common_arguments(parser, "folder of the sweep, which goes on there (default: runs/NAME-sweep)")
    parser.epilog = "Settings are tuned on further rows of the training split, on which no run is measured."


def _over_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="key.key=value,value",
        help="a setting to vary; repeatable, the cells are the product",
    )


def _common_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file merged on top; repeatable"
    )
    parser.add_argument("--out", metavar="DIR", help=out)
    _volume_arguments(parser, "result")


def _volume_arguments(parser: argparse.ArgumentParser, result: str) -> None:
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help=f"print the {result} only, and warnings")
    volume.add_argument("--verbose", action="store_true", help="show log lines with their time, on standard error")


def _track_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="NAMES",
        help="tell every step to tensorboard, wandb or trackio too; with commas, repeatable",
    )


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="hub id, model folder or .gguf file; may stand in a --config file")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="further settings, such as backend=vllm")
    parser.add_argument("--source", metavar="MODEL", help="also measure KL and top-1 agreement to this model")
    parser.add_argument("--tasks", metavar="NAMES", help="of mmlu, gsm8k, humaneval, mbpp, with commas (default: all)")
    parser.add_argument("--data", metavar="DIR", help="take the rows from DIR/<task>/test.jsonl.gz, not from the hub")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the draw (default: 0)")
    _chat_arguments(parser)
    parser.add_argument(
        "--allow-weak-sandbox",
        action="store_const",
        const=True,
        help="run humaneval's and mbpp's programs where the machine offers resource limits only",
    )
    _common_arguments(parser, "folder of the result (default: evaluations/NAME)")


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument("--chat", action="store_const", const=True, help="prompts through the model's chat template")
    chat.add_argument("--plain", dest="chat", action="store_const", const=False, help="prompts as they are")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder, and evaluations of its models; several run folders; or folders of comparisons",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="HTML file (default: report.html in the folder; of several folders, here)",
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also write each plot as an SVG file into DIR")


def _pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="folder of an evaluation")
    parser.add_argument("second", type=Path, help="folder of another evaluation of the same documents")
    parser.add_argument("more", type=Path, nargs="*", help="further ones: all of them are then taken as training seeds")
    parser.add_argument("--source", type=Path, metavar="DIR", help="evaluation of the source, for the gap recovered")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the bootstrap (default: 0)")


def _models_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "pull", "where"), help="show all, fetch one, or print its path")
    parser.add_argument("name", nargs="?", help="its name in the list, or its hub id")
    parser.add_argument("--via", choices=("hub", "index"), help="what pull fetches it from (default: hub, else index)")
    _volume_arguments(parser, "path")


def _store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "prune"), help="show what is kept, or delete what is not used")
    parser.add_argument("--unused-for", type=float, metavar="DAYS", help="what prune deletes (default: 30; 0 for all)")


def _models(options: argparse.Namespace) -> int:
    from ..models.catalogue import find_known, known_models
    from ..models.pull import models_table, pull

    if options.via is not None and options.action != "pull":
        raise SemalignError(f"--via is for pull: leave it out of {options.action}")
    if options.action == "list":
        if options.name is not None:
            raise SemalignError(f"list shows all models: leave {options.name} out")
        print(models_table(list(known_models().values())))
        return 0
    if options.name is None:
        raise SemalignError(f"{options.action} needs the name of a model: semalign models list shows them")
    model = find_known(options.name)
    if options.action == "where":
        print(model.pulled(cache_folder()))
        return 0
    _hush()
    print(pull(model, via=options.via, console=Console(quiet=options.quiet)))
    return 0


def _store(options: argparse.Namespace) -> int:
    if options.action == "list":
        if options.unused_for is not None:
            raise SemalignError("--unused-for says what prune deletes: list shows all")
        found = entries()
        print(entries_table(found) if found else "no supervision is kept")
        return 0
    days = 30.0 if options.unused_for is None else options.unused_for
    if not (math.isfinite(days) and days >= 0):
        raise SemalignError(f"--unused-for {days:g}: expected a number of days, 0 or more; 0 deletes all")
    gone = prune(unused_days=days)
    print(f"deleted {len(gone)} of {len(gone) + len(entries())}, {sum(entry.size for entry in gone) / 1e6:.1f} MB")
    return 0


def _presets(options: argparse.Namespace) -> int:
    print(presets_table(load_experiment(name) for name in preset_names()))
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.experiment is None:
        raise SemalignError(f"run needs an experiment: a preset ({', '.join(preset_names())}) or a YAML file")
    experiment = load_experiment(options.experiment, configs=options.config, overrides=options.overrides)
    find_trackers(options.track)  # an unknown one is refused in a dry run, too
    if options.dry_run:
        folder = options.out or pick_folder(Path("runs"), experiment)
        data, train = experiment.data, experiment.train
        amount = f"steps {train.steps}"
        if train.steps is None:
            passes = f"{_whole_passes(experiment):.3g}"
            amount = f"{passes} pass{'es' * (passes != '1')} in all"
        stages = "each layer" if train.layers is None else f"layers {list(train.layers)}"
        kind = as_method(experiment.method).kind
        trained = f"one stage for {stages}" if kind == "semalign" else f"train by {kind}"
        plan = (
            f"plan: attribute on {data.attribution_rows} rows, supervise {data.train_rows} rows, {trained} ({amount}), "
            f"measure on {data.held_out_rows} rows, into {folder}"
        )
        # An input that cannot be used is an error before anything is printed.
        unchecked = [f"not checked: {note}" for note in DryRun().check(experiment, folder)]
        lines = [*describe_writing(data), plan, *describe(experiment), *unchecked]
        print(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        print("\n".join(f"# {line}" for line in lines))  # comments: what is printed is an experiment's file
        return 0

    _hush()
    ranks, _ = join(experiment.device)
    folder = ranks.from_first(lambda: options.out or pick_folder(Path("runs"), experiment))
    console = Console(quiet=options.quiet)
    result = run_experiment(experiment, folder, console=console, trackers=options.track)
    if ranks.is_first:
        report_run(folder, console)
        print(result_table(result))
        print(f"run folder: {folder.resolve()}")
    return 0


def _whole_passes(experiment: Experiment) -> float:
    """Passes over the rows once each stage has whole steps; those that were asked for where the target is unknown."""
    data, train, shape = experiment.data, experiment.train, find_shape(experiment.target)
    if shape is None:
        return train.passes
    return sum(train.stage_steps(shape.layers, data.train_rows)) * train.batch_size / data.train_rows


def _doctor(options: argparse.Namespace) -> int:
    from ..doctor import diagnose, diagnosis_text, read_settings
    from ..report.plots import write_heat_map

    if options.out is not None and not options.deep:
        raise SemalignError("--out is the heat map of --deep: give --deep too, or leave --out out")
    _hush()
    experiment, has_rows = read_settings(options.source, options.target, options.data, options.overrides)
    diagnosis = diagnose(
        experiment,
        has_rows=has_rows,
        deep=options.deep,
        console=Console(),
    )
    print(diagnosis.model_dump_json(indent=2) if options.json else diagnosis_text(diagnosis))
    if diagnosis.similarity:
        file = write_heat_map(diagnosis.similarity, diagnosis.pairing, Path(options.out or "layers.svg"))
        print(f"heat map: {file}", file=sys.stderr if options.json else sys.stdout)
    return 0 if diagnosis.is_usable else 1


def _submit(options: argparse.Namespace) -> int:
    from ..grid.matrix import matrix_table, read_matrix, write_table
    from ..grid.submit import Target, look_ahead, parse_parameters, submit_matrix

    if options.experiment is None:
        raise SemalignError(f"submit needs an experiment: a preset ({', '.join(preset_names())}) or a YAML file")
    target = Target(options.executor, options.jobs, parse_parameters(options.slurm), find_trackers(options.track))
    matrix = read_matrix(options.experiment, over=options.over, configs=options.config, overrides=options.overrides)
    folder = options.out or Path("runs") / f"{matrix.name}-matrix"
    if options.dry_run:
        standings = look_ahead(matrix, folder)
        print(matrix_table(standings))
        return 2 if any(each.state == "refused" for each in standings) else 0
    found = submit_matrix(matrix, folder, target, wait=options.wait, console=Console(quiet=options.quiet))
    print(matrix_table(found))
    print(f"table: {write_table(folder, found).resolve()}")
    if any(each.state == "running" for each in found):
        print("the same command shows what is finished by then; jobs that still run are not submitted again")
    return 2 if any(each.state == "failed" for each in found) else 0


def _compare(options: argparse.Namespace) -> int:
    from ..comparison import Benchmarks, ComparisonConfig, compare, comparison_markdown, overrides_of_methods
    from ..methods import find_methods
    from ..report.published import published_table

    if options.experiment is None:
        raise SemalignError(f"compare needs an experiment: a preset ({', '.join(preset_names())}) or a YAML file")
    names = find_methods(options.methods)
    if options.against is not None and options.against not in names:
        raise SemalignError(f"--against {options.against}: name it among --methods too")
    shared, own = overrides_of_methods(options.overrides, names)
    experiment = load_experiment(options.experiment, configs=options.config, overrides=shared)
    benchmarks = None
    if options.tasks is not None:
        tree = {"tasks": _names(options.tasks), "data": options.data, "limit": options.limit, "chat": options.chat}
        tree["allow_weak_sandbox"] = bool(options.allow_weak_sandbox)
        benchmarks = Benchmarks.parse(tree, origin="benchmarks")
    elif any(each is not None for each in (options.data, options.limit, options.chat, options.allow_weak_sandbox)):
        raise SemalignError(
            "--data, --limit, --chat, --plain and --allow-weak-sandbox are about benchmarks: name some with --tasks"
        )
    config = ComparisonConfig(
        experiment=experiment,
        methods=own,
        seeds=_seeds(options.seeds, experiment, shared),
        equal=options.equal,
        against=options.against,
        benchmarks=benchmarks,
    )
    _hush()
    folder = options.out or Path("runs") / f"{experiment.name}-comparison"
    comparison = compare(
        config, folder, jobs=options.jobs, trackers=find_trackers(options.track), console=Console(quiet=options.quiet)
    )
    print(comparison_markdown(comparison))
    for table in published_table(comparison):
        print(table)
    print(f"comparison folder: {folder.resolve()}")
    return 2 if any(found.missing for found in comparison.methods.values()) else 0


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",")]


def _seeds(given: str | None, experiment: Experiment, overrides: Sequence[str]) -> tuple[int, ...]:
    if given is None:
        return (experiment.train.seed,)
    if any(text.startswith("train.seed=") for text in overrides):
        raise SemalignError("--seeds and train.seed say the same: leave one of them out")
    try:
        seeds = tuple(int(seed) for seed in given.split(","))
    except ValueError:
        raise SemalignError(f"--seeds {given}: expected whole numbers with commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise SemalignError(f"--seeds {given} names a seed twice: leave one out")
    return seeds


def _sweep(options: argparse.Namespace) -> int:
    from ..comparison.sweep import sweep, sweep_table

    if options.experiment is None:
        raise SemalignError(f"sweep needs an experiment: a preset ({', '.join(preset_names())}) or a YAML file")
    _hush()
    experiment = load_experiment(options.experiment, configs=options.config, overrides=options.overrides)
    folder = options.out or Path("runs") / f"{experiment.name}-sweep"
    found = sweep(
        options.experiment,
        folder,
        over=options.over,
        configs=options.config,
        overrides=options.overrides,
        rungs=options.rungs,
        jobs=options.jobs,
        trackers=find_trackers(options.track),
        console=Console(quiet=options.quiet),
    )
    print(sweep_table(found))
    print(f"sweep folder: {folder.resolve()}")
    return 2 if found.failed else 0


def _evaluate(options: argparse.Namespace) -> int:
    from ..evaluation import EvaluationConfig, evaluate, evaluation_table

    overrides = list(options.overrides)
    if options.model is not None and "=" in options.model and not Path(options.model).exists():
        overrides.insert(0, options.model)
        options.model = None
    tree: dict[str, object] = {}
    for config in options.config:
        tree = merged(tree, read_tree(Path(config)))
    flags = {
        "model": options.model and {"path": options.model},
        "source": options.source and {"path": options.source},
        "tasks": options.tasks and _names(options.tasks),
        "data": options.data,
        "limit": options.limit,
        "seed": options.seed,
        "chat": options.chat,
        "allow_weak_sandbox": options.allow_weak_sandbox,
    }
    tree = merged(tree, {key: value for key, value in flags.items() if value is not None})
    tree = merged(tree, parse_overrides(overrides))
    if "model" not in tree:
        raise SemalignError("evaluate needs a model: a hub id, a model folder or a .gguf file")
    config = EvaluationConfig.parse(tree, origin=str(options.config[-1]) if options.config else "evaluation")
    folder = options.out or Path("evaluations") / _evaluation_name(config.model.path)
    _hush()
    result = evaluate(config, folder, console=Console(quiet=options.quiet))
    if result is not None:
        print(evaluation_table(result))
        print(f"evaluation folder: {folder.resolve()}")
    return 0


def _evaluation_name(model: str) -> str:
    """The last two parts of a hub id or path, without the ending of a GGUF file."""
    place = Path(model)
    if not place.name or ".." in place.parts:
        place = Path(os.path.abspath(place))
    if place.suffix.lower() == ".gguf":
        place = place.with_suffix("")
    return "-".join(place.parts[bool(place.anchor) :][-2:]).replace(":", "-") or "model"


def _report(options: argparse.Namespace) -> int:
    from ..report import write_report

    file = write_report(options.folders, options.out, plots=options.plots)
    print(f"report: {file.resolve()} and {file.with_suffix('.md').name}")
    return 0


def _pair(options: argparse.Namespace) -> int:
    from ..evaluation import over_seeds, pair, pair_table, read_evaluation, seeds_table

    if options.more and (options.source is not None or options.seed is not None):
        raise SemalignError("--source and --seed are for two evaluations, before and after: leave them out")
    evaluations = [read_evaluation(folder) for folder in (options.first, options.second, *options.more)]
    if options.more:
        print(seeds_table(over_seeds(evaluations)))
    else:
        source = read_evaluation(options.source) if options.source else None
        print(pair_table(pair(*evaluations, source=source, seed=options.seed or 0)))
    if len(dtypes := {found.result.dtype for found in evaluations}) > 1:
        print(
            f"semalign: they computed in {' and '.join(sorted(dtypes))}, which alone changes answers", file=sys.stderr
        )
    return 0


def _hush() -> None:
    """Libraries keep to themselves what the console shows better."""
    transformers.logging.disable_progress_bar()
    for chatty in ("datasets", "huggingface_hub", "lm_eval", "lm-eval"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def _way_on(command: str, given: Sequence[str], place: str) -> str:
    """How to resume after an interruption, and at which place."""
    pulls = command == "models" and "pull" in given
    if not pulls and command not in ("run", "submit", "compare", "sweep", "evaluate"):
        return ""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1  # by a command that is not known here
    return f"; the same command resumes {place}".rstrip() + ("" if launched else f": semalign {shlex.join(given)}")


def _disk_message(error: OSError) -> str:
    full = (errno.ENOSPC, errno.EDQUOT)
    if error.errno in full or any(os.strerror(number) in str(error) for number in full):
        return (
            f"the disk is full ({error}): free some space, or choose another place with --out, and for the cache of "
            "models with the environment variable SEMALIGN_CACHE"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        of_cache = Path(str(error.filename)).is_relative_to(cache_folder())
        out = "" if of_cache else "--out, and for the cache of models and supervision with "
        return (
            f"{error.filename} cannot be written to ({error.strerror}): choose another place with {out}the environment "
            "variable SEMALIGN_CACHE"
        )
    return str(error)


def _fail(message: str) -> int:
    print(f"semalign: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
