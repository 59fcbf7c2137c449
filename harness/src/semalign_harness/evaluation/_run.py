"""Evaluate one model: benchmarks through lm-eval, gold answers, agreement with a source; answers kept as they come."""

import contextlib
import datetime
import functools
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
from semalign_attribution import DecoderView
from semalign_geometry import SharedVocabulary
from semalign_geometry.base import SemalignError, replace_file

from ..benchmarks import KNOWN_TASKS, Benchmark, BenchmarkProtocol, Document, code_of, find_benchmark, sample
from ..data.encoding import ENCODING, Example, TextEncoder
from ..generation import GENERATION
from ..models.loading import load_model
from ..models.opening import OpenedModel, check_tokenizers, identity, open_model
from ..models.shape import row_bytes
from ..results.evaluation import BenchmarkResult, EvaluationConfig, EvaluationResult, ItemRecord, Name
from ..run.inputs import note_unused
from ..sandbox import judge, probe
from ..statistics import NATS, SHARE, Estimate, mean, proportion
from ..util.cache import cache_folder
from ..util.console import Console
from ..util.failures import naming
from ..util.journal import Journal
from ..util.resources import join
from ._agreement import Agreement, Text, agreements, gold_example, missing_agreements
from ._compare import check_no_run
from ._encoded import EncodedLM, longest_input
from ._journaled import JournaledLM

PACKAGES = ("semalign-harness", "lm-eval", "torch", "transformers")
LARGEST_BATCH = 128
MEMORY_SHARE = 0.5
"""Of the free memory, what a batch may take."""
BITS = 1 / float(torch.log(torch.tensor(2.0)))
"""Bits in a nat."""


