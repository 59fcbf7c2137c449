"""Page of one run."""

import math

from ..results.metrics import NOTHING, metrics_of
from ..statistics import share
from ..util.text import gb, many, seconds_text
from ._evaluations import example_blocks, run_benchmarks
from ._page import Block, Facts, Page, Pair, Picture, Row, Table, Text, page_of, table_blocks
from ._protocol import describe_method, describe_rows, missing_benchmarks, protocol_blocks, repeat_command
from ._read import ReportedRun
from .plots import draw_attribution, draw_before_and_after, draw_fidelity, draw_held_out, draw_losses, draw_similarity
from .result_tables import COLUMNS

INTERVALS = (
    "In brackets: 95% intervals over the rows. Gap recovered: (after − before) / (source − before), 0% none and "
    "100% all of the gap; unbounded where the rows cannot distinguish the gap from none. ↓: lower is better, "
    "↑: higher is better."
)
TERMS = {
    "relation": "1 − CKA of the contributions of the layer and its source layer",
    "cosine": "1 − cosine of the contributions of the layer and its source layer",
    "output": "divergence from the source, in nats per {unit}",
    "span": "divergence of the likelihoods of spans, in nats per {unit}",
    "matched": "divergence of the entries that both models have",
    "unmatched": "L1 distance of the sorted probabilities of all other entries",
    "answer": "NLL of the answers, in nats per {unit}",
    "label": "1 − cosine of the logits and the answer token",
}
"""Explanations of terms of the loss; `unit` is a token or a span."""


def run_page(run: ReportedRun) -> Page:
    """Return the page of a run: result, layers, training, benchmarks, entries, cost, examples and protocol."""
    benchmarks = run_benchmarks(run.evaluations) if run.evaluations else []
    return page_of(
        run.result.name,
        {
            "Result": _result(run),
            "Layers": [*_attribution(run), *_similarity(run), *_fidelity(run), *_stability(run), *_layer_table(run)],
            "Training": _training(run),
            "Benchmarks": [*benchmarks, *missing_benchmarks(run)],
            "Entries": _entries(run),
            "Cost": [Facts(tuple(cost_pairs(run)))],
            "Examples": example_blocks(run.evaluations),
            "Protocol": protocol_blocks(
                run.experiment, run.environment, run.evaluations, command=repeat_command(run.folder)
            ),
        },
    )


def describe_budget(run: ReportedRun) -> str:
    """Return stages, steps, supervised tokens and trained parameters."""
    training = run.result.training
    stages = f"{many(len(run.stages), 'stage')}, " if run.stages else ""
    return (
        f"{stages}{many(training.steps, 'step')}, {many(training.supervised_tokens, 'supervised token')}, "
        f"{many(training.trained_parameters, 'trained parameter')}"
    )


def run_rows(run: ReportedRun) -> str:
    """Return the number and the place of the training rows."""
    return f"{run.result.train_rows:,} of {describe_rows(run.experiment.data.train)}"


def cost_pairs(run: ReportedRun) -> list[Pair]:
    """Return seconds, memory and disk."""
    result, training = run.result, run.result.training
    pairs = [("training", seconds_text(training.seconds))]
    if result.supervision_seconds:
        pairs.append(("supervision, shared by runs with the same cache key", seconds_text(result.supervision_seconds)))
    pairs.append(("whole process that finished the run", seconds_text(result.seconds)))
    if took := math.fsum(step.seconds for step in run.steps):
        pairs.append(("tokens per second within steps", f"{sum(step.tokens for step in run.steps) / took:,.0f}"))
    if result.training_peak_bytes is not None:
        pairs.append(("peak memory of the training", gb(result.training_peak_bytes)))
    pairs.append(("peak memory of the run", gb(result.peak_bytes)))
    if run.experiment.method.stored:
        pairs.append(("supervision on disk", gb(result.supervision_bytes)))
    if run.model_bytes:
        pairs.append(("trained target on disk", gb(run.model_bytes)))
    return pairs


