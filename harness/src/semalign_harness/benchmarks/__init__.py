"""MMLU, GSM8K, HumanEval and MBPP as zero-shot tasks of lm-eval, with rows from the hub or from a folder."""

from semalign_geometry import SemalignError

from ._benchmark import Benchmark as Benchmark
from ._benchmark import BenchmarkProtocol as BenchmarkProtocol
from ._benchmark import Document as Document
from ._benchmark import Gold as Gold
from ._benchmark import Outcome as Outcome
from ._benchmark import sample as sample
from ._gsm8k import GSM8K
from ._humaneval import HUMANEVAL
from ._judge import Judge as Judge
from ._mbpp import MBPP
from ._mmlu import MMLU

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (MMLU, GSM8K, HUMANEVAL, MBPP)}
"""Every benchmark by name."""

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkProtocol",
    "Document",
    "Gold",
    "Judge",
    "Outcome",
    "find_benchmark",
    "sample",
]


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        SemalignError: there is none.
    """
    if name not in BENCHMARKS:
        raise SemalignError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
