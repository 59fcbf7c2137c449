"""Models from the hub, a folder, a GGUF file or the generator, checked before they are used."""

import hashlib
import importlib.util
import io
import os
import re
import shlex
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import platformdirs
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from semalign_attribution import DecoderView
from semalign_geometry import SemalignError, SharedVocabulary, align_vocabularies, new_folder, sha256_of
from tokenizers.normalizers import NFC
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from .estimate import ModelShape, catalogue, shape_of
from .experiment import ModelConfig
from .failures import naming, reason
from .generation import Way, check_generation
from .known_models import KnownModel, known_path
from .locking import lock_of
from .resources import bfloat16_is_fast
from .saving import save_model
from .tiny import Role, build_tiny_model, tiny_folder_name

GENERATED: dict[str, Role] = {f"generated:tiny-{role}": role for role in typing.get_args(Role)}
MERGE = "merge it into the weights with peft's merge_and_unload(), and give the merged model"
ADAPTER = re.compile(r"lora_|base_layer|modules_to_save|adapter|ia3_|oft_|vera_|hada_|lokr_")
BESIDE = re.compile(r"vision|visual|image|audio|speech|sound|talker|projector|^mm_|^mtp|nextn|v_head|value_head|medusa")
"""Names of modules that stand beside the language model."""
COMPUTED = {"inv_freq", "original_inv_freq", "masked_bias", "position_ids"}
"""Names of buffers that models of earlier versions kept in their checkpoints."""
ASKED_SECONDS = 5.0
"""How long the hub may take to say whether it has a model."""
FILLER = re.compile(r"\[PAD\d+\]")


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model before its weights are read: its configuration and its tokenizer."""

    settings: ModelConfig
    """What was asked for."""
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
    def shape(self) -> ModelShape:
        """Its sizes."""
        with naming(f"{self.settings.path} is no decoder-only causal language model"):
            try:
                return shape_of(self.config)
            except SemalignError as error:
                raise SemalignError(f"{self.settings.path}: {error}") from error

    @cached_property
    def entries(self) -> dict[str, int]:
        """The vocabulary of its tokenizer, without the fillers that GGUF files give to the padded rows of a head."""
        vocabulary = self.tokenizer.get_vocab()
        return {token: i for token, i in vocabulary.items() if not (token[:4] == "[PAD" and FILLER.fullmatch(token))}

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that the weights are loaded in.

        `auto` is the checkpoint's own, but float32 on a processor that multiplies bfloat16 the slower.
        """
        if self.settings.dtype != "auto":
            asked: torch.dtype = getattr(torch, self.settings.dtype)
            return asked
        own = self.config.dtype or torch.float32
        assert isinstance(own, torch.dtype)
        return own if device.type != "cpu" or bfloat16_is_fast() else torch.float32

    def precision(self, device: torch.device) -> str:
        """What its answers depend on besides its weights: the dtype, and whether they are kept in 4 bits."""
        name = str(self.dtype(device)).removeprefix("torch.")
        return f"{name}-4bit" if self.settings.load_in_4bit else name


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model, checked, with its tokenizer."""

    model: PreTrainedModel
    """The model, on its device, in the dtype that it computes in."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    folder: str
    """Hub id or folder that transformers loads it from."""
    unused: tuple[str, ...] = ()
    """Tensors of its checkpoint that are no part of the language model, such as those that read images."""
    way: Way | None = None
    """How it generates; None where that was not checked, and it must not."""


