"""Methods of transfer: SemAlign, and its baselines."""

from ._joint import JointMethod as JointMethod
from ._method import LayerUse as LayerUse
from ._method import Method as Method
from ._method import MethodContext as MethodContext
from ._method import MethodNeeds as MethodNeeds
from ._method import MethodReport as MethodReport
from ._method import Work as Work
from ._named import BASELINES as BASELINES
from ._named import describe_methods as describe_methods
from ._named import find_methods as find_methods
from ._named import known_methods as known_methods
from ._named import settings_of as settings_of
from ._registry import KNOWN_METHODS as KNOWN_METHODS
from ._registry import known_kinds as known_kinds
from ._registry import parse_method as parse_method
from ._semalign import SemAlign as SemAlign

__all__ = [
    "BASELINES",
    "KNOWN_METHODS",
    "JointMethod",
    "LayerUse",
    "Method",
    "MethodContext",
    "MethodNeeds",
    "MethodReport",
    "SemAlign",
    "Work",
    "describe_methods",
    "find_methods",
    "known_kinds",
    "known_methods",
    "parse_method",
    "settings_of",
]
