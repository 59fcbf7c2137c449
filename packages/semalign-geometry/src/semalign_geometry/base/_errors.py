"""The one error that callers are meant to see."""


class SemalignError(ValueError):
    """The caller's input cannot be used: the message shows the value, what was expected and what to do."""


class ComponentError(SemalignError):
    """A component of the user or of an installed package returned an invalid result: its code must change."""


def brief(value: object) -> str:
    """A value in a message, with its type, cut short."""
    if value is None:
        return "None"
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'…' * (len(text) > 60)} of type {type(value).__name__}"
