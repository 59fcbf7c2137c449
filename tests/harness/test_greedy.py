"""lm-eval's model writes what `generate` gives: after the end of a long prompt, and up to a stop text."""

import pytest
import torch
from lm_eval.api.instance import Instance
from semalign_harness import build_tokenizer
from semalign_harness.data.encoding import TextEncoder
from semalign_harness.evaluation._models import GreedyLM, longest_input
from semalign_harness.generation import CHECKED_EVERY, Way, end_ids, generate
from semalign_harness.models.loading import LoadedModel
from semalign_harness.models.opening import OpenedModel
from semalign_harness.models.settings import ModelConfig
from semalign_harness.reading import after_thoughts, final_number
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from tests.models import tiny_model

TOKENIZER = build_tokenizer()
MODEL = tiny_model("llama", seed=1, vocabulary=len(TOKENIZER))
SPECIAL = len(TOKENIZER.all_special_ids)


def greedy(tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> GreedyLM:
    loaded = LoadedModel(MODEL, tokenizer, "", way=Way.BATCHES)
    return GreedyLM(loaded, TextEncoder(tokenizer, chat=False), max_length=40)


def words(seed: int, count: int) -> list[int]:
    """Ids of ordinary words, which survive decoding and encoding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SPECIAL, len(TOKENIZER), (count,), generator=generator).tolist()


def requests(prompts: list[str], *, most: int, stops: tuple[str, ...] = ()) -> list[Instance]:
    settings = {"until": list(stops), "max_gen_toks": most, "do_sample": False}
    return [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]


def text_after(ids: list[int], *, most: int) -> str:
    (row,) = generate(MODEL, [ids], max_new_tokens=most, ends=end_ids(MODEL, TOKENIZER))
    return TOKENIZER.decode(row, skip_special_tokens=True)


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    ids = words(0, 60)
    assert greedy().generate_until(requests([TOKENIZER.decode(ids)], most=8)) == [text_after(ids[-32:], most=8)]


def test_without_a_limit_no_prompt_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval would take a limit from elsewhere."""
    monkeypatch.setattr(MODEL.config, "max_position_embeddings", 40)
    ids = words(0, 60)
    unlimited = GreedyLM(LoadedModel(MODEL, TOKENIZER, "", way=Way.BATCHES), TextEncoder(TOKENIZER, chat=False))
    for most in (8, 48):
        assert unlimited.generate_until(requests([TOKENIZER.decode(ids)], most=most)) == [text_after(ids, most=most)]


@pytest.mark.parametrize(("positions", "told", "limit"), [(64, 32, 64), (None, 32, 32), (None, int(1e30), None)])
def test_what_a_model_reads_is_told_by_its_configuration_else_by_its_tokenizer(
    positions: int | None, told: int, limit: int | None
) -> None:
    config, tokenizer = PreTrainedConfig(), build_tokenizer()
    tokenizer.model_max_length = told
    if positions is not None:
        config.max_position_embeddings = positions
    assert longest_input(OpenedModel(ModelConfig(path="x"), "x", None, config, tokenizer)) == limit


def test_thoughts_whose_marks_are_special_tokens_stay_apart_from_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=True)
    row = tokenizer("[THINK]The answer is 3[/THINK]The answer is 2 How many", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("semalign_harness.evaluation._models.generate", lambda *_, **__: [row])
    (text,) = greedy(tokenizer).generate_until(requests(["x"], most=8, stops=("How",)))
    assert after_thoughts(text).strip() == "The answer is 2" and final_number(text) == 2


@pytest.mark.parametrize("start", ["", "<bos>"])
def test_a_prompt_begins_with_bos_once(start: str, starting: PreTrainedTokenizerFast) -> None:
    ids = words(1, 20)
    found = greedy(starting).generate_until(requests([start + TOKENIZER.decode(ids)], most=8))
    assert found == [text_after([TOKENIZER.bos_token_id, *ids], most=8)]


def test_a_stop_text_cuts_the_answer_and_ends_it() -> None:
    prompts = [words(2, 9), words(3, 20)]
    whole = [text_after(ids, most=20) for ids in prompts]
    stop, later = (whole[0][place : place + 5] for place in (15, 30))
    told: dict[int, str] = {}
    asked = requests([TOKENIZER.decode(ids) for ids in prompts], most=20, stops=(later, stop))
    expected = [text.split(later)[0].split(stop)[0] for text in whole]
    assert expected[0] and len(whole[0]) > 35
    assert greedy().generate_until(asked, ended=told.__setitem__) == expected
    assert told == dict(enumerate(expected))

    steps: list[int] = []
    handle = MODEL.register_forward_hook(lambda *_: steps.append(1))
    try:
        greedy().generate_until(asked[:1])
    finally:
        handle.remove()
    assert len(steps) == CHECKED_EVERY, "it is not written on to the limit"


def test_every_end_of_the_model_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = words(4, 9)
    (row,) = generate(MODEL, [ids], max_new_tokens=12, ends=frozenset())
    monkeypatch.setattr(MODEL.generation_config, "eos_token_id", [TOKENIZER.eos_token_id, row[5]])
    expected = TOKENIZER.decode(row[: row.index(row[5]) + 1])
    assert greedy().generate_until(requests([TOKENIZER.decode(ids)], most=12)) == [expected] != [TOKENIZER.decode(row)]
