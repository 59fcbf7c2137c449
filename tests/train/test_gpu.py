"""The whole chain on a CUDA device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from semalign_align import FinalHidden, SupervisionSettings, TopK, supervise
from semalign_train import FrontierTrainer, FullLayer, LoraLayer, TransferConfig

from ..align.chain import EXAMPLES, TARGET_DEPTH, pair, source_model, target_model, transport_between
from ..models import collate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("trainable", [FullLayer(), LoraLayer(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("kept", [TopK(k=8), FinalHidden()], ids=["top_k", "final_hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_fit_from_end_to_end(dtype: torch.dtype, kept: Any, trainable: Any, tmp_path: Path) -> None:
    source, target = source_model(dtype=dtype).to("cuda"), target_model(dtype=dtype).to("cuda")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    transport = transport_between(source, target)
    settings = SupervisionSettings(output=kept)
    store = supervise(source, [collate(EXAMPLES)], pair(), transport, tmp_path / "store", settings=settings)
    config = TransferConfig(steps=8, batch_size=len(EXAMPLES), learning_rate=3e-3, trainable=trainable)
    report = FrontierTrainer(target, store, config, scratch=tmp_path).fit()
    assert [stage.layer for stage in report.stages] == list(range(1, TARGET_DEPTH + 1))
    first = sum(sum(stage.first_losses.values()) for stage in report.stages)
    assert sum(sum(stage.last_losses.values()) for stage in report.stages) < first
    for name, value in target.state_dict().items():
        assert value.dtype == dtype and value.is_cuda and torch.isfinite(value).all()
        assert ".layers." in name or torch.equal(value, before[name])


def test_the_store_is_that_of_the_cpu(tmp_path: Path) -> None:
    source, target = source_model(), target_model()
    transport = transport_between(source, target)
    settings = SupervisionSettings(output=FinalHidden(), dtype="float32")
    stores = [
        supervise(source.to(device), [collate(EXAMPLES)], pair(), transport, tmp_path / device, settings=settings)
        for device in ("cpu", "cuda")
    ]
    everything = range(len(EXAMPLES))
    for layer in range(1, TARGET_DEPTH + 1):
        on_cpu, on_gpu = (store.collate(everything, layer=layer) for store in stores)
        torch.testing.assert_close(on_gpu.reference, on_cpu.reference, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(on_gpu.output.hidden, on_cpu.output.hidden, rtol=1e-2, atol=1e-2)