def _result(run: ReportedRun) -> list[Block]:
    """Facts, and every metric of source, target before and target after with the share of the gap."""
    experiment, result = run.experiment, run.result
    measured = f"{many(result.after.rows, 'held-out row')}, {many(result.after.tokens, 'supervised token')}"
    if result.after.spans is not None:
        measured += f", {many(result.after.spans, 'span')}"
    if result.after.answer_rows:
        measured += f", {many(result.after.answer_rows, 'generated answer')}"
    facts = (
        ("source → target", f"{experiment.source.path} → {experiment.target.path}"),
        ("method", describe_method(experiment)),
        ("rows", run_rows(run)),
        ("budget", describe_budget(run)),
        ("measured on", measured),
    )
    rows = [
        (
            metric.title,
            metric.source_cell(result.source),
            metric.cell(result.before),
            metric.cell(result.after),
            share(metric.gap(result)),
        )
        for metric in metrics_of([result])
    ]
    return [Facts(facts), *table_blocks([COLUMNS, *rows], INTERVALS)]


def _attribution(run: ReportedRun) -> list[Block]:
    if (scores := run.scores) is None:
        return []
    drawn = " Dots: the source layer of each target layer (right axis)." if run.pairing else ""
    caption = (
        f"Bars: score of each source layer by {scores.scorer}, mean and standard error over "
        f"{many(scores.examples, 'example')}.{drawn}"
    )
    blocks: list[Block] = [Picture(draw_attribution(scores, run.pairing), caption)]
    if scores.similarity:  # of all source layers
        caption = (
            "Linear CKA of the contributions of the layers before training, within each example; 1: the same geometry. "
            "Dots: the pairing."
        )
        blocks.append(Picture(draw_similarity(scores.similarity, run.pairing), caption))
    return blocks


def _similarity(run: ReportedRun) -> list[Block]:
    if (similarity := run.similarity) is None:
        return []
    means, blank = "", ""
    if run.pairing is not None:
        if set(run.pairing.source_layers) < set(range(1, run.pairing.source_depth + 1)):
            blank = " Blank: source layers without a pair."
        columns = [similarity.source_layers.index(layer) for layer in run.pairing.source_layers]
        before, after = (
            math.fsum(row[column] for row, column in zip(rows, columns, strict=True)) / len(rows)
            for rows in (similarity.before, similarity.after)
        )
        means = f" Dots: the pairing, on average {before:.3f} before and {after:.3f} after."
    caption = (
        f"Linear CKA of the contributions of target layers and source layers, before and after training, over "
        f"{similarity.tokens:,} held-out tokens; 1: the same geometry.{means}{blank}"
    )
    return [Picture(draw_before_and_after(similarity, run.pairing), caption)]


def _fidelity(run: ReportedRun) -> list[Block]:
    if (fidelity := run.fidelity) is None:
        return []
    by_each, by_own = "", ""
    if fidelity.others:
        by_each = f", without a transport and by each frame (full line: {fidelity.frame}, the run's)"
        by_own = f" by {fidelity.frame}"
    caption = (
        f"CKA: geometry that paired layers share before training{by_each}, over {many(fidelity.tokens, 'token')}; "
        f"recomposition{by_own}: cosine of a contribution with its own recomposition, 1 where nothing is lost."
    )
    return [Picture(draw_fidelity(fidelity), caption)]


def _stability(run: ReportedRun) -> list[Block]:
    if run.scores is None:
        return []
    stability = f"{run.scores.stability:.2f}"
    return [Text(f"Stability of the ranking of source layers under resampled examples: {stability} (1: constant).")]


