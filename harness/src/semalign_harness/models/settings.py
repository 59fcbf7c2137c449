"""Settings of a model."""

from typing import Literal

from semalign_geometry.base import Settings


class ModelConfig(Settings):
    """Origin of a model, and the dtype of its weights."""

    path: str
    """Hub id, local folder, `.gguf` file, `catalogue:NAME` of `semalign models list`, or a generated model:
    `generated:tiny-source`, `generated:tiny-target`, `generated:tiny-small`, or `generated:tiny-target-other`, which
    has a tokenizer of its own."""
    revision: str | None = None
    """Revision on the hub; None for the newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the weights; `auto` is the checkpoint's own."""
    load_in_4bit: bool = False
    """Whether the linear layers are kept in 4 bits (NF4, by bitsandbytes) and computed in `dtype`; for the source."""
