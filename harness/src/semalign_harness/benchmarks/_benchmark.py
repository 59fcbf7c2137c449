"""What a benchmark is: rows, prompt, stop rules, extraction, and an lm-eval task made of them."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import datasets
from jinja2 import Environment, StrictUndefined
from pydantic import ConfigDict, JsonValue
from semalign_geometry.base import ComponentError, Contract, SemalignError, Settings, brief

from ..data.rows import load_rows
from ..data.settings import RowsConfig
from ._judge import Judge

Document = dict[str, Any]
"""One row of a benchmark, with exactly the fields that the benchmark reads."""
Reading = dict[str, Any]
"""What one response was read as: `extracted`, `correct`, other metrics; for programs `reason`, `detail`."""
Read = Callable[[list[Document], list[str], Judge | None], list[Reading]]
"""Reads all responses of a task at once, one per document."""

SPECIAL_STOPS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
"""Ends of a turn, for models that write them as text or do not have them as end-of-sequence token."""
CHOICES = ("A", "B", "C", "D")
FILTER = "extract"
"""Name of the filter in lm-eval's results: `correct,extract` is the headline figure."""

# The environment of lm-eval's own templates, so that both render the same prompt.
_JINJA = Environment(undefined=StrictUndefined, keep_trailing_newline=True)

RowT = TypeVar("RowT", bound="Row")


class Row(Settings):
    """Base of the rows that a benchmark reads; further fields are dropped."""

    model_config = ConfigDict(extra="ignore", strict=True)


@dataclass(frozen=True)
class Form:
    """How a benchmark is put to a model, with or without its chat template."""

    prompt: str
    """Jinja template over the fields of a document; with the chat template, it is the user's message."""
    extraction: str
    """How the response is read, in words."""
    stop: tuple[str, ...] = ()
    """Texts that end the response."""
    max_new_tokens: int | None = None
    """Longest response; None where nothing is generated."""
    prefix: str = ""
    """What the response is made to begin with."""


class BenchmarkProtocol(Contract):
    """How a benchmark was put to a model and read; stands in the report beside its figures."""

    benchmark: str
    """Name of the benchmark."""
    benchmark_version: int
    """Raised whenever a prompt, a stop rule or the extraction changes: figures of two versions do not compare."""
    metric: Literal["accuracy", "pass@1"]
    """What the share of correct documents is called."""
    chat: bool
    """Whether the prompt goes through the model's chat template, as the user's message."""
    encoding: int = 0
    """Raised when the same prompt may become other token ids; 0 in results of earlier versions."""
    chat_template: dict[str, JsonValue] = {}
    """Options that the chat template was given."""
    date: str | None = None
    """The day that the chat template was told; None where it does not read the clock."""
    few_shot: int = 0
    """Solved examples in the prompt."""
    prompt: str
    """Jinja template of the prompt over the fields of a document."""
    prefix: str
    """What the response is made to begin with."""
    choices: tuple[str, ...]
    """Continuations whose log-likelihoods are compared; empty where a response is generated."""
    stop: tuple[str, ...]
    """Texts that end a generated response."""
    max_new_tokens: int | None
    """Longest generated response in tokens; None where nothing is generated."""
    extraction: str
    """How the response is read, in words."""
    other_metrics: tuple[str, ...]
    """Metrics that are reported beside the headline."""
    code_sha256: str | None = None
    """Hash of the code of a benchmark that an installed package brings; None for those that come along, whose version
    says the same."""


class Gold(NamedTuple):
    """A document's reference solution, in the form that its prompt asks for."""

    prompt: str
    """The prompt; with the chat template, the user's message."""
    answer: str
    """What follows the prompt (and the prefix), leading space included."""
    prefix: str = ""
    """What the assistant's turn is made to begin with."""


