"""The embedded `tiny` family: small Llama models that learn to solve arithmetic word problems.

Nothing is downloaded. All models learn the same kind of problems in the same way. The target has fewer layers, is
narrower than the source and sees fewer problems; the small model is a second target, another step down. The target
`target-other` has the sizes and the training of the target, and a tokenizer of its own.

The tokenizer of the others has an entry for every word and every number. There are more than twice as many entries
as the source is wide, so that the head W has full column rank and the semantic basis W⁺ exists. The other tokenizer
is a byte-level BPE that writes numbers digit by digit and some words in pieces; the two share enough entries for
both bases.

Legend of the shape suffixes: B rows of a batch, L positions, N supervised positions, D width, V vocabulary.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from semalign_geometry.base import SemalignError, new_folder
from semalign_train import Muon
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Split, Whitespace
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from ..data.arithmetic import (
    _ADD,
    _ANSWER,
    _GROUPS,
    _LARGEST_NUMBER,
    _NAMES,
    _OBJECTS,
    _PLACES,
    _QUESTION,
    _START,
    _SUBTRACT,
    _draw_rows,
)
from .saving import save_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Role = Literal["source", "target", "small", "target-other"]
_Record = dict[str, str | int]
_PAD, _BOS, _EOS, _UNK, _USER, _ASSISTANT = "<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"
_SPECIAL = (_PAD, _BOS, _EOS, _UNK, _USER, _ASSISTANT)
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant> ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('known roles are user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
_SPACE = "▁"
"""Begins the name of every entry that is a word, as each word brings the space before it."""
_OTHER_PAD, _OTHER_END = "<|pad|>", "<|end|>"
_OTHER_SPECIAL = (_OTHER_PAD, _OTHER_END, _USER, _ASSISTANT)
_OTHER_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] in ('user', 'assistant') %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('known roles are user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_OTHER_WORDS = Regex(r" ?\d| ?[^\s\d]+|\s")
"""Texts that no entry of the other tokenizer crosses: a digit, a word, or a space that is not before one."""
_OTHER_ENTRIES = 896
_OTHER_ROWS = 4_000
"""Problems that the merges are counted on."""
_MAX_POSITIONS = 128
_BATCH_ROWS = 64
_MATRIX_RATE, _OTHER_RATE = 0.02, 3e-3
_WARM_UP, _DECAY = 0.1, 0.5
_MATRIX_WEIGHT_DECAY = 0.01
_BETAS = (0.9, 0.98)
_GRADIENT_NORM = 1.0
_RECORD = "tiny.json"
_RECIPE_VERSION = 3


@dataclasses.dataclass(frozen=True, slots=True)
class _Recipe:
    """Size of one model and the number of optimiser steps, of `_BATCH_ROWS` problems each."""

    layers: int
    width: int
    heads: int
    intermediate: int
    steps: int


_RECIPES: dict[Role, _Recipe] = {
    "source": _Recipe(layers=4, width=128, heads=4, intermediate=256, steps=300),
    "target": _Recipe(layers=3, width=96, heads=4, intermediate=192, steps=95),
    "small": _Recipe(layers=2, width=64, heads=4, intermediate=128, steps=95),
    "target-other": _Recipe(layers=3, width=96, heads=4, intermediate=192, steps=95),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer of the tiny models.

    Words, punctuation marks and the numbers 0 to 40 are one entry each. Hence two laws: text of known words between
    single spaces survives encoding and decoding, and a prompt rendered with `add_generation_prompt=True` is, token by
    token, the beginning of the prompt with its answer. The chat template has the roles `user` and `assistant`; eos
    ends an assistant turn, and pad differs from eos.
    """
    entries = [word if word in _SPECIAL else _SPACE + word for word in _vocabulary()]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(entries)}, unk_token=_UNK))
    backend.pre_tokenizer = Steps([Whitespace(), Metaspace(_SPACE)])
    backend.decoder = decoders.Metaspace(_SPACE)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNK,
        additional_special_tokens=[_USER, _ASSISTANT],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_other_tokenizer() -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer of `target-other`.

    Its merges are learned from generated problems, so that frequent words are one entry, some words are several, and
    every text survives encoding and decoding. Digits stand alone: ` 12` is ` 1` and `2`. It has no bos; turns end in
    eos, which is `<|end|>`, and each begins with a mark of the tiny family.
    """
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = Steps([Split(_OTHER_WORDS, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=_OTHER_ENTRIES,
        special_tokens=list(_OTHER_SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = _draw_rows(_OTHER_ROWS, stream="tokenizer", split="train")
    backend.train_from_iterator((f" {message['content']}" for row in rows for message in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_OTHER_PAD,
        eos_token=_OTHER_END,
        additional_special_tokens=[_USER, _ASSISTANT],
        chat_template=_OTHER_CHAT_TEMPLATE,
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_model(
    role: Role,
    folder: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Pre-train one tiny model on generated problems and save it with its tokenizer, or reuse a finished one.

    The objective is the mean negative log-likelihood of the answer tokens, over problems of the `train` split only.
    Weights are float32 on the CPU: Muon moves matrices of the layers, AdamW moves embeddings and norm gains. The
    result is a function of `role`, `seed`, `steps` and the number of threads. The folder is whole or absent.

    Args:
        role: `source`, the largest model with the longest training, `target`, `small` or `target-other`.
        folder: Where the model goes. A folder that holds the same model is returned untouched.
        seed: Seed of the initial weights and of the problems; the global random state is left as found.
        steps: Optimiser steps of 64 problems each, at least 1; by default those of the role's recipe.
        progress: Called after every step with the steps done and the total.

    Returns:
        `folder`, loadable with `from_pretrained`.

    Raises:
        SemalignError: If `role` is unknown, `steps` is below 1, or `folder` holds something else.
    """
    if role not in _RECIPES:
        raise SemalignError(f"role is {role!r}; expected one of {', '.join(_RECIPES)}")
    recipe = _RECIPES[role]
    total = recipe.steps if steps is None else steps
    if total < 1:
        raise SemalignError(f"steps is {total}; expected at least 1, or None for the recipe's {recipe.steps}")
    record: _Record = {"recipe_version": _RECIPE_VERSION, "role": role, "seed": seed, "steps": total}
    if _is_finished(folder, record):
        return folder

    tokenizer = build_other_tokenizer() if role == "target-other" else build_tokenizer()
    model = _new_model(recipe, tokenizer, seed=seed)
    rows = _draw_rows(total * _BATCH_ROWS, stream=f"pre-training:{role}:{seed}", split="train")
    _train(model, _batches(rows, tokenizer), total=total, progress=progress)

    with new_folder(folder) as filled:
        save_model(model, tokenizer, filled)
        (filled / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def tiny_folder_name(role: Role) -> str:
    """Return the name of the folder for a model of the present recipe: another recipe gets another name."""
    recipe = json.dumps([_RECIPE_VERSION, dataclasses.asdict(_RECIPES[role])])
    return f"tiny-{role}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def _vocabulary() -> list[str]:
    templates = (*_START, *_GROUPS, *_ADD, *_SUBTRACT, *_QUESTION, _ANSWER)
    wording = [word for template in templates for word in template.split() if not word.startswith("{")]
    numbers = [str(number) for number in range(_LARGEST_NUMBER + 1)]
    words = [*_SPECIAL, *numbers, "+", "-", "*", "=", *wording, *_NAMES, *_OBJECTS, *_PLACES]
    return list(dict.fromkeys(words))


def _new_model(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    torch.nn.Module.float(model)
    return model


def _batches(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and labels, both (B, L), padded on the right; -100 where nothing is supervised."""
    texts = tokenizer.apply_chat_template([row["messages"] for row in rows], tokenize=False)
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assistant = tokenizer.get_vocab()[_ASSISTANT]
    for begin in range(0, len(encoded), _BATCH_ROWS):
        batch = encoded[begin : begin + _BATCH_ROWS]
        length = max(map(len, batch))
        ids_BL = torch.full((len(batch), length), tokenizer.pad_token_id)
        labels_BL = torch.full((len(batch), length), -100)
        for index, ids in enumerate(batch):
            answer = ids.index(assistant) + 1
            ids_BL[index, : len(ids)] = torch.tensor(ids)
            labels_BL[index, answer : len(ids)] = torch.tensor(ids[answer:])
        yield ids_BL, labels_BL


def _train(
    model: "LlamaForCausalLM",
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = set(map(id, matrices))
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    muon = Muon(matrices, weight_decay=_MATRIX_WEIGHT_DECAY)
    adamw = torch.optim.AdamW(others, betas=_BETAS, weight_decay=0.0)
    model.train()
    for done, (ids_BL, labels_BL) in enumerate(batches, start=1):
        # Padding stands on the right, so causal attention needs no mask; the head sees supervised positions.
        hidden_BLD = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
        supervised_BL = labels_BL[:, 1:] != -100
        logits_NV = model.lm_head(hidden_BLD[:, :-1][supervised_BL])
        loss = cross_entropy(logits_NV, labels_BL[:, 1:][supervised_BL])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
        factor = _rate(done - 1, total)
        adamw.param_groups[0]["lr"] = _OTHER_RATE * factor
        adamw.step()
        muon.param_groups[0]["lr"] = _MATRIX_RATE * factor
        muon.step()
        model.zero_grad()
        if progress is not None:
            progress(done, total)
    model.train(False)


def _rate(step: int, total: int) -> float:
    """Return the factor of the learning rate: warm-up over a tenth, a plateau, a linear decay over the last half."""
    return min(1.0, (step + 1) / (_WARM_UP * total), max(total - step, 1) / (_DECAY * total))


def _is_finished(folder: Path, record: _Record) -> bool:
    """Return whether `folder` holds the model of `record`; refuse a folder with anything else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise SemalignError(f"{folder} is a file; expected a folder that is absent, empty or holds a tiny model")
    if not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        message = f"{folder} holds no tiny model (no readable {_RECORD}); choose an absent or empty folder"
        raise SemalignError(message) from None
    if found != record:
        message = f"{folder} holds the tiny model {found}, expected {record}; choose another folder or delete it"
        raise SemalignError(message)
    return True
