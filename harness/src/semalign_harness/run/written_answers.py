"""Rows whose answers a model writes: in batches, kept by prompt, resumed after an interruption."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from semalign_align import Ranks
from semalign_attribution import undisturbed
from semalign_geometry.base import SemalignError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.encoding import Example, Role
from ..data.settings import DataConfig, WritingConfig
from ..generation import GENERATION, end_ids, generate, likeliest
from ..models.loading import LoadedModel
from ..reading import answer_text, same_number
from ..util.cache import cache_folder
from ..util.console import Console
from ..util.failures import naming
from ..util.journal import Answer, Journal, request_key
from ..util.locking import lock_of, wait_for
from .job import Job

Prompt = tuple[int, ...]

ROWS_AT_ONCE = 4
"""Times the rows of a forward run that are written together."""


def written_parts(data: DataConfig) -> dict[Role, list[str]]:
    """Return the parts of the data whose answers each model writes, by model."""
    writers = {"train": data.answers, "held_out": data.held_out_answers}
    roles: tuple[Role, ...] = ("source", "target")
    return {role: parts for role in roles if (parts := [part for part, by in writers.items() if by == role])}


def describe_writing(data: DataConfig) -> list[str]:
    """Return the answers that are written first, as lines of text."""
    rows = {"train": f"{data.train_rows} training rows", "held_out": f"{data.held_out_rows} held-out rows"}
    return [
        f"plan: first the {writer} writes answers to {' and '.join(rows[part] for part in parts)}, of at most "
        f"{data.writing.max_new_tokens} tokens each, unless they are kept already"
        for writer, parts in written_parts(data).items()
    ]


def with_written_answers(job: Job) -> Job:
    """Return the job with written answers in place of the rows' own, where the experiment wants them.

    Rows are left out, and counted, whose answer makes them longer than `data.max_length`, holds a token that only one
    model knows, or is wrong where only correct ones are trained on. The reference of a held-out row, which a generated
    answer is compared with, stays the row's own. Where the models have different tokenizers, an answer is carried over
    as text; those that are no text, or that both models read differently, are left out and counted.

    Raises:
        SemalignError: no row is left. OSError: the disk is full.
    """
    split = job.inputs.split
    rows = {"train": split.train, "held_out": split.held_out}
    unchecked = _Unchecked(job)
    for writer, parts in written_parts(job.experiment.data).items():
        prompts = list(dict.fromkeys(row.on(writer).prompt_ids for part in parts for row in rows[part]))
        written = _written(job, writer, prompts, unchecked)
        rows |= {part: _kept(job, writer, part, rows[part], written) for part in parts}
    return replace(
        job, inputs=replace(job.inputs, split=replace(split, train=rows["train"], held_out=rows["held_out"]))
    )


def _kept(job: Job, writer: Role, part: str, rows: list[Example], written: dict[Prompt, list[int]]) -> list[Example]:
    """Return the usable rows of one part with their written answers."""
    data = job.experiment.data
    tokenizer = (job.inputs.source if writer == "source" else job.inputs.target).tokenizer
    known = set(job.inputs.shared.target_ids.tolist()) if job.inputs.paired is None else None
    kept, too_long, lost, wrong = [], 0, 0, 0
    for row in rows:
        ids = written[row.on(writer).prompt_ids]
        changed = _with_answer(job, row, writer, ids)
        if changed is not None and changed.longest > data.max_length:
            too_long += 1
        elif changed is None or (known is not None and not known.issuperset(ids)):
            lost += 1
        elif part == "train" and data.writing.keep == "correct" and not _is_right(tokenizer, ids, row):
            wrong += 1
        else:
            kept.append(changed)
    answered = f"{'training' if part == 'train' else 'held-out'} rows with answers by the {writer}"
    reason = "with tokens that only one model knows" if job.inputs.paired is None else "that are no text to both models"
    left_out = f"{wrong} wrong, {too_long} longer than data.max_length={data.max_length}, {lost} {reason}"
    longest, end = data.writing.max_new_tokens, tokenizer.eos_token_id
    answers = [row.on(writer).answer_ids for row in kept]
    cut = sum(len(answer) == longest and answer[-1] != end for answer in answers)
    cut_off = f", {cut} of them cut off at data.writing.max_new_tokens={longest}" if cut else ""
    job.console.note(f"{answered}: {len(kept)} of {len(rows)} stay{cut_off} ({left_out})")
    if not kept:
        raise SemalignError(
            f"of {len(rows)} {answered} none is left ({left_out}): raise data.max_length, or set data.writing.keep=all"
        )
    return kept


def _with_answer(job: Job, row: Example, writer: Role, ids: list[int]) -> Example | None:
    """Return a row with a written answer; None where it is no text to both models."""
    if job.inputs.paired is None:
        return replace(row, answer_ids=tuple(ids))
    try:
        return job.inputs.paired.with_answer(row, writer, ids)
    except SemalignError:
        return None


def _is_right(tokenizer: PreTrainedTokenizerBase, ids: list[int], row: Example) -> bool:
    return same_number(answer_text(tokenizer, ids), row.answer)


class _Unchecked:
    """The models that were not loaded yet: one that cannot be used is refused before another writes for hours."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._models: set[Role] = {"source", "target"}

    def check_all_but(self, writer: Role) -> None:
        """Load each model that was not loaded before and is not the writer, which is loaded anyway."""
        self._models.discard(writer)
        writers = written_parts(self._job.experiment.data)
        for role in sorted(self._models):
            generates = self._job.generates or role in writers
            self._job.load(role, label=f"{role}, to check it", generates=generates)
        self._models.clear()


