"""Checks of a pair of models and its rows, in one list: a run raises the first error, the doctor prints all.

No check reads weights.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Literal

import torch
from pydantic import model_validator
from semalign_attribution import Manual
from semalign_geometry import SharedVocabulary, VocabularyClasses, align_classes
from semalign_geometry.base import SemalignError, Settings

from ..data.encoding import DIALOGUE, Conversation, Role, TextEncoder
from ..data.paired import PairedEncoder, TextChanged
from ..data.row_files import Row
from ..data.rows import Split, glued, split_rows
from ..experiment import Experiment, SimilarityScorer
from ..models.opening import OpenedModel, check_tokenizers, ids_differ, split_differently
from ..models.shape import ModelShape, bytes_of, heads_of
from ..util.text import gb

Level = Literal["ok", "warning", "error"]
ONE_FAMILY = "a source and a target of one family: semalign presets shows such pairs"
CHATS = "choose the source that was trained on chats, such as an -Instruct model"
SHORTER = "shorter rows, or models that read longer ones"
ADVICE = re.compile(r"(choose|give|leave|lower|merge|name|raise|set|write)\b")
"""First word of a remedy at the end of a message."""
AS_NAMED = "change the setting or the row that it names"
"""Remedy where a message has none."""
TRIED = 8
"""Rows that both tokenizers split."""
PROBES = [
    "Natalia sold 48/2 = 24 clips in May, and 1,234.5 altogether.",
    "def f(x):\n\treturn [x**2  for x in range(10)]  # naïve café",
    "Straße, Ωmega, 漢字, résumé 🙂 \n\n  end",
]
"""Texts that tokenizers with the same entries may split differently."""


class Finding(Settings):
    """Outcome of one check."""

    check: str
    """Name of the check."""
    level: Level
    """`ok`; `warning`: a run works, but something is lost or may fail; `error`: a run is refused."""
    message: str
    """The fact, in one sentence."""
    remedy: str | None = None
    """A setting or a command that helps; None for what is ok."""

    @model_validator(mode="after")
    def _trouble_has_a_remedy(self) -> "Finding":
        if (self.level == "ok") != (self.remedy is None):
            raise ValueError(f"{self.check} is {self.level}: warnings and errors have a remedy, and nothing else")
        return self

    def __str__(self) -> str:
        return self.message if self.remedy in (None, AS_NAMED) else f"{self.message}: {self.remedy}"


def ok(check: str, message: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(check=check, level="ok", message=message)


def warning(check: str, message: str, remedy: str) -> Finding:
    """Return the finding that a run works, but something is lost or may fail."""
    return Finding(check=check, level="warning", message=message, remedy=remedy)


def error(check: str, message: str, remedy: str) -> Finding:
    """Return the finding that a run is refused."""
    return Finding(check=check, level="error", message=message, remedy=remedy)


def refused(check: str, failure: SemalignError) -> Finding:
    """Return an error as a finding; the end of its message is the remedy, where that is an advice after a colon."""
    message, _, own = str(failure).rpartition(": ")
    return error(check, message, own) if ADVICE.match(own) and message else error(check, str(failure), AS_NAMED)


def raise_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings without an error.

    Raises:
        SemalignError: there is one; later checks are not made.
    """
    found = []
    for finding in findings:
        if finding.level == "error":
            raise SemalignError(str(finding))
        found.append(finding)
    return found


