"""Methods side by side on one experiment."""

from ..results.comparison import Benchmarks as Benchmarks
from ..results.comparison import Comparison as Comparison
from ..results.comparison import ComparisonConfig as ComparisonConfig
from ._run import compare as compare
from ._run import overrides_of_methods as overrides_of_methods
from .tables import comparison_csv as comparison_csv
from .tables import comparison_markdown as comparison_markdown

__all__ = [
    "Benchmarks",
    "Comparison",
    "ComparisonConfig",
    "compare",
    "comparison_csv",
    "comparison_markdown",
    "overrides_of_methods",
]