def evaluate(config: EvaluationConfig, folder: Path, *, console: Console | None = None) -> EvaluationResult | None:
    """Evaluate a model on benchmarks, into a folder with `result.json` and one `items-<benchmark>.jsonl` for each.

    A folder that holds other benchmarks of the same evaluation gets these in addition.

    What the model answers is kept under `cache_folder()/evaluations` as it comes: the same call costs nothing a second
    time, and after an interruption it goes on where it stopped. Started by `accelerate launch`, the documents are
    shared out over the ranks.

    Returns:
        The result; None on every rank but the first.

    Raises:
        SemalignError: the model, the documents or the sandbox cannot be used, or the folder holds another evaluation
            or other files.
        OSError: the disk is full.
    """
    _check_folder(folder)
    ranks, device = join(config.device)
    console = console if console is not None and ranks.is_first else Console(quiet=True)
    with console.step("read rows, tokenizers and configurations"):
        drawn = {name: _draw(find_benchmark(name), config) for name in config.tasks}
        opened = open_model(config.model, progress=console.ticker("pre-train the model"), note=console.note)
        source = None
        if config.source:
            source = open_model(config.source, progress=console.ticker("pre-train the source"), note=console.note)
        chat = opened.tokenizer.chat_template is not None if config.chat is None else config.chat
        if chat and opened.tokenizer.chat_template is None:
            raise SemalignError(f"{config.model.path} has no chat template: set chat=false, or leave it out")
        model_sha256, source_sha256 = identity(opened), identity(source) if source else None
        shared = check_tokenizers(source, opened, []) if source else None
    runs_code = any(find_benchmark(name).runs_code for name in config.tasks)
    level = probe() if runs_code else None
    if level is not None and not level.strong and not config.allow_weak_sandbox:
        raise SemalignError(
            "model-written programs can only be limited here, not confined: evaluate on Linux, leave humaneval and "
            "mbpp out, or give --allow-weak-sandbox where nothing can be lost"
        )

    limit = longest_input(opened)
    _check_positions(config, limit, chat)
    if config.backend == "vllm" and config.model.load_in_4bit:
        raise SemalignError("the backend vllm does not load in 4 bits: set backend=transformers, or leave that out")
    encoder = TextEncoder(opened.tokenizer, options=config.chat_template, date=config.date, chat=chat)
    for note in encoder.notes():
        console.note(note)
    texts = {
        name: _texts(find_benchmark(name), *documents, encoder, config.model.path) if config.gold or source else []
        for name, documents in drawn.items()
    }
    limits = [longest_input(each) for each in (opened, source) if each is not None]
    of_both = min((each for each in limits if each is not None), default=None)
    _check_gold(texts, drawn, encoder, of_both)
    runner = _Runner(config, opened, limit, encoder, model_sha256, device, console)
    hashes = model_sha256, source_sha256
    _earlier(folder, config, hashes, runner.dtype)  # refuses another evaluation before hours are spent
    comparer, examples = None, dict[str, list[Example]]()
    if source is not None and shared is not None:
        comparer = _Comparer(source, opened, shared, runner, str(source_sha256))
        examples = {name: [gold_example(text, encoder, of_both) for text in of] for name, of in texts.items()}
        ranks.broadcast_from_first(functools.partial(comparer.check, [each for of in examples.values() for each in of]))

    results = {
        name: runner.run(find_benchmark(name), documents, indices) for name, (documents, indices) in drawn.items()
    }
    if runner.lm.rank != 0:
        return None
    if config.gold:
        with naming(f"reference answers cannot go through {config.model.path}"):
            for name, records in results.items():
                _add_gold(records, texts[name], runner.lm)
    runner.lm.release()
    cut: Counter[str] = Counter()
    if comparer is not None:
        for name, records in results.items():
            cut[name] = sum(
                len(encoder.ids(text.prompt)) > len(example.prompt_ids)
                for text, example in zip(texts[name], examples[name], strict=True)
            )
            if cut[name]:
                console.note(
                    f"{cut[name]} prompts of {name} with their solutions are longer than both models read, and were "
                    "cut on the left for the comparison with the source"
                )
            for record, value in zip(records, comparer.compare(examples[name]), strict=True):
                record |= {"kl": value.kl, "agreement": value.agreement, "tokens": value.tokens}

    benchmarks: dict[Name, BenchmarkResult] = {}
    for name, records in results.items():
        items = [ItemRecord.model_validate(record) for record in records]
        replace_file(folder / f"items-{name}.jsonl", "".join(item.model_dump_json() + "\n" for item in items))
        benchmarks[name] = _summary(
            find_benchmark(name),
            items,
            *drawn[name],
            encoder=encoder,
            truncated=runner.truncated[name],
            truncated_to_compare=cut[name],
        )
    earlier = _earlier(folder, config, hashes, runner.dtype)  # also what another process has put there meanwhile
    if earlier is not None:
        benchmarks = {**earlier.benchmarks, **benchmarks}
        level = level or earlier.sandbox
    result = EvaluationResult(
        config=config.model_copy(update={"tasks": tuple(benchmarks)}),
        model_sha256=model_sha256,
        source_sha256=source_sha256,
        chat=chat,
        dtype=runner.dtype,
        sandbox=level,
        packages={name: version(name) for name in PACKAGES} | KNOWN_TASKS.packages(*benchmarks),
        benchmarks=benchmarks,
    )
    result.write(folder / "result.json")
    return result


def _draw(benchmark: Benchmark, config: EvaluationConfig) -> tuple[list[Document], list[int]]:
    documents = benchmark.documents(Path(config.data) if config.data else None)
    return documents, sample(documents, config.limit, config.seed)


def _check_folder(folder: Path) -> None:
    """Refuse a place where an evaluation cannot be written, or would come among other files."""
    for place in (folder, *folder.parents):
        if place.is_file():
            raise SemalignError(f"{place} is a file: choose a new folder")
    check_no_run(folder, remedy="choose another folder with --out")
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    ours = ("result.json", "items-", ".result.json.", ".items-")  # the hidden ones while they are written
    if names and not any(name.startswith(ours) for name in names):
        raise SemalignError(f"{folder} holds other files: choose a new folder")


