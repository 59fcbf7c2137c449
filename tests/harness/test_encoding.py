"""One way from text to token ids: a run trains on what is evaluated, whatever the tokenizer and the template."""

import datetime
import functools
import inspect
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM
from semalign_geometry.base import SemalignError
from semalign_harness import build_tokenizer, encode_rows, load_experiment
from semalign_harness.cli.main import main
from semalign_harness.comparison import _evaluations as comparing
from semalign_harness.comparison._compared import measured_differently
from semalign_harness.data.encoding import ENCODING, Conversation, TextEncoder
from semalign_harness.data.rows import encode_row, split_rows
from semalign_harness.data.settings import CLOCK, DAY, RESERVED, DataConfig, RowsConfig
from semalign_harness.evaluation import EvaluationConfig, evaluate, read_evaluation
from semalign_harness.evaluation import _run as runner
from semalign_harness.evaluation._agreement import Text, gold_example
from semalign_harness.evaluation._journaled import JournaledLM
from semalign_harness.evaluation._models import GreedyLM, Models, vllm_model
from semalign_harness.experiment import Experiment
from semalign_harness.models.opening import open_model
from semalign_harness.models.settings import ModelConfig
from semalign_harness.report._protocol import evaluation_blocks, experiment_facts
from semalign_harness.results.comparison import Benchmarks
from semalign_harness.run.inputs import read_inputs
from semalign_harness.run.phase_cache import phase_key
from semalign_harness.run.pipeline import environment_of
from semalign_harness.util.console import Console
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.harness.test_benchmarks import ROWS
from tests.models import tiny_model

PLAIN = None
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURNS + ASKS
BEGINS = "{{ bos_token }}" + CHATML
TRIMS = CHATML.replace("m.content", "m.content | trim")
ENDS_TWICE = CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Writes thoughts before the last answer, and empty ones into a prompt without thinking, as Qwen3's does."""
CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% if 'tool_calls' in m %}<call>{{ m.tool_calls | tojson }}{% endif %}"
)
READS_CLOCK = "{{ strftime_now('%d %b %Y') }} " + CHATML
NONE_OF_BOTH, BOTH = "$A", "<s> $A </s>"
ADDED = {"nothing": NONE_OF_BOTH, "BOS": "<s> $A", "EOS": "$A </s>", "both": BOTH}
TEMPLATES = {"plain": PLAIN, "chatml": CHATML, "begins": BEGINS, "trims": TRIMS, "thinks": THINKS, "llama": LLAMA}

texts = st.text(st.sampled_from("ab <>/|.\n\u00e9\U0001f642"), min_size=1, max_size=12)
"""Texts without a special token but by rare chance."""


