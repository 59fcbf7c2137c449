"""Gradient × activation against captum and autograd, ablation against identity layers, similarity."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_attribution import (
    Ablation,
    Batch,
    DecoderView,
    GradientActivation,
    Scorer,
    Similarity,
    Trace,
    attribute_layers,
    supervised,
)
from semalign_geometry import linear_cka
from torch import Tensor, nn

from ..models import ARCHITECTURES, collate, random_batch, random_examples, tiny_model

DEPTH = 4
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_aggregate = pytest.mark.parametrize("aggregate", ["absolute", "signed"])


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean NLL of the answer tokens of each example, written out."""
    negative = -logits.float().log_softmax(-1)
    losses = []
    for row, targets in enumerate(labels):
        places = [t for t in range(1, len(targets)) if targets[t] != -100]
        losses.append(torch.stack([negative[row, t - 1, targets[t]] for t in places]).mean())
    return torch.stack(losses)


def model_losses(model: Any, batch: Batch) -> Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return example_losses(model(**inputs, use_cache=False).logits, batch["labels"])


def gradient(activation: str, aggregate: str) -> GradientActivation:
    return GradientActivation.model_validate({"activation": activation, "aggregate": aggregate})


def summed(products: Tensor, aggregate: str) -> Tensor:
    return (products.abs() if aggregate == "absolute" else products).sum((1, 2))


def size_of(products: Sequence[Tensor]) -> float:
    """Largest sum of sizes: signed sums may cancel, their rounding errors do not."""
    return max(float(summed(product.detach(), "absolute").max()) for product in products)


@each_aggregate
@each_architecture
def test_gradient_activation_equals_captum(architecture: str, aggregate: str) -> None:
    model, batch = tiny_model(architecture, seed=1), random_batch(1)
    view = DecoderView(model)

    def losses(embeddings: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return example_losses(model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits, labels)

    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
    if architecture in ("gemma2", "gemma3"):
        with torch.no_grad():
            once = view.trace(batch, keep=[1]).inputs[1]
        # Gemma scales its embeddings: the stream before layer 1 must be the same on both routes.
        seen: list[Tensor] = []
        handle = view.layer(1).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        losses(embeddings, batch["attention_mask"], batch["labels"])
        handle.remove()
        torch.testing.assert_close(seen[0], once)
    attribution = LayerGradientXActivation(losses, list(view.layers))
    inputs = (embeddings,)
    products = attribution.attribute(inputs, additional_forward_args=(batch["attention_mask"], batch["labels"]))
    expected = torch.stack([summed(product, aggregate) for product in products], dim=1).detach()
    scores = gradient("output", aggregate)(view, batch)
    close = {"rtol": 1e-4, "atol": 1e-5 * size_of(products)}
    torch.testing.assert_close(scores, expected, **close)
    whole = attribute_layers(model, [batch], scorer=gradient("output", aggregate))
    torch.testing.assert_close(torch.tensor(whole.mean), expected.mean(0), **close)


@each_aggregate
@each_architecture
def test_gradient_activation_of_residuals_equals_autograd_by_hand(architecture: str, aggregate: str) -> None:
    """With z ⊙ r in place of r, the gradient with respect to z at z = 1 is ∂L/∂r ⊙ r, element by element."""
    model, batch = tiny_model(architecture, seed=2), random_batch(2)
    gates: list[Tensor] = []

    def gated(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        before = args[0] if args else kwargs["hidden_states"]
        gates.append(torch.ones_like(output, requires_grad=True))
        return before + gates[-1] * (output - before)

    view = DecoderView(model)
    handles = [layer.register_forward_hook(gated, with_kwargs=True) for layer in view.layers]
    products = torch.autograd.grad(model_losses(model, batch).sum(), gates)
    for handle in handles:
        handle.remove()
    expected = torch.stack([summed(product, aggregate) for product in products], dim=1)
    scores = gradient("residual", aggregate)(view, batch)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5 * size_of(products))


@each_architecture
def test_ablation_equals_a_layer_that_is_the_identity(architecture: str) -> None:
    model, batch = tiny_model(architecture, seed=4), random_batch(4)
    view = DecoderView(model)
    scores = Ablation()(view, batch)
    with torch.no_grad():
        whole = model_losses(model, batch)
        for number in range(1, DEPTH + 1):
            layer = view.layer(number)
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
            expected = model_losses(model, batch) - whole
            del layer.forward
            # A difference of two losses has their rounding errors.
            torch.testing.assert_close(scores[:, number - 1], expected, rtol=1e-4, atol=1e-5 * float(whole.max()))


def test_similarity_makes_each_contribution_once_at_the_supervised_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    own = Trace.residual

    def counted(trace: Trace, layer: int) -> Tensor:
        residual = own(trace, layer)
        made.append(len(residual))
        return residual

    monkeypatch.setattr(Trace, "residual", counted)
    source, target, batch = tiny_model("llama", seed=6), tiny_model("gpt2", seed=7, depth=5), random_batch(6)
    Similarity(target)(DecoderView(source), batch)
    assert made == [int(supervised(batch).counts.sum())] * (DEPTH + 5)


def test_ablation_runs_only_the_layers_after_the_one_left_out() -> None:
    model, batch = tiny_model("llama", seed=4), random_batch(4)
    runs = [0] * DEPTH
    for index, layer in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        layer.mlp.register_forward_hook(count)
    Ablation()(DecoderView(model), batch)
    assert runs == [1, 2, 3, 4]


def test_gradient_activation_runs_the_model_once() -> None:
    model, batch = tiny_model("llama", seed=4), random_batch(4)
    runs: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    backward: list[int] = []
    model.model.layers[3].mlp.register_full_backward_hook(lambda *_: backward.append(1))
    attribute_layers(model, [batch], scorer=GradientActivation())
    assert (len(runs), len(backward)) == (1, 1)


@each_architecture
def test_similarity_with_itself_has_ones_on_the_diagonal(architecture: str) -> None:
    model = tiny_model(architecture, seed=5)
    batch = collate([(torch.randint(3, 97, (12,), generator=torch.Generator().manual_seed(n)), 3) for n in range(3)])
    scores = attribute_layers(model, [batch], scorer=Similarity(model))
    assert scores.similarity is not None
    matrix = torch.tensor(scores.similarity)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(DEPTH), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-5)
    assert (matrix - torch.eye(DEPTH)).max() < 0.999
    assert matrix.min() >= 0 and matrix.max() <= 1 + 1e-5


