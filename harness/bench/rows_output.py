"""Row of the output divergence: KL(p_S ‖ p_T) from final hidden states and heads, forward and backward.

Shape suffixes: N tokens, V vocabulary entries, S source width, T target width.
"""

import torch
from meter import Meter
from semalign_geometry import Head, kl_divergence
from torch import Tensor
from torch.nn.functional import kl_div


def kl_ours(meter: Meter, *, tokens: int, entries: int, source_width: int, target_width: int) -> dict[str, Tensor]:
    """In vocabulary chunks."""
    source_NS, source_VS, target_NT, target_VT = _inputs(meter, tokens, entries, source_width, target_width)
    with meter.both():
        loss = kl_divergence(source_NS, Head(source_VS), target_NT, Head(target_VT)).mean()
        loss.backward()
    assert target_NT.grad is not None
    return {"loss": loss[None], "gradient": target_NT.grad}


def kl_peer(meter: Meter, *, tokens: int, entries: int, source_width: int, target_width: int) -> dict[str, Tensor]:
    """From the full logits of both."""
    source_NS, source_VS, target_NT, target_VT = _inputs(meter, tokens, entries, source_width, target_width)
    with meter.both():
        source_NV = (source_NS @ source_VS.T).float().log_softmax(1)
        target_NV = (target_NT @ target_VT.T).float().log_softmax(1)
        loss = kl_div(target_NV, source_NV, reduction="batchmean", log_target=True)
        loss.backward()
    assert target_NT.grad is not None
    return {"loss": loss[None], "gradient": target_NT.grad}


def kl_liger(meter: Meter, *, tokens: int, entries: int, source_width: int, target_width: int) -> dict[str, Tensor]:
    """Liger's fused linear loss in chunks of tokens; at β = 0 its divergence is KL(p_S ‖ p_T)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    source_NS, source_VS, target_NT, target_VT = _inputs(meter, tokens, entries, source_width, target_width)
    labels = torch.zeros(tokens, dtype=torch.long, device=meter.device)
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    with meter.both():
        loss = fused(target_NT, target_VT, source_NS, source_VS, labels)
        loss.backward()
    assert target_NT.grad is not None
    return {"loss": loss[None], "gradient": target_NT.grad}


def _inputs(
    meter: Meter, tokens: int, entries: int, source_width: int, target_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Final hidden states and heads; logits have a standard deviation of 2. Only the target's states get a gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, width: int, scale: float) -> Tensor:
        return torch.randn(rows, width, generator=generator).mul_(scale).to(meter.device, meter.dtype)

    source_NS, source_VS = normal(tokens, source_width, 1.0), normal(entries, source_width, 2 * source_width**-0.5)
    target_NT, target_VT = normal(tokens, target_width, 1.0), normal(entries, target_width, 2 * target_width**-0.5)
    return source_NS, source_VS, target_NT.requires_grad_(True), target_VT
