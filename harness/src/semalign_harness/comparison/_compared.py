"""Settings of the methods that are compared, and those that must be equal."""

from collections.abc import Sequence

from semalign_geometry.base import SemalignError

from ..experiment import Experiment
from ..run.run_folder import differences


def overrides_of_methods(given: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Overrides of all methods, and by method those of the form `METHOD:key.key=value`.

    Raises:
        SemalignError: a method is named that is not compared; a word is no override.
    """
    shared: list[str] = []
    own: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    for text in given:
        head, colon, rest = text.partition(":")
        if not colon and "=" not in text:
            raise SemalignError(
                f"{text!r} is not an override, such as train.batch_size=8, nor a task: join methods with commas, as in "
                f"--methods {','.join([*names, text])}"
            )
        if not colon or "=" in head:
            shared.append(text)
        elif head not in own:
            raise SemalignError(f"override {text!r} is for {head!r}, which is not compared: name it among --methods")
        else:
            own[head] = (*own[head], rest)
    return shared, own


def measured_differently(one: Experiment, other: Experiment) -> list[str]:
    """Settings that differ and that make two experiments measure other models or other rows."""
    keys = [change.partition(" is ")[0] for change in differences(one, other)]
    decisive = ("source.", "target.path", "target.revision", "data.", "measure.", "chat_template", "date")
    training: tuple[str, ...] = ("data.answers", "data.writing.keep", "data.attribution_rows")
    if one.data.held_out_answers == "gold":
        training += ("data.writing",)
    return [key for key in keys if key.startswith(decisive) and not key.startswith(training)]
