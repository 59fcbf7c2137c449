"""Evaluations: figures against plain forward passes, answers that are never computed twice or lost, comparisons."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from safetensors.torch import load_file, save_file
from semalign_geometry.base import SemalignError
from semalign_harness import build_tokenizer
from semalign_harness.benchmarks import BENCHMARKS
from semalign_harness.cli.main import main
from semalign_harness.data.encoding import TextEncoder
from semalign_harness.evaluation import (
    EvaluationConfig,
    EvaluationResult,
    evaluate,
    evaluation_table,
    over_seeds,
    pair,
    pair_table,
    read_evaluation,
)
from semalign_harness.evaluation import _agreement as agreement
from semalign_harness.evaluation import _run as runner
from semalign_harness.evaluation._agreement import Text, gold_example
from semalign_harness.evaluation._journaled import JournaledLM
from semalign_harness.evaluation._models import Models
from semalign_harness.generation import Way, end_ids, generate
from semalign_harness.models.loading import LoadedModel, load_model
from semalign_harness.models.opening import open_model
from semalign_harness.models.settings import ModelConfig
from semalign_harness.util.journal import Answer, Journal, request_key
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.harness.test_benchmarks import ROWS

TOKENIZER = build_tokenizer()
ENCODER = TextEncoder(TOKENIZER, chat=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        with gzip.open(folder / name / "test.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def models(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pair with room for a long response."""
    copies = []
    for folder in pair:
        copy = tmp_path_factory.mktemp("long") / folder.name
        shutil.copytree(folder, copy)
        settings = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        (copy / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 2048}), encoding="utf-8")
        copies.append(copy)
    return copies[0], copies[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_of(model: Path, data: Path, **settings: Any) -> EvaluationConfig:
    tree = {"model": {"path": str(model)}, "data": str(data), "device": "cpu", **settings}
    return EvaluationConfig.parse(tree, origin="test")


def evaluated(model: Path, data: Path, folder: Path, **settings: Any) -> EvaluationResult:
    result = evaluate(config_of(model, data, **settings), folder)
    assert result is not None
    return result


def plain_log_probs(folder: Path, prompt: str, answer: str) -> tuple[torch.Tensor, list[int]]:
    loaded = load_model(open_model(config_of(folder, folder).model))
    ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
    return logits.double().log_softmax(-1), ids[1]


def written(folder: Path, prompt: str) -> str:
    """What `generate` gives to a question of GSM8K, up to the first text that ends an answer."""
    loaded = load_model(open_model(config_of(folder, folder).model))
    protocol = BENCHMARKS["gsm8k"].protocol(chat=True)
    assert protocol.max_new_tokens is not None
    ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ends = end_ids(loaded.model, loaded.tokenizer)
    (row,) = generate(loaded.model, [ids], max_new_tokens=protocol.max_new_tokens, ends=ends)
    text = loaded.tokenizer.decode(row, skip_special_tokens=True)
    return min((text.split(stop)[0] for stop in (*protocol.stop, loaded.tokenizer.eos_token)), key=len)


def test_figures_equal_plain_forward_passes(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    source, target = models
    result = evaluated(target, data, tmp_path / "out", source={"path": str(source)}, tasks=["gsm8k", "mmlu"])
    assert EvaluationResult.read(tmp_path / "out" / "evaluation.json") == result
    bits = size = kl = agreement = tokens = 0.0
    nats_per_bit, shared = torch.tensor(2.0).log().item(), len(TOKENIZER)
    for item in read_evaluation(tmp_path / "out").items["gsm8k"]:
        assert item.output == written(target, item.prompt) != ""
        gold = BENCHMARKS["gsm8k"].gold(ROWS["gsm8k"][item.index], chat=True)
        ours, answer = plain_log_probs(target, item.prompt, gold.answer)
        theirs, _ = plain_log_probs(source, item.prompt, gold.answer)
        item_bits = -float(ours[range(len(answer)), answer].sum()) / nats_per_bit
        ours, theirs = (each[:, :shared].log_softmax(-1) for each in (ours, theirs))  # the heads have padded rows
        item_kl = float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
        same = float((ours.argmax(1) == theirs.argmax(1)).sum())
        assert item.tokens == len(answer)
        assert item.gold_bits == pytest.approx(item_bits, rel=1e-4)
        assert item.kl == pytest.approx(item_kl / len(answer), rel=1e-3)
        assert item.agreement == pytest.approx(same / len(answer), abs=1e-6)
        bits += item_bits
        size += len(gold.answer.encode())
        kl += item_kl
        agreement += same
        tokens += len(answer)
    found = result.benchmarks["gsm8k"]
    assert found.bits_per_byte is not None and found.kl is not None and found.agreement is not None
    assert found.bits_per_byte.value == pytest.approx(bits / size, rel=1e-4)
    assert found.kl.value == pytest.approx(kl / tokens, rel=1e-3)
    assert found.agreement.value == pytest.approx(agreement / tokens, abs=1e-6)
    choices = {item.index: item for item in read_evaluation(tmp_path / "out").items["mmlu"]}
    for index, row in enumerate(ROWS["mmlu"]):
        log_probs = [float(plain_log_probs(target, choices[index].prompt, c)[0][0, i]) for c, i in letters(target)]
        assert choices[index].correct == (log_probs.index(max(log_probs)) == row["answer"])
        gold_nats = (choices[index].gold_bits or 0.0) * nats_per_bit
        assert gold_nats == pytest.approx(-log_probs[row["answer"]], rel=1e-4)


def letters(folder: Path) -> list[tuple[str, int]]:
    tokenizer = open_model(config_of(folder, folder).model).tokenizer
    return [(c, tokenizer(c, add_special_tokens=False)["input_ids"][0]) for c in "ABCD"]


class Knowing(LM):
    """Gives every reference solution, or none."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.asked: Counter[str] = Counter()
        self.answers: dict[str, str] = {}
        for name, rows in ROWS.items():
            for row in rows:
                benchmark = BENCHMARKS[name]
                gold = benchmark.gold(benchmark.row.parse(dict(row)).model_dump(), chat=False)
                self.answers[gold.prompt + gold.prefix] = gold.answer

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        self.asked.update(request.args[0] + request.args[1] for request in requests)
        return [(-1.0 if (self.answers[r.args[0]] == r.args[1]) == self.right else -2.0, True) for r in requests]

    def generate_until(
        self, requests: list[Instance], *, ended: Callable[[int, str], None] = lambda place, text: None, **_: Any
    ) -> list[str]:
        self.asked.update(request.args[0] for request in requests)
        texts = [self.answers[request.args[0]] if self.right else "nothing" for request in requests]
        for place, text in enumerate(texts):
            ended(place, text)
        return texts

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_knows_everything_scores_one(
    right: bool, models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner._Runner, "_make", lambda self: Knowing(right))
    result = evaluated(models[1], data, tmp_path / "out", chat=False, tasks=tuple(ROWS))
    assert {name: found.headline.value for name, found in result.benchmarks.items()} == dict.fromkeys(
        ROWS, float(right)
    )
    assert result.sandbox is not None and result.benchmarks["mbpp"].reasons == {
        "passed" if right else "failed": len(ROWS["mbpp"])
    }


def test_a_second_call_asks_the_model_nothing(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"source": {"path": str(models[0])}, "tasks": ["mmlu", "gsm8k"], "limit": 2}
    first = evaluated(models[1], data, tmp_path / "one", **settings)

    def nothing(*arguments: object, **settings: object) -> None:
        raise AssertionError("a model was loaded")

    for module in (runner, agreement):
        monkeypatch.setattr(module, "load_model", nothing)
    assert evaluated(models[1], data, tmp_path / "two", **settings) == first
    for name in ("mmlu", "gsm8k"):
        one, two = ((tmp_path / folder / f"items-{name}.jsonl").read_bytes() for folder in ("one", "two"))
        assert one == two
    with pytest.raises(SemalignError, match="a model was loaded"):  # another model has other answers
        evaluated(models[0], data, tmp_path / "three", tasks=["mmlu"])


def test_a_model_that_cannot_generate_is_refused_before_the_first_benchmark(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: object) -> Way:
        raise SemalignError("LlamaForCausalLM cannot generate")

    monkeypatch.setattr("semalign_harness.models.loading.check_generation", refuse)
    with pytest.raises(SemalignError, match="cannot generate"):
        evaluate(config_of(models[1], data, tasks=["mmlu", "gsm8k"], limit=1), tmp_path / "both")
    assert not list((tmp_path / "cache").glob("evaluations/*/answers-*.jsonl")), "nothing was answered"
    evaluated(models[1], data, tmp_path / "mmlu", tasks=["mmlu"], limit=1)


def test_a_source_that_cannot_be_used_is_refused_before_the_first_benchmark(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(models[0], tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(runner._Runner, "run", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(SemalignError, match="source holds values that are not finite"):
        evaluate(config_of(models[1], data, tasks=["mmlu"], source={"path": str(source)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_limit_is_given_whole_prompts(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semalign_harness.models.opening.OpenedModel.positions", None)
    with pytest.raises(SemalignError, match="gsm8k generates up to .* reads at most 128 in all"):  # by its tokenizer
        evaluate(config_of(models[1], data, tasks=["gsm8k"]), tmp_path / "out")
    model = shutil.copytree(models[1], tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps(settings | {"model_max_length": int(1e30)})
    (model / "tokenizer_config.json").write_text(text, encoding="utf-8")
    loaded = runner.load_model

    def lower(*arguments: Any, **more: Any) -> LoadedModel:
        found = loaded(*arguments, **more)
        found.model.config.max_position_embeddings = 64  # which lm-eval would take, as it would a guess
        return found

    monkeypatch.setattr(runner, "load_model", lower)
    result = evaluated(model, data, tmp_path / "out", tasks=["gsm8k"], limit=1)
    assert result.benchmarks["gsm8k"].truncated == 0
    (item,) = read_evaluation(tmp_path / "out").items["gsm8k"]
    assert item.output == written(models[1], item.prompt) != ""


def test_a_failure_is_named_by_what_failed(models: tuple[Path, Path], tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "plugin"}
    exec("def answer(document, chat): return document['nope']", names)
    failing = dataclasses.replace(BENCHMARKS["gsm8k"], name="mine", answer=names["answer"])
    encoder, rows = TextEncoder(build_tokenizer(), chat=True), [*map(dict, ROWS["gsm8k"])]
    opened = dataclasses.replace(open_model(ModelConfig(path=str(models[1]))), tokenizer=encoder.tokenizer)
    of = Models(opened, None, None, encoder, torch.device("cpu"))
    with pytest.raises(SemalignError, match=r"^the benchmark mine has no prompt and .* document 1: KeyError: 'nope'"):
        runner._texts(runner._Task(failing, rows, [1]), of)
    encoder.tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(SemalignError, match="^the chat template of .*target refuses a prompt: .*no users"):
        runner._texts(runner._Task(BENCHMARKS["gsm8k"], rows, [1]), of)


def test_a_killed_evaluation_goes_on(models: tuple[Path, Path], data: Path, tmp_path: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "semalign_harness", "evaluate", str(models[1]), "--data", str(data), "--quiet"]
    command += ["--tasks", "gsm8k,mbpp", "--out", str(tmp_path / "out"), "gold=false", "device=cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    journal = None
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        journal = next(iter(cache.glob("evaluations/*/answers-0.jsonl")), None)
        if journal is not None and journal.read_bytes().count(b"\n") >= 2:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL and journal is not None, "it ended before it could be killed"
    before = journal.read_bytes().rpartition(b"\n")[0]
    assert not (tmp_path / "out").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = journal.read_bytes().splitlines()
    assert lines[: before.count(b"\n") + 1] == before.splitlines(), "answers of the first run are kept"
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == len(ROWS["gsm8k"]) + len(ROWS["mbpp"])


def test_two_ranks_give_what_one_process_gives(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    evaluated(models[1], data, tmp_path / "one", tasks=["mmlu", "gsm8k"], batch_size=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "semalign_harness", "evaluate", str(models[1]), "--data", str(data), "batch_size=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SEMALIGN_CACHE": str(tmp_path / "ranks")}
    more = ["--tasks", "mmlu,gsm8k", "device=cpu", "--out", str(tmp_path / "two")]
    run = subprocess.run([*command, *more], env=environment, check=True, capture_output=True)
    assert run.stderr.count(b"read tokenizers and configurations") == 1, "one of them tells"
    assert len(list((tmp_path / "ranks").glob("evaluations/*/answers-*.jsonl"))) == 2
    one, two = (read_evaluation(tmp_path / name).items for name in ("one", "two"))
    for name in one:
        for mine, other in zip(one[name], two[name], strict=True):
            assert mine.model_copy(update={"seconds": 0, "gold_bits": 0}) == other.model_copy(
                update={"seconds": 0, "gold_bits": 0}
            )
            assert mine.gold_bits == pytest.approx(other.gold_bits, rel=1e-5)


@given(st.dictionaries(st.text(min_size=1), st.text(), min_size=1), st.data())
def test_a_journal_cut_anywhere_loses_the_torn_line_alone(answers: dict[str, str], data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "answers.jsonl"
        journal = Journal(path)
        for key, value in answers.items():
            journal.add({key: Answer(value, 0.5, 3)})
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        again = Journal(path)
        assert len(again) == whole
        again.add({"\n new": Answer([-1.5, True], 0.0, 1)})
        kept = {key: Answer(value, 0.5, 3) for key, value in list(answers.items())[:whole]}
        found = Journal(path)
        assert {key: found.get(key) for key in kept} == kept and found.get("\n new") == Answer([-1.5, True], 0.0, 1)


def test_lines_of_a_journal_that_cannot_be_read_are_void(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Journal(path).add({key: Answer(key, 0.5, 3) for key in ("first", "last")})
    first, last = path.read_bytes().splitlines()
    damaged = [b"", first[:-9], b"\xff\x00\xfe", bytes(40), b"[" * 100_000, b"7", b'"key"', b"[1]", b"null", b"{}"]
    damaged += [first.replace(b'"first"', b"[]"), first.replace(b"0.5", b'"x"'), first.replace(b": 3", b": null")]
    path.write_bytes(b"\n".join([first, *damaged, last, b""]))
    found = Journal(path)
    assert len(found) == 2 and found.get("last") == Answer("last", 0.5, 3)
    found.add({"more": Answer("more", 0.5, 1)})
    assert len(Journal(path)) == 3


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=12), st.integers(1, 5))
def test_every_request_is_asked_once_and_answered_in_order(texts: list[str], size: int) -> None:
    import tempfile

    class Echo(Knowing):
        def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
            assert len(requests) <= size
            self.asked.update(request.args[0] for request in requests)
            return [request.args[0][::-1] for request in requests]

    with tempfile.TemporaryDirectory() as folder:
        inner = Echo(True)
        lm = JournaledLM(
            lambda: inner,
            Journal(Path(folder) / "answers.jsonl"),
            ENCODER,
            batch_size=lambda kind, tokens: size,
            progress=lambda label, total: lambda more: None,
            state=PartialState(cpu=True),
        )
        requests = [Instance("generate_until", {}, (text, {"max_gen_toks": 4}), 0) for text in texts]
        for _ in range(2):
            assert lm.generate_until(requests) == [text[::-1] for text in texts]
        assert inner.asked == Counter(set(texts))


def test_keys_tell_requests_apart() -> None:
    kinds = [("a", "b"), ("ab", ""), ("a", {"until": ["b"]}), ("a", {"until": []})]
    assert len({request_key(kind, *each) for kind in ("loglikelihood", "generate_until") for each in kinds}) == 8


@given(st.sampled_from(["loglikelihood", "generate_until"]), st.integers(1, 4096), st.integers(1, 4096))
def test_longer_documents_run_in_smaller_batches(kind: str, first: int, second: int) -> None:
    found = object.__new__(runner._Runner)
    found.config = EvaluationConfig.parse({"model": {"path": "x"}}, origin="test")
    config = LlamaConfig(num_hidden_layers=4, num_attention_heads=4, hidden_size=64, vocab_size=50_000)
    found.models = SimpleNamespace(opened=SimpleNamespace(config=config), device=torch.device("cpu"))  # type: ignore[assignment]
    short, long = sorted((first, second))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
        smaller, larger = found.batch_size(kind, long), found.batch_size(kind, short)
        assert 1 <= smaller <= larger
        assert smaller & (smaller - 1) == 0
        assert found.batch_size(kind, 4096) < found.batch_size(kind, 1)


@pytest.mark.parametrize("family", ["mamba", "gemma4_text"])
def test_other_families_are_evaluated(family: str, data: Path, tmp_path: Path, builder: ModuleType) -> None:
    """Without attention, or with heads that differ by layer."""
    builder.build(family, tmp_path / "model")
    found = evaluated(tmp_path / "model", data, tmp_path / "out", tasks=["mmlu"], limit=2)
    assert found.benchmarks["mmlu"].bits_per_byte is not None


def test_comparisons_need_the_same_questions(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    kept = {"tasks": ["mmlu"], "limit": 2}
    evaluated(models[0], data, tmp_path / "source", **kept)
    evaluated(models[1], data, tmp_path / "before", **kept)
    evaluated(models[1], data, tmp_path / "other", tasks=["mmlu"], limit=1)
    evaluated(models[1], data, tmp_path / "plain", chat=False, **kept)
    evaluated(models[1], data, tmp_path / "gsm8k", tasks=["gsm8k"], limit=2)
    source, before, other, plain, gsm8k = map(
        read_evaluation, (tmp_path / name for name in ("source", "before", "other", "plain", "gsm8k"))
    )
    (same,) = pair(before, before, source=source)
    assert same.correct.p_value == 1 and same.correct.difference.value == 0
    assert same.bits_per_byte is not None and same.bits_per_byte.difference.value == 0
    assert same.gap_bits is not None and same.gap_bits.value == 0
    (whole,) = pair(before, source, source=source)
    assert whole.gap_bits is not None and whole.gap_bits.value == pytest.approx(1)
    of_source, of_before = (each.result.benchmarks["mmlu"].bits_per_byte for each in (source, before))
    assert whole.bits_per_byte is not None and of_source is not None and of_before is not None
    difference = whole.bits_per_byte.difference.value
    assert difference == pytest.approx(of_source.value - of_before.value) and difference != 0
    (back,) = pair(source, before)
    assert back.bits_per_byte is not None and back.bits_per_byte.difference.value == pytest.approx(-difference)
    assert over_seeds([before, before, before])["mmlu", "accuracy"].spread == 0
    for wrong, sentence in ((other, "different documents"), (plain, "put differently"), (gsm8k, "in common")):
        with pytest.raises(SemalignError, match=sentence):
            pair(before, wrong)
        with pytest.raises(SemalignError, match=sentence):
            over_seeds([before, wrong])


def test_what_is_no_evaluation_or_a_damaged_one_is_one_sentence(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    evaluated(models[1], data, folder, tasks=["mmlu"], limit=2)
    items = folder / "items-mmlu.jsonl"
    whole = items.read_bytes()
    for line in (whole.splitlines()[1][:-9], b"\xff", b"{}", b"7"):
        items.write_bytes(whole.splitlines()[0] + b"\n" + line + b"\n")
        with pytest.raises(SemalignError, match="items-mmlu.jsonl, line 2 .*evaluate mmlu again"):
            read_evaluation(folder)
    items.unlink()
    with pytest.raises(SemalignError, match="items-mmlu.jsonl cannot be read.*evaluate mmlu again"):
        read_evaluation(folder)
    evaluated(models[1], data, folder, tasks=["mmlu"], limit=2)
    assert items.read_bytes() == whole, "the remedy helps"
    run = tmp_path / "run"
    run.mkdir()
    for name in ("experiment.json", "result.json"):
        (run / name).write_text("{}", encoding="utf-8")
        with pytest.raises(SemalignError, match="holds a run, not an evaluation: .*--out"):
            evaluate(config_of(models[1], data, tasks=["mmlu"]), run)
    with pytest.raises(SemalignError, match="holds a run, not an evaluation: give the folder of its evaluation"):
        read_evaluation(run)


def test_an_evaluation_under_its_former_name_is_read_and_added_to(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    evaluated(models[1], data, folder, tasks=["mmlu"], limit=2)
    (folder / "evaluation.json").rename(folder / "result.json")
    assert set(read_evaluation(folder).items) == {"mmlu"}
    assert set(evaluated(models[1], data, folder, tasks=["gsm8k"], limit=2).benchmarks) == {"mmlu", "gsm8k"}
    assert set(read_evaluation(folder).items) == {"mmlu", "gsm8k"}


def test_a_folder_that_cannot_take_the_evaluation_is_found_out_before_anything_is_computed(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*arguments: object, **settings: object) -> None:
        raise AssertionError("a model was loaded")

    config = config_of(models[1], data, tasks=["mmlu"], limit=1)
    file, foreign = tmp_path / "file.jsonl", tmp_path / "foreign"
    file.write_text("", encoding="utf-8")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "load_model", nothing)
        for place, words in (
            (file, "is a file"),
            (file / "deeper", "is a file"),
            (foreign, "holds other files: choose a new folder"),
        ):
            with pytest.raises(SemalignError, match=words):
                evaluate(config, place)
        with pytest.raises(SemalignError, match="a model was loaded"):
            evaluate(config, tmp_path / "free")
    assert [entry.name for entry in foreign.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "free").exists(), "the same name is free for the next call"
    for left in ("items-mmlu.jsonl", ".items-mmlu.jsonl.x1y2z3"):  # what a killed evaluation leaves
        (tmp_path / left).mkdir()
        (tmp_path / left / left).write_text("", encoding="utf-8")
        assert evaluate(config, tmp_path / left) is not None


def test_the_command_prints_tables(
    models: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("one", ["--limit", "2"]), ("two", ["limit=2"])):
        arguments = ["evaluate", str(models[1]), "--data", str(data), "--tasks", "mmlu", "--out", str(tmp_path / name)]
        assert main([*arguments, *more]) == 0
    assert "mmlu accuracy" in capsys.readouterr().out
    assert main(["compare-evaluations", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    captured = capsys.readouterr()
    assert "second − first" in captured.out and "computed in" not in captured.err
    assert "+0.0000 [unbounded]" in captured.out and "inf" not in captured.out  # two documents
    other = json.loads((tmp_path / "two" / "evaluation.json").read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    (tmp_path / "two" / "evaluation.json").write_text(json.dumps(other), encoding="utf-8")
    assert main(["compare-evaluations", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "they computed in bfloat16 and float32, which alone changes answers" in capsys.readouterr().err
    assert main(["compare-evaluations", *[str(tmp_path / name) for name in ("one", "two", "one")]]) == 0
    assert "spread" in capsys.readouterr().out
    for more in (["--source", str(tmp_path / "one")], ["--seed", "1"]):
        assert main(["compare-evaluations", *[str(tmp_path / name) for name in ("one", "two", "one")], *more]) == 2
        assert "are for two evaluations, before and after" in capsys.readouterr().err


def test_a_run_folder_stands_for_its_trained_target(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pair[1], run / "model")
    (run / "experiment.json").touch()
    arguments = ["evaluate", str(run), "--tasks", "arithmetic", "--limit", "2", "--max-new-tokens", "3"]
    assert main([*arguments, "--out", str(tmp_path / "found")]) == 2
    assert f"the run in {run} is not finished: repeat its command" in capsys.readouterr().err
    (run / "result.json").touch()
    assert main([*arguments, "--out", str(tmp_path / "found")]) == 0
    found = read_evaluation(tmp_path / "found")
    assert found.result.config.model.path == str(run / "model")
    assert found.result.benchmarks["arithmetic"].protocol.max_new_tokens == 3
    assert all(len(item.output.split()) <= 3 for item in found.items["arithmetic"])


def test_what_is_unbounded_is_called_so(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    found = evaluate(config_of(models[1], data, tasks=["mmlu"], limit=1), tmp_path / "one")
    assert found is not None
    assert "[unbounded]" in evaluation_table(found) and "inf" not in evaluation_table(found)
    evaluate(config_of(models[0], data, tasks=["mmlu"], limit=1), tmp_path / "source")
    first, source = (read_evaluation(tmp_path / name) for name in ("one", "source"))
    table = pair_table(pair(first, first, source=source))
    assert "+0.0000 [unbounded]" in table and " 0% [unbounded]\n" in table
    assert table.endswith("\nunbounded: too few items, or a gap that they cannot distinguish from none")


def test_answers_of_four_bits_are_others(models: tuple[Path, Path]) -> None:
    for dtype, in_4bit, name in (("bfloat16", False, "bfloat16"), ("float32", True, "float32-4bit")):
        opened = open_model(ModelConfig(path=str(models[1]), dtype=dtype, load_in_4bit=in_4bit))
        assert opened.precision(torch.device("cpu")) == name


@pytest.mark.parametrize("model", ["evaluated", "source"])
def test_kept_figures_are_those_of_the_precision(
    model: str, models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        config = config_of(models[1], data, tasks=["gsm8k"], source={"path": str(models[0])})
        changed = config.model if model == "evaluated" else config.source
        assert changed is not None
        role = "model" if model == "evaluated" else "source"
        evaluate(config.model_copy(update={role: changed.model_copy(update={"dtype": dtype})}), tmp_path / dtype)
        found.append([item.kl for item in read_evaluation(tmp_path / dtype).items["gsm8k"]])
    assert found[0] != found[1]


def test_a_folder_takes_further_benchmarks_of_the_same_evaluation(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    evaluated(models[1], data, tmp_path / "out", tasks=["mmlu"])
    both = evaluated(models[1], data, tmp_path / "out", tasks=["gsm8k"])
    assert set(both.benchmarks) == {"mmlu", "gsm8k"} == set(both.config.tasks)
    assert set(read_evaluation(tmp_path / "out").items) == {"mmlu", "gsm8k"}
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for model, settings, word in ((models[1], {"limit": 1}, "limit"), (models[0], {}, "model")):
        with pytest.raises(SemalignError, match=f"another evaluation .*{word}"):
            evaluate(config_of(model, data, tasks=["mmlu"], **settings), tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_two_processes_add_to_one_folder(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = runner._Runner.run, tmp_path / "out"

    def run_while_another_writes(self: runner._Runner, *arguments: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(runner._Runner, "run", run)
        evaluated(models[1], data, place, tasks=["mmlu"])
        return run(self, *arguments)

    monkeypatch.setattr(runner._Runner, "run", run_while_another_writes)
    evaluated(models[1], data, place, tasks=["gsm8k"])
    assert set(read_evaluation(place).items) == {"mmlu", "gsm8k"}


@pytest.mark.parametrize("change", ["source", "dtype"])
def test_figures_against_another_source_or_in_another_dtype_are_no_additions(
    change: str, models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(models[0], tmp_path / "source")
    settings: dict[str, Any] = {"source": {"path": str(source)}}
    evaluated(models[1], data, tmp_path / "out", tasks=["mmlu"], **settings)
    if change == "source":
        text = json.loads((source / "config.json").read_text(encoding="utf-8"))
        (source / "config.json").write_text(json.dumps(text | {"trained_as": "another"}), encoding="utf-8")
    else:
        monkeypatch.setattr("semalign_harness.models.opening.OpenedModel.dtype", lambda self, device: torch.bfloat16)
    with pytest.raises(SemalignError, match=rf"another evaluation \(the {change} differs\)"):
        evaluated(models[1], data, tmp_path / "out", tasks=["gsm8k"], **settings)


def test_batches_are_sized_by_the_memory_that_the_model_leaves(tmp_path: Path) -> None:
    events = []

    class Empty(Knowing):
        def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
            return [(-1.0, True) for _ in requests]

    def make() -> Empty:
        events.append("loaded")
        return Empty(True)

    def size(kind: str, tokens: int) -> int:
        events.append("sized")
        return 4

    lm = JournaledLM(
        make,
        Journal(tmp_path / "answers.jsonl"),
        ENCODER,
        batch_size=size,
        progress=lambda label, total: lambda more: None,
        state=PartialState(cpu=True),
    )
    lm.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)])
    assert events == ["loaded", "sized"]


def test_the_last_token_of_a_continuation_is_no_input() -> None:
    lm = object.__new__(JournaledLM)
    lm._encoder = ENCODER
    whole = len(TOKENIZER("hello world")["input_ids"])
    assert lm.tokens(("hello", " world")) == whole - 1
    assert lm.tokens(("hello world", {"max_gen_toks": 7})) == whole + 7


def test_a_prompt_that_begins_with_bos_gets_no_second_one(starting: PreTrainedTokenizerFast) -> None:
    lm = object.__new__(JournaledLM)
    lm._encoder = encoder = TextEncoder(starting, chat=False)
    prompt, answer = "How many apples now ?", " The answer is 3"
    prompt_ids = (starting.bos_token_id, *TOKENIZER(prompt)["input_ids"])
    answer_ids = tuple(TOKENIZER(answer)["input_ids"])
    for start in ("", "<bos>"):
        example = gold_example(Text(start + prompt, answer), encoder, None)
        assert example.prompt_ids == prompt_ids and example.answer_ids == answer_ids
        assert lm.tokens((start + prompt, answer)) == len(prompt_ids) + len(answer_ids) - 1
        assert lm.tokens((start + prompt, {"max_gen_toks": 7})) == len(prompt_ids) + 7


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("semalign: ")]
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_be_evaluated_is_one_sentence(
    models: tuple[Path, Path],
    pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    start = ["evaluate", str(models[1]), "--data", str(data)]
    assert "needs a model" in refused(capsys, "evaluate")
    assert "humaneval" in refused(capsys, *start, "--tasks", "humanevil")
    assert "did you mean 'limit'" in refused(capsys, *start, "limits=3")
    assert "does not exist" in refused(capsys, "evaluate", str(models[1]), "--data", str(tmp_path / "none"))
    assert "does not exist" in refused(capsys, "evaluate", str(tmp_path / "none"), "--data", str(data))
    assert "reads at most 128" in refused(capsys, "evaluate", str(pair[1]), "--data", str(data), "--tasks", "gsm8k")
    assert "vllm" in refused(capsys, *start, "backend=vllm", "--tasks", "mmlu")
    bare = tmp_path / "bare"
    shutil.copytree(models[1], bare)
    (bare / "chat_template.jinja").unlink()
    assert "no chat template" in refused(capsys, "evaluate", str(bare), "--data", str(data), "--chat")
    assert "evaluation.json" in refused(capsys, "compare-evaluations", str(tmp_path), str(tmp_path))
    assert not [entry for entry in (tmp_path / "evaluations").rglob("*") if entry.is_file()]


def test_a_weak_sandbox_is_refused(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak = runner.probe().model_copy(update={"strong": False})
    monkeypatch.setattr(runner, "probe", lambda: weak)
    with pytest.raises(SemalignError, match="--allow-weak-sandbox"):
        evaluate(config_of(models[1], data, tasks=["mbpp"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
