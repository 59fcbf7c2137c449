"""Judge programs that a model wrote: confined processes, and a verdict out of their reach."""

from ._judge import Level as Level
from ._judge import Limits as Limits
from ._judge import Program as Program
from ._judge import Reason as Reason
from ._judge import Verdict as Verdict
from ._judge import judge as judge
from ._judge import probe as probe

__all__ = ["Level", "Limits", "Program", "Reason", "Verdict", "judge", "probe"]