@dataclass(frozen=True)
class Outcome:
    """What came of one document."""

    prompt: str
    """What the model was given, chat template included."""
    output: str
    """What the model wrote, up to the stop rule; the log-likelihood of each choice where nothing is generated."""
    extracted: str | None
    """Answer or program that was read out of it; None when there is none."""
    correct: bool
    """Whether it is right."""
    other: dict[str, bool]
    """Further metrics by name."""
    reason: str | None = None
    """The judge's reason, for programs."""
    detail: str = ""
    """The judge's detail, for programs."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, zero-shot. Its documents, prompts and readings are the same whichever place the rows come from."""

    name: str
    """Name, which is the folder of local copies and the name of the lm-eval task."""
    metric: Literal["accuracy", "pass@1"]
    """What the share of correct documents is called."""
    version: int
    """Raised whenever a prompt, a stop rule or the extraction changes."""
    hub: tuple[str, str | None]
    """Id and subset on the hub."""
    row: type[Row]
    """Fields of a row."""
    forms: Mapping[bool, Form]
    """The form without (False) and with (True) the chat template."""
    answer: Callable[[Document, bool], str]
    """Reference solution of a document, without or with the chat template."""
    read: Read | None
    """Reads the responses; None compares the log-likelihoods of `CHOICES` instead."""
    other_metrics: tuple[str, ...] = ()
    """Metrics beside `correct`."""
    runs_code: bool = False
    """Whether responses are programs, which need a judge."""

    layout: ClassVar[str] = "<benchmark>/<split>.jsonl.gz"
    """Where rows lie in a folder of them."""

    def documents(self, data: Path | None, split: str = "test") -> list[Document]:
        """All documents of a split.

        Args:
            data: folder that holds `<benchmark>/<split>.jsonl.gz` (or `.jsonl`, or files of rows as the hub names
                them, such as `test-00000-of-00001.parquet`); None takes the hub.
            split: name of the split.

        Raises:
            SemalignError: the file is missing, the hub does not give the rows, or a row lacks a field.
        """
        origin, rows = self._folder_rows(data, split) if data is not None else self._hub_rows(split)
        documents = []
        for number, row in enumerate(rows, 1):
            try:
                documents.append(self.row.parse(row).model_dump())
            except SemalignError as error:
                problem = str(error).removeprefix("input: ")
                raise SemalignError(
                    f"{origin}, row {number}: {problem}; a row of {self.name} has the fields "
                    f"{', '.join(self.row.model_fields)}"
                ) from error
        return documents

    def protocol(self, *, chat: bool) -> BenchmarkProtocol:
        """How the benchmark is put to a model and read."""
        form = self.forms[chat]
        return BenchmarkProtocol(
            benchmark=self.name,
            benchmark_version=self.version,
            metric=self.metric,
            chat=chat,
            prompt=form.prompt,
            prefix=form.prefix,
            choices=() if self.read else CHOICES,
            stop=form.stop,
            max_new_tokens=form.max_new_tokens,
            extraction=form.extraction,
            other_metrics=self.other_metrics,
        )

    def gold(self, document: Document, *, chat: bool) -> Gold:
        """The prompt of a document and the reference solution as a model should give it."""
        form = self.forms[chat]
        return Gold(_JINJA.from_string(form.prompt).render(document), self.answer(document, chat), form.prefix)

    def task(self, documents: Sequence[Document], *, chat: bool, judge: Judge | None = None) -> dict[str, Any]:
        """An lm-eval task over exactly these documents, for `simple_evaluate(tasks=[…])`.

        Each logged sample holds `correct` and the other metrics, and `outcome` reads the rest out of it.

        Args:
            documents: what `documents` gave, or a part of it.
            chat: whether lm-eval will be called with `apply_chat_template=True`.
            judge: runs programs, all of a task in one call; needed where `runs_code`.

        Raises:
            SemalignError: no documents, or no judge for programs.
        """
        if not documents:
            raise SemalignError(f"{self.name} has no documents to evaluate: raise its limit")
        if self.runs_code and judge is None:
            raise SemalignError(f"{self.name} runs the programs that a model writes: pass a judge that isolates them")
        form = self.forms[chat]
        rows = list(documents)
        template = _JINJA.from_string(form.prompt)
        read = self.read

        # Closures, not methods: lm-eval copies a task's configuration deeply, and functions stay what they are.
        def custom_dataset(**_: Any) -> datasets.DatasetDict:
            return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

        common: dict[str, Any] = {
            "task": self.name,
            "custom_dataset": custom_dataset,
            "test_split": "test",
            "doc_to_text": lambda document: template.render(document),  # lm-eval would compile it for each document
            "gen_prefix": form.prefix or None,
            "num_fewshot": 0,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in ("correct", *self.other_metrics)
            ],
            "metadata": {"version": self.version},
        }
        if read is None:
            return common | _choice_task()

        def extract(responses: list[list[str]], docs: list[Document]) -> list[Reading]:
            return self._readings(read(docs, [response[0] for response in responses], judge), len(docs))

        def process_results(_: Document, results: list[Reading]) -> dict[str, Any]:
            (reading,) = results
            return {key: reading[key] for key in ("correct", *self_metrics)}

        self_metrics = (*self.other_metrics, *(("reason",) if self.runs_code else ()))
        if self.runs_code:
            common["metric_list"].append({"metric": "reason", "aggregation": _counts, "higher_is_better": False})
        answer = self.answer
        return common | {
            "output_type": "generate_until",
            "doc_to_target": lambda document: answer(document, chat),
            "generation_kwargs": {
                "until": list(form.stop),
                "max_gen_toks": form.max_new_tokens,
                "do_sample": False,
            },
            "filter_list": [{"name": FILTER, "filter": [{"function": "custom", "filter_fn": extract}]}],
            "process_results": process_results,
        }

    def _readings(self, found: object, wanted: int) -> list[Reading]:
        """What `read` returned.

        Raises:
            ComponentError: it is not one reading for each document, with all that the benchmark measures.
        """
        needed = {"extracted", "correct", *self.other_metrics}
        if not isinstance(found, list | tuple) or len(found) != wanted:
            told = f"{len(found)} readings" if isinstance(found, list | tuple) else brief(found)
            raise ComponentError(
                f"the benchmark {self.name} returned {told} from read: expected one for each of {wanted}"
            )
        for reading in found:
            if not isinstance(reading, dict) or not needed <= reading.keys():
                raise ComponentError(
                    f"the benchmark {self.name} returned the reading {brief(reading)}: expected the keys "
                    f"{', '.join(sorted(needed))}"
                )
        return list(found)

    def outcome(self, sample: Mapping[str, Any]) -> Outcome:
        """What came of one document, out of a sample that lm-eval logged for this benchmark's task."""
        prompt = str(sample["arguments"][0][0])
        other = {name: bool(sample[name]) for name in self.other_metrics}
        if self.read is None:
            scores = [float(score) for score, _ in sample["filtered_resps"]]
            best = _likeliest(scores)
            return Outcome(
                prompt=prompt,
                output="  ".join(f"{choice} {score:.4f}" for choice, score in zip(CHOICES, scores, strict=True)),
                extracted=None if best is None else CHOICES[best],
                correct=bool(sample["correct"]),
                other=other,
            )
        (reading,) = sample["filtered_resps"]
        return Outcome(
            prompt=prompt,
            output=sample["resps"][0][0],
            extracted=reading["extracted"],
            correct=bool(sample["correct"]),
            other=other,
            reason=reading.get("reason"),
            detail=reading.get("detail", ""),
        )

    def _folder_rows(self, data: Path, split: str) -> tuple[str, list[dict[str, Any]]]:
        folder = Path(data).expanduser()
        names = [folder / self.name / f"{split}{suffix}" for suffix in (".jsonl.gz", ".jsonl")]
        file = next((name for name in names if name.is_file()), None)
        if file is None and (folder / self.name).is_dir():  # of other files, as the hub has them
            return str(folder / self.name), load_rows(RowsConfig(path=str(folder / self.name), split=split))
        if file is None:
            raise SemalignError(
                f"{names[0]} does not exist: give a folder with {self.layout}, or leave the folder out to take "
                f"{self.hub[0]} from the hub"
            )
        return str(file), load_rows(RowsConfig(path=str(file)))

    def _hub_rows(self, split: str) -> tuple[str, list[dict[str, Any]]]:
        name, subset = self.hub
        try:
            return name, load_rows(RowsConfig(path=name, subset=subset, split=split))
        except SemalignError as error:
            raise SemalignError(f"{error}; without a network, give a folder with {self.layout}") from error


