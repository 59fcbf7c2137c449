"""Compare the needs of a run with this machine."""

import os
import shutil
from pathlib import Path

import psutil
import torch

from ..experiment import Experiment
from ..run.checks import Finding, Pair, error, ok, warning
from ..run.estimate import Totals, estimate
from ..util.cache import cache_folder
from ..util.settings import merged, parse_overrides
from ..util.text import gb

LEANER = ("batch_size=1", "train.micro_batch_size=1", "train.recompute=true")
"""Settings that take less memory; the first is for the source's phase, the others for the target's."""


def check_machine(pair: Pair, device: torch.device) -> list[Finding]:
    """Check memory and disk, for the longest row of a run, or for the longest possible without rows."""
    split = pair.split
    longest = pair.experiment.data.max_length if split is None else max(map(len, (*split.train, *split.held_out)))
    return [_memory(pair, device, longest), _disk(_totals(pair, pair.experiment, longest), pair.experiment)]


def _totals(pair: Pair, experiment: Experiment, longest: int) -> Totals:
    """Estimate the needs of a run with rows of at most so many tokens."""
    data = experiment.data.model_copy(update={"max_length": longest})
    changed = {"data": data, "source": pair.source.settings, "target": pair.target.settings}
    totals = estimate(
        experiment.model_copy(update=changed),
        source_shape=pair.source.shape,
        target_shape=pair.target.shape,
        two_tokenizers=pair.apart,
    ).totals
    assert totals is not None
    return totals


def _memory(pair: Pair, device: torch.device, longest: int) -> Finding:
    free, whole = _memory_of(device)
    totals = _totals(pair, pair.experiment, longest)
    needs = (
        f"at most {gb(totals.source_phase)} with the source and {gb(totals.target_phase)} with the target, for rows "
        f"of {longest} tokens; {gb(free)} of {gb(whole)} are free on {device}"
    )
    source, target = (each.shape.parameters * each.dtype(device).itemsize for _, each in pair.both)
    if target > whole:
        remedy = "a smaller target: semalign models list shows sizes"
        return error("memory", f"the target's weights alone take {gb(target)}: {needs}", remedy)
    if source > whole and not pair.experiment.source.load_in_4bit:
        return error("memory", f"the source's weights alone take {gb(source)}: {needs}", "source.load_in_4bit=true")
    if totals.memory > free:
        return warning("memory", needs, _leaner(pair, longest, free))
    return ok("memory", needs)


def _leaner(pair: Pair, longest: int, free: int) -> str:
    """Return the fewest settings with which a run fits."""
    for settings in (*((setting,) for setting in LEANER), LEANER):
        tree = merged(pair.experiment.model_dump(mode="json"), parse_overrides(settings))
        if _totals(pair, Experiment.parse(tree, origin="doctor"), longest).memory <= free:
            return " ".join(settings)
    return f"end what else runs, and {' '.join(LEANER)}"


def _disk(totals: Totals, experiment: Experiment) -> Finding:
    """Check the disks of the cache folder, for supervision, and of the run folder, for the rest; they may be one."""
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


def _memory_of(device: torch.device) -> tuple[int, int]:
    """Return free and whole memory of a device."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return free, whole
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def _existing(place: Path) -> Path:
    """Return the folder, or the nearest one above that exists."""
    place = place.expanduser().absolute()
    return next(folder for folder in (place, *place.parents) if folder.exists())
