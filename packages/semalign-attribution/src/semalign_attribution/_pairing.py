"""Layer pairing: exactly one source layer for each target layer, in depth order."""

from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator
from semalign_geometry.base import ComponentError, Contract, SemalignError, Settings, brief, checked

from ._scores import LayerScores


class LayerPairing(Contract):
    """π: the source layer of each target layer; layers are counted from 1."""

    policy: str
    """Name of the policy that chose it."""
    source_depth: int = Field(ge=1)
    """L_S."""
    source_layers: tuple[int, ...] = Field(min_length=1)
    """π(1) … π(L_T): one source layer for each target layer, never decreasing; source layers may repeat."""

    @property
    def target_depth(self) -> int:
        """L_T."""
        return len(self.source_layers)

    @property
    def paired_layers(self) -> tuple[int, ...]:
        """The source layers that are paired, each once, shallow to deep."""
        return tuple(sorted(set(self.source_layers)))

    def source_of(self, target_layer: int) -> int:
        """π(k), the source layer of target layer k, both counted from 1.

        Raises:
            SemalignError: the target has no such layer.
        """
        if not 1 <= target_layer <= self.target_depth:
            raise SemalignError(
                f"target layer {target_layer} does not exist: there are layers 1 to {self.target_depth}"
            )
        return self.source_layers[target_layer - 1]

    @model_validator(mode="after")
    def _in_range_and_order(self) -> "LayerPairing":
        for number, layer in enumerate(self.source_layers, 1):
            if not 1 <= layer <= self.source_depth:
                raise ValueError(f"target layer {number} has source layer {layer}, expected 1 to {self.source_depth}")
        if list(self.source_layers) != sorted(self.source_layers):
            raise ValueError(f"source layers must not decrease with depth, got {list(self.source_layers)}")
        return self


@runtime_checkable
class PairingPolicy(Protocol):
    """Chooses the source layer of each target layer."""

    @property
    def name(self) -> str:
        """Name of the policy in results."""
        ...

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        """π(1) … π(L_T), counted from 1, never decreasing."""
        ...


class _Policy(Settings):
    kind: str

    @property
    def name(self) -> str:
        """The kind."""
        return self.kind


