"""Check rank and conditioning of a head, from its one tensor in the checkpoint."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from semalign_geometry import COARSE, SemanticBasis
from semalign_geometry.base import SemalignError
from torch import Tensor
from transformers.utils.hub import cached_file

from ..models.loading import ADAPTER, unused_tensors
from ..models.opening import OpenedModel
from ..run.checks import Finding, Pair, error, ok, refused, tokenizer_ids, warning

FEW, SAMPLE = 4096, 4
"""Entries that are read: at least so many, and so many widths of the head. Some rows have no higher rank than all. They
give the condition number within a factor of about two in a second; the exact one takes a minute."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Unmeasured(Exception):
    """The head's tensor cannot be read alone."""


def check_head(role: str, opened: OpenedModel, pair: Pair) -> Finding:
    """Check rank and conditioning of a model's head over some of the entries that both models share."""
    check, again = f"{role} head", f"fetch {opened.settings.path} again"
    try:
        ids = pair.shared.source_ids if role == "source" else pair.shared.target_ids
    except SemalignError:  # an error of the tokenizers
        ids = torch.tensor(tokenizer_ids(opened))
    try:
        weight = _read_head(opened)
    except _Unmeasured as reason:
        return ok(check, f"not measured: {reason}")
    except (OSError, ValueError, SafetensorError) as failure:
        return error(check, f"the checkpoint cannot be read: {' '.join(str(failure).split())[:160]}", again)
    width = weight.shape[1]
    some = ids[:: max(1, len(ids) // max(FEW, SAMPLE * width))]
    try:
        basis = _basis(weight, some)
        if basis.manifest.rank < width and len(some) < len(ids):  # the others may make up for it
            some, basis = ids, _basis(weight, ids)
    except SemalignError as failure:
        return error(check, str(failure).partition(":")[0], again)
    over = f"over {len(some)} entries" if len(some) == len(ids) else f"over {len(some)} of {len(ids)} entries"
    manifest, own_space = basis.manifest, "transport.frame=none, which matches geometry in the source's own space"
    if manifest.rank < width:
        message = f"rank {manifest.rank} of {width} {over}: what the head cannot read of a contribution is lost"
        return warning(check, message, own_space)
    message = f"rank {manifest.rank} of {width}, condition number of WᵀW about {manifest.condition:.1e} {over}"
    if basis.rounding() > COARSE:
        lost = f"rounding changes a transport by one part in {1 / basis.rounding():.0e}"
        return warning(check, f"{message}: {lost}", f"{own_space}, or transport.frame=cosine, which loses less")
    return ok(check, message)


def check_adapters(role: str, opened: OpenedModel) -> list[Finding]:
    """Check that the checkpoint holds no adapter that was not merged, by the names of its tensors."""
    try:
        names = [name for name in _tensor_files(opened) if ADAPTER.search(name)]
    except (_Unmeasured, OSError, ValueError, SafetensorError):
        return []  # an error of the head
    try:
        unused_tensors(opened.view.model, names, opened.settings.path)
    except SemalignError as failure:
        return [refused(f"{role} checkpoint", failure)]
    return []


def _basis(weight: Tensor, ids: Tensor) -> SemanticBasis:
    if len(ids) < 2 * max(FEW, SAMPLE * weight.shape[1]):  # few enough to be copied
        return SemanticBasis.from_head(weight[ids].double(), entries=torch.arange(len(ids)))
    return SemanticBasis.from_head(weight, entries=ids)


def _read_head(opened: OpenedModel) -> Float[Tensor, "v d"]:
    """Map the head's weights into memory; their pages are read from the disk when they are used."""
    model = opened.view.model
    output = model.get_output_embeddings().weight
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name, parameter in parameters.items() if parameter is output]
    ends = tuple("." + ".".join(name.split(".")[-2:]) for name in names)
    files = _tensor_files(opened)
    prefixed = [name for name in files if f".{name}".endswith(ends)]
    found = _of_shape([*names, *prefixed], files, output.shape)
    if not found:  # checkpoints may have names of their own: the head is the one of its shape that is nothing else
        strangers = _of_shape([name for name in files if name not in parameters], files, output.shape)
        found = strangers if len(strangers) == 1 else []
    if not found:
        raise _Unmeasured(f"the checkpoint has no tensor {names[-1]} of shape {tuple(output.shape)}")
    with safe_open(files[found[0]], "pt") as file:
        weight: Tensor = file.get_tensor(found[0])
    if not weight.is_floating_point():
        raise _Unmeasured(f"the checkpoint holds {found[0]} quantised")
    return weight


def _of_shape(names: list[str], files: dict[str, Path], shape: torch.Size) -> list[str]:
    found = []
    for name in names:
        if name in files:
            with safe_open(files[name], "pt") as file:
                if file.get_slice(name).get_shape() == list(shape):
                    found.append(name)
    return found


def _tensor_files(opened: OpenedModel) -> dict[str, Path]:
    """Return the file of each tensor of the checkpoint."""
    index = _file(opened, INDEX)
    if index is not None:
        content = json.loads(index.read_text(encoding="utf-8"))
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
            raise ValueError(f"{INDEX} has no weight_map of tensors to files")
        names: dict[str, str] = found
        files = {shard: _file(opened, shard) for shard in set(names.values())}
        absent = sorted(shard for shard, file in files.items() if file is None)
        if absent and opened.commit is None:
            raise FileNotFoundError(f"{absent[0]} is missing, which {INDEX} names")
        return {name: file for name, shard in names.items() if (file := files[shard]) is not None}
    single = _file(opened, SINGLE)
    if single is None:
        where = "is not downloaded yet" if opened.commit is not None else "is not in safetensors files"
        raise _Unmeasured(f"the checkpoint {where}")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _file(opened: OpenedModel, name: str) -> Path | None:
    """Return a file of the model, if it is here."""
    if opened.commit is None:
        path = Path(opened.place) / name
        return path if path.is_file() else None
    try:
        return Path(str(cached_file(opened.place, name, revision=opened.commit, local_files_only=True)))
    except OSError:
        return None
