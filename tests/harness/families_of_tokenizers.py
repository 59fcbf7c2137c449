"""Small tokenizers of the families that models have, trained on one text, each with a chat template of its own."""

import json

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

TEXT = (
    "Natalia sold 48 clips in April, and half as many in May: 48 / 2 = 24. She sold 48 + 24 = 72 clips altogether.\n"
    "def total(values):\n    found = 0\n    for value in values:\n        found += value\n    return found\n\n"
    "The answer is 72. What is 7 + 5? 7 + 5 = 12\n"
) * 8
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "|>\n{{ m['content'] }}", "|>\n{{ '<think>\n\n</think>\n\n' if loop.last }}{{ m['content'] }}"
)
MARKS = ["<|user|>", "<|assistant|>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", *MARKS]


def byte_level(*, digits: bool = False, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2, Llama 3, Qwen and SmolLM; `digits` writes numbers digit by digit, with other ids."""
    backend = Tokenizer(BPE())
    whole = ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), whole]) if digits else whole
    backend.decoder = decoders.ByteLevel()
    special = SPECIAL[::-1] if digits else SPECIAL
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return _wrapped(backend, template)


def normalising() -> PreTrainedTokenizerFast:
    """Byte-level BPE behind NFC, as of Qwen."""
    tokenizer = byte_level(digits=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece(template: str | None = INSTRUCT) -> PreTrainedTokenizerFast:
    """BPE with a mark for spaces, one of them before every text, and byte fallback, as of Llama 2 and Mistral."""
    backend = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=460, special_tokens=[*SPECIAL, *fallback], max_token_length=8, show_progress=False)
    backend.train_from_iterator(TEXT.split(" "), trainer)
    described = json.loads(backend.to_str())
    described["added_tokens"] = [entry for entry in described["added_tokens"] if entry["content"] not in fallback]
    return _wrapped(Tokenizer.from_str(json.dumps(described)), template)


def unigram(template: str | None = INSTRUCT) -> PreTrainedTokenizerFast:
    """Unigram with a mark for spaces, as of T5 and XGLM; it knows the characters that it has seen."""
    backend = Tokenizer(Unigram())
    backend.pre_tokenizer = Metaspace("▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = UnigramTrainer(vocab_size=160, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return _wrapped(backend, template)


def _wrapped(backend: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=MARKS,
        chat_template=template,
    )
