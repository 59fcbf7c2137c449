"""Frontier training: the target learns shallow to deep, one layer at a time, on stored supervision."""

from ._batches import AnySupervision as AnySupervision
from ._batches import micro_batches as micro_batches
from ._batches import optimisation_batches as optimisation_batches
from ._batches import rate_factor as rate_factor
from ._checkpoint import KEPT_STATES as KEPT_STATES
from ._checkpoint import Checkpoints as Checkpoints
from ._checkpoint import State as State
from ._checkpoint import fingerprint as fingerprint
from ._checkpoint import kept_until as kept_until
from ._muon import Muon as Muon
from ._optimiser import Optimiser as Optimiser
from ._prefix import PrefixCache as PrefixCache
from ._settings import KNOWN_OBJECTIVES as KNOWN_OBJECTIVES
from ._settings import FullLayer as FullLayer
from ._settings import Guards as Guards
from ._settings import LoraLayer as LoraLayer
from ._settings import LossWeights as LossWeights
from ._settings import StageRecord as StageRecord
from ._settings import StepRecord as StepRecord
from ._settings import TransferConfig as TransferConfig
from ._settings import TransferReport as TransferReport
from ._trainable import frontier as frontier
from ._trainable import trained as trained
from ._trainer import Callback as Callback
from ._trainer import DivergedError as DivergedError
from ._trainer import FrontierTrainer as FrontierTrainer

__all__ = [
    "AnySupervision",
    "Callback",
    "Checkpoints",
    "DivergedError",
    "FrontierTrainer",
    "FullLayer",
    "Guards",
    "KEPT_STATES",
    "KNOWN_OBJECTIVES",
    "LoraLayer",
    "LossWeights",
    "Muon",
    "Optimiser",
    "PrefixCache",
    "StageRecord",
    "State",
    "StepRecord",
    "TransferConfig",
    "TransferReport",
    "fingerprint",
    "frontier",
    "kept_until",
    "micro_batches",
    "optimisation_batches",
    "rate_factor",
    "trained",
]
