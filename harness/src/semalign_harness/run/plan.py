"""Work and needs of a run as lines of text, before it starts."""

from ..util.text import gb
from .estimate import estimate
from .job import Job


def describe_plan(job: Job) -> list[str]:
    """Return the steps and tokens of the training, and the memory and disk of the run."""
    experiment, inputs, rows = job.experiment, job.inputs, job.inputs.split.train
    steps, examples = experiment.method.work(experiment.train, inputs.target.shape.layers, len(rows))
    tokens, supervised = (
        round(sum(counts) * examples / len(rows)) for counts in (map(len, rows), (len(row.answer_ids) for row in rows))
    )
    longest = experiment.data.model_copy(update={"max_length": max(row.longest for row in rows)})
    models = {"source": inputs.source.settings, "target": inputs.target.settings}  # with the dtypes that were found
    totals = estimate(
        experiment.model_copy(update={"data": longest, **models}),
        source_shape=inputs.source.shape,
        target_shape=inputs.target.shape,
        two_tokenizers=inputs.classes is not None,
    ).totals
    assert totals is not None
    return [
        f"plan: {steps} steps, {tokens} tokens ({supervised} supervised)",
        f"plan: at most {gb(totals.memory)} of memory for weights, moments and activations; on disk at most "
        f"{gb(totals.supervision + totals.held_out)} of supervision, and {gb(totals.scratch)} until the end",
    ]
