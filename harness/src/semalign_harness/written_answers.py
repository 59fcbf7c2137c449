"""Training rows whose answers a model has written: batched, kept by prompt, and gone on with after an interruption."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from semalign_align import Ranks
from semalign_attribution import undisturbed
from semalign_geometry import SemalignError
from torch import Tensor

from .console import Console
from .data import Example
from .experiment import Experiment, WritingConfig
from .generation import GENERATION, end_ids, generate, likeliest
from .inputs import Inputs, load
from .journal import Answer, Journal, request_key
from .locking import lock_of, wait_for
from .measure import same_number
from .models import LoadedModel, cache_folder

ROWS_AT_ONCE = 4
"""Times the rows of a forward run that are written together."""


def with_written_answers(experiment: Experiment, inputs: Inputs, device: torch.device, console: Console) -> Inputs:
    """The inputs with the answers that an experiment asks for in place of the training rows' own.

    Rows whose answer makes them longer than `data.max_length`, holds a token that only one model knows, or is wrong
    where only correct ones are kept, are left out, and counted. Held-out rows stay as they are.

    Raises:
        SemalignError: no row is left. OSError: the disk is full.
    """
    data = experiment.data
    if data.answers == "gold":
        return inputs
    written = _written(experiment, inputs, device, console)
    known = set(inputs.shared.target_ids.tolist())
    kept, too_long, unknown, wrong = [], 0, 0, 0
    for row, ids in zip(inputs.split.train, written, strict=True):
        changed = dataclasses.replace(row, answer_ids=tuple(ids))
        text = str(inputs.target.tokenizer.decode(ids, skip_special_tokens=True))
        if len(changed) > data.max_length:
            too_long += 1
        elif not known.issuperset(ids):
            unknown += 1
        elif data.writing.keep == "correct" and not same_number(text, row.answer):
            wrong += 1
        else:
            kept.append(changed)
    console.note(
        f"answers by the {data.answers}: {len(kept)} rows, {wrong} wrong ones left out, "
        f"{too_long} longer than data.max_length={data.max_length}"
        + (f", {unknown} with tokens that only one model knows" if unknown else "")
    )
    if not kept:
        raise SemalignError(
            f"no row is left of {len(written)} with answers by the {data.answers} ({wrong} wrong, {too_long} longer "
            f"than data.max_length={data.max_length}, {unknown} with tokens that only one model knows): raise "
            "data.max_length, or set data.writing.keep=all"
        )
    return dataclasses.replace(inputs, split=dataclasses.replace(inputs.split, train=kept))


def _written(experiment: Experiment, inputs: Inputs, device: torch.device, console: Console) -> list[list[int]]:
    """The answer of each training row, from the journal where it is there."""
    wanted, writer, ranks = experiment.data.writing, experiment.data.answers, Ranks.current()
    opened, identity = (inputs.source, inputs.source_id) if writer == "source" else (inputs.target, inputs.target_id)
    name = hashlib.sha256(f"{identity} {opened.precision(device)} {GENERATION}".encode()).hexdigest()[:16]
    folder = cache_folder() / "answers" / name
    with _alone(folder, ranks, console):
        journal = Journal(folder / f"answers-{ranks.rank}.jsonl")
        for file in sorted(folder.glob("answers-*.jsonl")):
            journal.read(file)
        ranks.wait()  # all have read before one writes

        def key(row: Example) -> str:
            return request_key("answer", row.prompt_ids, wanted.temperature, wanted.seed, wanted.max_new_tokens)

        missing = [row for row in inputs.split.train if journal.get(key(row)) is None]
        missing.sort(key=lambda row: len(row.prompt_ids))
        if missing:
            loaded = load(console, f"{writer} that writes answers", opened, device)
            size = ROWS_AT_ONCE * experiment.batch_size
            parts = [missing[start : start + size] for start in range(0, len(missing), size)]
            for part in console.progress(f"write {len(missing)} answers", parts[ranks.rank :: ranks.size]):
                _write(part, loaded, wanted, lambda row, answer: journal.add({key(row): answer}))
            ranks.wait()
            for file in sorted(folder.glob("answers-*.jsonl")):
                journal.read(file)
        found = [journal.get(key(row)) for row in inputs.split.train]
        return [list(answer.value) for answer in found if answer is not None]


def _write(
    rows: list[Example], loaded: LoadedModel, wanted: WritingConfig, keep: Callable[[Example, Answer], None]
) -> None:
    """Write the answers of some rows, and keep each when it ends."""
    with undisturbed(loaded.model):
        generate(
            loaded.model,
            [row.prompt_ids for row in rows],
            max_new_tokens=wanted.max_new_tokens,
            ends=end_ids(loaded.model, loaded.tokenizer),
            ended=lambda place, ids: keep(rows[place], Answer(ids, 0.0, len(rows))),
            pick=likeliest if wanted.temperature == 0 else _Sampler(rows, wanted.temperature, wanted.seed),
        )


@contextlib.contextmanager
def _alone(folder: Path, ranks: Ranks, console: Console) -> Iterator[None]:
    """Keeps other jobs from the same journals; waits for one that writes them."""
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            with contextlib.suppress(OSError):  # a cache that cannot be written to may hold all answers
                lock = lock_of(folder)
                wait_for(lock, console, "writes answers of the same model")
                stack.callback(lock.release)
        ranks.wait()
        yield


class _Sampler:
    """Draws each row's tokens with numbers of its own, so that they do not depend on what else is in the batch."""

    def __init__(self, rows: list[Example], temperature: float, seed: int) -> None:
        keys = [request_key("sample", row.prompt_ids, seed) for row in rows]
        self._generators = [torch.Generator().manual_seed(int(key[:15], 16)) for key in keys]
        self._temperature = temperature

    def __call__(self, logits_BV: Tensor, rows: list[int]) -> Tensor:
        """A token for each row by the Gumbel trick: argmax(logits / temperature + noise) is a draw of the softmax."""
        noise = torch.stack([torch.rand(logits_BV.shape[1], generator=self._generators[row]) for row in rows])
        gumbel = -(-noise.clamp_min(1e-20).log()).log()
        return (logits_BV.float() / self._temperature + gumbel.to(logits_BV.device)).argmax(-1)
