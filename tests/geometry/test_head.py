"""Reading head and gain from models, and the logits that a head makes."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import Head, SemanticBasis, accumulation_dtype, final_norm, norm_gain
from semalign_geometry.base import SemalignError
from torch import Tensor, nn
from torch.testing import assert_close

from .strategies import dense_logits, normal, output_heads, seeds

widths = st.integers(2, 9)


class RmsNorm(nn.Module):
    """x / rms(x) · (offset + weight), computed in float32 as language models do."""

    def __init__(self, weight: Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (wide * (self.offset + self.weight.float())).to(x.dtype)


class Decoder(nn.Module):
    def __init__(self, width: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.first_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([nn.Linear(width, width)])
        if norm is not None:
            self.norm = norm
        else:
            del self.first_norm


class Model(nn.Module):
    """The few methods of a causal language model that are read."""

    def __init__(self, width: int, norm: nn.Module | None, *, bias: bool = False, **config: float) -> None:
        super().__init__()
        self.decoder = Decoder(width, norm)
        self.head = nn.Linear(width, 7, bias=bias)
        self.config = SimpleNamespace(**config)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_decoder(self) -> nn.Module:
        return self.decoder


def norm_of(kind: str, gain: Tensor, dtype: torch.dtype, seed: int) -> nn.Module:
    """A norm with this gain."""
    if kind == "rms":
        return RmsNorm(gain.to(dtype))
    if kind == "one plus":
        return RmsNorm((gain - 1).to(dtype), offset=1.0)
    norm = nn.LayerNorm(len(gain), dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(gain)
        norm.bias.copy_(normal(seed, len(gain)))
    return norm


@given(
    st.sampled_from(["rms", "one plus", "layer"]),
    widths,
    seeds,
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_gain_is_measured_for_every_kind_of_norm(kind: str, width: int, seed: int, dtype: torch.dtype) -> None:
    gain = normal(seed, width).float()
    measured = norm_gain(norm_of(kind, gain, dtype, seed + 1), width)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-5
    assert measured.dtype == torch.float32
    assert_close(measured, gain, rtol=tolerance, atol=tolerance)


@given(widths, seeds, st.booleans())
def test_basis_from_model_folds_the_final_norm(width: int, seed: int, layer_norm: bool) -> None:
    gain = normal(seed, width).float()
    model = Model(width, norm_of("layer" if layer_norm else "one plus", gain, torch.float32, seed))
    entries = torch.tensor([5, 0, 3, 2])
    basis = SemanticBasis.from_model(model, entries=entries)
    assert basis.gain is not None
    assert_close(basis.gain, gain.double(), rtol=1e-4, atol=1e-4)
    assert_close(torch.cat(list(basis.rows())), model.head.weight.detach()[entries].to(basis.dtype))
    assert not basis.weight.requires_grad
    assert basis.weight.data_ptr() == model.head.weight.data_ptr()


def test_final_norm_is_the_last_of_the_decoder() -> None:
    norm = nn.LayerNorm(4)
    assert final_norm(Model(4, norm)) is norm


def test_models_without_final_norm_or_head_are_refused() -> None:
    with pytest.raises(SemalignError, match="no final norm with a weight of width 4 was found in the decoder of Model"):
        final_norm(Model(4, None))
    with pytest.raises(SemalignError, match="Linear has no language-model head"):
        Head.from_model(nn.Linear(2, 2))


def test_head_reads_what_the_model_does_to_its_logits() -> None:
    plain = Head.from_model(Model(4, None))
    assert (plain.bias, plain.scale, plain.softcap) == (None, 1.0, None)
    full = Model(4, None, bias=True, logits_scaling=8.0, final_logit_softcapping=30.0)
    head = Head.from_model(full)
    assert (head.scale, head.softcap) == (0.125, 30.0)
    assert head.bias is not None and not head.bias.requires_grad
    assert_close(head.bias, full.head.bias.detach())
    assert Head.from_model(Model(4, None, logit_scale=0.25)).scale == 0.25


@given(output_heads(6, 3), seeds, st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_logits_of_rows_and_of_selected_entries(head: Head, seed: int, ids: list[int]) -> None:
    hidden = normal(seed, 2, 4, 3)
    logits = dense_logits(hidden, head)
    assert_close(head.logits(hidden), logits)
    assert_close(head.logits(hidden, slice(2, 5)), logits[..., 2:5])
    assert_close(head.select(torch.tensor(ids)).logits(hidden), logits[..., ids])


def test_select_of_the_first_rows_is_a_view() -> None:
    head = Head(normal(0, 5, 2), bias=normal(1, 5))
    assert head.select(torch.arange(3)).weight.data_ptr() == head.weight.data_ptr()


@given(seeds)
def test_bfloat16_logits_come_in_float32_also_under_autocast(seed: int) -> None:
    head = Head(normal(seed, 5, 3).bfloat16())
    hidden = normal(seed, 2, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.float16):
        logits = head.logits(hidden)
    assert logits.dtype == torch.float32
    assert_close(logits, (hidden @ head.weight.T).float(), rtol=0, atol=0)


def test_accumulation_dtype() -> None:
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert accumulation_dtype(half) == accumulation_dtype(half, single) == torch.float32
    assert accumulation_dtype(half, double) == torch.float64
