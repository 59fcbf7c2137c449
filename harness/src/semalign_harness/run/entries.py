"""Entries, or classes of two vocabularies, whose probability a transfer changed most."""

import os
from collections.abc import Callable
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from semalign_geometry.base import save_tensors
from torch import Tensor

from ..results.entries import EntryChange, EntryChanges
from .inputs import Inputs

SHOWN = 12
"""Entries that gained, and as many that lost, at most."""
_NAME = "probabilities"


def entry_changes(
    before: Float[Tensor, "2 e"], after: Float[Tensor, "2 e"], name_of: Callable[[int], str], *, spans: int
) -> EntryChanges:
    """Return the entries that gained and lost most.

    Args:
        before: mean probabilities by the source and by the target before the transfer.
        after: the same after it.
        name_of: name of an entry by its place.
        spans: number of spans that the means are over.
    """
    change = after[1] - before[1]

    def chosen(signed: Float[Tensor, " e"]) -> tuple[EntryChange, ...]:
        places = [place for place in signed.topk(min(SHOWN, len(signed))).indices.tolist() if signed[place] > 0]
        columns = (before[0], before[1], after[1])
        return tuple(
            EntryChange(entry=name_of(place), **dict(zip(("source", "before", "after"), numbers, strict=True)))
            for place in places
            for numbers in [[float(column[place]) for column in columns]]
        )

    return EntryChanges(spans=spans, gained=chosen(change), lost=chosen(-change))


def entry_names(inputs: Inputs) -> Callable[[int], str]:
    """Return the name of an entry, or of a class where the tokenizers differ, by its place."""
    classes = inputs.classes
    if classes is None:
        ids, tokenizer = inputs.shared.target_ids, inputs.target.tokenizer
        return lambda place: str(tokenizer.convert_ids_to_tokens(int(ids[place])))
    names = classes.names
    return lambda place: _readable(names[place])


def _readable(name: bytes | str) -> str:
    if isinstance(name, str):
        return name
    try:
        return repr(name.decode()).replace(" ", "␣")  # pages show runs of spaces as one
    except UnicodeDecodeError:
        return repr(name)


def keep_probabilities(file: Path, probabilities: Float[Tensor, "2 e"]) -> None:
    """Write mean probabilities to a file, which is whole or absent; other processes may write the same one.

    Raises:
        OSError: the disk is full, or the folder is not writable.
    """
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    save_tensors(temporary, {_NAME: probabilities})
    temporary.replace(file)


def kept_probabilities(file: Path) -> Float[Tensor, "2 e"] | None:
    """Return the mean probabilities in a file; None where there is none, or a damaged one."""
    try:
        return load_file(file)[_NAME]
    except (OSError, SafetensorError, KeyError):
        return None
