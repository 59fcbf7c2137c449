"""Rows of models: attribution, frontier training, the whole transfer, growth.

Times of training are divided by thousands of tokens, since the sides may run different numbers of steps.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from meter import Meter
from pair import BATCH_SIZE, Pair, plan
from semalign_align import Supervision, supervise
from semalign_attribution import Batch, DecoderView, GradientActivation, attribute_layers, supervised, undisturbed
from semalign_geometry import SemanticBasis
from semalign_harness.data.encoding import Example
from semalign_harness.data.rows import batches
from semalign_train import FrontierConfig, FrontierTrainer, StageRecord, StepRecord
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

PASSES = 3.0
LEARNING_RATE = 1e-4


def attribution_ours(meter: Meter, *, folder: str, batch_size: int) -> dict[str, Tensor]:
    """All layers from one backward run."""
    pair = Pair.read(folder)
    model, rows = pair.load("source", meter).model, batches(pair.rows, batch_size)
    with meter.both():
        scores = attribute_layers(model, rows, scorer=GradientActivation(activation="output"))
    return {"scores": torch.tensor(scores.mean)}


def attribution_peer(meter: Meter, *, folder: str, batch_size: int) -> dict[str, Tensor]:
    """Captum on the same layers, with the same loss, at the supervised positions too."""
    from captum.attr import LayerGradientXActivation

    pair = Pair.read(folder)
    model, rows = pair.load("source", meter).model, batches(pair.rows, batch_size)
    view = DecoderView(model)
    parts = []
    with meter.both(), undisturbed(model):

        def losses(embeddings: Tensor, batch: Batch) -> Tensor:
            return _losses(model, batch, inputs_embeds=embeddings)

        captum = LayerGradientXActivation(losses, list(view.layers))
        for batch in (_on(each, meter) for each in rows):
            embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
            products = captum.attribute((embeddings,), additional_forward_args=(batch,))
            parts.append(torch.stack([product.abs().sum((1, 2)) for product in products], 1).detach())
        scores = torch.cat(parts).mean(0)
    return {"scores": scores}


def attribution_bound(meter: Meter, *, folder: str, batch_size: int) -> None:
    """A plain forward and backward run to the embeddings, with frozen weights."""
    pair = Pair.read(folder)
    model, rows = pair.load("source", meter).model, batches(pair.rows, batch_size)
    with meter.both(), undisturbed(model):
        for batch in (_on(each, meter) for each in rows):
            embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
            torch.autograd.grad(_losses(model, batch, inputs_embeds=embeddings).sum(), embeddings)


def frontier_ours(meter: Meter, *, folder: str, peer_steps: int) -> None:
    """Every stage of the target, on stored supervision; the source is not in memory."""
    pair = Pair.read(folder)
    store = pair.store()
    with meter.memory():
        target = pair.load("target", meter).model
        with meter.time():
            tokens = _train(target, store, _steps(pair))
    meter.units = tokens / 1000


def frontier_peer(meter: Meter, *, folder: str, peer_steps: int) -> None:
    """Joint distillation: both models in memory, the logits of both, KL, AdamW over the whole target."""
    pair = Pair.read(folder)
    rows = itertools.islice(itertools.cycle(pair.batches()), peer_steps)
    tokens = 0
    with meter.memory():
        source, target = pair.load("source", meter).model, pair.load("target", meter).model
        with meter.time():
            optimiser = torch.optim.AdamW(target.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
            for batch in (_on(each, meter) for each in rows):
                positions = supervised(batch).mask
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
                with torch.no_grad():
                    wanted = source(**inputs, use_cache=False).logits[positions].float().log_softmax(-1)
                found = target(**inputs, use_cache=False).logits[positions].float().log_softmax(-1)
                kl_div(found, wanted, reduction="batchmean", log_target=True).backward()
                torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
                tokens += int(batch["attention_mask"].sum())
    meter.units = tokens / 1000


def frontier_supervision(meter: Meter, *, folder: str, peer_steps: int) -> None:
    """The source over all rows, once."""
    pair = Pair.read(folder)
    pairing, transport = pair.plan()
    with meter.memory():
        source = pair.load("source", meter).model
        with meter.time(), tempfile.TemporaryDirectory(dir=folder) as place:
            supervise(source, pair.batches(), pairing, transport, Path(place) / "store", entries=pair.shared)
    meter.units = sum(map(len, pair.rows)) / 1000


def transfer_ours(meter: Meter, *, folder: str) -> None:
    """Attribute, pair, transport, supervise, train; models are read as they are needed, one at a time."""
    pair = Pair.read(folder)
    with meter.both(), tempfile.TemporaryDirectory(dir=folder) as place:
        # The head alone stays: the basis refers to it.
        basis = SemanticBasis.from_model(pair.load("target", meter).model, entries=pair.shared)
        source = pair.load("source", meter).model
        pairing, transport = plan(pair, source, basis)
        store = supervise(source, pair.batches(), pairing, transport, Path(place) / "store", entries=pair.shared)
        del source, basis
        tokens = _train(pair.load("target", meter).model, store, _steps(pair))
    meter.units = tokens / 1000


def transfer_peer(meter: Meter, *, folder: str) -> None:
    """TRL's trainer on the same rows for as many steps: lmbda = 0, no generation, KL(p_S ‖ p_T) (beta = 0)."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    pair = Pair.read(folder)
    dataset = Dataset.from_list([{"prompt_ids": row.prompt_ids, "answer_ids": row.answer_ids} for row in pair.rows])

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [Example(tuple(row["prompt_ids"]), tuple(row["answer_ids"]), "") for row in rows]
        return dict(batches(examples, len(examples))[0])

    steps = _steps(pair) * pair.depth
    with meter.both(), tempfile.TemporaryDirectory(dir=folder) as place:
        settings = GKDConfig(
            output_dir=place,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            lmbda=0.0,
            beta=0.0,
            seq_kd=False,
            bf16=meter.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            use_cpu=meter.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        source, target = pair.load("source", meter), pair.load("target", meter)
        trainer = GKDTrainer(
            model=target.model,
            teacher_model=source.model,
            args=settings,
            data_collator=collate,
            train_dataset=dataset,
            processing_class=target.tokenizer,
        )
        trainer.train()
    meter.units = steps * BATCH_SIZE * sum(map(len, pair.rows)) / len(pair.rows) / 1000


def growth(meter: Meter, *, folder: str) -> None:
    """Frontier training of a target in three passes."""
    pair = Pair.read(folder)
    store = pair.store()
    with meter.memory():
        target = pair.load("target", meter).model
        with meter.time():
            _train(target, store, None)


def _train(target: PreTrainedModel, store: Supervision, steps: int | None) -> int:
    """Train every layer; return the tokens that were seen."""
    tokens = 0

    def count(record: StepRecord | StageRecord) -> None:
        nonlocal tokens
        if isinstance(record, StepRecord):
            tokens += record.tokens

    config = FrontierConfig(
        passes=PASSES, steps=steps, batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE
    )
    FrontierTrainer(target, store, config, callback=count).fit()
    return tokens


def _steps(pair: Pair) -> int:
    """Steps of each stage in three passes over the rows."""
    return max(1, round(PASSES * len(pair.rows) / (BATCH_SIZE * pair.depth)))


def _losses(model: PreTrainedModel, batch: Batch, **inputs: Tensor) -> Tensor:
    """Mean NLL of the answer tokens of each example, the head applied at the supervised positions only."""
    positions = supervised(batch)
    hidden = model.get_decoder()(attention_mask=batch["attention_mask"], use_cache=False, **inputs).last_hidden_state
    logits = model.get_output_embeddings()(hidden[positions.mask]).float()
    return positions.example_means(cross_entropy(logits, positions.labels, reduction="none"))


def _on(batch: Batch, meter: Meter) -> Batch:
    return {key: value.to(meter.device) for key, value in batch.items()}
