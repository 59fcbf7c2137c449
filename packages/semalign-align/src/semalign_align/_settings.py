"""What is supervised, and how it is stored."""

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
    """Output supervision by what the source feeds its head, for the exact KL; the source's head is stored once
    beside it."""

    kind: Literal["final_hidden"] = "final_hidden"
    """Chooses this output supervision in a configuration."""


class SupervisionSettings(Settings):
    """Settings of `supervise`."""

    residual: Literal["layer", "span"] = "layer"
    """Contribution of the paired source layer alone, or, for ablation, of all source layers since the next shallower
    paired one."""
    output: Annotated[TopK | FinalHidden, Field(discriminator="kind")] = TopK()
    """How the source's output distribution is kept."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both models in the output objective. No factor temperature² follows, so at a temperature
    T the gradient of that objective is about 1/T² of that at 1: weigh it against the others accordingly."""
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
    """How far one process has come with its share of a store."""

    key: str
    """What tells this supervision from any other."""
    ranks: int
    """Processes that write it, each its own share of the batches."""
    shards: tuple[Shard, ...] = ()
    """The whole shards."""
    files: dict[str, str] = {}
    """sha256 (hex) of each."""
    batches: int = 0
    """Batches that are in them."""
    tokens: int = 0
    """All tokens of those."""
    supervised_tokens: int = 0
    """Their tokens with supervision."""
    squares: tuple[float, float] = (0.0, 0.0)
    """‖stored − computed‖² and ‖computed‖² of the residuals."""


class SupervisionManifest(ArtifactManifest):
    """What a supervision store holds."""

    key: str = ""
    """What tells this supervision from any other, where `resume_key` was given."""
    settings: SupervisionSettings
    """How it was made."""
    pairing: LayerPairing
    """Which source layer supervises which target layer."""
    transport: TransportManifest
    """How contributions came to the target's width."""
    examples: int
    """Examples in the store."""
    tokens: int
    """All their tokens, prompts included."""
    supervised_tokens: int
    """Tokens with supervision."""
    residual_error: float
    """‖stored − computed‖ / ‖computed‖ over all residuals: what rounding to `settings.dtype` cost."""
    entries: int
    """Shared vocabulary entries that the output distribution is over."""
    head_scale: float
    """Scale of the source's logits."""
    head_softcap: float | None
    """Soft-cap of the source's logits."""
    shards: tuple[Shard, ...]
    """The shards in the order of their examples."""
