"""The paper's own figures, beside ours where models and benchmarks are the same."""

import importlib.resources
from collections.abc import Iterator

import yaml
from semalign_geometry.base import Contract, Settings

from ..comparison import Comparison
from ..evaluation import Name
from ..util.tables import aligned


class PublishedTable(Settings):
    """Figures of one pair of models."""

    source: str
    """Hub id of the larger model."""
    target: str
    """Hub id of the smaller model."""
    figures: dict[Name, dict[str, float]]
    """Percent, by benchmark and method; `source` and `target` are the untrained models."""


class Published(Contract):
    """All figures of one publication."""

    source: str
    """Where they were published."""
    tables: list[PublishedTable]
    """By pair of models."""


def read_published() -> Published:
    """The figures that come along."""
    text = (importlib.resources.files(__package__) / "published.yaml").read_text("utf-8")
    return Published.parse(yaml.safe_load(text), origin="published.yaml")


def published_table(comparison: Comparison) -> Iterator[str]:
    """Paper and ours side by side, where the paper has this pair of models on a benchmark of the comparison."""
    published, experiment = read_published(), comparison.config.experiment
    for table in published.tables:
        if (table.source, table.target) != (experiment.source.path, experiment.target.path):
            continue
        shared = [name for name in table.figures if name in comparison.metrics]
        names = list(dict.fromkeys([*(m for name in shared for m in table.figures[name]), *comparison.methods]))
        rows = [("paper / ours", *shared)]
        rows += [(method, *(_cell(comparison, table, name, method) for name in shared)) for method in names]
        if shared:
            yield f"{aligned(rows)}\npaper: {published.source}"


def _cell(comparison: Comparison, table: PublishedTable, name: Name, method: str) -> str:
    metric = comparison.metrics[name]
    untrained = {"source": metric.source, "target": metric.before}
    ours = untrained.get(method)
    if ours is None and method in comparison.methods and comparison.methods[method].figures:
        ours = comparison.methods[method].figures[name].estimate
    theirs = table.figures[name].get(method)
    texts = ["–" if theirs is None else f"{theirs:.2f}"]
    texts.append("–" if ours is None else f"{100 * ours.value:.2f} [{100 * ours.low:.1f}, {100 * ours.high:.1f}]")
    return " / ".join(texts)
