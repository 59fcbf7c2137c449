"""Names for annotations, without `typing`, whose import would take a quarter of the time of a short program."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any as Any
    from typing import NoReturn as NoReturn
else:
    Any = NoReturn = object
