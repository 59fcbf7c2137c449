"""lm-eval's transformers model, generating with `semalign_harness.generation`."""

import torch
from jaxtyping import Int
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..generation import end_ids, generate


class GreedyLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """Generates greedily in batches that shrink."""

    def _model_generate(
        self,
        context: Int[Tensor, "b n"],
        max_length: int,
        stop: list[str],
        *,
        attention_mask: Int[Tensor, "b n"],
        do_sample: bool = False,
        temperature: float = 0.0,
    ) -> Int[Tensor, "b m"]:
        """Left-padded prompts with what the model adds to them, padded on the right."""
        assert not do_sample and not temperature, "no benchmark here samples"

        def stopped(row: list[int]) -> bool:
            text = self.tok_decode(row)
            return any(rule in text for rule in stop)

        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True)]
        rows = generate(
            self.model,
            prompts,
            max_new_tokens=max_length - context.shape[1],
            ends=end_ids(self.model, self.tokenizer),
            stopped=stopped,
        )
        added = pad_sequence([torch.tensor(row) for row in rows], True, self.tokenizer.pad_token_id)
        return torch.cat([context, added.to(context.device)], dim=1)
