"""Models from the hub, a folder, a GGUF file or the generator, checked before they are used."""

import hashlib
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from semalign_attribution import DecoderView
from semalign_geometry import SharedVocabulary, align_vocabularies
from semalign_geometry.base import SemalignError, sha256_of
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash

from ..util.cache import cache_folder
from ..util.failures import naming
from ..util.resources import bfloat16_is_fast, one_thread
from .catalogue import catalogue, known_path
from .gguf import FILLER, converted, made_by_one, place_of_gguf
from .settings import ModelConfig
from .shape import ModelShape, empty_view, shape_of_view
from .tiny import Role, build_tiny_model, tiny_folder_name

GENERATED: dict[str, Role] = {f"generated:tiny-{role}": role for role in typing.get_args(Role)}
MERGE = "merge it into the weights with peft's merge_and_unload(), and give the merged model"
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "merges.txt")
"""Names of files of which a folder with a tokenizer has at least one."""
ASKED_SECONDS = 5.0
"""Longest wait for the hub's answer whether it has a model."""


class MissingModel(SemalignError):
    """Nothing is found at the path of a model."""


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model before its weights are read: its configuration and its tokenizer."""

    settings: ModelConfig
    """Settings that name it."""
    place: str
    """Hub id or folder that transformers loads it from."""
    commit: str | None
    """Commit of a hub model, which every file is read at; None for a local one."""
    config: PreTrainedConfig
    """Its architecture, the text part of a model that reads images too."""
    tokenizer: PreTrainedTokenizerBase
    quantised: str | None = None
    """Method by which its checkpoint is stored quantised, such as `bitsandbytes`; None where it is whole."""

    @property
    def positions(self) -> int | None:
        """Longest input in tokens; None when the architecture sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def view(self) -> DecoderView:
        """Its parts, built without memory for the weights.

        Raises:
            SemalignError: it is no decoder-only causal language model.
        """
        with self._named():
            return empty_view(self.config)

    @cached_property
    def shape(self) -> ModelShape:
        """Its sizes; fails as `view` does."""
        view = self.view
        with self._named():
            return shape_of_view(view, self.config)

    @cached_property
    def entries(self) -> dict[str, int]:
        """Vocabulary of its tokenizer, without the fillers that GGUF files give to the padded rows of a head."""
        vocabulary = self.tokenizer.get_vocab()
        return {token: i for token, i in vocabulary.items() if not (token[:4] == "[PAD" and FILLER.fullmatch(token))}

    @contextmanager
    def _named(self) -> Iterator[None]:
        with naming(f"{self.settings.path} is no decoder-only causal language model"):
            try:
                yield
            except SemalignError as error:
                raise SemalignError(f"{self.settings.path}: {error}") from error

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype that the weights are loaded in.

        `auto` is the checkpoint's own, but float32 on a processor that multiplies bfloat16 more slowly.
        """
        if self.settings.dtype != "auto":
            asked: torch.dtype = getattr(torch, self.settings.dtype)
            return asked
        own = self.config.dtype or torch.float32
        assert isinstance(own, torch.dtype)
        return own if device.type != "cpu" or bfloat16_is_fast() else torch.float32

    def precision(self, device: torch.device) -> str:
        """Return the dtype of its weights, and whether they are kept in 4 bits: its answers depend on both."""
        name = str(self.dtype(device)).removeprefix("torch.")
        return f"{name}-4bit" if self.settings.load_in_4bit else name


def open_model(
    settings: ModelConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> OpenedModel:
    """Read the configuration and the tokenizer of a model, without its weights.

    A generated or GGUF model is built or converted on its first use, and kept in `cache_folder()`.

    Args:
        settings: where it comes from.
        progress: called with the steps done and all steps while a generated model is built.
        note: called before a model is generated or a GGUF file is converted, which takes a while.

    Raises:
        MissingModel: nothing is found there.
        SemalignError: it is no decoder-only causal language model.
    """
    place = _resolve(settings, progress, note)
    commit = None
    if not Path(place).is_dir():
        commit = _commit(settings, place)
    with loading_errors(settings, place):
        config = AutoConfig.from_pretrained(place, revision=commit, trust_remote_code=False)
        _check_types(config, settings.path)
        kinds = config.architectures or []
        if kinds and not any(
            kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for kind in kinds
        ):
            raise SemalignError(f"{settings.path} is a {kinds[0]}, expected a decoder-only causal language model")
        if Path(place).is_dir() and not any(any(Path(place).glob(name)) for name in TOKENIZER_FILES):
            raise SemalignError(
                f"{settings.path} holds no tokenizer: add its files to the folder, such as tokenizer.json"
            )
        tokenizer = AutoTokenizer.from_pretrained(place, revision=commit, trust_remote_code=False)
        tokenizer("a")  # which some damaged tokenizers fail in first
    text = config.get_text_config(decoder=True)
    return OpenedModel(settings, place, commit, text, tokenizer, _quantisation(config) or _quantisation(text))


def prepare(
    settings: ModelConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Build a generated model or convert a GGUF file on its first use, as `open_model` would; others stay untouched."""
    _resolve(settings, progress, note)


