"""Do both models read the same tokens: entries, special tokens, chat template, and the rows."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int
from semalign_geometry import SemalignError, SharedVocabulary
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.encoding import Conversation
from ..models.opening import check_tokenizers
from ..run.inputs import encoder_of, why_unknown
from ._findings import Finding, error, ok, warning
from ._pair import Candidate, Pair

SHOWN, TRIED = 3, 8
"""Differences that are shown, and rows that both tokenizers split, as many as in a run."""
ONE_FAMILY = "a source and a target of one family: semalign presets shows such pairs"
PROBES = [
    "Natalia sold 48/2 = 24 clips in May, and 1,234.5 altogether.",
    "def f(x):\n\treturn [x**2  for x in range(10)]  # naïve café",
    "Straße, Ωmega, 漢字, résumé 🙂 \n\n  end",
]
"""Texts that tokenizers with the same entries may split differently."""
DIALOGUE = [{"role": "user", "content": "What is 7 + 5?"}, {"role": "assistant", "content": "7 + 5 = 12"}]


def check_entries(pair: Pair) -> tuple[list[Finding], SharedVocabulary | None]:
    """The tokenizers entry by entry, and the vocabulary that both models share; None where a run would be refused."""
    source, target = (each.entries for each in pair.both)
    counts = _counts(pair, source, target)
    examples = [] if pair.sample is None else pair.sample.examples[:TRIED]
    texts = [str(pair.target.opened.tokenizer.decode(list(e.prompt_ids + e.answer_ids))) for e in examples]
    try:
        shared = check_tokenizers(pair.source.opened, pair.target.opened, texts)
    except SemalignError as failure:
        moved = _moved(source, target)
        reason = _some(moved) if moved else re.split("[;:] choose", str(failure))[0]
        return [error("tokenizers", f"{counts}; {reason}", ONE_FAMILY)], None
    found = [ok("tokenizers", counts)]
    for text in (*PROBES, *(example.answer for example in examples)):
        ours, theirs = (each.opened.tokenizer(text, add_special_tokens=False)["input_ids"] for each in pair.both)
        if ours != theirs:
            message = f"the tokenizers have the same entries and split {text[:40]!r} differently"
            found.append(warning("tokenizers", message, ONE_FAMILY))
            break
    return [*found, *_lonely(pair, source, target, shared)], shared


def check_special_tokens(pair: Pair) -> Finding:
    """Begin and end of sequence, and padding."""
    source, target = (each.opened.tokenizer for each in pair.both)
    ours, theirs = _special(source), _special(target)
    shown = ", ".join(f"{name} {ours[name]!r} and {theirs[name]!r}" for name in ours)
    check = "special tokens"
    if theirs["EOS"] is None:
        message = f"the target's tokenizer has no end of sequence, so that answers do not end: {shown}"
        return warning(check, message, f'"eos_token": "…" in the tokenizer_config.json of {pair.target.path}')
    begins = not pair.encoder.chat and target.bos_token_id in pair.encoder.start
    matter = ("BOS", "EOS") if begins else ("EOS",)
    differing = [name for name in matter if ours[name] != theirs[name]]
    if differing:
        message = f"{' and '.join(differing)} differ, and the target's are used for both: {shown}"
        keys = " and ".join(f'"{name.lower()}_token"' for name in differing)
        return warning(check, message, f"the same {keys} in the tokenizer_config.json of both models")
    shown = ", ".join(f"{name} {token!r}" for name, token in theirs.items())
    padding = "" if ours["padding"] == theirs["padding"] else f" (the source's: {ours['padding']!r}; it is masked)"
    return ok(check, f"{shown}{padding}" + ("" if begins else "; rows do not begin with BOS"))


def check_chat_template(pair: Pair) -> Finding:
    """Rows are rendered by the target's template, for both models."""
    source, target = (each.opened.tokenizer for each in pair.both)
    check = "chat template"
    if source.chat_template is None and target.chat_template is None:
        return ok(check, "neither model has one: prompt and answer follow one another as plain text")
    if source.chat_template is None:
        message = "only the target has one: the source reads its marks as text that it was not trained on"
        return warning(check, message, "choose the source that was trained on chats, such as an -Instruct model")
    if target.chat_template is None:
        message = "only the source has one: rows are plain text to both, which the source was not trained on"
        return warning(check, message, _copied_template(pair))
    try:
        pair.encoder.example(Conversation(DIALOGUE), name="a question with its answer")
        ours, theirs = (encoder_of(pair.experiment, each.opened).render(DIALOGUE) for each in pair.both)
    except SemalignError as failure:
        return error(check, str(failure), _copied_template(pair))
    except Exception as failure:  # a template can fail in any way
        message = f"the source's template refuses a question with its answer: {' '.join(str(failure).split())[:120]}"
        return warning(check, message, "choose the source that was trained on chats, such as an -Instruct model")
    if source.chat_template == target.chat_template:
        return ok(check, "the same in both")
    if ours == theirs:
        return ok(check, "not the same text, but both render a question with its answer alike")
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    message = (
        "they render a question with its answer differently, and the target's is used for both: "
        f"{ours[max(0, at - 10) : at + 20]!r} and {theirs[max(0, at - 10) : at + 20]!r}"
    )
    return warning(check, message, "a source and a target that were trained with one chat template")


