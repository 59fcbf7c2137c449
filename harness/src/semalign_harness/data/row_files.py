"""Rows from local files and folders, in the formats and compressions that `datasets` reads."""

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
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
    """Return whether a path ends like a file of rows, not like a folder or the id of a data set."""
    return path.suffix.lower() in {*_FORMATS, *_PACKERS, ".zip"}


def read_local(path: Path, config: RowsConfig) -> list[Row]:
    """Read all rows of a file, of a folder's split, or of a data set that `save_to_disk` wrote.

    A folder has subsets and splits as it would have on the hub. Fields of CSV and TSV files are
    text. A missing field of a JSON row stays absent; Parquet and Arrow hold a null there.

    Raises:
        SemalignError: nothing is there, or a file is damaged or of another format; the message
            names its line.
    """
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_rows(path, config.split)
        return [row for file in _split_files(path, config) for row in _file_rows(file)]
    if not path.is_file():
        raise SemalignError(f"{path} does not exist: {FORMS}")
    return _file_rows(path)


def files_at(path: Path) -> list[Path]:
    """Return the files that rows at a path may be read from."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] * path.is_file()


def _file_rows(path: Path) -> list[Row]:
    try:
        data, name = _unpacked(path)
        return list(_FORMATS.get(Path(name).suffix.lower(), _json_rows)(data, path))
    except (SemalignError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise SemalignError(f"{path} is not text in UTF-8: {FORMS}") from error
    except Exception as error:  # each format and each compression has errors of its own
        raise SemalignError(f"{path} cannot be read: {reason(error)}") from error


def _unpacked(path: Path) -> tuple[bytes, str]:
    """Unpacked bytes of a file, and the name that ends in their format."""
    ending = path.suffix.lower()
    if ending in _PACKERS:
        return _PACKERS[ending](path.read_bytes()), path.stem
    if ending != ".zip":
        return path.read_bytes(), path.name
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        if len(names) != 1:
            raise SemalignError(f"{path} holds {len(names)} files: unpack it, and name one of them, or the folder")
        return archive.read(names[0]), names[0]


def _arrow_unpacked(data: bytes, codec: str) -> bytes:
    import pyarrow  # most rows do not need it

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), codec) as stream:
        return bytes(stream.read())


def _json_rows(data: bytes, path: Path) -> Iterator[Row]:
    """One object a line, or one array of objects."""
    text = data.decode("utf-8-sig")  # Windows marks its files
    places: Iterator[tuple[str, Any]]
    if text.lstrip()[:1] == "[":
        places = ((f"item {number}", row) for number, row in enumerate(_parsed(text, path, 1), 1))
    else:
        # Not splitlines(): Unicode line separators inside a row are no ends of lines.
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
    """Value of a text that begins on the line `first` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise SemalignError(f"{path}, line {line} is not JSON ({error.msg}): {FORMS}") from error
    except (ValueError, RecursionError) as error:
        raise SemalignError(
            f"{path}, line {first} begins a value that nests too deep or holds too long a number: leave it out"
        ) from error


def _is_text(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(data: bytes, path: Path, delimiter: str = ",") -> Iterator[Row]:
    """One row a record, under the names of the first; every field is text as it stands there."""
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default refuses long fields
    records = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True)
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


def _parquet_rows(data: bytes, path: Path) -> list[Row]:
    from pyarrow import parquet

    rows: list[Row] = parquet.ParquetFile(io.BytesIO(data)).read().to_pylist()
    return rows


def _arrow_rows(data: bytes, path: Path) -> list[Row]:
    """Rows of Arrow's file format, which begins with a mark, or of its stream format."""
    from pyarrow import ipc

    reader = ipc.open_file(data) if data.startswith(b"ARROW1") else ipc.open_stream(data)
    rows: list[Row] = reader.read_all().to_pylist()
    return rows


def _split_files(folder: Path, config: RowsConfig) -> list[Path]:
    """Files of a folder's split, by the hub's rules: its README, else names of files and folders."""
    import datasets  # takes seconds to import

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
    except Exception as error:  # of datasets, of pyarrow, and of decoders of images and sound
        raise SemalignError(f"{folder} cannot be read: {reason(error)}") from error


def _split(of: Mapping[Any, Any], folder: Path, split: str) -> Any:
    """Value of a split; keys are names, or objects of `datasets` that stand for them."""
    by_name = {str(name): value for name, value in of.items()}
    if split not in by_name:
        raise SemalignError(f"{folder} has no split {split!r}, but {', '.join(by_name)}: set the split of these rows")
    return by_name[split]


_FORMATS: dict[str, Callable[[bytes, Path], Iterator[Row] | list[Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": functools.partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
"""By the ending of a name; files with another one are read as JSON."""
_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": functools.partial(_arrow_unpacked, codec="zstd"),
    ".lz4": functools.partial(_arrow_unpacked, codec="lz4"),
}
