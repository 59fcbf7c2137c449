"""The likeness of layers before and after a transfer is linear CKA on held-out rows."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from semalign_align import Supervision
from semalign_attribution import DecoderView, LayerPairing
from semalign_geometry import linear_cka
from semalign_geometry.base import SemalignError
from semalign_harness.cli.main import main
from semalign_harness.results.similarity import LayerSimilarity
from semalign_harness.results.source_phase import SourcePhase
from semalign_harness.run import similarity
from semalign_harness.run.similarity import compare_layers, similarity_matrix
from semalign_harness.run.source_phase import contributions
from transformers import AutoModelForCausalLM


def test_a_run_compares_its_layers_with_the_sources(
    tmp_path: Path, overrides: list[str], pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = tmp_path / "run", [*overrides, "measure.answer_rows=0", "transport.frame=none"]
    assert main(["run", "tiny", *settings, "--quiet", "--out", str(run)]) == 0
    found = LayerSimilarity.read(run / "similarity.json")
    pairing = LayerPairing.read(run / "pairing.json")
    assert list(found.source_layers) == sorted(set(pairing.source_layers))
    held_out = Supervision.open(Path(SourcePhase.read(run / "supervision.json").folder) / "held_out")
    assert found.tokens == held_out.manifest.supervised_tokens

    def added(model: Path, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        view = DecoderView(AutoModelForCausalLM.from_pretrained(model))
        return contributions(view, [held_out.tokens([row]) for row in range(len(held_out))], layers)

    source = added(pair[0], found.source_layers)
    for model, matrix in ((pair[1], found.before), (run / "model", found.after)):
        target = added(model, range(1, pairing.target_depth + 1))
        exact = [[float(linear_cka(mine, theirs)) for theirs in source.values()] for mine in target.values()]
        torch.testing.assert_close(torch.tensor(matrix), torch.tensor(exact), rtol=1e-4, atol=1e-5)
    assert found.before != found.after

    monkeypatch.setattr(similarity, "TOKENS", 10)
    tokens, matrix = compare_layers(DecoderView(AutoModelForCausalLM.from_pretrained(pair[1])), held_out)
    assert 5 <= tokens <= 10 and len(matrix) == pairing.target_depth


@pytest.mark.parametrize(("role", "layer"), [("target", 2), ("source", 5)])
def test_a_layer_that_is_not_finite_is_named_and_not_like_none(role: str, layer: int) -> None:
    sides = {"target": {k: torch.randn(6, 3) for k in (1, 2)}, "source": {k: torch.randn(6, 4) for k in (3, 5)}}
    sides[role][layer][4, 0] = torch.inf
    with pytest.raises(SemalignError, match=f"layer {layer} of the {role} adds values that are not finite"):
        similarity_matrix(sides["target"], sides["source"])