def _earlier(
    folder: Path, config: EvaluationConfig, hashes: tuple[str, str | None], dtype: str
) -> EvaluationResult | None:
    """What the folder holds of the same evaluation; `hashes` of model and source."""
    if not (folder / "result.json").is_file():
        return None
    earlier = EvaluationResult.read(folder / "result.json")
    asked = config.model_copy(update={"tasks": earlier.config.tasks})
    differing = [key for key in EvaluationConfig.model_fields if getattr(earlier.config, key) != getattr(asked, key)]
    if not differing:
        found = {
            "the model": (earlier.model_sha256, hashes[0]),
            "the source": (earlier.source_sha256, hashes[1]),
            "the dtype": (earlier.dtype, dtype),
        }
        differing = [name for name, (before, now) in found.items() if before != now]
    if differing:
        raise SemalignError(
            f"{folder} holds another evaluation ({', '.join(differing)} differs): choose another folder with --out"
        )
    return earlier


def _check_positions(config: EvaluationConfig, limit: int | None, chat: bool) -> None:
    for name in config.tasks:
        generated = find_benchmark(name).protocol(chat=chat).max_new_tokens or 0
        if limit is not None and limit <= generated:
            raise SemalignError(
                f"{name} generates up to {generated} tokens, {config.model.path} reads at most {limit} in "
                f"all: leave {name} out of tasks"
            )


def _texts(
    benchmark: Benchmark, documents: list[Document], indices: list[int], encoder: TextEncoder, model: str
) -> list[Text]:
    """The gold answers of documents after their prompts, as a model reads them."""
    texts = []
    for index in indices:
        with naming(f"the benchmark {benchmark.name} gives no prompt and solution of document {index}"):
            gold = benchmark.gold(documents[index], chat=encoder.chat)
        prompt = gold.prompt
        if encoder.chat:
            with naming(f"the chat template of {model} refuses a prompt"):
                prompt = encoder.prompt([{"role": "user", "content": gold.prompt}])
        texts.append(Text(prompt + gold.prefix, gold.answer))
    return texts


def _check_gold(
    texts: dict[str, list[Text]],
    drawn: dict[str, tuple[list[Document], list[int]]],
    encoder: TextEncoder,
    limit: int | None,
) -> None:
    """Refuse gold answers that leave no room for a prompt, before anything is computed."""
    for name, of_task in texts.items() if limit is not None else ():
        assert limit is not None
        for index, text in zip(drawn[name][1], of_task, strict=False):
            tokens = len(encoder.pair_ids(*text)[1])
            if tokens >= limit:
                raise SemalignError(
                    f"the reference solution of document {index} of {name} has {tokens} tokens, the models read at "
                    f"most {limit} with its prompt: leave {name} out of tasks, or set gold=false and no source"
                )


