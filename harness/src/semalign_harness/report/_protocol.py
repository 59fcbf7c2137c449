"""What a run depends on, and how it is repeated."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import JsonValue

from ..data.row_files import is_file_name
from ..data.settings import RowsConfig
from ..experiment import Experiment
from ..results.files import EXPERIMENT
from ..results.run import Environment
from ._cells import many
from ._metrics import SEED
from ._page import Block, Code, Facts, Text
from ._read import ROLES, Evaluations

Pairs = list[tuple[str, str]]


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
    """Where rows come from; a file has neither subset nor split."""
    if is_file_name(Path(rows.path)):
        return rows.path
    subset = "" if rows.subset is None else f", subset {rows.subset}"
    return f"{rows.path}{subset}, split {rows.split}"


def repeat_command(folder: Path) -> str:
    """The command that runs the experiment of a run folder again, elsewhere."""
    return f"semalign run {shlex.quote(str(folder / EXPERIMENT))}"


def template_words(options: Mapping[str, JsonValue]) -> str:
    """Options of the chat template after a comma; nothing without any."""
    return "".join(f", {name}={json.dumps(value)}" for name, value in options.items())


def experiment_facts(experiment: Experiment) -> Pairs:
    """Prompts, extractors and seeds."""
    data, measure = experiment.data, experiment.measure
    held_out = None if data.measure_on == "tuning" else data.held_out
    held_out_rows = "others of these" if held_out is None else describe_rows(held_out)
    pairs = [
        ("training rows", describe_rows(data.train)),
        ("held-out rows", f"{held_out_rows}, none with the prompt of a training row"),
        (
            "prompt and answer",
            f"{_fields(data.train)}; through the chat template, where the tokenizer has one"
            + template_words(experiment.chat_template),
        ),
    ]
    if held_out is not None and _fields(held_out) != _fields(data.train):
        pairs.append(("prompt and answer, held out", _fields(held_out)))
    written = data.writing
    manner = f"temperature {written.temperature:g}, at most {many(written.max_new_tokens, 'token')}"
    if data.answers != "gold":
        pairs.append(("training answers", f"written by the {data.answers}, kept where {written.keep}, {manner}"))
    if data.held_out_answers != "gold":
        pairs.append(("held-out answers", f"written by the {data.held_out_answers}, {manner}"))
    if measure.answer_rows:
        pairs.append(
            (
                "exact answers",
                f"greedy, at most {many(measure.max_new_tokens, 'token')}; right where both the answer "
                "and the reference arrive at the same number, read as GSM8K's are",
            )
        )
    seeds = {"rows": data.seed, "training": experiment.train.seed, "bootstraps": SEED}
    if {data.answers, data.held_out_answers} != {"gold"}:
        seeds["written answers"] = data.writing.seed
    if isinstance(seed := getattr(experiment.pairing, "seed", None), int):
        seeds["pairing"] = seed
    return [*pairs, ("seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items()))]


def environment_facts(environment: Environment | None) -> Pairs:
    """Hashes and versions."""
    if environment is None:
        return []
    models = zip(("source", "target"), environment.models, strict=False)
    hashes = ", ".join(f"{digest} ({place})" for place, digest in environment.data_sha256.items())
    dtypes = zip(("source", "target"), environment.dtypes, strict=False)
    computed = "".join(f", {role} in {dtype}" for role, dtype in dtypes)
    machine = f"{environment.platform}, {environment.device}{computed}"
    return [
        *([("sha256 of the data", hashes)] if hashes else []),
        *([("day told to the template", environment.date)] if environment.date else []),
        *((f"hash of the {role}", identity) for role, identity in models),
        ("hash of the supervision", environment.supervision_key),
        (
            "ran on",
            f"{machine}, {many(environment.threads, 'thread')}, {many(environment.processes, 'process', 'processes')}",
        ),
        (
            "versions",
            ", ".join([f"Python {environment.python}", *(f"{k} {v}" for k, v in environment.packages.items())]),
        ),
    ]


def evaluation_blocks(evaluations: Evaluations) -> list[Block]:
    """How each benchmark was put, and how the responses were read."""
    blocks: list[Block] = []
    shown = next((evaluations[role].result for role in reversed(ROLES) if role in evaluations), None)
    for name, found in shown.benchmarks.items() if shown is not None else ():
        assert shown is not None
        protocol = found.protocol
        pairs = [
            ("benchmark", f"{name}, version {protocol.benchmark_version}, {many(protocol.few_shot, 'solved example')}"),
            ("chat template", "yes" + template_words(protocol.chat_template) if protocol.chat else "no"),
            *([("day told to the template", protocol.date)] if protocol.date else []),
            ("read as", protocol.extraction),
        ]
        if protocol.max_new_tokens is not None:
            pairs.append(("generated", f"greedily, at most {many(protocol.max_new_tokens, 'token')}"))
        if protocol.stop:
            pairs.append(("ends at", ", ".join(map(repr, protocol.stop))))
        if protocol.choices:
            pairs.append(("choices", ", ".join(map(repr, protocol.choices))))
        pairs += [
            ("seed of the draw", str(shown.config.seed)),
            ("sha256 of the documents", found.documents_sha256),
        ]
        blocks += [Facts(tuple(pairs)), Code(protocol.prompt + protocol.prefix, folded=f"prompt of {name}")]
    return blocks


def settings_block(experiment: Experiment) -> Code:
    """The whole experiment as YAML."""
    tree = experiment.model_dump(mode="json")
    return Code(
        yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100).rstrip(), folded="all settings, as YAML"
    )


def protocol_blocks(
    experiment: Experiment, environment: Environment | None, evaluations: Evaluations, *, command: str
) -> list[Block]:
    """Everything that a run depends on, and the command that repeats it."""
    return [
        Facts((*experiment_facts(experiment), *environment_facts(environment))),
        *evaluation_blocks(evaluations),
        Text("To repeat it:"),
        Code(command),
        settings_block(experiment),
    ]


def _fields(rows: RowsConfig) -> str:
    named = (f"template {each!r}" if "{{" in each else f"field {each}" for each in (rows.prompt, rows.completion))
    return ", ".join(named)
