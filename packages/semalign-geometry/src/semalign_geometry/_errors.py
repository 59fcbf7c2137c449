"""The one error that callers are meant to see."""


class SemalignError(ValueError):
    """The caller's input cannot be used: the message shows the value, what was expected and what to do."""


class ComponentError(SemalignError):
    """A component that does not come along returned what its sort must not return: its code must change."""


def brief(value: object) -> str:
    """A value in a message, with its type, cut short."""
    if value is None:
        return "None"
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'…' * (len(text) > 60)} of type {type(value).__name__}"
