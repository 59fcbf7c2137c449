"""Layer attribution: a view of a transformers decoder, scores of its layers, and the pairing with a target's
layers."""

from ._batch import IGNORE as IGNORE
from ._batch import Batch as Batch
from ._batch import Supervised as Supervised
from ._batch import supervised as supervised
from ._decoder import DecoderView as DecoderView
from ._decoder import Trace as Trace
from ._decoder import view_of as view_of
from ._pairing import POLICIES as POLICIES
from ._pairing import LayerPairing as LayerPairing
from ._pairing import Manual as Manual
from ._pairing import Monotone as Monotone
from ._pairing import NearestCritical as NearestCritical
from ._pairing import PairingPolicy as PairingPolicy
from ._pairing import Random as Random
from ._pairing import SimilarityPairing as SimilarityPairing
from ._pairing import Uniform as Uniform
from ._pairing import pair_layers as pair_layers
from ._scorers import Ablation as Ablation
from ._scorers import GradientActivation as GradientActivation
from ._scorers import Similarity as Similarity
from ._scores import LayerScores as LayerScores
from ._scores import Scorer as Scorer
from ._scores import attribute_layers as attribute_layers
from ._undisturbed import undisturbed as undisturbed

__all__ = [
    "Ablation",
    "Batch",
    "DecoderView",
    "GradientActivation",
    "IGNORE",
    "LayerPairing",
    "LayerScores",
    "Manual",
    "Monotone",
    "NearestCritical",
    "POLICIES",
    "PairingPolicy",
    "Random",
    "Scorer",
    "Similarity",
    "SimilarityPairing",
    "Supervised",
    "Trace",
    "Uniform",
    "attribute_layers",
    "pair_layers",
    "supervised",
    "undisturbed",
    "view_of",
]
