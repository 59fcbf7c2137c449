"""Benchmarks on one model, with intervals; answers are cached, so that none is computed twice."""

from typing import TYPE_CHECKING

import lazy_loader

from ..results.evaluation import BenchmarkResult as BenchmarkResult
from ..results.evaluation import Evaluated as Evaluated
from ..results.evaluation import EvaluationConfig as EvaluationConfig
from ..results.evaluation import EvaluationResult as EvaluationResult
from ..results.evaluation import ItemRecord as ItemRecord
from ..results.evaluation import Name as Name
from ..results.evaluation import read_evaluation as read_evaluation
from ._compare import Pair as Pair
from ._compare import over_seeds as over_seeds
from ._compare import pair as pair
from ._table import evaluation_table as evaluation_table
from ._table import pair_table as pair_table
from ._table import seeds_table as seeds_table

if TYPE_CHECKING:
    from ._run import evaluate as evaluate
    from ._run import protocol_of as protocol_of

__getattr__ = lazy_loader.attach(__name__, submod_attrs={"_run": ["evaluate", "protocol_of"]})[0]  # with lm-eval
