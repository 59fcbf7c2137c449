"""Input that foreign code fails on is one sentence that names it; our own mistakes keep their traceback."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import transformers
from semalign_geometry.base import SemalignError
from semalign_harness.cli.main import main
from semalign_harness.util.failures import naming

Damage = Callable[[Path], object]


def changed(name: str, **changes: Any) -> Damage:
    """A JSON file of a model with other values."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")

    return damage


def written(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes: Any) -> Damage:
    return changed("config.json", **changes)


def template(text: str) -> Damage:
    return written("chat_template.jinja", text.encode())


MODELS: dict[str, tuple[Damage, str]] = {
    "no JSON": (written("config.json", b"{"), "not a valid JSON file"),
    "null": (written("config.json", b"null"), "TypeError"),
    "text for a size": (config(hidden_size="a"), "'hidden_size' expected int, got str"),
    "negative size": (config(hidden_size=-8), "negative dimension -8"),
    "no layers": (config(num_hidden_layers=0), "it has no layers"),
    "no heads": (config(num_attention_heads=0), "ZeroDivisionError"),
    "no key heads": (config(num_key_value_heads=0), "division"),
    "unknown activation": (config(hidden_act="nope"), "nope"),
    "unknown rope": (config(rope_parameters={"rope_type": "nope", "rope_theta": 1e4}), "nope"),
    "text for rope": (config(rope_parameters={"rope_type": "default", "rope_theta": "a"}), "unsupported operand"),
    "padding beyond": (config(pad_token_id=10**6), "Padding_idx must be within"),
    "number for a dtype": (config(dtype=3), "dtype is 3, expected one such as bfloat16"),
    "whole numbers": (config(dtype="int8"), "dtype is torch.int8, expected one such as bfloat16"),
    "number for names": (config(architectures=3), "architectures is 3, expected a list of names"),
    "numbers for names": (config(architectures=[3]), "architectures is [3], expected a list of names"),
    "text for a part": (config(text_config="x"), "its text configuration is 'x'"),
    "tokenizer": (written("tokenizer.json", b"{"), "could not be loaded as a language model"),
    "tokenizer without model": (changed("tokenizer.json", model=None), "could not be loaded as a language model"),
    "length of text": (changed("tokenizer_config.json", model_max_length="x"), "could not be loaded as"),
    "number for a token": (changed("tokenizer_config.json", eos_token=3), "eos_token has to be either str"),
}
"""Damage to a model, and words of the sentence on it."""

ROWS: dict[str, tuple[Any, str]] = {
    "half a character": ({"prompt": "a \ud800", "completion": "b"}, "line 1 holds half of a character"),
    "a list": ({"prompt": [3], "completion": "b"}, "of type list"),
    "null": ({"prompt": None, "completion": "b"}, "its field 'prompt' is null"),
    "no fields": ({}, "has neither messages nor the field 'prompt'"),
    "text for messages": ({"messages": "x"}, "messages that are not role and content"),
}

TEMPLATES = {
    "{% if %}": "TemplateSyntaxError",
    "{{ 1 + messages[0].content }}": "TypeError: unsupported operand",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ nothing.here }}": "UndefinedError: 'nothing' is undefined",
    "{{ messages[0].content.nope() }}": "UndefinedError",
    "{{ messages[7].content }}": "UndefinedError",
    "{{ raise_exception('not so') }}": "TemplateError: not so",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "RecursionError",
}


