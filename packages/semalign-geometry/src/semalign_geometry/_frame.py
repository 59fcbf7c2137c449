"""Frames by name: the powers of each; their maths is in `_frames.py`."""

from dataclasses import dataclass

from .base import Components


@dataclass(frozen=True)
class Frame:
    """A frame on the rows of a head; write your own by choosing the powers.

    With W the head over v entries and G = WᵀW, a frame has the analysis rows A and the synthesis columns S

        coefficients a = A r,   A = N⁻¹ W G^(−analysis)          (v, d)
        recomposed r̃ = S a,     S = G^(−synthesis) Wᵀ N⁻¹        (d, v)

    with N = diag(‖column of B = W⁺‖) for unit columns, else the identity. The three published and measured frames:

        cosine     B̂ᵀ r/‖r‖            B̂ a           v1 eq. 1–2
        dual       W r                 W⁺ a          ACL, "target-space aligned logits"
        parseval   W G^(−½) r          G^(−½)Wᵀ a    ours: a tight frame, S = Aᵀ, S A = I
    """

    name: str
    """Name in configurations and results."""
    analysis: float
    """Power p of A = W G^(−p)."""
    synthesis: float
    """Power q of S = G^(−q) Wᵀ."""
    unit: bool = False
    """Whether the columns of the basis, and the vector itself, are scaled to unit length first."""


FRAMES = {
    frame.name: frame
    for frame in (Frame("cosine", 1.0, 1.0, unit=True), Frame("dual", 0.0, 1.0), Frame("parseval", 0.5, 0.5))
}
"""Built-in frames, by name."""
KNOWN_FRAMES = Components(
    "semalign.frames",
    "frame",
    FRAMES,
    expected="Frame",
    fits=lambda given: isinstance(given, Frame),
    name_of=lambda frame: frame.name,
)
"""All frames by name, those of installed packages included."""


def find_frame(frame: str | Frame) -> Frame:
    """A frame by name; a `Frame` passes through.

    Raises:
        SemalignError: unknown name.
    """
    return frame if isinstance(frame, Frame) else KNOWN_FRAMES.find(frame)
