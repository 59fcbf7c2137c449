"""The whole chain on a device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from semalign_align import FinalHidden, SupervisionSettings, TopK
from semalign_train import FrontierConfig, FrontierTrainer, FullLayer, LoraLayer, LossWeights

from ..align.chain import EXAMPLES, TARGET_DEPTH, make_store, source_model, target_model
from ..devices import ON_CUDA, elsewhere, usable

CPU = torch.device("cpu")
cuda = pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=ON_CUDA, id="cuda")])


@elsewhere
@pytest.mark.parametrize(
    ("trainable", "kept", "scratch"),
    [(FullLayer(), FinalHidden(), True), (LoraLayer(rank=4), TopK(k=8), False)],
    ids=["full, exact, in a file", "lora, top k, in memory"],
)
def test_the_losses_are_those_of_the_cpu(name: str, trainable: Any, kept: Any, scratch: bool, tmp_path: Path) -> None:
    config = FrontierConfig(
        steps=1,
        layers=(2, TARGET_DEPTH),
        batch_size=len(EXAMPLES),
        micro_batch_size=4,
        learning_rate=1e-4,
        trainable=trainable,
        train_final_norm=True,
        weights=LossWeights(geometry=1, output=1, answer=1),
    )

    def losses(device: torch.device) -> list[dict[str, float]]:
        source, target = source_model().to(device), target_model().to(device)
        settings = SupervisionSettings(output=kept, dtype="float32")
        store = make_store(source, target, tmp_path / device.type, settings=settings)
        report = FrontierTrainer(target, store, config, scratch=tmp_path if scratch else None).fit()
        assert {value.device.type for value in target.state_dict().values()} == {device.type}
        return [stage.first_losses for stage in report.stages]

    expected = losses(CPU)
    with usable(name) as device:
        for mine, theirs in zip(losses(device), expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-2, abs=1e-3)


@cuda
@pytest.mark.parametrize("trainable", [FullLayer(), LoraLayer(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("kept", [TopK(k=8), FinalHidden()], ids=["top_k", "final_hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_fit_from_end_to_end(
    device: torch.device, dtype: torch.dtype, kept: Any, trainable: Any, tmp_path: Path
) -> None:
    source, target = source_model(dtype=dtype).to(device), target_model(dtype=dtype).to(device)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    random = torch.cuda.get_rng_state()
    store = make_store(source, target, tmp_path / "store", settings=SupervisionSettings(output=kept))
    config = FrontierConfig(steps=8, batch_size=len(EXAMPLES), learning_rate=3e-3, trainable=trainable)
    report = FrontierTrainer(target, store, config, scratch=tmp_path).fit()
    assert [stage.layer for stage in report.stages] == list(range(1, TARGET_DEPTH + 1))
    first = sum(sum(stage.first_losses.values()) for stage in report.stages)
    assert sum(sum(stage.last_losses.values()) for stage in report.stages) < first
    for name, value in target.state_dict().items():
        assert value.dtype == dtype and value.is_cuda and torch.isfinite(value).all()
        assert ".layers." in name or torch.equal(value, before[name])
    assert torch.equal(torch.cuda.get_rng_state(), random)
