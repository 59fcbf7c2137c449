"""Evaluation of one model: benchmarks through lm-eval, gold answers, agreement with a source."""

import contextlib
import datetime
import functools
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.tasks import TaskManager
from pydantic import JsonValue
from semalign_align import Ranks
from semalign_geometry.base import SemalignError, replace_file

from ..benchmarks import KNOWN_BENCHMARKS, Benchmark, BenchmarkProtocol, Document, find_benchmark, sample
from ..data.encoding import ENCODING
from ..generation import GENERATION
from ..models.loading import load_model
from ..models.shape import is_small, row_bytes
from ..results.evaluation import (
    BenchmarkResult,
    EvaluationConfig,
    EvaluationResult,
    ItemRecord,
    Name,
    check_no_run,
    evaluation_file,
)
from ..results.files import EVALUATION, RESULT
from ..run.inputs import note_unused
from ..sandbox import Level, judge, probe
from ..statistics import NATS, SHARE, Estimate, mean, proportion
from ..util.cache import cache_folder
from ..util.console import Console
from ..util.failures import naming
from ..util.journal import Journal
from ..util.resources import join, one_thread
from ._agreement import Comparer, Text, short
from ._journaled import JournaledLM
from ._models import GreedyLM, Models, open_models, vllm_model

PACKAGES = ("semalign-harness", "lm-eval", "torch", "transformers")
LARGEST_BATCH = 128
MEMORY_SHARE = 0.5
"""Share of the free memory that a batch may take."""
BITS = 1 / float(torch.log(torch.tensor(2.0)))
"""Bits in a nat."""


def evaluate(config: EvaluationConfig, folder: Path, *, console: Console | None = None) -> EvaluationResult | None:
    """Evaluate a model; write `evaluation.json` and one `items-<benchmark>.jsonl` per benchmark.

    A folder that holds other benchmarks of the same evaluation gets these in addition.

    The model's answers are kept under `cache_folder()/evaluations` as they come: a second call
    computes none of them again, and a call resumes after an interruption. Started by
    `accelerate launch`, the documents are shared out over the ranks.

    Returns:
        The result; None on every rank but the first.

    Raises:
        SemalignError: the model, the documents or the sandbox cannot be used, or the folder holds
            another evaluation or other files.
        OSError: the disk is full.
    """
    _check_folder(folder)
    ranks, device = join(config.device)
    console = console if console is not None and ranks.is_first else Console(quiet=True)
    are_small = is_small(config.model) and (config.source is None or is_small(config.source))
    with one_thread(console.note) if are_small else contextlib.nullcontext():
        return _evaluated(config, folder, console, ranks, device)


def _evaluated(
    config: EvaluationConfig, folder: Path, console: Console, ranks: Ranks, device: torch.device
) -> EvaluationResult | None:
    with console.step("read rows"):
        tasks = [_draw(find_benchmark(name).within(config.max_new_tokens), config) for name in config.tasks]
    models = open_models(config, device, console)
    level = _sandbox(tasks, config)
    _check_positions(tasks, models)
    for note in models.encoder.notes():
        console.note(note)
    runner = _Runner(config, models, console)
    gold = {task.name: _texts(task, models) if config.gold or models.source else [] for task in tasks}
    comparer = Comparer(models, runner.journals, runner.batch_size, console) if models.source else None
    _earlier(folder, config, models)  # refuses another evaluation before hours are spent
    if comparer is not None:
        ranks.broadcast_from_first(
            functools.partial(comparer.check, [text for texts in gold.values() for text in texts])
        )

    records = {task.name: runner.run(task) for task in tasks}
    if not ranks.is_first:
        return None
    if config.gold:
        with naming(f"reference answers cannot go through {config.model.path}"):
            for name, texts in gold.items():
                _add_gold(records[name], texts, runner.lm)
    runner.lm.release()
    if comparer is not None:
        for name, texts in gold.items():
            for record, value in zip(records[name], comparer.compare(name, texts), strict=True):
                record |= value._asdict()
    cut = comparer.truncated if comparer is not None else Counter[str]()
    benchmarks = {
        task.name: _summary(task, records[task.name], folder, models, runner.truncated[task.name], cut[task.name])
        for task in tasks
    }
    return _written(benchmarks, folder, config, models, level)