def check_template_options(pair: Pair) -> list[Finding]:
    """Options of the chat template that have no effect, and a day that it is told."""
    found, encoder = [], pair.encoder
    ignored = encoder.ignored_options
    if ignored:
        kept = {name: value for name, value in encoder.options.items() if name not in ignored}
        remedy = f"chat_template={json.dumps(kept)}"
        found.append(warning("chat template", f"it never reads {', '.join(ignored)} of chat_template", remedy))
    if encoder.told_date is not None:
        found.append(ok("chat template", f"it reads the clock, and is told {encoder.told_date}, the setting date"))
    return found


def check_rows(pair: Pair, shared: SharedVocabulary | None) -> list[Finding]:
    """Lengths of the rows against the limits of the settings and of both models, and their tokens."""
    limit = pair.experiment.data.max_length
    positions = min((each.opened.positions for each in pair.both if each.opened.positions is not None), default=None)
    if pair.sample is None:
        if positions is not None and positions < limit:
            message = f"rows may have data.max_length={limit} tokens, and a model reads at most {positions}"
            return [warning("rows", message, f"data.max_length={positions}")]
        reads = "without a limit" if positions is None else f"up to {positions} tokens"
        return [ok("rows", f"none given; both models read rows {reads}, and data.max_length={limit}")]
    found = [*_lengths(pair, limit, positions), *_enough(pair), *_generated(pair, positions)]
    if shared is not None:
        known = set(shared.target_ids.tolist())
        strange = {i for e in pair.sample.examples for i in e.prompt_ids + e.answer_ids} - known
        if strange:
            why, _, _ = why_unknown(min(strange), pair.source.opened, pair.target.opened).rpartition(": choose")
            message = f"rows use {len(strange)} entries that the models do not share, such as {why}"
            found.append(error("rows", message, ONE_FAMILY))
    return found


def _lengths(pair: Pair, limit: int, positions: int | None) -> list[Finding]:
    assert pair.sample is not None
    lengths = sorted(map(len, pair.sample.examples))
    count, longest = len(lengths), lengths[-1]
    total = sum(pool.total for pool in pair.sample.pools)
    some = f"of {total} rows" + (f", {count} of which were read," if count < total else "")
    shown = f"{some} the median has {lengths[count // 2]} tokens, the longest {longest}"
    too_long = sum(length > limit for length in lengths)
    reach = longest if positions is None else min(longest, positions)
    if positions is not None and any(positions < length <= limit for length in lengths):
        return [error("rows", f"{shown}; a model reads at most {positions}", f"data.max_length={positions}")]
    if too_long == count:
        message = f"{shown}: all are longer than data.max_length={limit}"
        remedy = f"data.max_length={reach}" if reach > limit else "shorter rows, or models that read longer ones"
        return [error("rows", message, remedy)]
    if too_long:
        message = f"{shown}; {too_long} longer than data.max_length={limit} would be left out"
        remedy = f"data.max_length={reach}" if reach > limit else "shorter rows, or models that read longer ones"
        return [warning("rows", message, remedy)]
    return [
        ok("rows", f"{shown}; data.max_length={limit}" + ("" if positions is None else f", models read {positions}"))
    ]


