from ._diagnose import diagnose as diagnose
from ._diagnosis import Diagnosis as Diagnosis
from ._diagnosis import Finding as Finding
from ._diagnosis import diagnosis_text as diagnosis_text
from ._settings import read_settings as read_settings
