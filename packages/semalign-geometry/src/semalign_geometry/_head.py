"""The output head of a causal language model: its weights, its logit post-processing, the gain that feeds it."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .base import SemalignError, checked, short_repr
from .base._checked import ParametersT, ResultT, check


@dataclass(frozen=True, eq=False)
class Head:
    """LM head: logits = softcap(scale · (hidden Wᵀ + bias)).

    The hidden states are the ones that the model feeds its head: after the final norm. A logit of −∞, as from a
    bias of −∞, is an entry of probability 0; any other number that is not finite makes its token's results NaN.
    """

    weight: Float[Tensor, "v d"]
    """W, one row for each vocabulary entry; a reference to the model's own tensor, or rows of it."""
    bias: Float[Tensor, " v"] | None = None
    """Added to the product, if the model has one."""
    scale: float = 1.0
    """Factor on the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""
    softcap: float | None = None
    """c of c·tanh(logits / c), as in Gemma 2."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        """Refuse a weight or bias that is no tensor."""
        check("weight", self.weight, Float[Tensor, "v d"])
        check("bias", self.bias, Float[Tensor, " v"], type(None))

    @classmethod
    def from_model(cls, model: nn.Module) -> "Head":
        """Read the head of a transformers causal LM.

        Raises:
            SemalignError: the model has no output embeddings.
        """
        find: Any = getattr(model, "get_output_embeddings", None)
        module = find() if callable(find) else None
        if module is None:
            raise SemalignError(f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM")
        config: Any = getattr(model, "config", None)
        scaling = getattr(config, "logits_scaling", None)
        return cls(
            weight=module.weight.detach(),
            bias=None if getattr(module, "bias", None) is None else module.bias.detach(),
            scale=1.0 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0,
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    @property
    def count(self) -> int:
        """Number of vocabulary entries."""
        return len(self.weight)

    @checked
    def select(self, ids: Int[Tensor, " e"]) -> "Head":
        """The head over the vocabulary entries `ids`, (e,), only; a view when they are the first rows in order."""
        bias = None if self.bias is None else select_rows(self.bias, ids)
        return replace(self, weight=select_rows(self.weight, ids), bias=bias)

    def to(self, device: torch.device) -> "Head":
        """The head on a device; of the same tensors where they lie there."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    @checked
    def logits(self, hidden: Float[Tensor, "*n d"], rows: slice = slice(None)) -> Float[Tensor, "*n w"]:
        """Logits in float32 (float64 for float64 heads) of some vocabulary rows; the product runs in W's dtype.

        Args:
            hidden: (…, d), what the model feeds its head.
            rows: the vocabulary entries, w of them; all by default.
        """
        weight_WD = self.weight[rows]
        with torch.autocast(hidden.device.type, enabled=False):
            product = (hidden.to(weight_WD.dtype) @ weight_WD.T).to(accumulation_dtype(weight_WD))
        return self.process(product, None if self.bias is None else self.bias[rows])

    def process(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """What the head makes of the product of hidden states and weights, in its dtype."""
        if bias is not None:
            product = product + bias
        if self.scale != 1:
            product = self.scale * product
        return product if self.softcap is None else self.softcap * torch.tanh(product / self.softcap)

    def log_probs(self, hidden: Float[Tensor, "n d"], *, temperature: float = 1.0) -> Float[Tensor, "n v"]:
        """Log-probabilities of all entries; plain torch, differentiable in the hidden states and in the head.

        Args:
            hidden: (n, d), what the model feeds its head.
            temperature: divides the logits.

        Returns:
            (n, v) float32 (float64 for a float64 head).
        """
        return (self.logits(hidden) / temperature).log_softmax(1)


def select_rows(matrix: Tensor, ids: Int[Tensor, " e"]) -> Tensor:
    """Rows of a matrix; a view, without a copy, when `ids` are 0, 1, 2, …"""
    ids = ids.to(matrix.device)
    if torch.equal(ids, torch.arange(len(ids), device=ids.device)):
        return matrix[: len(ids)]
    return matrix[ids]


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: what sums and products of them are accumulated in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def least_size(dtype: torch.dtype) -> float:
    """Size below which a vector counts as zero: the gradient of a direction, 1/size, would leave the dtype's range."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def full_precision(function: Callable[ParametersT, ResultT]) -> Callable[ParametersT, ResultT]:
    """Run a function outside of its caller's autocast, so that it computes in the dtypes that it promises."""

    @functools.wraps(function)
    def call(*args: ParametersT.args, **kwargs: ParametersT.kwargs) -> ResultT:
        with ExitStack() as stack:
            for device_type in ("cpu", "cuda", "xpu", "mps"):
                if torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **kwargs)

    return call


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: where it lies, or on the CPU if its device has no float64 (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def decoder_of(model: nn.Module) -> nn.Module:
    """Find the part of a transformers causal LM below its head; a model without `get_decoder` is its own."""
    find: Any = getattr(model, "get_decoder", None)
    decoder: nn.Module = find() if callable(find) else model
    if decoder is not model:
        return decoder
    # Llama 4's prefix names no attribute of it, and then transformers returns the whole model.
    inner = [child for child in model.children() if callable(getattr(child, "get_decoder", None))]
    return inner[0] if len(inner) == 1 else model


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the head of a transformers causal LM.

    It is taken to be the last direct child of the decoder with a one-dimensional weight of the model's width, whatever
    the child is called.

    Raises:
        SemalignError: the decoder has none (an encoder, a post-norm decoder, a norm without a weight as in OLMo 1).
    """
    decoder = decoder_of(model)
    width = Head.from_model(model).weight.shape[1]
    norms = [
        child for child in decoder.children() if getattr(getattr(child, "weight", None), "shape", None) == (width,)
    ]
    if not norms:
        raise SemalignError(
            f"no final norm with a weight of width {width} was found in the decoder of {type(model).__name__}: "
            "a decoder-only model with such a norm is needed"
        )
    found: nn.Module = norms[-1]
    return found


@torch.no_grad()
@checked
@full_precision
def norm_gain(norm: nn.Module, width: int) -> Float[Tensor, " d"]:
    """Effective gain g of an RMSNorm or LayerNorm, measured: norm(x) − norm(−x) = 2 g ⊙ x / rms(x) for zero-mean x.

    Measuring covers the (1 + weight) of Gemma and norms with a bias alike.

    Args:
        norm: the norm.
        width: d, the model's width.

    Returns:
        (d,) float32.

    Raises:
        SemalignError: the gain is not finite.
    """
    parameter = next(norm.parameters())
    signs = torch.ones(width, dtype=torch.float32)
    signs[1::2] = -1.0
    if width % 2:  # +1, −1, …, then +1, +1, −2: zero mean without a zero entry
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0])
    # Powers of two are exact in bfloat16; the size makes the norm's epsilon vanish.
    probe = (1024.0 * signs).to(parameter.device, parameter.dtype)
    rms = probe.float().square().mean().sqrt()
    gain: Tensor = (norm(probe).float() - norm(-probe).float()) * rms / (2 * probe.float())
    if not torch.isfinite(gain).all():
        raise SemalignError("the gain of the final norm is not finite: the checkpoint is damaged, fetch it again")
    return gain