@dataclass(frozen=True)
class _Task:
    """A benchmark with its documents, and the indices of those that were drawn."""

    benchmark: Benchmark
    documents: list[Document]
    indices: list[int]

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def rows(self) -> list[Document]:
        """The documents that were drawn."""
        return [self.documents[index] for index in self.indices]


def _draw(benchmark: Benchmark, config: EvaluationConfig) -> _Task:
    documents = benchmark.documents(Path(config.data) if config.data else None)
    return _Task(benchmark, documents, sample(documents, config.limit, config.seed))


def _sandbox(tasks: Sequence[_Task], config: EvaluationConfig) -> Level | None:
    level = probe() if any(task.benchmark.runs_code for task in tasks) else None
    if level is not None and not level.strong and not config.allow_weak_sandbox:
        raise SemalignError(
            "model-written programs can only be limited here, not confined: evaluate on Linux, leave humaneval and "
            "mbpp out, or give --allow-weak-sandbox where nothing can be lost"
        )
    return level


def _check_folder(folder: Path) -> None:
    """Refuse a place where an evaluation cannot be written, or would come among other files."""
    for place in (folder, *folder.parents):
        if place.is_file():
            raise SemalignError(f"{place} is a file: choose a new folder")
    check_no_run(folder, remedy="choose another folder with --out")
    names = [file.name.removeprefix(".") for file in folder.iterdir()] if folder.is_dir() else []
    if names and not any(name.startswith((EVALUATION, RESULT, "items-")) for name in names):
        raise SemalignError(f"{folder} holds other files: choose a new folder")


def _earlier(folder: Path, config: EvaluationConfig, models: Models) -> EvaluationResult | None:
    """Read the folder's earlier benchmarks of the same evaluation; refuse those of another one."""
    if not (file := evaluation_file(folder)).is_file():
        return None
    earlier = EvaluationResult.read(file)
    asked = config.model_copy(update={"tasks": earlier.config.tasks})
    differing = [key for key in EvaluationConfig.model_fields if getattr(earlier.config, key) != getattr(asked, key)]
    if not differing:
        then, now = (earlier.model_sha256, earlier.source_sha256, earlier.dtype), (*models.hashes, models.dtype)
        names = ("the model", "the source", "the dtype")
        differing = [name for name, before, after in zip(names, then, now, strict=True) if before != after]
    if differing:
        raise SemalignError(
            f"{folder} holds another evaluation ({', '.join(differing)} differs): choose another folder with --out"
        )
    return earlier


def _check_positions(tasks: Sequence[_Task], models: Models) -> None:
    for task in tasks:
        generated = task.benchmark.protocol(chat=models.encoder.chat).max_new_tokens or 0
        if models.limit is not None and models.limit <= generated:
            raise SemalignError(
                f"{task.name} generates up to {generated} tokens, {models.opened.settings.path} reads at most "
                f"{models.limit} in all: leave {task.name} out of tasks, or set a lower max_new_tokens"
            )


def _texts(task: _Task, models: Models) -> list[Text]:
    """Return gold answers with their prompts; refuse one that leaves no room for its prompt."""
    texts, encoder, limit = [], models.encoder, models.limit_of_both
    for index in task.indices:
        with naming(f"the benchmark {task.name} has no prompt and solution of document {index}"):
            gold = task.benchmark.gold(task.documents[index], chat=encoder.chat)
        prompt = gold.prompt
        if encoder.chat:
            with naming(f"the chat template of {models.opened.settings.path} refuses a prompt"):
                prompt = encoder.prompt([{"role": "user", "content": gold.prompt}])
        texts.append(Text(prompt + gold.prefix, gold.answer))
        if limit is not None and (tokens := len(encoder.pair_ids(*texts[-1])[1])) >= limit:
            raise SemalignError(
                f"the reference solution of document {index} of {task.name} has {tokens} tokens, the models read at "
                f"most {limit} with its prompt: leave {task.name} out of tasks, or set gold=false and no source"
            )
    return texts


