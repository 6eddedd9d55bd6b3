"""The Trainer of one phase."""

import copy
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import skip_first_batches
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PredictionOutput, TrainOutput, rotate_checkpoints, speed_metrics

from .adapter import has_adapter
from .callbacks import DataWait, LogitScaleClamp, LossCallback, LossContext, check_budget, check_recipe, replay_of
from .callbacks.base import BatchGradient, PhaseBoundary
from .callbacks.contrastive import contrastive_loss
from .data import PairCollator, PairDataset, refuse_unknown_pair_ids
from .data.loading import concatenate_shared
from .data.pair_groups import Arrangement, arrangement_for
from .data.pairs import NumberedRows, NumberingCollator
from .data.sampling import GlobalBatches
from .disk import removed_on_failure
from .distributed import process_index, row_counts, world_size
from .embeddings import PairEmbeddings, embed_pairs, pair_embeddings
from .evaluation.encoding import EncodedPairs, Encoder, encode_pairs
from .evaluation.retrieval import retrieval_metrics
from .evaluation.suite import LabelTest
from .files import SEAL, seal, write_text
from .gradcache import GradientCache, join_batches
from .hub.faults import warn_of_failed_pushes
from .model_card import trainer_card
from .recipes import Part, build_recipe, check_teachers
from .replay import Replay, StoredEmbeddings, replayed_rows
from .teacher import Teacher, embed_in_chunks, teacher_of
from .teacher.cache import CachedTeacher, cache_for_phase, cache_obstacle
from .trained_weights import trained_weights
from .training.batch_gradients import batch_gradients
from .training.callback_modules import CallbackModules
from .training.checkpoint import (
    LOSS_CALLBACKS_NAME,
    read_beside_adapter,
    read_loss_callbacks,
    read_trained_along,
    read_weights,
    write_loss_callbacks,
    write_trained_beside,
)
from .training.checks import check_contrastive_batch, check_engine, warn_of_accumulation
from .training.dataloader import dataloader_of_shares
from .training.energy import EnergyMeter
from .training.finite import is_finite_everywhere, loss_not_finite, require_finite_weights
from .training.learning_rates import give_own_learning_rate
from .training.log_means import LogMeans
from .training.loss_terms import loss_terms
from .training.lost_processes import PatientBatches, told_of_lost_processes
from .training.short_memory import told_of_short_memory
from .training.step_batch import GlobalRows, StepBatch, gather_pairs, tensors_of
from .training.trainable import trainable
from .training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)


