"""The view of a decoder: capture, replay, early stop, refusal, and a model left as found."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_attribution import (
    Ablation,
    DecoderView,
    GradientActivation,
    Similarity,
    attribute_layers,
    supervised,
    undisturbed,
    view_of,
)
from semalign_geometry.base import SemalignError
from torch import Tensor, nn

from ..models import ARCHITECTURES, random_batch, tiny_model
from .snapshot import snapshot, unsettle

DEPTH = 4
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def run_whole(model: Any, batch: dict[str, Tensor]) -> Any:
    """The model's own forward, with nothing of the view in it."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return model(**inputs, use_cache=False, output_hidden_states=True)


def count_runs(view: DecoderView) -> list[int]:
    """A list that counts how often the first submodule of each layer runs."""
    counts = [0] * view.depth
    for index, layer in enumerate(view.layers):
        original = next(m for m in layer.modules() if isinstance(m, nn.LayerNorm) or "RMSNorm" in type(m).__name__)

        def count(*_: Any, index: int = index) -> None:
            counts[index] += 1

        original.register_forward_hook(count)
    return counts


@each_architecture
def test_parts_are_found_and_verify_passes(architecture: str) -> None:
    model = tiny_model(architecture, seed=0, depth=5, width=16)
    view = DecoderView(model)
    assert (view.depth, view.width, view.device) == (5, 16, torch.device("cpu"))
    assert view.head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    view.verify()
    if architecture != "gemma2":  # see test_padding_that_changes_a_row_is_refused
        DecoderView(model.double()).verify()


@each_architecture
@torch.no_grad()
def test_trace_reads_the_streams_of_the_model(architecture: str) -> None:
    model, batch = tiny_model(architecture, seed=1), random_batch(1)
    view = view_of(model)
    trace = view.trace(batch, keep=range(1, DEPTH + 1))
    whole = run_whole(model, batch)
    assert trace.final is not None
    for layer in range(1, DEPTH + 1):
        torch.testing.assert_close(trace.inputs[layer], whole.hidden_states[layer - 1], rtol=0, atol=0)
    torch.testing.assert_close(trace.final, whole.hidden_states[-1], rtol=0, atol=0)
    torch.testing.assert_close(view.head.logits(trace.final), whole.logits.float())
    # The residual contributions and the embeddings add up to the last stream.
    stream = trace.inputs[1] + sum(trace.residual(layer) for layer in range(1, DEPTH + 1))
    torch.testing.assert_close(stream, trace.outputs[DEPTH], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(view.final_norm(trace.outputs[DEPTH]), trace.final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_streams_of_some_positions_are_those_of_all_at_these(dtype: torch.dtype) -> None:
    view, batch = DecoderView(tiny_model("gemma2", seed=1, dtype=dtype)), random_batch(1)
    mask, weight = supervised(batch).mask, next(view.layer(2).parameters())
    whole, some = (view.trace(batch, keep=[2, 3], positions=positions) for positions in (None, mask))
    for layer in (2, 3):
        assert some.inputs[layer].shape == some.outputs[layer].shape == (int(mask.sum()), view.width)
        torch.testing.assert_close(some.inputs[layer], whole.inputs[layer][mask], rtol=0, atol=0)
        torch.testing.assert_close(some.residual(layer), whole.residual(layer)[mask], rtol=0, atol=0)
    torch.testing.assert_close(some.final, whole.final, rtol=0, atol=0)
    residuals = some.residual(2), whole.residual(2)[mask]
    gradients = [torch.autograd.grad(each.square().sum(), weight)[0] for each in residuals]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keep": [0]}, "layer 0 cannot be kept: layers 1 to 4 of 4 run"),
        ({"keep": [2, 5]}, "layer 5 cannot be kept"),
        ({"keep": [1, -1]}, "layer -1 cannot be kept"),
        ({"stop": 0}, "stop is 0, expected 1 to 4"),
        ({"keep": [1], "start": 3}, "layer 1 cannot be kept: layers 3 to 4 of 4 run"),
        ({"keep": [3], "stop": 2}, "layer 3 cannot be kept: layers 1 to 2 of 4 run"),
        ({"start": 3, "stop": 2}, "stop is 2, expected 3 to 4"),
        ({"stop": 5}, "stop is 5, expected 1 to 4"),
    ],
)
def test_layers_that_do_not_run_are_refused(given: dict[str, Any], told: str) -> None:
    model, batch = tiny_model("llama", seed=1, depth=4), random_batch(1)
    view, before = DecoderView(model), snapshot(model)
    hidden = torch.zeros(*batch["input_ids"].shape, view.width) if "start" in given else None
    with pytest.raises(SemalignError, match=re.escape(told)):
        view.trace(batch, hidden=hidden, **given)
    assert snapshot(model) == before