@dataclass(frozen=True, eq=False)
class Pair:
    """Inputs of the checks."""

    experiment: Experiment
    """All settings."""
    source: OpenedModel
    """The larger model."""
    target: OpenedModel
    """The smaller model, which is trained."""
    apart: bool
    """Whether each model reads the rows by its own tokenizer and template, as no tokenizer serves both."""
    split: Split | None = None
    """Rows of the run; None before they are read, or where none are given."""

    @classmethod
    def of(cls, experiment: Experiment, source: OpenedModel, target: OpenedModel) -> "Pair":
        """Return the pair without rows; it is apart where an entry that both tokenizers have has two ids."""
        return cls(experiment, source, target, apart=ids_differ(source, target))

    def reading(self, pools: Sequence[list[Row]]) -> tuple["Pair", SemalignError | None]:
        """Return the pair with its rows, or as it is with the reason why they cannot be used.

        It is apart also where the tokenizers split some of the rows differently.
        """
        try:
            read = replace(self, split=split_rows(self.experiment.data, pools, self.paired or self.encoder))
        except SemalignError as failure:
            return self, failure
        if not self.apart and _rows_differ(read):
            return replace(self, apart=True).reading(pools)
        return read, None

    @property
    def both(self) -> tuple[tuple[Role, OpenedModel], tuple[Role, OpenedModel]]:
        """Source and target, with their roles."""
        return ("source", self.source), ("target", self.target)

    @cached_property
    def encoder(self) -> TextEncoder:
        """Encoder of texts by the target's tokenizer and template."""
        return encoder_of(self.experiment, self.target)

    @cached_property
    def paired(self) -> PairedEncoder | None:
        """Encoder of rows for both models; None where one tokenizer serves both.

        Raises:
            SemalignError: a tokenizer loses text.
        """
        return PairedEncoder.of(encoder_of(self.experiment, self.source), self.encoder) if self.apart else None

    @cached_property
    def classes(self) -> VocabularyClasses | None:
        """Prefix classes of both vocabularies; None where one tokenizer serves both.

        Raises:
            SemalignError: a tokenizer loses text, or the vocabularies share no entry.
        """
        if self.paired is None:
            return None
        return align_classes(
            self.paired.source_vocabulary,
            self.paired.target_vocabulary,
            source_rows=self.source.shape.vocabulary,
            target_rows=self.target.shape.vocabulary,
        )

    @cached_property
    def shared(self) -> SharedVocabulary:
        """Vocabulary entries of both models.

        Raises:
            SemalignError: as `classes` does.
        """
        return check_tokenizers(self.source, self.target, []) if self.classes is None else self.classes.shared

    @property
    def positions(self) -> int | None:
        """Longest row that both models read, in tokens; None without a limit."""
        return min((opened.positions for _, opened in self.both if opened.positions is not None), default=None)


def check_pair(pair: Pair) -> Iterator[Finding]:
    """Check the models of a pair, its settings and its tokenizers; the rows are not read."""
    for check in (_target, _sizes, _depth, _width, _dtype, _settings, _entries, _special_tokens, _chat_template):
        yield from check(pair)


def check_rows(pair: Pair) -> Iterator[Finding]:
    """Check the rows of a pair: entries that a model lacks, lengths, and parts that are not read."""
    if pair.split is None:
        yield from _without_rows(pair)
        return
    for check in (_amount, _texts, _spans, _strange_entries, _limits, _unread):
        yield from check(pair, pair.split)


def check_settings(experiment: Experiment, source: ModelShape, target: ModelShape, *, apart: bool) -> Iterator[Finding]:
    """Check that scorer, pairing and method fit a pair; `apart` as in `Pair`."""
    pairing, method = experiment.pairing, experiment.method
    width = source.width if experiment.transport.frame == "none" else target.width
    fits: list[Callable[[], object]] = [lambda: method.check(source, target, experiment.train, reference_width=width)]
    if isinstance(pairing, Manual):
        fits.append(lambda: pairing.check(source.layers, target.layers))
    for fit in fits:
        try:
            fit()
        except SemalignError as failure:
            yield refused("settings", failure)
    yield from _check_tokenizations(experiment, apart=apart)