@functools.cache
def tokenizer_of(template: str | None = PLAIN, added: str = BOTH) -> PreTrainedTokenizerFast:
    """A token for every byte, special tokens, and what is put around every plain text."""
    backend = Tokenizer(BPE({letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=added, special_tokens=ids)
    return tokenizer


def lm_of(encoder: TextEncoder) -> GreedyLM:
    """lm-eval's model as far as it turns texts into ids."""
    lm: GreedyLM = object.__new__(GreedyLM)
    lm.encoder, lm.backend = encoder, "causal"
    return lm


def row_of(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return {"messages": messages}


@pytest.mark.parametrize("template", TEMPLATES)
@given(added=st.sampled_from(sorted(ADDED)), question=texts, answer=texts)
def test_a_prompt_is_the_same_wherever_it_is_read(template: str, added: str, question: str, answer: str) -> None:
    assume(answer.strip() and not {"</s>", "<s>"} & {question, answer})
    tokenizer = tokenizer_of(TEMPLATES[template], ADDED[added])
    encoder = TextEncoder(tokenizer, options={"enable_thinking": False})
    example = encode_row(1, row_of(question, answer), encoder, RowsConfig(path="rows"))
    lm, prompt = lm_of(encoder), encoder.prompt([{"role": "user", "content": question}])
    assert tuple(lm.tok_encode(prompt)) == example.prompt_ids
    assert tuple(lm._encode_pair(prompt, answer)[0]) == example.prompt_ids
    assert gold_example(Text(prompt, answer), encoder, None).prompt_ids == example.prompt_ids

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert example.prompt_ids[-1] != eos
    begins = template == "begins" or (template == "plain" and "<s>" in ADDED[added])
    assert list(example.prompt_ids).count(bos) == begins and (not begins or example.prompt_ids[0] == bos)
    end = tokenizer.convert_tokens_to_ids("</s>" if template in ("plain", "llama") else "<|im_end|>")
    assert list(example.answer_ids).count(end) == 1 and example.answer_ids[-1] == end
    decoded = tokenizer.decode(example.answer_ids)
    assert answer.strip() in decoded and (template != "plain" or decoded == answer + "</s>")


@pytest.mark.parametrize("added", ADDED)
def test_what_stands_before_a_text_is_known_also_where_the_text_is_the_same_token(added: str) -> None:
    backend = Tokenizer(BPE({"<s>": 0, "</s>": 1}, [], unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<s>")
    ids = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=ADDED[added], special_tokens=ids)
    assert TextEncoder(tokenizer).start == ((0,) if "<s>" in ADDED[added] else ())


@pytest.mark.parametrize("added", ADDED)
def test_letters_are_compared_and_not_what_a_tokenizer_puts_behind_them(added: str) -> None:
    tokenizer = tokenizer_of(CHATML, ADDED[added])
    encoder = TextEncoder(tokenizer)
    lm = object.__new__(JournaledLM)
    lm._encoder = encoder
    prompt = lm.apply_chat_template([{"role": "user", "content": "1 + 1?"}])
    for letter in " A", " B":
        context, continuation = lm_of(encoder)._encode_pair(prompt, letter)
        assert tokenizer.decode(context) == prompt and tokenizer.decode(continuation) == letter
        assert lm.tokens((prompt, letter)) == len(context) + len(continuation) - 1


def test_the_beginning_of_an_answer_follows_the_generation_prompt() -> None:
    lm = object.__new__(JournaledLM)
    lm._encoder = TextEncoder(tokenizer_of(THINKS), options={"enable_thinking": False})
    question = {"role": "user", "content": "1 + 1?"}
    whole = lm.apply_chat_template([question])
    assert whole.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    begun = [question, {"role": "assistant", "content": "The answer is:"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == whole + "The answer is:"


def test_vllm_is_given_the_same_ids(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class VLLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
        backend = "causal"

        def __init__(self, place: str, **settings: Any) -> None:
            """Loads nothing."""

        def tok_encode(self, string: str, **settings: Any) -> list[int]:
            raise AssertionError

    VLLM.__abstractmethods__ = frozenset()
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=VLLM))
    encoder = TextEncoder(tokenizer_of(CHATML))
    opened = open_model(ModelConfig(path=str(pair[1])))
    lm: Any = vllm_model(Models(opened, None, None, encoder, torch.device("cpu")))
    assert isinstance(lm, VLLM) and lm.tok_encode(("a", "bc")) == [encoder.ids("a"), encoder.ids("bc")]
    assert lm._encode_pair("a", " b") == encoder.pair_ids("a", " b")


@pytest.mark.parametrize(
    ("template", "answer", "text"),
    [
        (PLAIN, "a </s>b</s> c", "a </s>b</s> c</s>"),
        (PLAIN, "a</s>", "a</s>"),
        (LLAMA, "use </s> in HTML", " use </s> in HTML </s>"),
        (CHATML, "a <|im_end|> b", "a <|im_end|> b<|im_end|>"),
        (CHATML, "a</s>b", "a</s>b<|im_end|>"),
        (ENDS_TWICE, "ab", "ab<|im_end|>\n</s>"),
        (ENDLESS, "ab", "ab\n</s>"),
        (TRIMS, " \n ab\n", "ab<|im_end|>"),
        (THINKS, "ab", "<think>\n\n</think>\n\nab<|im_end|>"),
        (THINKS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"), "ab", None),
    ],
)
def test_an_answer_is_whole_and_ends_once(template: str | None, answer: str, text: str | None) -> None:
    tokenizer = tokenizer_of(template)
    (example,) = encode_rows([row_of("q", answer)], tokenizer)
    if text is not None:
        assert tokenizer.decode(example.answer_ids) == text
    assert example.answer == answer


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "<think>so</think>4"),
        (CHATML.replace("m.content", "m.content | e"), "1 < 2"),
        (CHATML.replace("m.content", "m.content[:9]"), "a long answer"),
        (CHATML.replace("m.content", "m.content | upper"), "a"),
        (CHATML.replace("{{ m.content }}", "{% if think %}{{ m.thinking }}{% endif %}{{ m.content }}"), "4"),
    ],
)
def test_a_template_that_loses_a_part_of_an_answer_is_refused(template: str, answer: str) -> None:
    with pytest.raises(SemalignError, match="the chat template leaves out a part of the answer of row 1 of rows"):
        encode_rows([row_of("q", answer, reasoning="so")], tokenizer_of(template))


def test_thoughts_do_not_fit_a_prompt_without_thinking() -> None:
    encoder = TextEncoder(tokenizer_of(THINKS), options={"enable_thinking": False})
    with pytest.raises(SemalignError, match="separated, in a row: set the options .* such as enable_thinking"):
        encoder.example(Conversation(row_of("q", "4", reasoning_content="so")["messages"]), name="a row")


def test_thoughts_may_get_other_space_around_their_marks() -> None:
    keeps = CHATML.replace(
        "{{ m.content }}",
        "{% if '</think>' in m.content %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[1] | trim }}\n"
        "</think>\n\n{{ m.content.split('</think>')[1] | trim }}{% else %}{{ m.content }}{% endif %}",
    )
    tokenizer = tokenizer_of(keeps)
    (example,) = encode_rows([row_of("q", "<think>so</think>4")], tokenizer)
    assert tokenizer.decode(example.answer_ids) == "<think>\nso\n</think>\n\n4<|im_end|>"


def test_a_word_in_the_middle_of_a_text_is_no_word_at_its_beginning() -> None:
    """SentencePiece puts a space before every text: an answer that is encoded alone gets one too many."""
    backend = Tokenizer(BPE({letter: place for place, letter in enumerate("\u2581abc[]INST/")}, []))
    backend.normalizer = Sequence([Prepend("\u2581"), Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=LLAMA)
    (example,) = encode_rows([row_of("a", "b")], tokenizer)
    ids = [*example.prompt_ids, *example.answer_ids]
    assert ids == tokenizer("[INST] a [/INST] b </s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(example.answer_ids)[:2] == ["\u2581", "b"]


def test_options_reach_the_template_wherever_it_is_used() -> None:
    tokenizer = tokenizer_of(THINKS)
    question = [{"role": "user", "content": "q"}]
    thinking, silent = TextEncoder(tokenizer), TextEncoder(tokenizer, options={"enable_thinking": False})
    assert silent.prompt(question) == thinking.prompt(question) + "<think>\n\n</think>\n\n"
    assert not thinking.notes() and not silent.notes() and thinking.key != silent.key
    found = silent.example(Conversation(row_of("q", "4")["messages"]), name="a row")
    assert tokenizer.decode(found.answer_ids) == "4<|im_end|>"
    other = TextEncoder(tokenizer, options={"enable_thinkin": False})
    assert other.notes() == ["the chat template never reads enable_thinkin of chat_template: leave it out"]
    plain = TextEncoder(tokenizer, options={"enable_thinking": False}, chat=False)
    assert plain.notes() == ["prompts are plain text, so nothing reads enable_thinking of chat_template: leave it out"]
    assert plain.key == TextEncoder(tokenizer, chat=False).key


def test_no_option_has_the_name_of_an_argument() -> None:
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert RESERVED == {*arguments, "messages"}


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "messages", "tools", "conversation", CLOCK])
def test_what_is_no_option_is_refused(name: str) -> None:
    with pytest.raises(SemalignError, match=rf"chat_template.*{name} is no option of a chat template"):
        load_experiment("tiny", overrides=[f"chat_template.{name}=1"])
    with pytest.raises(SemalignError, match=rf"chat_template.*{name} is no option of a chat template"):
        EvaluationConfig.parse({"model": {"path": "m"}, "chat_template": {name: 1}})


def test_settings_of_the_template_are_one_for_all_methods_and_benchmarks() -> None:
    experiment = load_experiment("tiny", overrides=["chat_template.enable_thinking=false", "date=2026-11-30"])
    assert experiment.chat_template == {"enable_thinking": False} and experiment.date == datetime.date(2026, 11, 30)
    assert Experiment.parse(json.loads(experiment.model_dump_json())) == experiment
    found = comparing._config(ModelConfig(path="m"), experiment, Benchmarks(tasks=("mmlu",)))
    assert (found.chat_template, found.date) == (experiment.chat_template, experiment.date)
    for override in "chat_template.enable_thinking=true", "date=2026-01-01":
        other = load_experiment("tiny", overrides=["chat_template.enable_thinking=false", "date=2026-11-30", override])
        assert measured_differently(experiment, other) == [override.partition("=")[0]]
    assert any("enable_thinking=false" in value for _, value in experiment_facts(experiment))
    for name in "qwen3-1.7b-0.6b", "qwen3-8b-1.7b":
        assert load_experiment(name).chat_template == {"enable_thinking": False}


def test_the_clock_stands_still() -> None:
    encoder = TextEncoder(tokenizer_of(READS_CLOCK))
    question = [{"role": "user", "content": "q"}]
    assert encoder.prompt(question).startswith("26 Jul 2024 ") and encoder.told_date == DAY
    assert encoder.notes() == [
        "the chat template reads the clock, which stands at 2024-07-26: set date for another day"
    ]
    later = TextEncoder(tokenizer_of(READS_CLOCK), date=datetime.date(2026, 11, 30))
    assert later.prompt(question).startswith("30 Nov 2026 ") and later.key != encoder.key
    silent = TextEncoder(tokenizer_of(CHATML), date=datetime.date(2026, 11, 30))
    assert silent.told_date is None and silent.key == TextEncoder(tokenizer_of(CHATML)).key and not silent.notes()


def test_a_run_says_and_keeps_the_day_that_its_template_is_told(
    pair: tuple[Path, Path], overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = shutil.copytree(pair[1], tmp_path / "target")
    template = (target / "chat_template.jinja").read_text(encoding="utf-8")
    (target / "chat_template.jinja").write_text(template + "{% set day = strftime_now('%Y') %}", encoding="utf-8")
    experiment = load_experiment("tiny", overrides=[*overrides, f"target.path={target}"])
    inputs = read_inputs(experiment, Console())
    assert environment_of(experiment, inputs, torch.device("cpu")).date == "2024-07-26"
    assert "the chat template reads the clock, which stands at 2024-07-26" in capsys.readouterr().err


def test_rows_in_a_template_that_reads_the_clock_are_the_same_the_next_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        day = 29

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(2026, 11, cls.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    tokenizer = tokenizer_of(READS_CLOCK)
    first = encode_rows([row_of("q", "a")], tokenizer)
    monkeypatch.setattr(Clock, "day", 30)
    assert encode_rows([row_of("q", "a")], tokenizer) == first


def test_an_empty_list_of_tools_is_none() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"default": READS_CLOCK, "tool_use": "{{ tools }}" + READS_CLOCK}
    encoder, turns = TextEncoder(tokenizer), [{"role": "user", "content": "one"}]
    assert encoder.prompt(turns, tools=[], documents=[]) == encoder.prompt(turns)


def test_tools_reach_the_template_and_what_nothing_reads_is_counted(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    rows = [
        {**row_of("one", "I add.", tool_calls=call, name="helper"), "tools": json.dumps(tools)},
        {**row_of("two", "I add.", tool_calls=call), "tools": tools, "documents": ["text"], "source": "web"},
        {"messages": [*row_of("three", "3")["messages"], *row_of("four </s>", "4 </s> 5")["messages"]]},
    ]
    tokenizer = tokenizer_of(CALLS)
    examples = encode_rows(rows, tokenizer)
    for example in examples[:2]:
        assert '"name": "add", "parameters"' in tokenizer.decode(example.prompt_ids)
        assert '<call>[{"type": "function"' in tokenizer.decode(example.answer_ids)
        assert tokenizer.decode(example.answer_ids).endswith("<|im_end|>")
    config = DataConfig(train=RowsConfig(path="rows"), train_rows=2, held_out_rows=1)
    split = split_rows(config, [rows], TextEncoder(tokenizer))
    assert (split.unread, split.several, split.ended_within) == ({"documents": 1, "name": 1}, 1, 1)
    split = split_rows(config, [rows], TextEncoder(tokenizer_of(PLAIN)))
    assert split.unread == {"documents": 1, "name": 1, "tool_calls": 2, "tools": 2}
    with pytest.raises(SemalignError, match="row 1 of rows has tools that are no list"):
        encode_rows([{**rows[0], "tools": "add"}], tokenizer)


def test_a_turn_that_only_calls_tools_needs_no_content() -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    ask, answer = row_of("one", "2")["messages"]
    calling = {"role": "assistant", "tool_calls": call}
    rows = [{"messages": [ask, turn, answer]} for turn in ({**calling, "content": ""}, {**calling, "content": None})]
    examples = encode_rows([*rows, {"messages": [ask, calling, answer]}], tokenizer_of(CALLS))
    assert examples[0] == examples[1] == examples[2]
    with pytest.raises(SemalignError, match="its last message must be text by the assistant"):
        encode_rows([{"messages": [ask, calling]}], tokenizer_of(CALLS))
    with pytest.raises(SemalignError, match="messages that are not role and content, both text"):
        encode_rows([{"messages": [ask, {"role": "assistant", "content": None}, answer]}], tokenizer_of(CALLS))


def test_nulls_within_messages_and_tools_are_missing_fields() -> None:
    def row(more: dict[str, Any]) -> dict[str, Any]:
        call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, **more}}}]
        tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"enum": [1, None]}, **more}}}]
        return {**row_of("one", "I add.", tool_calls=call), "tools": tools}

    plain, padded = encode_rows([row({}), row({"b": None})], tokenizer_of(CALLS))  # as Parquet pads them
    assert plain == padded
    assert '"enum": [1, null]' in tokenizer_of(CALLS).decode(plain.prompt_ids)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_go_by_aliases(name: str) -> None:
    conversation = Conversation(row_of("q", "a", **{name: "so"})["messages"])
    assert TextEncoder(tokenizer_of(THINKS)).unread(conversation) == []
    assert TextEncoder(tokenizer_of(CHATML)).unread(conversation) == [name]


