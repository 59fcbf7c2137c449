"""Classes of two vocabularies as tensors of a file, and back."""

from collections.abc import Mapping

import torch
from semalign_geometry import SharedVocabulary, VocabularyClasses
from torch import Tensor


def class_tensors(classes: VocabularyClasses) -> dict[str, Tensor]:
    """Tensors that hold the classes; names of classes are their bytes, end to end."""
    names = [name.encode() if isinstance(name, str) else name for name in classes.names]
    shared = classes.shared
    return {
        "source_classes": classes.source.to("cpu", torch.int32),
        "target_classes": classes.target.to("cpu", torch.int32),
        "source_ids": shared.source_ids.to("cpu", torch.int32),
        "target_ids": shared.target_ids.to("cpu", torch.int32),
        "unshared": torch.tensor((shared.only_in_source, shared.only_in_target), dtype=torch.int32),
        "names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        "name_lengths": torch.tensor([len(name) for name in names], dtype=torch.int32),
    }


def classes_of(tensors: Mapping[str, Tensor]) -> VocabularyClasses:
    """Undo `class_tensors`; the classes after those of the shared entries have names that are text."""
    source, target, source_ids, target_ids = (
        tensors[name].long() for name in ("source_classes", "target_classes", "source_ids", "target_ids")
    )
    only_in_source, only_in_target = tensors["unshared"].tolist()
    text, names, start = bytes(tensors["names"].tolist()), list[bytes | str](), 0
    for length in tensors["name_lengths"].tolist():
        name = text[start : start + length]
        names.append(name if len(names) < len(source_ids) else name.decode())
        start += length
    shared = SharedVocabulary(source_ids, target_ids, only_in_source, only_in_target)
    return VocabularyClasses(source, target, shared, tuple(names))
