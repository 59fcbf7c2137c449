"""Methods side by side on one experiment."""

from typing import TYPE_CHECKING

import lazy_loader

from ..results.comparison import Benchmarks as Benchmarks
from ..results.comparison import Comparison as Comparison
from ..results.comparison import ComparisonConfig as ComparisonConfig
from ._compared import overrides_of_methods as overrides_of_methods
from .tables import comparison_csv as comparison_csv
from .tables import comparison_markdown as comparison_markdown

if TYPE_CHECKING:
    from ._run import compare as compare

__getattr__ = lazy_loader.attach(__name__, submod_attrs={"_run": ["compare"]})[0]  # with torch and lm-eval
__all__ = [
    "Benchmarks",
    "Comparison",
    "ComparisonConfig",
    "compare",
    "comparison_csv",
    "comparison_markdown",
    "overrides_of_methods",
]
