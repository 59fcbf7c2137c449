"""Rows from local files and folders, in the formats and compressions that `datasets` reads."""

import bz2
import csv
import gzip
import json
import lzma
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BufferedReader, BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from semalign_geometry.base import SemalignError

from ..util.failures import reason
from .settings import RowsConfig

Row = dict[str, Any]
FORMS = (
    "rows are .jsonl, .json, .csv, .tsv, .parquet or .arrow files, also packed (.gz, .zst, .bz2, .xz, .lz4, .zip), a "
    "folder of such files, or a data set of the hub"
)
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of one half of a character; two of them may make a whole one."""


def is_file_name(path: Path) -> bool:
    """Whether a path of rows ends like a file, not like a folder or the id of a data set on the hub."""
    return path.suffix.lower() in {*_FORMATS, *_PACKERS, ".zip"}


def read_local(path: Path, config: RowsConfig) -> list[Row]:
    """All rows of a file, of the split of a folder, or of a data set that `save_to_disk` wrote.

    A folder has subsets and splits as it would have on the hub. Fields of CSV and TSV files are text. What a JSON row
    lacks stays absent; Parquet and Arrow hold a null there.

    Raises:
        SemalignError: nothing is there, or a file is damaged or of another format; the message names its line.
    """
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_rows(path, config.split)
        return [row for file in _split_files(path, config) for row in _file_rows(file)]
    if not path.is_file():
        raise SemalignError(f"{path} does not exist: {FORMS}")
    return list(_file_rows(path))


def files_at(path: Path) -> list[Path]:
    """The files that rows at a path may be read from."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] * path.is_file()


def _file_rows(path: Path) -> Iterator[Row]:
    try:
        with _opened(path) as (stream, name):
            yield from _FORMATS.get(Path(name).suffix.lower(), _json_rows)(stream, path)
    except (SemalignError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise SemalignError(f"{path} is not text in UTF-8: {FORMS}") from error
    except Exception as error:  # each format and each compression has errors of its own
        raise SemalignError(f"{path} cannot be read: {reason(error)}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, str]]:
    """The unpacked bytes of a file, and the name that says their format."""
    ending = path.suffix.lower()
    if ending == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
            if len(names) != 1:
                raise SemalignError(f"{path} holds {len(names)} files: unpack it, and name one of them, or the folder")
            member: Any = archive.open(names[0])  # has more methods than its declared type
            with BufferedReader(member) as stream:
                yield stream, names[0]
    elif ending in _PACKERS:
        with _PACKERS[ending](path) as stream:
            yield BufferedReader(stream), path.stem
    else:
        with path.open("rb") as stream:
            yield stream, path.name


def _arrow_stream(path: Path, compression: str) -> Any:
    import pyarrow  # which most rows do without

    return pyarrow.input_stream(path, compression=compression)


def _json_rows(stream: BufferedReader, path: Path) -> Iterator[Row]:
    """One object a line, or one array of objects."""
    # newline="\n": Unicode line separators inside a row are no ends of lines; -sig: Windows marks its files.
    with TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as file:
        text = file.read()
    places: Iterator[tuple[str, Any]]
    if text.lstrip()[:1] == "[":
        places = ((f"item {number}", row) for number, row in enumerate(_parsed(text, path, 1), 1))
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        places = ((f"line {number}", _parsed(line, path, number)) for number, line in lines)
    suspect = _HALF_CHARACTER.search(text) is not None
    for place, row in places:
        if not isinstance(row, dict):
            raise SemalignError(f"{path}, {place} is not a JSON object: {FORMS}")
        if suspect and not _is_text(row):
            raise SemalignError(
                f"{path}, {place} holds half of a character (an escape from \\ud800 to \\udfff alone): write the whole "
                "character, or leave the row out"
            )
        yield row


def _parsed(text: str, path: Path, first: int) -> Any:
    """The value of a text that begins on the line `first` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise SemalignError(f"{path}, line {line} is not JSON ({error.msg}): {FORMS}") from error
    except (ValueError, RecursionError) as error:
        raise SemalignError(
            f"{path}, line {first} begins what nests too deep or holds too long a number to be read: leave it out"
        ) from error


def _is_text(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(stream: BufferedReader, path: Path, delimiter: str = ",") -> Iterator[Row]:
    """One row a record, under the names of the first; every field is text as it stands there."""
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default cuts no field, but refuses long ones
    with TextIOWrapper(stream, encoding="utf-8-sig", newline="") as file:
        records = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(records, [])
            if len({*header}) < len(header):
                raise SemalignError(f"{path} names a field twice in its first line: give each a name of its own")
            for record in filter(None, records):
                if len(record) != len(header):
                    raise SemalignError(
                        f"{path}, line {records.line_num} has {len(record)} fields where the first line names "
                        f"{len(header)}: put fields that hold the separator, quotes or a line break in double quotes"
                    )
                yield dict(zip(header, record, strict=True))
        except csv.Error as error:
            raise SemalignError(f"{path}, line {records.line_num} is not CSV: {error}") from error


def _parquet_rows(stream: BufferedReader, path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    seekable = stream if stream.seekable() else BytesIO(stream.read())
    yield from parquet.ParquetFile(seekable).read().to_pylist()


def _arrow_rows(stream: BufferedReader, path: Path) -> Iterator[Row]:
    """Rows of Arrow's file format, which has a mark of its own, or of its stream format, which `datasets` caches."""
    from pyarrow import ipc

    data = stream.read()
    reader = ipc.open_file(data) if data.startswith(b"ARROW1") else ipc.open_stream(data)
    yield from reader.read_all().to_pylist()


def _split_files(folder: Path, config: RowsConfig) -> list[Path]:
    """The files of a split of a folder, by the rules of the hub: its README, else the names of files and folders."""
    import datasets  # seconds to import

    with tempfile.TemporaryDirectory() as cache:
        try:
            builder = datasets.load_dataset_builder(str(folder), config.subset, cache_dir=cache)
        except Exception as error:  # which has no common base class of errors
            raise SemalignError(f"{folder} holds no rows that can be read ({reason(error)}): {FORMS}") from error
    return [Path(file) for file in _split(builder.config.data_files, folder, config.split)]


def _saved_rows(folder: Path, split: str) -> list[Row]:
    """Rows of a folder that `save_to_disk` wrote."""
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            found = _split(found, folder, split)
        return [dict(row) for row in found.with_format(None)]
    except SemalignError:
        raise
    except Exception as error:  # of datasets, of pyarrow, and of what decodes pictures and sound
        raise SemalignError(f"{folder} cannot be read: {reason(error)}") from error


def _split(of: Mapping[Any, Any], folder: Path, split: str) -> Any:
    """What belongs to a split; keys are names, or objects of `datasets` that stand for them."""
    by_name = {str(name): value for name, value in of.items()}
    if split not in by_name:
        raise SemalignError(f"{folder} has no split {split!r}, but {', '.join(by_name)}: set the split of these rows")
    return by_name[split]


_FORMATS: dict[str, Callable[[BufferedReader, Path], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
"""By the ending of a name; files with another one are read as JSON."""
_PACKERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": partial(_arrow_stream, compression="zstd"),
    ".lz4": partial(_arrow_stream, compression="lz4"),
}
