"""The report: its metrics are those of the files, and HTML and Markdown hold the same tables."""

import html.parser
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from semalign_attribution import LayerPairing
from semalign_geometry import FidelityReport, LayerFidelity
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment, RunResult, load_experiment
from semalign_harness.benchmarks import find_benchmark
from semalign_harness.cli.main import main
from semalign_harness.comparison import Comparison, ComparisonConfig
from semalign_harness.data.settings import RowsConfig
from semalign_harness.evaluation import BenchmarkResult, EvaluationConfig, EvaluationResult, ItemRecord, read_evaluation
from semalign_harness.models.settings import ModelConfig
from semalign_harness.report import _page as page_parts
from semalign_harness.report import report_run, write_report
from semalign_harness.report._evaluations import QUESTION, benchmark_blocks, example_blocks
from semalign_harness.report._protocol import experiment_facts
from semalign_harness.report._read import ROLES
from semalign_harness.report.plots import (
    Dot,
    Line,
    Panel,
    _thinned,
    draw_before_and_after,
    draw_dots,
    draw_fidelity,
    draw_similarity,
)
from semalign_harness.results.comparison import Benchmarks, ComparedMetric, MethodMetric, MethodResult
from semalign_harness.results.fidelity import RunFidelity
from semalign_harness.results.similarity import LayerSimilarity
from semalign_harness.statistics import (
    Estimate,
    across_seeds,
    chance,
    compare_values,
    estimate_gap_recovered,
    mean,
    proportion,
)
from semalign_harness.util.console import Console

Table = list[list[str]]
NASTY = 'a<script>alert("x")</script> & b|c *d* `e` _f_ $g$ [h](i) &amp;'
VOID = {"meta", "br", "path", "image", "use", "rect"}


class Parsed(html.parser.HTMLParser):
    """A page, read strictly: every element that is opened is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.headings: list[str] = []
        self.tables: list[Table] = []
        self.captions: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "br":
            self.handle_data("; ")
        elif tag == "h2":
            self.headings.append("")
        elif tag == "figcaption":
            self.captions.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif "h2" in self.open:
            self.headings[-1] += data
        elif "figcaption" in self.open:
            self.captions[-1] += data


def markdown_tables(text: str) -> list[Table]:
    """The tables outside of fences, their escapes undone."""
    outside = re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", text)
    blocks = re.findall(r"(?m)(?:^\|.*\|\n)+", outside)
    return [
        [
            [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for place, line in enumerate(block.splitlines())
            if place != 1
        ]
        for block in blocks
    ]


def parsed(file: Path) -> Parsed:
    return Parsed(file.read_text(encoding="utf-8"))


def tables(file: Path) -> list[Table]:
    """The tables of a report, which its two files have alike."""
    page = parsed(file)
    assert page.tables == markdown_tables(file.with_suffix(".md").read_text(encoding="utf-8"))
    return page.tables


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(file.read_text(encoding="utf-8"))
    change(tree)
    file.write_text(json.dumps(tree), encoding="utf-8")


@pytest.fixture(scope="module")
def finished(pair: tuple[Path, Path], rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a run can leave behind."""
    folder = tmp_path_factory.mktemp("finished")
    overrides = [
        f"source.path={pair[0]}",
        f"target.path={pair[1]}",
        f"data.train.path={rows_file}",
        "data.held_out=null",
        "data.train_rows=16",
        "data.held_out_rows=8",
        "data.attribution_rows=4",
        "scorer.kind=similarity",
        "pairing.kind=similarity",
        "train.steps=2",
        "train.batch_size=8",
        "train.micro_batch_size=8",
        "method.rollback=0",
        "measure.answer_rows=8",
        "measure.max_new_tokens=4",
        "batch_size=8",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMALIGN_CACHE", str(folder / "cache"))
        assert main(["run", "tiny", *overrides, "--quiet", "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to change."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report.*"))
    return tmp_path / "run"


@pytest.fixture
def bare(run: Path) -> Path:
    """The copy without the files of most plots, which take time."""
    for name in ("attribution.json", "fidelity.json", "similarity.json", "metrics.jsonl"):
        (run / name).unlink()
    return run


def write_evaluation(folder: Path, path: str, digest: str, outcomes: Sequence[bool], output: str = "It is 3.") -> Path:
    folder.mkdir(parents=True)
    items = [
        ItemRecord(
            index=5 * place,
            prompt=f"How many <b>apples</b> & pears, {place}?",
            output=output,
            extracted="3",
            correct=right,
            other={},
            seconds=1,
            batch=2,
        )
        for place, right in enumerate(outcomes)
    ]
    result = BenchmarkResult(
        protocol=find_benchmark("gsm8k").protocol(chat=False),
        documents=1319,
        documents_sha256="ab" * 32,
        headline=proportion(outcomes),
        other={},
        bits_per_byte=None,
        kl=None,
        agreement=None,
        reasons={},
        truncated=0,
        seconds=9,
    )
    (folder / "items-gsm8k.jsonl").write_text("".join(item.model_dump_json() + "\n" for item in items), "utf-8")
    EvaluationResult(
        config=EvaluationConfig(model=ModelConfig(path=path), tasks=("gsm8k",)),
        model_sha256=digest,
        source_sha256=None,
        chat=False,
        dtype="float32",
        sandbox=None,
        packages={},
        benchmarks={"gsm8k": result},
    ).write(folder / "evaluation.json")
    return folder


OUTCOMES = {
    "source": [True, True, True, True, False, True, True, True],
    "before": [False, True, False, False, False, True, True, False],
    "after": [True, False, False, True, False, True, True, True],
}
"""Documents 0, 3 and 7 are gained, 1 is lost, 2 is still missed."""


def write_evaluations(run: Path, folder: Path, **more: Any) -> list[Path]:
    digests = json.loads((run / "environment.json").read_text(encoding="utf-8"))["models"]
    models = {"source": ("source", digests[0]), "before": ("target", digests[1]), "after": (str(run / "model"), "cd")}
    return [write_evaluation(folder / name, *models[name], OUTCOMES[name], **more) for name in OUTCOMES]


def test_a_run_ends_with_a_report_in_one_file(finished: Path) -> None:
    page = parsed(finished / "report.html")
    assert page.headings == ["Result", "Layers", "Training", "Benchmarks", "Entries", "Cost", "Protocol"]
    assert page.tags.count("figure") == page.tags.count("svg") == len(page.captions) == 6
    assert all(caption.strip() for caption in page.captions)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in links)
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)|https?://", text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', text)) == set(ids), (
        "every id is referred to, and none is missing"
    )
    assert len(text) < 200_000