@each_architecture
@torch.no_grad()
def test_replay_equals_the_full_forward_exactly(architecture: str) -> None:
    model, batch = tiny_model(architecture, seed=2), random_batch(2)
    assert (batch["attention_mask"] == 0).any(), "the batch must have padding"
    view = DecoderView(model)
    whole = view.trace(batch, keep=range(1, DEPTH + 1))
    assert whole.final is not None and torch.equal(whole.final, run_whole(model, batch).hidden_states[-1])
    for start in range(2, DEPTH + 2):
        replayed = view.trace(batch, start=start, hidden=whole.outputs[start - 1], keep=range(start, DEPTH + 1))
        assert torch.equal(replayed.final, whole.final)
        assert list(replayed.outputs) == list(range(start, DEPTH + 1))
        for layer in replayed.outputs:
            assert torch.equal(replayed.outputs[layer], whole.outputs[layer])
            assert torch.equal(replayed.inputs[layer], whole.inputs[layer])


@each_architecture
@torch.no_grad()
def test_early_stop_equals_the_full_forward_and_runs_nothing_more(architecture: str) -> None:
    batch, view = random_batch(3), DecoderView(tiny_model(architecture, seed=3))
    whole = view.trace(batch, keep=range(1, DEPTH + 1))
    counts = count_runs(view)
    for stop in range(1, DEPTH + 1):
        counts[:] = [0] * DEPTH
        stopped = view.trace(batch, keep=[stop], stop=stop)
        assert stopped.final is None
        assert torch.equal(stopped.outputs[stop], whole.outputs[stop])
        assert [bool(count) for count in counts] == [layer <= stop for layer in range(1, DEPTH + 1)]
    counts[:] = [0] * DEPTH
    part = view.trace(batch, start=2, hidden=whole.outputs[1], keep=[3], stop=3)
    assert torch.equal(part.outputs[3], whole.outputs[3]) and part.final is None
    assert [bool(count) for count in counts] == [False, True, True, False]


@settings(max_examples=10)
@given(st.integers(0, 10_000), st.sampled_from(ARCHITECTURES), st.integers(1, 6), st.data())
@torch.no_grad()
def test_replay_holds_for_any_depth_and_batch(seed: int, architecture: str, depth: int, data: st.DataObject) -> None:
    batch = random_batch(seed, examples=data.draw(st.integers(1, 4)), length=data.draw(st.integers(4, 14)))
    view = DecoderView(tiny_model(architecture, seed=seed, depth=depth, width=16))
    whole = view.trace(batch, keep=range(1, depth + 1))
    start = data.draw(st.integers(1, depth)) + 1
    assert torch.equal(view.trace(batch, start=start, hidden=whole.outputs[start - 1]).final, whole.final)


@torch.no_grad()
def test_replay_uses_what_it_is_given() -> None:
    batch, view = random_batch(4), DecoderView(tiny_model("llama", seed=4))
    hidden = torch.randn(*batch["input_ids"].shape, view.width, generator=torch.Generator().manual_seed(0))
    trace = view.trace(batch, start=DEPTH + 1, hidden=hidden)
    torch.testing.assert_close(trace.final, view.final_norm(hidden))
    trace = view.trace(batch, start=3, hidden=hidden, keep=[3])
    assert torch.equal(trace.inputs[3], hidden)


