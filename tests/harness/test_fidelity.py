"""A run measures what every frame keeps, and trains by its own as if there were no other."""

from pathlib import Path

import pytest
import torch
from semalign_geometry import (
    FRAMES,
    FidelityReport,
    PairedResiduals,
    SemanticBasis,
    Transport,
    fit_transport,
    measure_fidelity,
)
from semalign_harness import load_experiment, run_experiment
from semalign_harness.results.fidelity import RunFidelity
from semalign_harness.run import fidelity
from semalign_harness.run.fidelity import fit_and_measure
from semalign_harness.util.console import Console

QUIET = Console(quiet=True)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(
    ("rank", "gain", "fold_gain"), [(8, 1.0, False), (8, 0.5, True), (5, 1.0, False), (8, 0.0, True)]
)
def test_fidelity_is_that_of_the_plain_route(frame: str, rank: int, gain: float, fold_gain: bool) -> None:
    """Where the head, or the gain, closes a direction, recomposition is not exact by any frame."""
    generator = torch.Generator().manual_seed(0)
    deep = torch.randn(40, rank, generator=generator) @ torch.randn(rank, 8, generator=generator)
    heads = [deep, torch.randn(40, 6, generator=generator)]
    gains = [torch.ones(len(head[0])).index_fill_(0, torch.tensor([2]), gain) for head in heads]
    source, target = (SemanticBasis.from_head(head, gain=each) for head, each in zip(heads, gains, strict=True))
    pairs = [
        PairedResiduals(k, k, *(torch.randn(9, width, generator=generator) for width in (6, 8))) for k in (1, 2, 3)
    ]
    transport, report = fit_and_measure(pairs, source, target, frame, fold_gain=fold_gain, console=QUIET)
    plain, within = (fit_transport(source, to, frame=frame, fold_gain=fold_gain) for to in (target, source))
    assert torch.equal(transport.matrix, plain.matrix) and transport.manifest == plain.manifest
    wanted = measure_fidelity(pairs, transport=plain, within_source=within)
    for mine, yours in zip(report.layers, wanted.layers, strict=True):
        assert mine.model_dump() == pytest.approx(yours.model_dump(), abs=1e-5)
    exact = frame != "cosine" and rank == 8 and gain > 0
    assert (min(layer.recomposition_cosine for layer in report.layers) > 0.9999) == exact


def supervised(folder: Path, overrides: list[str], *more: str) -> RunFidelity:
    """The fidelity of a run that ends when the source's part is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semalign_harness.run.pipeline.measured", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(load_experiment("tiny", overrides=[*overrides, *more]), folder)
    return RunFidelity.read(folder / "fidelity.json")


def interrupted(*arguments: object, **more: object) -> None:
    raise KeyboardInterrupt


def test_a_run_measures_every_frame_and_keeps_its_own(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[tuple[str, bool]] = []

    def fit(source: SemanticBasis, target: SemanticBasis, *, frame: str, fold_gain: bool) -> Transport:
        fitted.append((frame, source is target))
        return fit_transport(source, target, frame=frame, fold_gain=fold_gain)

    monkeypatch.setattr(fidelity, "fit_transport", fit)
    found = supervised(tmp_path / "parseval", overrides)
    assert fitted == [("parseval", False), ("cosine", False), ("cosine", True), ("dual", False)], "each once"
    assert [report.frame for report in (found, *found.others)] == ["parseval", "cosine", "dual"]
    (place,) = (tmp_path / "cache" / "supervision").glob("*/transport")
    assert Transport.load(place).manifest.frame == "parseval"
    assert RunFidelity.read(place.parent / "fidelity.json") == found, "for all runs that share it"

    other = supervised(tmp_path / "dual", overrides, "transport.frame=dual")
    assert [report.frame for report in (other, *other.others)] == ["dual", "cosine", "parseval"]
    assert FidelityReport(**{name: value for name, value in other if name != "others"}) == found.others[1]
    assert other.others[0] == found.others[0]


def test_a_run_without_a_transport_has_no_other_frame(overrides: list[str], tmp_path: Path) -> None:
    found = supervised(tmp_path / "none", overrides, "transport.frame=none")
    assert found.frame == "none" and found.others == ()
    for layer in found.layers:
        assert layer.cka_transported == layer.cka_direct and layer.recomposition_cosine == pytest.approx(1, abs=1e-5)


def test_the_fidelity_of_older_runs_is_read(tmp_path: Path) -> None:
    older = FidelityReport(frame="dual", fold_gain=True, tokens=3, layers=())
    assert RunFidelity.read(older.write(tmp_path / "fidelity.json")) == RunFidelity(**dict(older))
