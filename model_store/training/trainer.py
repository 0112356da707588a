"""transformers' Trainer over packed batches.

transformers does the training loop, AdamW, schedules, checkpoints, logs and processes. This module adds the order of
examples, the losses, and checkpoints that hold only the adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from model_store.evaluation.sts import ScoredPair, evaluate_sts
from model_store.training.examples import EVALUATION, Order
from model_store.training.losses import TextBatch, contrastive_loss, texts_loss
from model_store.training.objective import Objective
from model_store.training.published import Published, load_weights

Collate = Callable[[list[Any]], dict[str, Any]]


class PackedTrainer(Trainer):  # type: ignore[misc]
    """Trains a stage's module on its examples, of which each belongs to one of `groups`: see `Order`."""

    control: Any

    def __init__(
        self,
        stage: nn.Module,
        arguments: TrainingArguments,
        examples: Dataset[Any],
        held_out: Dataset[Any],
        collate: Collate,
        groups: Sequence[str],
        published: Published,
    ) -> None:
        self._order = Order(groups, arguments.train_batch_size * arguments.world_size, arguments.seed)
        self._published = published
        super().__init__(stage, arguments, data_collator=collate, train_dataset=examples, eval_dataset=held_out)
        self.add_callback(_TellEpoch(self._order))
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self._order

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss over the held-out examples and the stage's other metrics; logged, and given to the callbacks."""
        began = time.perf_counter()
        self.model.eval()
        metrics: dict[str, float] = {}
        with torch.no_grad():
            if len(self.eval_dataset):
                metrics |= self._held_out_metrics()
            metrics |= self._other_metrics()
        self.model.train()
        metrics["runtime"] = round(time.perf_counter() - began, 3)
        found = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _held_out_metrics(self) -> dict[str, float]:
        raise NotImplementedError

    def _other_metrics(self) -> dict[str, float]:
        return {}

    def _held_out_batches(self) -> Iterator[dict[str, Any]]:
        """This process's share of the held-out examples, collated."""
        size = self.args.eval_batch_size
        own = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        for start in range(0, len(own), size):
            batch = self.data_collator([self.eval_dataset[(EVALUATION, index)] for index in own[start : start + size]])
            yield self._prepare_inputs(batch)

    def _summed(self, sums: Tensor) -> list[float]:
        """Sum over all processes."""
        total: list[float] = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        return total

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self._published.save(self.model.adapted, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model.adapted, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_weights(self.model.adapted, Path(self.state.best_model_checkpoint))


class MntpTrainer(PackedTrainer):
    """The loss is the mean over all hidden tokens of a step, in all its batches and processes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count a step's hidden tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This batch's share of the step's loss."""
        losses, _ = model(**inputs)
        # Data parallelism takes the mean over processes.
        loss: Tensor = losses.sum() * self.args.world_size / max(int(num_items_in_batch), 1)
        return loss

    def _held_out_metrics(self) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in self._held_out_batches():
            losses, hits = self.model(**batch)
            sums += torch.tensor([losses.sum().item(), hits.sum().item(), len(losses)])
        loss, hits, tokens = self._summed(sums)
        return {"loss": loss / max(tokens, 1), "accuracy": hits / max(tokens, 1)}


class ContrastiveTrainer(PackedTrainer):
    """The loss is that of an objective over the texts of a batch in all processes."""

    def __init__(
        self, *arguments: Any, objective: Objective, dropout_in_evaluation: bool, pairs: Sequence[ScoredPair]
    ) -> None:
        super().__init__(*arguments)
        self._objective, self._dropout_in_evaluation, self._pairs = objective, dropout_in_evaluation, pairs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of this batch over all processes."""
        return contrastive_loss(_vectors(model, inputs), self._objective)

    def _held_out_metrics(self) -> dict[str, float]:
        """Use dropout only if the loss depends on it, with random numbers of its own that are the same each time."""
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            self.model.train(self._dropout_in_evaluation)
            for batch in self._held_out_batches():
                loss = texts_loss(_vectors(self.model, batch), self._objective)
                sums += torch.tensor([loss.item() * batch["queries"], batch["queries"]])
        self.model.eval()
        total, queries = self._summed(sums)
        return {"loss": total / max(queries, 1)}

    def _other_metrics(self) -> dict[str, float]:
        """Spearman's correlation over the pairs, as in `eval --sts`, with the present weights. Every process has it."""
        if not self._pairs:
            return {}
        texts = [text for pair in self._pairs for text in (pair.first, pair.second)]
        return {"spearman": evaluate_sts(self._pairs, self.encode(texts))}

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(B, D) vectors of length 1, as they would be served. Texts of about the same length are computed together."""
        size = self.args.eval_batch_size
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = np.empty((len(texts), self.model.adapted.base_model.model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(texts), size):
            own = order[start : start + size]
            inputs = self._prepare_inputs(self.data_collator.of_texts([texts[index] for index in own]))
            vectors[own] = normalize(self.model(**inputs)).cpu().numpy()
        return vectors


def _vectors(model: Any, inputs: dict[str, Any]) -> TextBatch:
    vectors = model(inputs["chunks"])
    return TextBatch(vectors[: inputs["queries"]], vectors[inputs["queries"] :], **inputs["beside"])


class _TellEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells an `Order` the epoch. accelerate doesn't if several processes go on in the middle of one."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Called by the Trainer."""
        self._order.set_epoch(int(state.epoch))


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Ends a run after `steps` steps. As in the official scripts, the learning rate is planned for the whole run."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Called by the Trainer."""
        if state.global_step >= self._steps:
            control.should_training_stop = True
