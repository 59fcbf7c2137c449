"""Cache key of supervision: equal for every experiment that needs the same."""

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch
from semalign_geometry import KNOWN_FRAMES

from ..data.encoding import Example
from ..experiment import KNOWN_PAIRINGS, KNOWN_SCORERS, Experiment
from ..generation import GENERATION
from ..reading import READING
from .inputs import Inputs

PACKAGES = ("torch", "transformers", "semalign-geometry", "semalign-attribution", "semalign-align", "semalign-harness")
"""Packages whose versions belong to a cache key."""


_FORMAT = 5
"""Raised when the same settings give other content within one version of the packages."""


def phase_key(experiment: Experiment, inputs: Inputs, device: torch.device) -> str:
    """Return the cache key of the supervision: a hash of everything that decides it; training settings do not."""
    rows = [_ids_of(example) for example in (*inputs.split.train, *inputs.split.held_out)]
    parts = {
        "format": [_FORMAT, GENERATION, READING],
        "settings": experiment.model_dump(
            mode="json", include={"scorer", "pairing", "transport", "supervision", "live", "measure", "batch_size"}
        ),
        "attribution_rows": experiment.data.attribution_rows,
        "train_rows": len(inputs.split.train),
        "rows": rows,
        "models": [inputs.source_id, inputs.target_id, experiment.source.load_in_4bit],
        "dtypes": [str(opened.dtype(device)) for opened in (inputs.source, inputs.target)],
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "packages": {name: version(name) for name in PACKAGES}
        | foreign_packages(experiment)
        | foreign_code(experiment),
    }
    if inputs.classes is not None:
        parts["classes"] = [each.tolist() for each in (inputs.classes.source, inputs.classes.target)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _ids_of(example: Example) -> list[Any]:
    """Return all that decides the supervision of a row: ids and answer, and the source's ids where it has its own."""
    own, side = [example.prompt_ids, example.answer_ids, example.answer], example.source
    if side is None:
        return own
    return [*own, side.prompt_ids, side.answer_ids, side.spans.source, side.spans.target, side.framed]


def foreign_packages(experiment: Experiment) -> dict[str, str]:
    """Return versions of the installed packages of the scorer, the pairing and the frame."""
    return (
        KNOWN_SCORERS.packages(experiment.scorer.kind)
        | KNOWN_PAIRINGS.packages(experiment.pairing.kind)
        | KNOWN_FRAMES.packages(*{experiment.transport.frame} - {"none"})
    )


def foreign_code(experiment: Experiment) -> dict[str, str]:
    """Return hashes of the code of the scorer, the pairing and the frame, as far as they are not built in."""
    frame = experiment.transport.frame
    return {
        **KNOWN_SCORERS.code(type(experiment.scorer)),
        **KNOWN_PAIRINGS.code(type(experiment.pairing)),
        **({} if frame == "none" else KNOWN_FRAMES.code(KNOWN_FRAMES.find(frame))),
    }