def _layer_table(run: ReportedRun) -> list[Block]:
    """One row for each target layer."""
    if run.pairing is None:
        return []
    reports = [run.fidelity, *run.fidelity.others] if run.fidelity else []
    fidelity = {of[0].target_layer: of for of in zip(*(report.layers for report in reports), strict=True)}
    stages = {stage.layer: stage for stage in run.stages}
    terms = list(dict.fromkeys(name for stage in run.stages for name in stage.first_losses))
    measured = any(stage.held_out is not None for stage in run.stages)
    header = ["target layer", "source layer"] + ["score"] * (run.scores is not None)
    if reports:
        header += ["CKA, no transport", *(f"CKA, {report.frame}" for report in reports), "recomposition"]
    header += [f"{name}, first → last step" for name in terms] + ["held-out loss"] * measured
    rows: list[Row] = []
    for target, source in enumerate(run.pairing.source_layers, 1):
        row = [str(target), str(source)]
        if run.scores is not None:
            row.append(f"{run.scores.mean[source - 1]:#.4g} ± {run.scores.standard_error[source - 1]:#.2g}")
        if of := fidelity.get(target):
            values = (of[0].cka_direct, *(each.cka_transported for each in of), of[0].recomposition_cosine)
            row += [f"{value:.3f}" for value in values]
        elif reports:
            row += [NOTHING] * (2 + len(reports))
        stage = stages.get(target)
        for name in terms:
            known = stage is not None and name in stage.first_losses and name in stage.last_losses
            row.append(
                f"{stage.first_losses[name]:.4f} → {stage.last_losses[name]:.4f}" if stage and known else NOTHING
            )
        if measured:
            held_out = stage and stage.held_out
            undone = " (undone)" if stage and stage.rolled_back else ""
            row.append(f"{held_out[0]:.4f} → {held_out[1]:.4f}{undone}" if held_out else NOTHING)
        rows.append(tuple(row))
    return [Table(tuple(header), tuple(rows), folded="layer by layer")]


def _training(run: ReportedRun) -> list[Block]:
    blocks: list[Block] = []
    if any(step.losses for step in run.steps):
        terms = dict.fromkeys(name for step in run.steps for name in step.losses)
        unit = "token" if run.result.after.spans is None else "span"
        meant = "".join(f" {name}: {TERMS[name].format(unit=unit)}." for name in terms if name in TERMS)
        parted = " Lines separate the stages, each of which trains one layer." if len(run.stages) > 1 else ""
        unweighted = ", unweighted" if run.stages else ""
        caption = f"Terms of the loss{unweighted}, each step on its own batch; lower is better.{meant}{parted}"
        blocks.append(Picture(draw_losses(run.steps), caption))
    if any(stage.held_out is not None for stage in run.stages):
        caption = "Weighted loss on held-out rows, where it was measured; crosses: stages that raised it, undone."
        blocks.append(Picture(draw_held_out(run.stages), caption))
    elif run.stages:
        blocks.append(
            Text(
                "The loss on held-out rows was not measured stage by stage; method.rollback=0.05 measures it, "
                "and undoes each stage that raises it by more than 5%."
            )
        )
    if skipped := sum(step.skipped for step in run.steps):
        blocks.append(Text(f"Skipped because gradients were not finite: {many(skipped, 'step')}."))
    if undone := [f"layer {stage.layer}" for stage in run.stages if stage.rolled_back]:
        blocks.append(Text(f"Undone because the held-out loss rose: {', '.join(undone)}."))
    return blocks


def _entries(run: ReportedRun) -> list[Block]:
    """Entries, or classes, whose probability changed most."""
    if (found := run.entries) is None:
        return []
    header = ("", "source", "target before", "target after", "change")
    rows = [
        (
            each.entry,
            *(f"{value:.3%}" for value in (each.source, each.before, each.after)),
            f"{each.after - each.before:+.3%}",
        )
        for each in (*found.gained, *reversed(found.lost))
    ]
    kind, unit = ("Entries", "supervised token") if run.result.after.spans is None else ("Classes of entries", "span")
    reading = (
        f"{kind} whose mean probability over {many(found.spans, unit)} of the held-out rows changed most, from the "
        "largest gain to the largest loss. ␣: a space."
    )
    return table_blocks([header, *rows], reading, folded="probabilities that changed most")
