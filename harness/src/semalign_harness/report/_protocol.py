"""Inputs, environment and benchmarks of a run, and the commands that repeat it."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import JsonValue

from ..data.row_files import is_file_name
from ..data.settings import RowsConfig
from ..experiment import Experiment
from ..models.settings import ModelConfig
from ..results.comparison import Benchmarks
from ..results.evaluation import EvaluationConfig, EvaluationResult
from ..results.files import EVALUATION_FOLDERS, EXPERIMENT
from ..results.metrics import SEED
from ..results.run import Environment
from ..util.text import many
from ._page import Block, Code, Facts, Pair, Text
from ._read import ROLES, Evaluations, ReportedRun


def describe_method(experiment: Experiment) -> str:
    """Return the method with its settings; where it transports contributions, with frame and pairing."""
    method = experiment.method
    own = {name: getattr(value, "kind", value) for name, value in method if name != "kind"}
    usual = {name: getattr(field.default, "kind", field.default) for name, field in type(method).model_fields.items()}
    shown = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in own.items()
        if isinstance(value, str) or value != usual[name]
    ]
    if method.layer_use == "transported":
        shown += [f"{experiment.transport.frame} frame", f"{experiment.pairing.kind} pairing"]
    return f"{method.kind}: {', '.join(shown)}" if shown else method.kind


def describe_rows(rows: RowsConfig) -> str:
    """Return the place of rows; a file has neither subset nor split."""
    if is_file_name(Path(rows.path)):
        return rows.path
    subset = "" if rows.subset is None else f", subset {rows.subset}"
    return f"{rows.path}{subset}, split {rows.split}"


def repeat_command(folder: Path) -> str:
    """Return the command that runs the experiment of a run folder again in another folder."""
    return f"semalign run {shlex.quote(str(folder / EXPERIMENT))}"


def benchmark_flags(config: EvaluationConfig | Benchmarks) -> list[str]:
    """Return the options of a command for benchmarks."""
    flags = ["--tasks", ",".join(config.tasks)]
    flags += [] if config.data is None else ["--data", config.data]
    flags += [] if config.limit is None else ["--limit", str(config.limit)]
    flags += [] if config.max_new_tokens is None else ["--max-new-tokens", str(config.max_new_tokens)]
    flags += [] if config.chat is None else ["--chat" if config.chat else "--plain"]
    return flags + ["--allow-weak-sandbox"] * config.allow_weak_sandbox


def template_overrides(config: Experiment | EvaluationConfig) -> list[str]:
    """Return the overrides of a command for the options and the date of the chat template."""
    chosen = config.model_dump(mode="json", include={"chat_template", "date"}, exclude_defaults=True)
    return [f"{name}={json.dumps(value)}" for name, value in chosen.items()]


def missing_benchmarks(run: ReportedRun) -> list[Block]:
    """Return the commands that evaluate the remaining models of a run; nothing for generated models."""
    paths = (run.experiment.source.path, run.experiment.target.path, str(run.folder / "model"))
    missing = {role: path for role, path in zip(ROLES, paths, strict=True) if role not in run.evaluations}
    if not missing or not run.model_bytes or any(path.startswith("generated:") for path in paths):
        return []
    known = next((found.result.config for found in run.evaluations.values()), None)
    flags = ["--limit", "200"] if known is None else ["--seed", str(known.seed), *benchmark_flags(known)]
    flags += template_overrides(known or run.experiment)
    models = dict(zip(ROLES, (run.experiment.source, run.experiment.target), strict=False))
    places = {role: run.folder / name for role, name in EVALUATION_FOLDERS.items()}
    elsewhere = [str(each.folder) for role, each in run.evaluations.items() if each.folder != places[role]]
    commands = [
        ["semalign", "evaluate", path, *flags, *_model_overrides(models.get(role)), "--out", str(places[role])]
        for role, path in missing.items()
    ]
    commands.append(["semalign", "report", str(run.folder), *elsewhere])
    return [
        Text(
            f"Without benchmarks: {', '.join(missing)}. These commands evaluate them and add the result to this page:"
        ),
        Code("\n".join(map(shlex.join, commands))),
    ]


def protocol_blocks(
    experiment: Experiment, environment: Environment | None, evaluations: Evaluations, *, command: str
) -> list[Block]:
    """Return everything that a run depends on, and the command that repeats it."""
    shown = next((evaluations[role].result for role in reversed(ROLES) if role in evaluations), None)
    settings = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return [
        Facts((*experiment_facts(experiment), *environment_facts(environment))),
        *([] if shown is None else evaluation_blocks(shown)),
        Text("To repeat it:"),
        Code(command),
        Code(settings.rstrip(), folded="all settings, as YAML"),
    ]


def experiment_facts(experiment: Experiment) -> list[Pair]:
    """Return rows, prompts, written answers and seeds."""
    data, measure = experiment.data, experiment.measure
    held_out = None if data.measure_on == "tuning" else data.held_out
    held_out_rows = "others of these" if held_out is None else describe_rows(held_out)
    template = template_words(experiment.chat_template)
    facts = [
        ("training rows", describe_rows(data.train)),
        ("held-out rows", f"{held_out_rows}, none with the prompt of a training row"),
        ("prompt and answer", f"{_fields(data.train)}; with the chat template, where the tokenizer has one{template}"),
    ]
    if held_out is not None and _fields(held_out) != _fields(data.train):
        facts.append(("prompt and answer, held out", _fields(held_out)))
    seeds = {"rows": data.seed, "training": experiment.train.seed, "bootstraps": SEED}
    manner = f"temperature {data.writing.temperature:g}, at most {many(data.writing.max_new_tokens, 'token')}"
    if data.answers != "gold":
        facts.append(("training answers", f"written by the {data.answers}, kept where {data.writing.keep}, {manner}"))
    if data.held_out_answers != "gold":
        facts.append(("held-out answers", f"written by the {data.held_out_answers}, {manner}"))
    if {data.answers, data.held_out_answers} != {"gold"}:
        seeds["written answers"] = data.writing.seed
    if measure.answer_rows:
        limit = many(measure.max_new_tokens, "token")
        rule = "right where answer and reference hold the same number, extracted as in GSM8K"
        facts.append(("exact answers", f"greedy, at most {limit}; {rule}"))
    if isinstance(seed := getattr(experiment.pairing, "seed", None), int):
        seeds["pairing"] = seed
    return [*facts, ("seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items()))]


def environment_facts(environment: Environment | None) -> list[Pair]:
    """Return hashes, machine and versions."""
    if environment is None:
        return []
    hashes = ", ".join(f"{digest} ({place})" for place, digest in environment.data_sha256.items())
    dtypes = [f"{role} in {dtype}" for role, dtype in zip(("source", "target"), environment.dtypes, strict=False)]
    versions = {"Python": environment.python, **environment.packages}
    machine = [environment.platform, environment.device, *dtypes, many(environment.threads, "thread")]
    machine.append(many(environment.processes, "process", "processes"))
    models = zip(("source", "target"), environment.models, strict=False)
    facts = [
        ("sha256 of the data", hashes),
        ("date for the template", environment.date or ""),
        *((f"hash of the {role}", identity) for role, identity in models),
        ("cache key of the supervision", environment.supervision_key),
        ("machine", ", ".join(machine)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(name, value) for name, value in facts if value]


def evaluation_blocks(result: EvaluationResult) -> list[Block]:
    """Return prompt, extraction and documents of each benchmark."""
    blocks: list[Block] = []
    for name, found in result.benchmarks.items():
        protocol = found.protocol
        tokens = protocol.max_new_tokens
        facts = [
            ("benchmark", f"{name}, version {protocol.benchmark_version}, {many(protocol.few_shot, 'solved example')}"),
            ("chat template", "yes" + template_words(protocol.chat_template) if protocol.chat else "no"),
            ("date for the template", str(protocol.date or "")),
            ("extraction", protocol.extraction),
            ("generation", "" if tokens is None else f"greedy, at most {many(tokens, 'token')}"),
            ("stops at", ", ".join(map(repr, protocol.stop))),
            ("choices", ", ".join(map(repr, protocol.choices))),
            ("seed of the documents", str(result.config.seed)),
            ("sha256 of the documents", found.documents_sha256),
        ]
        blocks.append(Facts(tuple((name, value) for name, value in facts if value)))
        blocks.append(Code(protocol.prompt + protocol.prefix, folded=f"prompt of {name}"))
    return blocks


def template_words(options: Mapping[str, JsonValue]) -> str:
    """Return the options of the chat template after a comma; nothing without options."""
    return "".join(f", {name}={json.dumps(value)}" for name, value in options.items())


def _model_overrides(model: ModelConfig | None) -> list[str]:
    """Overrides of a command for loading a model, except its path."""
    chosen = {} if model is None else model.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)
    return [f"model.{name}={json.dumps(value)}" for name, value in chosen.items()]


def _fields(rows: RowsConfig) -> str:
    named = (f"template {each!r}" if "{{" in each else f"field {each}" for each in (rows.prompt, rows.completion))
    return ", ".join(named)
