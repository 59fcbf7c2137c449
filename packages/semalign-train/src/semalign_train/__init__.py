"""Training of a target on stored or live supervision: layer by layer, or all layers at once."""

from ._alm import AlmLoss as AlmLoss
from ._batches import optimisation_batches as optimisation_batches
from ._checkpoint import KEPT_STATES as KEPT_STATES
from ._checkpoint import kept_until as kept_until
from ._frontier import Callback as Callback
from ._frontier import FrontierTrainer as FrontierTrainer
from ._gold import GoldLoss as GoldLoss
from ._joint import JointTrainer as JointTrainer
from ._loop import DivergedError as DivergedError
from ._losses import AnswerLoss as AnswerLoss
from ._losses import HiddenLoss as HiddenLoss
from ._losses import JointLoss as JointLoss
from ._losses import JointStep as JointStep
from ._losses import OutputLoss as OutputLoss
from ._muon import Muon as Muon
from ._optimiser import Optimiser as Optimiser
from ._prefix import PrefixCache as PrefixCache
from ._records import JointReport as JointReport
from ._records import StageRecord as StageRecord
from ._records import StepRecord as StepRecord
from ._records import TransferReport as TransferReport
from ._settings import KNOWN_OBJECTIVES as KNOWN_OBJECTIVES
from ._settings import FrontierConfig as FrontierConfig
from ._settings import FrontierSettings as FrontierSettings
from ._settings import FullLayer as FullLayer
from ._settings import Guards as Guards
from ._settings import JointConfig as JointConfig
from ._settings import JointSettings as JointSettings
from ._settings import LoraLayer as LoraLayer
from ._settings import LossWeights as LossWeights
from ._settings import TrainSettings as TrainSettings
from ._trainable import frontier as frontier
from ._trainable import trained as trained

__all__ = [
    "AlmLoss",
    "AnswerLoss",
    "Callback",
    "DivergedError",
    "FrontierConfig",
    "FrontierSettings",
    "FrontierTrainer",
    "FullLayer",
    "GoldLoss",
    "Guards",
    "HiddenLoss",
    "JointConfig",
    "JointLoss",
    "JointReport",
    "JointSettings",
    "JointStep",
    "JointTrainer",
    "KEPT_STATES",
    "KNOWN_OBJECTIVES",
    "LoraLayer",
    "LossWeights",
    "Muon",
    "Optimiser",
    "OutputLoss",
    "PrefixCache",
    "StageRecord",
    "StepRecord",
    "TrainSettings",
    "TransferReport",
    "frontier",
    "kept_until",
    "optimisation_batches",
    "trained",
]
