"""The experiment of a pair of models, for its checks."""

from collections.abc import Sequence
from typing import Any

from ..experiment import Experiment
from ..util.settings import merged, parse_overrides

_NO_DATA = "generated:arithmetic"
"""Stands where an experiment needs rows; never read."""


def read_settings(source: str, target: str, data: str | None, overrides: Sequence[str]) -> tuple[Experiment, bool]:
    """Return the experiment that would run, and whether rows are given.

    Args:
        source: path of the source.
        target: path of the target.
        data: path of the rows, if any.
        overrides: `key.key=value`, as `semalign run` takes them.

    Raises:
        SemalignError: an override is not of that form, or an unknown or wrong setting.
    """
    tree: dict[str, Any] = {"name": "doctor", "source": {"path": source}, "target": {"path": target}}
    if data is not None:
        tree["data"] = {"train": {"path": data}}
    tree = merged(tree, parse_overrides(overrides))
    experiment = Experiment.parse(merged({"data": {"train": {"path": _NO_DATA}}}, tree), origin="doctor")
    has_rows = "path" in merged({"data": {"train": {}}}, tree)["data"]["train"]
    return experiment, has_rows
