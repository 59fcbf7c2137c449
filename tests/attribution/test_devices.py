"""Attribution of a model on a device, from batches on the CPU."""

import pytest
import torch
from semalign_attribution import Ablation, GradientActivation, Scorer, Similarity, attribute_layers, view_of

from ..devices import elsewhere, usable
from ..models import random_batch, tiny_model


def scores_on(device: torch.device, kind: str) -> torch.Tensor:
    source, target = (tiny_model("llama", seed=seed).to(device) for seed in (1, 2))
    scorers: dict[str, Scorer] = {
        "gradient_activation": GradientActivation(),
        "ablation": Ablation(),
        "similarity": Similarity(target),
    }
    scores = attribute_layers(source, [random_batch(3), random_batch(4)], scorer=scorers[kind])
    return torch.tensor(scores.similarity or scores.mean)


@elsewhere
@pytest.mark.parametrize("kind", ["gradient_activation", "ablation", "similarity"])
def test_scores_are_those_of_the_cpu(name: str, kind: str) -> None:
    expected = scores_on(torch.device("cpu"), kind)
    with usable(name) as device:
        torch.testing.assert_close(scores_on(device, kind), expected, rtol=1e-3, atol=1e-4)


@elsewhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_view_reads_the_model_right(name: str, dtype: torch.dtype) -> None:
    with usable(name) as device:
        view = view_of(tiny_model("gemma2", seed=1, dtype=dtype).to(device))
        view.verify()
        assert view.device.type == device.type
        hidden = view.trace(random_batch(3), keep=[2]).inputs[2]
        replayed = view.trace(random_batch(3), start=2, hidden=hidden).final
        assert replayed is not None and replayed.device.type == device.type