def _commit(settings: ModelConfig, place: str) -> str:
    """Fetch the configuration of a hub model, and return the commit that it came from."""
    try:
        with loading_errors(settings, place):
            commit = extract_commit_hash(str(cached_file(place, "config.json", revision=settings.revision)), None)
    except SemalignError as error:
        raise MissingModel(str(error)) from error
    if commit is None:
        raise SemalignError(f"the hub does not name the commit of {settings.path} that it returned")
    return commit


def _quantisation(config: PreTrainedConfig) -> str | None:
    """Return the method of a configuration's `quantization_config`, which is a mapping or an object."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    return str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "an unnamed method")


def awaited(settings: ModelConfig) -> str | None:
    """Return why a model cannot be opened without long work or a download, as the end of a sentence.

    None where it can be opened, or where opening fails.
    """
    if settings.path in GENERATED:
        made = cache_folder() / tiny_folder_name(GENERATED[settings.path]) / "config.json"
        return None if made.is_file() else "is generated on its first use"
    known, path = known_path(settings.path), Path(settings.path).expanduser()
    if known is not None:
        if not known.folder(cache_folder()).is_dir():
            return f"is not here yet (semalign models pull {known.name})"
        path = known.place(cache_folder())
    if path.suffix == ".gguf" and path.is_file():
        is_made = (place_of_gguf(path, known) / "config.json").is_file()
        return None if is_made else "is converted on its first use"
    if path.exists() or _is_local(settings.path) or ":" in settings.path:
        return None
    if isinstance(try_to_load_from_cache(settings.path, "config.json", revision=settings.revision), str):
        return None
    if settings.path not in catalogue():
        try:
            HfApi().model_info(settings.path, revision=settings.revision, timeout=ASKED_SECONDS)
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        except Exception:  # the hub client has no common base class of errors
            return "is not here, and the hub cannot be reached"
    return "comes from the hub"


def _is_local(path: str) -> bool:
    """Return whether a path cannot be the id of a model on the hub."""
    return Path(path).suffix == ".gguf" or Path(path).is_absolute() or path[:1] in (".", "~") or path.count("/") > 1


def _check_types(config: PreTrainedConfig, path: str) -> None:
    """Check the types of the parts of a configuration that are read here; transformers checks the others."""
    kinds, text = config.architectures, config.get_text_config(decoder=True)
    if not isinstance(text, PreTrainedConfig):
        wrong = f"its text configuration is {str(text)[:60]!r}"
    elif not (kinds is None or isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        wrong = f"architectures is {str(kinds)[:60]}, expected a list of names"
    elif not (text.dtype is None or isinstance(text.dtype, torch.dtype) and text.dtype.is_floating_point):
        wrong = f"dtype is {str(text.dtype)[:60]}, expected one such as bfloat16"
    elif getattr(text, "num_hidden_layers", None) == 0:
        wrong = "it has no layers"
    else:
        return
    raise SemalignError(f"the config.json of {path} is damaged ({wrong}): fetch it again, or mend it")


def check_pulled(settings: ModelConfig) -> None:
    """Check that a model that is named by `catalogue:` is here, before anything that takes longer.

    Raises:
        SemalignError: it is unknown, or not pulled yet.
    """
    known = known_path(settings.path)
    if known is not None:
        known.pulled(cache_folder())


def identity(opened: OpenedModel) -> str:
    """Return the fingerprint of a model: the hash of its files, or the commit of a hub model."""
    folder = Path(opened.place)
    if opened.commit is not None:
        return f"hub:{opened.place}@{opened.commit}"
    kinds = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
    files = [file for file in sorted(folder.iterdir()) if file.suffix in kinds]
    lines = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_tokenizers(source: OpenedModel, target: OpenedModel, texts: list[str]) -> SharedVocabulary:
    """Return the vocabulary entries that both models share, where one tokenisation serves both.

    Raises:
        SemalignError: entries have different ids, or texts are encoded differently.
    """
    ours, theirs = source.entries, target.entries
    shared = align_vocabularies(ours, theirs)
    remedy = "choose a source and a target of one family, which share a tokenizer"
    if not shared.same_ids:
        moved = sorted((i, token) for token, i in ours.items() if theirs.get(token, i) != i)
        shown = ", ".join(f"{token!r} is {i} in the source and {theirs[token]} in the target" for i, token in moved[:3])
        raise SemalignError(
            f"the tokenizers differ: {len(moved)} of {len(shared)} shared entries have other ids ({shown}): {remedy}"
        )
    for text in texts:
        if split_differently(source, target, text):
            raise SemalignError(f"the tokenizers split {text[:60]!r} differently: {remedy}")
    kept = shared.source_ids < min(source.config.vocab_size, target.config.vocab_size)
    return SharedVocabulary(
        shared.source_ids[kept], shared.target_ids[kept], shared.only_in_source, shared.only_in_target
    )


def ids_differ(source: OpenedModel, target: OpenedModel) -> bool:
    """Return whether entries of two tokenizers have other ids, or none is shared."""
    ours, theirs = source.entries, target.entries
    shared = ours.keys() & theirs.keys()
    return not shared or any(ours[token] != theirs[token] for token in shared)


def split_differently(source: OpenedModel, target: OpenedModel, text: str) -> bool:
    """Return whether two tokenizers encode a text to other ids."""
    ours, theirs = (each.tokenizer(text, add_special_tokens=False)["input_ids"] for each in (source, target))
    return bool(ours != theirs)


@contextmanager
def loading_errors(settings: ModelConfig, place: str) -> Iterator[None]:
    """Turn any failure of transformers' loaders into one sentence."""
    where = "" if Path(place).exists() else "is no local folder or .gguf file, and "
    with naming(f"{settings.path!r} {where}could not be loaded as a language model"):
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            if "trust_remote_code" in str(error):
                raise SemalignError(
                    f"{settings.path!r} needs Python code that comes with it, which is never run here: choose a model "
                    "that transformers knows by itself"
                ) from error
            raise