def test_similarity_compares_residuals_at_supervised_positions_of_each_example() -> None:
    source, target = tiny_model("llama", seed=6), tiny_model("gpt2", seed=7, depth=5, width=16)
    examples = random_examples(6, examples=2, length=12)
    scores = Similarity(target)(DecoderView(source), collate(examples))
    assert scores.shape == (2, 5, DEPTH)
    with torch.no_grad():
        for row, (ids, prompt) in enumerate(examples):
            streams = []
            for model in (target, source):
                hidden = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
                streams.append([after - before for before, after in zip(hidden, hidden[1:], strict=False)])
            # The last of transformers' hidden states is after the final norm: leave the last layers out.
            for k in range(4):
                for layer in range(DEPTH - 1):
                    pair = [streams[0][k], streams[1][layer]]
                    expected = linear_cka(*(stream[0, prompt - 1 : len(ids) - 1] for stream in pair))
                    torch.testing.assert_close(scores[row, k, layer], expected, rtol=1e-4, atol=1e-5)
    whole = attribute_layers(source, [collate(examples)], scorer=Similarity(target))
    assert whole.similarity is not None
    torch.testing.assert_close(torch.tensor(whole.similarity), scores.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(whole.mean), scores.mean((0, 1)), rtol=1e-5, atol=1e-6)


def scorer_named(name: str, target: Any) -> Scorer:
    return {
        "residual": gradient("residual", "absolute"),
        "output": gradient("output", "absolute"),
        "signed": gradient("residual", "signed"),
        "ablation": Ablation(),
        "similarity": Similarity(target),
    }[name]


SCORERS = ["residual", "output", "signed", "ablation", "similarity"]
MODELS = {name: tiny_model(name, seed=8, width=16) for name in ARCHITECTURES}
TARGET = tiny_model("llama", seed=9, depth=3, width=16)


