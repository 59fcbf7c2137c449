"""A source, a target, a pairing and a transport that fit together, a store made with them, and plain forward runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from semalign_align import FinalHidden, Supervision, SupervisionSettings, TopK, supervise
from semalign_attribution import DecoderView, LayerPairing
from semalign_geometry import SemanticBasis, Transport, fit_transport
from torch import Tensor

from ..models import Example, collate, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRED = (1, 3, 3, 6)
"""Source layers of the four target layers; two target layers share one."""
SOURCE_DEPTH, SOURCE_WIDTH = 6, 48
TARGET_DEPTH, TARGET_WIDTH = 4, 32

EXACT = SupervisionSettings(output=FinalHidden(), dtype="float32")
TOP = SupervisionSettings(output=TopK(k=8), dtype="float32")


def source_model(architecture: str = "llama", *, seed: int = 100, **more: Any) -> "PreTrainedModel":
    return tiny_model(architecture, seed=seed, depth=SOURCE_DEPTH, width=SOURCE_WIDTH, **more)


def target_model(architecture: str = "llama", *, seed: int = 200, **more: Any) -> "PreTrainedModel":
    return tiny_model(architecture, seed=seed, **({"depth": TARGET_DEPTH, "width": TARGET_WIDTH} | more))


def pair(layers: Sequence[int] = PAIRED, *, source_depth: int = SOURCE_DEPTH) -> LayerPairing:
    return LayerPairing(policy="manual", source_depth=source_depth, source_layers=tuple(layers))


def transport_between(source: Any, target: Any, *, entries: Tensor | None = None) -> Transport:
    bases = [SemanticBasis.from_model(model, entries=entries) for model in (source, target)]
    return fit_transport(bases[0], bases[1], fold_gain=True)


def examples_of(lengths: Iterable[tuple[int, int]], *, seed: int = 0, vocabulary: int = 97) -> list[Example]:
    """Random tokens; (length, prompt) of each example."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(3, vocabulary, (size,), generator=generator), prompt) for size, prompt in lengths]


EXAMPLES = examples_of([(10, 3), (4, 3), (7, 2), (12, 6), (5, 1), (9, 7), (8, 4)])
"""Examples of different lengths; the second has one supervised token."""


def make_store(
    source: Any,
    target: Any,
    folder: Path,
    *,
    settings: SupervisionSettings = TOP,
    examples: Sequence[Example] = EXAMPLES,
    pairing: LayerPairing | None = None,
) -> Supervision:
    batches = [collate(examples)]
    transport = transport_between(source, target)
    return supervise(source, batches, pairing or pair(), transport, folder, settings=settings)


@dataclass(frozen=True)
class Streams:
    """A plain forward run: the residual streams h_0 … h_L, and the logits."""

    hidden: list[Tensor]
    logits: Tensor


def run_plainly(model: Any, batch: dict[str, Tensor]) -> Streams:
    """The model's own forward with one hook on each layer, gradients included where parameters want them."""
    outputs: list[Tensor] = []
    layers = DecoderView(model).layers
    first: list[Tensor] = []

    def keep_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first.append(args[0] if args else kwargs["hidden_states"])

    handles = [layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in layers]
    try:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return Streams([*first, *outputs], logits)


def supervised_of(example: Example) -> slice:
    """Where an example is supervised: from the token before the answer to the last but one."""
    ids, prompt = example
    return slice(prompt - 1, len(ids) - 1)


def tokens_of(store: Supervision, index: int, layer: int) -> Tensor:
    """y_k of one example, without padding."""
    reference = store.collate([index], layer=layer).reference
    assert reference is not None
    return reference[0]
