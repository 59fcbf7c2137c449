"""What an experiment names, read and checked before any weights are."""

from dataclasses import dataclass

import torch
from semalign_align import check_objective
from semalign_attribution import Manual
from semalign_geometry import SemalignError, SharedVocabulary
from semalign_train import KNOWN_OBJECTIVES, LoraLayer

from ..data.encoding import TextEncoder
from ..data.rows import Split, glued, read_rows, split_rows
from ..experiment import Experiment
from ..generation import Way
from ..models.loading import LoadedModel, load_model
from ..models.opening import OpenedModel, check_pulled, check_tokenizers, check_trainable, identity, open_model
from ..models.shape import ModelShape
from ..util.console import Console


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an experiment names, read and checked; no weights yet."""

    source: OpenedModel
    target: OpenedModel
    encoder: TextEncoder
    """Turns texts into ids; by the target's tokenizer and template, for both models."""
    split: Split
    shared: SharedVocabulary
    source_id: str
    """What tells the source from any other model."""
    target_id: str
    """What tells the target from any other model."""


def read_inputs(experiment: Experiment, console: Console) -> Inputs:
    """Read and check the rows, the tokenizers and the configurations of both models; note what was read.

    Raises:
        SemalignError: they cannot be used, or do not fit together.
    """
    with console.step("read rows, tokenizers and configurations"):
        for model in (experiment.source, experiment.target):
            check_pulled(model)
        pools = read_rows(experiment.data)
        target = open_model(experiment.target, progress=console.ticker("pre-train the target"), note=console.note)
        source = open_model(experiment.source, progress=console.ticker("pre-train the source"), note=console.note)
        check_trainable(target)
        encoder = encoder_of(experiment, target)
        split = split_rows(experiment.data, pools, encoder)
        texts = [str(target.tokenizer.decode(list(e.prompt_ids + e.answer_ids))) for e in split.train[:8]]
        shared = check_tokenizers(source, target, texts)
        _check_rows(split, shared, experiment, source, target)
        check_settings(experiment, source.shape, target.shape)
    for note in encoder.notes():
        console.note(note)
    _note_rows(console, split, experiment, encoder)
    joint = glued(split.train[0], target.tokenizer)
    if joint:
        console.note(
            f"there is no chat template, and prompts run into their answers ({joint!r}): end data.train.prompt with a "
            "space or a line break"
        )
    return Inputs(source, target, encoder, split, shared, identity(source), identity(target))


def encoder_of(experiment: Experiment, opened: OpenedModel) -> TextEncoder:
    """Turns texts into token ids by a model's tokenizer and template, with the options of an experiment."""
    return TextEncoder(opened.tokenizer, options=experiment.chat_template, date=experiment.date)


def check_settings(experiment: Experiment, source: ModelShape, target: ModelShape) -> None:
    """See that layers, pairing, objective and adapters fit the depths, widths and modules of a pair.

    Raises:
        SemalignError: a layer or a module does not exist, or a pairing or an objective does not fit.
    """
    train = experiment.train
    _check_adapters(experiment, target)
    _check_modules(experiment, source, target)
    train.stages(target.layers)
    if isinstance(experiment.pairing, Manual):
        experiment.pairing.check(source.layers, target.layers)
    matched = train.weights.geometry > 0 and getattr(experiment.method, "kind", None) == "semalign"
    if matched and type(train.objective) not in KNOWN_OBJECTIVES.built_in.values():
        check_objective(
            train.objective,
            width=target.width,
            reference_width=source.width if experiment.transport.frame == "none" else target.width,
        )
    needs_one_width = matched and getattr(train.objective, "compares_vectors", False)
    if needs_one_width and experiment.transport.frame == "none" and source.width != target.width:
        raise SemalignError(
            f"the {train.objective.name} objective compares vectors of one width, the source has {source.width} and "
            f"the target {target.width}: set transport.frame to a frame, or train.objective.kind=relation"
        )


def _check_adapters(experiment: Experiment, target: ModelShape) -> None:
    kind, own = getattr(experiment.method, "kind", None), getattr(experiment.method, "trainable", None)
    section, trainable = ("train", experiment.train.trainable) if kind == "semalign" else ("method", own)
    if isinstance(trainable, LoraLayer):
        unmatched = sorted({*trainable.modules} - {*target.linear_features})
        if unmatched:
            raise SemalignError(
                f"the target's layers have no linear module named {', '.join(unmatched)}: {section}.trainable.modules "
                f"can name {', '.join(sorted(target.linear_features))}"
            )


def _check_modules(experiment: Experiment, source: ModelShape, target: ModelShape) -> None:
    """Refuse models without the modules that a method moves, which it would find out when the source has worked."""
    kind, features = getattr(experiment.method, "kind", None), {"source": source, "target": target}
    for role, shape in features.items():
        missing = [name for name in getattr(experiment.method, "moved", ()) if name not in shape.linear_features]
        if missing:
            raise SemalignError(
                f"the {role}'s layers have no linear module named {', '.join(missing)}, which method.kind={kind} "
                f"needs: choose a {role} of the Llama family, or another method"
            )
    if kind == "seeking" and source.linear_features.keys().isdisjoint(target.linear_features):
        raise SemalignError(
            "the layers of source and target have no linear modules named alike, which method.kind=seeking needs: "
            "choose models of one family, or another method"
        )


