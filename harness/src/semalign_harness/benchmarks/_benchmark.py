"""The protocol of a benchmark: rows, prompt, stop rules, extraction, and its task for lm-eval."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ConfigDict, JsonValue
from semalign_geometry.base import ComponentError, Contract, SemalignError, Settings, brief

from ..data.rows import TEMPLATES, load_rows
from ..data.settings import RowsConfig
from ..sandbox import Program, Verdict

if TYPE_CHECKING:
    from datasets import DatasetDict

Document = dict[str, Any]
"""One row of a benchmark, with exactly the fields that the benchmark reads."""
Reading = dict[str, Any]
"""Reading of one response: `extracted`, `correct`, other metrics; for programs `reason`, `detail`."""
Judge = Callable[[list[Program]], list[Verdict]]
"""Runs programs and returns one verdict for each, in their order."""
Read = Callable[[list[Document], list[str], Judge | None], list[Reading]]
"""Reads all responses of a task at once, one per document."""

SPECIAL_STOPS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
"""Ends of a turn, for models that write them as text or have another end-of-sequence token."""
CHOICES = ("A", "B", "C", "D")
FILTER = "extract"
"""Name of the filter in lm-eval's results: `correct,extract` is the headline metric."""
LAYOUT = "<benchmark>/<split>.jsonl.gz"
"""Place of rows in a folder of benchmarks."""


class Row(Settings):
    """Base of the rows that a benchmark reads; further fields are dropped."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Form(Settings):
    """The way to put a benchmark to a model, with or without its chat template."""

    prompt: str
    """Jinja template over the fields of a document; the user's message with a chat template."""
    extraction: str
    """The way to read the response, in words."""
    stop: tuple[str, ...] = ()
    """Texts that end the response; none where nothing is generated."""
    max_new_tokens: int | None = None
    """Longest response in tokens; None where nothing is generated."""
    prefix: str = ""
    """Beginning of the response, which the model continues."""


class BenchmarkProtocol(Form, Contract):
    """The way a benchmark was put to a model and read; stands in the report beside its metrics."""

    benchmark: str
    """Name of the benchmark."""
    benchmark_version: int
    """Raised when a prompt, a stop rule or the extraction changes: two versions do not compare."""
    metric: Literal["accuracy", "pass@1"]
    """Name of the share of correct documents."""
    chat: bool
    """Whether the prompt goes through the model's chat template, as the user's message."""
    encoding: int = 0
    """Raised when the same prompt may become other token ids; 0 in results of earlier versions."""
    chat_template: dict[str, JsonValue] = {}
    """Options of the chat template."""
    date: str | None = None
    """Today's date in the chat template; None where it does not read the clock."""
    few_shot: int = 0
    """Solved examples in the prompt."""
    choices: tuple[str, ...]
    """Continuations whose log-likelihoods are compared; empty where a response is generated."""
    other_metrics: tuple[str, ...]
    """Metrics that are reported beside the headline."""
    code_sha256: str | None = None
    """Hash of the code of an installed package's benchmark; None for the built-in ones."""


