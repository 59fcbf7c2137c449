"""Settings of supervision, and the contracts of a store."""

from typing import Annotated, Literal

from pydantic import Field
from semalign_attribution import LayerPairing
from semalign_geometry import TransportManifest
from semalign_geometry.base import ArtifactManifest, Contract, Settings


class TopK(Settings):
    """Output supervision by the source's likeliest entries of each token, and one bucket for the rest."""

    kind: Literal["top_k"] = "top_k"
    """Chooses this output supervision in a configuration."""
    k: int = Field(64, ge=1)
    """Entries kept for each token: 8 bytes each on disk."""


class FinalHidden(Settings):
    """Output supervision by the inputs of the source's head, for the exact KL; the source's head is stored once
    beside it."""

    kind: Literal["final_hidden"] = "final_hidden"
    """Chooses this output supervision in a configuration."""


class SupervisionSettings(Settings):
    """Settings of `supervise`."""

    output: Annotated[TopK | FinalHidden, Field(discriminator="kind")] = TopK()
    """Form in which the source's output distribution is kept."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both models in the output objective. No factor temperature² follows, so at a temperature
    T the gradient of that objective is about 1/T² of that at 1: raise its weight accordingly."""
    dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """dtype of stored residuals; `int8` has a float32 scale for each token, and final hidden states in bfloat16."""
    shard_bytes: int = Field(64 * 2**20, ge=1)
    """A shard is closed when it has grown past this size."""


class Shard(Settings):
    """One tensor file of a supervision store."""

    file: str
    """Name inside the folder."""
    examples: int
    """Examples in this shard."""


class Progress(Contract):
    """Progress of one process with its share of a store."""

    key: str
    """Cache key of the supervision."""
    ranks: int
    """Processes that write the store, each its own share of the batches."""
    shards: tuple[Shard, ...] = ()
    """The finished shards."""
    files: dict[str, str] = {}
    """sha256 (hex) of each, by file name."""
    batches: int = 0
    """Batches in them."""
    tokens: int = 0
    """All tokens of these batches."""
    supervised_tokens: int = 0
    """Answer tokens of these batches."""
    spans: int = 0
    """Spans of these batches; the answer tokens with one tokenizer."""
    squares: tuple[float, float] = (0.0, 0.0)
    """‖stored − computed‖² and ‖computed‖² of the residuals."""


class SupervisionManifest(ArtifactManifest):
    """Settings, origin and sizes of a supervision."""

    key: str = ""
    """Cache key of the supervision; empty where the caller passed none."""
    settings: SupervisionSettings
    """Settings that it was made with."""
    pairing: LayerPairing
    """Which source layer supervises which target layer."""
    transport: TransportManifest
    """Transport of the contributions to the target's width."""
    examples: int
    """Examples in the store."""
    tokens: int
    """All their tokens as the target reads them, prompts included."""
    supervised_tokens: int
    """Answer tokens as the target reads them."""
    spans: int | None = None
    """Spans of the answers, which have the supervision; None with one tokenizer, where each answer token is one."""
    residual_error: float
    """‖stored − computed‖ / ‖computed‖ over all residuals: the error of rounding to `settings.dtype`."""
    entries: int
    """Shared vocabulary entries, or classes of two vocabularies, that the output distribution is over."""
    head_scale: float
    """Scale of the source's logits."""
    head_softcap: float | None
    """Soft-cap of the source's logits."""
    shards: tuple[Shard, ...]
    """The shards in the order of their examples."""
