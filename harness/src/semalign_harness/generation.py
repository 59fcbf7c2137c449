"""Generation in batches that shrink where a model's cache allows it, else row by row."""

import enum
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers  # its parts are imported when they are used
from jaxtyping import Float, Int
from semalign_attribution import undisturbed
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATION = 4
"""Raised when the same prompt may get another text: cached answers are then void."""
CHECKED_EVERY = 8
"""Steps between two checks of the text of a row against the stop rules."""
PROMPT_LENGTHS, ANSWER_LENGTHS = (5, 17, 11), (5, 2, 5)
"""Lengths of the rows of the check: two prompts are padded, and one answer ends early."""
TOLERANCE = 0.01
"""Largest relative distance of logits that count as the same; in half precision it is 32 ε."""


class Way(enum.Enum):
    """Ways to generate, the fastest first."""

    BATCHES = "in batches"
    """Prompts of different lengths together; a row that has ended costs nothing."""
    ALONE = "one row at a time"
    """By transformers, for models whose cache allows no padding or cannot drop a row."""


Pick = Callable[[Tensor, list[int]], Tensor]
"""Next token of each row, of logits (b, v) and the places of the rows' prompts."""


def likeliest(logits_BV: Tensor, rows: list[int]) -> Tensor:
    """Pick the likeliest entry of each row."""
    return logits_BV.argmax(-1)


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: frozenset[int],
    way: Way = Way.BATCHES,
    stopped: Callable[[list[int]], bool] = lambda row: False,
    ended: Callable[[int, list[int]], None] = lambda place, row: None,
    pick: Pick = likeliest,
) -> list[list[int]]:
    """Continue each prompt by its likeliest token, or the one that `pick` takes, again and again.

    Law: a row is the model's continuation of its prompt alone and without a cache, whatever else is
    in the batch, up to rounding: of two tokens that are equally likely within it, another batch may
    choose the other. Settings of sampling or penalties of a checkpoint are ignored.

    Args:
        model: in evaluation mode.
        prompts: token ids, one token at least.
        max_new_tokens: most tokens of a row.
        ends: token ids that end a row; see `end_ids`.
        way: the one that `check_generation` returned for this model.
        stopped: whether the tokens of a row so far end it; called every `CHECKED_EVERY` tokens.
        ended: called with each prompt's place and its new tokens when its row is complete.
        pick: chooses the next token of each row.

    Returns:
        The new tokens of each prompt, the ending one included.
    """

    def is_complete(row: list[int]) -> bool:
        return len(row) == max_new_tokens or row[-1] in ends or (len(row) % CHECKED_EVERY == 0 and stopped(row))

    if way is Way.BATCHES:
        return _in_batch(model, prompts, is_complete, ended, pick)
    return [
        _alone(model, prompt, place, max_new_tokens, is_complete, ended, pick) for place, prompt in enumerate(prompts)
    ]


def check_generation(model: "PreTrainedModel") -> Way:
    """Find the fastest way in which a model obeys the law of `generate`, by about ten short runs.

    The tokens are fixed and the logits compared, so that near-ties are no failure. The logits of a
    row must agree at half of its steps or more: in half precision, rounding decides which experts a
    token goes to.

    Raises:
        SemalignError: there is none.
    """
    prompts, answers = _given_rows(model.config.get_text_config(decoder=True).vocab_size)
    failures = []
    with undisturbed(model), torch.no_grad():
        expected = [_logits_without_cache(model, *row) for row in zip(prompts, answers, strict=True)]
        for way in Way:
            try:
                found = _logits_of(way, model, prompts, answers)
            except Exception as error:  # in code of the model, which may use its cache or its mask differently
                failures.append(f"{way.value} {type(error).__name__} ({' '.join(str(error).split())[:100]})")
                continue
            distance = _distance(found, expected)
            if distance <= max(TOLERANCE, 32 * torch.finfo(model.dtype).eps):
                return way
            failures.append(f"{way.value} logits that are {distance:.2g} of their size away")
    raise SemalignError(
        f"{type(model).__name__} does not compute with its cache what it computes without ({'; '.join(failures)}), and "
        "cannot generate: set measure.answer_rows=0, data.answers=gold and data.held_out_answers=gold, leave out "
        "benchmarks that generate, or choose another model"
    )


def end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return every token id that ends a text of this model."""
    settings = model.generation_config
    configured = settings.eos_token_id if settings is not None else None
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*several, tokenizer.eos_token_id] if isinstance(token, int))


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Align the ends of rows of token ids; return them with the mask of the real places."""
    ids = [torch.tensor(row) for row in rows]
    ids_BN, mask_BN = (
        pad_sequence(each, batch_first=True, padding_side="left") for each in (ids, [*map(torch.ones_like, ids)])
    )
    return ids_BN, mask_BN


