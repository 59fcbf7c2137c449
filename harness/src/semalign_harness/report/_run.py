"""The page of one run."""

import math

from ..util.text import gb
from ._cells import NOTHING, many, seconds
from ._evaluations import benchmark_blocks, example_blocks, missing_blocks
from ._metrics import result_rows
from ._page import Block, Facts, Page, Picture, Row, Table, Text, sections_of
from ._protocol import describe_method, describe_rows, protocol_blocks, repeat_command
from ._read import ReportedRun
from .plots import draw_attribution, draw_before_and_after, draw_fidelity, draw_held_out, draw_losses, draw_similarity

RESULT_HEADER = ("", "source", "target before", "target after", "gap recovered")
INTERVALS = (
    "In brackets: 95% intervals over the rows. Gap recovered: (after − before) / (source − before), 0% nothing and "
    "100% all of the gap; unbounded where the rows cannot tell the gap itself from none. ↓ less is better, ↑ more is."
)


TERMS = {
    "relation": "1 − CKA of what the layer adds and what its source layer adds",
    "cosine": "1 − cosine of what the layer adds and what its source layer adds",
    "output": "divergence from the source, in nats per token",
    "answer": "NLL of the answers, in nats per token",
    "label": "1 − cosine of the logits and the answer token",
}
"""What terms of the loss are; others have the name that their component gives them."""


def run_page(run: ReportedRun) -> Page:
    """What was transferred and what came of it, then how, at what cost, and by which protocol."""
    return Page(
        run.result.name,
        sections_of(
            ("Result", _result(run)),
            ("Layers", _layers(run)),
            ("Training", _training(run)),
            ("Benchmarks", [*benchmark_blocks(run.evaluations), *missing_blocks(run)]),
            ("Cost", [_cost(run)]),
            ("Examples", example_blocks(run.evaluations)),
            (
                "Protocol",
                protocol_blocks(run.experiment, run.environment, run.evaluations, command=repeat_command(run.folder)),
            ),
        ),
    )


def describe_budget(run: ReportedRun) -> str:
    """What was spent on training."""
    training = run.result.training
    stages = f"{many(len(run.stages), 'stage')}, " if run.stages else ""
    return (
        f"{stages}{many(training.steps, 'step')}, {many(training.supervised_tokens, 'supervised token')}, "
        f"{many(training.trained_parameters, 'trained parameter')}"
    )


def _result(run: ReportedRun) -> list[Block]:
    experiment, after = run.experiment, run.result.after
    measured = f"{many(after.rows, 'held-out row')}, {many(after.tokens, 'supervised token')}"
    if after.answer_rows:
        measured += f", {many(after.answer_rows, 'generated answer')}"
    facts = (
        ("source → target", f"{experiment.source.path} → {experiment.target.path}"),
        ("method", describe_method(experiment)),
        ("rows", f"{run.result.train_rows:,} of {describe_rows(experiment.data.train)}"),
        ("budget", describe_budget(run)),
        ("measured on", measured),
    )
    return [Facts(facts), Table(RESULT_HEADER, result_rows(run.result)), Text(INTERVALS)]


def _layers(run: ReportedRun) -> list[Block]:
    blocks: list[Block] = []
    if run.scores is not None:
        scores = run.scores
        drawn = " Dots: the source layer of each target layer (right axis)." if run.pairing else ""
        blocks.append(
            Picture(
                draw_attribution(scores, run.pairing),
                f"Bars: score of each source layer by {scores.scorer}, mean and standard error over "
                f"{many(scores.examples, 'example')}.{drawn}",
            )
        )
        if scores.similarity:  # of all source layers
            blocks.append(
                Picture(
                    draw_similarity(scores.similarity, run.pairing),
                    "Linear CKA of what the layers add, before training, within each example; 1: the same geometry. "
                    "Dots: the pairing.",
                )
            )
    if run.similarity is not None:
        paired = "paired " if run.pairing else ""
        blocks.append(
            Picture(
                draw_before_and_after(run.similarity, run.pairing),
                f"Linear CKA of what target layers and {paired}source layers add, before and after training, over "
                f"{run.similarity.tokens:,} held-out tokens; 1: the same geometry.{_mean_of_pairs(run)}",
            )
        )
    if run.fidelity is not None:
        own = run.fidelity.frame
        by_each, by_own = "", ""
        if run.fidelity.others:
            by_each, by_own = f", without a transport and by each frame (full line: {own}, the run's)", f" by {own}"
        blocks.append(
            Picture(
                draw_fidelity(run.fidelity),
                f"CKA: geometry that paired layers share before training{by_each}, over "
                f"{many(run.fidelity.tokens, 'token')}; recomposition{by_own}: cosine of a contribution with its own "
                "recomposition, 1 where nothing is lost.",
            )
        )
    if run.scores is not None:
        blocks.append(
            Text(
                f"The ranking of the source layers has stability {run.scores.stability:.2f} under resampled examples "
                "(1: always the same)."
            )
        )
    return [*blocks, *_layer_table(run)]


