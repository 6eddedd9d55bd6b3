"""The Trainer of one phase."""

import copy
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PredictionOutput, TrainOutput, rotate_checkpoints, speed_metrics

from .adapter import add_adapter
from .callbacks import DataWait, LogitScaleClamp, LossCallback, LossContext, check_budget, check_recipe, replay_of
from .callbacks.base import BatchGradient, PhaseBoundary
from .callbacks.contrastive import contrastive_loss
from .data import PairCollator, PairDataset
from .data.pair_groups import Arrangement, arrangement_for
from .data.pairs import NumberedRows, NumberingCollator
from .data.sampling import GlobalBatches
from .disk import removed_on_failure
from .distributed import all_gather_rows, gather_stacked, process_index, row_counts, world_size
from .embeddings import (
    PairEmbeddings,
    check_dual_encoder,
    embed_pairs,
    embedding_width,
    pair_embeddings,
)
from .evaluation.encoding import EncodedPairs, Encoder, encode_pairs
from .evaluation.retrieval import retrieval_metrics
from .evaluation.suite import LabelTest, Measured
from .files import SEAL, seal, write_text
from .gradcache import GradientCache, join_batches
from .hub.faults import describe
from .model_card import trainer_card
from .recipes import Part, build_recipe
from .replay import Replay, StoredEmbeddings
from .teacher import Teacher, teacher_of
from .teacher.cache import CachedTeacher, build_teacher_cache, cache_obstacle, caption_offsets, choose_cache
from .trained_weights import leaves_of_trained_weights, trained_weights
from .training.callback_modules import TrainedAlong
from .training.checkpoint import (
    LOSS_CALLBACKS_NAME,
    read_beside_adapter,
    read_loss_callbacks,
    read_trained_along,
    write_loss_callbacks,
    write_trained_beside,
)
from .training.energy import EnergyMeter
from .training.engines import check_engine
from .training.finite import is_finite_everywhere, require_finite_weights, why_not_finite
from .training.learning_rates import give_own_learning_rate
from .training.log_means import LogMeans
from .training.lost_processes import PatientBatches, told_of_lost_processes
from .training.step_batch import (
    ReadyBatch,
    first_occurrences,
    gather_pairs,
    given_texts,
    own_shard,
    tensors_of,
    with_extra_inputs,
)
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
        teacher: the old model. None takes a frozen copy, in memory, of the model as it is handed over.

    Raises:
        TypeError: the model is no dual encoder, or a data set or column is of a wrong type.
        ValueError: a missing column, a batch of one pair, a recipe without or with two contrastive terms.
        ImportError: `args.peft` without PEFT.
    """

    # The loss is a mean over the batch: the Trainer divides by the number of accumulated batches. A `labels` column
    # must not change that.
    loss_is_scaled_for_ga = False

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
        if model is not None:
            check_dual_encoder(model)
            model = add_adapter(model, args) if args.peft is not None else model
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
        if model is not None:
            self._freeze_towers(self.model)
        self.add_callback(LogitScaleClamp(args.max_log_logit_scale))
        for callback in build_recipe(loss_callbacks):
            self.add_callback(callback)
        self.teacher = Teacher(teacher) if teacher is not None else None
        self._phase_start: dict[str, Tensor] = {}
        self._phase_has_started = False
        if train_dataset is not None:
            self._remember_phase_start()
        self._means = LogMeans()
        self._reading: PatientBatches | None = None
        self._computed: tuple[dict[str, Tensor], PairEmbeddings, Tensor] | None = None  # of the last loss
        self._held: list[dict[str, Tensor]] = []  # batches of the optimizer step, with the gradient cache
        self._along = TrainedAlong(lambda: self.loss_callbacks)
        self.add_callback(self._along)
        self.on_encoded: Callable[[str, EncodedPairs], None] | None = None
        """Called in `evaluate` with the prefix of the metrics and the embeddings of each test set."""
        self.on_classes: Callable[[str, list[float | None]], None] | None = None
        """Called in `evaluate` with the prefix of the metrics and the accuracies by class of a `ZeroShotTest`."""
        self.data_wait = DataWait()
        self.add_callback(self.data_wait)  # the last one: the others' work at an event is no waiting

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
        if self.args.gradient_accumulation_steps > 1 and self.args.gradient_cache_chunk_size is None:
            logger.warning(
                "Gradient accumulation adds no negatives: each of the %d batches of a step is contrasted with itself. "
                "With gradient_cache_chunk_size they form one contrastive batch.",
                self.args.gradient_accumulation_steps,
            )
        self._held = []
        self._energy = EnergyMeter()
        self._start_phase()
        if self.model_wrapped is self.model:
            # Another Trainer, or a stock evaluation, has left the model marked as prepared: training would go on
            # without DDP and the processes would drift apart in silence.
            self.model._is_accelerate_prepared = False
        with told_of_lost_processes(self.args):
            output = super().train(*args, **kwargs)
        if not (self.args.enable_jit_checkpoint and self.state.global_step < self.state.max_steps):
            self.finish_phase()
        return output

    def finish_from(self, checkpoint: str) -> None:
        """Instead of `train`, where a phase was interrupted after its last step: load that step's checkpoint and do
        what comes after it."""
        self._start_phase()
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if rest := self._since_the_last_log():
            self.log(rest)
        self.finish_phase()

    def finish_phase(self) -> None:
        """Let the loss callbacks do what comes after the last step, first those that decide on the weights; `train`
        does it by itself."""
        for callback in sorted(self.loss_callbacks, key=lambda c: (not c.owns_weights, not c.guards_weights)):
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
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.prepare(self.accelerator)
            self._cache_teacher()
        return prepared

    def _cache_teacher(self) -> None:
        """Embed the phase with the teacher once, where that is possible and pays; the teacher then leaves memory."""
        obstacle = cache_obstacle(self.data_collator)
        if isinstance(self.teacher, CachedTeacher):
            if self.train_dataset is not self._cached_dataset:
                raise ValueError(
                    "train_dataset is another one than the old model's embeddings were cached for. Make a new "
                    "ModXTrainer for it, or set teacher_cache='off'."
                )
            return
        numbers = {}
        if obstacle is None:
            dataset = self._training_pairs()
            steps = self.args.phase_steps(len(self.train_dataset))  # of the whole phase: resumed, it decides as before
            numbers = {
                "rows": len(dataset),
                "captions": int(caption_offsets(dataset)[-1]),
                "width": embedding_width(self._dual_encoder),
                "pairs_seen": steps * self.args.total_batch_size,
            }
        mode = choose_cache(self.args.teacher_cache, obstacle=obstacle, **numbers)
        if mode == "off":
            return
        live = self.teacher
        self.teacher = build_teacher_cache(
            live,
            dataset,
            self.data_collator,
            self.accelerator,
            mode=mode,
            folder=Path(self.args.output_dir) / "teacher_cache",
            batch_size=self.args.eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
        )
        live.release()
        self._cached_dataset = self.train_dataset

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
        batch = self._ready(inputs)
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
        try:
            loss = self._forward_and_backward(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise type(error)(f"{error} {self._how_to_need_less_memory()}") from error
        if self._computed is not None and not is_finite_everywhere(loss):
            self._refuse_loss()
        return loss

    def _how_to_need_less_memory(self) -> str:
        batch, chunk = self.args.per_device_train_batch_size, self.args.gradient_cache_chunk_size
        if chunk is not None:
            return f"Lower gradient_cache_chunk_size (now {chunk}; per_device_train_batch_size is {batch})."
        return f"All {batch} pairs of a process are held at once: set gradient_cache_chunk_size to fewer."

    def _refuse_loss(self) -> None:
        terms, student, row_ids = self._computed
        new_rows = len(self.train_dataset) if self.memory is not None else None
        raise FloatingPointError(
            f"The loss of step {self.state.global_step + 1} is not finite: "
            f"{why_not_finite(terms, student, row_ids, new_rows)} The step is not taken, and the checkpoints in "
            f"{self.args.output_dir} are good. Look at these rows; lower learning_rate (now "
            f"{self.args.learning_rate:g}) or max_grad_norm (now {self.args.max_grad_norm:g})"
            + ("; use bf16 in the place of fp16." if self.args.fp16 else ".")
        )

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
        batch = self._ready(joined)
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

    def _ready(self, inputs: dict[str, Tensor]) -> ReadyBatch:
        """The batch with all that the loss needs to know of it, and with what the loss callbacks add to it."""
        counts = row_counts(inputs["input_ids"])
        context, kept = self._context(inputs, counts)
        extra = {
            callback: self._prepare_input(callback.extra_inputs(context))
            for callback in self.loss_callbacks
            if type(callback).extra_inputs is not LossCallback.extra_inputs
        }
        sizes = {
            callback: (len(added.get("pixel_values", ())), len(added.get("input_ids", ())))
            for callback, added in extra.items()
        }
        joined = with_extra_inputs(inputs, extra.values(), self._pad_token_id)
        token_embeds, rows = given_texts(inputs, extra.values())
        if token_embeds is not None:
            joined["token_embeds_row"] = rows
        return ReadyBatch(joined, token_embeds, counts, kept, context, sizes)

    def _loss(self, local: PairEmbeddings, local_teacher: PairEmbeddings | None, batch: ReadyBatch) -> Tensor:
        """From this process's embeddings to the global loss."""
        student = gather_pairs(batch.pairs(local), batch.counts, batch.kept)
        teacher = None if local_teacher is None else gather_pairs(local_teacher, batch.counts, batch.kept)
        extra = batch.gather_extra(local)
        context = batch.context
        terms: dict[str, Tensor] = {}
        for callback in self.loss_callbacks:
            own = replace(context, extra=extra[callback]) if callback in extra else context
            for name, term in callback.loss_terms(student, teacher, own).items():
                if name in terms:
                    raise ValueError(f"Two loss callbacks name a term {name!r}: rename one of them.")
                if not isinstance(term, Tensor) or term.ndim != 0:
                    raise TypeError(
                        f"{type(callback).__name__} gives {name!r} as {term!r}: a term is a scalar tensor."
                    )
                terms[name] = term
        if clash := terms.keys() & context.metrics.keys():
            raise ValueError(f"A loss term and a reported value are both named {', '.join(clash)}: rename one.")
        loss = torch.stack([term.to(student.image.device) for term in terms.values()]).sum()
        self._means.add({"loss": loss, **terms, **context.metrics})
        found = replace(student, image=student.image.detach(), text=student.text.detach())
        self._computed = {name: term.detach() for name, term in terms.items()}, found, context.row_ids
        return loss

    def _teacher_embeddings(self, batch: dict[str, Tensor]) -> PairEmbeddings | None:
        """The old model's embeddings of this process's batch, in chunks where the student has chunks."""
        if not self._needs_teacher:
            return None
        rows = len(batch["input_ids"])
        size = self.args.gradient_cache_chunk_size or rows
        parts = [
            self.teacher.embed({name: tensor[at : at + size] for name, tensor in batch.items()})
            for at in range(0, rows, size)
        ]
        image, text = (torch.cat([getattr(part, side) for part in parts]) for side in ("image", "text"))
        return replace(parts[0], image=image, text=text)

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
            seed=self._data_seed,
            current_epoch=lambda: int(self.state.epoch or 0),
            drop_last=self.args.dataloader_drop_last,
            batches_held=self.args.batches_held,
            memory_rows=len(dataset) - len(self.train_dataset),
            memory_share=self._replay.batch_share if self._replay is not None else 0.0,
            arrange=self._arrangement(),
            process_index=process_index(),
            num_processes=world_size(),
        )
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            timeout=self.args.dataloader_timeout if workers else 0,
        )
        # As for one process: the batches are shared out already.
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            non_blocking=self.accelerator.non_blocking,
        )

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
        if created:
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
        elif "train_loss" in logs:
            logs.update(self._since_the_last_log())
        if "train_runtime" in logs and (joules := self._energy.joules()) is not None:
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
            measured = self._measure(test)
            if on_classes is not None and measured.per_class is not None:
                on_classes(measured.per_class)
            return measured.metrics
        encoded = self.encode(test)
        if on_encoded is not None:
            on_encoded(encoded)
        return self._metrics(encoded)

    def encode(self, dataset: Dataset) -> EncodedPairs:
        """The embeddings of a test set in eval mode, with all captions; shared by all processes, the same on each."""
        was_training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            encoded = encode_pairs(
                self._dual_encoder,
                self._pairs(dataset),
                self._pair_collator(),
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                device=self.args.device,
            )
        self.model.train(was_training)
        return encoded

    def _measure(self, test: LabelTest) -> Measured:
        was_training = self.model.training
        self.model.eval()
        args = self.args
        encoder = Encoder(
            self._dual_encoder, self._pair_collator(), args.eval_batch_size, args.dataloader_num_workers, args.device
        )
        with self.accelerator.autocast():
            measured = test.measured(encoder)
        self.model.train(was_training)
        return measured

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
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_loss_callbacks(os.path.join(resume_from_checkpoint, LOSS_CALLBACKS_NAME))
        read_beside_adapter(self._dual_encoder, resume_from_checkpoint)
        read_trained_along(self._along, resume_from_checkpoint)
        self._means.read(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
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
        self._tell_failed_pushes()
        self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        push = getattr(self, "push_in_progress", None)
        for job in push.jobs if push is not None else []:
            if job.done() and job.exception() is not None:
                logger.warning("A checkpoint was not pushed. %s", describe(job.exception(), self.args.hub_token))

    # ---- Parts ----

    @property
    def _dual_encoder(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    @property
    def _positives(self) -> bool:
        return self.args.same_pair_id == "positive"

    def _arrangement(self) -> Arrangement | None:
        return arrangement_for(self.args, self.train_dataset, has_columns=self._uses_columns)

    @property
    def _needs_teacher(self) -> bool:
        return any(callback.needs_teacher for callback in self.loss_callbacks)

    @property
    def _replay(self) -> Replay | None:
        return replay_of(self.loss_callbacks)

    def _remember_phase_start(self) -> None:
        """Take what the loss callbacks need of the weights as they are now, once."""
        if self._needs_teacher and self.teacher is None:
            self.teacher = teacher_of(self.model)
        if any(callback.needs_phase_start for callback in self.loss_callbacks) and not self._phase_start:
            self._phase_start = {name: weight.detach().clone() for name, weight in trained_weights(self.model).items()}

    def _context(self, inputs: dict[str, Tensor], counts: list[int]) -> tuple[LossContext, Tensor | None]:
        """The context of the global batch, and which of the gathered rows belong to it (None: all)."""
        names = [name for name in ("row_id", "pair_id", "caption_id", "caption_index") if name in inputs]
        if names:
            ids = all_gather_rows(torch.stack([inputs[name] for name in names], dim=1), counts)
            ids = dict(zip(names, ids.unbind(dim=1), strict=True))
        else:
            ids = {}
        row_ids = ids.get("row_id", torch.arange(sum(counts), device=inputs["input_ids"].device))
        pair_ids = ids.get("pair_id", row_ids)
        if self.args.mask_duplicates and "caption_id" not in ids:
            raise ValueError(
                "mask_duplicates needs a caption_id (N,) of integers in the batches of your data_collator."
            )
        if "caption_id" in ids:
            pair_ids = torch.stack([pair_ids, ids["caption_id"]], dim=1)
        # Only a batch that is not full can hold filled-in rows; looking for them costs a synchronisation.
        kept = None
        if world_size() > 1 and not self.args.dataloader_drop_last:
            kept = first_occurrences(row_ids)
        if kept is not None:
            row_ids, pair_ids = row_ids[kept], pair_ids[kept]
            ids = {name: values[kept] for name, values in ids.items()}
        is_replay, stored = self._replayed(row_ids, ids.get("caption_index"))
        context = LossContext(
            model=self._dual_encoder,
            batch=inputs,
            pair_ids=pair_ids,
            row_ids=row_ids,
            is_replay=is_replay,
            step=self.state.global_step,
            epoch=self.state.epoch or 0.0,
            phase_start=self._phase_start,
            shard=own_shard(counts) if world_size() > 1 and kept is None else None,
            positives=self._positives,
            stored=stored,
        )
        return context, kept

    def _replayed(self, row_ids: Tensor, caption_index: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Which rows of the global batch come from the memory, and the embeddings stored with them."""
        if self.memory is None:
            return torch.zeros_like(row_ids, dtype=torch.bool), None
        is_replay = row_ids >= len(self.train_dataset)
        if self._stored is None or not is_replay.any():
            return is_replay, None
        places = row_ids[is_replay] - len(self.train_dataset)
        return is_replay, self._stored.look_up(places, caption_index[is_replay])

    def _gradients(
        self, loss: Callable[[PairEmbeddings, LossContext], Tensor], batches: int
    ) -> Iterator[BatchGradient]:
        """See `PhaseBoundary`. The model is called unwrapped and may be unprepared: the result is the same."""
        model = self._dual_encoder
        was_training = model.training
        model.eval()
        try:
            with leaves_of_trained_weights(model) as leaves:
                for inputs in itertools.islice(self._contrastive_batches(), batches):
                    model.zero_grad()
                    context = self._backward(model, inputs, loss)
                    found = {
                        name: gather_stacked(parameter.grad).mean(dim=0) / self._gradient_scale
                        for name, parameter in leaves.items()
                        if parameter.grad is not None
                    }
                    model.zero_grad()
                    yield BatchGradient(len(context.row_ids), found)
        finally:
            model.train(was_training)

    def _backward(
        self, model: nn.Module, inputs: dict[str, Tensor], loss: Callable[[PairEmbeddings, LossContext], Tensor]
    ) -> LossContext:
        counts = row_counts(inputs["input_ids"])
        context, kept = self._context(inputs, counts)

        def embed(chunk: Mapping[str, Tensor]) -> PairEmbeddings:
            with self.accelerator.autocast():
                found = embed_pairs(model, model, chunk)
            if self.accelerator.mixed_precision == "no":
                return found
            return replace(found, image=found.image.float(), text=found.text.float())

        def loss_of(image: Tensor, text: Tensor) -> Tensor:
            return loss(gather_pairs(pair_embeddings(model, image, text), counts, kept), context)

        size = self.args.gradient_cache_chunk_size
        if size is None:
            whole = embed(inputs)
            self.accelerator.backward(loss_of(whole.image, whole.text))
        else:
            GradientCache(size).backward(self.accelerator, model, inputs, embed, loss_of)
        return context

    def _contrastive_batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch, as those of one optimizer step are held together with the gradient cache."""
        batches = iter(self.get_train_dataloader())
        while held := list(itertools.islice(batches, self.args.batches_held)):
            yield join_batches([tensors_of(self._prepare_inputs(batch)) for batch in held], self._pad_token_id)

    @property
    def _gradient_scale(self) -> float:
        """What fp16 multiplies the loss by."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0

    @property
    def _pad_token_id(self) -> int:
        tokenizer = getattr(self.processing_class, "tokenizer", None)
        return 0 if tokenizer is None else tokenizer.pad_token_id

    def _training_pairs(self) -> PairDataset:
        """The new pairs, and after them those of the memory."""
        if self.memory is None:
            return self._pairs(self.train_dataset)
        parts = [self.train_dataset, self.memory]
        columns = [self.args.image_column, self.args.caption_column, self.args.pair_id_column]
        shared = [column for column in columns if all(column in part.column_names for part in parts)]
        return self._pairs(concatenate_datasets([part.select_columns(shared) for part in parts]))

    def _pairs(self, dataset: Dataset) -> PairDataset:
        return PairDataset(dataset, self.args.image_column, self.args.caption_column, self.args.pair_id_column)

    def _pair_collator(self, mask_duplicates: bool = False) -> PairCollator:
        if self.processing_class is None:
            raise ValueError("ModXTrainer needs a processing_class, for instance CLIPProcessor.from_pretrained(...).")
        return PairCollator.for_model(
            self._dual_encoder,
            self.processing_class,
            seed=self._data_seed,
            image_augmentation=self.args.image_augmentation,
            mask_duplicates=mask_duplicates,
        )

    def _check_data(self) -> None:
        """All that can be told of the data without decoding them, before hours are spent."""
        if self._uses_columns:
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for dataset in (self.train_dataset, *sets.values()):
                if dataset is not None and not isinstance(dataset, LabelTest):
                    self._pairs(dataset)
        if self.train_dataset is None:
            return
        self._arrangement()
        pairs = min(self.args.contrastive_batch_size, len(self.train_dataset))
        if pairs < 2:
            raise ValueError(
                f"A contrastive batch of {pairs} pair has no negatives: raise per_device_train_batch_size (now "
                f"{self.args.per_device_train_batch_size}) or give more data (now {len(self.train_dataset)} rows)."
            )
        if pairs < self.args.contrastive_batch_size:
            # The smaller batch is all there is: dropping it would leave no step.
            self.args = copy.copy(self.args)
            self.args.dataloader_drop_last = False

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        check_dual_encoder(model)
        model = add_adapter(model, self.args) if self.args.peft is not None else model
        self._freeze_towers(model)
        return model

    def _freeze_towers(self, model: nn.Module) -> None:
        for frozen, tower in (
            (self.args.freeze_vision_model, "vision_model"),
            (self.args.freeze_text_model, "text_model"),
        ):
            if frozen:
                getattr(model, tower).requires_grad_(False)
