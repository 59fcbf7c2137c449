"""The table and the JSON file."""

import dataclasses
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from case import Case, Goal, Line
from runner import Measured, Measurements, Settings

HEADER = (
    "row", "size", "peer", "n", "ours s", "peer s", "time", "min–max", "ours MiB", "peer MiB", "memory", "bound",
    "goal", "met",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "captum", "ckatorch", "trl", "liger-kernel", "semalign-geometry")


def versions() -> dict[str, str]:
    """Versions of what takes part, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def lacking(case: Case) -> str | None:
    """Why a case cannot be measured here, if it cannot."""
    missing = [name for name in case.requires if name not in versions()]
    return f"needs {', '.join(missing)}, which `nox -s bench` installs" if missing else None


def summary(measurements: Measurements) -> list[dict[str, Any]]:
    """Every line of a case: medians, ratios ours / peer with their range, and whether goals are met."""
    return [_line(measurements, line) for line in measurements.case.lines]


def _line(measurements: Measurements, line: Line) -> dict[str, Any]:
    case, sides = measurements.case, measurements.sides
    extra = sides[line.plus] if line.plus else None
    ours = [_seconds(one) + (line.share * _seconds(extra[i]) if extra else 0) for i, one in enumerate(sides[line.ours])]
    ours_bytes = [max(one.bytes, extra[i].bytes if extra else 0) for i, one in enumerate(sides[line.ours])]
    peer, peer_bytes = [_seconds(one) for one in sides[line.peer]], [one.bytes for one in sides[line.peer]]
    ratios = {"time": _ratios(ours, peer), "memory": _ratios(ours_bytes, peer_bytes)}
    if line.bound:
        ratios["bound"] = _ratios(ours, [_seconds(one) for one in sides[line.bound]])
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {
        "row": case.row,
        "size": case.size + line.label,
        "peer": case.peer.format(**versions()),
        "unit": case.unit or "call",
        "repeats": len(ours),
        "ours_seconds": statistics.median(ours),
        "peer_seconds": statistics.median(peer),
        "ours_bytes": statistics.median(ours_bytes),
        "peer_bytes": statistics.median(peer_bytes),
        "ratios": {
            name: {"median": medians[name], "min": min(values), "max": max(values)} for name, values in ratios.items()
        },
        "goals": [_judged(goal, medians) for goal in line.goals],
    }


def _seconds(one: Measured) -> float:
    return one.seconds / one.units


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Repeat by repeat; a peer below what can be measured (0 bytes) counts as one."""
    return [mine / max(other, 1e-9) for mine, other in zip(ours, theirs, strict=True)]


def _judged(goal: Goal, medians: dict[str, float]) -> dict[str, Any]:
    return {"goal": str(goal), "measured": medians[goal.quantity], "met": medians[goal.quantity] <= goal.most}


def document(
    settings: Settings,
    scale: str,
    measured: Sequence[Measurements],
    left_out: Sequence[dict[str, str]],
    failures: Sequence[str],
) -> dict[str, Any]:
    """All that was measured, for the JSON file."""
    threads = {one.threads for case in measured for side in case.sides.values() for one in side}
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": settings.device,
        "dtype": settings.dtype,
        "threads": max(threads, default=None),
        "scale": scale,
        "repeats": settings.repeats,
        "lines": [line for case in measured for line in summary(case)],
        "cases": [
            {
                "row": case.case.row,
                "size": case.case.size,
                "parameters": dict(case.case.parameters),
                "differences": case.differences,
                "order": case.order,
                "sides": {side: [dataclasses.asdict(one) for one in found] for side, found in case.sides.items()},
            }
            for case in measured
        ],
        "left_out": list(left_out),
        "failures": list(failures),
    }


def table(result: dict[str, Any]) -> str:
    """The table with its legend, as plain text."""
    lines = [HEADER, *(_cells(line) for line in result["lines"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, 1, 2, 12) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    notes = [
        "",
        "time, memory: ours / peer, median over the repeats; below 1 ours needs less; bound: time / lower bound",
        f"n interleaved repeats, each side in its own process; {result['device']}, "
        f"{result['dtype']}, {result['threads']} threads, torch {result['versions'].get('torch')}, "
        f"scale {result['scale']}",
    ]
    notes += [f"left out: {each['row']} {each['size']}: {each['reason']}" for each in result["left_out"]]
    notes += [f"FAILED: {each}" for each in result["failures"]]
    return "\n".join([text, *notes])


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    ratios, goals = line["ratios"], line["goals"]
    missed = [goal["goal"].split()[0] for goal in goals if not goal["met"]]
    per = "" if line["unit"] == "call" else f", per {line['unit']}"
    return (
        line["row"],
        line["size"] + per,
        line["peer"],
        str(line["repeats"]),
        f"{line['ours_seconds']:.3g}",
        f"{line['peer_seconds']:.3g}",
        f"{ratios['time']['median']:.3g}",
        f"{ratios['time']['min']:.3g}–{ratios['time']['max']:.3g}",
        f"{line['ours_bytes'] / 2**20:.1f}",
        f"{line['peer_bytes'] / 2**20:.1f}",
        f"{ratios['memory']['median']:.3g}",
        f"{ratios['bound']['median']:.3g}" if "bound" in ratios else "–",
        ", ".join(goal["goal"] for goal in goals) or "–",
        "–" if not goals else f"no ({', '.join(missed)})" if missed else "yes",
    )
