"""MMLU, GSM8K, HumanEval and MBPP as zero-shot tasks of lm-eval, with rows from the hub or from a folder."""

from semalign_geometry.base import Components

from ._benchmark import Benchmark as Benchmark
from ._benchmark import BenchmarkProtocol as BenchmarkProtocol
from ._benchmark import Document as Document
from ._benchmark import Form as Form
from ._benchmark import Gold as Gold
from ._benchmark import Outcome as Outcome
from ._benchmark import Reading as Reading
from ._benchmark import Row as Row
from ._benchmark import sample as sample
from ._gsm8k import GSM8K
from ._humaneval import HUMANEVAL
from ._judge import Judge as Judge
from ._mbpp import MBPP
from ._mmlu import MMLU

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (MMLU, GSM8K, HUMANEVAL, MBPP)}
"""The benchmarks that come along, by name."""
KNOWN_TASKS = Components(
    "semalign.tasks",
    "benchmark",
    BENCHMARKS,
    expected="Benchmark",
    fits=lambda given: isinstance(given, Benchmark),
    name_of=lambda benchmark: benchmark.name,
)
"""The benchmarks that a name stands for, those of installed packages included."""


def code_of(benchmark: Benchmark) -> str | None:
    """Hash of the code of a benchmark that an installed package brings; None for those that come along."""
    return next(iter(KNOWN_TASKS.code(benchmark).values()), None)


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkProtocol",
    "Document",
    "Form",
    "Gold",
    "Judge",
    "KNOWN_TASKS",
    "Outcome",
    "Reading",
    "Row",
    "code_of",
    "find_benchmark",
    "sample",
]


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        SemalignError: there is none.
    """
    return KNOWN_TASKS.find(name)