def test_the_first_table_is_the_result(finished: Path) -> None:
    result = RunResult.read(finished / "result.json")
    header, *rows = tables(finished / "report.html")[0]
    assert header == ["", "source", "target before", "target after", "gap recovered"]
    names = ("answer_nll", "bits_per_byte", "kl", "agreement", "accuracy")
    assert len(rows) == len(names)
    for row, name, form in zip(rows, names, (*["{:.4f}"] * 3, *["{:.1%}"] * 2), strict=True):
        for cell, measured in zip(row[1:4], (result.source, result.before, result.after), strict=True):
            assert cell.split(" ")[0] == form.format(getattr(measured, name)), row
    before = mean(result.before.by_row.nll, weights=result.before.by_row.tokens)
    assert rows[0][2].endswith(f" [{before.low:.4f}, {before.high:.4f}]")
    right = proportion(result.after.by_row.correct)
    assert rows[4][3].endswith(f" [{right.low:.1%}, {right.high:.1%}]")
    assert rows[2][1] == "0.0000" and rows[3][1] == "100.0%", "by definition: no interval"
    gap = estimate_gap_recovered(
        *(each.by_row.nll for each in (result.source, result.before, result.after)),
        weights=result.before.by_row.tokens,
        seed=0,
    )
    ends = "unbounded" if gap.low is None else f"{gap.low:.0%}, {gap.high:.0%}"
    assert rows[0][4] == f"{gap.value:.0%} [{ends}]"


def test_layers_are_those_of_the_files(finished: Path) -> None:
    header, *rows = tables(finished / "report.html")[1]
    pairing, scores, fidelity = (
        json.loads((finished / f"{name}.json").read_text()) for name in ("pairing", "attribution", "fidelity")
    )
    stages = RunResult.read(finished / "result.json").training.transfer
    assert stages is not None
    assert [row[:2] for row in rows] == [[str(k), str(layer)] for k, layer in enumerate(pairing["source_layers"], 1)]
    for row, layer, stage in zip(rows, fidelity["layers"], stages.stages, strict=True):
        cells = dict(zip(header, row, strict=True))
        assert cells["score"].startswith(f"{scores['mean'][layer['source_layer'] - 1]:#.4g} ±")
        assert cells["CKA, no transport"] == f"{layer['cka_direct']:.3f}"
        assert cells["CKA, parseval"] == f"{layer['cka_transported']:.3f}"
        assert cells["recomposition"] == f"{layer['recomposition_cosine']:.3f}"
        for other in fidelity["others"]:
            (of,) = (each for each in other["layers"] if each["target_layer"] == layer["target_layer"])
            assert cells[f"CKA, {other['frame']}"] == f"{of['cka_transported']:.3f}" != cells["CKA, parseval"]
        first, last = stage.first_losses["output"], stage.last_losses["output"]
        assert cells["output, first → last step"] == f"{first:.4f} → {last:.4f}"
        assert stage.held_out is not None
        assert cells["held-out loss"].startswith(f"{stage.held_out[0]:.4f} → {stage.held_out[1]:.4f}")


def test_a_run_that_measured_its_own_frame_alone_is_reported(finished: Path, run: Path) -> None:
    """As runs did once, and as they do without a transport."""
    whole = parsed(finished / "report.html")
    assert {"CKA, parseval", "CKA, cosine", "CKA, dual"} < set(whole.tables[1][0])
    assert "by each frame (full line: parseval, the run's)" in whole.captions[3]
    assert "recomposition by parseval: cosine" in whole.captions[3]
    edit(run / "fidelity.json", lambda tree: tree.pop("others"))
    file = write_report([run])
    header = tables(file)[1][0]
    assert header[3:6] == ["CKA, no transport", "CKA, parseval", "recomposition"]
    page = parsed(file)
    assert not re.search("cosine frame|CKA, (cosine|dual)|each frame", page.text)
    tokens = json.loads((run / "fidelity.json").read_text(encoding="utf-8"))["tokens"]
    assert page.captions[3].startswith(f"CKA: geometry that paired layers share before training, over {tokens} tokens")


