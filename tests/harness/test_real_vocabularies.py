"""Prefix classes of two real tokenizers; SEMALIGN_REAL_MODELS names a folder with their GGUF files."""

import os
from time import process_time

import pytest
from semalign_geometry import Vocabulary, align_classes
from transformers import AutoTokenizer

FOLDER = os.environ.get("SEMALIGN_REAL_MODELS", "")
FILES = ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.real
@pytest.mark.skipif(not FOLDER, reason="SEMALIGN_REAL_MODELS is not set")
def test_qwen_and_smollm_share_classes() -> None:
    tokenizers = [AutoTokenizer.from_pretrained(FOLDER, gguf_file=file) for file in FILES]
    start = process_time()
    source, target = (Vocabulary.of(tokenizer) for tokenizer in tokenizers)
    classes = align_classes(source, target)
    assert process_time() - start < 30
    assert (len(classes.shared), classes.count, classes.names[-2:]) == (39_234, 39_236, ("end", "rest"))
    rest = (classes.source == classes.count - 1).nonzero()[:, 0].tolist()
    assert len([i for i in rest if source.entries[i] is not None]) == 21
    assert all(target.entries[i] is None for i in (classes.target == classes.count - 1).nonzero()[:, 0].tolist())