def _enough(pair: Pair) -> list[Finding]:
    """Whether a run would find as many rows as it asks for."""
    assert pair.sample is not None
    data = pair.experiment.data
    found = []
    for pool in pair.sample.pools:
        short = len({example.prompt_ids for example in pool.examples if len(example) <= data.max_length})
        fitting = short * pool.total // len(pool.examples)
        if fitting >= pool.wanted or not short:  # rows that are all too long are told with the lengths
            continue
        known = len(pool.examples) == pool.total or pool.total < pool.wanted
        about = "" if known else "about "
        of_them = "" if fitting == pool.total else f", {about}{fitting} of them short enough and with other prompts,"
        message = f"{pool.path} has {pool.total} rows{of_them} of the {pool.wanted} that are asked for"
        if pool.part == "held_out":
            remedy = f"data.held_out_rows={fitting}"
        elif data.held_out is not None:
            remedy = f"data.train_rows={fitting}"
        else:
            held_out = min(data.held_out_rows, max(1, fitting // 6))
            remedy = f"data.train_rows={fitting - held_out} data.held_out_rows={held_out}"
        found.append((error if known else warning)("rows", message, remedy if fitting > 1 else "more rows"))
    return found


def _generated(pair: Pair, positions: int | None) -> list[Finding]:
    """Whether prompts leave room for what is generated after them."""
    assert pair.sample is not None
    measure = pair.experiment.measure
    prompts = [len(e.prompt_ids) for e in pair.sample.examples if len(e) <= pair.experiment.data.max_length]
    longest = max(prompts, default=0)
    if positions is None or not measure.answer_rows or longest + measure.max_new_tokens <= positions:
        return []
    message = (
        f"the longest prompt has {longest} tokens, and measure.max_new_tokens={measure.max_new_tokens} may follow; a "
        f"model reads at most {positions}"
    )
    return [warning("rows", message, f"measure.max_new_tokens={max(1, positions - longest)}")]


def _counts(pair: Pair, source: Mapping[str, int], target: Mapping[str, int]) -> str:
    common, moved = source.keys() & target.keys(), _moved(source, target)
    padded = [each.shape.vocabulary - len(tokenizer_ids(each)) for each in pair.both]
    return (
        f"{len(common)} entries shared, {len(moved)} of them with other ids, {len(source) - len(common)} only in the "
        f"source, {len(target) - len(common)} only in the target; {padded[0]} rows of the source's head and "
        f"{padded[1]} of the target's are padding"
    )


def _lonely(
    pair: Pair, source: Mapping[str, int], target: Mapping[str, int], shared: SharedVocabulary
) -> list[Finding]:
    """Entries that are left out of both bases, since one model lacks them."""
    if len(shared) == len(source) == len(target):
        return []
    known = set(shared.target_ids.tolist())
    sides = [
        f"{name}: {_some([repr(token) for token, i in sorted(entries.items(), key=lambda e: e[1]) if i not in known])}"
        for name, entries in (("source", source), ("target", target))
        if len(entries) > len(shared)
    ]
    message = f"entries that one model has no row for are left out of both bases ({'; '.join(sides)})"
    if pair.sample is not None:  # whose tokens are looked at
        return [ok("tokenizers", message)]
    return [warning("tokenizers", message, "--data FILE, which tells whether rows use them: such rows are refused")]


def _moved(source: Mapping[str, int], target: Mapping[str, int]) -> list[str]:
    """Entries with another id on the other side, in the source's order."""
    pairs = sorted((i, token) for token, i in source.items() if target.get(token, i) != i)
    return [f"{token!r} is {i} in the source and {target[token]} in the target" for i, token in pairs]


def _some(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    return {"BOS": tokenizer.bos_token, "EOS": tokenizer.eos_token, "padding": tokenizer.pad_token}


def _copied_template(pair: Pair) -> str:
    """The target gets the source's template; not in the cache folder, whose models are as they were converted."""
    file, folder = Path(pair.source.opened.place) / "chat_template.jinja", Path(pair.target.path).expanduser()
    if file.is_file() and folder.is_dir():
        return f"cp {shlex.quote(str(file))} {shlex.quote(str(folder))}/"
    return "a target in a folder of your own, with the source's chat template in it as chat_template.jinja"


def tokenizer_ids(candidate: Candidate) -> Int[Tensor, " v"]:
    """Rows of the head that its tokenizer names."""
    ids = torch.tensor(sorted(set(candidate.entries.values())))
    return ids[ids < candidate.shape.vocabulary]
