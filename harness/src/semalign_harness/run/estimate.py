"""Needs of a run in memory, disk and downloads, before anything is fetched.

The shape of a model comes from a local folder's config.json or from the catalogue of published facts; its weights are
never read. Every number is a bound or names what it leaves out.
"""

from collections.abc import Iterable

from semalign_align import FinalHidden, SupervisionSettings, store_bytes
from semalign_geometry.base import Contract, Settings
from semalign_train import KEPT_STATES, TrainSettings

from ..experiment import Experiment, SimilarityScorer
from ..models.catalogue import catalogue
from ..models.settings import ModelConfig
from ..models.shape import (
    INTERMEDIATES,
    STATES,
    WIDTHS,
    ModelShape,
    bytes_of,
    checkpoint_bytes,
    find_shape,
    published_model,
)
from ..util.text import gb

UNKNOWN = "unknown: not in the catalogue"


GPUS = (8, 12, 16, 24, 40, 48, 80, 141)
"""Memory of accelerators, in units of 10⁹ bytes."""


CPU_BYTES = 2 * 10**9
"""Memory that any CPU has."""


USABLE = 0.9
"""Share of an accelerator's memory that an estimate may fill: kernels and the allocator take the rest."""


class ModelNeeds(Settings):
    """One model of an experiment whose shape is known."""

    shape: ModelShape
    """Its shape."""
    dtype: str
    """dtype of its weights in memory."""
    weight_bytes: int
    """Its weights in memory."""
    download_bytes: int
    """Its weights as they come from the hub; 0 for what is local or generated."""
    licence: str | None
    """Licence of its weights; None when it is unknown."""
    gated: bool
    """Whether the hub asks to accept the licence first."""

    @property
    def head_bytes(self) -> int:
        """Its head in memory."""
        return self.shape.vocabulary * self.shape.width * bytes_of(self.dtype)


class Totals(Settings):
    """Needs of a run, in bytes."""

    source_phase: int
    """Memory while the source is attributed and supervises: weights, the target's head (the whole target with the
    similarity scorer), the method's own values beside both models, and what autograd keeps of `batch_size` of the
    longest rows, of `attribution_rows` where fewer. The last is an upper bound of attribution, which takes one row at a
    time; supervision, which runs `batch_size` rows forward without autograd, is not counted apart."""
    training_state: int
    """Weights, moments and gradients, in float32, of everything that trains together."""
    target_phase: int
    """Memory while the target trains (weights, training state, activations of one micro-batch of the longest rows, the
    source's head, or the whole source where it stays in memory), or while it is compared with its saved copy,
    whichever is more."""
    memory: int
    """The larger of both phases."""
    supervision: int
    """At most, on disk, of the training rows: every token of rows of the greatest length supervised, every target layer
    with a source layer of its own."""
    held_out: int
    """At most, on disk, the same of the held-out rows, in float32 and with exact outputs."""
    scratch: int
    """At most, on disk until the run ends: files of the method, such as the replayed inputs of the frontier layer, and
    the checkpoints."""
    saved: int
    """The trained target, on disk."""
    download: int
    """Both models from the hub; data sets are not counted."""


class Needs(Contract):
    """Needs of an experiment, as far as they are known offline."""

    source: ModelNeeds | None
    """The larger model; None when its shape is unknown."""
    target: ModelNeeds | None
    """The smaller model; None when its shape is unknown."""
    totals: Totals | None
    """Needs of a run; None when a shape is unknown."""


def estimate(
    experiment: Experiment,
    *,
    source_shape: ModelShape | None = None,
    target_shape: ModelShape | None = None,
    two_tokenizers: bool = False,
) -> Needs:
    """Estimate the needs of an experiment.

    Args:
        experiment: what would run.
        source_shape: shape of the source, where it is known; None looks for it.
        target_shape: shape of the target, likewise.
        two_tokenizers: whether the tokenizers of the models differ, so that the rows are stored as both read them.

    Raises:
        SemalignError: a local model cannot be read.
    """
    source = _model_needs(experiment.source, source_shape)
    target = _model_needs(experiment.target, target_shape)
    totals = None if source is None or target is None else _totals(experiment, source, target, two_tokenizers)
    return Needs(source=source, target=target, totals=totals)


