"""Generation in batches that shrink: a row that has ended costs nothing while the others go on."""

import inspect
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

GENERATION = 2
"""Raised when the same prompt may get another text: answers that were kept are then asked for again."""
CHECKED_EVERY = 8
"""Steps between two looks at the text of a row, which a stop rule may have ended."""


def likeliest(logits_BV: Tensor, rows: list[int]) -> Tensor:
    """The likeliest entry of each row."""
    return logits_BV.argmax(-1)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: frozenset[int],
    stopped: Callable[[list[int]], bool] = lambda row: False,
    ended: Callable[[int, list[int]], None] = lambda place, row: None,
    pick: Callable[[Tensor, list[int]], Tensor] = likeliest,
) -> list[list[int]]:
    """The likeliest token after each prompt, or the one that `pick` takes, again and again.

    Law: a row is what the model gives to its prompt alone, whatever else is in the batch, up to rounding: where two
    tokens are equally likely within it, another batch may choose the other. Settings of sampling or penalties that come
    with a checkpoint play no part.

    Args:
        model: in evaluation mode.
        prompts: token ids, one token at least.
        max_new_tokens: most tokens of a row.
        ends: token ids that end a row; see `end_ids`.
        stopped: whether the tokens of a row so far end it; asked every `CHECKED_EVERY` tokens.
        ended: told of each prompt's place and its new tokens when its row leaves the batch.
        pick: the next token of each row, of logits (b, v) and the places of the rows' prompts.

    Returns:
        The new tokens of each prompt, the ending one included.
    """
    found: list[list[int]] = [[] for _ in prompts]
    ids_BN, mask_BN = left_padded(prompts)
    ids_BN, mask_BN = ids_BN.to(model.device), mask_BN.to(model.device)
    positions_BN = (mask_BN.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    for step in range(1, max_new_tokens + 1):
        logits_BV = model(
            input_ids=ids_BN,
            attention_mask=mask_BN,
            position_ids=positions_BN,
            use_cache=True,
            logits_to_keep=1,
            **{named: cache},
        ).logits[:, -1]
        chosen_B = pick(logits_BV, rows)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            found[row].append(token)
        looked = step % CHECKED_EVERY == 0
        going = []
        for place, row in enumerate(rows):
            if step == max_new_tokens or found[row][-1] in ends or (looked and stopped(found[row])):
                ended(row, found[row])
            else:
                going.append(place)
        if not going:
            break
        ids_BN, positions_BN = chosen_B[:, None], positions_BN[:, -1:] + 1
        mask_BN = torch.cat([mask_BN, mask_BN.new_ones(len(rows), 1)], dim=1)
        if len(going) < len(rows):
            kept = torch.tensor(going, device=model.device)
            cache.batch_select_indices(kept)
            ids_BN, positions_BN, mask_BN = ids_BN[kept], positions_BN[kept], mask_BN[kept]
            rows = [rows[place] for place in going]
    return found


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token id that ends a text of this model."""
    settings = model.generation_config
    configured = settings.eos_token_id if settings is not None else None
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*several, tokenizer.eos_token_id] if isinstance(token, int))


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Rows of token ids with their ends aligned, and which places are real."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side="left")
    return ids, mask
