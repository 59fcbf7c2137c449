"""Joint training: all layers at once, on the batches and with the schedule of frontier training."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from semalign_align import Ranks, SupervisionSource
from semalign_attribution import DecoderView, undisturbed, view_of
from semalign_geometry.base import checked
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._batches import micro_batches, optimisation_batches
from ._checkpoint import Checkpoints, fingerprint
from ._checks import check_keys, check_target, vocabulary_of
from ._loop import Loop, Run, Terms
from ._losses import JointLoss, JointStep, settings_of, terms_of
from ._records import JointReport, StepRecord
from ._settings import FullLayer, JointConfig
from ._trainable import trained


class JointTrainer:
    """Train all layers of a target at once by a loss over the answers.

    Laws: tensors that do not train stay bit-identical; the weights do not depend on the split into micro-batches,
    rounding aside; a training that was interrupted and is repeated ends at the same bits on a CPU. Where
    torch.distributed has several processes, each computes the gradient of its share of every optimisation batch, and
    the weights are those of one process, rounding aside; all are given the same arguments.
    """

    @checked
    def __init__(
        self,
        target: PreTrainedModel | DecoderView,
        supervision: SupervisionSource,
        config: JointConfig | None = None,
        *,
        loss: JointLoss,
        parameters: Sequence[nn.Parameter] | None = None,
        checkpoints: str | Path | None = None,
        callback: Callable[[StepRecord], None] | None = None,
    ) -> None:
        """Check that target and supervision fit together; nothing is computed yet.

        Args:
            target: the model that trains, changed in place by `fit`.
            supervision: the training rows with the source's output, stored or live.
            config: settings.
            loss: the terms that are minimised.
            parameters: those that train, instead of `config.trainable`; the caller has made them float32, has frozen
                all others, and sets the modes of modules.
            checkpoints: a folder for states; an interrupted training that is repeated with the same folder, target,
                supervision, loss and settings resumes there, to the same weights. Ctrl-C leaves a last state, where
                that is quick.
            callback: called with every step that this process runs.

        Raises:
            SemalignError: the target is float16, a token or an entry is outside of its vocabulary, or checkpoints are
                wanted of a live supervision without a key or of a loss whose settings are not JSON.
        """
        self.view = view_of(target)
        """The target."""
        self.supervision = supervision
        """Its supervision."""
        self.config = config or JointConfig()
        """Settings."""
        self.loss = loss
        """The terms that are minimised."""
        self.callback = callback or (lambda record: None)
        """Called with every step that this process runs."""
        check_target(self.view, {"training": supervision})
        self._checkpoint_folder = None if checkpoints is None else Path(checkpoints)
        if checkpoints is not None:
            check_keys({"training": supervision})
            settings_of(loss)
        self._parameters, self._ranks = parameters, Ranks.current()
        # The view was made before the weights that train became float32.
        self._autocast = self.config.autocast == "bfloat16" or self.view.head.weight.dtype == torch.bfloat16

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.config.total_steps(len(self.supervision))

    def fit(self) -> JointReport:
        """Run every step; the target is changed in place.

        Raises:
            DivergedError: more gradients were not finite than `config.guards` allows, or the last one or the weights
                are not finite at the end.
            SemalignError: the checkpoints are those of another training.
            ComponentError: the loss did not return numbers.
        """
        order = optimisation_batches(self.config, len(self.supervision))
        batches = list(itertools.islice(order, self.steps))
        with self._trained() as found, self.view.compiled() if self.config.compile else nullcontext():
            parameters = [*found, *self.loss.parameters]
            run = Run(
                view=self.view,
                supervision=self.supervision,
                config=self.config,
                ranks=self._ranks,
                callback=self.callback,
                checkpoints=self._checkpoints(parameters),
                autocast=self._autocast,
            )
            loop, started = Loop(run, parameters), time.perf_counter()
            records = loop.train(batches, lambda indices: self._gradients(indices, parameters))
        return JointReport(
            config=self.config,
            steps=len(records),
            trained_parameters=sum(parameter.numel() for parameter in parameters),
            skipped=sum(record.skipped for record in records),
            first_losses=records[0].losses,
            last_losses=records[-1].losses,
            supervised_tokens=sum(record.supervised_tokens for record in records),
            seconds=loop.earlier + time.perf_counter() - started,
        )

    @contextmanager
    def _trained(self) -> Iterator[Sequence[nn.Parameter]]:
        """The parameters that train, in float32; merged or cast back when the block ends."""
        if self._parameters is not None:
            yield self._parameters
            return
        part = self.view.model if isinstance(self.config.trainable, FullLayer) else self.view.layers
        with undisturbed(self.view.model), trained(part, self.config.trainable, seed=self.config.seed) as found:
            yield found

    def _checkpoints(self, parameters: Sequence[nn.Parameter]) -> Checkpoints | None:
        if self._checkpoint_folder is None:
            return None
        training = self._ranks.broadcast_from_first(lambda: self._fingerprint(parameters))
        return Checkpoints(self._checkpoint_folder, training, self._ranks, self.config)

    def _fingerprint(self, parameters: Sequence[nn.Parameter]) -> str:
        """Hash of all that decides the trained weights."""
        model = self.view.model
        return fingerprint(
            self.config.decisive(),
            settings_of(self.loss),
            self.supervision.manifest.model_dump_json(),
            model.config.to_json_string(),
            tensors=vocabulary_of(self.supervision)
            | {str(place): parameter for place, parameter in enumerate(parameters)}
            | dict(model.named_parameters())
            | dict(model.named_buffers()),
        )

    def _gradients(self, indices: list[int], parameters: Sequence[nn.Parameter]) -> Terms:
        """Leave the gradient of the mean loss over the spans of an optimisation batch in the parameters."""
        view, store, ranks = self.view, self.supervision, self._ranks
        count, terms = int(store.counts[indices].sum()), dict[str, float]()
        for micro, mine in ranks.shard(micro_batches(self.config, store, indices, ranks)):
            data = store.collate(micro, device=view.device)
            with torch.enable_grad(), torch.autocast(view.device.type, torch.bfloat16, enabled=self._autocast):
                trace = view.trace(
                    data.batch, keep=self.loss.layers, recompute_from=1 if self.config.recompute else None
                )
                step = JointStep(view, trace, data, store)
                found = {name: mine * value / count for name, value in terms_of(self.loss, step).items()}
                torch.stack([value.float() for value in found.values()]).sum().backward()
            terms = {name: terms.get(name, 0.0) + float(value.detach()) for name, value in found.items()}
        (values,) = ranks.all_reduce_sum([torch.tensor(list(terms.values()), dtype=torch.float64)])
        gradients = ranks.all_reduce_sum([_gradient(parameter) for parameter in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return Terms(dict(zip(terms, values.tolist(), strict=True)), norms={})


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