def _written(job: Job, writer: Role, prompts: list[Prompt], unchecked: _Unchecked) -> dict[Prompt, list[int]]:
    """Return the answer to each prompt, from the journal where it is there."""
    wanted, ranks, inputs = job.experiment.data.writing, job.ranks, job.inputs
    opened, identity = (inputs.source, inputs.source_id) if writer == "source" else (inputs.target, inputs.target_id)
    name = hashlib.sha256(f"{identity} {opened.precision(job.device)} {GENERATION}".encode()).hexdigest()[:16]
    folder = cache_folder() / "answers" / name
    with _alone(folder, ranks, job.console):
        journal = Journal(folder / f"answers-{ranks.rank}.jsonl")
        _read_all(journal, folder)
        ranks.barrier()  # all have read before one writes

        def key(prompt: Prompt) -> str:
            return request_key("answer", prompt, wanted.temperature, wanted.seed, wanted.max_new_tokens)

        missing = sorted((prompt for prompt in prompts if journal.get(key(prompt)) is None), key=len)
        if missing:
            unchecked.check_all_but(writer)
            loaded = job.load(writer, label=f"{writer} that writes answers", generates=True)
            size = ROWS_AT_ONCE * job.experiment.batch_size
            parts = [missing[start : start + size] for start in range(0, len(missing), size)]
            for part in job.console.progress(f"write {len(missing)} answers", parts[ranks.rank :: ranks.size]):
                with naming(f"the {writer} {opened.settings.path} cannot write answers"):
                    _write(part, loaded, wanted, lambda prompt, answer: journal.add({key(prompt): answer}))
            ranks.barrier()
            _read_all(journal, folder)
        found = {prompt: journal.get(key(prompt)) for prompt in prompts}
        return {prompt: list(answer.value) for prompt, answer in found.items() if answer is not None}


def _read_all(journal: Journal, folder: Path) -> None:
    for file in sorted(folder.glob("answers-*.jsonl")):
        journal.read(file)


def _write(
    prompts: list[Prompt], loaded: LoadedModel, wanted: WritingConfig, keep: Callable[[Prompt, Answer], None]
) -> None:
    """Write the answers to some prompts, and keep each at its end."""
    assert loaded.way is not None
    with undisturbed(loaded.model):
        generate(
            loaded.model,
            prompts,
            max_new_tokens=wanted.max_new_tokens,
            ends=end_ids(loaded.model, loaded.tokenizer),
            way=loaded.way,
            ended=lambda place, ids: keep(prompts[place], Answer(ids, 0.0, len(prompts))),
            pick=likeliest if wanted.temperature == 0 else _Sampler(prompts, wanted.temperature, wanted.seed),
        )


@contextlib.contextmanager
def _alone(folder: Path, ranks: Ranks, console: Console) -> Iterator[None]:
    """Lock the journals; wait for another job that writes them."""
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            with contextlib.suppress(OSError):  # a cache that cannot be written to may hold all answers
                lock = lock_of(folder)
                wait_for(lock, console, "writes answers of the same model")
                stack.callback(lock.release)
        ranks.barrier()
        yield


class _Sampler:
    """Draws each row's tokens with numbers of its own, so that they do not depend on what else is in the batch."""

    def __init__(self, prompts: list[Prompt], temperature: float, seed: int) -> None:
        keys = [request_key("sample", prompt, seed) for prompt in prompts]
        self._generators = [torch.Generator().manual_seed(int(key[:15], 16)) for key in keys]
        self._temperature = temperature

    def __call__(self, logits_BV: Tensor, rows: list[int]) -> Tensor:
        """A token for each row by the Gumbel trick: argmax(logits / temperature + noise) is a draw of the softmax."""
        noise = torch.stack([torch.rand(logits_BV.shape[1], generator=self._generators[row]) for row in rows])
        gumbel = -(-noise.clamp_min(1e-20).log()).log()
        return (logits_BV.float() / self._temperature + gumbel.to(logits_BV.device)).argmax(-1)