def both(source: Path, target: Path, rows: Path) -> list[list[str]]:
    """The commands that read a pair and rows."""
    few = [f"data.train.path={rows}", "data.held_out=null", "data.train_rows=8", "data.held_out_rows=4"]
    return [
        ["run", "tiny", f"source.path={source}", f"target.path={target}", *few, "data.attribution_rows=2", "--quiet"],
        ["doctor", str(source), str(target), "--data", str(rows), "data.train_rows=8", "data.held_out_rows=4"],
    ]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command on input that cannot be used."""
    code, output = main(command), capsys.readouterr()
    assert "Traceback" not in output.err, output.err
    assert not [file for file in Path("runs").rglob("*") if file.is_file()]
    if code == 1:
        assert command[0] == "doctor" and not output.err, output.err
        return " ".join(output.out.split())
    assert code == 2 and output.err.startswith("semalign: ") and output.err.count("\n") == 1, (code, output.err)
    return output.err


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("damage", MODELS)
def test_a_damaged_model_is_one_sentence(
    damage: str, role: str, pair: tuple[Path, Path], rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, words = MODELS[damage]
    bad = Path("bad")
    shutil.copytree(pair[role == "target"], bad)
    break_it(bad)
    for command in both(*((bad, pair[1]) if role == "source" else (pair[0], bad)), rows_file):
        told = refused(command, capsys)
        assert words in told and "bad" in told, told


@pytest.mark.parametrize("damage", ROWS)
def test_a_row_that_cannot_be_read_is_one_sentence(
    damage: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    row, words = ROWS[damage]
    rows = Path("rows.jsonl")
    rows.write_text(f"{json.dumps(row)}\n" * 20, encoding="utf-8")
    for command in both(*pair, rows):
        told = refused(command, capsys)
        assert words in told and "rows.jsonl" in told, told


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_that_fails_is_one_sentence(
    text: str, pair: tuple[Path, Path], rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path("bad")
    shutil.copytree(pair[1], bad)
    template(text)(bad)
    for command in both(pair[0], bad, rows_file):
        told = refused(command, capsys)
        assert TEMPLATES[text] in told and "row" in told and "rows.jsonl" in told, told


def test_a_damaged_index_is_a_finding_of_the_doctor(
    pair: tuple[Path, Path], rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path("bad")
    shutil.copytree(pair[1], bad)
    (bad / "model.safetensors").unlink()
    for content in ("{}", "[]", '{"weight_map": {"a": 3}}'):
        (bad / "model.safetensors.index.json").write_text(content, encoding="utf-8")
        assert "has no weight_map of tensors to files" in refused(both(pair[0], bad, rows_file)[1], capsys)


def test_a_forward_run_that_fails_names_the_model(
    pair: tuple[Path, Path], overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that refuses what only a row holds, as one does that lacks a row of its embedding."""
    own = transformers.models.llama.modeling_llama.LlamaModel.forward
    script = "def forward(self, input_ids=None, **more):\n    if input_ids.shape[1] > 8: raise IndexError(text)\n"
    space = {"__name__": "modeling_other", "text": "index out of range in self"}
    exec(f"{script}    return own(self, input_ids=input_ids, **more)", space | {"own": own}, space)
    monkeypatch.setattr("semalign_harness.models.opening.DecoderView.verify", lambda self: None)
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaModel, "forward", space["forward"])
    told = refused(["run", "tiny", *overrides, "--quiet"], capsys)
    assert f"through the target {pair[1]}: IndexError: index out of range in self" in told


def test_a_full_memory_says_what_to_lower() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("MPS out of memory"),
    ):
        with (
            pytest.raises(SemalignError, match=r"^the model: the memory is full \(.*\): lower batch_size"),
            naming("the model"),
        ):
            raise error


def test_our_own_mistakes_keep_their_class() -> None:
    space = {"__name__": "semalign_harness.somewhere", "torch": torch}
    exec(
        "def assertion():\n    assert False\ndef wrong_call():\n    torch.nn.functional.embedding(None, None)\n", space
    )
    for mistake, kind in ((space["assertion"], AssertionError), (space["wrong_call"], (TypeError, AttributeError))):
        with pytest.raises(kind), naming("the model"):
            mistake()  # type: ignore[operator]


def test_interruptions_full_disks_and_our_own_sentences_pass() -> None:
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device"), SemalignError("choose another")):
        with pytest.raises(type(error)) as caught, naming("the model"):
            raise error
        assert caught.value is error


def test_verbose_shows_the_traceback_of_foreign_code(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG, "semalign_harness"),
        pytest.raises(SemalignError, match="^row 3: UndefinedError"),
    ):
        with naming("row 3"):
            jinja2.Environment().from_string("{{ a.b }}").render()
    assert "jinja2" in caplog.text and "Traceback" in caplog.text


def test_a_bug_ends_with_a_sentence_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("semalign_harness.cli.presets.run", fails)
    assert main(["presets"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "semalign: this is a bug: please report the lines above, and the command"