def test_a_run_names_what_is_left_out(
    pair: tuple[Path, Path], overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row_of(f"{n} + {n}", "4 <eos> 4", name="helper") for n in range(24)]
    for row in rows:
        row["messages"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *row["messages"]]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = [f"data.train.path={tmp_path / 'odd.jsonl'}", "chat_template.enable_thinking=false"]
    read_inputs(load_experiment("tiny", overrides=[*overrides, *more]), Console())
    noted = capsys.readouterr().err
    assert "the chat template never reads name (24 rows), left out" in noted
    assert "24 rows have several answers, of which the last is trained on" in noted
    assert "24 answers name '<eos>' before their end" in noted
    assert "the chat template never reads enable_thinking of chat_template" in noted


def test_an_answer_of_weight_zero_is_not_trained_on() -> None:
    with pytest.raises(SemalignError, match="row 1 of rows has nothing to train on: its last message has weight 0"):
        encode_rows([row_of("q", "a", weight=0)], build_tokenizer())
    (example,) = encode_rows([row_of("q", "a", weight=1)], tokenizer_of(CHATML))
    assert example.answer == "a"


def test_reasoning_beside_the_answer_is_written_before_it() -> None:
    tokenizer = tokenizer_of(THINKS)
    (example,) = encode_rows([row_of("q", "4", reasoning_content="2 + 2")], tokenizer)
    assert tokenizer.decode(example.answer_ids) == "<think>\n2 + 2\n</think>\n\n4<|im_end|>"