def _mean_of_pairs(run: ReportedRun) -> str:
    if run.pairing is None or run.similarity is None:
        return ""
    columns = [run.similarity.source_layers.index(layer) for layer in run.pairing.source_layers]
    before, after = (
        math.fsum(row[column] for row, column in zip(rows, columns, strict=True)) / len(rows)
        for rows in (run.similarity.before, run.similarity.after)
    )
    return f" Dots: the pairing, on average {before:.3f} before and {after:.3f} after."


def _layer_table(run: ReportedRun) -> list[Block]:
    """One row for each target layer, of all that is known of it."""
    if run.pairing is None:
        return []
    reports = [run.fidelity, *run.fidelity.others] if run.fidelity else []
    layers = zip(*(report.layers for report in reports), strict=True)
    fidelity = {of[0].target_layer: of for of in layers}
    stages = {stage.layer: stage for stage in run.stages}
    terms = list(dict.fromkeys(name for stage in run.stages for name in stage.first_losses))
    measured = any(stage.held_out is not None for stage in run.stages)
    header = ["target layer", "source layer"]
    header += ["score"] * (run.scores is not None)
    if reports:
        header += ["CKA, no transport", *(f"CKA, {report.frame}" for report in reports), "recomposition"]
    header += [f"{name}, first → last step" for name in terms] + ["held-out loss"] * measured
    rows: list[Row] = []
    for target, source in enumerate(run.pairing.source_layers, 1):
        row = [str(target), str(source)]
        if run.scores is not None:
            row.append(f"{run.scores.mean[source - 1]:#.4g} ± {run.scores.standard_error[source - 1]:#.2g}")
        if reports:
            of = fidelity.get(target, ())
            figures = [each.cka_transported for each in of]
            figures = [of[0].cka_direct, *figures, of[0].recomposition_cosine] if of else []
            row += [f"{figure:.3f}" for figure in figures] or [NOTHING] * (2 + len(reports))
        stage = stages.get(target)
        for name in terms:
            first, last = ({}, {}) if stage is None else (stage.first_losses, stage.last_losses)
            row.append(f"{first[name]:.4f} → {last[name]:.4f}" if name in first and name in last else NOTHING)
        if measured:
            row.append(NOTHING)
            if stage is not None and stage.held_out is not None:
                undone = " (undone)" if stage.rolled_back else ""
                row[-1] = f"{stage.held_out[0]:.4f} → {stage.held_out[1]:.4f}{undone}"
        rows.append(tuple(row))
    return [Table(tuple(header), tuple(rows), folded="layer by layer")]


def _training(run: ReportedRun) -> list[Block]:
    blocks: list[Block] = []
    if any(step.losses for step in run.steps):
        terms = dict.fromkeys(name for step in run.steps for name in step.losses)
        meant = "".join(f" {name}: {TERMS[name]}." for name in terms if name in TERMS)
        parted = " Lines part the stages, each of which trains one layer." if len(run.stages) > 1 else ""
        unweighted = ", unweighted" if run.stages else ""
        caption = f"Terms of the loss{unweighted}, each step on its own batch; lower is better.{meant}{parted}"
        blocks.append(Picture(draw_losses(run.steps), caption))
    if any(stage.held_out is not None for stage in run.stages):
        blocks.append(
            Picture(
                draw_held_out(run.stages),
                "Weighted loss on held-out rows, where it was measured; crosses: stages that raised it, undone.",
            )
        )
    elif run.stages:
        blocks.append(
            Text(
                "The loss on held-out rows was not measured stage by stage; method.rollback=0.05 does so, and "
                "undoes each stage that raises it by more than 5%."
            )
        )
    skipped = sum(step.skipped for step in run.steps)
    undone = [f"layer {stage.layer}" for stage in run.stages if stage.rolled_back]
    if skipped:
        blocks.append(Text(f"Skipped, since gradients were not finite: {many(skipped, 'step')}."))
    if undone:
        blocks.append(Text(f"Undone, since the held-out loss rose: {', '.join(undone)}."))
    return blocks


def cost_pairs(run: ReportedRun) -> list[tuple[str, str]]:
    """Seconds, memory and disk."""
    result, training = run.result, run.result.training
    pairs = [("training", seconds(training.seconds))]
    if result.supervision_seconds:
        pairs.append(("supervision, once for all runs that share it", seconds(result.supervision_seconds)))
    pairs.append(("the whole process that finished the run", seconds(result.seconds)))
    took = math.fsum(step.seconds for step in run.steps)
    if took:
        speed = sum(step.tokens for step in run.steps) / took
        pairs.append(("tokens per second within steps", f"{speed:,.0f}"))
    if result.training_peak_bytes is not None:
        pairs.append(("peak memory of the training", gb(result.training_peak_bytes)))
    pairs.append(("peak memory of the run", gb(result.peak_bytes)))
    if run.experiment.method.stored:
        pairs.append(("supervision on disk", gb(result.supervision_bytes)))
    if run.model_bytes:
        pairs.append(("trained target on disk", gb(run.model_bytes)))
    return pairs


def _cost(run: ReportedRun) -> Block:
    return Facts(tuple(cost_pairs(run)))