class Gold(NamedTuple):
    """The reference solution of a document, in the form of its answers."""

    prompt: str
    """The prompt; with the chat template, the user's message."""
    answer: str
    """Continuation of the prompt (and the prefix), leading space included."""
    prefix: str = ""
    """Beginning of the assistant's turn."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one document."""

    prompt: str
    """Prompt of the model, chat template included."""
    output: str
    """Text up to the stop rule; the log-likelihood of each choice where nothing is generated."""
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
    """One benchmark, zero-shot. Its documents do not depend on the place of its rows."""

    name: str
    """Name, which is the folder of local copies and the name of the lm-eval task."""
    metric: Literal["accuracy", "pass@1"]
    """Name of the share of correct documents."""
    version: int
    """Raised when a prompt, a stop rule or the extraction changes."""
    hub: tuple[str, str | None]
    """Id and subset on the hub; or a generator, whose held-out rows are the documents."""
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

    def within(self, max_new_tokens: int | None) -> "Benchmark":
        """Return the benchmark with another longest response in tokens, if it generates; None changes nothing."""
        if max_new_tokens is None or self.read is None:
            return self
        forms = {chat: form.model_copy(update={"max_new_tokens": max_new_tokens}) for chat, form in self.forms.items()}
        return replace(self, forms=forms)

    def documents(self, data: Path | None, split: str = "test") -> list[Document]:
        """Read all documents of a split.

        Args:
            data: folder that holds `<benchmark>/<split>.jsonl.gz` (or `.jsonl`, or files of rows as
                the hub names them, such as `test-00000-of-00001.parquet`); None takes the hub.
            split: name of the split.

        Raises:
            SemalignError: the file is missing, the hub does not return rows, or a row lacks a field.
        """
        origin = self._origin(data, split)
        try:
            rows = load_rows(origin)
        except SemalignError as error:
            if data is not None:
                raise
            raise SemalignError(f"{error}; without a network, give a folder with {LAYOUT}") from error
        return [self._document(row, f"{origin.path}, row {number}") for number, row in enumerate(rows, 1)]

    def _origin(self, data: Path | None, split: str) -> RowsConfig:
        if data is None and self.hub[0].startswith("generated:"):
            return RowsConfig(path=self.hub[0], split="held_out")
        if data is None:
            return RowsConfig(path=self.hub[0], subset=self.hub[1], split=split)
        folder = Path(data).expanduser() / self.name
        files = [folder / f"{split}{suffix}" for suffix in (".jsonl.gz", ".jsonl")]
        place = next((file for file in files if file.is_file()), folder)
        if not place.exists():
            raise SemalignError(
                f"{files[0]} does not exist: give a folder with {LAYOUT}, or leave the folder out to take "
                f"{self.hub[0]} from the hub"
            )
        return RowsConfig(path=str(place), split=split)

    def _document(self, row: Mapping[str, Any], name: str) -> Document:
        try:
            return self.row.parse(dict(row), origin=name).model_dump()
        except SemalignError as error:
            raise SemalignError(
                f"{error}; a row of {self.name} has the fields {', '.join(self.row.model_fields)}"
            ) from error

    def protocol(self, *, chat: bool) -> BenchmarkProtocol:
        """Describe how the benchmark is put to a model and read."""
        return BenchmarkProtocol(
            benchmark=self.name,
            benchmark_version=self.version,
            metric=self.metric,
            chat=chat,
            choices=() if self.read else CHOICES,
            other_metrics=self.other_metrics,
            **vars(self.forms[chat]),
        )

    def gold(self, document: Document, *, chat: bool) -> Gold:
        """Return the prompt of a document, and the reference solution in the form of its answers."""
        form = self.forms[chat]
        return Gold(TEMPLATES.from_string(form.prompt).render(document), self.answer(document, chat), form.prefix)

    def task(self, documents: Sequence[Document], *, chat: bool, judge: Judge | None = None) -> dict[str, Any]:
        """Make an lm-eval task over exactly these documents, for `simple_evaluate(tasks=[…])`.

        Each logged sample holds the metrics, and `outcome` reads the rest of it.

        Args:
            documents: rows that `documents` returned, or a part of them.
            chat: whether lm-eval will be called with `apply_chat_template=True`.
            judge: runs programs, all of a task in one call; needed where `runs_code`.

        Raises:
            SemalignError: no documents, or no judge for programs.
        """
        if not documents:
            raise SemalignError(f"{self.name} has no documents to evaluate: raise its limit")
        if self.runs_code and judge is None:
            raise SemalignError(f"{self.name} runs the programs that a model writes: pass a judge that isolates them")
        form, rows = self.forms[chat], list(documents)
        template = TEMPLATES.from_string(form.prompt)
        metrics: list[dict[str, Any]] = [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("correct", *self.other_metrics)
        ]
        if self.runs_code:
            metrics.append({"metric": "reason", "aggregation": _counts, "higher_is_better": False})

        # A closure: lm-eval copies a task's configuration deeply, but not functions.
        def custom_dataset(**_: Any) -> "DatasetDict":
            import datasets  # takes a second to import

            return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

        return {
            "task": self.name,
            "custom_dataset": custom_dataset,
            "test_split": "test",
            "doc_to_text": lambda document: template.render(document),  # lm-eval would compile it for each document
            "gen_prefix": form.prefix or None,
            "num_fewshot": 0,
            "metric_list": metrics,
            "metadata": {"version": self.version},
            **(self._choice_task() if self.read is None else self._generation_task(self.read, chat, judge)),
        }

    def _choice_task(self) -> dict[str, Any]:
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

    def _generation_task(self, read: Read, chat: bool, judge: Judge | None) -> dict[str, Any]:
        form, answer = self.forms[chat], self.answer
        logged = ("correct", *self.other_metrics, *(("reason",) if self.runs_code else ()))

        def extract(responses: list[list[str]], docs: list[Document]) -> list[Reading]:
            return self._readings(read(docs, [response[0] for response in responses], judge), len(docs))

        def process_results(_: Document, results: list[Reading]) -> dict[str, Any]:
            (reading,) = results
            return {key: reading[key] for key in logged}

        return {
            "output_type": "generate_until",
            "doc_to_target": lambda document: answer(document, chat),
            "generation_kwargs": {"until": list(form.stop), "max_gen_toks": form.max_new_tokens, "do_sample": False},
            "filter_list": [{"name": FILTER, "filter": [{"function": "custom", "filter_fn": extract}]}],
            "process_results": process_results,
        }

    def _readings(self, found: object, wanted: int) -> list[Reading]:
        """Check that `read` returned one reading for each document, with every metric."""
        needed = {"extracted", "correct", *self.other_metrics}
        if not isinstance(found, list | tuple) or len(found) != wanted:
            returned = f"{len(found)} readings" if isinstance(found, list | tuple) else brief(found)
            raise ComponentError(
                f"the benchmark {self.name} returned {returned} from read: expected one for each of {wanted}"
            )
        for reading in found:
            if not isinstance(reading, dict) or not needed <= reading.keys():
                raise ComponentError(
                    f"the benchmark {self.name} returned the reading {brief(reading)}: expected the keys "
                    f"{', '.join(sorted(needed))}"
                )
        return list(found)

    def outcome(self, sample: Mapping[str, Any]) -> Outcome:
        """Read the outcome of one document from a sample that lm-eval logged for this task."""
        if self.read is None:
            scores = [float(score) for score, _ in sample["filtered_resps"]]
            best = _likeliest(scores)
            output = "  ".join(f"{choice} {score:.4f}" for choice, score in zip(CHOICES, scores, strict=True))
            reading: Reading = {"extracted": None if best is None else CHOICES[best]}
        else:
            (reading,), output = sample["filtered_resps"], sample["resps"][0][0]
        return Outcome(
            prompt=str(sample["arguments"][0][0]),
            output=output,
            extracted=reading["extracted"],
            correct=bool(sample["correct"]),
            other={name: bool(sample[name]) for name in self.other_metrics},
            reason=reading.get("reason"),
            detail=reading.get("detail", ""),
        )


