"""The one error that callers are meant to see."""


class SemalignError(ValueError):
    """The caller's input cannot be used: the message shows the value, what was expected and what to do."""
