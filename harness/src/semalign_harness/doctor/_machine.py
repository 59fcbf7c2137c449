"""What a run would need of this machine, beside what it has."""

import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from semalign_geometry import SharedVocabulary

from ..data import Example, Split
from ..estimate import Totals, estimate, gb
from ..experiment import Experiment
from ..inputs import Inputs
from ..models import cache_folder
from ..plan import REACHED, Plan, duration, make_plan
from ..settings import merged, parse_overrides
from ._findings import Finding, error, ok, warning
from ._pair import Pair

PROBE_SECONDS = 2.0
"""How long the speed of matrix products is tried."""
LEANER = ("batch_size=1", "train.micro_batch_size=1", "train.recompute_suffix=true")
"""Settings that take less memory; the first is for the source's phase, the others for the target's."""
LONG = 24 * 3600
"""Seconds from which on a run is called long."""


def check_machine(pair: Pair, shared: SharedVocabulary | None) -> list[Finding]:
    """Memory, disk and time."""
    split = _split(pair)
    experiment = pair.experiment
    vocabulary = min(each.shape.vocabulary for each in pair.both)
    ids = torch.arange(vocabulary)
    common = SharedVocabulary(ids, ids, 0, 0) if shared is None else shared
    quick = pair.target.opened.settings.model_copy(update={"dtype": "float32"})  # the plan's own speed is not taken
    inputs = Inputs(pair.source.opened, replace(pair.target.opened, settings=quick), split, common, "", "")
    plan = make_plan(experiment, inputs, pair.device, processes=1, supervised=False)
    speed = _speed(pair.device, pair.target.dtype)
    return [
        _memory(pair, split.longest),
        _disk(_totals(pair, experiment, split.longest), experiment),
        _time(plan.model_copy(update={"flops": REACHED * speed}), pair, speed),
    ]


def _split(pair: Pair) -> Split:
    """As many rows as a run would take: those of the sample that are short enough, over and over, or the longest
    possible."""
    data = pair.experiment.data
    fitting = [] if pair.sample is None else [e for e in pair.sample.examples if len(e) <= data.max_length]
    rows = fitting or [Example((0,), (0,) * (data.max_length - 1), "")]
    train, held_out = (
        [rows[index % len(rows)] for index in range(count)] for count in (data.train_rows, data.held_out_rows)
    )
    return Split(train, held_out, too_long=0, longest=max(map(len, rows)))


def _totals(pair: Pair, experiment: Experiment, longest: int) -> Totals:
    """What a run needs with rows of at most so many tokens."""
    changed = {
        "data": experiment.data.model_copy(update={"max_length": longest}),
        "source": pair.source.opened.settings,
        "target": pair.target.opened.settings,
    }
    shapes = {f"{each.role}_shape": each.shape for each in pair.both}
    totals = estimate(experiment.model_copy(update=changed), **shapes).totals
    assert totals is not None
    return totals


def _memory(pair: Pair, longest: int) -> Finding:
    free, whole = _memory_of(pair.device)
    totals = _totals(pair, pair.experiment, longest)
    needs = (
        f"at most {gb(totals.source_phase)} with the source and {gb(totals.target_phase)} with the target, for rows "
        f"of {longest} tokens; {gb(free)} of {gb(whole)} are free on {pair.device}"
    )
    source, target = (each.shape.parameters * each.dtype.itemsize for each in pair.both)
    if target > whole:
        remedy = "a smaller target: semalign models list shows sizes"
        return error("memory", f"the target's weights alone take {gb(target)}: {needs}", remedy)
    if source > whole and not pair.experiment.source.load_in_4bit:
        return error("memory", f"the source's weights alone take {gb(source)}: {needs}", "source.load_in_4bit=true")
    if totals.memory > free:
        return warning("memory", needs, _leaner(pair, longest, free))
    return ok("memory", needs)


def _leaner(pair: Pair, longest: int, free: int) -> str:
    """Settings with which a run fits, as few as do."""
    for settings in (*((setting,) for setting in LEANER), LEANER):
        tree = merged(pair.experiment.model_dump(mode="json"), parse_overrides(settings))
        if _totals(pair, Experiment.parse(tree, origin="doctor"), longest).memory <= free:
            return " ".join(settings)
    return f"end what else runs, and {' '.join(LEANER)}"


def _disk(totals: Totals, experiment: Experiment) -> Finding:
    """Supervision goes to the cache folder, the rest to the run folder, which may be on one disk."""
    cache, run = (_existing(place) for place in (cache_folder(), Path.cwd()))
    stored, written = totals.supervision + totals.held_out, totals.scratch + totals.saved
    together = os.stat(cache).st_dev == os.stat(run).st_dev
    frees = [shutil.disk_usage(place).free for place in (cache, run)]
    needs = f"at most {gb(stored)} of supervision and {gb(written)} in the run folder; " + (
        f"{gb(frees[0])} are free" if together else f"{gb(frees[0])} and {gb(frees[1])} are free"
    )
    short = stored + written > frees[0] if together else stored > frees[0] or written > frees[1]
    if short:
        places = "SEMALIGN_CACHE and --out on larger disks, `semalign store prune`"
        return warning("disk", needs, f"{places}, supervision.dtype=int8, or live=true, which keeps no supervision")
    return ok("disk", needs)


def _time(plan: Plan, pair: Pair, speed: float) -> Finding:
    parts = {"source": plan.source, "training": sum(plan.training), "measuring": plan.measuring}
    times = ", ".join(f"{name} {duration(work / plan.flops)}" for name, work in parts.items())
    rows = "rows like these" if pair.sample is not None else f"rows of {pair.experiment.data.max_length} tokens"
    dtype = str(pair.target.dtype).removeprefix("torch.")
    message = (
        f"about {duration(plan.seconds)} ({times}), loading aside, for {pair.experiment.data.train_rows} {rows} at "
        f"{speed / 1e9:.3g} GFLOP/s in {dtype}"
    )
    if plan.seconds > LONG:
        return warning(
            "time", message, "a smaller data.train_rows or train.passes, train.layers=[…], or an accelerator"
        )
    return ok("time", message)


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in matrix products, the median over the probe: what else runs counts."""
    size = 512 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    speeds: list[float] = []
    began = time.perf_counter()
    while not speeds or time.perf_counter() - began < PROBE_SECONDS:
        started = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        speeds.append(2 * size**3 / (time.perf_counter() - started))
    return statistics.median(speeds)


def _memory_of(device: torch.device) -> tuple[int, int]:
    """Free and whole memory of a device."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return free, whole
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def _existing(place: Path) -> Path:
    """The folder, or the nearest one above that exists already."""
    place = place.expanduser().absolute()
    return next(folder for folder in (place, *place.parents) if folder.exists())