def cache_folder() -> Path:
    """Where generated and converted models are kept: $SEMALIGN_CACHE, else the user's cache folder."""
    return Path(os.environ.get("SEMALIGN_CACHE") or platformdirs.user_cache_dir("semalign"))


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
        progress: told of the steps done and of all steps while a generated model is built.
        note: told before a GGUF file is converted, which takes a while.

    Raises:
        SemalignError: nothing is found there, or it is no decoder-only causal language model.
    """
    place = _resolve(settings, progress, note)
    commit = None
    with _named(settings, place):
        if not Path(place).is_dir():
            file = cached_file(place, "config.json", revision=settings.revision)
            commit = extract_commit_hash(str(file), None)
            if commit is None:
                raise SemalignError(f"the hub does not tell which commit of {settings.path} it gave")
        config = AutoConfig.from_pretrained(place, revision=commit, trust_remote_code=False)
        _check_types(config, settings.path)
        kinds = config.architectures or []
        if kinds and not any(
            kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for kind in kinds
        ):
            raise SemalignError(f"{settings.path} is a {kinds[0]}, expected a decoder-only causal language model")
        tokenizer = AutoTokenizer.from_pretrained(place, revision=commit, trust_remote_code=False)
        tokenizer("a")  # which some damaged tokenizers fail in first
    text = config.get_text_config(decoder=True)
    return OpenedModel(settings, place, commit, text, tokenizer, _quantisation(config) or _quantisation(text))


def check_trainable(target: OpenedModel) -> None:
    """See that a target's weights can be trained and saved, by its configuration alone.

    Raises:
        SemalignError: they are stored quantised.
    """
    if target.quantised is not None:
        raise SemalignError(
            f"{target.settings.path} is stored quantised ({target.quantised}), and the target trains: choose its "
            "checkpoint in bfloat16 or float32, or save it dequantised first"
        )


def _quantisation(config: PreTrainedConfig) -> str | None:
    """The method of a configuration's `quantization_config`, which is a mapping or an object."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    return str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "an unnamed method")


def awaited(settings: ModelConfig) -> str | None:
    """Why a model cannot be opened without long work or a download, as the end of a sentence; None where it can be, or
    where that would fail."""
    if settings.path in GENERATED:
        made = cache_folder() / tiny_folder_name(GENERATED[settings.path]) / "config.json"
        return None if made.is_file() else "is generated on its first use"
    known, path = known_path(settings.path), Path(settings.path).expanduser()
    if known is not None:
        if not known.folder(cache_folder()).is_dir():
            return f"is not here yet (semalign models pull {known.name})"
        path = known.place(cache_folder())
    if path.suffix == ".gguf" and path.is_file():
        is_made = (_place_of_gguf(path, known) / "config.json").is_file()
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
    """Whether a path cannot be the id of a model on the hub."""
    return Path(path).suffix == ".gguf" or Path(path).is_absolute() or path[:1] in (".", "~") or path.count("/") > 1


def _check_types(config: PreTrainedConfig, path: str) -> None:
    """See that the parts of a configuration that are read here are what they should be: transformers checks the others.

    Raises:
        SemalignError: one is not.
    """
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
    """See to it that a model that is named by `catalogue:` is here, before anything that takes longer.

    Raises:
        SemalignError: it is unknown, or not pulled yet.
    """
    known = known_path(settings.path)
    if known is not None:
        known.pulled(cache_folder())


