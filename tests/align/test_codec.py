"""Rounding of residuals: the error of int8 is bounded by its scale, and the manifest states it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_align import SupervisionSettings, TopK
from semalign_align._codec import decode_residual, encode_residual

from .chain import TARGET_DEPTH, make_store, source_model, target_model, tokens_of


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 5),
    width=st.integers(1, 9),
    exponent=st.integers(-30, 30),
    zeros=st.booleans(),
)
def test_int8_is_off_by_half_a_scale_at_most(seed: int, tokens: int, width: int, exponent: int, zeros: bool) -> None:
    vectors = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    if zeros:
        vectors[0] = 0
    stored = encode_residual(vectors, 3, "int8")
    assert stored["residual.3"].dtype == torch.int8 and int(stored["residual.3"].abs().max()) <= 127
    half = vectors.abs().amax(1, keepdim=True) / 254
    restored = decode_residual(stored.__getitem__, 3, "int8")
    assert ((restored - vectors).abs() <= half * (1 + 1e-4)).all()
    again = encode_residual(restored, 3, "int8")
    assert torch.equal(again["residual.3"], stored["residual.3"]), "rounding what is rounded changes nothing"


@given(seed=st.integers(0, 2**31), factor=st.floats(0.01, 100))
def test_each_token_has_its_own_scale(seed: int, factor: float) -> None:
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    scaled = vectors * torch.tensor([[1.0], [factor], [1.0]])
    one, other = encode_residual(vectors, 3, "int8"), encode_residual(scaled, 3, "int8")
    assert torch.equal(one["residual.3"][[0, 2]], other["residual.3"][[0, 2]])
    assert int((one["residual.3"][1].int() - other["residual.3"][1].int()).abs().max()) <= 1  # ties may fall either way


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 0, 0), ("bfloat16", 1e-4, 4e-3), ("int8", 1e-3, 2e-2)])
def test_the_manifest_tells_the_error(dtype: str, low: float, high: float, tmp_path: Path) -> None:
    def make(kind: str) -> list[torch.Tensor]:
        settings = SupervisionSettings(output=TopK(k=8), dtype=kind)  # type: ignore[arg-type]
        store = make_store(source_model(), target_model(), tmp_path / kind, settings=settings)
        errors.append(store.manifest.residual_error)
        layers = {store.manifest.pairing.source_of(layer): layer for layer in range(1, TARGET_DEPTH + 1)}
        return [tokens_of(store, index, layer).float() for layer in layers.values() for index in range(len(store))]

    errors: list[float] = []
    exact, rounded = torch.cat(make("float32")), torch.cat(make(dtype)) if dtype != "float32" else None
    assert low <= errors[-1] <= high
    if rounded is not None:
        found = float((rounded - exact).norm() / exact.norm())
        assert errors[-1] == pytest.approx(found, rel=1e-3)


def test_int8_takes_half_of_bfloat16(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("bfloat16", "int8"):
        settings = SupervisionSettings(output=TopK(k=1), dtype=dtype)  # type: ignore[arg-type]
        store = make_store(source_model(), target_model(), tmp_path / dtype, settings=settings)
        shard = store._shards[0]
        sizes[dtype] = sum(shard.get_tensor(key).nbytes for key in shard.keys() if key.startswith("residual."))  # noqa: SIM118
    assert sizes["int8"] / sizes["bfloat16"] == pytest.approx(0.5 + 2 / 32)  # a scale of four bytes for 32 numbers
