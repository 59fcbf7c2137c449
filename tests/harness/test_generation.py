"""Generation gives what the model gives to each prompt alone without a cache, and models that do not are found."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry.base import SemalignError
from semalign_harness.generation import (
    ANSWER_LENGTHS,
    CHECKED_EVERY,
    PROMPT_LENGTHS,
    Way,
    _given_rows,
    check_generation,
    generate,
    left_padded,
)
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from tests.models import ARCHITECTURES, VOCABULARY, tiny_model

MODELS = {name: tiny_model(name, seed=1) for name in ARCHITECTURES}
PROMPTS = st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=5)


HYBRIDS = (
    "bamba", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2",
    "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "zamba2",
)  # fmt: skip


def alone(name: str, prompt: Sequence[int], ends: frozenset[int], most: int) -> list[int]:
    """Greedy continuation of one of `MODELS`."""
    return by_whole_runs(MODELS[name], prompt, ends, most)


def by_whole_runs(model: PreTrainedModel, prompt: Sequence[int], ends: frozenset[int], most: int) -> list[int]:
    """Greedy continuation by whole forward runs, without a cache or padding."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + most:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
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


@pytest.mark.parametrize("family", [*HYBRIDS, "minimax"])
def test_state_spaces_and_hybrids_generate_right_when_rows_end_apart(family: str, builder: ModuleType) -> None:
    model = builder.tiny_model(family)
    way = check_generation(model)
    assert way is (Way.ALONE if family == "minimax" else Way.BATCHES)
    prompts = [[40, 41, 42], list(range(100, 118)), [7] * 9]
    ends = frozenset(by_whole_runs(model, prompts[1], frozenset(), 3)[-1:])
    found = generate(model, prompts, max_new_tokens=7, ends=ends, way=way)
    assert found == [by_whole_runs(model, prompt, ends, 7) for prompt in prompts]
    assert len({len(row) for row in found}) > 1


@given(entries=st.integers(5, 400))
def test_given_answers_end_where_they_are_meant_to(entries: int) -> None:
    prompts, answers = _given_rows(entries)
    assert (tuple(map(len, prompts)), tuple(map(len, answers))) == (PROMPT_LENGTHS, ANSWER_LENGTHS)
    ends = {answer[-1] for answer in answers}
    assert not ends & {token for answer in answers for token in answer[:-1]}
    tokens = {token for row in (*prompts, *answers) for token in row}
    assert tokens <= set(range(entries // 10, entries - entries // 10))


@pytest.mark.parametrize("entries", [5, 30, 55, 56])
def test_models_of_few_entries_are_checked_too(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of proteins and DNA are, which have about thirty."""
    model = tiny_model("llama", seed=1, vocabulary=entries)
    assert check_generation(model) is Way.BATCHES
    monkeypatch.setattr(DynamicCache, "reorder_cache", keeps_rows)
    assert check_generation(model) is Way.ALONE


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_with_common_caches_generate_in_batches(name: str, dtype: torch.dtype) -> None:
    assert check_generation(tiny_model(name, seed=2, dtype=dtype)) is Way.BATCHES


def test_a_model_that_swallows_its_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Mamba did while its cache came under another name: from the second token on it saw one token."""
    model = tiny_model("llama", seed=1)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda past_key_values=None, **inputs: forward(**inputs))
    with pytest.raises(SemalignError, match="^LlamaForCausalLM does not compute with its cache what it computes with"):
        check_generation(model)


def test_a_check_leaves_the_model_as_found() -> None:
    model = tiny_model("llama", seed=1).train()
    state, settings = torch.get_rng_state(), model.generation_config
    check_generation(model)
    assert model.training and model.generation_config is settings
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def unable(cache: DynamicCache, kept: torch.Tensor) -> None:
    raise NotImplementedError


def keeps_rows(cache: DynamicCache, kept: torch.Tensor) -> None:
    """The wrong rows leave."""
    order = torch.arange(len(kept))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[order], layer.values[order]


@pytest.mark.parametrize("reorder", [unable, keeps_rows])
def test_a_cache_that_cannot_drop_rows_generates_row_by_row(
    reorder: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicCache, "reorder_cache", reorder)
    assert check_generation(MODELS["llama"]) is Way.ALONE


def test_a_model_that_ignores_padding_generates_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", seed=1)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda attention_mask=None, **inputs: forward(**inputs))
    assert check_generation(model) is Way.ALONE


@given(prompts=PROMPTS, ends=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=40))
def test_row_by_row_gives_the_same(prompts: list[list[int]], ends: frozenset[int]) -> None:
    told: list[tuple[int, list[int]]] = []
    found = generate(
        MODELS["qwen2"],
        prompts,
        max_new_tokens=9,
        ends=ends,
        way=Way.ALONE,
        stopped=lambda row: True,
        ended=lambda place, row: told.append((place, row)),
    )
    assert found == [alone("qwen2", prompt, ends, 9)[:CHECKED_EVERY] for prompt in prompts]
    assert told == list(enumerate(found)), "each as soon as it is complete"


def test_row_by_row_picks_as_it_is_told_and_ignores_the_settings_of_the_checkpoint() -> None:
    model = tiny_model("llama", seed=1)
    settings = GenerationConfig(repetition_penalty=9.0, do_sample=True, temperature=3.0, eos_token_id=5, min_length=30)
    model.generation_config = settings
    asked: dict[str, Any] = {"max_new_tokens": 8, "ends": frozenset(), "way": Way.ALONE}
    assert generate(model, [[5], [9, 10]], **asked) == [
        alone("llama", prompt, frozenset(), 8) for prompt in ([5], [9, 10])
    ]
    assert model.generation_config is settings

    def second(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return logits.topk(2).indices[:, 1]

    in_batches = generate(model, [[5], [9, 10]], **asked | {"way": Way.BATCHES}, pick=second)
    assert generate(model, [[5], [9, 10]], **asked, pick=second) == in_batches