class _Runner:
    """One model with its journal, which answers one benchmark after another."""

    def __init__(self, config: EvaluationConfig, models: Models, console: Console) -> None:
        self.config, self.models, self.console = config, models, console
        self.state = PartialState(cpu=models.device.type == "cpu")
        self.truncated: Counter[str] = Counter()
        precision = models.opened.precision(models.device)
        kept = f"{short(models.hashes[0])}-{precision}-{config.backend}-{GENERATION}-{models.encoder.key}"
        self.journals = cache_folder() / "evaluations" / kept
        self.journal = Journal(self.journals / f"answers-{self.state.process_index}.jsonl")
        self.journal.read_ranks()
        self.lm = JournaledLM(
            self._make,
            self.journal,
            models.encoder,
            batch_size=self.batch_size,
            progress=console.counter,
            state=self.state,
        )

    def _make(self) -> LM:
        models = self.models
        with self.console.step("load the model"):
            if self.config.backend == "vllm":
                return vllm_model(models)
            generates = any(find_benchmark(name).read is not None for name in self.config.tasks)
            loaded = load_model(models.opened, device=models.device, generates=generates)
            note_unused(self.console, "model", loaded)
            return GreedyLM(loaded, models.encoder, batch_size=LARGEST_BATCH, max_length=models.limit)

    def batch_size(self, kind: str, tokens: int) -> int:
        """Return the number of documents that run together: as set, or by the free memory."""
        if self.config.batch_size is not None:
            return self.config.batch_size
        if self.models.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.models.device)[0]
        else:
            free = psutil.virtual_memory().available
        each = row_bytes(self.models.opened.config, tokens, all_logits=kind != "generate_until")
        size = max(1, min(LARGEST_BATCH, int(free * MEMORY_SHARE / each)))
        return int(2 ** (size.bit_length() - 1))  # few sizes, so that results repeat

    def run(self, task: _Task) -> list[dict[str, Any]]:
        """Return the records of one benchmark; none on every rank but the first."""
        benchmark, chat = task.benchmark, self.models.encoder.chat
        judged = functools.partial(judge, allow_weak=self.config.allow_weak_sandbox) if benchmark.runs_code else None
        made = benchmark.task(task.rows, chat=chat, judge=judged)
        # lm-eval draws bars of its own on standard error.
        named = naming(f"{task.name} cannot be put to {self.config.model.path}")
        with self.console.step(task.name), contextlib.redirect_stderr(io.StringIO()), named:
            found = run_tasks(
                self.lm,
                TaskManager(include_defaults=False).load([made]),
                apply_chat_template=chat,
                bootstrap_iters=0,
                log_samples=True,
            )
        self.state.wait_for_everyone()
        if found is None:
            return []
        self.journal.read_ranks()
        samples = sorted(found["samples"][task.name], key=lambda entry: int(entry["doc_id"]))
        self._count_truncated(task.name, samples)
        records = []
        for index, entry in zip(task.indices, samples, strict=True):
            answers = self.lm.answers("generate_until" if benchmark.read else "loglikelihood", entry["arguments"])
            seconds, batch = sum(answer.seconds for answer in answers), max(answer.batch for answer in answers)
            records.append({"index": index, "seconds": seconds, "batch": batch, **vars(benchmark.outcome(entry))})
        return records

    def _count_truncated(self, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        if self.models.limit is None:
            return
        longest = [max(map(self.lm.tokens, entry["arguments"])) for entry in samples]
        self.truncated[name] = sum(tokens > self.models.limit for tokens in longest)
        if self.truncated[name]:
            self.console.note(
                f"{self.truncated[name]} prompts of {name} are longer than the model reads, and were cut on the left"
            )


def _add_gold(records: Sequence[dict[str, Any]], texts: Sequence[Text], lm: JournaledLM) -> None:
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=tuple(text), idx=0, metadata=("gold", place, 1))
        for place, text in enumerate(texts)
    ]
    for record, text, (score, _) in zip(records, texts, lm.loglikelihood(requests), strict=True):
        record |= {"gold_bits": -score * BITS, "gold_bytes": len(text.answer.encode())}