def sample(documents: Sequence[Document], limit: int | None, seed: int) -> list[int]:
    """Indices of `limit` documents, drawn without replacement and sorted; all of them when `limit` is None or larger.

    A smaller draw with the same seed is part of a larger one. The draw depends on the seed and on the number of
    documents alone, and is the same on every platform and version of Python.

    Raises:
        SemalignError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise SemalignError(f"limit is {limit}: draw at least one document, or leave the limit out for all of them")
    generator = random.Random(f"semalign-benchmark-{seed}")
    # Sorted by a key, not shuffled: only random() keeps its sequence across versions of Python.
    keys = [generator.random() for _ in documents]
    return sorted(sorted(range(len(documents)), key=keys.__getitem__)[:limit])


def _choice_task() -> dict[str, Any]:
    def process_results(document: Document, results: list[tuple[float, bool]]) -> dict[str, bool]:
        return {"correct": _likeliest([score for score, _ in results]) == document["answer"]}

    return {
        "output_type": "multiple_choice",
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "filter_list": [{"name": FILTER, "filter": [{"function": "take_first"}]}],
        "process_results": process_results,
    }


def _likeliest(scores: Sequence[float]) -> int | None:
    """Index of the largest score, the first of equal ones; None when one is not a number."""
    if any(score != score for score in scores):
        return None
    return max(range(len(scores)), key=scores.__getitem__)


def _counts(reasons: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items()))
