"""One component of every sort, as another package brings it; CONTRIBUTING.md explains each."""

from typing import Literal

import torch
from pydantic import Field
from semalign_align import Step
from semalign_attribution import Batch, DecoderView, LayerScores, supervised, undisturbed
from semalign_geometry import Frame
from semalign_geometry.base import SemalignError, Settings
from semalign_harness.benchmarks import Benchmark, Document, Form, Judge, Reading, Row
from semalign_harness.methods import Method, MethodContext, MethodReport, Work
from semalign_train import AnswerLoss, JointConfig, JointTrainer, TrainSettings
from torch import Tensor


class RelativeSize(Settings):
    """score_ℓ = mean over the answer tokens of (‖r_ℓ‖ / ‖h_{ℓ−1}‖)^power: how much a layer changes the stream."""

    kind: Literal["relative_size"] = "relative_size"
    """Chooses this scorer in a configuration."""
    power: float = Field(1.0, gt=0)
    """Above 1, tokens that a layer changes much weigh more."""

    @property
    def name(self) -> str:
        """What the scores are called in results."""
        return f"{self.kind}({self.power:g})"

    @torch.no_grad()
    def __call__(self, source: DecoderView, batch: Batch) -> Tensor:
        """One score per example and layer, (examples, layers)."""
        trace = source.trace(batch, keep=range(1, source.depth + 1))
        positions = supervised(batch)
        scores = []
        for layer in trace.outputs:
            ratios = trace.residual(layer).norm(dim=-1) / trace.inputs[layer].float().norm(dim=-1)
            scores.append(positions.example_means(ratios[positions.mask.to(ratios.device)] ** self.power))
        return torch.stack(scores, dim=1)


class Deepest(Settings):
    """π(k) = max(1, L_S − L_T + k − skip): the deepest source layers, one to one."""

    kind: Literal["deepest"] = "deepest"
    """Chooses this policy in a configuration."""
    skip: int = Field(0, ge=0)
    """Source layers at the top that are left out."""

    @property
    def name(self) -> str:
        """What the policy is called in results."""
        return self.kind

    def __call__(self, scores: LayerScores, target_depth: int) -> tuple[int, ...]:
        """π(1) … π(L_T), counted from 1, never decreasing."""
        first = scores.depth - target_depth - self.skip
        return tuple(max(1, first + number) for number in range(1, target_depth + 1))


BETWEEN = Frame("between", analysis=0.25, synthesis=0.75)


class Huber(Settings):
    """Huber loss of the residual contribution and the supervisory one: squared up to `delta`, linear above."""

    kind: Literal["huber"] = "huber"
    """Chooses this objective in a configuration."""
    delta: float = Field(1.0, gt=0)
    """Size of a difference from which on it counts linearly."""

    @property
    def name(self) -> str:
        """What the term is called in results."""
        return self.kind

    @property
    def needs_output(self) -> bool:
        """Whether the forward run must reach the head."""
        return False

    def total(self, step: Step) -> Tensor:
        """Sum over the answer tokens of a micro-batch, each the mean over the channels."""
        if step.residual.shape[-1] != step.reference.shape[-1]:
            raise SemalignError("the huber objective compares vectors of one width: use a frame other than none")
        residual, reference = step.residual[step.mask].float(), step.reference[step.mask].float()
        losses = torch.nn.functional.huber_loss(residual, reference, reduction="none", delta=self.delta)
        return losses.mean(-1).sum()

    def count(self, counts: Tensor) -> int:
        """What the sum is divided by: the answer tokens of examples with these numbers of them."""
        return int(counts.sum())


class Gains(Method):
    """The gains of the target's norms train on the answers, all at once; nothing is taken from the source."""

    kind: Literal["gains"] = "gains"
    """Chooses this method in a configuration."""
    steps: int = Field(10, ge=1)
    """Optimiser steps."""

    def work(self, train: TrainSettings, depth: int, rows: int) -> Work:
        """Return the amount of training."""
        return Work(self.steps, self.steps * train.batch_size)

    def run(self, context: MethodContext) -> MethodReport:
        """Train `context.target` in place."""
        view = DecoderView(context.target)
        config = JointConfig(**{**dict(context.train), "steps": self.steps})
        with undisturbed(view.model):  # everything is frozen, and left as it was found
            gains = [weight.requires_grad_(True) for name, weight in view.model.named_parameters() if "norm" in name]
            trainer = JointTrainer(
                view, context.supervision, config, loss=AnswerLoss(), parameters=gains, callback=context.callback
            )
            return MethodReport.of(self.kind, trainer.fit())


class ParityRow(Row):
    """A number and whether it is even."""

    number: int
    """The number."""
    even: bool
    """Whether it is."""


def parity_answer(document: Document, chat: bool) -> str:
    """The reference answer as it follows the prompt."""
    return f"{'' if chat else ' '}{'even' if document['even'] else 'odd'}"


def read_parity(documents: list[Document], responses: list[str], judge: Judge | None) -> list[Reading]:
    """What each response says, and whether it is right."""
    readings: list[Reading] = []
    for document, response in zip(documents, responses, strict=True):
        words = [word.strip(".,") for word in response.lower().split()]
        said = next((word for word in words if word in ("even", "odd")), None)
        readings.append({"extracted": said, "correct": said == ("even" if document["even"] else "odd")})
    return readings


EXTRACTION = "The first of the words even and odd."
PARITY = Benchmark(
    name="parity",
    metric="accuracy",
    version=1,
    hub=("example/parity", None),
    row=ParityRow,
    forms={
        False: Form("Is {{ number }} even or odd?\nAnswer:", EXTRACTION, stop=("\n",), max_new_tokens=8),
        True: Form("Is {{ number }} even or odd? Answer with one word.", EXTRACTION, max_new_tokens=8),
    },
    answer=parity_answer,
    read=read_parity,
)