class ModXTrainer(Trainer):
    """Fine-tune a dual encoder for one phase, with loss callbacks and the old model as frozen teacher.

    The parameters are `Trainer`'s, in its order, and two more. Data sets are `datasets.Dataset`s with an image and a
    caption column (named in the arguments); every example of the global batch is a negative of every other, whatever
    the number of processes.

    Args:
        model: with `args.peft` it gets a fresh adapter and is, trained, a `PeftModel`.
        args: `ModXTrainingArguments`.
        processing_class: a processor with an image processor and a tokenizer, for instance `CLIPProcessor`.
        data_collator: replaces image and caption columns altogether: it takes items of the data set and returns
            what the model's forward pass takes (`pixel_values`, `input_ids`, `attention_mask`, of SigLIP 2 also
            `pixel_attention_mask` and `spatial_shapes`) and, if it likes, `pair_id`, `caption_id` (see
            `mask_duplicates`) and `row_id` (N,). The order of the rows is ours; a data set without a length is read in
            the stock way, and then several processes need batches that are full.
        compute_metrics: called in evaluation beside the retrieval metrics, with `predictions = (image embeddings,
            text embeddings)` and `label_ids = (image ids, text ids)`.
        loss_callbacks: a recipe as `build_recipe` takes it, for instance a name or a list of `LossCallback`s; they
            join the Trainer's callbacks. A callback added later with `add_callback` counts as well.
        teacher: the old model. None takes a frozen copy, in memory, of the model as it is handed over. With
            `args.teacher` "initial" it must be given: a Trainer knows one phase, and no model from before it.

    Raises:
        TypeError: the model is no dual encoder, or a data set or column is of a wrong type.
        ValueError: a missing column, a batch of one pair, a recipe without or with two contrastive terms, the initial
            teacher without one.
        ImportError: `args.peft` without PEFT.
    """

    # The loss is a mean over the batch: the Trainer divides by the number of accumulated batches. A `labels` column
    # must not change that.
    loss_is_scaled_for_ga = False

    _may_lack_pair_ids = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: ModXTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        loss_callbacks: str | Sequence[Part] = "modx",
        teacher: nn.Module | None = None,
    ):
        args = args if args is not None else ModXTrainingArguments(output_dir="tmp_trainer")
        if compute_loss_func is not None:
            raise ValueError(
                "ModXTrainer takes no compute_loss_func. Write a LossCallback and pass it in loss_callbacks."
            )
        if preprocess_logits_for_metrics is not None:
            raise ValueError("ModXTrainer takes no preprocess_logits_for_metrics. There are no logits to preprocess.")
        if optimizers[0] is not None and args.learning_rate_of_text is not None:
            raise ValueError(
                "The optimizer has learning rates of its own. Leave out text_learning_rate and "
                "text_learning_rate_factor, or optimizers."
            )
        if model is not None:
            model = trainable(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        sharding = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else None
        check_engine(args, sharding)
        self.model_accepts_loss_kwargs = False
        self.label_names = []
        self.can_return_loss = True
        self._uses_columns = data_collator is None
        if self._uses_columns:
            self.data_collator = self._pair_collator(args.mask_duplicates)
        self.memory: Dataset | None = None
        self._stored: StoredEmbeddings | None = None
        self._check_data()
        self.add_callback(LogitScaleClamp(args.max_log_logit_scale))
        built = build_recipe(loss_callbacks)
        check_teachers(loss_callbacks, built, args.teacher)
        for callback in built:
            self.add_callback(callback)
        self.teacher = Teacher(teacher) if teacher is not None else None
        self._phase_start: dict[str, Tensor] = {}
        self._phase_has_started = False
        if train_dataset is not None:
            self._remember_phase_start()
        self._means = LogMeans()
        self._reading: PatientBatches | None = None
        self._computed: tuple[dict[str, Tensor], PairEmbeddings, Tensor] | None = None  # terms of the last loss
        self._held: list[dict[str, Tensor]] = []  # batches of the optimizer step, with the gradient cache
        self._makes_optimizer = optimizers[0] is None
        self._along = CallbackModules(lambda: self.loss_callbacks)
        self.add_callback(self._along)
        self.on_encoded: Callable[[str, EncodedPairs], None] | None = None
        """Called in `evaluate` with the prefix of the metrics and the embeddings of each test set."""
        self.on_classes: Callable[[str, list[float | None]], None] | None = None
        """Called in `evaluate` with the prefix of the metrics and the accuracies by class of a `ZeroShotTest`."""
        self.data_wait = DataWait()
        self.add_callback(self.data_wait)  # the last one: the others' work at an event is no waiting

    def call_model_init(self, trial: Any = None) -> nn.Module:
        self._phase_has_started = False
        return trainable(super().call_model_init(trial), self.args)

    @property
    def loss_callbacks(self) -> list[LossCallback]:
        """The loss callbacks that are live: those among the Trainer's callbacks."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, LossCallback)]

    def use_memory(self, memory: Dataset) -> None:
        """Replay pairs of this table beside the training set, as the callbacks want it (`LossCallback.replay`).

        Args:
            memory: earlier pairs in the columns of the training set; for callbacks that hold them to stored embeddings
                with these (see `ReplayMemory`).

        Raises:
            ValueError: no callback replays, embeddings are missing, or a data collator reads the columns.
        """
        if self._replay is None:
            raise ValueError("A memory is given and no callback of the recipe replays it: add ExperienceReplay().")
        if not self._uses_columns:
            raise ValueError("A memory is replayed by the built-in data path only. Leave data_collator out.")
        self._pairs(memory)
        self._stored = StoredEmbeddings(memory) if self._replay.stores_embeddings else None
        self.memory = memory

    # ---- Training ----

    def train(self, *args, **kwargs):
        check_recipe(self.loss_callbacks)
        check_budget(self.loss_callbacks)
        if not all(callback.trains for callback in self.loss_callbacks):
            return TrainOutput(0, 0.0, {})
        warn_of_accumulation(self.args)
        self._held = []
        self._energy = EnergyMeter()
        if self.model_init is None:  # else with the model that is about to be made
            self._start_phase()
        if self.model_wrapped is self.model:
            # Another Trainer, or a stock evaluation, has left the model marked as prepared: training would go on
            # without DDP and the processes would drift apart in silence.
            self.model._is_accelerate_prepared = False
        try:
            with told_of_lost_processes(self.args):
                output = super().train(*args, **kwargs)
        finally:
            # The workers of an unfinished epoch end with their iterator, at once if it is freed here; the garbage
            # collector would close their queues first and then wait five seconds for each of them.
            self._reading = None
        if not (self.args.enable_jit_checkpoint and self.state.global_step < self.state.max_steps):
            self.finish_phase()
        return output

    def finish_from(self, checkpoint: str) -> None:
        """Instead of `train`, where a phase was interrupted after its last step: load that step's checkpoint and do
        what comes after it."""
        self._start_phase()
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        self._find_best_checkpoint()
        if rest := self._since_the_last_log():
            self.log(rest)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.finish_phase()

    def finish_phase(self) -> None:
        """Let the loss callbacks do what comes after the last step, first those that decide on the weights; `train`
        does it by itself."""
        for callback in sorted(self.loss_callbacks, key=lambda c: (not c.owns_weights, not c.guards_weights)):
            callback.finish_phase(self._boundary())
        # Training again starts the callbacks anew; the teacher and `phase_start` stay those of the model handed over.
        self._phase_has_started = False

    def learn_from_base(self) -> None:
        """Let the loss callbacks that want it (`learns_from_base`) finish the training set as a phase, which the model
        has learned already."""
        for callback in self.loss_callbacks:
            if callback.learns_from_base:
                callback.finish_phase(self._boundary())

    def _start_phase(self) -> None:
        self._remember_phase_start()
        if not self._phase_has_started:
            require_finite_weights(self._dual_encoder, "Nothing can be trained from here: the model has")
            for callback in self.loss_callbacks:
                callback.start_phase(self._boundary())
            self._along.start(self.args.device)
        self._phase_has_started = True

    def _boundary(self) -> PhaseBoundary:
        return PhaseBoundary(
            model=self._dual_encoder,
            phase_start=self._phase_start,
            train_dataset=self.train_dataset,
            memory=self.memory,
            collator=self._pair_collator() if self._uses_columns else None,
            args=self.args,
            autocast=self.accelerator.autocast,
            gradients=self._gradients,
            measure=self.measure,
            callbacks=self.loss_callbacks,
        )

    def _prepare_for_training(self, *args, **kwargs):
        self._start_phase()
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.prepare(self.accelerator)
            self._cache_teacher()
        return prepared

    def _cache_teacher(self) -> None:
        """Embed the phase with the teacher once, where that is possible and pays; the teacher then leaves memory."""
        if isinstance(self.teacher, CachedTeacher):
            dataset, memory = self._cached_data
            if self.train_dataset is not dataset or self.memory is not memory:
                raise ValueError(
                    "train_dataset is another one, or the memory is, than the old model's embeddings were cached for. "
                    "Make a new ModXTrainer for it, or set teacher_cache='off'."
                )
            return
        dataset, pairs_seen = None, 0
        if cache_obstacle(self.data_collator) is None:
            steps = self.args.phase_steps(len(self.train_dataset))  # of the whole phase: resumed, it decides as before
            dataset, pairs_seen = self._training_pairs(), steps * self.args.total_batch_size
        cached = cache_for_phase(self.teacher, dataset, self.data_collator, self.accelerator, self.args, pairs_seen)
        if cached is not None:
            self.teacher.release()
            self.teacher, self._cached_data = cached, (self.train_dataset, self.memory)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The sum of all loss terms on the global batch, the same value on every process; with `return_outputs` also
        this process's embeddings."""
        inputs = tensors_of(inputs)
        # Before the student: a look into the cached teacher waits for the device.
        teacher = self._teacher_embeddings(inputs)
        batch = self._step_batch(inputs)
        student = embed_pairs(model, self._dual_encoder, batch.inputs, batch.token_embeds)
        loss = self._loss(student, teacher, batch)
        return (loss, batch.pairs(student)) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As in `Trainer`; with `gradient_cache_chunk_size` the batches of one optimizer step are held until the last
        and form one contrastive batch.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the step is not taken.
            torch.OutOfMemoryError, RuntimeError: there is too little memory; the message says what takes it.
        """
        self._computed = None
        with told_of_short_memory(self.args):
            loss = self._forward_and_backward(model, inputs, num_items_in_batch)
        if self._computed is not None and not is_finite_everywhere(loss):
            raise loss_not_finite(self.state.global_step + 1, self.args, *self._computed, self._first_memory_row)
        return loss

    def _forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        if self.args.gradient_cache_chunk_size is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self._along.average_gradients()
            return loss
        self._held.append(tensors_of(self._prepare_inputs(inputs)))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # of optimizers without a schedule
        joined = join_batches(self._held, self._pad_token_id)
        self._held = []
        teacher = self._teacher_embeddings(joined)
        batch = self._step_batch(joined)
        loss = GradientCache(self.args.gradient_cache_chunk_size).backward(
            self.accelerator,
            model,
            batch.inputs,
            embed=lambda chunk: embed_pairs(model, self._dual_encoder, chunk, batch.token_embeds),
            loss_of=lambda image, text: self._loss(pair_embeddings(self._dual_encoder, image, text), teacher, batch),
            along=self._along.parameters(),
        )
        self._along.average_gradients()
        return loss

    def _step_batch(self, inputs: dict[str, Tensor]) -> StepBatch:
        """The batch with all that the loss needs to know of it, and with what the loss callbacks add to it."""
        counts = row_counts(inputs["input_ids"])
        context, kept = self._context(inputs, counts)
        added = {
            callback: self._prepare_input(callback.extra_inputs(context))
            for callback in self.loss_callbacks
            if type(callback).extra_inputs is not LossCallback.extra_inputs
        }
        return StepBatch.join(inputs, added, counts, kept, context, self._pad_token_id)

    def _context(self, inputs: dict[str, Tensor], counts: list[int]) -> tuple[LossContext, Tensor | None]:
        """The context of the global batch, and which of the gathered rows belong to it (None: all)."""
        rows = GlobalRows.gather(inputs, counts, self.args)
        is_replay, stored = replayed_rows(rows.row_ids, rows.caption_index, self._first_memory_row, self._stored)
        context = LossContext(
            model=self._dual_encoder,
            batch=inputs,
            pair_ids=rows.pair_ids,
            row_ids=rows.row_ids,
            is_replay=is_replay,
            step=self.state.global_step,
            epoch=self.state.epoch or 0.0,
            phase_start=self._phase_start,
            shard=rows.shard(counts),
            positives=self._positives,
            stored=stored,
        )
        return context, rows.kept

    def _loss(self, local: PairEmbeddings, local_teacher: PairEmbeddings | None, batch: StepBatch) -> Tensor:
        """From this process's embeddings to the global loss."""
        student = gather_pairs(batch.pairs(local), batch.counts, batch.kept)
        teacher = None if local_teacher is None else gather_pairs(local_teacher, batch.counts, batch.kept)
        terms = loss_terms(self.loss_callbacks, student, teacher, batch.context, batch.gather_extra(local))
        loss = torch.stack(list(terms.values())).sum()
        self._means.add({"loss": loss, **terms, **batch.context.metrics})
        found = replace(student, image=student.image.detach(), text=student.text.detach())
        self._computed = {name: term.detach() for name, term in terms.items()}, found, batch.context.row_ids
        return loss

    def _teacher_embeddings(self, batch: dict[str, Tensor]) -> PairEmbeddings | None:
        """In chunks where the student has chunks; None where no callback asks for the old model."""
        if not self._needs_teacher:
            return None
        return embed_in_chunks(self.teacher, batch, self.args.gradient_cache_chunk_size)

    def _gradients(
        self, loss: Callable[[PairEmbeddings, LossContext], Tensor], batches: int
    ) -> Iterator[BatchGradient]:
        """See `PhaseBoundary`."""
        some = itertools.islice(self._contrastive_batches(), batches)
        chunk_size = self.args.gradient_cache_chunk_size
        return batch_gradients(loss, some, self._dual_encoder, self.accelerator, self._context, chunk_size)

    def _contrastive_batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch, as those of one optimizer step are held together with the gradient cache."""
        batches = iter(self.get_train_dataloader())
        while held := list(itertools.islice(batches, self.args.batches_held)):
            yield join_batches([tensors_of(self._prepare_inputs(batch)) for batch in held], self._pad_token_id)

    # ---- Batches, optimizer and log ----

    def get_train_dataloader(self) -> DataLoader:
        """Batches of pairs in an order that depends on (data seed, epoch) alone; each process gets its share."""
        if self.train_dataset is None:
            raise ValueError("Training requires a train_dataset.")
        if self._uses_columns:
            dataset, collator = self._training_pairs(), self.data_collator
        elif hasattr(self.train_dataset, "__len__"):
            dataset, collator = NumberedRows(self.train_dataset), NumberingCollator(self.data_collator)
        else:
            return super().get_train_dataloader()
        batches = GlobalBatches(
            len(self.train_dataset),
            self._train_batch_size,
            seed=self.args.effective_data_seed,
            current_epoch=lambda: int(self.state.epoch or 0),
            drop_last=self.args.dataloader_drop_last,
            batches_held=self.args.batches_held,
            memory_rows=len(dataset) - len(self.train_dataset),
            memory_share=self._replay.batch_share if self._replay is not None else 0.0,
            arrange=self._arrangement(),
            process_index=process_index(),
            num_processes=world_size(),
        )
        return dataloader_of_shares(dataset, batches, collator, self.args, self.accelerator)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in `Trainer`, from workers that may die or hang (see `PatientBatches`)."""
        loader = self.callback_handler.train_dataloader
        if not self.args.dataloader_num_workers or not hasattr(loader, "batch_sampler"):
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._reading is None or self._reading.of_epoch is not epoch_iterator:
            taken = round((self.state.epoch or 0.0) % 1 * len(loader))
            self._reading = PatientBatches(epoch_iterator, lambda n: iter(skip_first_batches(loader, n)), taken)
        return super().get_batch_samples(self._reading, num_batches, device)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        if self.args.decay_logit_scale:
            return names
        return [name for name in names if not name.endswith("logit_scale")]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self.args.learning_rate_of_text is not None:
            give_own_learning_rate(optimizer, self.model, self.args.learning_rate_of_text)
        if self._makes_optimizer:  # the modules may be others than when it was made
            self._along.join(optimizer, self.args.weight_decay)
        if not self._along.are_in(optimizer):
            raise ValueError(
                f"The optimizer does not train {', '.join(self._along.modules())}, which a loss callback wants to be "
                "trained along. Leave out optimizers."
            )
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        along = self._along.parameters()
        if not along:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *along], self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and (share := self.data_wait.share()) is not None:
            logs["data_wait"] = share
        if "loss" in logs:
            logs.update(self._since_the_last_log(with_loss=True))
        has_ended = "total_flos" in logs  # a test may be called train: its loss is `train_loss`, too
        if has_ended:
            logs.update(self._since_the_last_log())
        if has_ended and (joules := self._energy.joules()) is not None:
            logs["train_energy_joules"] = joules
        super().log(logs, start_time)

    def _since_the_last_log(self, with_loss: bool = False) -> dict[str, float]:
        """Means over the steps. The stock one of the loss leaves out the steps before an interruption."""
        means = self._means.take()
        if not means:
            return {}
        model = self._dual_encoder
        means["logit_scale"] = model.logit_scale.detach().exp().item()
        if getattr(model, "logit_bias", None) is not None:
            means["logit_bias"] = model.logit_bias.item()
        return {name: mean for name, mean in means.items() if with_loss or name != "loss"}

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | LabelTest | dict[str, Dataset | LabelTest] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Retrieval on the whole test set: `{prefix}_image_to_text_recall@1` and so on, fractions in [0, 1], and
        `{prefix}_loss`, the contrastive loss over all its pairs (first captions). Of a `LabelTest` its own metrics.
        Sharded over processes, identical on each."""
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, dataset in eval_dataset.items():
                metrics.update(self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if eval_dataset is None:
            raise ValueError("Evaluation requires an eval_dataset.")
        start = time.time()
        values = self.measure(
            eval_dataset,
            partial(self.on_encoded, metric_key_prefix) if self.on_encoded else None,
            partial(self.on_classes, metric_key_prefix) if self.on_classes else None,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(eval_dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(
        self,
        test: Dataset | LabelTest,
        on_encoded: Callable[[EncodedPairs], None] | None = None,
        on_classes: Callable[[list[float | None]], None] | None = None,
    ) -> dict[str, float]:
        """The metrics of `evaluate` without prefix and log; `on_encoded` gets the embeddings of pairs, `on_classes`
        what is reached in each class."""
        if isinstance(test, LabelTest):
            args = self.args
            with self._in_eval_mode() as model:
                encoder = Encoder(
                    model, self._pair_collator(), args.eval_batch_size, args.dataloader_num_workers, args.device
                )
                measured = test.measured(encoder)
            if on_classes is not None and measured.per_class is not None:
                on_classes(measured.per_class)
            return measured.metrics
        encoded = self.encode(test)
        if on_encoded is not None:
            on_encoded(encoded)
        return self._metrics(encoded)

    def encode(self, dataset: Dataset) -> EncodedPairs:
        """The embeddings of a test set in eval mode, with all captions; shared by all processes, the same on each."""
        with self._in_eval_mode() as model:
            return encode_pairs(
                model,
                self._pairs(dataset),
                self._pair_collator(),
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                device=self.args.device,
            )

    @contextmanager
    def _in_eval_mode(self) -> Iterator[nn.Module]:
        """The dual encoder without its wrappers, in the precision of the training."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                yield self._dual_encoder
        finally:
            self.model.train(was_training)

    def _metrics(self, encoded: EncodedPairs) -> dict[str, float]:
        metrics = retrieval_metrics(
            encoded.image, encoded.text, encoded.image_ids, encoded.text_ids, sharded=world_size() > 1
        )
        first = encoded.first_captions()
        with torch.no_grad():
            pairs = pair_embeddings(self._dual_encoder, encoded.image, encoded.text[first])
            metrics["loss"] = contrastive_loss(pairs, pair_ids=encoded.image_ids, positives=self._positives).item()
        if self.compute_metrics is not None:
            metrics.update(self.compute_metrics(encoded.as_predictions()))
        return metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Embeddings instead of batch-local logits: `predictions = (images (N, D), texts (C, D))`, `label_ids` their
        pair ids, in the order of the rows with all captions of each; `metrics` as `evaluate` names them."""
        encoded = self.encode(test_dataset)
        prediction = encoded.as_predictions()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._metrics(encoded).items()}
        return PredictionOutput(prediction.predictions, prediction.label_ids, metrics)

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        require_finite_weights(self._dual_encoder, f"Step {step} is not saved: after it the model has")
        run_folder = self._get_output_dir(trial)
        folder = Path(run_folder, f"checkpoint-{step}")
        with removed_on_failure(folder, f"The checkpoint of step {step}"):
            self._write_checkpoint(folder, model, trial)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run_folder, self.args.save_total_limit, best, use_mtime=True)

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SEAL).unlink(missing_ok=True)
            self.save_loss_callbacks(folder / LOSS_CALLBACKS_NAME)
            write_trained_beside(self._dual_encoder, self._along, folder)
            self._means.write(folder)
        with self._keeping_all_checkpoints():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its random state
        if self.args.should_save:
            seal(folder)

    @contextmanager
    def _keeping_all_checkpoints(self) -> Iterator[None]:
        """The stock method would remove the checkpoint before while this one may still be lost."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._start_phase()
        self._resumed_from = resume_from_checkpoint
        if self._is_plain:
            read_weights(self._dual_encoder, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_loss_callbacks(os.path.join(resume_from_checkpoint, LOSS_CALLBACKS_NAME))
        read_beside_adapter(self._dual_encoder, resume_from_checkpoint)
        read_trained_along(self._along, resume_from_checkpoint)
        self._means.read(Path(resume_from_checkpoint))

    def _load_callback_state(self) -> None:
        """Of callbacks as early stopping, which know how long they have waited. The stock method does it only if asked
        to, and with new objects, which the run's next phase would not know."""
        self._find_best_checkpoint()  # the state has just been read
        for name, stored in self.state.stateful_callbacks.items():
            own = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
            own = [callback for callback in own if type(callback).__name__ == name]
            # Of several of one class the states are appended with every checkpoint.
            states = stored[-len(own) :] if isinstance(stored, list) else [stored]
            for callback, state in zip(own, states, strict=False):
                vars(callback).update(state["attributes"])

    def _find_best_checkpoint(self) -> None:
        """The state has it where it was saved. In a folder that was moved it is under its own name; the stock method
        would forget it there. A checkpoint that comes from the Hub comes without it."""
        state = TrainerState.load_from_json(os.path.join(self._resumed_from, "trainer_state.json"))
        if state.best_model_checkpoint is None:
            return
        here = Path(self.args.output_dir, Path(state.best_model_checkpoint).name)
        if here.is_dir():
            if not os.path.isdir(state.best_model_checkpoint):
                logger.warning("The best checkpoint has been moved: it is %s.", here)
            self.state.best_model_checkpoint = str(here)
        elif not os.path.isdir(state.best_model_checkpoint):
            logger.warning(
                "The best checkpoint so far, %s, is not there: the best one from step %d on counts.",
                here.name,
                state.global_step,
            )
            self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None

    def _load_best_model(self) -> None:
        if self._is_plain:
            read_weights(self._dual_encoder, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        read_beside_adapter(self._dual_encoder, self.state.best_model_checkpoint)

    def save_loss_callbacks(self, path: str | os.PathLike) -> None:
        """Write the states of the loss callbacks to a safetensors file."""
        write_loss_callbacks(self.loss_callbacks, path)

    def load_loss_callbacks(self, path: str | os.PathLike) -> None:
        """Give the loss callbacks their states back; where there is no such file, they become as new."""
        read_loss_callbacks(self.loss_callbacks, path)

    # ---- The Hub: a Trainer used alone pushes as the stock one does, with the card of this library ----

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md`, see `trainer_card`. `tasks`, `dataset` and `dataset_args` are not used: the task is known
        and the data tell of themselves."""
        if self.is_world_process_zero():
            card = trainer_card(
                self,
                model_name=model_name,
                language=language,
                license=license,
                tags=tags,
                finetuned_from=finetuned_from,
                dataset_tags=dataset_tags,
            )
            write_text(Path(self.args.output_dir) / "README.md", card)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The stock method pushes what lies in the output folder, in the background, and asks for no outcome.
        warn_of_failed_pushes(getattr(self, "push_in_progress", None), self.args.hub_token)
        self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        warn_of_failed_pushes(getattr(self, "push_in_progress", None), self.args.hub_token)

    # ---- Parts ----

    @property
    def _dual_encoder(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _is_plain(self) -> bool:
        """A model of transformers without adapter."""
        return isinstance(self._dual_encoder, PreTrainedModel) and not has_adapter(self._dual_encoder)

    @property
    def _positives(self) -> bool:
        return self.args.same_pair_id == "positive"

    def _arrangement(self) -> Arrangement | None:
        return arrangement_for(self.args, self.train_dataset, has_columns=self._uses_columns)

    @property
    def _first_memory_row(self) -> int | None:
        """The row ids of the memory follow those of the training set; None: there is no memory."""
        return len(self.train_dataset) if self.memory is not None else None

    @property
    def _needs_teacher(self) -> bool:
        return any(callback.needs_teacher for callback in self.loss_callbacks)

    @property
    def _replay(self) -> Replay | None:
        return replay_of(self.loss_callbacks)

    def _remember_phase_start(self) -> None:
        """Take what the loss callbacks need of the weights as they are now, once."""
        if self._needs_teacher and self.teacher is None:
            if self.args.teacher == "initial":
                raise ValueError(
                    "teacher='initial' is a setting of ContinualRun, which has the model that the run began with. "
                    "Give ModXTrainer that model: ModXTrainer(..., teacher=model)."
                )
            self.teacher = teacher_of(self.model)
        if any(callback.needs_phase_start for callback in self.loss_callbacks) and not self._phase_start:
            self._phase_start = {name: weight.detach().clone() for name, weight in trained_weights(self.model).items()}

    @property
    def _pad_token_id(self) -> int:
        tokenizer = getattr(self.processing_class, "tokenizer", None)
        return 0 if tokenizer is None else tokenizer.pad_token_id

    def _training_pairs(self) -> PairDataset:
        """The new pairs, and after them those of the memory."""
        if self.memory is None:
            return self._pairs(self.train_dataset)
        return self._pairs(concatenate_shared([self.train_dataset, self.memory], self.args.pair_columns))

    def _pairs(self, dataset: Dataset) -> PairDataset:
        return PairDataset(dataset, *self.args.pair_columns)

    def _pair_collator(self, mask_duplicates: bool = False) -> PairCollator:
        if self.processing_class is None:
            raise ValueError("ModXTrainer needs a processing_class, for instance CLIPProcessor.from_pretrained(...).")
        return PairCollator.for_model(
            self._dual_encoder,
            self.processing_class,
            seed=self.args.effective_data_seed,
            image_augmentation=self.args.image_augmentation,
            mask_duplicates=mask_duplicates,
        )

    def _check_data(self) -> None:
        """All that can be told of the data without decoding them, before hours are spent."""
        if self._uses_columns:
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            tables = [
                table for table in (self.train_dataset, *sets.values()) if not isinstance(table, LabelTest | None)
            ]
            for table in tables:
                self._pairs(table)
            if tables and not self._may_lack_pair_ids:
                refuse_unknown_pair_ids(tables, self.args.pair_id_column)
        if self.train_dataset is None:
            return
        self._arrangement()
        if not check_contrastive_batch(self.args, len(self.train_dataset)):
            # The smaller batch is all there is: dropping it would leave no step.
            self.args = copy.copy(self.args)
            self.args.dataloader_drop_last = False


class PartTrainer(ModXTrainer):
    """For one of several tables that were checked together, of which some may be without the pair ids of others."""

    _may_lack_pair_ids = True
