"""Methods by the names of a comparison: settings laid over an experiment."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from semalign_geometry.base import SemalignError

from ..util.settings import merged
from ._registry import known_kinds

_SEMALIGN = {"method": {"kind": "semalign"}}

NAMED: dict[str, dict[str, Any]] = {
    "semalign": {},
    "semalign_fisher": {"method": {"objective": {"kind": "fisher"}}},
    "semalign_v1": {
        "pairing": {"kind": "nearest_critical"},
        "transport": {"frame": "cosine", "fold_gain": False},
        "method": {
            "critical_layer_only": True,
            "objective": {"kind": "cosine"},
            "weights": {"geometry": 1.0, "output": 0.0, "answer": 0.0, "label": 1.0},
        },
    },
    "sft": {"method": {"kind": "sft"}},
    "sft_full": {"method": {"kind": "sft", "trainable": {"kind": "full"}}},
    "kd": {"method": {"kind": "kd"}},
    "kd_full": {"method": {"kind": "kd", "trainable": {"kind": "full"}}},
    "hidden": {"method": {"kind": "hidden"}},
    "gold": {"method": {"kind": "gold"}},
    "alm": {"method": {"kind": "alm"}},
    "pissa": {"method": {"kind": "sft", "trainable": {"kind": "lora", "start": "pissa"}}},
    "seeking": {"method": {"kind": "seeking"}, "train": {"warmup": 0.03, "schedule": "linear"}},
    "laten": {"method": {"kind": "laten"}},
    "random_pairing": {"pairing": {"kind": "random"}},
    "uniform_pairing": {"pairing": {"kind": "uniform"}},
    "no_geometry": {"method": {"weights": {"geometry": 0.0}}},
    "no_output": {"method": {"weights": {"output": 0.0}}},
    "frame_cosine": {"transport": {"frame": "cosine"}},
    "frame_dual": {"transport": {"frame": "dual"}},
    "frame_parseval": {"transport": {"frame": "parseval"}},
    "frame_none": {"transport": {"frame": "none"}},
}
"""By name: the published objectives, the baselines, and SemAlign without one of its parts. A tree without a kind of
method is SemAlign's, whatever the experiment trains with."""
BASELINES = ("sft", "sft_full", "kd", "kd_full", "hidden", "gold", "alm", "pissa", "seeking", "laten")
"""Methods of others; every method is tested against the best of them."""
FOR_TWO_TOKENIZERS = ("alm",)
"""Methods that need tokenizers that differ, which `all` leaves out."""

VARIANT = r"\w+\.[\w.+-]+"
"""Pattern of a method with settings of its own, which are overrides of that name."""


def known_methods() -> dict[str, Mapping[str, Any]]:
    """Return the settings of every method by name; those of installed packages by their kind."""
    named: dict[str, Mapping[str, Any]] = {name: merged(_SEMALIGN, tree) for name, tree in NAMED.items()}
    taken = {tree["method"]["kind"] for tree in named.values()}
    return {**named, **{kind: {"method": {"kind": kind}} for kind in known_kinds() if kind not in taken}}


def settings_of(name: str) -> Mapping[str, Any]:
    """Return the settings of a method of `find_methods`; a variant has those of its method."""
    known = _known([name])
    return known[name] if name in known else known[name.partition(".")[0]]


def find_methods(names: str) -> list[str]:
    """Return the names in a list with commas: `all` for all built-in ones that fit every pair, `METHOD.VARIANT` for a
    method once more.

    Raises:
        SemalignError: one is unknown or named twice.
    """
    of_all = [name for name in NAMED if name not in FOR_TWO_TOKENIZERS]
    asked = [name for part in map(str.strip, names.split(",")) for name in (of_all if part == "all" else [part])]
    known = _known(asked)
    for name in asked:
        if name not in known and not (re.fullmatch(VARIANT, name) and name.partition(".")[0] in known):
            raise SemalignError(f"unknown method {name!r}: choose of {', '.join(known)}, or all")
        if asked.count(name) > 1:
            raise SemalignError(f"method {name} is named twice: leave one out")
    return asked


def _known(asked: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return settings by name; other packages are imported only where a name is not built in."""
    if all(name in NAMED or re.fullmatch(VARIANT, name) and name.partition(".")[0] in NAMED for name in asked):
        return {name: merged(_SEMALIGN, tree) for name, tree in NAMED.items()}
    return known_methods()


def describe_methods() -> str:
    """Return the built-in methods, one a paragraph, with their settings as overrides."""
    width = max(map(len, NAMED))
    return "\n".join(
        textwrap.fill(
            f"{name:{width}}  {' '.join(_overrides(tree)) or 'the experiment as it is'}",
            100,
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
        for name, tree in NAMED.items()
    )


def _overrides(tree: Mapping[str, Any], place: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _overrides(value, f"{place}{key}.")
        else:
            yield f"{place}{key}={value if isinstance(value, str) else json.dumps(value)}"
