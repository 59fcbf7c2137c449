"""Settings of the adapters of seeking."""

from typing import Any

from pydantic import Field, model_validator
from semalign_train import LoraLayer


class SoughtLora(LoraLayer):
    """Adapters B A of scale 1, which start at windows of the source's weights."""

    modules: tuple[str, ...] = ()
    """Names of the linear modules that get an adapter; empty for all that the layers of both models have."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Share of an adapter's inputs that training leaves out."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, data: Any) -> Any:
        return {"alpha": data.get("rank", cls.model_fields["rank"].default)} | data if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _scale_is_one(self) -> "SoughtLora":
        if self.alpha != self.rank:
            raise ValueError(f"alpha is {self.alpha} and rank {self.rank}: seeking has scale 1, leave alpha out")
        if self.start != "zero":
            raise ValueError(f"start is {self.start}: seeking starts adapters at the source's weights, leave start out")
        return self
