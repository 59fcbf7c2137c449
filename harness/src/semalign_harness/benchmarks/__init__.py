"""MMLU, GSM8K, HumanEval, MBPP and generated arithmetic as zero-shot tasks of lm-eval."""

from semalign_geometry.base import Components

from ._arithmetic import ARITHMETIC
from ._benchmark import Benchmark as Benchmark
from ._benchmark import BenchmarkProtocol as BenchmarkProtocol
from ._benchmark import Document as Document
from ._benchmark import Form as Form
from ._benchmark import Gold as Gold
from ._benchmark import Judge as Judge
from ._benchmark import Outcome as Outcome
from ._benchmark import Reading as Reading
from ._benchmark import Row as Row
from ._benchmark import sample as sample
from ._gsm8k import GSM8K
from ._humaneval import HUMANEVAL
from ._mbpp import MBPP
from ._mmlu import MMLU

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (MMLU, GSM8K, HUMANEVAL, MBPP, ARITHMETIC)
}
"""The built-in benchmarks by name."""
KNOWN_BENCHMARKS = Components(
    "semalign.tasks",
    "benchmark",
    BENCHMARKS,
    expected="Benchmark",
    fits=lambda given: isinstance(given, Benchmark),
    name_of=lambda benchmark: benchmark.name,
)
"""Every benchmark by name, those of installed packages included."""
find_benchmark = KNOWN_BENCHMARKS.find