def _summary(
    task: _Task, records: list[dict[str, Any]], folder: Path, models: Models, truncated: int, truncated_to_compare: int
) -> BenchmarkResult:
    """Write the items of a benchmark, and sum them up."""
    items = [ItemRecord.model_validate(record) for record in records]
    replace_file(folder / f"items-{task.name}.jsonl", "".join(item.model_dump_json() + "\n" for item in items))
    encoder, other = models.encoder, task.benchmark.other_metrics

    def weighted(pairs: list[tuple[float | None, int | None]], within: tuple[float, float]) -> Estimate | None:
        """Mean over all tokens or bytes; None when some value is missing or not finite."""
        measured = [(value, size) for value, size in pairs if value is not None and math.isfinite(value) and size]
        if len(measured) < len(pairs):
            return None
        return mean([value for value, _ in measured], weights=[size for _, size in measured], within=within)

    return BenchmarkResult(
        protocol=protocol_of(task.benchmark, chat=encoder.chat, options=encoder.options, date=encoder.told_date),
        documents=len(task.documents),
        documents_sha256=hashlib.sha256(json.dumps(task.rows, sort_keys=True).encode()).hexdigest(),
        headline=proportion([item.correct for item in items]),
        other={name: proportion([item.other[name] for item in items]) for name in other},
        bits_per_byte=weighted([(item.bits_per_byte, item.gold_bytes) for item in items], NATS),
        kl=weighted([(item.kl, item.tokens) for item in items], NATS),
        agreement=weighted([(item.agreement, item.tokens) for item in items], SHARE),
        reasons=dict(Counter(item.reason for item in items if item.reason is not None)),
        truncated=truncated,
        truncated_to_compare=truncated_to_compare,
        seconds=sum(item.seconds for item in items),
    )


def _written(
    benchmarks: dict[Name, BenchmarkResult],
    folder: Path,
    config: EvaluationConfig,
    models: Models,
    level: Level | None,
) -> EvaluationResult:
    """Write the result, together with the benchmarks that the folder holds already."""
    if earlier := _earlier(folder, config, models):  # also what another process has put there meanwhile
        benchmarks, level = {**earlier.benchmarks, **benchmarks}, level or earlier.sandbox
    result = EvaluationResult(
        config=config.model_copy(update={"tasks": tuple(benchmarks)}),
        model_sha256=models.hashes[0],
        source_sha256=models.hashes[1],
        chat=models.encoder.chat,
        dtype=models.dtype,
        sandbox=level,
        packages={name: version(name) for name in PACKAGES} | KNOWN_BENCHMARKS.packages(*benchmarks),
        benchmarks=benchmarks,
    )
    result.write(folder / EVALUATION)
    return result


def protocol_of(
    benchmark: Benchmark, *, chat: bool, options: Mapping[str, JsonValue], date: datetime.date | None
) -> BenchmarkProtocol:
    """Describe how this version puts a benchmark to a model and reads the responses.

    Args:
        benchmark: the benchmark.
        chat: whether prompts go through the chat template.
        options: of the chat template.
        date: the day that the chat template reads as today; None where it does not read the clock.
    """
    encoded = {
        "encoding": ENCODING,
        "chat_template": dict(options) if chat else {},
        "date": None if date is None else str(date),
        "code_sha256": next(iter(KNOWN_BENCHMARKS.code(benchmark).values()), None),
    }
    return benchmark.protocol(chat=chat).model_copy(update=encoded)
