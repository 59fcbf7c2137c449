"""SFT and KD: all layers at once on the answers, on the source's output distribution, or on both."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from semalign_align import SupervisedBatch
from semalign_attribution import DecoderView, Trace
from torch import Tensor

from ._joint import JointMethod, answer_loss, output_loss
from ._joint_training import train_jointly
from ._method import LayerUse, MethodContext, MethodReport


class Sft(JointMethod):
    """Supervised fine-tuning: the NLL of the answers."""

    kind: Literal["sft"] = "sft"
    """Chooses this method in a configuration."""
    start: Literal["zero", "pissa"] = "zero"
    """Where adapters start: at no change, or at the principal components of the weights, which they are taken from."""

    @model_validator(mode="after")
    def _adapters_start_somewhere(self) -> "Sft":
        if self.start == "pissa" and self.trainable.kind == "full":
            raise ValueError("start=pissa is about adapters: set trainable.kind=lora, or start=zero")
        return self

    def run(self, context: MethodContext) -> MethodReport:
        """Train all layers on the answers."""
        view, config = DecoderView(context.target.model), self.config(context)
        with self.parameters(
            view, config, lora={"init_lora_weights": True if self.start == "zero" else "pissa"}
        ) as found:

            def losses(trace: Trace, data: SupervisedBatch) -> dict[str, Tensor]:
                return {"answer": answer_loss(view, trace, data)}

            return train_jointly(context, self, view, found, losses, config=config)


class Kd(JointMethod):
    """Knowledge distillation: KL(p_S ‖ p_T), on what the source left behind, mixed with the NLL of the answers."""

    stored: ClassVar[bool] = True
    layer_use: ClassVar[LayerUse] = "none"
    kind: Literal["kd"] = "kd"
    """Chooses this method in a configuration."""
    answer: float = Field(0.0, ge=0, le=1)
    """Share of the NLL of the answers in the loss. The KL has no factor temperature²: at a `supervision.temperature` of
    T its gradient is about 1/T² of that at 1, so above 1 the answers weigh more than this share."""

    def run(self, context: MethodContext) -> MethodReport:
        """Train all layers on the source's output."""
        view, config, store = DecoderView(context.target.model), self.config(context), context.stores.train
        temperature = store.manifest.settings.temperature
        with self.parameters(view, config) as found:

            def losses(trace: Trace, data: SupervisedBatch) -> dict[str, Tensor]:
                output = output_loss(view, trace, data, store.entries, temperature, config.divergence)
                terms = {"output": (1 - self.answer) * output}
                if self.answer:
                    terms["answer"] = self.answer * answer_loss(view, trace, data)
                return terms

            return train_jointly(context, self, view, found, losses, config=config)