def test_frames_differ_by_colour_line_and_marker() -> None:
    def report(frame: str) -> FidelityReport:
        layers = tuple(
            LayerFidelity(
                target_layer=k, source_layer=k, recomposition_cosine=1.0, cka_transported=0.5, cka_direct=0.1 * k
            )
            for k in (1, 2, 3)
        )
        return FidelityReport(frame=frame, fold_gain=True, tokens=9, layers=layers)

    others = tuple(report(frame) for frame in ("cosine", "dual", "parseval"))
    svg = draw_fidelity(RunFidelity(**dict(report("between")), others=others))
    assert ">CKA or cosine</text>" in svg and ">target layer</text>" in svg
    named = re.findall(r">(CKA, [\w ]+|recomposition)</text>", svg)
    frames = ("no transport", "between", "cosine", "dual", "parseval")
    assert named == [*(f"CKA, {frame}" for frame in frames), "recomposition"]
    # In the legend, where nothing is clipped.
    line = r'\n" style="fill: none; (?:stroke-dasharray: ([\d.,]+); stroke-dashoffset: 0; )?stroke: var\(--(\w+)\); '
    found = re.findall(line + r"stroke-width: (1\.3|0\.9)", svg)
    assert len(found) == len({(dashes, colour) for dashes, colour, _ in found}) == 6
    assert found[1] == ("", "blue", "1.3") and [width for _, _, width in found[2:5]] == ["0.9"] * 3
    assert [dashes for dashes, _, _ in found].count("") == 1, "the run's own line alone is full"
    shapes = dict(re.findall(r'<path id="(\w+)" d="([^"]+)"', svg))
    markers = re.findall(r'href="#(\w+)"[^>]*style="(?![^"]*stroke-width)', svg)
    assert len({shapes[marker] for marker in markers}) == 6
    assert svg == draw_fidelity(RunFidelity(**dict(report("between")), others=others))


@pytest.mark.parametrize("method", [{"kind": kind} for kind in ("kd", "sft", "seeking", "laten")])
def test_of_methods_without_layers_only_the_comparison_is_shown(method: dict[str, Any], run: Path) -> None:
    trained_by(run, method)
    file = write_report([run])
    page = parsed(file)
    assert page.headings == ["Result", "Layers", "Training", "Benchmarks", "Entries", "Cost", "Protocol"]
    (layers, losses) = page.captions
    tokens = LayerSimilarity.read(run / "similarity.json").tokens
    assert layers == (
        "Linear CKA of the contributions of target layers and source layers, before and after training, over "
        f"{tokens:,} held-out tokens; 1: the same geometry."
    )
    similarity = LayerSimilarity.read(run / "similarity.json")
    assert draw_before_and_after(similarity, None) in file.read_text(encoding="utf-8"), "without dots"
    assert losses.startswith("Terms of the loss, each step on its own batch")
    assert len(tables(file)) == 2, "nothing layer by layer"
    assert not re.search(r"[Ss]tability|pairing,|paired|recomposition|score", page.text.partition("To repeat it")[0])
    assert ("supervision on disk" in page.text) == (method["kind"] == "kd"), "which others do without"


def test_of_a_method_that_pairs_layers_the_pairing_is_shown(run: Path) -> None:
    trained_by(run, {"kind": "hidden"})
    page = parsed(write_report([run]))
    assert [caption.partition(":")[0].partition(" of ")[0] for caption in page.captions] == [
        "Bars",
        "Linear CKA",
        "Linear CKA",
        "Terms",
    ]
    assert "Dots: the pairing, on average" in page.captions[2] and "Stability of the ranking" in page.text
    assert page.tables[1][0] == ["target layer", "source layer", "score"], "nothing is transported"


def trained_by(run: Path, method: dict[str, Any]) -> None:
    edit(run / "experiment.json", lambda tree: tree.update(method=method))
    edit(run / "result.json", lambda tree: tree["training"].update(method=method["kind"], transfer=None))


def test_captions_hold_what_plots_alone_do_not(finished: Path) -> None:
    captions = parsed(finished / "report.html").captions
    pairing, found = (json.loads((finished / f"{name}.json").read_text()) for name in ("pairing", "similarity"))
    places = [found["source_layers"].index(layer) for layer in pairing["source_layers"]]
    before, after = (
        sum(row[place] for row, place in zip(found[when], places, strict=True)) / len(places)
        for when in ("before", "after")
    )
    (layers,) = (caption for caption in captions if "before and after training" in caption)
    assert f"on average {before:.3f} before and {after:.3f} after" in layers and before != after
    assert layers.endswith(" Blank: source layers without a pair.") == (len(found["source_layers"]) < 4)
    (losses,) = (caption for caption in captions if "Terms of the loss" in caption)
    assert "relation: 1 − CKA" in losses and "output: divergence from the source" in losses and "answer" not in losses


def test_what_was_not_measured_is_told_with_its_remedy(finished: Path, bare: Path) -> None:
    def without(tree: dict[str, Any]) -> None:
        for stage in tree["training"]["transfer"]["stages"]:
            stage["held_out"] = None

    assert "was not measured" not in parsed(finished / "report.html").text
    edit(bare / "result.json", without)
    page = parsed(write_report([bare]))
    assert "was not measured stage by stage; method.rollback=0.05 measures it" in page.text
    source = Experiment.read(bare / "experiment.json").source.path
    assert f"semalign evaluate {source} --limit 200 --out {bare / 'evaluation-source'}" in page.text
    edit(bare / "experiment.json", lambda tree: tree["source"].update(path="generated:tiny-source"))
    assert "semalign evaluate" not in parsed(write_report([bare])).text, "it can solve no benchmark"


def test_the_same_run_gives_the_same_report(finished: Path, tmp_path: Path) -> None:
    again = write_report([finished], tmp_path / "again.html")
    for suffix in (".html", ".md"):
        assert again.with_suffix(suffix).read_bytes() == (finished / "report").with_suffix(suffix).read_bytes()