def _in_batch(
    model: Any,  # a PreTrainedModel, whose type does not declare that it generates
    prompts: Sequence[Sequence[int]],
    is_complete: Callable[[list[int]], bool],
    ended: Callable[[int, list[int]], None],
    pick: Pick,
) -> list[list[int]]:
    """All rows together, by the model's own preparation of inputs and its own cache."""
    found: list[list[int]] = [[] for _ in prompts]
    ids_BN, mask_BN = (part.to(model.device) for part in left_padded(prompts))
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    caches: dict[str, Any] = {}  # by the name that the model takes and returns its cache under
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    while True:
        if "position_ids" in known:
            options["position_ids"] = (mask_BN.cumsum(1) - 1).clamp_min(0)
        inputs = model.prepare_inputs_for_generation(
            ids_BN,
            next_sequence_length=1 if caches else None,
            is_first_iteration=not caches,
            attention_mask=mask_BN,
            use_cache=True,
            **options,
            **caches,
        )
        output = model(**inputs, return_dict=True)
        caches = {name: value for name, value in output.items() if isinstance(value, transformers.Cache)}
        chosen_B = pick(output.logits[:, -1], rows)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            found[row].append(token)
        going = []
        for place, row in enumerate(rows):
            if is_complete(found[row]):
                ended(row, found[row])
            else:
                going.append(place)
        if not going:
            break
        ids_BN = torch.cat([ids_BN, chosen_B[:, None]], dim=1)
        mask_BN = torch.cat([mask_BN, mask_BN.new_ones(len(rows), 1)], dim=1)
        if len(going) < len(rows):
            kept = torch.tensor(going, device=model.device)
            for cache in caches.values():
                cache.reorder_cache(kept)  # which every kind of layer has, unlike batch_select_indices
            ids_BN, mask_BN = ids_BN[kept], mask_BN[kept]
            rows = [rows[place] for place in going]
    return found


def _alone(
    model: Any,  # likewise
    prompt: Sequence[int],
    place: int,
    max_new_tokens: int,
    is_complete: Callable[[list[int]], bool],
    ended: Callable[[int, list[int]], None],
    pick: Pick,
) -> list[int]:
    """One row by the `generate` of transformers, with our own choice of tokens and of the end."""

    def picked(ids_1N: Tensor, logits_1V: Tensor) -> Tensor:
        return torch.full_like(logits_1V, -torch.inf).scatter(1, pick(logits_1V, [place])[:, None], 0.0)

    def stops(ids_1N: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([is_complete(ids_1N[0, len(prompt) :].tolist())], device=ids_1N.device)

    ids_1N = torch.tensor([list(prompt)], device=model.device)
    own, model.generation_config = (
        model.generation_config,
        transformers.GenerationConfig(),
    )  # which is mixed into what is passed
    try:
        text_1N = model.generate(
            ids_1N,
            attention_mask=torch.ones_like(ids_1N),
            generation_config=transformers.GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens),
            logits_processor=transformers.LogitsProcessorList([picked]),
            stopping_criteria=transformers.StoppingCriteriaList([stops]),
        )
    finally:
        model.generation_config = own
    found: list[int] = text_1N[0, len(prompt) :].tolist()
    ended(place, found)
    return found


def _given_rows(entries: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts and answers; all answers end with one token, which occurs nowhere else.

    Other tokens repeat only where they are too few. The vocabulary's ends, often special, are left out.
    """
    generator = torch.Generator().manual_seed(0)
    end, *others = (entries // 10 + torch.randperm(entries - entries // 5, generator=generator)).tolist()
    tokens = itertools.cycle(others)
    prompts, answers = (
        [list(itertools.islice(tokens, length)) for length in lengths]
        for lengths in (PROMPT_LENGTHS, (length - 1 for length in ANSWER_LENGTHS))
    )
    return prompts, [[*answer, end] for answer in answers]


def _logits_without_cache(model: "PreTrainedModel", prompt: list[int], answer: list[int]) -> Float[Tensor, "s v"]:
    """Logits before each token of an answer, by one run without a cache."""
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, len(prompt) - 1 :].float()


def _logits_of(
    way: Way, model: "PreTrainedModel", prompts: list[list[int]], answers: list[list[int]]
) -> list[Float[Tensor, "_ v"]]:
    """The same logits while `generate` picks the answers."""
    seen: list[list[Tensor]] = [[] for _ in prompts]

    def pick(logits_BV: Tensor, rows: list[int]) -> Tensor:
        for row, logits_V in zip(rows, logits_BV.float(), strict=True):
            seen[row].append(logits_V)
        return torch.tensor([answers[row][len(seen[row]) - 1] for row in rows], device=logits_BV.device)

    ends = frozenset(answer[-1] for answer in answers)
    generate(model, prompts, max_new_tokens=max(ANSWER_LENGTHS), ends=ends, way=way, pick=pick)
    return [torch.stack(logits) for logits in seen]


def _distance(found: list[Float[Tensor, "_ v"]], expected: list[Float[Tensor, "_ v"]]) -> float:
    """Largest of the rows' medians over steps of ‖found − expected‖ / ‖expected − mean‖."""
    medians = [
        ((ours - theirs).norm(dim=1) / (theirs - theirs.mean(1, keepdim=True)).norm(dim=1)).median()
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return float(torch.stack(medians).max())
