"""A method's context without a run around it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from semalign_harness.data.encoding import Example
from semalign_harness.methods import MethodContext
from semalign_harness.run.tracking import Metrics
from semalign_harness.util.console import Console
from semalign_train import StageRecord, StepRecord, TrainSettings


def context_of(
    folder: Path,
    target: Any,
    load_source: Callable[[], Any],
    rows: Sequence[Example],
    tokenizer: Any,
    *,
    supervision: Any = None,
    attribution_rows: int = 3,
    **train: Any,
) -> MethodContext:
    """Rows and models as they are given; steps go into `metrics.jsonl` of the folder."""
    metrics = Metrics(folder)

    def record(entry: StepRecord | StageRecord) -> None:
        assert isinstance(entry, StepRecord)
        metrics.add(entry)

    given: dict[str, Any] = {
        "target": target,
        "tokenizer": tokenizer,
        "source_tokenizer": tokenizer,
        "supervision": supervision,
        "held_out": None,
        "rows": rows,
        "attribution_rows": rows[:attribution_rows],
        "batch_size": 2,
        "train": TrainSettings(**train),
        "folder": folder,
        "load_source": load_source,
        "progress": Console(quiet=True),
        "callback": record,
    }
    context = object.__new__(MethodContext)  # unchecked: some methods need no supervision
    for name, value in given.items():
        object.__setattr__(context, name, value)
    return context
