"""Rows whose answers a model has written: batched, kept by prompt, and gone on with after an interruption."""

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

from ..data.encoding import Example
from ..data.settings import DataConfig, WritingConfig
from ..experiment import Experiment
from ..generation import GENERATION, end_ids, generate, likeliest
from ..models.loading import LoadedModel
from ..reading import answer_text, same_number
from ..util.cache import cache_folder
from ..util.console import Console
from ..util.failures import naming
from ..util.journal import Answer, Journal, request_key
from ..util.locking import lock_of, wait_for
from .inputs import Inputs, load

Prompt = tuple[int, ...]

ROWS_AT_ONCE = 4
"""Times the rows of a forward run that are written together."""


def written_parts(data: DataConfig) -> dict[str, list[str]]:
    """By each model that writes answers first, the parts of the data that it writes them for."""
    writers = {"train": data.answers, "held_out": data.held_out_answers}
    return {
        writer: [part for part, by in writers.items() if by == writer]
        for writer in sorted({*writers.values()} - {"gold"})
    }


def describe_writing(data: DataConfig) -> list[str]:
    """What is written before anything else, as lines of text."""
    rows = {"train": f"{data.train_rows} training rows", "held_out": f"{data.held_out_rows} held-out rows"}
    return [
        f"plan: first the {writer} writes answers to {' and '.join(rows[part] for part in parts)}, of at most "
        f"{data.writing.max_new_tokens} tokens each, unless they are kept already"
        for writer, parts in written_parts(data).items()
    ]


def with_written_answers(experiment: Experiment, inputs: Inputs, device: torch.device, console: Console) -> Inputs:
    """The inputs with the answers that an experiment asks for in place of the rows' own.

    Rows whose answer makes them longer than `data.max_length`, holds a token that only one model knows, or is wrong
    where only correct ones are trained on, are left out, and counted. What a held-out row's answer is compared with
    when one is generated stays the row's own.

    Raises:
        SemalignError: no row is left. OSError: the disk is full.
    """
    rows = {"train": inputs.split.train, "held_out": inputs.split.held_out}
    unchecked = _Unchecked(experiment, inputs, device, console)
    for writer, parts in written_parts(experiment.data).items():
        prompts = list(dict.fromkeys(row.prompt_ids for part in parts for row in rows[part]))
        written = _written(experiment, inputs, writer, prompts, device, console, unchecked)
        rows |= {part: _kept(part, rows[part], written, experiment, inputs, console) for part in parts}
    return dataclasses.replace(
        inputs, split=dataclasses.replace(inputs.split, train=rows["train"], held_out=rows["held_out"])
    )


def _kept(
    part: str,
    rows: list[Example],
    written: dict[Prompt, list[int]],
    experiment: Experiment,
    inputs: Inputs,
    console: Console,
) -> list[Example]:
    """The rows of one part with their written answers, those left out that cannot be used."""
    data, known = experiment.data, set(inputs.shared.target_ids.tolist())
    kept, too_long, unknown, wrong = [], 0, 0, 0
    for row in rows:
        ids = written[row.prompt_ids]
        changed = dataclasses.replace(row, answer_ids=tuple(ids))
        text = answer_text(inputs.target.tokenizer, ids)
        if len(changed) > data.max_length:
            too_long += 1
        elif not known.issuperset(ids):
            unknown += 1
        elif part == "train" and data.writing.keep == "correct" and not same_number(text, row.answer):
            wrong += 1
        else:
            kept.append(changed)
    writer = data.answers if part == "train" else data.held_out_answers
    answered = f"{'training' if part == 'train' else 'held-out'} rows with answers by the {writer}"
    left_out = (
        f"{wrong} wrong, {too_long} longer than data.max_length={data.max_length}, {unknown} with tokens that only one "
        "model knows"
    )
    longest, end = data.writing.max_new_tokens, inputs.target.tokenizer.eos_token_id
    cut = sum(len(row.answer_ids) == longest and row.answer_ids[-1] != end for row in kept)
    told = f", {cut} of them cut off at data.writing.max_new_tokens={longest}" if cut else ""
    console.note(f"{answered}: {len(kept)} of {len(rows)} stay{told} ({left_out})")
    if not kept:
        raise SemalignError(
            f"of {len(rows)} {answered} none is left ({left_out}): raise data.max_length, or set data.writing.keep=all"
        )
    return kept