def _resolve(
    config: ModelConfig, progress: Callable[[int, int], None] | None, note: Callable[[str], None] | None
) -> str:
    """Return the folder or hub id that transformers loads; make a generated or GGUF model on its first use."""
    if config.path.startswith("generated:"):
        if config.path not in GENERATED:
            raise MissingModel(f"unknown generated model {config.path!r}: known are {', '.join(GENERATED)}")
        role = GENERATED[config.path]
        folder = cache_folder() / tiny_folder_name(role)
        if note is None or folder.is_dir():
            note = _unnoted
        note(f"pre-training {config.path.removeprefix('generated:')}, a generated model, once; kept in {folder}")
        with made_by_one(folder), one_thread(note):
            return str(build_tiny_model(role, folder, progress=progress))
    path, known = Path(config.path).expanduser(), known_path(config.path)
    if known is not None:
        if config.revision is not None:
            raise MissingModel(f"{config.path} has a revision of its own: leave revision={config.revision} out")
        path = known.pulled(cache_folder())
    if path.suffix == ".gguf" and path.is_file():
        return str(converted(path, known, note))
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise SemalignError(f"{path} is or holds an adapter: {MERGE}")
        if not (path / "config.json").is_file():
            raise MissingModel(f"{path} holds no config.json: it is not the folder of a transformers model")
        return str(path)
    if _is_local(config.path):
        raise MissingModel(f"{config.path} does not exist: give a model folder, a .gguf file or a hub id")
    return config.path


def _unnoted(text: str) -> None:
    """Show nothing."""