@pytest.mark.parametrize("name", SCORERS)
@settings(max_examples=4)
@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from(ARCHITECTURES), st.data())
def test_scores_do_not_depend_on_the_split_into_batches(
    name: str, seed: int, count: int, architecture: str, data: st.DataObject
) -> None:
    model, scorer = MODELS[architecture], scorer_named(name, TARGET)
    examples = random_examples(seed, examples=count)
    whole = attribute_layers(model, [collate(examples)], scorer=scorer, bootstrap=5)
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1))))
    parts = [examples[i:j] for i, j in zip([0, *cuts], [*cuts, count], strict=True)]
    batches = [collate(part, length=data.draw(st.sampled_from([None, 10, 15]))) for part in parts]
    split = attribute_layers(model, iter(batches), scorer=scorer, bootstrap=5)
    # Signed sums and differences of losses cancel; their rounding errors are those of the terms.
    sizes = attribute_layers(model, [collate(examples)], scorer=scorer_named("residual", TARGET), bootstrap=1)
    terms = max(1.0, *sizes.mean)
    assert split.examples == whole.examples == count
    for field in ("mean", "standard_error", "similarity"):
        ours, theirs = getattr(split, field), getattr(whole, field)
        if ours is not None:
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=2e-5 * terms)


@pytest.mark.parametrize("planted", range(1, DEPTH + 1))
@pytest.mark.parametrize("name", ["residual", "ablation", "similarity"])
def test_a_planted_layer_wins(name: str, planted: int) -> None:
    model = tiny_model("llama", seed=10)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers, 1):
            if number != planted:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            else:
                layer.mlp.down_proj.weight.mul_(5)
        # The answers are what the model says, so that losing the planted layer costs likelihood.
        batch = random_batch(10, examples=4, length=12)
        best = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    batch["labels"][:, 1:] = torch.where(batch["labels"][:, 1:] == -100, -100, best[:, :-1])
    scores = attribute_layers(model, [batch], scorer=scorer_named(name, TARGET))
    assert max(range(DEPTH), key=lambda index: scores.mean[index]) == planted - 1
    others = [score for number, score in enumerate(scores.mean, 1) if number != planted]
    assert max(map(abs, others)) <= 1e-6 < scores.mean[planted - 1]
    assert scores.top_frequency[planted - 1] == 1.0


@pytest.mark.parametrize("name", ["residual", "ablation", "similarity"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_bfloat16_runs_and_stays_near_float32(architecture: str, name: str) -> None:
    batch = random_batch(11, length=14)
    model = tiny_model(architecture, seed=11, dtype=torch.bfloat16)
    scores = attribute_layers(model, [batch], scorer=scorer_named(name, TARGET))
    exact = attribute_layers(tiny_model(architecture, seed=11), [batch], scorer=scorer_named(name, TARGET))
    size = max(map(abs, exact.mean))
    torch.testing.assert_close(torch.tensor(scores.mean), torch.tensor(exact.mean), rtol=0.2, atol=0.1 * size + 0.05)


@pytest.mark.parametrize("name", SCORERS)
def test_training_mode_and_outer_gradient_mode_change_nothing(name: str) -> None:
    batch = random_batch(12)
    model, scorer = tiny_model("gpt2", seed=12), scorer_named(name, TARGET)
    expected = attribute_layers(model, [batch], scorer=scorer)
    model.train()
    assert attribute_layers(model, [batch], scorer=scorer) == expected
    with torch.no_grad():
        assert attribute_layers(model, [batch], scorer=scorer) == expected


@pytest.mark.parametrize("name", SCORERS)
def test_parameters_are_frozen_while_scores_are_taken(name: str) -> None:
    model, batch = tiny_model("qwen2", seed=13), random_batch(13)
    inner = scorer_named(name, TARGET)
    seen: list[bool] = []

    class Watching:
        name = "watching"

        def __call__(self, source: DecoderView, batch: Batch) -> Tensor:
            model.model.layers[1].mlp.register_forward_hook(
                lambda module, args, output: seen.extend(parameter.requires_grad for parameter in module.parameters())
            )
            return inner(source, batch)

    scores = attribute_layers(model, [batch], scorer=Watching())
    assert scores.scorer == "watching"
    assert seen and not any(seen)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_names_say_what_was_measured() -> None:
    assert GradientActivation().name == "gradient_activation(residual, absolute)"
    assert gradient("output", "signed").name == "gradient_activation(output, signed)"
    assert Ablation().name == "ablation"
    assert Similarity(TARGET).name == "similarity"
    assert all(isinstance(scorer_named(name, TARGET), Scorer) for name in SCORERS)