def load(
    console: Console, label: str, opened: OpenedModel, device: torch.device, *, generates: bool = False
) -> LoadedModel:
    """Load a model's weights, and note how it computes; `generates` as in `load_model`."""
    with console.step(f"load the {label}"):
        loaded = load_model(opened, device=device, generates=generates)
    console.note(f"the {label} computes in {str(loaded.model.dtype).removeprefix('torch.')} on {device}")
    note_unused(console, label, loaded)
    if loaded.way is Way.ALONE:
        console.note(f"the {label} generates {Way.ALONE.value}: its cache allows no batches")
    return loaded


def note_unused(console: Console, label: str, loaded: LoadedModel) -> None:
    """Name the tensors of a checkpoint that its language model does without."""
    if loaded.unused:
        console.note(
            f"{len(loaded.unused)} tensors of the {label}'s checkpoint are no part of its language model and are "
            f"ignored, such as {loaded.unused[0]}"
        )


def _check_rows(
    split: Split, shared: SharedVocabulary, experiment: Experiment, source: OpenedModel, target: OpenedModel
) -> None:
    data, known = experiment.data, set(shared.target_ids.tolist())
    rows = (*split.train, *split.held_out)
    for example in rows:
        unknown = set(example.prompt_ids + example.answer_ids) - known
        if unknown:
            raise SemalignError(f"the rows use {why_unknown(min(unknown), source, target)}")
    longest = max(len(example) for example in rows)
    generated = split.held_out[: experiment.measure.answer_rows]
    with_answer = max((len(e.prompt_ids) + experiment.measure.max_new_tokens for e in generated), default=0)
    for role, opened in (("source", source), ("target", target)):
        limit = opened.positions
        if limit is not None and longest > limit:
            raise SemalignError(
                f"a row has {longest} tokens, {opened.settings.path} reads at most {limit}: set "
                f"data.max_length={limit}, which leaves longer rows out"
            )
        if limit is not None and with_answer > limit:
            raise SemalignError(
                f"a prompt with measure.max_new_tokens={experiment.measure.max_new_tokens} may reach {with_answer} "
                f"tokens, {opened.settings.path} reads at most {limit}: lower measure.max_new_tokens"
            )
        parts = ((data.answers, split.train), (data.held_out_answers, split.held_out))
        answered = [len(row.prompt_ids) for writer, rows in parts if writer == role for row in rows]
        written = max(answered, default=0) + data.writing.max_new_tokens
        if limit is not None and answered and written > limit:
            raise SemalignError(
                f"a prompt with data.writing.max_new_tokens={data.writing.max_new_tokens} may reach "
                f"{written} tokens, {opened.settings.path} reads at most {limit}: lower data.writing.max_new_tokens"
            )


def why_unknown(token: int, source: OpenedModel, target: OpenedModel) -> str:
    """Name an entry of the target's tokenizer that the models do not share, the reason and the remedy."""
    name = target.tokenizer.convert_ids_to_tokens(token)
    for role, opened in (("target", target), ("source", source)):
        rows = opened.config.vocab_size
        if token >= rows and name in opened.entries:
            return (
                f"{name!r}, entry {token} of the {role}'s tokenizer, but {opened.settings.path} has embeddings for "
                f"{rows} entries only: choose the tokenizer that it was trained with, or give the model rows for all "
                "with resize_token_embeddings()"
            )
    return f"{name!r}, entry {token}, which only the target knows: choose models that share a tokenizer"


def _note_rows(console: Console, split: Split, experiment: Experiment, encoder: TextEncoder) -> None:
    tokens = sum(len(example) for example in split.train)
    answers = sum(len(example.answer_ids) for example in split.train)
    console.note(
        f"{len(split.train)} training rows ({tokens} tokens, {answers} supervised), {len(split.held_out)} "
        "held-out rows; "
        f"the longest has {split.longest} tokens"
    )
    if split.too_long:
        console.note(f"{split.too_long} rows longer than data.max_length={experiment.data.max_length} were left out")
    if split.unread:
        unread = ", ".join(f"{name} ({count} rows)" for name, count in split.unread.items())
        reader = "the chat template never reads" if encoder.chat else "without a chat template nothing reads"
        console.note(f"{reader} {unread}: left out of prompts and answers")
    if split.several:
        console.note(f"{split.several} rows have several answers, of which the last is trained on and measured")
    if split.ended_within:
        console.note(
            f"{split.ended_within} answers name {encoder.tokenizer.eos_token!r} before their end, which is read as the "
            "end-of-sequence token there too"
        )