@each_architecture
def test_input_gradient_makes_a_graph_under_frozen_weights(architecture: str) -> None:
    model, batch = tiny_model(architecture, seed=5), random_batch(5)
    view = DecoderView(model)
    with undisturbed(model):
        trace = view.trace(batch, keep=range(1, DEPTH + 1), input_gradient=True)
        plain = view.trace(batch)
        assert trace.final is not None and plain.final is not None
        assert not plain.final.requires_grad
        assert torch.equal(trace.final, plain.final)
        gradient = torch.autograd.grad(trace.final.square().sum(), trace.inputs[1])[0]
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("number", [-1, 0, DEPTH + 1])
def test_layer_numbers_out_of_range_are_refused(number: int) -> None:
    with pytest.raises(SemalignError, match=f"layer {number} does not exist: the model has layers 1 to {DEPTH}"):
        DecoderView(tiny_model("llama", seed=0)).layer(number)


@pytest.mark.parametrize("number", [-1, 0, DEPTH + 2])
def test_recomputing_from_a_layer_out_of_range_is_refused(number: int) -> None:
    view, batch = DecoderView(tiny_model("llama", seed=0)), random_batch(0)
    with pytest.raises(SemalignError, match=f"recompute_from is {number}, expected 1 to {DEPTH + 1}"):
        view.trace(batch, recompute_from=number)
    view.trace(batch, recompute_from=DEPTH + 1)


def test_layers_are_counted_from_one() -> None:
    model = tiny_model("llama", seed=0)
    view = DecoderView(model)
    assert [view.layer(number) for number in range(1, DEPTH + 1)] == list(model.model.layers)
    assert view_of(view) is view


def test_start_and_hidden_go_together() -> None:
    batch, view = random_batch(0), DecoderView(tiny_model("llama", seed=0))
    hidden = torch.zeros(*batch["input_ids"].shape, view.width)
    for start in (0, DEPTH + 2):
        with pytest.raises(SemalignError, match=f"start is {start}, expected 1 to {DEPTH + 1}"):
            view.trace(batch, start=start, hidden=hidden)
    with pytest.raises(SemalignError, match="run from layer 2 needs hidden"):
        view.trace(batch, start=2)
    with pytest.raises(SemalignError, match="run from layer 1 takes no hidden"):
        view.trace(batch, hidden=hidden)


def uses(model: Any) -> dict[str, Callable[[], object]]:
    """Every way to run the model through the library."""
    view, batch = DecoderView(model), random_batch(6)
    hidden = torch.zeros(*batch["input_ids"].shape, view.width)
    return {
        "trace": lambda: view.trace(batch, keep=range(1, DEPTH + 1)),
        "input gradient": lambda: view.trace(batch, keep=[2], input_gradient=True),
        "replay": lambda: view.trace(batch, start=3, hidden=hidden, keep=[3]),
        "stop": lambda: view.trace(batch, stop=3),
        "verify": view.verify,
        "gradient": lambda: attribute_layers(model, [batch], scorer=GradientActivation()),
        "ablation": lambda: attribute_layers(view, [batch], scorer=Ablation()),
        "similarity": lambda: attribute_layers(model, [batch], scorer=Similarity(model)),
    }


USES = ["trace", "input gradient", "replay", "stop", "verify", "gradient", "ablation", "similarity"]
ISOLATED = ["verify", "gradient", "ablation", "similarity"]
"""Uses that bring the model into evaluation mode themselves; a bare trace runs it as it is."""


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
def test_the_model_is_left_as_found(architecture: str, use: str) -> None:
    model = tiny_model(architecture, seed=6)
    if use in ISOLATED:
        unsettle(model)
    before = snapshot(model)
    uses(model)[use]()
    assert snapshot(model) == before