class Uniform(_Policy):
    """π(k) = max(1, ⌊L_S / L_T · k⌋); attribution is ignored.

    Source: v1. Deviation: each target layer has one source layer, where v1 mixes two neighbours when the depths do not
    divide.
    """

    kind: Literal["uniform"] = "uniform"
    """Chooses this policy in a configuration."""

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        """Layers at equal relative depth."""
        return tuple(max(1, scores.depth * k // target_depth) for k in range(1, target_depth + 1))


class NearestCritical(_Policy):
    """The best-scored layer ℓ* goes to the shallowest target layer k† with π(k†) ≥ ℓ*; the others as `uniform`.
    Source: v1."""

    kind: Literal["nearest_critical"] = "nearest_critical"
    """Chooses this policy in a configuration."""

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        """Uniform, with the critical layer placed exactly."""
        layers = list(Uniform()(scores, target_depth))
        critical = max(range(scores.depth), key=lambda index: scores.mean[index]) + 1
        place = next(index for index, layer in enumerate(layers) if layer >= critical)
        layers[place] = critical
        return tuple(layers)


class Monotone(_Policy):
    """The non-decreasing π that maximises Σ_k score_{π(k)} / max|score| − λ (π(k)/L_S − k/L_T)²; exact.

    Source: v2, reading ("exactly one source layer per target layer, in depth order").
    """

    kind: Literal["monotone"] = "monotone"
    """Chooses this policy in a configuration."""
    depth_weight: float = Field(100.0, ge=0, allow_inf_nan=False)
    """λ, the price of leaving the equal relative depth; 0 follows the scores alone."""

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        """By dynamic programming."""
        return _best_path([scores.mean] * target_depth, self.depth_weight)


class SimilarityPairing(_Policy):
    """`monotone` with the CKA of target layer k and source layer ℓ as the score of the pair (k, ℓ)."""

    kind: Literal["similarity"] = "similarity"
    """Chooses this policy in a configuration."""
    depth_weight: float = Field(100.0, ge=0, allow_inf_nan=False)
    """λ, as in `monotone`."""

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        """By dynamic programming over the similarity matrix."""
        if scores.similarity is None or len(scores.similarity) != target_depth:
            raise SemalignError(
                f"the similarity policy needs a row of scores for each of {target_depth} target layers, and "
                f"{scores.scorer} has none: attribute with scorer=Similarity(target)"
            )
        return _best_path(scores.similarity, self.depth_weight)


class Manual(_Policy):
    """The user's own pairing."""

    kind: Literal["manual"] = "manual"
    """Chooses this policy in a configuration."""
    layers: tuple[int, ...]
    """π(1) … π(L_T), counted from 1."""

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        """The user's own layers."""
        return self.layers

    def check(self, source_depth: int, target_depth: int) -> None:
        """Check that the pairing fits two models; scores are not needed.

        Raises:
            SemalignError: it has the wrong length, or is out of range or out of order.
        """
        _pairing(self.name, self.layers, source_depth, target_depth)


class Random(_Policy):
    """Source layers drawn at random and sorted, for ablations."""

    kind: Literal["random"] = "random"
    """Chooses this policy in a configuration."""
    seed: int = 0
    """Seed of the draw."""

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        """Drawn with replacement."""
        import torch  # for this policy alone

        generator = torch.Generator().manual_seed(self.seed)
        return tuple(sorted((torch.randint(scores.depth, (target_depth,), generator=generator) + 1).tolist()))


POLICIES: dict[str, PairingPolicy] = {
    "uniform": Uniform(),
    "nearest_critical": NearestCritical(),
    "monotone": Monotone(),
    "similarity": SimilarityPairing(),
    "random": Random(),
}
"""The policies that a name selects; `Manual` needs its layers."""


@checked
def pair_layers(scores: LayerScores, target_depth: int, *, policy: str | PairingPolicy = "monotone") -> LayerPairing:
    """Choose exactly one source layer for each target layer.

    Args:
        scores: of the source's layers.
        target_depth: L_T; may exceed the source's depth, source layers are then shared.
        policy: a name, or any `PairingPolicy`.

    Raises:
        SemalignError: unknown policy, or a pairing of the wrong length, out of range or out of order.
        ComponentError: an own policy returned no pairing.

    Example:
        >>> row = (0.1, 0.9, 0.2, 0.3, 0.8, 0.1)
        >>> scores = LayerScores(
        ...     scorer="by hand", examples=1, mean=row, standard_error=row, stability=1.0, top_frequency=row
        ... )
        >>> pair_layers(scores, target_depth=3, policy="uniform").source_layers
        (2, 4, 6)
        >>> pair_layers(scores, target_depth=3, policy=Monotone(depth_weight=1.0)).source_layers
        (2, 2, 5)

    Source: method 1, selection.
    """
    if target_depth < 1:
        raise SemalignError(f"target_depth is {target_depth}, expected at least 1")
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise SemalignError(
                f"unknown pairing policy {policy!r}: choose one of {', '.join(POLICIES)}, or pass your own"
            )
        policy = POLICIES[policy]
    return _pairing(policy.name, policy(scores, target_depth), scores.depth, target_depth)


def _pairing(policy: str, layers: Any, source_depth: int, target_depth: int) -> LayerPairing:
    if not isinstance(layers, tuple | list):
        raise ComponentError(
            f"the {policy} pairing returned {brief(layers)}: expected a tuple with a source layer for each target layer"
        )
    if len(layers) != target_depth:
        raise SemalignError(
            f"the {policy} pairing names {len(layers)} source layers for {target_depth} target layers: name one for "
            "each target layer"
        )
    data = {"policy": policy, "source_depth": source_depth, "source_layers": layers}
    return LayerPairing.parse(data, origin=f"{policy} pairing")


def _best_path(
    scores: "list[tuple[float, ...]] | tuple[tuple[float, ...], ...]", depth_weight: float
) -> tuple[int, ...]:
    """argmax over non-decreasing π of Σ_k value[k][π(k)], ties to the shallower layer; value[k][ℓ] as in `Monotone`."""
    target_depth, source_depth = len(scores), len(scores[0])
    largest = max(abs(score) for row in scores for score in row) or 1.0
    best: list[float] = [0.0] * source_depth
    came_from: list[list[int]] = []
    for k, row in enumerate(scores, 1):
        # prefix[ℓ]: where the best path up to here with a last layer ≤ ℓ ends.
        prefix, leader = [], 0
        for layer in range(source_depth):
            leader = layer if best[layer] > best[leader] else leader
            prefix.append(leader)
        deviations = [((layer + 1) / source_depth - k / target_depth) ** 2 for layer in range(source_depth)]
        best = [
            best[prefix[layer]] + row[layer] / largest - depth_weight * deviations[layer]
            for layer in range(source_depth)
        ]
        came_from.append(prefix)
    layer = max(range(source_depth), key=lambda index: best[index])
    path = []
    for prefix in reversed(came_from):
        path.append(layer + 1)
        layer = prefix[layer]
    return tuple(reversed(path))