class _Runner:
    """One model with its journal, put to one benchmark after another."""

    def __init__(
        self,
        config: EvaluationConfig,
        opened: OpenedModel,
        limit: int | None,
        encoder: TextEncoder,
        model_sha256: str,
        device: torch.device,
        console: Console,
    ) -> None:
        self.config, self.opened, self.encoder, self.console = config, opened, encoder, console
        self.limit = limit
        self.device = device
        self.dtype = str(opened.dtype(self.device)).removeprefix("torch.")
        self.state = PartialState(cpu=self.device.type == "cpu")
        precision = opened.precision(self.device)
        kept = f"{_short(model_sha256)}-{precision}-{config.backend}-{GENERATION}-{encoder.key}"
        self.journals = folder = cache_folder() / "evaluations" / kept
        self.truncated: Counter[str] = Counter()
        self.journal = Journal(folder / f"answers-{self.state.process_index}.jsonl")
        self._read_other_ranks()
        self.lm = JournaledLM(
            self._make,
            self.journal,
            encoder,
            batch_size=self.batch_size,
            progress=console.counter,
            state=self.state,
            answers_as_it_goes=config.backend == "transformers",
        )

    def _read_other_ranks(self) -> None:
        for file in sorted(self.journals.glob("answers-*.jsonl")):
            if file != self.journal.path:
                self.journal.read(file)

    def _make(self) -> LM:
        with self.console.step("load the model"):
            if self.config.backend == "vllm":
                return _vllm(self.opened, self.limit, self.encoder, self.dtype)
            from ._greedy import GreedyLM

            generates = any(find_benchmark(name).read is not None for name in self.config.tasks)
            loaded = load_model(self.opened, device=self.device, generates=generates)
            note_unused(self.console, "model", loaded)
            return GreedyLM(loaded, self.encoder, batch_size=LARGEST_BATCH, max_length=self.limit)

    def batch_size(self, kind: str, tokens: int) -> int:
        """Documents of some length that run together: as asked for, or what half of the free memory holds."""
        if self.config.batch_size is not None:
            return self.config.batch_size
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        each = row_bytes(self.opened.config, tokens, all_logits=kind != "generate_until")
        size = max(1, min(LARGEST_BATCH, int(free * MEMORY_SHARE / each)))
        return int(2 ** (size.bit_length() - 1))  # few sizes, so that results repeat

    def run(self, benchmark: Benchmark, documents: list[Document], indices: list[int]) -> list[dict[str, Any]]:
        """The records of one benchmark, as dictionaries; empty on every rank but the first."""
        rows = [documents[index] for index in indices]
        judged = functools.partial(judge, allow_weak=self.config.allow_weak_sandbox) if benchmark.runs_code else None
        task = benchmark.task(rows, chat=self.encoder.chat, judge=judged)
        # lm-eval draws bars of its own on standard error.
        named = naming(f"{benchmark.name} cannot be put to {self.config.model.path}")
        with self.console.step(benchmark.name), contextlib.redirect_stderr(io.StringIO()), named:
            found = run_tasks(
                self.lm,
                TaskManager(include_defaults=False).load([task]),
                apply_chat_template=self.encoder.chat,
                bootstrap_iters=0,
                log_samples=True,
            )
        self.state.wait_for_everyone()
        if found is None:
            return []
        self._read_other_ranks()
        samples = sorted(found["samples"][benchmark.name], key=lambda entry: int(entry["doc_id"]))
        records = []
        for index, entry in zip(indices, samples, strict=True):
            outcome = benchmark.outcome(entry)
            kind = "loglikelihood" if benchmark.read is None else "generate_until"
            answers = self.lm.answers(kind, entry["arguments"])
            seconds, batch = sum(answer.seconds for answer in answers), max(answer.batch for answer in answers)
            records.append({"index": index, "seconds": seconds, "batch": batch, **vars(outcome)})
        if self.limit is not None:
            longest = [max(map(self.lm.tokens, entry["arguments"])) for entry in samples]
            self.truncated[benchmark.name] = sum(tokens > self.limit for tokens in longest)
        if self.truncated[benchmark.name]:
            self.console.note(
                f"{self.truncated[benchmark.name]} prompts of {benchmark.name} are longer than the model reads, and "
                "were cut on the left"
            )
        return records


def _vllm(opened: OpenedModel, limit: int | None, encoder: TextEncoder, dtype: str) -> LM:
    """vLLM, which is given token ids."""
    try:
        from lm_eval.models.vllm_causallms import VLLM

        model = type("EncodedVLLM", (EncodedLM, VLLM), {"encoder": encoder})
        return model(
            opened.place,
            revision=opened.commit,
            dtype=dtype,
            max_model_len=limit,
            trust_remote_code=False,
        )
    except (ImportError, ModuleNotFoundError) as error:
        raise SemalignError(
            f"the backend vllm is not installed ({error}): pip install 'semalign-harness[vllm]', or set "
            "backend=transformers"
        ) from error


def _add_gold(records: Sequence[dict[str, Any]], texts: Sequence[Text], lm: JournaledLM) -> None:
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=tuple(text), idx=0, metadata=("gold", place, 1))
        for place, text in enumerate(texts)
    ]
    for record, text, (score, _) in zip(records, texts, lm.loglikelihood(requests), strict=True):
        record |= {"gold_bits": -score * BITS, "gold_bytes": len(text.answer.encode())}