@pytest.mark.parametrize("use", USES)
def test_the_model_is_left_as_found_when_an_exception_passes(use: str) -> None:
    model = tiny_model("gpt2", seed=6)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a bare trace of a training model may draw; a failed one is compared here
    unsettle(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("the layer failed")

    DecoderView(model).layer(3).register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises((RuntimeError, SemalignError), match="the layer failed"):
        uses(model)[use]()
    assert snapshot(model) == before


def test_a_forward_that_somebody_else_replaced_comes_back() -> None:
    model, batch = tiny_model("llama", seed=7), random_batch(7)
    view = DecoderView(model)
    layer = view.layer(1)
    own = layer.forward
    layer.forward = own
    hidden = view.trace(batch, keep=[1]).outputs[1]
    view.trace(batch, start=2, hidden=hidden)
    assert layer.__dict__["forward"] is own
    with suppress(SemalignError):
        view.trace(batch, start=2, hidden=hidden, stop=9)
    assert layer.__dict__["forward"] is own


def test_undisturbed_freezes_inside_and_restores_outside() -> None:
    model = tiny_model("gpt2", seed=0)
    unsettle(model)
    before = snapshot(model)
    with pytest.raises(KeyError), undisturbed(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert snapshot(model) == before


def test_encoders_are_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        is_decoder=True,
    )
    with pytest.raises(SemalignError, match="no final norm .* was found in the decoder of BertLMHeadModel"):
        DecoderView(BertLMHeadModel(config)).verify()


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(SemalignError, match="no language-model head"):
        DecoderView(tiny_model("llama", seed=0).model)


def test_a_decoder_without_a_stack_of_its_layers_is_refused() -> None:
    model = tiny_model("llama", seed=0)
    model.config.num_hidden_layers = 7
    with pytest.raises(SemalignError, match="no stack of its 7 layers"):
        DecoderView(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tokens_that_see_later_ones_are_refused(architecture: str) -> None:
    view = DecoderView(tiny_model(architecture, seed=0))
    view.layer(2).register_forward_hook(lambda module, args, output: output + 0.1 * output.mean(1, keepdim=True))
    with pytest.raises(SemalignError, match="earlier tokens see later ones"):
        view.verify()


@each_architecture
@pytest.mark.parametrize("place", ["layer", "norm"])
def test_damaged_weights_are_refused(architecture: str, place: str) -> None:
    view = DecoderView(tiny_model(architecture, seed=0))
    damaged = list((view.layer(3) if place == "layer" else view.final_norm).parameters())[-1]
    damaged.data.flatten()[0] = torch.nan
    with pytest.raises(SemalignError, match="not finite: its weights are damaged"):
        view.verify()


def test_a_damaged_head_is_refused() -> None:
    model = tiny_model("llama", seed=0)
    model.lm_head.weight.data[50, 3] = torch.inf
    with pytest.raises(SemalignError, match="not finite: its weights are damaged"):
        DecoderView(model).verify()


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x + 0.1, lambda x: x.log_softmax(-1)])
def test_unknown_post_processing_of_logits_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = tiny_model("llama", seed=0)
    model.lm_head.register_forward_hook(lambda module, args, output: change(output))
    with pytest.raises(SemalignError, match="LlamaForCausalLM post-processes its logits"):
        DecoderView(model).verify()


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_an_overlooked_soft_cap_would_be_refused(architecture: str) -> None:
    model = tiny_model(architecture, seed=0)
    view = DecoderView(model)
    model.config.final_logit_softcapping = 1.0
    with pytest.raises(SemalignError, match="post-processes its logits"):
        view.verify()


def test_a_stream_that_changes_between_layers_is_refused() -> None:
    view = DecoderView(tiny_model("llama", seed=0))
    view.layer(3).register_forward_pre_hook(lambda module, args: (args[0] * 1.01, *args[1:]))
    with pytest.raises(SemalignError, match="changes the residual stream between its layers"):
        view.verify()


