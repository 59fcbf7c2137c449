"""Generation in shrinking batches gives what the model gives to each prompt alone."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_harness.generation import CHECKED_EVERY, generate, left_padded

from tests.models import ARCHITECTURES, VOCABULARY, tiny_model

MODELS = {name: tiny_model(name, seed=1) for name in ARCHITECTURES}
PROMPTS = st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=5)


def alone(name: str, prompt: Sequence[int], ends: frozenset[int], most: int) -> list[int]:
    """Greedy continuation by whole forward runs, without a cache or padding."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + most:
            ids.append(int(MODELS[name](torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ARCHITECTURES)
@given(prompts=PROMPTS, ends=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=40))
def test_rows_are_what_each_prompt_gets_alone(name: str, prompts: list[list[int]], ends: frozenset[int]) -> None:
    told: dict[int, list[int]] = {}
    found = generate(
        MODELS[name], prompts, max_new_tokens=12, ends=ends, ended=lambda place, row: told.update({place: list(row)})
    )
    assert found == [told[place] for place in range(len(prompts))]
    assert found == [alone(name, prompt, ends, 12) for prompt in prompts]


@given(prompts=PROMPTS, letters=st.integers(1, 18))
def test_a_stop_rule_ends_a_row_at_the_next_look(prompts: list[list[int]], letters: int) -> None:
    whole = [alone("llama", prompt, frozenset(), 18) for prompt in prompts]
    found = generate(
        MODELS["llama"], prompts, max_new_tokens=18, ends=frozenset(), stopped=lambda row: len(row) >= letters
    )
    looked = min(18, -(-letters // CHECKED_EVERY) * CHECKED_EVERY)
    assert found == [row[:looked] for row in whole]


def test_ended_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]
    prompts = [[5], [9], [40], [77]]
    rows = [alone("llama", prompt, frozenset(), 20) for prompt in prompts]
    ends = frozenset(rows[0][:1])
    lengths = [len(alone("llama", prompt, ends, 20)) for prompt in prompts]
    assert len(set(lengths)) > 1  # some end earlier than others
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        generate(model, prompts, max_new_tokens=20, ends=ends)
    finally:
        handle.remove()
    assert sizes == [sum(length >= step for length in lengths) for step in range(1, max(lengths) + 1)]


def test_padding_goes_to_the_left() -> None:
    ids, mask = left_padded([[4, 5], [6]])
    assert ids.tolist()[0] == [4, 5] and ids[1, 1] == 6
    assert mask.tolist() == [[1, 1], [0, 1]]
