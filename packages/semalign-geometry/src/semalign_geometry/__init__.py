"""Semantic bases of language-model heads, transport between widths, and relation geometry. Pure maths on torch."""

from ._artifact import MANIFEST as MANIFEST
from ._artifact import ArtifactManifest as ArtifactManifest
from ._artifact import check_replaceable as check_replaceable
from ._artifact import read_artifact as read_artifact
from ._artifact import read_manifest as read_manifest
from ._artifact import save_tensors as save_tensors
from ._artifact import sha256_of as sha256_of
from ._artifact import write_artifact as write_artifact
from ._basis import COARSE as COARSE
from ._basis import BasisManifest as BasisManifest
from ._basis import SemanticBasis as SemanticBasis
from ._checked import checked as checked
from ._code import code_sha256 as code_sha256
from ._components import Components as Components
from ._components import Kinds as Kinds
from ._contracts import Contract as Contract
from ._contracts import Settings as Settings
from ._divergence import Divergence as Divergence
from ._divergence import HeadStatistics as HeadStatistics
from ._divergence import TopEntries as TopEntries
from ._divergence import answer_nll as answer_nll
from ._divergence import cell_divergence as cell_divergence
from ._divergence import coarse_divergence as coarse_divergence
from ._divergence import head_statistics as head_statistics
from ._divergence import output_divergence as output_divergence
from ._divergence import quadratic_divergence as quadratic_divergence
from ._divergence import top_entries as top_entries
from ._errors import ComponentError as ComponentError
from ._errors import SemalignError as SemalignError
from ._errors import brief as brief
from ._fidelity import FidelityReport as FidelityReport
from ._fidelity import LayerFidelity as LayerFidelity
from ._fidelity import PairedResiduals as PairedResiduals
from ._fidelity import measure_fidelity as measure_fidelity
from ._files import new_folder as new_folder
from ._files import replace_file as replace_file
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
from ._relation import Route as Route
from ._relation import Scope as Scope
from ._relation import linear_cka as linear_cka
from ._relation import linear_cka_matrix as linear_cka_matrix
from ._relation import relation_distance as relation_distance
from ._relation import relation_distances as relation_distances
from ._transport import Transport as Transport
from ._transport import TransportManifest as TransportManifest
from ._transport import fit_transport as fit_transport
from ._vocabulary import SharedVocabulary as SharedVocabulary
from ._vocabulary import align_vocabularies as align_vocabularies

__all__ = [
    "ArtifactManifest",
    "BasisManifest",
    "COARSE",
    "ComponentError",
    "Components",
    "Contract",
    "Divergence",
    "FRAMES",
    "FidelityReport",
    "Frame",
    "Head",
    "HeadStatistics",
    "KNOWN_FRAMES",
    "Kinds",
    "LEAST_TOKENS",
    "LayerFidelity",
    "MANIFEST",
    "PairedResiduals",
    "Route",
    "Scope",
    "SemalignError",
    "SemanticBasis",
    "Settings",
    "SharedVocabulary",
    "TopEntries",
    "Transport",
    "TransportManifest",
    "accumulation_dtype",
    "align_vocabularies",
    "answer_nll",
    "brief",
    "cell_divergence",
    "check_replaceable",
    "checked",
    "coarse_divergence",
    "code_sha256",
    "decoder_of",
    "decompose",
    "final_norm",
    "fit_transport",
    "head_statistics",
    "linear_cka",
    "linear_cka_matrix",
    "measure_fidelity",
    "new_folder",
    "norm_gain",
    "output_divergence",
    "quadratic_divergence",
    "read_artifact",
    "read_manifest",
    "recompose",
    "relation_distance",
    "relation_distances",
    "replace_file",
    "save_tensors",
    "sha256_of",
    "top_entries",
    "unit_rows",
    "write_artifact",
]