def identity(opened: OpenedModel) -> str:
    """What tells one model from any other: the hash of its files, or the commit of a hub model."""
    folder = Path(opened.place)
    if opened.commit is not None:
        return f"hub:{opened.place}@{opened.commit}"
    kinds = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
    files = [file for file in sorted(folder.iterdir()) if file.suffix in kinds]
    lines = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def load_model(
    source: OpenedModel | ModelConfig, *, device: torch.device | str = "cpu", generates: bool = False
) -> LoadedModel:
    """Load a model's weights, and check that it is a finite, causal, decoder-only language model.

    Args:
        source: where it comes from.
        device: where its weights go.
        generates: whether it will generate, which is then checked too.

    Raises:
        SemalignError: nothing is found there, it is an encoder, its weights are damaged, it could not be saved, or it
            shall generate and does not do so right.
    """
    opened = source if isinstance(source, OpenedModel) else open_model(source)
    settings = opened.settings
    in_4bit = settings.load_in_4bit or opened.quantised == "bitsandbytes"
    with _named(settings, opened.place):
        dtype = opened.dtype(torch.device(device))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            opened.place,
            revision=opened.commit,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **(_in_4bit(dtype) if settings.load_in_4bit else {}),
            **({"device_map": {"": torch.device(device)}} if in_4bit else {}),
        )
        model, loading = loaded  # a pair, which the type of from_pretrained does not say
    absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if absent:
        raise SemalignError(
            f"the checkpoint {settings.path} lacks {absent[0]}, or has it in another shape: fetch it again"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SemalignError(f"{settings.path} comes with an adapter: {MERGE}")
    unused = unused_tensors(model, loading["unexpected_keys"], settings.path)
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1 and not torch.isfinite(parameter).all():
            raise SemalignError(
                f"{settings.path} holds values that are not finite in {name}: fetch the checkpoint again"
            )
    _make_savable(model, settings.path)
    if in_4bit:  # which is there already, and cannot be moved
        _without_odd_packing(model)
    else:
        model.to(device)
    DecoderView(model).verify()
    way = check_generation(model) if generates else None
    return LoadedModel(model, opened.tokenizer, opened.place, unused, way)


def unused_tensors(model: PreTrainedModel, surplus: Iterable[str], path: str) -> tuple[str, ...]:
    """Find the tensors of a checkpoint that are no part of the language model.

    Buffers are computed again, and are left out. Towers for images and sound, predictors of several tokens and value
    heads stand beside the language model. Anything else, such as an adapter that was not merged, a bias, a norm or a
    layer more, would change what it computes.

    Args:
        model: the language model.
        surplus: names in the checkpoint that the model has no place for, without those that transformers ignores.
        path: the checkpoint, for the message.

    Raises:
        SemalignError: there is something else.
    """
    buffers = {name for name, _ in model.named_buffers()}
    buffers |= {name.removeprefix(f"{model.base_model_prefix}.") for name in buffers}
    modules = {name for name, _ in model.named_modules()}
    beside: list[str] = []
    odd: list[str] = []
    for name in sorted(surplus):
        parts = name.split(".")
        if name in buffers or parts[-1] in COMPUTED:
            continue
        inside = next((i for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in modules), 0)
        (beside if BESIDE.search(parts[inside]) or _predicts_more(model, parts) else odd).append(name)
    if odd:
        adapted = any(ADAPTER.search(name) for name in odd)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        remedy = MERGE if adapted else f"mend its config.json, which makes a model of {layers} layers without them"
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise SemalignError(
            f"the checkpoint {path} holds {len(odd)} tensors that its model has no place for "
            f"({', '.join(odd[:3])}{more}): {remedy}"
        )
    return tuple(beside)


def _predicts_more(model: PreTrainedModel, parts: list[str]) -> bool:
    """Whether a tensor is of a layer behind the last one that predicts further tokens (DeepSeek, GLM)."""
    config = model.config.get_text_config(decoder=True)
    first, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
    places = [int(part) for before, part in pairwise(parts) if before == "layers" and part.isdecimal()]
    return bool(places) and first <= places[0] < first + more


def _in_4bit(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained for linear layers in 4 bits.

    Raises:
        SemalignError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SemalignError('load_in_4bit needs bitsandbytes: pip install "semalign-harness[4bit]"')
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": quantisation}


def _without_odd_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing layers for processors with bfloat16 products where that fails: it packs their
    outputs in parts of 32."""
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for layer in layers:
        if layer.out_features % 32:
            layer.support_avx512bf16_for_cpu = False


def check_tokenizers(source: OpenedModel, target: OpenedModel, texts: list[str]) -> SharedVocabulary:
    """The vocabulary entries that both models share, when one tokenisation serves both.

    Raises:
        SemalignError: entries have different ids, or texts are encoded differently.
    """
    source_vocabulary, target_vocabulary = (opened.entries for opened in (source, target))
    shared = align_vocabularies(source_vocabulary, target_vocabulary)
    remedy = "choose a source and a target of one family, which share a tokenizer"
    if not shared.same_ids:
        token = next(t for t, i in source_vocabulary.items() if target_vocabulary.get(t, i) != i)
        raise SemalignError(
            f"the tokenizers differ: {token!r} is entry {source_vocabulary[token]} of the source and "
            f"{target_vocabulary[token]} of the target; {remedy}"
        )
    for text in texts:
        ours, theirs = (each.tokenizer(text, add_special_tokens=False)["input_ids"] for each in (source, target))
        if ours != theirs:
            raise SemalignError(f"the tokenizers split {text[:60]!r} differently; {remedy}")
    kept = shared.source_ids < min(source.config.vocab_size, target.config.vocab_size)
    return SharedVocabulary(
        shared.source_ids[kept], shared.target_ids[kept], shared.only_in_source, shared.only_in_target
    )


@contextmanager
def _named(settings: ModelConfig, place: str) -> Iterator[None]:
    """Any failure of transformers' loaders in one sentence."""
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


def _make_savable(model: PreTrainedModel, path: str) -> None:
    """See to it that the model can be saved later: transformers refuses contradictory generation settings only then."""
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True  # what settings of sampling, such as a temperature, ask for
        try:
            settings.validate(strict=True)
        except ValueError as error:
            raise SemalignError(
                f"{path} has generation settings that transformers refuses to save ({reason(error)}): mend its "
                "generation_config.json"
            ) from error


def _resolve(
    config: ModelConfig, progress: Callable[[int, int], None] | None, note: Callable[[str], None] | None
) -> str:
    """The folder or hub id that transformers can load; generated and GGUF models are made once and kept."""
    if config.path.startswith("generated:"):
        if config.path not in GENERATED:
            raise SemalignError(f"unknown generated model {config.path!r}: known are {', '.join(GENERATED)}")
        role = GENERATED[config.path]
        folder = cache_folder() / tiny_folder_name(role)
        with _made_by_one(folder):
            return str(build_tiny_model(role, folder, progress=progress))
    path = Path(config.path).expanduser()
    known = known_path(config.path)
    if known is not None:
        if config.revision is not None:
            raise SemalignError(f"{config.path} has a revision of its own: leave revision={config.revision} out")
        path = known.pulled(cache_folder())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SemalignError(f"{path} does not exist: give a .gguf file, a model folder or a hub id")
        return str(_converted(path, known, note))
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise SemalignError(f"{path} is or holds an adapter: {MERGE}")
        if not (path / "config.json").is_file():
            raise SemalignError(f"{path} holds no config.json: it is not the folder of a transformers model")
        return str(path)
    if _is_local(config.path):
        raise SemalignError(f"{config.path} does not exist: give a model folder, a .gguf file or a hub id")
    return config.path


def _converted(path: Path, known: KnownModel | None, note: Callable[[str], None] | None) -> Path:
    """The GGUF file as a folder of bfloat16 safetensors, converted once for each content; that of a known model was
    told when it was pulled."""
    pulled = known.file.sha256 if known and known.file else None
    folder = _place_of_gguf(path, known)
    with _made_by_one(folder):
        if not (folder / "config.json").is_file():
            if known and pulled and sha256_of(path) != pulled:
                again = f"rm -r {shlex.quote(str(path.parent))} && semalign models pull {known.name}"
                raise SemalignError(f"{path} has changed since it was pulled: {again}")
            if note:
                note(f"{path.name} is converted into {cache_folder()}, once")
            _convert(path, folder)
    return folder


def _place_of_gguf(path: Path, known: KnownModel | None) -> Path:
    """Where a GGUF file is converted to."""
    pulled = known.file.sha256 if known and known.file else None
    return cache_folder() / f"{path.stem}-{(pulled or sha256_of(path))[:16]}"


@contextmanager
def _made_by_one(folder: Path) -> Iterator[None]:
    """Other processes wait while one makes a model of the cache; a finished one needs no lock."""
    with nullcontext() if (folder / "config.json").is_file() else lock_of(folder):
        yield


def _convert(path: Path, folder: Path) -> None:
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
        raise SemalignError(f"{path} cannot be read as a GGUF model: {reason(error)}") from error
    _tie_like_upstream(model)
    if model.config.model_type.startswith("qwen2"):
        # What the upstream tokenizer and generation settings have and the file does not carry.
        tokenizer.backend_tokenizer.normalizer = NFC()
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.config._name_or_path = path.stem
    with new_folder(folder) as temporary:
        save_model(model, tokenizer, temporary)


def _tie_like_upstream(model: PreTrainedModel) -> None:
    """Tie embeddings and head again where the file holds one matrix twice; the head is quantised the finer."""
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
