"""Checks one family through the public path of the harness, against plain computations by transformers."""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from semalign_align import FinalHidden, SupervisionSettings, supervise
from semalign_attribution import DecoderView, LayerPairing, undisturbed
from semalign_geometry import Transport
from semalign_geometry.base import SemalignError
from semalign_harness import LoadedModel, build_tokenizer, load_model
from semalign_harness.generation import check_generation, generate
from semalign_harness.models.opening import OpenedModel, open_model
from semalign_harness.models.settings import ModelConfig
from semalign_harness.models.shape import row_bytes
from semalign_harness.run.measure import measure
from semalign_harness.run.pipeline import save_and_reload
from tiny_families import WINDOW, build, perturb
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

ROWS = ((3 * WINDOW, WINDOW), (WINDOW, 3), (2 * WINDOW, WINDOW + 1))
"""Tokens of each row, and of its prompt; two are longer than a window."""
RIGHT = "✓"
NOT_BUILT, REFUSED = "not built", "refused"


class Wrong(Exception):
    """The harness computes something else than transformers."""


def quiet() -> None:
    """Compute on one thread, for the same figures everywhere, and print nothing from now on."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def check_family(family: str) -> dict[str, str]:
    """Check one family.

    Returns:
        By check a tick, or what happened; `not built` or `refused` alone where no check was reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / family
        try:
            build(family, place)
        except Exception as error:  # of transformers, for want of a package or of fields
            return {NOT_BUILT: _sentence(f"{type(error).__name__}: {error}", place)}
        try:
            opened = open_model(ModelConfig(path=str(place)))
            check_sizes(opened)
            loaded, changed = load_model(opened), load_model(opened)
        except SemalignError as error:
            return {REFUSED: _sentence(error, place)}
        except Exception as error:  # which a user would see as a traceback
            return {REFUSED: _sentence(f"TRACEBACK {type(error).__name__}: {error}", place)}
        perturb(changed.model, scale=0.02, seed=1)
        checks: dict[str, Callable[[], str]] = {
            "NLL, KL": lambda: check_figures(loaded.model, changed.model, place.parent / "store"),
            "replay": lambda: check_replay(loaded.model),
            "reload": lambda: check_reload(changed, place.parent / "reloaded"),
            "generation": lambda: check_texts(loaded.model),
        }
        return {name: _outcome(check, place) for name, check in checks.items()}


def check_sizes(opened: OpenedModel) -> None:
    """See that a run can tell what the model needs, and an evaluation how many rows go together."""
    assert opened.shape.parameters > 0 and row_bytes(opened.config, 1, all_logits=True) > 0


def check_figures(source: PreTrainedModel, target: PreTrainedModel, folder: Path) -> str:
    """NLL and KL of `measure`, on padded rows, equal transformers' own loss and a plain divergence of rows alone."""
    view, depth = DecoderView(target), DecoderView(source).depth
    pairing = LayerPairing(policy="manual", source_depth=depth, source_layers=tuple(range(1, depth + 1)))
    settings = SupervisionSettings(output=FinalHidden(), dtype="float32")
    store = supervise(source, [_batch()], pairing, Transport.identity(view.width), folder, settings=settings)
    found = measure(view, store, batch_size=len(ROWS)).metrics
    nll, kl, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for ids, prompt in _rows():
            labels = torch.cat([torch.full((prompt,), -100), ids[prompt:]])[None]
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "use_cache": False}
            output, own = target(**inputs, labels=labels), source(**inputs)
            count = len(ids) - prompt
            nll += float(output.loss) * count
            ours, theirs = (logits[0, prompt - 1 : -1].log_softmax(-1) for logits in (output.logits, own.logits))
            kl += float(kl_div(ours, theirs, reduction="sum", log_target=True))
            tokens += count
    _same("NLL", found.answer_nll, nll / tokens)
    _same("KL", found.kl, kl / tokens)
    return RIGHT