def test_the_command_repeats_the_experiment(finished: Path) -> None:
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert f"semalign run {finished / 'experiment.json'}" in text
    assert load_experiment(finished / "experiment.json") == Experiment.read(finished / "experiment.json")


def test_special_characters_are_text(run: Path) -> None:
    edit(run / "experiment.json", lambda tree: tree["source"].update(path=NASTY))
    edit(run / "environment.json", lambda tree: tree.update(platform=NASTY))
    edit(run / "attribution.json", lambda tree: tree.update(scorer=NASTY))
    edit(run / "fidelity.json", lambda tree: tree.update(frame="<i>&|"))
    file = write_report([run])
    page = parsed(file)
    assert "script" not in page.tags and "i" not in page.tags
    assert page.text.count(NASTY) >= 4 and "CKA, <i>&|" in page.text
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    escaped = r'a\<script\>alert("x")\</script\> & b\|c \*d\* \`e\` \_f\_ \$g\$ [h\](i) \&amp;'
    assert text.count(escaped) == 2 and tables(file)[1][0][4] == "CKA, <i>&|"


def test_sections_without_data_are_left_out(run: Path) -> None:
    for name in ("attribution", "pairing", "fidelity", "similarity", "environment"):
        (run / f"{name}.json").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "entries.json").unlink()
    shutil.rmtree(run / "model")

    def plain(tree: dict[str, Any]) -> None:
        tree["training"]["transfer"] = None
        for name in ("source", "before", "after"):
            for key in ("accuracy", "answer_rows", "bits_per_byte", "spans"):  # not in results of earlier versions
                del tree[name][key]
            del tree[name]["by_row"]["correct"], tree[name]["by_row"]["answer_bytes"]

    edit(run / "result.json", plain)
    file = write_report([run])
    page = parsed(file)
    assert page.headings == ["Result", "Cost", "Protocol"]
    assert "svg" not in page.tags and len(tables(file)) == 1 and len(page.tables[0]) == 4
    assert not re.search(r"generated answer|exact answers, before|trained target on disk|hash of", page.text)
    (heading,) = re.findall(r"(?m)^# .*", file.with_suffix(".md").read_text(encoding="utf-8"))
    assert heading == "# tiny"


def test_a_single_row_bounds_nothing(bare: Path) -> None:
    def one_row(tree: dict[str, Any]) -> None:
        for name in ("source", "before", "after"):
            tree[name]["by_row"] = {key: values[:1] for key, values in tree[name]["by_row"].items()}

    edit(bare / "result.json", one_row)
    rows = tables(write_report([bare]))[0]
    assert rows[1][2].endswith("[unbounded]") and rows[1][4].endswith("[unbounded]")


def test_losses_that_are_not_finite_have_no_interval(run: Path) -> None:
    def diverged(tree: dict[str, Any]) -> None:
        tree["after"].update(answer_nll="NaN", kl="Infinity")
        tree["after"]["by_row"].update(nll=["NaN"] * 8, kl=["Infinity"] * 8)

    edit(run / "result.json", diverged)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[0] = re.sub(r'"output":[^},]+', '"output":"NaN"', lines[0], count=1)
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = tables(write_report([run]))[0]
    assert rows[1][3:] == ["nan", "–"] and rows[3][3:] == ["inf", "–"]


def test_commands_say_whether_prompts_go_through_the_template(bare: Path, comparison: Path) -> None:
    write_evaluation(bare / "evaluation", str(bare / "model"), "cd", OUTCOMES["after"])
    edit(bare / "evaluation" / "evaluation.json", lambda tree: tree["config"].update(chat=False))
    assert "--seed 0 --tasks gsm8k --plain --out" in parsed(write_report([bare])).text
    edit(
        comparison / "comparison.json",
        lambda tree: tree["config"]["benchmarks"].update(chat=True, allow_weak_sandbox=True),
    )
    assert "--limit 8 --chat --allow-weak-sandbox sft:" in parsed(write_report([comparison])).text


def test_an_evaluation_in_the_run_is_reported(bare: Path) -> None:
    write_evaluation(bare / "evaluation", str(bare / "model"), "cd", OUTCOMES["after"])
    file = write_report([bare])
    page = parsed(file)
    assert page.headings == ["Result", "Layers", "Training", "Benchmarks", "Entries", "Cost", "Protocol"]
    figure = proportion(OUTCOMES["after"])
    cell = f"{figure.value:.1%} [{figure.low:.1%}, {figure.high:.1%}]"
    assert tables(file)[2] == [["benchmark ↑", "target after", "documents"], ["gsm8k accuracy", cell, "8 of 1319"]]
    assert find_benchmark("gsm8k").protocol(chat=False).extraction in page.text, "how responses were read"
    digests = json.loads((bare / "environment.json").read_text(encoding="utf-8"))["models"]
    for role, digest, outcomes in zip(("source", "target"), digests, ("source", "before"), strict=True):
        place = bare / f"evaluation-{role}"
        assert re.search(rf"semalign evaluate \S+ --seed 0 --tasks gsm8k --out {place}\n", page.text)
        write_evaluation(place, role, digest, OUTCOMES[outcomes])
    assert f"semalign report {bare}\n" in page.text
    page = parsed(write_report([bare]))
    assert page.tables[2][0][1:4] == ["source", "target before", "target after"]
    assert "semalign evaluate" not in page.text and "Examples" in page.headings


