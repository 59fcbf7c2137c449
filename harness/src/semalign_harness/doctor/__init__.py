"""Trouble with a pair of models, told in seconds: by configurations, tokenizers and heads, before any weights load."""

from ._diagnose import diagnose as diagnose
from ._diagnose import read_settings as read_settings
from ._findings import Diagnosis as Diagnosis
from ._findings import Finding as Finding
from ._text import diagnosis_text as diagnosis_text

__all__ = ["Diagnosis", "Finding", "diagnose", "diagnosis_text", "read_settings"]