def _totals(experiment: Experiment, source: ModelNeeds, target: ModelNeeds, two_tokenizers: bool) -> Totals:
    data, train, method = experiment.data, experiment.train, experiment.method
    needs = method.needs(source.shape, target.shape, rows=data.train_rows, tokens=data.train_rows * data.max_length)
    # More than attribution takes, which goes row by row; supervision runs batch_size rows without autograd.
    attributed = min(experiment.batch_size, data.attribution_rows) * data.max_length
    kept = target.weight_bytes if isinstance(experiment.scorer, SimilarityScorer) else target.head_bytes
    scored = target.weight_bytes + 4 * needs.beside_source if needs.beside_source else 0
    source_phase = source.weight_bytes + kept + scored + _activations(source, attributed)
    # Muon keeps one moment, and needs at most six copies of the largest matrix, which is a third of a layer or less.
    moments = 2 if train.optimiser == "adamw" else 3
    gradients = needs.gradients + two_tokenizers  # of the likelihoods of spans
    training_state = 4 * needs.trained * (1 + moments + gradients)
    trained = min(train.micro_batch_size, train.batch_size) * data.max_length
    beside = source.weight_bytes if experiment.live or method.keeps_source else source.head_bytes
    training = target.weight_bytes + training_state + beside + _training_activations(target, trained, train)
    target_phase = max(training, 2 * target.weight_bytes + beside)
    exact = experiment.supervision.model_copy(update={"output": FinalHidden(), "dtype": "float32"})
    supervision = _store(experiment.supervision, data.train_rows, experiment, source, target, two_tokenizers)
    checkpoints = train.checkpoint_steps is not None or train.checkpoint_minutes is not None
    states = 3 * needs.trained * (KEPT_STATES + 1) if checkpoints else 0  # one more than are kept
    return Totals(
        source_phase=source_phase,
        training_state=training_state,
        target_phase=target_phase,
        memory=max(source_phase, target_phase),
        supervision=0 if experiment.live else supervision,
        held_out=_store(exact, data.held_out_rows, experiment, source, target, two_tokenizers),
        scratch=needs.scratch * bytes_of(target.dtype) + 4 * states,
        saved=target.weight_bytes,
        download=source.download_bytes + target.download_bytes,
    )


def accelerator(memory: int) -> str:
    """Return the smallest usual accelerator for a run of so many bytes."""
    if memory <= CPU_BYTES:
        return "none"
    fitting = [size for size in GPUS if memory <= USABLE * size * 10**9]
    return f"one of {fitting[0]} GB" if fitting else f"more than one of {GPUS[-1]} GB"


def describe(experiment: Experiment) -> list[str]:
    """Return the estimate of an experiment as lines of text."""
    needs = estimate(experiment)
    lines = [
        _model_line("source", experiment.source, needs.source),
        _model_line("target", experiment.target, needs.target),
    ]
    totals = needs.totals
    if totals is None:
        return [*lines, "memory, disk and downloads: unknown, since a model is"]
    return [
        *lines,
        f"for rows of data.max_length={experiment.data.max_length} tokens, all of them supervised:",
        f"memory: about {gb(totals.source_phase)} with the source, {gb(totals.target_phase)} with the target, "
        f"{gb(totals.training_state)} of it training state",
        f"accelerator: {accelerator(totals.memory)}",
        f"disk: at most {gb(totals.supervision + totals.held_out)} of supervision, {gb(totals.scratch)} until the "
        f"run ends, and {gb(totals.saved)} for the trained target",
        f"downloads: {gb(totals.download)} of weights, besides the data set",
    ]


