"""Rows are the same in every format and compression; a damaged file is one sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from semalign_geometry.base import SemalignError
from semalign_harness import load_rows
from semalign_harness.data.row_files import files_at
from semalign_harness.data.settings import RowsConfig

ROWS = [
    {"prompt": "007", "completion": "None"},
    {"prompt": 'a\u2028b, "c"\n\td', "completion": "1.50"},
    {"prompt": "Straße 🙂", "completion": "NA"},
    {"prompt": "x" * 200_000, "completion": "True"},
]
"""Text that readers with types of their own take for numbers, truth values or nothing."""


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ROWS[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def arrow(rows: list[dict[str, Any]], kind: Callable[..., Any]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with kind(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def in_zip(data: bytes, *names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return file.getvalue()


def compressed(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return bytes(sink.getvalue())


FORMATS = {
    "jsonl": jsonl(ROWS),
    "ndjson": jsonl(ROWS),
    "json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "csv": separated(","),
    "tsv": separated("\t"),
    "parquet": arrow(ROWS, parquet.ParquetWriter),
    "arrow": arrow(ROWS, pa.ipc.new_stream),
    "feather.arrow": arrow(ROWS, pa.ipc.new_file),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: compressed(data, "zstd"),
    ".lz4": lambda data: compressed(data, "lz4"),
}


def read(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return load_rows(RowsConfig(path=str(path), **settings))


@pytest.mark.parametrize("packer", [*PACKERS, ".zip", ".ZIP"])
@pytest.mark.parametrize("ending", FORMATS)
def test_rows_are_the_same_in_every_format_and_compression(ending: str, packer: str, tmp_path: Path) -> None:
    data = FORMATS[ending]
    packed = PACKERS[packer](data) if packer in PACKERS else in_zip(data, f"rows.{ending}")
    file = tmp_path / f"rows.{ending}{packer}"
    file.write_bytes(packed)
    assert read(file) == ROWS


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "arrow"])
def test_values_keep_their_types(ending: str, tmp_path: Path) -> None:
    rows = [
        {"number": 1, "share": 1.0, "right": True, "choices": ["None", "NA"], "of": {"role": "user"}},
        {"number": 2**40, "share": 0.5, "right": False, "choices": [], "of": {"role": "assistant"}},
    ]
    written = {
        "jsonl": jsonl(rows),
        "json": json.dumps(rows).encode(),
        "parquet": arrow(rows, parquet.ParquetWriter),
        "arrow": arrow(rows, pa.ipc.new_stream),
    }
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(written[ending])
    assert repr(read(file)) == repr(rows)


def test_what_a_json_row_lacks_stays_absent(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": 1}, {"messages": [{"role": "user"}]}, {"prompt": 2.5, "completion": "b"}]
    for name, data in (("rows.jsonl", jsonl(rows)), ("rows.json", json.dumps(rows).encode())):
        (tmp_path / name).write_bytes(data)
        assert repr(read(tmp_path / name)) == repr(rows)


def test_a_windows_mark_is_no_part_of_a_field(tmp_path: Path) -> None:
    for name, data in (
        ("rows.csv", "prompt,completion\r\na,b\r\n"),
        ("rows.json", '[{"prompt": "a", "completion": "b"}]'),
    ):
        (tmp_path / name).write_bytes(("\ufeff" + data).encode())
        assert read(tmp_path / name) == [{"prompt": "a", "completion": "b"}]


DAMAGED = [
    ("rows.csv", b"", "holds no rows"),
    ("rows.csv", b"prompt,completion\n", "holds no rows"),
    ("rows.csv", b"prompt,prompt\na,b\n", "names a field twice in its first line"),
    ("rows.csv", b"prompt,completion\na,b\n\nc\n", ", line 4 has 1 fields where the first line names 2: put"),
    ("rows.csv", b'prompt,completion\n"a\nb",c,d\n', ", line 3 has 3 fields where the first line names 2: put"),
    ("rows.csv", b'prompt,completion\na,"b\n', ", line 2 is not CSV: unexpected end of data"),
    ("rows.csv", b"prompt,completion\n\xff,b\n", "is not text in UTF-8"),
    ("rows.parquet", b"PAR1 nothing PAR1", "rows.parquet cannot be read: Arrow"),
    ("rows.parquet", FORMATS["parquet"][:-40], "rows.parquet cannot be read: Arrow"),
    ("rows.parquet", b"", "rows.parquet cannot be read: Arrow"),
    ("rows.arrow", FORMATS["arrow"][:100], "rows.arrow cannot be read"),
    ("rows.jsonl.zst", compressed(FORMATS["jsonl"], "zstd")[:-9], "rows.jsonl.zst cannot be read: OSError"),
    ("rows.jsonl.zst", b"no zstd", "rows.jsonl.zst cannot be read: OSError"),
    ("rows.jsonl.xz", lzma.compress(FORMATS["jsonl"])[:-9], "rows.jsonl.xz cannot be read: EOFError"),
    ("rows.jsonl.bz2", b"BZh no", "rows.jsonl.bz2 cannot be read: OSError"),
    ("rows.zip", b"PK no", "rows.zip cannot be read: BadZipFile: File is not a zip file"),
    ("rows.zip", in_zip(b"{}", "train.jsonl", "test.jsonl"), "holds 2 files: unpack it, and name one of them"),
    ("rows.jsonl", b'{"a": "\\ud83d\\ude42"}\n{"a": ["\\uD83D"]}\n', ", line 2 holds half of a character"),
    ("rows.json", b'[{"a": "b"}, {"\\ude42": 1}]', ", item 2 holds half of a character"),
]


@pytest.mark.parametrize(("name", "data", "words"), DAMAGED)
def test_a_damaged_file_is_one_sentence(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(SemalignError) as error:
        read(file)
    assert words in str(error.value) and str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_an_archive_with_a_password_is_one_sentence(tmp_path: Path) -> None:
    data = bytearray(in_zip(b'{"prompt": "a"}', "rows.jsonl"))
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # bit 0 of the flags, in both records of the file
        data[data.index(mark) + place] |= 1
    (tmp_path / "rows.zip").write_bytes(data)
    with pytest.raises(SemalignError, match=r"rows\.zip cannot be read: RuntimeError: File 'rows\.jsonl' is encrypted"):
        read(tmp_path / "rows.zip")


def test_a_folder_has_splits_as_on_the_hub_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-00000-of-00002.jsonl").write_bytes(jsonl(ROWS[:1]))
    (folder / "data" / "train-00001-of-00002.jsonl").write_bytes(jsonl([{"messages": []}]))
    (folder / "data" / "test-00000-of-00001.jsonl").write_bytes(jsonl(ROWS[1:]))
    before = files_at(tmp_path)
    assert read(folder) == [ROWS[0], {"messages": []}], "rows with other fields stay as they are"
    assert read(folder, split="test") == ROWS[1:]
    with pytest.raises(SemalignError, match="has no split 'dev', but train, test: set the split of these rows"):
        read(folder, split="dev")
    assert files_at(tmp_path) == before and capfd.readouterr().err == ""


def test_a_folder_may_have_subsets(tmp_path: Path) -> None:
    for name in ("main", "other"):
        (tmp_path / f"{name}.csv").write_text(f"prompt,completion\n{name},b\n", encoding="utf-8")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("main", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    assert read(tmp_path, subset="other") == [{"prompt": "other", "completion": "b"}]
    with pytest.raises(SemalignError, match=r"holds no rows that can be read \(ValueError: Config name is missing"):
        read(tmp_path)


def test_a_folder_without_rows_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="holds no rows that can be read .* rows are .jsonl"):
        read(tmp_path)


def test_data_sets_that_were_saved_to_disk_are_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from datasets import Dataset, DatasetDict

    sets = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    sets["train"].save_to_disk(tmp_path / "one")
    DatasetDict(sets).save_to_disk(tmp_path / "both")
    capfd.readouterr()
    assert read(tmp_path / "one") == read(tmp_path / "both") == ROWS
    assert read(tmp_path / "both", split="test") == ROWS[:1]
    assert capfd.readouterr().err == ""
    with pytest.raises(SemalignError, match="has no split 'dev', but train, test"):
        read(tmp_path / "both", split="dev")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"damaged")
    with pytest.raises(SemalignError, match="one cannot be read: "):
        read(tmp_path / "one")
