"""Published metrics beside ours, where models and benchmarks are the same."""

import importlib.resources
from collections.abc import Iterator

import yaml
from semalign_geometry.base import Contract, Settings

from ..results.comparison import Comparison
from ..results.evaluation import Name
from ..results.metrics import NOTHING
from ..util.tables import aligned


class PublishedTable(Settings):
    """Metrics of one pair of models."""

    source: str
    """Hub id of the larger model."""
    target: str
    """Hub id of the smaller model."""
    metrics: dict[Name, dict[str, float]]
    """Percent, by benchmark and method; `source` and `target` are the untrained models."""


class Published(Contract):
    """All metrics of one publication."""

    source: str
    """Publication."""
    tables: list[PublishedTable]
    """Tables by pair of models."""


def read_published() -> Published:
    """Return the built-in published metrics."""
    text = (importlib.resources.files(__package__) / "published.yaml").read_text("utf-8")
    return Published.parse(yaml.safe_load(text), origin="published.yaml")


def published_table(comparison: Comparison) -> Iterator[str]:
    """Yield published and own metrics side by side, where the publication has the pair of models on a benchmark."""
    published, experiment = read_published(), comparison.config.experiment
    for table in published.tables:
        if (table.source, table.target) != (experiment.source.path, experiment.target.path):
            continue
        shared = [name for name in table.metrics if name in comparison.metrics]
        names = list(dict.fromkeys([*(m for name in shared for m in table.metrics[name]), *comparison.methods]))
        rows = [("paper / ours", *shared)]
        rows += [(method, *(_cell(comparison, table, name, method) for name in shared)) for method in names]
        if shared:
            yield f"{aligned(rows)}\npaper: {published.source}"


def _cell(comparison: Comparison, table: PublishedTable, name: Name, method: str) -> str:
    metric = comparison.metrics[name]
    ours = {"source": metric.source, "target": metric.before}.get(method)
    if ours is None and method in comparison.methods and comparison.methods[method].metrics:
        ours = comparison.methods[method].metrics[name].estimate
    theirs = table.metrics[name].get(method)
    texts = [NOTHING if theirs is None else f"{theirs:.2f}"]
    texts.append(NOTHING if ours is None else f"{100 * ours.value:.2f} [{100 * ours.low:.1f}, {100 * ours.high:.1f}]")
    return " / ".join(texts)
