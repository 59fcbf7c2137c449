"""Tiny random models of every supported architecture, and batches; transformers is imported on use only."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PADDING = 0
VOCABULARY = 97
IGNORE = -100

Example = tuple[Tensor, int]
"""Token ids of prompt and answer, and the length of the prompt."""


def _grouped(name: str, **more: Any) -> "Callable[[dict[str, Any]], PretrainedConfig]":
    """Configuration class `name` of the Llama family, with half as many key heads as query heads."""

    def build(common: dict[str, Any]) -> "PretrainedConfig":
        import transformers

        size = common["hidden_size"]
        return getattr(transformers, name)(**common, intermediate_size=size * 3 // 2, num_key_value_heads=2, **more)

    return build


def _gemma(name: str) -> "Callable[[dict[str, Any]], PretrainedConfig]":
    """Sliding and full attention in turn, a window shorter than the batches, and a soft cap that bites."""

    def build(common: dict[str, Any]) -> "PretrainedConfig":
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(common["num_hidden_layers"])]
        head = common["hidden_size"] // common["num_attention_heads"]
        more = {"head_dim": head, "sliding_window": 4, "layer_types": types, "final_logit_softcapping": 3.0}
        return _grouped(name, **more)(common)

    return build


def _gpt2(common: dict[str, Any]) -> "PretrainedConfig":
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=common["vocab_size"],
        n_embd=common["hidden_size"],
        n_layer=common["num_hidden_layers"],
        n_head=common["num_attention_heads"],
        n_positions=common["max_position_embeddings"],
        bos_token_id=1,
        eos_token_id=2,
    )


def _neox(common: dict[str, Any]) -> "PretrainedConfig":
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**common, intermediate_size=common["hidden_size"] * 2)


def _opt(common: dict[str, Any]) -> "PretrainedConfig":
    from transformers import OPTConfig

    return OPTConfig(**common, ffn_dim=common["hidden_size"] * 2, word_embed_proj_dim=common["hidden_size"])


_CONFIGURATIONS: "dict[str, Callable[[dict[str, Any]], PretrainedConfig]]" = {
    "llama": _grouped("LlamaConfig", tie_word_embeddings=False),
    "smollm": _grouped("LlamaConfig", tie_word_embeddings=True),
    "qwen2": _grouped("Qwen2Config"),
    "qwen3": _grouped("Qwen3Config", head_dim=8),
    "gemma2": _gemma("Gemma2Config"),
    "gemma3": _gemma("Gemma3TextConfig"),
    "gpt2": _gpt2,
    "pythia": _neox,
    "opt": _opt,
    "phi": _grouped("PhiConfig"),
}

ARCHITECTURES: list[str] = list(_CONFIGURATIONS)
"""The architectures that `tiny_model` builds."""


def tiny_model(
    architecture: str,
    *,
    seed: int,
    depth: int = 4,
    width: int = 32,
    vocabulary: int = VOCABULARY,
    positions: int = 64,
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    """A random model in evaluation mode; every layer, gain and bias matters, a seed gives one model.

    Args:
        architecture: one of `ARCHITECTURES`.
        seed: of the weights; they are drawn in float32, so that dtypes differ by rounding only.
        depth: layers.
        width: of the residual stream, a multiple of 8.
        vocabulary: entries of the head.
        positions: longest input, in tokens.
        dtype: of the weights.
    """
    from transformers import AutoModelForCausalLM

    common = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PADDING,
    }
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(_CONFIGURATIONS[architecture](common), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.dim() > 1 else parameter.float() + noise)
    return model.eval()


def random_examples(seed: int, *, examples: int = 3, length: int = 10, vocabulary: int = VOCABULARY) -> list[Example]:
    """Random examples; the first has the given length, the others are shorter."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    result = []
    for index in range(examples):
        size = length if index == 0 else number(3, length - 1)
        ids = torch.randint(3, vocabulary, (size,), generator=generator)
        result.append((ids, number(1, size - 1)))
    return result


def collate(examples: Sequence[Example], *, length: int | None = None) -> dict[str, Tensor]:
    """A batch padded on the right to the longest example, or to `length`; the answers are supervised."""
    length = length or max(len(ids) for ids, _ in examples)
    batch = {
        "input_ids": torch.full((len(examples), length), PADDING),
        "attention_mask": torch.zeros((len(examples), length), dtype=torch.long),
        "labels": torch.full((len(examples), length), IGNORE),
    }
    for row, (ids, prompt) in enumerate(examples):
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, prompt : len(ids)] = ids[prompt:]
    return batch


def random_batch(seed: int, *, examples: int = 3, length: int = 10, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """`random_examples` as one batch, padded on the right."""
    return collate(random_examples(seed, examples=examples, length=length, vocabulary=vocabulary))
