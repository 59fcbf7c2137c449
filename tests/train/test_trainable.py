"""The trainable part of a stage: float32 inside, the model's own dtype and classes outside."""

import itertools
from typing import Any

import pytest
import torch
from semalign_attribution import undisturbed, view_of
from semalign_geometry.base import SemalignError
from semalign_train import FullLayer, LoraLayer, frontier
from torch import nn

from ..align.chain import target_model
from ..models import ARCHITECTURES

MODULES = {"gpt2": ("c_fc", "c_attn"), "pythia": ("dense_h_to_4h",), "opt": ("fc1", "v_proj"), "phi": ("fc1", "v_proj")}
LORA = LoraLayer(rank=3, alpha=6)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def lora_for(architecture: str) -> LoraLayer:
    return LoraLayer(rank=3, alpha=6, modules=MODULES.get(architecture, LORA.modules))


def structure(model: nn.Module) -> dict[str, Any]:
    parts = {name: (type(part), sorted(part.__dict__), part.training) for name, part in model.named_modules()}
    return {"parts": parts, "parameters": {n: (p.dtype, p.requires_grad, id(p)) for n, p in model.named_parameters()}}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [*itertools.product(ARCHITECTURES, [torch.float32, torch.bfloat16]), ("llama", torch.float64)],
    ids=str,
)
def test_parameters_train_in_single_precision_and_come_back(architecture: str, kind: str, dtype: torch.dtype) -> None:
    model = target_model(architecture, dtype=dtype)
    trainable = FullLayer() if kind == "full" else lora_for(architecture)
    with undisturbed(model):
        before, values = structure(model), weights(model)
        with frontier(view_of(model), 2, trainable, final_norm=True) as parameters:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert {parameter.dtype for parameter in parameters} == {wide}
            wanted = {id(parameter) for parameter in parameters}
            assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
            inside = {n for n, p in model.named_parameters() if p.requires_grad}
            norm = list(view_of(model).final_norm.parameters())
            assert {id(p) for p in norm} <= wanted
            if kind == "full":
                assert wanted == {id(p) for p in [*view_of(model).layer(2).parameters(), *norm]}
            else:
                assert len(inside) == 2 * len(trainable.modules) + len(norm)  # type: ignore[union-attr]
        assert structure(model) == before
        for name, value in model.state_dict().items():  # nothing trained: nothing may change
            assert torch.equal(value, values[name]), name


@each_dtype
def test_an_adapter_is_merged_with_one_rounding(dtype: torch.dtype) -> None:
    model = target_model(dtype=dtype)
    values = weights(model)
    generator = torch.Generator().manual_seed(0)
    trained: dict[str, torch.Tensor] = {}
    with undisturbed(model), frontier(view_of(model), 3, LORA, final_norm=False) as parameters:
        for parameter in parameters:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    changed = []
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.frontier.weight" not in trained:
            assert torch.equal(value, values[name]), name
            continue
        a, b = (trained[f"{stem}.lora_{part}.frontier.weight"].double() for part in "AB")
        exact = values[name].double() + 2.0 * b @ a
        changed.append(name)
        torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert sorted(name.split(".")[-2] for name in changed) == sorted(LORA.modules)


@pytest.mark.parametrize("trainable", [FullLayer(), LORA], ids=["full", "lora"])
def test_the_model_comes_back_when_an_exception_passes(trainable: Any) -> None:
    model = target_model(dtype=torch.bfloat16)
    with undisturbed(model):
        before = structure(model)
        with pytest.raises(KeyError), frontier(view_of(model), 2, trainable, final_norm=True) as parameters:
            parameters[0].grad = torch.ones_like(parameters[0])
            raise KeyError
        assert structure(model) == before
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "known"),
    [("llama", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"), ("gpt2", "c_attn, c_fc, c_proj")],
)
@pytest.mark.parametrize("modules", [("up_projj",), ("mlp",), ("input_layernorm", "ln_1"), ("act_fn",)])
def test_names_that_match_no_linear_module_are_refused(architecture: str, known: str, modules: tuple[str, ...]) -> None:
    model = target_model(architecture)
    before = structure(model)
    with pytest.raises(SemalignError, match="layer 2 has no linear module named") as caught:
        with frontier(view_of(model), 2, LoraLayer(modules=modules), final_norm=False):
            pytest.fail("the block must not run")
    message = str(caught.value)
    assert all(name in message for name in modules) and message.endswith(known)
    assert structure(model) == before
    for name in known.split(", "):  # what the message names is taken
        with undisturbed(model), frontier(view_of(model), 2, LoraLayer(modules=(name,)), final_norm=False):
            pass


def test_the_same_adapter_starts_the_same_and_leaves_the_random_state() -> None:
    starts = []
    for _ in range(2):
        model = target_model()
        torch.manual_seed(len(starts))
        state = torch.get_rng_state()
        with undisturbed(model), frontier(view_of(model), 2, LORA, final_norm=False) as parameters:
            starts.append([parameter.detach().clone() for parameter in parameters])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