def test_the_key_of_the_supervision_follows_the_template(
    pair: tuple[Path, Path], overrides: list[str], tmp_path: Path
) -> None:
    target = shutil.copytree(pair[1], tmp_path / "target")
    file = target / "chat_template.jinja"
    file.write_text(
        "{{ word }} " + file.read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    keys = set()
    for word in "apples", "now", "apples":
        more = [f"target.path={target}", f"chat_template.word={word}"]
        experiment = load_experiment("tiny", overrides=[*overrides, *more])
        keys.add(phase_key(experiment, read_inputs(experiment, Console(quiet=True)), torch.device("cpu")))
    assert len(keys) == 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "mmlu").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS["mmlu"])
    (folder / "mmlu" / "test.jsonl").write_text(lines, encoding="utf-8")
    return folder


def saved(folder: Path, kind: str, *, positions: int, template: str | None = None) -> Path:
    """A random model with the tiny tokenizer that reads so many tokens."""
    tokenizer = build_tokenizer()
    model = tiny_model(kind, seed=1, depth=2, vocabulary=len(tokenizer), positions=positions)
    model.save_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def config_of(model: Path, data: Path, **settings: Any) -> EvaluationConfig:
    tree = {"model": {"path": str(model)}, "data": str(data), "tasks": ["mmlu"], "device": "cpu", **settings}
    return EvaluationConfig.parse(tree, origin="test")


