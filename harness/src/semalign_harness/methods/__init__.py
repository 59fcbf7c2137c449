"""Methods of transfer: SemAlign, and what it is compared with."""

from ._joint import JointMethod as JointMethod
from ._method import LayerUse as LayerUse
from ._method import Method as Method
from ._method import MethodContext as MethodContext
from ._method import MethodReport as MethodReport
from ._method import layer_use_of as layer_use_of
from ._named import BASELINES as BASELINES
from ._named import find_methods as find_methods
from ._named import known_methods as known_methods
from ._named import settings_of as settings_of
from ._registry import KNOWN_METHODS as KNOWN_METHODS
from ._registry import as_method as as_method
from ._registry import known_kinds as known_kinds
from ._registry import parse_method as parse_method

__all__ = [
    "BASELINES",
    "KNOWN_METHODS",
    "JointMethod",
    "LayerUse",
    "Method",
    "MethodContext",
    "MethodReport",
    "as_method",
    "find_methods",
    "known_kinds",
    "known_methods",
    "layer_use_of",
    "parse_method",
    "settings_of",
]
