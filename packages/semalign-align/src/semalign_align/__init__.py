"""Alignment supervision: the source runs once, and its supervision is stored at the target's width."""

from ._boundary import check_objective as check_objective
from ._boundary import count_of as count_of
from ._boundary import total_of as total_of
from ._live import LiveSupervision as LiveSupervision
from ._objectives import AnswerNLL as AnswerNLL
from ._objectives import Cosine as Cosine
from ._objectives import Fisher as Fisher
from ._objectives import LabelCosine as LabelCosine
from ._objectives import Objective as Objective
from ._objectives import OutputKL as OutputKL
from ._objectives import Relation as Relation
from ._objectives import SpanLikelihood as SpanLikelihood
from ._objectives import Step as Step
from ._ranks import RaisedElsewhere as RaisedElsewhere
from ._ranks import Ranks as Ranks
from ._settings import FinalHidden as FinalHidden
from ._settings import Shard as Shard
from ._settings import SupervisionManifest as SupervisionManifest
from ._settings import SupervisionSettings as SupervisionSettings
from ._settings import TopK as TopK
from ._size import store_bytes as store_bytes
from ._spans import AnyBatch as AnyBatch
from ._spans import BatchSpans as BatchSpans
from ._spans import PairedBatch as PairedBatch
from ._spans import Spans as Spans
from ._spans import align_spans as align_spans
from ._spans import span_log_likelihoods as span_log_likelihoods
from ._store import Supervision as Supervision
from ._supervise import supervise as supervise
from ._supervision import FinalStates as FinalStates
from ._supervision import OutputTarget as OutputTarget
from ._supervision import SupervisedBatch as SupervisedBatch
from ._supervision import SupervisionSource as SupervisionSource
from ._supervision import position_mask as position_mask

__all__ = [
    "AnswerNLL",
    "AnyBatch",
    "BatchSpans",
    "Cosine",
    "FinalHidden",
    "FinalStates",
    "Fisher",
    "LabelCosine",
    "LiveSupervision",
    "Objective",
    "OutputKL",
    "OutputTarget",
    "PairedBatch",
    "RaisedElsewhere",
    "Ranks",
    "Relation",
    "Shard",
    "SpanLikelihood",
    "Spans",
    "Step",
    "SupervisedBatch",
    "Supervision",
    "SupervisionManifest",
    "SupervisionSettings",
    "SupervisionSource",
    "TopK",
    "align_spans",
    "check_objective",
    "count_of",
    "position_mask",
    "span_log_likelihoods",
    "store_bytes",
    "supervise",
    "total_of",
]