def check_replay(model: PreTrainedModel) -> str:
    """A run from a middle layer ends as the whole run does, and that layer gets a gradient when it is trained."""
    view, batch = DecoderView(model), _batch()
    middle = view.depth // 2 + 1
    with torch.no_grad():
        whole = view.trace(batch, keep=[middle])
        replayed = view.trace(batch, start=middle, hidden=whole.inputs[middle])
    assert whole.final is not None and replayed.final is not None
    real = batch["attention_mask"].bool()
    if not torch.allclose(whole.final[real], replayed.final[real], atol=1e-4, rtol=1e-4):
        raise Wrong("a replayed run differs from the whole one")
    with undisturbed(model):
        view.layer(middle).requires_grad_(True)
        trained = view.trace(batch, start=middle, hidden=whole.inputs[middle], stop=middle, keep=[middle])
        torch.autograd.backward(trained.outputs[middle][real].square().mean())
    if not any(part.grad is not None and bool(part.grad.any()) for part in view.layer(middle).parameters()):
        raise Wrong("no gradient reaches the layer of a stage")
    model.zero_grad()
    return RIGHT


def check_reload(trained: LoadedModel, folder: Path) -> str:
    """A model that has changed computes the same after it was saved and loaded."""
    save_and_reload(trained, folder)
    return RIGHT


def check_texts(model: PreTrainedModel) -> str:
    """Each token of rows that end apart is the likeliest one by a run of its row alone without a cache."""
    way = check_generation(model)
    prompts = [ids[:prompt].tolist() for ids, prompt in _rows()]
    (first,) = generate(model, prompts[:1], max_new_tokens=3, ends=frozenset(), way=way)
    found = generate(model, prompts, max_new_tokens=12, ends=frozenset(first[-1:]), way=way)
    for prompt, row in zip(prompts, found, strict=True):
        for place, token in enumerate(row):
            ids = torch.tensor([[*prompt, *row[:place]]])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
            if float(logits.max() - logits[token]) > 1e-3 * float(logits.std()):
                raise Wrong(f"token {place + 1} of an answer is not the likeliest one")
    return f"{RIGHT} {way.value}"


def _rows() -> list[tuple[Tensor, int]]:
    """Token ids of each row, and the length of its prompt."""
    generator = torch.Generator().manual_seed(0)
    tokens = len(build_tokenizer())
    special = len(build_tokenizer().all_special_ids)
    return [(torch.randint(special, tokens, (length,), generator=generator), prompt) for length, prompt in ROWS]


def _batch() -> dict[str, Tensor]:
    """The rows, padded on the right."""
    rows, longest = _rows(), max(length for length, _ in ROWS)

    def padded(parts: Sequence[Tensor], value: int) -> Tensor:
        return torch.stack([torch.cat([part, torch.full((longest - len(part),), value)]) for part in parts])

    return {
        "input_ids": padded([ids for ids, _ in rows], 0),
        "attention_mask": padded([torch.ones_like(ids) for ids, _ in rows], 0),
        "labels": padded([torch.cat([torch.full((prompt,), -100), ids[prompt:]]) for ids, prompt in rows], -100),
    }


def _same(name: str, ours: float, theirs: float) -> None:
    if not abs(ours - theirs) <= 1e-3 * abs(theirs):
        raise Wrong(f"{name} is {ours:.4g}, and {theirs:.4g} by transformers")


def _outcome(check: Callable[[], str], place: Path) -> str:
    try:
        return check()
    except Wrong as error:
        return f"WRONG {_sentence(error, place)}"
    except SemalignError as error:
        return _sentence(error, place)
    except Exception as error:
        return f"TRACEBACK {_sentence(f'{type(error).__name__}: {error}', place)}"


def _sentence(said: object, place: Path) -> str:
    """A message on one line, which does not name the temporary folder."""
    return " ".join(str(said).replace(str(place), place.name).split())[:400]