def test_evaluations_of_its_models_belong_to_a_run(bare: Path, tmp_path: Path) -> None:
    evaluations = write_evaluations(bare, tmp_path, output="```\nIt is <3>.\n```")
    file = write_report([evaluations[2], bare, *evaluations[:2]])
    header, row = tables(file)[2]
    assert header[1:4] == ["source", "target before", "target after"]
    assert [cell.split(" ")[0] for cell in row[1:4]] == ["87.5%", "37.5%", "62.5%"]
    assert row[4].startswith("+25.0% [") and row[5].startswith("50% [")
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    titles = re.findall(r"(?m)^### gsm8k, document (\d+): (.*) \((.*) of this kind\)", text)
    assert titles == [
        ("0", "gained", "3 documents"),
        ("15", "gained", "3 documents"),
        ("5", "lost", "1 document"),
        ("10", "still missed, the source has it", "1 document"),
    ]
    assert "````\n```\nIt is <3>.\n```\n````" in text, "a fence that the answer does not close"
    page = parsed(file)
    assert "Examples" in page.headings and "It is <3>." in page.text and "b" not in page.tags


def test_documents_that_differ_are_no_examples(bare: Path, tmp_path: Path) -> None:
    evaluations = write_evaluations(bare, tmp_path)
    edit(
        evaluations[0] / "evaluation.json",
        lambda tree: tree["benchmarks"]["gsm8k"].update(documents=99, documents_sha256="other"),
    )
    found = {role: read_evaluation(place) for role, place in zip(ROLES, evaluations, strict=True)}
    assert example_blocks(found) == []
    del found["target before"]
    blocks = benchmark_blocks({role: each.result for role, each in found.items()})
    (table,) = [block for block in blocks if isinstance(block, page_parts.Table)]
    assert (
        page_parts.Text("Documents or prompts differ between the models: these values do not compare directly.")
        in blocks
    )
    assert table.rows[0][-1] == "8 of 99, 8 of 1319"


def test_commands_load_a_model_as_the_run_did(bare: Path) -> None:
    write_evaluation(bare / "evaluation", str(bare / "model"), "cd", OUTCOMES["after"])
    edit(bare / "evaluation" / "evaluation.json", lambda tree: tree["config"].update(allow_weak_sandbox=True))
    edit(bare / "experiment.json", lambda tree: tree["source"].update(revision="abc", load_in_4bit=True))
    words = "--allow-weak-sandbox 'model.revision=\"abc\"' model.load_in_4bit=true --out "
    assert words + str(bare / "evaluation-source") in parsed(write_report([bare])).text


def test_rows_for_tuning_are_no_held_out_rows(bare: Path) -> None:
    experiment = Experiment.read(bare / "experiment.json")
    data = experiment.data.model_copy(update={"held_out": RowsConfig(path="held-out.jsonl")})
    for measure_on, words in (("held_out", "held-out.jsonl,"), ("tuning", "others of these,")):
        told = experiment.model_copy(update={"data": data.model_copy(update={"measure_on": measure_on})})
        assert dict(experiment_facts(told))["held-out rows"].startswith(words)


def test_long_questions_are_cut(bare: Path, tmp_path: Path) -> None:
    evaluations = write_evaluations(bare, tmp_path)
    for folder in evaluations:
        items = (folder / "items-gsm8k.jsonl").read_text(encoding="utf-8")
        (folder / "items-gsm8k.jsonl").write_text(items.replace("How many", "x" * 2 * QUESTION), encoding="utf-8")
    page = parsed(write_report([bare, *evaluations]))
    assert "\n[…]\n" in page.text and "x" * QUESTION not in page.text


def test_runs_stand_side_by_side(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    edit(other / "experiment.json", lambda tree: tree["train"].update(learning_rate=0.5))
    edit(other / "experiment.json", lambda tree: tree.update(pairing={"kind": "manual", "layers": [1, 1, 4]}))
    edit(other / "result.json", lambda tree: tree.update(name="other <b>"))
    write_evaluation(other / "evaluation", "model", "cd", OUTCOMES["after"])
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "out" / "two.html")]) == 0
    assert "two.html" in capsys.readouterr().out
    file = tmp_path / "out" / "two.html"
    result, before, settings, benchmarks, cost = tables(file)
    names = ["", "tiny", "other <b>"]
    assert all(table[0] == names for table in (result, before, settings, cost))
    assert benchmarks[0] == ["benchmark ↑", *names[1:], "documents"]
    measured = RunResult.read(run / "result.json")
    assert result[1][1].startswith(f"{measured.after.answer_nll:.4f} [") and result[1][1] == result[1][2]
    assert before[1][1].startswith(f"{measured.before.answer_nll:.4f} [")
    shown = "objective relation, divergence forward, trainable full, rollback 0.0"
    assert {row[0]: row[1:] for row in settings[1:]} == {
        "method": [f"semalign: {shown}, parseval frame, {pairing} pairing" for pairing in ("similarity", "manual")],
        "pairing.kind": ["similarity", "manual"],
        "pairing.depth_weight": [
            str(json.loads((run / "experiment.json").read_text())["pairing"]["depth_weight"]),
            "–",
        ],
        "pairing.layers": ["–", "1, 1, 4"],
        "train.learning_rate": ["0.003", "0.5"],
    }
    assert benchmarks[1][:2] == ["gsm8k accuracy", "–"] and benchmarks[1][3] == "8 of 1319"
    assert dict((row[0], row[1]) for row in cost[1:])["training"] == f"{measured.training.seconds:.1f} s"
    page = parsed(file)
    assert page.headings == ["Result", "Settings that differ", "Plots", "Benchmarks", "Cost", "Protocol"]
    assert "do not compare directly" not in page.text and page.tags.count("svg") == 6
    assert not (run / "report.html").exists()