def test_prompts_that_the_source_cannot_read_whole_are_cut_and_counted(data: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gpt2", positions=24)
    target = saved(tmp_path / "target", "gpt2", positions=256)
    config = config_of(target, data, source={"path": str(source)})
    result = evaluate(config, tmp_path / "out")
    assert result is not None
    found = result.benchmarks["mmlu"]
    assert (found.truncated, found.truncated_to_compare) == (0, len(ROWS["mmlu"]))
    assert found.kl is not None and found.kl.value > 0
    alone = evaluate(config.model_copy(update={"source": None}), tmp_path / "alone")
    assert alone is not None and alone.benchmarks["mmlu"].headline == found.headline


def test_a_solution_that_no_prompt_fits_before_is_refused_before_any_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "load_model", None)
    model = saved(tmp_path / "model", "gpt2", positions=1)
    with pytest.raises(SemalignError, match="solution of document 0 of mmlu has 1 tokens, the models read at most 1 "):
        evaluate(config_of(model, data), tmp_path / "out")


def test_an_evaluation_keeps_its_template_settings(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{{ strftime_now('%Y') }} {{ word }} " + (build_tokenizer().chat_template or "")
    model = saved(tmp_path / "model", "gpt2", positions=256, template=template)
    command = ["evaluate", str(model), "--data", str(data), "--tasks", "mmlu", "device=cpu", "gold=false"]
    for word in "apples", "now":
        assert main([*command, f"chat_template.word={word}", "--out", str(tmp_path / word)]) == 0
    assert "the chat template reads the clock, which stands at 2024-07-26" in capsys.readouterr().err
    found = {word: read_evaluation(tmp_path / word) for word in ("apples", "now")}
    for word, evaluation in found.items():
        protocol = evaluation.result.benchmarks["mmlu"].protocol
        assert (protocol.chat_template, protocol.date) == ({"word": word}, "2024-07-26")
        assert protocol.encoding == ENCODING
        assert all(item.prompt.startswith(f"2024 {word} ") for item in evaluation.items["mmlu"])
    shown = repr(evaluation_blocks(found["now"].result))
    assert 'yes, word="now"' in shown and "2024-07-26" in shown
    assert main(["compare-evaluations", str(tmp_path / "apples"), str(tmp_path / "now")]) == 2
    assert "put differently" in capsys.readouterr().err
    assert main([*command, "chat_template.word=now", "--out", str(tmp_path / "apples")]) == 2
    assert "chat_template differs" in capsys.readouterr().err


def test_the_doctor_names_options_that_have_no_effect(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", *map(str, pair), "--json", "device=cpu", "chat_template.enable_thinking=false"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = [each for each in findings if "never reads" in each["message"]]
    assert found["level"] == "warning" and found["remedy"] == "chat_template={}"
