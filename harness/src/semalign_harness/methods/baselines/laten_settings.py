"""Settings of LaTen, and the modules that it moves neurons of."""

from pydantic import Field, PositiveInt
from semalign_geometry.base import Settings

MOVED = ("gate_proj", "up_proj", "down_proj", "v_proj", "o_proj")
"""Names of the linear modules that neurons belong to."""


class LaTenSettings(Settings):
    """Settings of LaTen."""

    share: float = Field(0.1, gt=0, le=1)
    """Neurons that are moved, as a share of the target's feed-forward and attention neurons in a layer."""
    steps: PositiveInt = 4
    """Optimiser steps of the hypernetworks."""
    batch_size: int = Field(16, ge=1)
    """Rows in an optimiser step."""
    learning_rate: float = Field(3e-5, gt=0)
    """Learning rate of the hypernetworks, constant."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay."""
    penalty: float = Field(1000.0, ge=0)
    """Weight of the mean square of the translated neurons, summed over the four kinds."""
    start: float = Field(1e-5, ge=0)
    """Standard deviation of the hypernetworks' weights at the start."""