def presets_table(experiments: Iterable[Experiment]) -> str:
    """Return a table of pairs with the sizes of their models and their needs."""
    rows = [("pair", "source → target", "parameters", "download", "memory", "accelerator", "licence")]
    for experiment in experiments:
        needs = estimate(experiment)
        models, totals = (needs.source, needs.target), needs.totals
        names = (config.path.rsplit("/", 1)[-1] for config in (experiment.source, experiment.target))
        licences = dict.fromkeys(UNKNOWN if model is None else _licence(model) for model in models)
        rows.append(
            (
                experiment.name,
                " → ".join(names),
                " → ".join("?" if model is None else _count(model.shape.parameters) for model in models),
                "?" if totals is None else gb(totals.download),
                "?" if totals is None else gb(totals.memory),
                "?" if totals is None else accelerator(totals.memory),
                ", ".join(licences),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _model_needs(model: ModelConfig, shape: ModelShape | None) -> ModelNeeds | None:
    shape = shape or find_shape(model)
    if shape is None:
        return None
    published, file_size = published_model(model.path)
    entry = catalogue().get(published)
    dtype = shape.dtype if model.dtype == "auto" else model.dtype
    fetched = entry is not None and not model.path.startswith("generated:")
    return ModelNeeds(
        shape=shape,
        dtype=dtype,
        weight_bytes=_weight_bytes(shape, dtype, in_4bit=model.load_in_4bit),
        download_bytes=(file_size or checkpoint_bytes(shape)) if fetched else 0,
        licence=None if entry is None else entry.licence,
        gated=entry is not None and entry.gated,
    )


def _weight_bytes(shape: ModelShape, dtype: str, *, in_4bit: bool) -> int:
    """Return the bytes of the weights; in 4 bits, numbers of layers take half a byte and a scale for each 64."""
    layers = shape.layers * shape.layer_parameters if in_4bit else 0
    return (shape.parameters - layers) * bytes_of(dtype) + layers * 9 // 16


def _activations(model: ModelNeeds, tokens: int) -> int:
    """Return the bytes that autograd keeps of all layers, without attention's n × n matrices and without the loss."""
    shape = model.shape
    values = WIDTHS * max(shape.width, shape.heads_width) + INTERMEDIATES * shape.intermediate + STATES * shape.state
    return tokens * shape.layers * values * bytes_of(model.dtype)


def _training_activations(model: ModelNeeds, tokens: int, train: TrainSettings) -> int:
    """Return those of a step through all layers; recomputed layers keep their inputs, and two are whole at a time."""
    if not train.recompute:
        return _activations(model, tokens)
    inputs = tokens * model.shape.layers * model.shape.width * bytes_of(model.dtype)
    return inputs + 2 * _activations(model, tokens) // model.shape.layers


def _store(
    settings: SupervisionSettings,
    rows: int,
    experiment: Experiment,
    source: ModelNeeds,
    target: ModelNeeds,
    two_tokenizers: bool,
) -> int:
    """Return the bytes of a store: rows of the greatest length, all supervised, all source layers paired."""
    tokens = rows * experiment.data.max_length
    return store_bytes(
        settings,
        examples=rows,
        tokens=tokens,
        supervised_tokens=tokens,
        layers=min(source.shape.layers, target.shape.layers),
        width=(source if experiment.transport.frame == "none" else target).shape.width,
        source_width=source.shape.width,
        head_bytes=source.head_bytes,
        entries=source.shape.vocabulary,
        source_tokens=tokens,
        spans=tokens if two_tokenizers else None,
    )


def _model_line(role: str, config: ModelConfig, model: ModelNeeds | None) -> str:
    if model is None:
        gguf = config.path.endswith(".gguf")
        return f"{role} {config.path}: {'unknown: a .gguf file is read when it is converted' if gguf else UNKNOWN}"
    shape = model.shape
    positions = "" if shape.positions is None else f", at most {shape.positions} tokens"
    return (
        f"{role} {config.path}: {_count(shape.parameters)} parameters, {shape.layers} layers of width {shape.width}, "
        f"{'tied' if shape.tied else 'own'} head of {shape.vocabulary} entries{positions}; "
        f"{gb(model.weight_bytes)} in {model.dtype}; licence {_licence(model)}"
    )


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if parameters >= 0.9995 * unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters / 1000:.0f}k"


def _licence(model: ModelNeeds) -> str:
    return "unknown" if model.licence is None else model.licence + (" (gated)" if model.gated else "")
