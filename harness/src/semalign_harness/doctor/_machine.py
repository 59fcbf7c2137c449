"""What a run would need of this machine, beside what it has."""

import os
import shutil
from pathlib import Path

import psutil
import torch

from ..data.encoding import Example
from ..data.rows import Split
from ..experiment import Experiment
from ..methods import as_method
from ..run.estimate import Totals, estimate
from ..run.plan import make_plan, matrix_speed
from ..run.written_answers import written_parts
from ..util.cache import cache_folder
from ..util.settings import merged, parse_overrides
from ..util.text import duration, gb
from ._findings import Finding, error, ok, warning
from ._pair import Pair

LEANER = ("batch_size=1", "train.micro_batch_size=1", "train.recompute_suffix=true")
"""Settings that take less memory; the first is for the source's phase (its supervision and its estimate: attribution
takes one row at a time anyway), the others for the target's."""
LONG = 24 * 3600
"""Seconds from which on a run is called long."""


def check_machine(pair: Pair) -> list[Finding]:
    """Memory, disk and time."""
    split = _split(pair)
    return [
        _memory(pair, split.longest),
        _disk(_totals(pair, pair.experiment, split.longest), pair.experiment),
        _time(pair, split),
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


def _time(pair: Pair, split: Split) -> Finding:
    experiment = pair.experiment
    kind = as_method(experiment.method).kind
    if kind != "semalign":
        return ok("time", f"not estimated: what is known is the work of frontier training, not of method.kind={kind}")
    speed = matrix_speed(pair.device, pair.target.dtype)
    plan = make_plan(
        experiment,
        split,
        source=pair.source.shape,
        target=pair.target.shape,
        processes=1,
        supervised=False,
        speed=speed,
    )
    parts = {"source": plan.source, "training": sum(plan.training), "measuring": plan.measuring}
    times = ", ".join(f"{name} {duration(work / plan.flops)}" for name, work in parts.items())
    rows = "rows like these" if pair.sample is not None else f"rows of {experiment.data.max_length} tokens"
    aside = "loading and the writing of answers" if written_parts(experiment.data) else "loading"
    dtype = str(pair.target.dtype).removeprefix("torch.")
    message = (
        f"about {duration(plan.seconds)} of frontier training ({times}), {aside} aside, for "
        f"{experiment.data.train_rows} {rows} at {speed / 1e9:.3g} GFLOP/s in {dtype}"
    )
    if plan.seconds > LONG:
        return warning(
            "time", message, "a smaller data.train_rows or train.passes, train.layers=[…], or an accelerator"
        )
    return ok("time", message)


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