class _Comparer:
    """Compares a model with its source on gold answers; both are loaded when the first comparison is missing."""

    def __init__(
        self, source: OpenedModel, opened: OpenedModel, shared: SharedVocabulary, runner: _Runner, source_sha256: str
    ) -> None:
        self._source, self._opened, self._shared, self._runner = source, opened, shared, runner
        self._name = f"agreement-{_short(source_sha256)}-{source.precision(runner.device)}.jsonl"

    @functools.cached_property
    def _journal(self) -> Journal:
        """Read on first use, on the one rank that compares: two would both mend a torn last line."""
        return Journal(self._runner.journals / self._name)

    def check(self, examples: Sequence[Example]) -> None:
        """Load the source and let it go again if a comparison is missing: a broken one is refused before hours are
        spent on the model's own answers.

        Raises:
            SemalignError: the source cannot be used.
        """
        if missing_agreements(examples, self._journal):
            with self._runner.console.step("load the source, to check it"):
                load_model(self._source, device=self._runner.device)

    def compare(self, examples: Sequence[Example]) -> list[Agreement]:
        """The agreement with the source on each gold answer."""
        with naming(f"{self._opened.settings.path} cannot be compared with {self._source.settings.path}"):
            return agreements(
                lambda: self._views,
                examples,
                journal=self._journal,
                batch_size=self._runner.batch_size,
                progress=self._runner.console.counter,
            )

    @functools.cached_property
    def _views(self) -> tuple[DecoderView, DecoderView, SharedVocabulary]:
        with self._runner.console.step("load the source and the model"):
            models = [load_model(each, device=self._runner.device).model for each in (self._source, self._opened)]
        return DecoderView(models[0]), DecoderView(models[1]), self._shared


def _summary(
    benchmark: Benchmark,
    items: list[ItemRecord],
    documents: list[Document],
    indices: list[int],
    *,
    encoder: TextEncoder,
    truncated: int,
    truncated_to_compare: int,
) -> BenchmarkResult:
    rows = json.dumps([documents[index] for index in indices], sort_keys=True)

    def weighted(pairs: list[tuple[float | None, int | None]], within: tuple[float, float]) -> Estimate | None:
        """Mean over all tokens or bytes; None when it was not measured, or is not finite somewhere."""
        measured = [(value, size) for value, size in pairs if value is not None and math.isfinite(value) and size]
        if len(measured) < len(pairs):
            return None
        return mean([value for value, _ in measured], weights=[size for _, size in measured], within=within)

    return BenchmarkResult(
        protocol=protocol_of(benchmark, chat=encoder.chat, options=encoder.options, date=encoder.told_date),
        documents=len(documents),
        documents_sha256=hashlib.sha256(rows.encode()).hexdigest(),
        figure=proportion([item.correct for item in items]),
        other={name: proportion([item.other[name] for item in items]) for name in benchmark.other_metrics},
        bits_per_byte=weighted([(item.bits_per_byte, item.gold_bytes) for item in items], NATS),
        kl=weighted([(item.kl, item.tokens) for item in items], NATS),
        agreement=weighted([(item.agreement, item.tokens) for item in items], SHARE),
        reasons=dict(Counter(item.reason for item in items if item.reason is not None)),
        truncated=truncated,
        truncated_to_compare=truncated_to_compare,
        seconds=sum(item.seconds for item in items),
    )


def protocol_of(
    benchmark: Benchmark, *, chat: bool, options: Mapping[str, JsonValue], date: datetime.date | None
) -> BenchmarkProtocol:
    """How a benchmark is put to a model and read by this version.

    Args:
        benchmark: the benchmark.
        chat: whether prompts go through the chat template.
        options: of the chat template.
        date: the day that the chat template is told; None where it does not read the clock.
    """
    encoded = {
        "encoding": ENCODING,
        "chat_template": dict(options) if chat else {},
        "date": None if date is None else str(date),
        "code_sha256": code_of(benchmark),
    }
    return benchmark.protocol(chat=chat).model_copy(update=encoded)


def _short(sha256: str) -> str:
    return hashlib.sha256(sha256.encode()).hexdigest()[:16]
