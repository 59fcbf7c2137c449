"""Reference solutions score 1 and wrong ones 0, through lm-eval, whichever place the rows come from."""

import gzip
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import apply_template
from semalign_geometry.base import SemalignError
from semalign_harness import arithmetic_rows
from semalign_harness.benchmarks import BENCHMARKS, Benchmark, BenchmarkProtocol, Document, Gold, find_benchmark, sample
from semalign_harness.benchmarks._mbpp import _called
from semalign_harness.sandbox import Program, Verdict, judge

ROWS: dict[str, list[dict[str, Any]]] = {
    "mmlu": [
        {"question": "Which is even?", "subject": "number_theory", "choices": ["1", "2", "3", "None"], "answer": 1},
        {"question": " Which is odd? ", "subject": "number_theory", "choices": ["2", "4", "6", "None"], "answer": 3},
        {"question": "First\u2028or last?", "subject": "logic", "choices": ["A", "B", "C", "D"], "answer": 0},
    ],
    "gsm8k": [
        {
            "question": "Ann has 3 boxes of 1,000 pins. She finds 4 more. How many pins?",
            "answer": "They hold 3*1,000=<<3*1000=3000>>3,000.\nIn all 3,000+4=<<3000+4=3004>>3,004.\n#### 3,004",
        },
        {"question": "It was 2 degrees and fell by 7. How cold is it?", "answer": "2-7=<<2-7=-5>>-5\n#### -5"},
        {"question": "Half of 5 kg?", "answer": "5/2 = <<5/2=2.5>>2.5 kg\n#### 2.5"},
    ],
    "humaneval": [
        {
            "task_id": "Test/0",
            "prompt": 'from math import floor\n\n\ndef lower(x: float) -> int:\n    """ The integer below.\n    """\n',
            "canonical_solution": "    return floor(x)\n",
            "test": "def check(candidate):\n    assert candidate(2.5) == 2\n",
            "entry_point": "lower",
        },
        {
            "task_id": "Test/1",
            "prompt": 'def twice(x):\n    return 2 * x\n\n\ndef half(x):\n    """ Undo twice.\n    """\n',
            "canonical_solution": "\n    # halves\n    if x:\n        return x / 2\n    return 0\n",
            "test": "\nMETADATA = {}\n\ndef check(candidate):\n    assert candidate(twice(4)) == 4\n",
            "entry_point": "half",
        },
    ],
    "mbpp": [
        {
            "task_id": 1,
            "text": "Write a function to add two numbers.",
            "code": "def add(a, b):\r\n    return a + b",
            "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        {
            "task_id": 2,
            "text": "Write a function that reads where a node is.",
            "code": "class Node:\n    def __init__(self, at): self.at = at\ndef read(node): return node.at",
            "test_list": ["assert read(root) == 5"],
            "test_setup_code": "root = Node(5)",
            "challenge_test_list": [],
        },
    ],
    "arithmetic": arithmetic_rows(3, seed=7, split="held_out"),
}
ADD = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
NUMBERS = ["3004", "-5", "2.5"]
WRONG = {
    "gsm8k": " She has 3 and 4, so the answer is 123456.",
    "arithmetic": " 3 + 4 = 7 . The answer is 123456",
    "humaneval": "    return None\n",
    "mbpp": "def add(a, b):\n    return None\n",
}

each_benchmark = pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
each_form = pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def run_samples(programs: Iterable[Program]) -> list[Verdict]:
    """Runs programs in this process: only our own."""
    verdicts = []
    for program in programs:
        space: dict[str, Any] = {}
        try:
            exec(compile(program.code, "code.py", "exec"), space)
            exec(compile(program.tests, "tests.py", "exec"), space)
        except Exception as error:
            verdicts.append(Verdict(passed=False, reason="failed", detail=repr(error), seconds=0.5))
        else:
            verdicts.append(Verdict(passed=True, reason="passed", detail="", seconds=0.5))
    return verdicts


