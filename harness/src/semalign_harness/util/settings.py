"""Settings as trees: YAML files, dotted overrides, and one laid over the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from semalign_geometry.base import SemalignError


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        SemalignError: the file is missing or is not a YAML mapping.
    """
    try:
        return parse_tree(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise SemalignError(f"{path} does not exist: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SemalignError(f"{path} cannot be read: {error}") from error


def parse_tree(text: str, origin: str) -> dict[str, Any]:
    """The mapping in a YAML text that came from `origin`."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SemalignError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise SemalignError(f"{origin} holds no YAML mapping: expected lines of the form key: value")
    return tree


def _override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SemalignError(f"override {override!r} is not of the form key.key=value, such as train.batch_size=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        quoted = ": put a text with braces or colons in quotes of its own, as in 'data.train.prompt=\"{{ question }}\"'"
        raise SemalignError(f"override {override!r}: the value is not valid YAML{quoted}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides of the form `key.key=value`, the values read as YAML, as one tree; later ones win.

    Raises:
        SemalignError: one is not of that form.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        tree = merged(tree, _override(override), kinds=False)
    return tree


def merged(below: Any, above: Any, *, kinds: bool = True) -> Any:
    """`above` laid over `below`, mapping by mapping; with `kinds`, a changed `kind` replaces its whole section."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if kinds and "kind" in above and above["kind"] != below.get("kind"):
        return above
    return below | {key: merged(below.get(key), value, kinds=kinds) for key, value in above.items()}
