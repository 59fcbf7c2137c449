"""Semantic bases of language-model heads, transport between widths, and relation geometry. Pure maths on torch."""

from ._basis import COARSE as COARSE
from ._basis import BasisManifest as BasisManifest
from ._basis import SemanticBasis as SemanticBasis
from ._class_head import ClassHead as ClassHead
from ._class_head import OutputHead as OutputHead
from ._classes import VocabularyClasses as VocabularyClasses
from ._classes import align_classes as align_classes
from ._divergence import Divergence as Divergence
from ._divergence import TopEntries as TopEntries
from ._divergence import answer_nll as answer_nll
from ._divergence import categorical_divergence as categorical_divergence
from ._divergence import kl_divergence as kl_divergence
from ._divergence import quadratic_divergence as quadratic_divergence
from ._divergence import span_divergence as span_divergence
from ._divergence import top_entries as top_entries
from ._divergence import top_k_divergence as top_k_divergence
from ._fidelity import FidelityReport as FidelityReport
from ._fidelity import LayerFidelity as LayerFidelity
from ._fidelity import PairedResiduals as PairedResiduals
from ._fidelity import measure_fidelity as measure_fidelity
from ._frames import FRAMES as FRAMES
from ._frames import KNOWN_FRAMES as KNOWN_FRAMES
from ._frames import Frame as Frame
from ._frames import decompose as decompose
from ._frames import recompose as recompose
from ._frames import unit_rows as unit_rows
from ._head import Head as Head
from ._head import accumulation_dtype as accumulation_dtype
from ._head import decoder_of as decoder_of
from ._head import final_norm as final_norm
from ._head import norm_gain as norm_gain
from ._relation import LEAST_TOKENS as LEAST_TOKENS
from ._relation import linear_cka as linear_cka
from ._relation import linear_cka_matrix as linear_cka_matrix
from ._relation import relation_distance as relation_distance
from ._relation import relation_distances as relation_distances
from ._tokens import Vocabulary as Vocabulary
from ._transport import Transport as Transport
from ._transport import TransportManifest as TransportManifest
from ._transport import fit_transport as fit_transport
from ._vocabulary import SharedVocabulary as SharedVocabulary
from ._vocabulary import align_vocabularies as align_vocabularies

__all__ = [
    "BasisManifest",
    "COARSE",
    "ClassHead",
    "Divergence",
    "FRAMES",
    "FidelityReport",
    "Frame",
    "Head",
    "KNOWN_FRAMES",
    "LEAST_TOKENS",
    "LayerFidelity",
    "OutputHead",
    "PairedResiduals",
    "SemanticBasis",
    "SharedVocabulary",
    "TopEntries",
    "Transport",
    "TransportManifest",
    "Vocabulary",
    "VocabularyClasses",
    "accumulation_dtype",
    "align_classes",
    "align_vocabularies",
    "answer_nll",
    "categorical_divergence",
    "decoder_of",
    "decompose",
    "final_norm",
    "fit_transport",
    "kl_divergence",
    "linear_cka",
    "linear_cka_matrix",
    "measure_fidelity",
    "norm_gain",
    "quadratic_divergence",
    "recompose",
    "relation_distance",
    "relation_distances",
    "span_divergence",
    "top_entries",
    "top_k_divergence",
    "unit_rows",
]