def _check_tokenizations(experiment: Experiment, *, apart: bool) -> Iterator[Finding]:
    """Check that scorer and method can do with as many tokenizers as the pair has."""
    method, scorer = experiment.method, experiment.scorer
    if apart and method.one_tokenizer:
        message = f"the tokenizers differ, and method.kind={method.kind} presumes that one serves both models"
        yield error("settings", message, "choose another method, or models of one family")
    if not apart and method.two_tokenizers:
        message = f"one tokenizer serves both models, and method.kind={method.kind} compares spans of two"
        yield error("settings", message, "choose another method, such as method.kind=kd")
    if apart and isinstance(scorer, SimilarityScorer):
        message = "the tokenizers differ, and scorer.kind=similarity compares both models token by token"
        yield error("settings", message, "scorer.kind=gradient_activation, with another pairing than similarity")


def check_dtype(source: OpenedModel, target: OpenedModel, *, chosen: bool = True) -> Finding:
    """Check the dtypes of a pair, as far as they are settled; `chosen` says whether the settings name the target's."""
    shown = f"source {_dtype_of(source)}, target {_dtype_of(target)}"
    if target.settings.dtype == "float16":
        message = f"{shown}: the target's weights are float16, whose small gradients vanish without loss scaling"
        return error("dtype", message, "target.dtype=bfloat16")
    if target.config.dtype == torch.float16 and not chosen:
        message = f"{shown}; but the target's checkpoint is float16, which training refuses on an accelerator"
        return warning("dtype", message, "target.dtype=bfloat16")
    return ok("dtype", shown)


def _dtype_of(opened: OpenedModel) -> str:
    """Return the dtype that is set, or the checkpoint's own."""
    own = str(opened.config.dtype or torch.float32).removeprefix("torch.")
    return own if opened.settings.dtype == "auto" else opened.settings.dtype


def _target(pair: Pair) -> Iterator[Finding]:
    if pair.target.quantised is not None:
        message = f"{pair.target.settings.path} is stored quantised ({pair.target.quantised}), and the target trains"
        yield error("target", message, "choose its checkpoint in bfloat16 or float32, or save it dequantised first")


def _sizes(pair: Pair) -> Iterator[Finding]:
    words, caps, heads = [], [], []
    for role, opened in pair.both:
        shape, view, dtype = opened.shape, opened.view, _dtype_of(opened)
        yield ok(
            role,
            f"{type(view.model).__name__}, {shape.parameters:,} parameters, {shape.layers} layers of width "
            f"{shape.width}, a head of {shape.vocabulary} rows; {gb(shape.parameters * bytes_of(dtype))} in {dtype}",
        )
        words.append(f"{'tied to' if shape.tied else 'apart from'} the {role}'s head")
        cap = "no soft-cap" if view.head.softcap is None else f"soft-cap {view.head.softcap:g}"
        caps.append(f"{cap}, scale {view.head.scale:g}")
        found = heads_of(opened.config)
        grouped = f" grouped on {found.keys} of keys and values" if found.keys < found.queries else ""
        heads.append(f"{role} {found.queries or 'no'} heads{grouped}")
    yield ok("embeddings", f"{words[0]}, {words[1]}; they are not trained")
    shown = caps[0] if caps[0] == caps[1] else f"source {caps[0]}, target {caps[1]}"
    yield ok("logits", f"{shown}; taken into account by the output objective")
    yield ok("attention", f"{', '.join(heads)}; contributions are compared after it, whatever its heads are")