def sample(documents: Sequence[Document], limit: int | None, seed: int) -> list[int]:
    """Draw `limit` documents without replacement, all for None; return their sorted indices.

    A smaller draw with the same seed is part of a larger one. The draw depends on the seed and on
    the number of documents alone, and is the same on every platform and version of Python.

    Raises:
        SemalignError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise SemalignError(f"limit is {limit}: draw at least one document, or leave the limit out for all of them")
    generator = random.Random(f"semalign-benchmark-{seed}")
    # Sorted by a key, not shuffled: only random() keeps its sequence across versions of Python.
    keys = [generator.random() for _ in documents]
    return sorted(sorted(range(len(documents)), key=keys.__getitem__)[:limit])


def judged(programs: list[Program], judge: Judge | None) -> list[Reading]:
    """Run programs, all in one call, and return the reading of each response."""
    assert judge is not None, "a task that runs code is not built without a judge"
    return [
        {"extracted": program.code, "correct": verdict.passed, "reason": verdict.reason, "detail": verdict.detail}
        for program, verdict in zip(programs, judge(programs), strict=True)
    ]


def _likeliest(scores: Sequence[float]) -> int | None:
    """Index of the largest score, the first of equal ones; None when one is not a number."""
    if any(score != score for score in scores):
        return None
    return max(range(len(scores)), key=scores.__getitem__)


def _counts(reasons: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items()))
