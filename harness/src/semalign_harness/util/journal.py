"""Answers of a model, kept on disk as they come, so that an interrupted call resumes."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """The answer of a model to one request."""

    value: Any
    """Text of a generation; [log-likelihood, greedy] of a continuation."""
    seconds: float
    """Wall time since the answer before it, or its share of a batch that is answered at once."""
    batch: int
    """Requests that ran together."""


class Journal:
    """A file of one JSON line for each answer, appended whole.

    A line that was cut off while it was written, or that cannot be read, is ignored: its request is asked again.
    """

    def __init__(self, path: Path) -> None:
        """Read the answers of earlier calls.

        Args:
            path: the file; its folder is made when the first answer is written.
        """
        self.path = path
        self._answers: dict[str, Answer] = {}
        if torn := self.read(path):
            os.truncate(path, path.stat().st_size - torn)

    def read(self, file: Path) -> int:
        """Add the answers of a file; return the size of a torn last line, in bytes."""
        whole, _, torn = (file.read_bytes() if file.exists() else b"").rpartition(b"\n")
        for line in whole.split(b"\n") if whole else []:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            match entry:
                case {"key": str(key), "value": value, "seconds": int() | float() as seconds, "batch": int(batch)}:
                    self._answers[key] = Answer(value, seconds, batch)
        return len(torn)

    def read_ranks(self) -> None:
        """Add the answers of all ranks, from the files `answers-<rank>.jsonl` beside this one."""
        for file in sorted(self.path.parent.glob("answers-*.jsonl")):
            self.read(file)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """Return the answer to a request, None when there is none yet."""
        return self._answers.get(key)

    def found(self, keys: Iterable[str]) -> list[Answer]:
        """Return the answers to requests that are all kept."""
        return [self._answers[key] for key in keys]

    def add(self, answers: dict[str, Answer]) -> None:
        """Keep answers; they are on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"key": key, **answer._asdict()}) + "\n" for key, answer in answers.items())
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self._answers |= answers


def request_key(kind: str, *arguments: object) -> str:
    """Hash of the kind and the arguments of a request."""
    return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True, default=str).encode()).hexdigest()