class _Unchecked:
    """The models that were not loaded yet: one that cannot be used is refused before another writes for hours."""

    def __init__(self, experiment: Experiment, inputs: Inputs, device: torch.device, console: Console) -> None:
        self._models = {"source": inputs.source, "target": inputs.target}
        answering = experiment.measure.answer_rows > 0
        self._generating = {*self._models} if answering else {*written_parts(experiment.data)}
        self._device, self._console = device, console

    def check_all_but(self, writer: str) -> None:
        """Load each model that was not loaded before and is not the writer, which is loaded anyway."""
        self._models.pop(writer, None)
        for role in sorted(self._models):
            opened, generates = self._models.pop(role), role in self._generating
            load(self._console, f"{role}, to check it", opened, self._device, generates=generates)


def _written(
    experiment: Experiment,
    inputs: Inputs,
    writer: str,
    prompts: list[Prompt],
    device: torch.device,
    console: Console,
    unchecked: _Unchecked,
) -> dict[Prompt, list[int]]:
    """The answer to each prompt, from the journal where it is there."""
    wanted, ranks = experiment.data.writing, Ranks.current()
    opened, identity = (inputs.source, inputs.source_id) if writer == "source" else (inputs.target, inputs.target_id)
    name = hashlib.sha256(f"{identity} {opened.precision(device)} {GENERATION}".encode()).hexdigest()[:16]
    folder = cache_folder() / "answers" / name
    with _alone(folder, ranks, console):
        journal = Journal(folder / f"answers-{ranks.rank}.jsonl")
        for file in sorted(folder.glob("answers-*.jsonl")):
            journal.read(file)
        ranks.wait()  # all have read before one writes

        def key(prompt: Prompt) -> str:
            return request_key("answer", prompt, wanted.temperature, wanted.seed, wanted.max_new_tokens)

        missing = sorted((prompt for prompt in prompts if journal.get(key(prompt)) is None), key=len)
        if missing:
            unchecked.check_all_but(writer)
            loaded = load(console, f"{writer} that writes answers", opened, device, generates=True)
            size = ROWS_AT_ONCE * experiment.batch_size
            parts = [missing[start : start + size] for start in range(0, len(missing), size)]
            for part in console.progress(f"write {len(missing)} answers", parts[ranks.rank :: ranks.size]):
                with naming(f"the {writer} {opened.settings.path} cannot write answers"):
                    _write(part, loaded, wanted, lambda prompt, answer: journal.add({key(prompt): answer}))
            ranks.wait()
            for file in sorted(folder.glob("answers-*.jsonl")):
                journal.read(file)
        found = {prompt: journal.get(key(prompt)) for prompt in prompts}
        return {prompt: list(answer.value) for prompt, answer in found.items() if answer is not None}


def _write(
    prompts: list[Prompt], loaded: LoadedModel, wanted: WritingConfig, keep: Callable[[Prompt, Answer], None]
) -> None:
    """Write the answers to some prompts, and keep each when it ends."""
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

    def __init__(self, prompts: list[Prompt], temperature: float, seed: int) -> None:
        keys = [request_key("sample", prompt, seed) for prompt in prompts]
        self._generators = [torch.Generator().manual_seed(int(key[:15], 16)) for key in keys]
        self._temperature = temperature

    def __call__(self, logits_BV: Tensor, rows: list[int]) -> Tensor:
        """A token for each row by the Gumbel trick: argmax(logits / temperature + noise) is a draw of the softmax."""
        noise = torch.stack([torch.rand(logits_BV.shape[1], generator=self._generators[row]) for row in rows])
        gumbel = -(-noise.clamp_min(1e-20).log()).log()
        return (logits_BV.float() / self._temperature + gumbel.to(logits_BV.device)).argmax(-1)