def test_runs_of_one_experiment_differ_in_nothing(bare: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bare, tmp_path / "other")
    file = write_report([bare, other], tmp_path / "two.html")
    assert tables(file)[0][0] == ["", "run", "other"], "named by their folders, as their names are the same"
    assert "the runs repeat one experiment" in parsed(file).text


def test_a_method_is_described_by_its_settings(bare: Path) -> None:
    edit(bare / "experiment.json", lambda tree: tree.update(method={"kind": "kd", "answer": 0.25}))
    found = re.search(r"method\n?kd: (.*)", parsed(write_report([bare])).text)
    assert found is not None and {"trainable lora", "answer 0.25"} <= set(found[1].split(", "))


def test_runs_on_other_rows_are_told(bare: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bare, tmp_path / "other")

    def fewer(tree: dict[str, Any]) -> None:
        for name in ("source", "before", "after"):
            tree[name]["by_row"] = {key: values[:7] for key, values in tree[name]["by_row"].items()}

    edit(other / "result.json", fewer)
    assert "do not compare directly" in parsed(write_report([bare, other], tmp_path / "two.html")).text


@pytest.fixture
def comparison(run: Path, tmp_path: Path) -> Path:
    """The folder of a comparison: two methods, one without figures, one benchmark, two seeds."""
    experiment = Experiment.read(run / "experiment.json")
    columns = {"source": [0.1, 0.2, 0.1, 0.3, 0.1, 0.2], "before": [2.0, 1.0, 1.5, 1.2, 1.9, 1.1]}
    methods = {"semalign": [1.0, 0.7, 0.9, 0.8, 1.1, 0.4], "sft": [1.3, 0.8, 1.2, 0.9, 1.4, 0.9]}
    figures = {
        name: {
            "KL": MethodMetric(
                estimate=mean(values),
                over_seeds=across_seeds([mean(values).value, mean(values).value + 0.125]),
                gap=estimate_gap_recovered(columns["source"], columns["before"], values, seed=0),
                versus_rival=None if name == "sft" else compare_values(values, methods["sft"], seed=0),
            ),
            "gsm8k": MethodMetric(
                estimate=proportion(OUTCOMES["after"]),
                over_seeds=across_seeds([0.5, 0.75]),
                gap=estimate_gap_recovered(*(8 * outcomes for outcomes in OUTCOMES.values()), seed=0),
                versus_rival=None,
            ),
        }
        for name, values in methods.items()
    }
    estimates: dict[str, Estimate] = {key: mean(values) for key, values in columns.items()}
    shares = {key: proportion(OUTCOMES[key]) for key in columns}
    folder = tmp_path / "comparison"
    write_evaluations(run, tmp_path / "evaluations")
    for name, place in (
        ("source", "evaluation-source"),
        ("before", "evaluation-target"),
        ("after", "runs/semalign_seed-3/evaluation"),
    ):
        shutil.copytree(tmp_path / "evaluations" / name, folder / place)
    Comparison(
        config=ComparisonConfig(
            experiment=experiment,
            methods={"semalign": (), "sft": ("train.learning_rate=0.5",), "kd": ()},
            seeds=(3, 4),
            benchmarks=Benchmarks(tasks=("gsm8k",), limit=8),
        ),
        metrics={
            "KL": ComparedMetric(lower_is_better=True, percent=False, items=6, rival="sft", **estimates),
            "gsm8k": ComparedMetric(lower_is_better=False, percent=True, items=8, rival=None, **shares),
        },
        methods={
            **{
                name: MethodResult(
                    metrics=found,
                    trained_parameters=1234,
                    steps=7,
                    supervised_tokens=4321,
                    training_seconds=12.5,
                    source_seconds=2.5 * (name == "semalign"),
                    peak_bytes=9 * 10**9,
                    training_peak_bytes=3 * 10**9 if name == "semalign" else None,
                )
                for name, found in figures.items()
            },
            "kd": MethodResult(metrics={}, missing=("kd_seed-3: the disk <is> full",)),
        },
    ).write(folder / "comparison.json")
    return folder


def test_a_comparison_is_reported(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(comparison)]) == 0
    assert str(comparison / "report.html") in capsys.readouterr().out
    found = Comparison.read(comparison / "comparison.json")
    result, tests, spreads, costs = tables(comparison / "report.html")
    assert result[0] == ["", "KL ↓", "gsm8k ↑"]
    assert [row[0] for row in result[1:]] == ["source", "target before", "semalign", "sft", "kd"]
    for row in result[3:5]:
        for cell, metric in zip(row[1:], ("KL", "gsm8k"), strict=True):
            figure, form = found.methods[row[0]].metrics[metric], "{:.1%}" if metric == "gsm8k" else "{:.4f}"
            value, low, high = (
                form.format(each) for each in (figure.estimate.value, figure.estimate.low, figure.estimate.high)
            )
            gap = figure.gap
            ends = "unbounded" if gap.low is None else f"{gap.low:.0%}, {gap.high:.0%}"
            assert cell == f"{value} [{low}, {high}]; gap {gap.value:.0%} [{ends}]"
    assert result[5] == ["kd", "–", "–"]
    versus = found.methods["semalign"].metrics["KL"].versus_rival
    assert versus is not None
    assert tests[0] == ["", "KL − sft"] and tests[1][1].startswith(f"{versus.difference.value:+.4f} [")
    assert tests[1][1].endswith(f", p {versus.p_value:.3f}") and tests[2] == ["sft", "–"]
    spread = found.methods["semalign"].metrics["KL"].over_seeds
    assert spreads[1][1].startswith(f"{spread.mean:.4f} ± {spread.spread:.4f}; [")
    assert costs[1] == ["semalign", "1,234", "7", "4,321", "12.5 s", "2.5 s", "3.0 GB", "none"]
    assert costs[2][-2] == "–", "the memory of its training is not known"
    page = parsed(comparison / "report.html")
    assert page.tags.count("svg") == 2 and "kd_seed-3: the disk <is> full" in page.text
    assert page.headings[-3:] == ["Cost", "Examples", "Protocol"] and "Target after: semalign, seed 3." in page.text
    assert (
        "semalign compare experiment.yaml --methods semalign,sft,kd --seeds 3,4 --tasks gsm8k --limit 8 "
        "sft:train.learning_rate=0.5" in page.text
    )