def _depth(pair: Pair) -> Iterator[Finding]:
    source, target = pair.source.shape, pair.target.shape
    if target.parameters > source.parameters:
        message = f"the target has {target.parameters / source.parameters:.2g} times the source's parameters"
        swapped = f"semalign doctor {pair.target.settings.path} {pair.source.settings.path}"
        yield warning("sizes", message, swapped)
    shown = f"{source.layers} → {target.layers} layers"
    if target.layers <= source.layers:
        yield ok("depth", f"{shown}: each target layer has a source layer")
        return
    some = ",".join(str(-(-target.layers * k // source.layers)) for k in range(1, source.layers + 1))
    message = f"{shown}: target layers that follow one another share a source layer"
    yield warning("depth", message, f"'method.layers=[{some}]', to train as many as the source has")


def _width(pair: Pair) -> Iterator[Finding]:
    source, target, frame = pair.source.shape.width, pair.target.shape.width, pair.experiment.transport.frame
    moved = "nothing is transported, geometry is matched in the source's space"
    if frame != "none":
        moved = f"contributions are transported by the {frame} frame"
        moved += "; widths are equal, and transport.frame=none works too" if source == target else ""
    yield ok("width", f"{source} → {target}: {moved}")


def _dtype(pair: Pair) -> Iterator[Finding]:
    yield check_dtype(pair.source, pair.target, chosen=pair.experiment.target.dtype != "auto")


def _settings(pair: Pair) -> Iterator[Finding]:
    yield from check_settings(pair.experiment, pair.source.shape, pair.target.shape, apart=pair.apart)


def _entries(pair: Pair) -> Iterator[Finding]:
    began = time.perf_counter()
    try:
        _ = pair.shared
    except SemalignError as failure:
        yield refused("tokenizers", failure)
        return
    if pair.classes is not None:
        yield from _classes(pair, pair.classes, time.perf_counter() - began)
        return
    source, target = pair.source.entries, pair.target.entries
    common = len(source.keys() & target.keys())
    padded = [each.shape.vocabulary - len(tokenizer_ids(each)) for _, each in pair.both]
    yield ok(
        "tokenizers",
        f"{common} entries shared, {len(source) - common} only in the source, {len(target) - common} only in the "
        f"target; {padded[0]} rows of the source's head and {padded[1]} of the target's are padding",
    )
    yield from _split_differently(pair, PROBES)


def _classes(pair: Pair, classes: VocabularyClasses, seconds: float) -> Iterator[Finding]:
    """Describe two vocabularies that are apart: their classes, and whether the shared entries carry both bases."""
    shared, widest = len(classes.shared.source_ids), max(each.shape.width for _, each in pair.both)
    alone = [int((ids >= shared).sum() + (ids < 0).sum()) for ids in (classes.source, classes.target)]
    yield ok(
        "tokenizers",
        f"they differ, so each model reads rows by its own: {shared} entries have the same bytes, all entries fall "
        f"into {classes.count} classes ({alone[0]} of the source and {alone[1]} of the target into no class of a "
        f"shared entry), found in {seconds:.1f} s",
    )
    if shared < widest and pair.experiment.transport.frame != "none":
        message = f"the tokenizers share {shared} entries, too few for a semantic basis of width {widest}"
        yield warning("tokenizers", message, "transport.frame=none, which matches geometry in the source's own space")


def _split_differently(pair: Pair, texts: Iterable[str]) -> Iterator[Finding]:
    for text in texts:
        if split_differently(pair.source, pair.target, text):
            message = f"the tokenizers have the same entries and split {text[:40]!r} differently"
            yield warning("tokenizers", message, ONE_FAMILY)
            return


def _special_tokens(pair: Pair) -> Iterator[Finding]:
    ours, theirs = (
        {"BOS": each.tokenizer.bos_token, "EOS": each.tokenizer.eos_token, "padding": each.tokenizer.pad_token}
        for _, each in pair.both
    )
    check, shown = "special tokens", ", ".join(f"{name} {ours[name]!r} and {theirs[name]!r}" for name in ours)
    for role, opened in pair.both if pair.apart else pair.both[1:]:
        if opened.tokenizer.eos_token is None:
            message = f"the {role}'s tokenizer has no end of sequence, so that answers do not end: {shown}"
            yield warning(check, message, f'"eos_token": "…" in the tokenizer_config.json of {opened.settings.path}')
            return
    if pair.apart:
        yield ok(check, f"each model reads its own: {shown}")
        return
    begins = not pair.encoder.chat and pair.target.tokenizer.bos_token_id in pair.encoder.start
    differing = [name for name in (("BOS", "EOS") if begins else ("EOS",)) if ours[name] != theirs[name]]
    if differing:
        keys = " and ".join(f'"{name.lower()}_token"' for name in differing)
        message = f"{' and '.join(differing)} differ, and the target's are used for both: {shown}"
        yield warning(check, message, f"the same {keys} in the tokenizer_config.json of both models")
        return
    shown = ", ".join(f"{name} {token!r}" for name, token in theirs.items())
    padding = "" if ours["padding"] == theirs["padding"] else f" (the source's: {ours['padding']!r}; it is masked)"
    yield ok(check, f"{shown}{padding}" + ("" if begins else "; rows do not begin with BOS"))


def _chat_template(pair: Pair) -> Iterator[Finding]:
    yield _own_templates(pair) if pair.apart else _templates(pair)
    encoders = [encoder_of(pair.experiment, pair.source), pair.encoder] if pair.apart else [pair.encoder]
    ignored = set(encoders[0].ignored_options).intersection(*(each.ignored_options for each in encoders))
    if ignored:
        kept = {name: value for name, value in pair.encoder.options.items() if name not in ignored}
        reader = "neither template" if pair.apart else "the chat template never"
        message = f"{reader} reads {', '.join(sorted(ignored))} of chat_template"
        yield warning("chat template", message, f"chat_template={json.dumps(kept)}")
    if dates := [each.told_date for each in encoders if each.told_date is not None]:
        message = f"the chat template reads the clock, which stands at {dates[0]}: set date for another day"
        yield ok("date", message)


def _own_templates(pair: Pair) -> Finding:
    """Try the templates of both models on a question with its answer, each by its own tokenizer."""
    check = "chat template"
    without = [role for role, each in pair.both if each.tokenizer.chat_template is None]
    try:
        paired = pair.paired
        assert paired is not None
        paired.example(Conversation(DIALOGUE), name="a question with its answer")
    except TextChanged as failure:
        message = f"the templates render the answer of a question differently ({failure})"
        return warning(check, message, "chat_template={...}, options with which both render an answer alike")
    except SemalignError as failure:  # a template that refuses this question may take the rows
        return warning(check, str(failure), CHATS)
    if without:
        shown = "neither model has one" if len(without) == 2 else f"the {without[0]} has none"
        return ok(check, f"{shown}: prompt and answer follow one another as plain text there")
    return ok(check, "each model reads rows through its own")


def _templates(pair: Pair) -> Finding:
    check, source, target = "chat template", pair.source.tokenizer, pair.target.tokenizer
    if source.chat_template is None and target.chat_template is None:
        return ok(check, "neither model has one: prompt and answer follow one another as plain text")
    if source.chat_template is None:
        message = "only the target has one: the source reads its marks as text that it was not trained on"
        return warning(check, message, CHATS)
    copied = "a target with the source's chat template in its folder, as chat_template.jinja"
    if target.chat_template is None:
        message = "only the source has one: rows are plain text to both, which the source was not trained on"
        return warning(check, message, copied)
    try:
        pair.encoder.example(Conversation(DIALOGUE), name="a question with its answer")
        theirs = pair.encoder.render(DIALOGUE)
    except SemalignError as failure:  # which may still take the rows
        return warning(check, str(failure), copied)
    try:
        ours = encoder_of(pair.experiment, pair.source).render(DIALOGUE)
    except Exception as failure:  # a template can fail in any way
        message = f"the source's template refuses a question with its answer ({' '.join(str(failure).split())[:120]})"
        return warning(check, message, CHATS)
    if source.chat_template == target.chat_template:
        return ok(check, "the same in both")
    if ours == theirs:
        return ok(check, "not the same text, but both render a question with its answer alike")
    at = next(i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
    message = (
        "they render a question with its answer differently, and the target's is used for both: "
        f"{ours[max(0, at - 10) : at + 20]!r} and {theirs[max(0, at - 10) : at + 20]!r}"
    )
    return warning(check, message, "a source and a target that were trained with one chat template")


def _without_rows(pair: Pair) -> Iterator[Finding]:
    limit, positions = pair.experiment.data.max_length, pair.positions
    if positions is not None and positions < limit:
        message = f"rows may have data.max_length={limit} tokens, and a model reads at most {positions}"
        yield warning("rows", message, f"data.max_length={positions}")
    else:
        reads = "without a limit" if positions is None else f"up to {positions} tokens"
        yield ok("rows", f"none given; both models read rows {reads}, and data.max_length={limit}")
    shared = set() if pair.apart else _shared_ids(pair)
    each = ((role, token, i) for role, opened in pair.both for token, i in opened.entries.items())
    alone = [f"{token!r} of the {role}" for role, token, i in each if shared and i not in shared]
    if alone:
        some = ", ".join(alone[:3]) + f" and {len(alone) - 3} more" * (len(alone) > 3)
        message = f"entries that one model has no row for are left out of both bases ({some})"
        yield warning("tokenizers", message, "--data FILE, which checks whether rows use them: such rows are refused")


def _shared_ids(pair: Pair) -> set[int]:
    """Return the ids of the shared entries; none where the tokenizers differ, which is an error of theirs."""
    try:
        return {*pair.shared.target_ids.tolist()}
    except SemalignError:
        return set()


def tokenizer_ids(opened: OpenedModel) -> list[int]:
    """Return the rows of a head that the model's tokenizer names."""
    return sorted({i for i in opened.entries.values() if i < opened.shape.vocabulary})


def _amount(pair: Pair, split: Split) -> Iterator[Finding]:
    tokens, answers = sum(map(len, split.train)), sum(len(row.answer_ids) for row in split.train)
    of = " of the target" if pair.apart else ""
    yield ok(
        "rows",
        f"{len(split.train)} training rows ({tokens} tokens{of}, {answers} supervised), {len(split.held_out)} held-out "
        f"rows; the longest has {split.longest} tokens",
    )
    limit = pair.experiment.data.max_length
    if split.too_long:
        reach = min(split.longest, pair.positions or split.longest)
        message = f"{split.too_long} rows longer than data.max_length={limit} were left out"
        yield warning("rows", message, f"data.max_length={reach}" if reach > limit else SHORTER)


def _rows_differ(pair: Pair) -> bool:
    """Return whether the tokenizers split the text of some rows differently, as the target decodes it."""
    tokenizer = pair.target.tokenizer
    rows = pair.split.train[:TRIED] if pair.split is not None else []
    texts = (str(tokenizer.decode(list(row.prompt_ids + row.answer_ids))) for row in rows)
    return any(split_differently(pair.source, pair.target, text) for text in texts)


def _texts(pair: Pair, split: Split) -> Iterator[Finding]:
    """Compare the tokenizers on the answers of some rows; what the target decodes may hide a difference there."""
    if not pair.apart:
        yield from _split_differently(pair, (row.answer for row in split.train[:TRIED]))


def _spans(pair: Pair, split: Split) -> Iterator[Finding]:
    """Describe the spans of rows that each model reads in its own tokens, and the rows that have none."""
    sides = [(row.source, row) for row in (*split.train, *split.held_out) if row.source is not None]
    if not sides:
        return
    of_source, of_target = (sum(len(side.answer_ids) for side in each) for each in zip(*sides, strict=True))
    spans = sum(len(side.spans.source) for side, _ in sides)
    single = sum(
        (ours, theirs) == (1, 1)
        for side, _ in sides
        for ours, theirs in zip(side.spans.source, side.spans.target, strict=True)
    )
    yield ok(
        "spans",
        f"answers have {of_source} tokens of the source and {of_target} of the target in {spans} spans "
        f"({spans / of_target:.2f} for each token of the target), {single / spans:.0%} of one token on both sides",
    )
    for place, text in enumerate(("begin with space", "have space before their end")):
        if framed := sum(side.framed[place] for side, _ in sides):
            message = f"{framed} answers {text} on one side alone, so the span there is not supervised"
            yield warning("spans", message, "a target whose chat template frames answers as the source's does")
    if split.changed:
        message = f"{split.changed} rows were left out, as their answers differ between both models ({split.change})"
        yield warning("spans", message, "rows of plain text, without special tokens and rare forms of characters")


def _strange_entries(pair: Pair, split: Split) -> Iterator[Finding]:
    rows = (*split.train, *split.held_out)
    if pair.apart:
        for role, opened in pair.both:
            largest = max(max(side.prompt_ids + side.answer_ids) for side in (row.on(role) for row in rows))
            if largest >= opened.config.vocab_size:
                yield _without_embedding(role, opened, largest)
        return
    used = {i for row in rows for i in row.prompt_ids + row.answer_ids}
    strange = used - shared if (shared := _shared_ids(pair)) else None
    if not strange:
        return
    token = min(strange)
    name = pair.target.tokenizer.convert_ids_to_tokens(token)
    for role, opened in reversed(pair.both):
        if token >= opened.config.vocab_size and name in opened.entries:
            yield _without_embedding(role, opened, token)
            return
    told = f"the rows use {name!r}, entry {token}"
    yield error("rows", f"{told}, which only the target knows", "choose models that share a tokenizer")


def _without_embedding(role: Role, opened: OpenedModel, token: int) -> Finding:
    name = opened.tokenizer.convert_ids_to_tokens(token)
    message = (
        f"the rows use {name!r}, entry {token} of the {role}'s tokenizer, but {opened.settings.path} has embeddings "
        f"for {opened.config.vocab_size} entries only"
    )
    remedy = "choose the tokenizer that it was trained with, or give the model rows for all with "
    return error("rows", message, f"{remedy}resize_token_embeddings()")


def _limits(pair: Pair, split: Split) -> Iterator[Finding]:
    """Compare the rows, and the prompts with what is generated after them, with the longest input of both models."""
    data, measure = pair.experiment.data, pair.experiment.measure
    writers = ((data.answers, split.train), (data.held_out_answers, split.held_out))
    for role, opened in pair.both:
        longest = max(len(row.on(role)) for row in (*split.train, *split.held_out))
        limit, reads = opened.positions, f"{opened.settings.path} reads at most {opened.positions}"
        if limit is None:
            continue
        if longest > limit:
            yield error("rows", f"a row has {longest} tokens, {reads}", f"data.max_length={limit}")
        written = [row for writer, rows in writers if writer == role for row in rows]
        generated = split.held_out[: measure.answer_rows]
        for setting, more, rows in (
            ("measure.max_new_tokens", measure.max_new_tokens, generated),
            ("data.writing.max_new_tokens", data.writing.max_new_tokens, written),
        ):
            prompt = max((len(row.on(role).prompt_ids) for row in rows), default=0)
            if rows and prompt + more > limit:
                message = f"a prompt with {setting}={more} may reach {prompt + more} tokens, {reads}"
                yield error("rows", message, f"{setting}={max(1, limit - prompt)}")


def _unread(pair: Pair, split: Split) -> Iterator[Finding]:
    if split.unread:
        unread = ", ".join(f"{name} ({count} rows)" for name, count in split.unread.items())
        reader = "the chat template never reads" if pair.encoder.chat else "without a chat template nothing reads"
        message = f"{reader} {unread}, left out of prompts and answers"
        yield warning("rows", message, "a chat template that reads it, or rows without it")
    if split.several:
        yield ok("rows", f"{split.several} rows have several answers, of which the last is trained on and measured")
    if split.ended_within:
        message = (
            f"{split.ended_within} answers name {pair.encoder.tokenizer.eos_token!r} before their end, which is read "
            "as the end-of-sequence token there too"
        )
        yield warning("rows", message, "answers without it")
    if not pair.apart and (joint := glued(split.train[0], pair.target.tokenizer)):
        message = f"there is no chat template, and prompts run into their answers ({joint!r})"
        yield warning("rows", message, "end data.train.prompt with a space or a line break")


def encoder_of(experiment: Experiment, opened: OpenedModel) -> TextEncoder:
    """Return the encoder of texts by a model's tokenizer and template, with the options of an experiment."""
    return TextEncoder(opened.tokenizer, options=experiment.chat_template, date=experiment.date)