class Oracle(LM):
    """Answers each prompt with what it was told, cut where the stop rules say; a choice it was told is likeliest."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [
            (-1.0 if self.answers[prompt] == choice else -2.0, False) for prompt, choice in map(arguments, requests)
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        texts = []
        for prompt, settings in map(arguments, requests):
            text = self.answers[prompt]
            for stop in settings["until"]:
                text = text.partition(stop)[0]
            texts.append(text)
        return texts

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        roles = [message["role"] for message in messages]
        assert roles == (["user"] if add_generation_prompt else ["user", "assistant"])
        return wrapped(messages[0]["content"]) + "".join(message["content"] for message in messages[1:])

    @property
    def tokenizer_name(self) -> str:
        return "oracle"


def arguments(request: Instance) -> tuple[str, Any]:
    return request.args[0], request.args[1]


def wrapped(prompt: str) -> str:
    return f"<user>{prompt}</user><assistant>"


def evaluated(
    documents: dict[str, list[Document]], *, chat: bool, answer: Callable[[str, Document, Gold], str]
) -> dict[str, Any]:
    answers, tasks = {}, []
    for name, docs in documents.items():
        benchmark = BENCHMARKS[name]
        for document in docs:
            gold = benchmark.gold(document, chat=chat)
            prompt = wrapped(gold.prompt) if chat else gold.prompt
            answers[prompt + gold.prefix] = answer(name, document, gold)
        tasks.append(benchmark.task(docs, chat=chat, judge=run_samples if benchmark.runs_code else None))
    found = simple_evaluate(
        Oracle(answers),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    assert found is not None
    return dict(found)


def right(_: str, __: Document, gold: Gold) -> str:
    return gold.answer


def wrong(name: str, document: Document, gold: Gold) -> str:
    if name == "mmlu":
        return gold.answer.replace("ABCD"[document["answer"]], "ABCD"[(document["answer"] + 1) % 4])
    return WRONG[name]


@each_form
@pytest.mark.parametrize(("answer", "score"), [(right, 1), (wrong, 0)], ids=["right", "wrong"])
def test_reference_solutions_score_one_and_wrong_ones_zero(
    data: Path, chat: bool, answer: Callable[[str, Document, Gold], str], score: int
) -> None:
    documents = {name: benchmark.documents(data) for name, benchmark in BENCHMARKS.items()}
    found = evaluated(documents, chat=chat, answer=answer)
    for name, benchmark in BENCHMARKS.items():
        for metric in ("correct", *benchmark.other_metrics):
            assert found["results"][name][f"{metric},extract"] == score, (name, metric)
        samples = found["samples"][name]
        assert [entry["doc"] for entry in samples] == documents[name]
        for entry, document in zip(samples, documents[name], strict=True):
            outcome = benchmark.outcome(entry)
            gold = benchmark.gold(document, chat=chat)
            assert outcome.prompt == (wrapped(gold.prompt) if chat else gold.prompt) + gold.prefix
            assert outcome.correct is bool(score)
            assert outcome.other == dict.fromkeys(benchmark.other_metrics, bool(score))
            assert outcome.extracted is not None
            assert outcome.reason == ({1: "passed", 0: "failed"}[score] if benchmark.runs_code else None)
            if benchmark.read is not None:
                assert outcome.output and answer(name, document, gold).startswith(outcome.output)
    if score:
        assert [BENCHMARKS["mmlu"].outcome(entry).extracted for entry in found["samples"]["mmlu"]] == ["B", "D", "A"]
        assert [BENCHMARKS["gsm8k"].outcome(entry).extracted for entry in found["samples"]["gsm8k"]] == NUMBERS
        scores = BENCHMARKS["mmlu"].outcome(found["samples"]["mmlu"][0]).output
        assert scores == "A -2.0000  B -1.0000  C -2.0000  D -2.0000"
    else:
        assert found["results"]["mbpp"]["reason,extract"] == {"failed": 2}
        assert "is not defined" in BENCHMARKS["mbpp"].outcome(found["samples"]["mbpp"][1]).detail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is -5.", ("-5", True, True, True)),
        ("It is -5 degrees (7 less).", ("-5", True, False, False)),
        ("\\boxed{-5.0}", ("-5", True, False, False)),
        ("It fell 2 - 7. In the end -5", ("-5", True, False, True)),
        ("The answer is -5. Or 7?", ("-5", True, True, False)),
        ("It is cold.", (None, False, False, False)),
    ],
)
def test_metrics_of_gsm8k_differ_where_they_should(data: Path, text: str, expected: tuple[Any, ...]) -> None:
    gsm8k = BENCHMARKS["gsm8k"]
    assert gsm8k.read is not None
    (reading,) = gsm8k.read(gsm8k.documents(data)[1:2], [text], None)
    assert tuple(reading[key] for key in ("extracted", "correct", "strict", "flexible")) == expected


@pytest.mark.parametrize(
    ("scores", "extracted"),
    [([-3.0, -1.0, -2.0, -4.0], "B"), ([-1.0, -1.0, -1.0, -1.0], "A"), ([-1.0, math.nan, -2.0, -3.0], None)],
)
def test_likeliest_letter(data: Path, scores: list[float], extracted: str | None) -> None:
    mmlu = BENCHMARKS["mmlu"]
    document = mmlu.documents(data)[2]
    responses = [(score, False) for score in scores]
    correct = mmlu.task([document], chat=False)["process_results"](document, responses)["correct"]
    entry = {"arguments": [("prompt", " A")], "filtered_resps": responses, "correct": correct}
    assert mmlu.outcome(entry).extracted == extracted
    assert correct == (extracted == "A")


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
@each_form
def test_a_judge_gets_all_programs_at_once(name: str, chat: bool, data: Path) -> None:
    benchmark = BENCHMARKS[name]
    calls: list[list[Program]] = []

    def record(programs: list[Program]) -> list[Verdict]:
        calls.append(programs)
        return run_samples(programs)

    documents = benchmark.documents(data)
    task = benchmark.task(documents, chat=chat, judge=record)
    (step,) = task["filter_list"][0]["filter"]
    readings = step["filter_fn"]([[benchmark.gold(d, chat=chat).answer] for d in documents], documents)
    assert [reading["correct"] for reading in readings] == [True] * len(documents)
    assert [len(call) for call in calls] == [len(documents)]
    for program, document, reading in zip(calls[0], documents, readings, strict=True):
        assert program.code == reading["extracted"]
        assert program.entry_point == document.get("entry_point") and program.prompt == document.get("prompt", "")
    tests = {"humaneval": f"{documents[0].get('test')}\ncheck(lower)\n", "mbpp": "\n".join(["", *ADD])}
    assert calls[0][0].tests == tests[name]


@each_benchmark
@each_form
def test_prompt_is_the_template_as_lm_eval_renders_it(benchmark: Benchmark, chat: bool, data: Path) -> None:
    protocol = benchmark.protocol(chat=chat)
    for document in benchmark.documents(data):
        assert benchmark.gold(document, chat=chat).prompt == apply_template(protocol.prompt, document)


def test_prompts(data: Path) -> None:
    def prompt(name: str, index: int, *, chat: bool) -> str:
        return BENCHMARKS[name].gold(BENCHMARKS[name].documents(data)[index], chat=chat).prompt

    assert prompt("mmlu", 1, chat=True) == (
        "The following are multiple choice questions (with answers) about number theory.\n\n"
        "Which is odd?\nA. 2\nB. 4\nC. 6\nD. None\nAnswer:"
    )
    assert prompt("gsm8k", 2, chat=False) == "Q: Half of 5 kg?\nA: Let's think step by step."
    assert prompt("humaneval", 0, chat=False) == ROWS["humaneval"][0]["prompt"]
    assert prompt("mbpp", 0, chat=False).endswith("assert add(1, 2) == 3\nassert add(0, 0) == 0\n[BEGIN]\n")
    assert "assert add(1, 2) == 3\nassert add(0, 0) == 0\n" in prompt("mbpp", 0, chat=True)


@each_benchmark
@each_form
def test_protocol_is_what_the_task_does(benchmark: Benchmark, chat: bool, data: Path, tmp_path: Path) -> None:
    protocol = benchmark.protocol(chat=chat)
    assert BenchmarkProtocol.read(protocol.write(tmp_path / "protocol.json")) == protocol
    task = benchmark.task(benchmark.documents(data), chat=chat, judge=run_samples)
    assert (protocol.benchmark, protocol.chat, protocol.few_shot) == (benchmark.name, chat, task["num_fewshot"])
    assert task["metadata"] == {"version": protocol.benchmark_version}
    assert list(protocol.choices) == task.get("doc_to_choice", [])
    settings = task.get("generation_kwargs", {"until": [], "max_gen_toks": None})
    assert (list(protocol.stop), protocol.max_new_tokens) == (settings["until"], settings["max_gen_toks"])
    assert protocol.prefix == (task["gen_prefix"] or "")


@each_benchmark
def test_hub_and_folder_give_the_same_documents(
    benchmark: Benchmark, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(path: str, subset: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, subset, split))
        return ROWS[benchmark.name]

    monkeypatch.setattr(datasets, "load_dataset", load)
    if benchmark.hub[0].startswith("generated:"):
        return
    assert benchmark.documents(None) == benchmark.documents(data)
    assert asked == [(*benchmark.hub, "test")]


def test_generated_problems_are_held_out_ones() -> None:
    documents = BENCHMARKS["arithmetic"].documents(None)
    trained = {row["messages"][0]["content"] for row in arithmetic_rows(5000, seed=0, split="train")}
    assert len(documents) == 5000 and not trained & {document["question"] for document in documents}
    assert all(document["solution"].endswith(f"The answer is {document['answer']}") for document in documents)


def test_another_longest_response_is_of_those_that_generate() -> None:
    limits = {name: each.within(7).forms[True].max_new_tokens for name, each in BENCHMARKS.items()}
    assert limits == {name: 7 if each.read else None for name, each in BENCHMARKS.items()}
    assert all(each.within(None) is each for each in BENCHMARKS.values())
    assert BENCHMARKS["gsm8k"].within(7).protocol(chat=True) != BENCHMARKS["gsm8k"].protocol(chat=True)


def test_fields_that_are_not_read_are_dropped(data: Path) -> None:
    assert set(ROWS["mbpp"][0]) - set(BENCHMARKS["mbpp"].documents(data)[0]) == {"challenge_test_list"}


def test_a_plain_file_of_another_split_is_read(tmp_path: Path) -> None:
    (tmp_path / "mmlu").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS["mmlu"])
    (tmp_path / "mmlu" / "dev.jsonl").write_text(text, encoding="utf-8")
    assert len(BENCHMARKS["mmlu"].documents(tmp_path, split="dev")) == 3


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SemalignError, match=r"openai/gsm8k.*no route.*give a folder"):
        BENCHMARKS["gsm8k"].documents(None)


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match=r"mbpp/test\.jsonl\.gz does not exist: give a folder"):
        BENCHMARKS["mbpp"].documents(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mmlu", {"choices": None}, "row 1: 'choices' is None"),
        ("mmlu", {"choices": ["1", "2", "3"]}, "row 1: 'choices'"),
        ("mmlu", {"choices": ["1", "2", "3", None]}, "row 1: 'choices.3' is None"),
        ("mmlu", {"answer": "B"}, "row 1: 'answer' is 'B'"),
        ("mmlu", {"answer": 4}, "row 1: 'answer' is 4"),
        ("gsm8k", {"answer": "It is 3"}, "'answer' is 'It is 3'.*####"),
        ("gsm8k", {"question": ...}, "key 'question' is missing; a row of gsm8k has the fields question, answer"),
        ("humaneval", {"entry_point": "a b"}, "'entry_point' is 'a b'"),
        ("mbpp", {"test_list": []}, "'test_list'"),
        ("mbpp", {"test_setup_code": ...}, "key 'test_setup_code' is missing"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    row = {key: value for key, value in (ROWS[name][0] | change).items() if value is not ...}
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(SemalignError, match=message):
        BENCHMARKS[name].documents(tmp_path)


def test_refusals(data: Path) -> None:
    with pytest.raises(
        SemalignError,
        match="unknown benchmark 'arc': choose one of mmlu, gsm8k, humaneval, mbpp, arithmetic, or install",
    ):
        find_benchmark("arc")
    assert find_benchmark("mbpp") is BENCHMARKS["mbpp"]
    with pytest.raises(SemalignError, match="no documents"):
        BENCHMARKS["mmlu"].task([], chat=False)
    for name in ("humaneval", "mbpp"):
        with pytest.raises(SemalignError, match="pass a judge"):
            BENCHMARKS[name].task(BENCHMARKS[name].documents(data), chat=False)
    with pytest.raises(SemalignError, match="limit is 0"):
        sample([{}], 0, 0)


@given(st.integers(0, 60), st.integers(1, 70), st.integers(1, 70), st.integers(-5, 5))
def test_a_smaller_sample_is_part_of_a_larger_one(count: int, one: int, other: int, seed: int) -> None:
    documents: list[Document] = [{} for _ in range(count)]
    smaller, larger = (sample(documents, limit, seed) for limit in sorted((one, other)))
    assert set(smaller) <= set(larger) <= set(range(count)) == set(sample(documents, None, seed))
    assert smaller == sorted(set(smaller)) and len(smaller) == min(one, other, count)


def test_a_sample_is_the_same_everywhere_and_no_first_n() -> None:
    documents: list[Document] = [{} for _ in range(1000)]
    assert sample(documents, 6, 0) == [263, 290, 491, 691, 733, 785]
    assert len({tuple(sample(documents, 6, seed)) for seed in range(50)}) == 50


def test_every_document_is_drawn_about_equally_often() -> None:
    documents: list[Document] = [{} for _ in range(20)]
    counts = [0] * 20
    for seed in range(2000):
        for index in sample(documents, 5, seed):
            counts[index] += 1
    # Binomial(2000, 1/4): mean 500, standard deviation 19.4.
    assert all(abs(count - 500) < 5 * 19.4 for count in counts)


@pytest.mark.real
@each_benchmark
@each_form
def test_reference_solutions_of_the_real_benchmarks(benchmark: Benchmark, chat: bool) -> None:
    documents = benchmark.documents(Path(os.environ["SEMALIGN_DATA"]))
    if benchmark.read is None:
        letters = [benchmark.gold(document, chat=chat).answer.strip() for document in documents]
        assert letters == ["ABCD"[document["answer"]] for document in documents]
        assert len({benchmark.gold(document, chat=chat).prompt for document in documents}) > 0.99 * len(documents)
        return
    answers = [benchmark.gold(document, chat=chat).answer for document in documents]
    stops = benchmark.protocol(chat=chat).stop
    assert not [answer for answer in answers if any(stop in answer for stop in stops)]
    readings = benchmark.read(documents, answers, judge if benchmark.runs_code else None)
    for metric in ("correct", *benchmark.other_metrics):
        assert [
            (document, reading) for document, reading in zip(documents, readings, strict=True) if not reading[metric]
        ] == []


@each_benchmark
@pytest.mark.parametrize("file", ["test-00000-of-00001.parquet", "data/test.json"])
def test_rows_may_lie_as_the_hub_has_them(benchmark: Benchmark, data: Path, file: str, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS[benchmark.name])
    place = tmp_path / benchmark.name / file
    place.parent.mkdir(parents=True)
    if place.suffix == ".parquet":
        rows.to_parquet(place)
    else:
        place.write_text(json.dumps(ROWS[benchmark.name]), encoding="utf-8")
    assert benchmark.documents(tmp_path) == benchmark.documents(data)
    with pytest.raises(SemalignError, match="has no split 'dev', but test"):
        benchmark.documents(tmp_path, split="dev")


DRAFT = "<think>\n```python\ndef {}(*_):\n    return 'a draft'\n```\n</think>\n"
OTHER = "```python\ndef other(*_):\n    return 0\n```\n"
STUB = "\n\nIn short:\n\n```python\ndef {}(*_):\n    ...\n```\n"


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
@pytest.mark.parametrize(("before", "after"), [(DRAFT, ""), (OTHER, ""), ("", STUB), (OTHER + DRAFT + OTHER, STUB)])
def test_the_reference_solution_is_read_among_others(name: str, before: str, after: str, data: Path) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.read is not None
    documents = benchmark.documents(data)
    tested = {"humaneval": ["lower", "half"], "mbpp": ["add", "read"]}[name]
    responses = [
        before.format(each) + benchmark.gold(document, chat=True).answer + after.format(each)
        for document, each in zip(documents, tested, strict=True)
    ]
    readings = benchmark.read(documents, responses, run_samples)
    assert [reading["correct"] for reading in readings] == [True, True]


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("assert f(1) == g(len([2]))", {"f", "g"}),
        ("import math\nassert math.isclose(f(1), 2)", {"f"}),
        ("root = Node(5)\nassert read(root) == 5", {"Node", "read"}),
        ("assert sum([1]) == 1", {"sum"}),
        ("call = f\nassert call(1)", set()),
        ("def near(a): return abs(a) < 1\nassert near(f(1))", {"f"}),
        ("class Node:\n    pass\nassert f(Node())", {"f"}),
        ("from math import isclose as near, sqrt\nassert near(f(1), sqrt(4))", {"f"}),
        ("import numpy.linalg\nassert f(numpy(1))", {"f"}),
        ("assert all(map(lambda g: g(f), [1]))", {"all", "map"}),
        ("assert (", set()),
    ],
)
def test_names_that_tests_call(tests: str, names: set[str]) -> None:
    assert _called(tests) == names
