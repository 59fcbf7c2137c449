"""Check a pair of models in seconds: by configurations, tokenizers and heads, before any weights load."""

from ..run.checks import Finding as Finding
from ._diagnose import diagnose as diagnose
from ._diagnose import read_settings as read_settings
from ._diagnosis import Diagnosis as Diagnosis
from ._diagnosis import diagnosis_text as diagnosis_text

__all__ = ["Diagnosis", "Finding", "diagnose", "diagnosis_text", "read_settings"]
