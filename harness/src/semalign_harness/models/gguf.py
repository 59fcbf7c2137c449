"""GGUF files, converted once."""

import io
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from semalign_geometry.base import SemalignError, new_folder, sha256_of
from tokenizers.normalizers import NFC
from torch import nn
from transformers import AutoTokenizer

from ..util.cache import cache_folder
from ..util.failures import reason
from ..util.locking import lock_of
from .catalogue import KnownModel
from .saving import save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILLER = re.compile(r"\[PAD\d+\]")


def converted(path: Path, known: KnownModel | None, note: Callable[[str], None] | None) -> Path:
    """Return a folder of bfloat16 safetensors with the model of a GGUF file, converted once for each content.

    Args:
        path: the file.
        known: the model of the catalogue that the file is, if any; its hash is not computed again.
        note: called before the conversion.

    Raises:
        SemalignError: it cannot be read, or is no longer the file of the catalogue.
    """
    folder = place_of_gguf(path, known)
    with made_by_one(folder):
        if not (folder / "config.json").is_file():
            if known and known.file and sha256_of(path) != known.file.sha256:
                again = f"rm -r {shlex.quote(str(path.parent))} && semalign models pull {known.name}"
                raise SemalignError(f"{path} has changed since it was pulled: {again}")
            if note:
                note(f"{path.name} is converted into {cache_folder()}, once")
            _convert(path, folder)
    return folder


def place_of_gguf(path: Path, known: KnownModel | None) -> Path:
    """Return the folder in the cache for the model of a GGUF file, named by its content."""
    content = known.file.sha256 if known and known.file else sha256_of(path)
    return cache_folder() / f"{path.stem}-{content[:16]}"


@contextmanager
def made_by_one(folder: Path) -> Iterator[None]:
    """Let one process make a model of the cache while others wait; a finished one needs no lock."""
    with nullcontext() if (folder / "config.json").is_file() else lock_of(folder):
        yield


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        with redirect_stderr(io.StringIO()):  # of a bar that is drawn in pipes too
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
            )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise SemalignError(
            f"{path} cannot be read as a GGUF model, fetch it again or choose another file: {reason(error)}"
        ) from error
    _tie_like_upstream(model)
    if model.config.model_type.startswith("qwen2"):
        # Parts of the upstream tokenizer and generation settings that the file lacks.
        tokenizer.backend_tokenizer.normalizer = NFC()
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.config._name_or_path = path.stem
    with new_folder(folder) as temporary:
        save_model(model, tokenizer, temporary)


def _tie_like_upstream(model: "PreTrainedModel") -> None:
    """Tie embeddings and head again where the file holds one matrix twice; the head is quantised more finely."""
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(output, nn.Linear) and isinstance(inputs, nn.Embedding)
    head, embeddings = output.weight, inputs.weight
    if head is embeddings or head.shape != embeddings.shape:
        return
    sample = slice(0, None, max(1, len(head) // 4096))
    likeness = torch.cosine_similarity(head[sample].float(), embeddings[sample].float(), dim=1).mean()
    if likeness > 0.98:
        embeddings.data = head.data
        model.config.tie_word_embeddings = True
        model.tie_weights()
