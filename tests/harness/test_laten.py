"""LaTen: attribution against streams edited by hand, injection against fused weights, and what a run changes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_attribution import DecoderView
from semalign_geometry.base import SemalignError
from semalign_harness.data.arithmetic import arithmetic_rows
from semalign_harness.data.encoding import Example
from semalign_harness.data.rows import batches, encode_rows
from semalign_harness.methods import Method, MethodContext, MethodReport
from semalign_harness.methods._laten import LaTen
from semalign_harness.methods.baselines import neurons
from semalign_harness.methods.baselines.laten import _hypernetworks
from semalign_harness.methods.baselines.neurons import Lens, Located, locate, observe, parts_of, places, until_last_word
from semalign_harness.models.tiny import build_tokenizer
from semalign_train import TrainSettings
from torch import Tensor
from torch.testing import assert_close

from ..devices import elsewhere, usable
from ..models import tiny_model
from . import contexts

VOCABULARY = 320
TOKENIZER = build_tokenizer()
seeds = st.integers(0, 2**32 - 1)
llama_family = st.sampled_from(["llama", "smollm", "qwen2", "qwen3"])
each_architecture = pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])


def model_of(architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    return tiny_model(architecture, seed=seed, vocabulary=VOCABULARY, dtype=dtype, **more)


def rows_of(count: int, seed: int = 0) -> list[Example]:
    rows: Any = arithmetic_rows(count, seed=seed, split="train")
    return encode_rows(rows, TOKENIZER)


def cut_rows(count: int, seed: int = 0) -> list[Example]:
    return [until_last_word(row, TOKENIZER) for row in rows_of(count, seed)]


class ByHand:
    """One row through a model of the Llama family, its attention written out from the weights of eager attention."""

    def __init__(self, model: Any, example: Example) -> None:
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        self.model, self.token = model, int(ids[0, -1])
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            found = eager(ids[:, :-1], output_hidden_states=True, output_attentions=True, use_cache=False)
            stopped: list[Tensor] = []
            with eager.model.norm.register_forward_pre_hook(lambda module, args: stopped.append(args[0])):
                eager(ids[:, :-1], use_cache=False)
        self.states = [*found.hidden_states[:-1], stopped[0]]
        self.weights = found.attentions

    def f(self, stream: Tensor) -> Tensor:
        normed = self.model.model.norm(stream)
        found: Tensor = self.model.lm_head(normed).log_softmax(-1)[self.token]
        return found

    def heads(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, what o_proj gives, and the factors on its columns."""
        layer, states = self.model.model.layers[number - 1], self.states[number - 1][0]
        attention, weights = layer.self_attn, self.weights[number - 1][0]
        values = attention.v_proj(layer.input_layernorm(states)).unflatten(-1, (-1, attention.head_dim))
        values = values.repeat_interleave(attention.num_key_value_groups, 1)
        summed = torch.einsum("hs,shd->hd", weights[:, -1], values).flatten()
        return states[-1], attention.o_proj(summed), summed

    def network(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """r, what down_proj gives, and the factors on its columns."""
        layer = self.model.model.layers[number - 1]
        before, attention, _ = self.heads(number)
        normed = layer.post_attention_layernorm(before + attention)
        factors = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
        return before + attention, layer.mlp.down_proj(factors), factors

    def layer_score(self, part: Callable[[int], tuple[Tensor, Tensor, Tensor]], number: int) -> float:
        before, more, _ = part(number)
        return float(self.f(before + more) - self.f(before))

    def neuron_scores(
        self, part: Callable[[int], tuple[Tensor, Tensor, Tensor]], number: int, weight: Tensor
    ) -> Tensor:
        before, _, factors = part(number)
        moved = [before + factor * weight[:, neuron] for neuron, factor in enumerate(factors)]
        return torch.stack([self.f(stream) - self.f(before) for stream in moved])


def located_in(model: Any, examples: list[Example], **counts: int) -> Located:
    numbers = {"layers": 3, "feed_forward": 5, "attention": 4} | counts
    return locate(DecoderView(model), batches(examples, 2), **numbers)


@settings(max_examples=8)
@given(llama_family, seeds, st.integers(1, 40))
@torch.no_grad()
def test_scores_are_those_of_streams_edited_by_hand(architecture: str, seed: int, chunk: int) -> None:
    model, examples = model_of(architecture, seed=seed, depth=2), cut_rows(3, seed)
    view = DecoderView(model)
    streams = observe(view, parts_of(view), batches(examples, 2))
    lens = Lens.of(view, streams)
    by_hand = [ByHand(model, example) for example in sorted(examples, key=len)]
    for number, (layer, part) in enumerate(zip(streams.layers, parts_of(view), strict=True), 1):
        middle = layer.before + layer.attention
        with mock.patch.object(neurons, "CHUNK", chunk):
            networks = lens.increases(middle, layer.activations, part.down_proj.weight.T)
            heads = lens.increases(layer.before, layer.values, part.o_proj.weight.T)
        for found, which, weight in (
            (networks, "network", part.down_proj.weight),
            (heads, "heads", part.o_proj.weight),
        ):
            expected = [each.neuron_scores(getattr(each, which), number, weight) for each in by_hand]
            assert_close(found, torch.stack(expected).mean(0), rtol=1e-4, atol=2e-6)  # the final norm runs in float32
        for base, more, which in (
            (layer.before, layer.attention, "heads"),
            (middle, layer.feed_forward, "network"),
        ):
            wanted = [each.layer_score(getattr(each, which), number) for each in by_hand]
            assert_close(
                (lens(base + more) - lens(base)).tolist(), wanted, rtol=1e-4, atol=2e-6
            )  # the final norm runs in float32


@settings(max_examples=10)
@given(llama_family, seeds)
@torch.no_grad()
def test_what_the_neurons_of_a_layer_add_sums_to_what_the_layer_adds(architecture: str, seed: int) -> None:
    view = DecoderView(model_of(architecture, seed=seed))
    streams = observe(view, parts_of(view), batches(cut_rows(3, seed), 2))
    for layer, part in zip(streams.layers, parts_of(view), strict=True):
        for factors, module, whole in (
            (layer.values, part.o_proj, layer.attention),
            (layer.activations, part.down_proj, layer.feed_forward),
        ):
            each = factors[:, :, None] * module.weight.T
            assert_close(each.sum(1) + (0 if module.bias is None else module.bias), whole)


@torch.no_grad()
def test_the_best_neurons_of_the_best_layers_in_order() -> None:
    model, examples = model_of(seed=5, depth=4), cut_rows(3)
    by_hand = [ByHand(model, example) for example in examples]
    located = located_in(model, examples, layers=2)
    for found, which, count in ((located.feed_forward, "network", 5), (located.attention, "heads", 4)):
        scores = [sum(each.layer_score(getattr(each, which), n) for each in by_hand) for n in range(1, 5)]
        assert list(found) == sorted(sorted(range(1, 5), key=lambda n: -scores[n - 1])[:2])
        for number, best in found.items():
            part = parts_of(DecoderView(model))[number - 1]
            weight = part.down_proj.weight if which == "network" else part.o_proj.weight
            ranked = sum(each.neuron_scores(getattr(each, which), number, weight) for each in by_hand)
            assert isinstance(ranked, Tensor)
            assert best.tolist() == ranked.argsort(descending=True)[:count].tolist()


@each_architecture
@torch.no_grad()
def test_heads_read_the_value_rows_that_are_named(architecture: str) -> None:
    """Attention weights sum to 1, so values that say which row they are come out of attention as they went in."""
    model = model_of(architecture)
    view = DecoderView(model)
    part = parts_of(view)[0]
    columns, rows = part.o_proj.in_features, part.v_proj.out_features
    seen: list[Tensor] = []
    with (
        part.v_proj.register_forward_hook(lambda module, args, out: torch.arange(rows).to(out).expand_as(out)),
        part.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ):
        view.trace(batches(rows_of(1), 1)[0])
    assert rows < columns
    everything = Located({}, {1: torch.arange(columns)})
    assert_close(seen[0][0, -1], places(view, everything)["v_proj"][0].index.double())


@settings(max_examples=4)
@given(llama_family, seeds)
@torch.no_grad()
def test_injected_neurons_compute_what_fused_ones_do(architecture: str, seed: int) -> None:
    model, rows = model_of(architecture, seed=seed), rows_of(2, seed)
    view, batch = DecoderView(model), batches(rows, 2)[0]
    onto = places(view, located_in(model, cut_rows(2, seed), attention=30))
    before = view.trace(batch).final
    assert before is not None
    generator = torch.Generator().manual_seed(seed)
    for kind, found in onto.items():
        for place in found:
            more = 0.1 * torch.randn(len(place.index), view.width, generator=generator, dtype=torch.float64)
            with place.added(torch.zeros_like(more)):
                assert_close(view.trace(batch).final, before, rtol=0, atol=0)
            with place.added(more):
                injected = view.trace(batch).final
            assert_close(view.trace(batch).final, before, rtol=0, atol=0)
            read = place.read()
            place.fuse(more)
            before = view.trace(batch).final
            assert before is not None
            assert_close(before, injected)
            if kind != "v_proj":  # whose rows may be shared
                assert_close(place.read(), read + more)


def context_of(folder: Path, source: Any, target: Any, **train: Any) -> MethodContext:
    return contexts.context_of(
        folder, target, lambda: source, rows_of(16), TOKENIZER, **{"micro_batch_size": 5} | train
    )


def pair_of(dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    return model_of(seed=4, depth=4, width=40, dtype=dtype), model_of(seed=3, depth=3, width=24, dtype=dtype)


def parameters_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses_in(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["losses"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_paper_changes_the_located_rows_and_columns_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    source, target = pair_of(dtype)
    before = copy.deepcopy(target)
    # Large enough for the rounding of bfloat16, far too large for anything else.
    method = LaTen(start=0.3) if dtype == torch.bfloat16 else LaTen(start=0.01)
    method.run(context_of(tmp_path, source, target))
    onto = places(DecoderView(before), located_in(before, cut_rows(3), feed_forward=3, attention=2))
    named = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in before.named_parameters()}
    names = {id(parameter): name for name, parameter in before.named_parameters()}
    for found in onto.values():
        assert len(found) == 3
        for place in found:
            named[names[id(place.module.weight)]].index_fill_(place.axis, place.index, True)
    for (name, new), old in zip(target.named_parameters(), before.parameters(), strict=True):
        changed = new != old
        assert not (changed & ~named[name]).any(), name
        if dtype == torch.bfloat16:
            assert changed.any() == named[name].any(), name
        else:
            assert_close(changed, named[name])


def test_the_report_counts_the_hypernetworks_and_the_tokens(tmp_path: Path) -> None:
    report = LaTen().run(context_of(tmp_path, *pair_of(torch.float32)))
    assert report.steps == len(losses_in(tmp_path)) == LaTen().work(TrainSettings(), 3, 16).steps == 4
    assert report.trained_parameters == 4 * (40 * 40 + 40 * 24)
    assert report.supervised_tokens == 4 * sum(len(row.answer_ids) for row in rows_of(16))
    assert report.seconds > 0
    assert MethodReport.model_validate_json(report.model_dump_json()).steps == 4


def test_hypernetworks_of_zeros_change_nothing(tmp_path: Path) -> None:
    source, target = pair_of(torch.float32)
    before = parameters_of(target)
    LaTen(start=0.0).run(context_of(tmp_path, source, target))
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, before[name])
    assert all(losses["penalty"] == 0 for losses in losses_in(tmp_path))


@pytest.mark.parametrize("fails", [False, True])
def test_the_source_is_untouched_and_the_target_gets_its_modes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    source, target = pair_of(torch.float32)
    before = parameters_of(source)
    for model in (source, target):
        model.train()
        model.model.norm.eval()
        model.lm_head.requires_grad_(False)
    if fails:
        monkeypatch.setattr(Lens, "increases", mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            LaTen().run(context_of(tmp_path, source, target))
    else:
        LaTen().run(context_of(tmp_path, source, target))
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, before[name])
    for model in (source, target):
        assert all(module.training == (module is not model.model.norm) for module in model.modules())
        assert all(p.requires_grad == (p is not model.lm_head.weight) for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_the_jth_neuron_of_the_source_is_added_onto_the_jth_of_the_target(tmp_path: Path) -> None:
    source, target = pair_of()
    before, examples = copy.deepcopy(target), cut_rows(3)
    with mock.patch("torch.optim.AdamW.step"):  # so that the start is what is fused
        LaTen(start=0.3, steps=1).run(context_of(tmp_path, source, target))
    ours, theirs = (located_in(model, examples, feed_forward=3, attention=2) for model in (before, source))

    def weights(model: Any, number: int) -> dict[str, Tensor]:
        layer = model.model.layers[number - 1]
        return {
            "up_proj": layer.mlp.up_proj.weight,
            "down_proj": layer.mlp.down_proj.weight.T,
            "v_proj": layer.self_attn.v_proj.weight.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1),
            "o_proj": layer.self_attn.o_proj.weight.T,
        }

    for kinds, here, there in (
        (("up_proj", "down_proj"), ours.feed_forward, theirs.feed_forward),
        (("v_proj", "o_proj"), ours.attention, theirs.attention),
    ):
        assert len(here) == len(there) == 3
        for (number, onto), (origin, best) in zip(here.items(), there.items(), strict=True):
            for kind in kinds:
                found = weights(source, origin)[kind][best]
                network = _hypernetworks(
                    dict.fromkeys(("up_proj", "down_proj", "v_proj", "o_proj"), found), 24, 0.3, seed=0
                )
                added = weights(target, number)[kind][onto] - weights(before, number)[kind][onto]
                assert_close(added, network[kind](found))


def test_the_hypernetworks_learn(tmp_path: Path) -> None:
    source, target = pair_of(torch.float32)
    LaTen(start=0.1, learning_rate=1e-2, steps=12, penalty=0.0).run(context_of(tmp_path, source, target))
    losses = [each["answer"] for each in losses_in(tmp_path)]
    assert losses[-1] < losses[0] - 0.1


def test_the_penalty_shrinks_what_is_added(tmp_path: Path) -> None:
    sizes = []
    for penalty in (0.0, 1e9):
        source, target = pair_of(torch.float32)
        before = parameters_of(target)
        folder = tmp_path / str(penalty)
        folder.mkdir()
        LaTen(start=0.1, learning_rate=1e-2, steps=4, penalty=penalty).run(context_of(folder, source, target))
        sizes.append(sum(float((p.detach() - before[name]).square().sum()) for name, p in target.named_parameters()))
    assert sizes[1] < sizes[0] / 10


@torch.no_grad()
def test_the_loss_is_written_as_it_is_defined(tmp_path: Path) -> None:
    """At the first step, from the run's own start: NLL over answer tokens, and the mean squares of the four kinds."""
    source, target = pair_of()
    added: dict[str, Tensor] = {}
    before = copy.deepcopy(target)
    with mock.patch("torch.optim.AdamW.step"):  # so that the start is what is fused
        LaTen(start=0.3, steps=1, penalty=7.0).run(context_of(tmp_path, source, target))
    onto = places(DecoderView(before), located_in(before, cut_rows(3), feed_forward=3, attention=2))
    after = {id(p): q for p, q in zip(before.parameters(), target.parameters(), strict=True)}
    for kind, found in onto.items():
        assert all(len(place.index.unique()) == len(place.index) for place in found)
        fused = [after[id(place.module.weight)].index_select(place.axis, place.index) for place in found]
        read = [place.module.weight.index_select(place.axis, place.index) for place in found]
        added[kind] = (torch.stack(fused) - torch.stack(read)).square().mean()
    (losses,) = losses_in(tmp_path)
    assert losses["penalty"] == pytest.approx(7.0 * float(torch.stack(list(added.values())).sum()), rel=1e-6)
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows_of(16):
            ids = torch.tensor([row.prompt_ids + row.answer_ids])
            logits = target(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            nll -= float(logits.gather(1, torch.tensor(row.answer_ids)[:, None]).sum())
            tokens += len(row.answer_ids)
    assert losses["answer"] == pytest.approx(nll / tokens, rel=1e-6)


def test_micro_batches_do_not_change_the_result(tmp_path: Path) -> None:
    results = []
    for size in (1, 16):
        source, target = pair_of()
        LaTen(start=0.1, steps=3).run(context_of(tmp_path, source, target, micro_batch_size=size))
        results.append(parameters_of(target))
    assert_close(results[0], results[1])


@elsewhere
def test_a_run_on_a_device_is_that_of_the_cpu(tmp_path: Path, name: str) -> None:
    results = []
    for place in ("cpu", name):
        folder = tmp_path / place
        folder.mkdir()
        with usable(place) as device:
            source, target = (model.to(device) for model in pair_of(torch.float32))
            context = context_of(folder, source, target, micro_batch_size=16)
            LaTen(start=0.1, steps=1).run(context)
            results.append({key: value.cpu() for key, value in parameters_of(target).items()})
    assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_models_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path) -> None:
    fits = model_of(depth=3, width=24)
    for source, told in (
        (model_of(depth=2), r"needs 3 layers of LlamaForCausalLM, which has 2: choose a source .* as the target$"),
        (model_of("gpt2"), r"layer 1 of GPT2LMHeadModel does not have one linear module each of gate_proj, "),
        (model_of("opt"), r"layer 1 of OPTForCausalLM does not have one linear module each of gate_proj, "),
        (model_of("phi"), r"layer 1 of PhiForCausalLM does not have one linear module each of gate_proj, "),
        (model_of("gemma2"), r"layer 1 of Gemma2ForCausalLM does not add what o_proj and down_proj give "),
    ):
        with pytest.raises(SemalignError, match=told):
            LaTen().run(context_of(tmp_path, source, fits))
    with pytest.raises(SemalignError, match=r"needs 36 feed-forward neurons in a layer .* which has 24"):
        LaTen(share=1.0).run(context_of(tmp_path, model_of(depth=3, width=16), fits))
    with pytest.raises(SemalignError, match=r"layer 1 of GPT2LMHeadModel"):
        LaTen().run(context_of(tmp_path, fits, model_of("gpt2")))


def test_a_final_norm_of_another_kind_is_refused() -> None:
    model = model_of()
    model.model.norm = torch.nn.LayerNorm(32, dtype=torch.float64)
    with pytest.raises(SemalignError, match="final norm of LlamaForCausalLM is not an RMSNorm"):
        located_in(model, cut_rows(2))


def test_the_last_word_is_no_punctuation_and_no_end_of_sequence() -> None:
    ids = {word: TOKENIZER.convert_tokens_to_ids(word) for word in ("▁12", "▁.", "▁the")}
    end = TOKENIZER.eos_token_id
    words, closing = (ids["▁the"], ids["▁12"]), (ids["▁."], end)
    assert until_last_word(Example((1,), (*words, *closing), ""), TOKENIZER).answer_ids == words
    assert until_last_word(Example((1,), words, ""), TOKENIZER).answer_ids == words
    assert until_last_word(Example((1,), closing, ""), TOKENIZER).answer_ids == closing


def test_laten_is_a_method() -> None:
    assert isinstance(LaTen(), Method) and not LaTen().stored
    with pytest.raises(SemalignError, match="variant"):
        LaTen.parse({"kind": "laten", "variant": "paper"}, origin="method")
