"""The table of families as Markdown."""

from collections.abc import Mapping

from family_checks import NOT_BUILT, REFUSED, RIGHT
from tiny_families import ENCODERS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CHECKS = ("NLL, KL", "replay", "reload", "generation")
HEAD = """# Families of models

Written by `python harness/families`, with {versions}.

transformers lists {listed} model types under `AutoModelForCausalLM`. {others} of them are encoders or decoders of
an encoder (those that it lists for masked or sequence-to-sequence language models too, and
{encoders}), which are not tried.
Of the {tried} others, **{usable} are usable** and {refused} are refused before any work starts{wrong};
{not_built} cannot be built from a small configuration alone.

Each is a random model of few small layers, with sliding windows and chunks shorter than the rows, that is saved with
the tiny tokenizer and loaded as any model is. Its checks, in float32 on a CPU:

- **NLL, KL**: `measure` on rows padded to one length equals transformers' own loss and a plain divergence from a
  perturbed copy, each row alone;
- **replay**: a run from a middle layer ends as the whole run does, and its weights get a gradient when it is trained;
- **reload**: the perturbed copy computes the same after it was saved and loaded;
- **generation**: every token of greedy answers that end apart is the likeliest one by a run of its row alone without a
  cache. Models whose cache allows no batches generate one row at a time.

A model of a usable family may still be refused for its size, its tokenizer or its weights.
"""


def line(family: str, result: Mapping[str, str]) -> str:
    """One family as a line of text."""
    return f"{family}: " + "; ".join(f"{name} {said}" for name, said in result.items())


def document(results: Mapping[str, Mapping[str, str]], versions: Mapping[str, str]) -> str:
    """All families as a Markdown file."""
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    usable = {name: result for name, result in results.items() if all(result.get(c, "")[:1] == RIGHT for c in CHECKS)}
    refused = {name: result[REFUSED] for name, result in results.items() if REFUSED in result}
    not_built = {name: result[NOT_BUILT] for name, result in results.items() if NOT_BUILT in result}
    partly = {n: result for n, result in results.items() if n not in {*usable, *refused, *not_built}}
    head = HEAD.format(
        versions=" and ".join(f"{name} {number}" for name, number in versions.items()),
        listed=len(classes),
        others=len(classes) - len(results),
        encoders=", ".join(f"`{name}`" for name in ENCODERS),
        tried=len(results),
        usable=len(usable),
        refused=len(refused),
        wrong=f", {len(partly)} fail a check" if partly else "",
        not_built=len(not_built),
    )
    parts = [head, "## Usable\n", _table(["family", "class", *CHECKS])]
    parts += [_row([f"`{n}`", classes[n], *(result[c] for c in CHECKS)]) for n, result in usable.items()]
    if partly:
        parts += ["\n## Fail a check\n", _table(["family", "class", *CHECKS])]
        parts += [_row([f"`{n}`", classes[n], *(result[c] for c in CHECKS)]) for n, result in partly.items()]
    for title, sentences in (("Refused", refused), ("Not built", not_built)):
        parts += [f"\n## {title}\n", _table(["family", "class", "sentence"])]
        parts += [_row([f"`{name}`", classes[name], said]) for name, said in sentences.items()]
    return "\n".join(parts) + "\n"


def _table(names: list[str]) -> str:
    return _row(names) + "\n" + _row(["---"] * len(names))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
