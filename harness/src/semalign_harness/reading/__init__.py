"""Answers read out of a model's text: its final number, or its program. Nothing of it is run.

`run` and the benchmarks read numbers with the same function.
"""

from ._numbers import final_number as final_number
from ._numbers import flexible_text as flexible_text
from ._numbers import number_text as number_text
from ._numbers import same_number as same_number
from ._numbers import strict_number as strict_number
from ._programs import program as program
from ._thoughts import after_thoughts as after_thoughts
from ._thoughts import answer_text as answer_text

READING = 1
"""Raised when the same text may be read as another answer: cached readings are then void."""
