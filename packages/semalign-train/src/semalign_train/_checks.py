"""Checks that target, supervision and settings fit together, before anything is computed."""

from collections.abc import Mapping
from pathlib import Path

import torch
from semalign_align import SupervisionManifest, SupervisionSource, TopK
from semalign_attribution import DecoderView
from semalign_geometry.base import SemalignError
from torch import Tensor

Stores = Mapping[str, SupervisionSource]
"""Supervision of the `training` rows, and of others, by their name in messages."""


def check_target(view: DecoderView, stores: Stores) -> None:
    """Both trainers need weights that can train, and tokens and entries that the target knows."""
    if any(parameter.dtype == torch.float16 for parameter in view.model.parameters()):
        raise SemalignError(
            "the target's weights are float16, whose small gradients vanish without loss scaling: "
            "load it in bfloat16 or float32"
        )
    training = stores["training"]
    largest = int(training.entries.max())
    if largest >= len(view.head.weight):
        remedy = "entries=… of the shared vocabulary" if training.classes is None else "classes of its target_rows"
        raise SemalignError(
            f"the supervision is over vocabulary ids up to {largest}, the target's head has "
            f"{len(view.head.weight)} rows: supervise with {remedy}"
        )
    embeddings = view.model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    for rows, store in stores.items():
        largest = store.largest_id  # reads every token
        if largest >= len(embeddings):
            raise SemalignError(
                f"the {rows} rows hold token id {largest}, the target embeds {len(embeddings)}: leave out the rows "
                "with tokens that it does not know"
            )


def check_layers(view: DecoderView, manifest: SupervisionManifest) -> None:
    """Supervision of layers is for one depth and one width."""
    if manifest.pairing.target_depth != view.depth:
        raise SemalignError(
            f"the supervision is for a target of {manifest.pairing.target_depth} layers, this one has "
            f"{view.depth}: supervise again with a pairing for {view.depth}"
        )
    if manifest.transport.frame != "none" and manifest.transport.target_width != view.width:
        raise SemalignError(
            f"the supervision is for width {manifest.transport.target_width}, the target's is {view.width}: "
            "supervise again with a transport to it"
        )


def check_divergence(divergence: str, stores: Stores) -> None:
    """Final hidden states allow the forward divergence alone."""
    for rows, store in stores.items():
        if divergence != "forward" and not isinstance(store.manifest.settings.output, TopK):
            raise SemalignError(
                f"the {divergence} divergence needs supervision by top entries, the {rows} rows have final hidden "
                "states: supervise them with output=TopK(), or set divergence=forward"
            )


def check_held_out(supervision: SupervisionSource, held_out: SupervisionSource) -> None:
    """Training and held-out rows are supervised alike."""
    one, other = vocabulary_of(supervision), vocabulary_of(held_out)
    alike = _decisive(supervision.manifest) == _decisive(held_out.manifest) and one.keys() == other.keys()
    if not alike or not all(torch.equal(value, other[name]) for name, value in one.items()):
        raise SemalignError(
            "the held-out rows are supervised with another pairing, transport, temperature, vocabulary or "
            "classes than the training rows: supervise both alike"
        )


def check_keys(stores: Stores) -> None:
    """Checkpoints need to identify the supervision, which the content of a live source does not do."""
    for rows, store in stores.items():
        if not (store.manifest.key or store.manifest.files):
            raise SemalignError(
                f"checkpoints with live supervision of the {rows} rows need its key, which identifies the source and "
                "the rows: pass key=…"
            )


def existing(scratch: str | Path | None) -> Path | None:
    """The scratch folder, which the caller has made."""
    if scratch is not None and not Path(scratch).is_dir():
        raise SemalignError(f"the scratch folder {scratch} does not exist: make it, or leave it out")
    return None if scratch is None else Path(scratch)


def _decisive(manifest: SupervisionManifest) -> tuple[object, ...]:
    """Settings that training and held-out rows share; the files of a transport may differ."""
    transport = manifest.transport.model_copy(update={"files": {}})
    return manifest.pairing, transport, manifest.settings.temperature


def vocabulary_of(store: SupervisionSource) -> dict[str, Tensor]:
    """Entries or classes that the output distribution of a supervision is over."""
    classes = store.classes
    return {"entries": store.entries} if classes is None else {"source": classes.source, "target": classes.target}
