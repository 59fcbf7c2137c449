"""Attribution of a model on a CUDA device, from batches on the CPU."""

import pytest
import torch
from semalign_attribution import Ablation, GradientActivation, Scorer, Similarity, attribute_layers

from tests.models import random_batch, tiny_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["gradient_activation", "ablation", "similarity"])
def test_scores_on_a_device_are_those_on_the_cpu(kind: str) -> None:
    scores = []
    for device in ("cpu", "cuda"):
        source, target = (tiny_model("llama", seed=seed).to(device) for seed in (1, 2))
        scorers: dict[str, Scorer] = {
            "gradient_activation": GradientActivation(),
            "ablation": Ablation(),
            "similarity": Similarity(target),
        }
        scores.append(torch.tensor(attribute_layers(source, [random_batch(3)], scorer=scorers[kind]).mean))
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)
