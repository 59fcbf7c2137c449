"""Load experiments: built-in pairs of models and tasks, YAML files, and dotted overrides."""

import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semalign_geometry.base import SemalignError

from .experiment import Experiment
from .util.settings import merged, parse_overrides, parse_tree, read_tree

_USUAL_TASK = "gsm8k"
"""Task of a pair that names no tasks."""


def pair_names() -> list[str]:
    """Names of the built-in pairs of models."""
    return _names("pairs")


def task_names() -> list[str]:
    """Names of the built-in tasks."""
    return _names("tasks")


def describe_tasks() -> str:
    """Table of the built-in tasks, in lines of text."""
    trees = {name: _built_in("tasks", name) for name in task_names()}
    return "\n".join(
        [f"{'task':17}{'rows':>6}{'tokens':>8}  about"]
        + [
            f"{name:17}{tree['data']['train_rows']:6,}{tree['data']['max_length']:8,}  {tree['about']}"
            for name, tree in trees.items()
        ]
    )


def load_experiment(
    base: str | Path, task: str | None = None, *, configs: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> Experiment:
    """Load an experiment; later settings override earlier ones.

    A pair holds the models and how they train, a task the rows and how they are measured. The task overrides
    the pair, and the pair's own settings for a task (under `tasks`) override that task.

    Args:
        base: name of a built-in pair, or path of a YAML file: a whole experiment, or a pair.
        task: name of a built-in task; None takes the first that a built-in pair names, else `gsm8k`, and
            nothing for a file.
        configs: YAML files merged on top.
        overrides: `key.key=value`, the value read as YAML.

    Raises:
        SemalignError: unknown pair or task, missing file, broken YAML, unknown key, wrong value.

    Example:
        >>> load_experiment("tiny", overrides=["train.batch_size=4"]).train.batch_size
        4
        >>> load_experiment("qwen2.5-coder", "mbpp").name
        'qwen2.5-coder-mbpp'
    """
    tree, is_pair = _read(base)
    named = dict(tree.pop("tasks", None) or {})
    chosen = next(iter(named), _USUAL_TASK) if task is None and is_pair else task
    if chosen is not None:
        if chosen not in task_names():
            raise SemalignError(
                f"{chosen!r} is no task (nearest: {nearest(chosen, task_names())}; semalign presets lists all), and "
                "no setting of the form key.key=value"
            )
        about = _built_in("tasks", chosen)
        del about["about"]
        name = tree.get("name", Path(base).stem if not is_pair else str(base))
        tree = merged(merged(tree, about), named.get(chosen) or {})
        tree["name"] = name if task is None else f"{name}-{task}"
    for config in configs:
        tree = merged(tree, read_tree(Path(config)))
    tree = merged(tree, parse_overrides(overrides))
    return Experiment.parse(tree, origin=", ".join(map(str, (base, *configs))))


def _read(base: str | Path) -> tuple[dict[str, Any], bool]:
    """The settings of a pair or file, and whether it is a built-in pair."""
    path = Path(base)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_tree(path), False
    if str(base) in pair_names():
        return _built_in("pairs", str(base)), True
    raise SemalignError(
        f"{str(base)!r} is neither a pair (nearest: {nearest(str(base), pair_names())}; semalign presets lists all) "
        "nor the path of a .yaml file"
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the three known names that are most like a name."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))


def _names(kind: str) -> list[str]:
    folder = importlib.resources.files("semalign_harness") / "presets" / kind
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _built_in(kind: str, name: str) -> dict[str, Any]:
    file = importlib.resources.files("semalign_harness") / "presets" / kind / f"{name}.yaml"
    return parse_tree(file.read_text("utf-8"), name)