def test_plots_are_files_too(comparison: Path, tmp_path: Path) -> None:
    assert main(["report", str(comparison), "--plots", str(tmp_path / "plots")]) == 0
    files = sorted((tmp_path / "plots").iterdir())
    page = (comparison / "report.html").read_text(encoding="utf-8")
    assert {file.name for file in files} == {f"plot-{n}.svg" for n in range(1, 1 + page.count("<figure "))} != set()
    for file in files:
        root = ElementTree.parse(file).getroot()  # whole on its own
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        named = set(re.findall(r"var\((--\w+)\)", file.read_text(encoding="utf-8")))
        assert named and named <= set(re.findall(r"(--\w+):#", root.attrib["style"]))


def test_a_file_is_no_place_for_plots(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["report", str(comparison), "--plots", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'} is a file: name a folder with --plots" in capsys.readouterr().err


def test_a_comparison_without_seeds_tests_and_evaluations_leaves_them_out(comparison: Path) -> None:
    shutil.rmtree(comparison / "evaluation-source")

    def plain(tree: dict[str, Any]) -> None:
        tree["config"].update(seeds=[3])
        tree["metrics"]["KL"].update(rival=None)

    edit(comparison / "comparison.json", plain)
    assert parsed(write_report([comparison])).headings == ["Result", "Plots", "Cost", "Protocol"]


def test_comparisons_are_reported_side_by_side(comparison: Path, tmp_path: Path) -> None:
    other = shutil.copytree(comparison, tmp_path / "other")

    def renamed(tree: dict[str, Any]) -> None:
        tree["config"]["experiment"]["name"] = "elsewhere"
        tree["config"]["methods"]["sft"] = []
        tree["methods"]["sft"]["same_as"] = "semalign"
        del tree["config"]["methods"]["kd"], tree["methods"]["kd"]
        for of in (tree["metrics"], *(found["metrics"] for found in tree["methods"].values())):
            of["agreement"] = of["KL"]  # which is left to the report of each

    edit(other / "comparison.json", renamed)
    name = Comparison.read(comparison / "comparison.json").config.experiment.name
    page = parsed(write_report([comparison, other], tmp_path / "both.html"))
    (both,) = tables(tmp_path / "both.html")
    (first, *_), (second, *_) = (tables(write_report([folder])) for folder in (comparison, other))
    assert both[0] == ["", *(f"{of}: {key}" for of in (name, "elsewhere") for key in ("KL ↓", "gsm8k ↑"))]
    assert both[1:5] == [[*one, *two[1:3]] for one, two in zip(first[1:5], second[1:5], strict=True)]
    assert both[5] == ["kd", "–", "–", "–", "–"]
    assert (
        page.text.count("source → target") == 2 and page.text.count("the same supervised tokens for every method") == 2
    )
    assert "With different overrides per comparison: sft." in page.text
    assert f"{name}, without metrics: kd_seed-3" in page.text and "elsewhere, without" not in page.text
    assert "elsewhere: sft is semalign, by the same runs." in page.text
    assert "semalign compare elsewhere.yaml --methods semalign,sft --seeds" in page.text
    assert f"# elsewhere.yaml: the experiment in {other}/comparison.json" in page.text
    kl, benchmarks = (
        figure for figure in re.findall(r"<svg.*?</svg>", (tmp_path / "both.html").read_text(), re.DOTALL)
    )
    assert kl.count(">KL ↓<") == 2 == benchmarks.count(">gsm8k ↑<") and "gsm8k" not in kl
    assert kl.count(">elsewhere<") == kl.count(">target before<") == kl.count(">semalign<") == 1


def older(value: Any) -> Any:
    """The JSON of a result as earlier versions wrote it: other keys, and a format version in every part."""
    if isinstance(value, list):
        return [older(item) for item in value]
    if not isinstance(value, dict):
        return value
    names = {"headline": "figure"} | ({"metrics": "figures"} if "missing" in value else {})
    version = {"version": 1} if {"tasks", "seeds", "standard_error", "bounded", "spread"} & value.keys() else {}
    return {names.get(key, key): older(item) for key, item in value.items()} | version


def test_results_of_earlier_versions_are_read(comparison: Path) -> None:
    now = Comparison.read(comparison / "comparison.json"), read_evaluation(comparison / "evaluation-source")
    for file, name in ((comparison / "comparison.json",) * 2, evaluation_files(comparison / "evaluation-source")):
        text = json.dumps(older(json.loads(file.read_text(encoding="utf-8"))))
        assert text.count('"version"') > 2 and '"figure' in text
        file.unlink()
        name.write_text(text, encoding="utf-8")
    assert now == (Comparison.read(comparison / "comparison.json"), read_evaluation(comparison / "evaluation-source"))
    assert "Examples" in parsed(write_report([comparison])).headings


def evaluation_files(folder: Path) -> tuple[Path, Path]:
    """The file of an evaluation, and the one that earlier versions wrote."""
    return folder / "evaluation.json", folder / "result.json"


def test_comparisons_that_agree_have_no_notes(comparison: Path, tmp_path: Path) -> None:
    other = shutil.copytree(comparison, tmp_path / "other")
    page = parsed(write_report([comparison, other], tmp_path / "both.html"))
    assert "different overrides" not in page.text and "by the same runs" not in page.text


def test_folders_that_cannot_be_reported_are_told_in_a_sentence(
    run: Path, comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "metrics.jsonl").write_text('{"layer": 1}\n', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    evaluation = tmp_path / "evaluations" / "source"
    foreign = write_evaluation(tmp_path / "foreign", "elsewhere", "ef", OUTCOMES["after"])
    again = shutil.copytree(evaluation, tmp_path / "again")
    before = sorted(tmp_path.rglob("*"))
    for folders, expected in (
        ([tmp_path / "nowhere"], "does not exist: give the folder of a finished run"),
        ([run / "result.json"], "is a file: give the folder"),
        ([tmp_path / "empty"], "holds neither experiment.json nor comparison.json"),
        ([unfinished], "is unfinished: repeat its command"),
        ([run, unfinished], "is unfinished: repeat its command"),
        ([broken], "holds a line that is no step"),
        ([evaluation], "give that run's folder too"),
        ([comparison, run], f"leave out {run}"),
        ([run, foreign], "none of the models of"),
        ([run, evaluation, again], "evaluate the same model (source)"),
        ([run, "--out", tmp_path / "report.txt"], "does not end in .html"),
    ):
        assert main(["report", *map(str, folders)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("semalign: ") and expected in line
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_report_that_fails_costs_no_result(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folders: Sequence[Path]) -> None:
        raise SemalignError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("semalign_harness.report._write.write_report", fail)
        report_run(run, Console())
    assert f"no report (no room): `semalign report {run}` tries again" in capsys.readouterr().err
    for name in (".report.html.x", "report.md"):
        (run / name).write_text("cut o", encoding="utf-8")  # by a process that was killed
    report_run(run, Console())
    assert len(tables(run / "report.html")) == 3 and not (run / ".report.html.x").exists()
    (run / "report.html").write_text("mine", encoding="utf-8")
    report_run(run, Console())
    assert (run / "report.html").read_text(encoding="utf-8") == "mine", "a report that is there stays"


def test_long_curves_are_thinned_to_their_means() -> None:
    centres, values = _thinned(10, [float(value) for value in range(100)], points=10)
    assert len(centres) == len(values) == 10
    assert values[0] == 4.5 and centres[0] == 15.5, "steps are counted from 1: ten steps from 11 to 20"
    assert _thinned(0, [3.0], points=1) == ([1.0], [3.0])


@pytest.mark.parametrize(("depth", "radius"), [(16, "2"), (17, "1.25")])
def test_many_layers_have_small_dots(depth: int, radius: str) -> None:
    pairing = LayerPairing(policy="uniform", source_depth=depth, source_layers=tuple(range(1, depth + 1)))
    rows = ((0.5,) * depth,) * depth
    similarity = LayerSimilarity(source_layers=pairing.source_layers, tokens=9, before=rows, after=rows)
    for svg in (draw_similarity(rows, pairing), draw_before_and_after(similarity, pairing)):
        (dot,) = set(re.findall(r'<path id="(\w+)" d="M 0 ([\d.]+) \nC', svg))
        assert dot[1] == radius and svg.count(f'href="#{dot[0]}"') % depth == 0


def test_small_p_values_are_not_zero() -> None:
    assert [chance(value) for value in (0.0, 0.0004, 0.0006, 0.25)] == ["p < 0.001", "p < 0.001", "p 0.001", "p 0.250"]


def test_plots_take_their_colours_from_the_page() -> None:
    svg = draw_dots([Panel("KL ↓", [Dot("漢字 $x$", mean([1, 2, 3]))], [Line("source", 0.5)], percent=False)])
    assert "var(--blue)" in svg and "var(--ink)" in svg and not re.search(r"#0b0c0d|#0072b2|xmlns", svg)
    assert ">漢字 $x$</text>" in svg, "text stays text"


@pytest.mark.parametrize("low", [0.5, 0.886, 0.89, 0.9, 0.98, 0.9886])
def test_labels_of_shares_are_as_far_apart_as_their_ticks(low: float) -> None:
    dots = [Dot("a", Estimate(value=low, standard_error=0.01, low=low, high=1.0, count=9))]
    svg = draw_dots([Panel("accuracy", dots, [], percent=True)])
    shares = [float(label) for label in re.findall(r">([\d.]+)%</text>", svg)]
    assert len(shares) > 2 and len({round(high - low, 6) for low, high in itertools.pairwise(shares)}) == 1


def test_source_layers_without_a_pair_keep_their_place() -> None:
    pairing = LayerPairing(policy="uniform", source_depth=5, source_layers=(1, 3))
    rows = ((0.5, 0.25), (0.5, 1.0))
    svg = draw_before_and_after(LayerSimilarity(source_layers=(1, 3), tokens=9, before=rows, after=rows), pairing)
    labels = re.findall(r">(\d+)</text>", svg)
    assert set(labels) == {"1", "2", "3", "4", "5"} and ">source layer</text>" in svg