def test_a_stream_that_changes_before_the_final_norm_is_refused() -> None:
    model = tiny_model("llama", seed=0)
    view = DecoderView(model)
    norm = model.model.norm
    model.model.norm = nn.Sequential(nn.Linear(32, 32), norm)
    with pytest.raises(SemalignError, match="changes the residual stream between its layers"):
        view.verify()


@pytest.mark.parametrize("depth", [1, 2, DEPTH])
def test_shallow_models_are_verified(depth: int) -> None:
    DecoderView(tiny_model("gemma2", seed=0, depth=depth)).verify()


def test_keys_and_values_that_layers_share_are_refused() -> None:
    from transformers import AutoModelForCausalLM

    gemma4 = pytest.importorskip("transformers.models.gemma4")  # not in the first releases of transformers 5
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8, "global_head_dim": 8}
    entries = {"vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
    types = ["sliding_attention", "full_attention"] * 2

    def view(shared: int) -> DecoderView:
        config = gemma4.Gemma4TextConfig(
            **sizes, **entries, num_hidden_layers=4, layer_types=types, num_kv_shared_layers=shared
        )
        return DecoderView(AutoModelForCausalLM.from_config(config).eval())

    view(0).verify()
    with pytest.raises(SemalignError, match="Gemma4ForCausalLM hands more than the stream between its layers"):
        view(2).verify()


@pytest.mark.parametrize("otherwise", [(), (0.0,)], ids=["an exception", "other values"])
def test_layers_that_need_more_than_the_stream_are_refused(otherwise: tuple[float, ...]) -> None:
    view = DecoderView(tiny_model("llama", seed=0))
    kept: dict[str, Any] = {}
    view.layer(1).register_forward_hook(lambda module, args, output: kept.update(value=output))
    view.layer(DEPTH).register_forward_hook(lambda module, args, output: output + kept.pop("value", *otherwise))
    with pytest.raises(SemalignError, match="LlamaForCausalLM hands more than the stream between its layers"):
        view.verify()


def test_layers_that_return_tuples_are_refused() -> None:
    view = DecoderView(tiny_model("llama", seed=0))
    view.layer(2).register_forward_hook(lambda module, args, output: (output,))
    with pytest.raises(SemalignError, match="LlamaDecoderLayer returns a tuple .* are not supported"):
        view.trace(random_batch(0), keep=[2])


def test_bloom_is_refused_for_what_its_layers_return() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(SemalignError, match="BloomBlock returns a tuple and not the stream alone: such models"):
        DecoderView(model).verify()


@each_architecture
@torch.no_grad()
def test_bfloat16_replays_exactly(architecture: str) -> None:
    batch, view = random_batch(8), DecoderView(tiny_model(architecture, seed=8, dtype=torch.bfloat16))
    view.verify()
    whole = view.trace(batch, keep=[2])
    assert whole.final is not None and whole.final.dtype == torch.bfloat16
    assert torch.equal(view.trace(batch, start=3, hidden=whole.outputs[2]).final, whole.final)


@each_architecture
def test_recomputed_layers_have_the_same_gradients(architecture: str) -> None:
    model = tiny_model(architecture, seed=3)
    view, batch = DecoderView(model), random_batch(4)
    layers = list(model.modules())
    before = snapshot(model)

    def gradients(recompute_from: int | None) -> list[Tensor]:
        trace = view.trace(batch, recompute_from=recompute_from, input_gradient=True, keep=[1])
        assert trace.final is not None
        loss = trace.final.square().sum()
        first = torch.autograd.grad(loss, trace.inputs[1], retain_graph=True)
        again = torch.autograd.grad(loss, trace.inputs[1])  # a graph may be used twice
        assert torch.equal(first[0], again[0])
        return list(first)

    for recompute_from in (1, 2, view.depth):
        for plain, recomputed in zip(gradients(None), gradients(recompute_from), strict=True):
            assert torch.equal(plain, recomputed)
    assert list(model.modules()) == layers and snapshot(model) == before


def test_padding_that_changes_a_row_is_refused() -> None:
    """Rows padded past the window of Gemma 2 are not finite in float64: transformers' attention divides 0 by 0."""
    model = tiny_model("gemma2", seed=0)
    DecoderView(model).verify()
    told = r"Gemma2ForCausalLM in float64 computes values that are not finite for a row that is padded on the right to "
    with pytest.raises(SemalignError, match=told + r"64 tokens, past its sliding_window of 4: load it in another dtyp"):
        DecoderView(model.double()).verify()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_reads_padding_is_refused(side: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", seed=0, dtype=dtype)
    attend = model.model.layers[0].self_attn.forward

    def careless(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        hidden = ~mask[:, :, -1:, :1] if side == "left" and mask is not None else None
        if side == "right" and mask is not None:  # the mean of the row, its padding included
            kwargs["hidden_states"] = kwargs["hidden_states"] + kwargs["hidden_states"].mean(1, keepdim=True)
        elif hidden is not None and bool(hidden.any()):  # rows whose first column is hidden see it
            kwargs["attention_mask"] = mask | hidden
        return attend(*args, **kwargs)

    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", careless)
    told = f"computes other values for a row that is padded on the {side} to 64 tokens: load it in another dtype"
    with pytest.raises(SemalignError, match=told):
        DecoderView(model).verify()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_see_later_ones_past_a_window_are_refused(dtype: torch.dtype) -> None:
    model = tiny_model("gemma3", seed=0, dtype=dtype)
    view = DecoderView(model)

    def look_ahead(module: Any, args: Any, output: Tensor) -> Tensor:
        ahead = output.flip(1).cumsum(1).flip(1) / output.shape[1]
        return torch.cat([output[:, :8], (output + ahead)[:, 8:]], 1)

    view.layer(1).register_forward_hook(look_ahead)
    told = (
        "Gemma3ForCausalLM lets earlier tokens see later ones in rows of 48 tokens, past its sliding_window of 4: such"
    )
    with pytest.raises(SemalignError, match=told):
        view.verify()


def test_rows_reach_past_the_widest_window_that_can_be_afforded(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    model = tiny_model("gemma3", seed=0)
    model.config.max_position_embeddings, model.config.sliding_window = 10_000, 200
    view, trace = DecoderView(model), DecoderView.trace

    def measure(self: DecoderView, batch: Any, **more: Any) -> Any:
        lengths.append(batch["input_ids"].shape[1])
        return trace(self, batch, **more)

    monkeypatch.setattr(DecoderView, "trace", measure)
    for longest, work, columns in ((4096, 2e11, 264), (100, 2e11, 64), (4096, 2e3, 64)):
        monkeypatch.setattr("semalign_attribution._verify.LONGEST", longest)
        monkeypatch.setattr("semalign_attribution._verify.WORK", work)
        lengths.clear()
        view.verify()
        assert max(lengths) == columns
    model.config.max_position_embeddings = 20
    lengths.clear()
    view.verify()
    assert max(lengths) == 20


def test_the_layers_that_run_are_the_fewest_with_one_of_each_kind() -> None:
    from semalign_attribution._verify import _stretch

    assert _stretch(DecoderView(tiny_model("llama", seed=0, depth=5))) == (1, 2)
    assert _stretch(DecoderView(tiny_model("gemma3", seed=0, depth=5))) == (1, 3)
    assert _stretch(DecoderView(tiny_model("gemma3", seed=0, depth=2))) == (1, 2)
    assert _stretch(DecoderView(tiny_model("gemma3", seed=0, depth=1))) == (1, 1)
    view = DecoderView(tiny_model("llama", seed=0, depth=6))
    for layer in view.layers[3:]:
        layer.self_attn.kind = "otherwise"
    assert _stretch(view) == (3, 5)
    view.verify()
    for place, layer in enumerate(view.layers):
        layer.layer_id, layer.self_attn.layer_number, layer.mlp.block_id = place, place + 1, place
    assert _stretch(view) == (3, 5)
    for place, layer in enumerate(view.layers):
        layer.of_its_kind = place % 3
    assert _stretch(view) == (1, 6)


def test_windows_that_are_left_out_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from semalign_attribution import _verify

    caplog.set_level("INFO")
    model = tiny_model("gemma3", seed=0)
    config = model.config
    config.max_position_embeddings, config.sliding_window = 10_000, 200
    view = DecoderView(model)
    assert view.verify() is None and not caplog.records
    config.sliding_window = 5000
    found = view.verify()
    told = (
        "Gemma3ForCausalLM was checked on rows of 64 tokens, and not past its sliding_window of 5000: longer rows take "
        "too much time or memory"
    )
    assert [record.message for record in caplog.records] == [told] == [found]
    config.max_position_embeddings = 5000
    view.verify()
    assert len(caplog.records) == 1, "no row is longer than its window"
    config.max_position_embeddings, config.sliding_window = 10_000, 200
    layer = sum(parameter.numel() for parameter in view.layer(1).parameters())
    monkeypatch.setattr(_verify, "WORK", 3 * 5 * 3 * layer * 264)
    assert _verify._columns(view, 3)[0] == 264
    view = DecoderView(model.bfloat16())
    assert _verify._columns(view, 3) == (64, "", ["sliding_window of 200"]), "it takes four times as long"


def test_a_window_wider_than_all_rows_is_not_in_the_message() -> None:
    from semalign_attribution._verify import _columns

    model = tiny_model("gemma3", seed=0)
    model.config.max_position_embeddings, model.config.sliding_window = 48, 512
    assert _columns(DecoderView(model), 3) == (48, "", [])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("not enough"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_window_that_does_not_fit_in_memory_is_left_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = tiny_model("gemma3", seed=0)
    model.config.max_position_embeddings, model.config.sliding_window = 10_000, 200
    trace, refused = DecoderView.trace, []

    def full(self: DecoderView, batch: Any, **more: Any) -> Any:
        if batch["input_ids"].shape[1] > 100:
            refused.append(1)
            raise error
        return trace(self, batch, **more)

    monkeypatch.setattr(DecoderView, "trace", full)
    DecoderView(model).verify()
    assert refused and "not past its sliding_window of 200" in caplog.text


def test_a_model_that_cannot_run_is_one_sentence() -> None:
    model = tiny_model("llama", seed=0)
    model.model.layers[1].mlp.up_proj.double()
    with pytest.raises(SemalignError, match="^LlamaForCausalLM cannot run in float32: .*dtype"):
        DecoderView(model).verify()


SPARSE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_choice_of_positions_that_depends_on_padding_is_refused(dtype: torch.dtype) -> None:
    """DeepSeek-V3.2 chooses among positions of equal score; which it takes depends on the columns of the batch."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def view(chosen: int) -> DecoderView:
        torch.manual_seed(0)
        config = AutoConfig.for_model("deepseek_v32", **SPARSE, index_topk=chosen)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        return DecoderView(model.to(dtype).eval())

    view(128).verify()
    told = "other values for a row that is padded on the (right|left) to 72 tokens, past its index_topk of 8: "
    with pytest.raises(SemalignError, match=told):
        view(8).verify()


def test_layers_that_hand_on_several_streams_are_refused() -> None:
    class Last(nn.Module):
        def forward(self, streams: Tensor) -> Tensor:
            return streams[..., -1, :]

    model = tiny_model("llama", seed=0)
    view = DecoderView(model)
    view.layer(DEPTH).register_forward_hook(lambda module, args, output: output[:, :, None].expand(-1, -1, 4, -1))
    model.model.norm = nn.Sequential(Last(), model.model.norm)
    with pytest.raises(SemalignError, match="changes the residual stream between its layers"):
        view.verify()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_4_is_read_below_its_head(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=8,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    view = DecoderView(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    assert view.decoder is view.model.model and view.depth == 4
    view.verify()
