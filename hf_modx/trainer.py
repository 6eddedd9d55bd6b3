"""The Trainer of one phase."""

import copy
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_utils import PredictionOutput, speed_metrics

from .callbacks import LogitScaleClamp, LossCallback, LossContext, check_recipe
from .data import PairCollator, PairDataset
from .distributed import all_gather_rows, gather_stacked, process_index, row_counts, world_size
from .embeddings import PairEmbeddings, check_dual_encoder, embed_pairs
from .evaluation.encoding import EncodedPairs, encode_pairs
from .evaluation.retrieval import retrieval_metrics
from .gradcache import GradientCache, join_batches
from .losses import Shard, info_nce
from .recipes import build_recipe
from .sampling import GlobalBatches
from .teacher import Teacher, teacher_of
from .teacher_cache import CachedTeacher, build_teacher_cache, cache_obstacle, caption_offsets, choose_cache
from .training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)

LOSS_CALLBACKS_NAME = "loss_callbacks.safetensors"
TEXT_TOWER = ("text_model.", "text_projection.")


class ModXTrainer(Trainer):
    """Fine-tune a dual encoder for one phase, with loss callbacks and the old model as frozen teacher.

    The parameters are `Trainer`'s, in its order, and two more. Data sets are `datasets.Dataset`s with an image and a
    caption column (named in the arguments); every example of the global batch is a negative of every other, whatever
    the number of processes.

    Args:
        args: `ModXTrainingArguments`.
        processing_class: a processor with an image processor and a tokenizer, for instance `CLIPProcessor`.
        data_collator: replaces image and caption columns altogether: the stock data path is used, and the collator
            returns `pixel_values`, `input_ids`, `attention_mask` and, if it likes, `pair_id` and `row_id`.
        compute_metrics: called in evaluation beside the retrieval metrics, with `predictions = (image embeddings,
            text embeddings)` and `label_ids = (image ids, text ids)`.
        loss_callbacks: the name of a recipe, or a list of `LossCallback`s; they join the Trainer's callbacks. A
            callback added later with `add_callback` counts as well.
        teacher: the old model. None takes a frozen copy, in memory, of the model as it is handed over.

    Raises:
        TypeError: the model is no dual encoder, or a data set or column is of a wrong type.
        ValueError: a missing column, a batch of one pair, a recipe without or with two contrastive terms.
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
        loss_callbacks: str | list[LossCallback] = "modx",
        teacher: nn.Module | None = None,
    ):
        args = args if args is not None else ModXTrainingArguments(output_dir="tmp_trainer")
        _refuse(compute_loss_func, "compute_loss_func", "Write a LossCallback and pass it in loss_callbacks.")
        _refuse(preprocess_logits_for_metrics, "preprocess_logits_for_metrics", "There are no logits to preprocess.")
        if model is not None:
            check_dual_encoder(model)
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
        self._refuse_engines()
        self.model_accepts_loss_kwargs = False
        self.label_names = []
        self.can_return_loss = True
        self._uses_columns = data_collator is None
        if self._uses_columns:
            self.data_collator = self._pair_collator(args.mask_duplicates)
        self._check_data()
        if model is not None:
            self._freeze_towers(self.model)
        self.add_callback(LogitScaleClamp(args.max_log_logit_scale))
        for callback in build_recipe(loss_callbacks) if isinstance(loss_callbacks, str) else loss_callbacks:
            self.add_callback(callback)
        self.teacher = Teacher(teacher) if teacher is not None else None
        self._phase_start: dict[str, Tensor] = {}
        if train_dataset is not None:
            self._remember_phase_start()
        self._records: dict[str, tuple[Tensor, int]] = {}
        self._held: list[dict[str, Tensor]] = []  # batches of the optimizer step, with the gradient cache

    @property
    def loss_callbacks(self) -> list[LossCallback]:
        """The loss callbacks that are live: those among the Trainer's callbacks."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, LossCallback)]

    # ---- Training ----

    def train(self, *args, **kwargs):
        check_recipe(self.loss_callbacks)
        if self.args.gradient_accumulation_steps > 1 and self.args.gradient_cache_chunk_size is None:
            logger.warning(
                "Gradient accumulation adds no negatives: each of the %d batches of a step is contrasted with itself. "
                "With gradient_cache_chunk_size they form one contrastive batch.",
                self.args.gradient_accumulation_steps,
            )
        self._held = []
        self._remember_phase_start()
        if self.model_wrapped is self.model:
            # Another Trainer, or a stock evaluation, has left the model marked as prepared: training would go on
            # without DDP and the processes would drift apart in silence.
            self.model._is_accelerate_prepared = False
        return super().train(*args, **kwargs)

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
            return
        numbers = {}
        if obstacle is None:
            dataset = self._pairs(self.train_dataset)
            steps = self.args.phase_steps(len(dataset))  # of the whole phase: resumed, it decides as before
            numbers = {
                "rows": len(dataset),
                "captions": int(caption_offsets(dataset)[-1]),
                "width": self._dual_encoder.config.projection_dim,
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The sum of all loss terms on the global batch, the same value on every process; with `return_outputs` also
        this process's embeddings."""
        # Before the student: a look into the cached teacher waits for the device.
        teacher = self._teacher_embeddings(inputs)
        student = embed_pairs(model, self._dual_encoder, inputs)
        loss = self._loss(student, teacher, inputs)
        return (loss, student) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As in `Trainer`; with `gradient_cache_chunk_size` the batches of one optimizer step are held until the last
        and form one contrastive batch."""
        if self.args.gradient_cache_chunk_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._held.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        batch = join_batches(self._held, self.processing_class.tokenizer.pad_token_id)
        self._held = []
        teacher = self._teacher_embeddings(batch)
        return GradientCache(self.args.gradient_cache_chunk_size).backward(
            self.accelerator,
            model,
            batch,
            embed=lambda chunk: embed_pairs(model, self._dual_encoder, chunk),
            loss_of=lambda image, text: self._loss(
                PairEmbeddings(image, text, self._dual_encoder.logit_scale.exp()), teacher, batch
            ),
        )

    def _loss(self, local: PairEmbeddings, local_teacher: PairEmbeddings | None, batch: dict[str, Tensor]) -> Tensor:
        """From this process's embeddings to the global loss."""
        counts = row_counts(batch["input_ids"])
        context, kept = self._context(batch, counts)
        student = _gather(local, counts, kept)
        teacher = None if local_teacher is None else _gather(local_teacher, counts, kept)
        terms: dict[str, Tensor] = {}
        for callback in self.loss_callbacks:
            for name, term in callback.loss_terms(student, teacher, context).items():
                if name in terms:
                    raise ValueError(f"Two loss callbacks name a term {name!r}: rename one of them.")
                terms[name] = term
        self._record({**terms, **context.metrics})
        return torch.stack([term.to(student.image.device) for term in terms.values()]).sum()

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
        return PairEmbeddings(image, text, parts[0].logit_scale)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of pairs in an order that depends on (data seed, epoch) alone; each process gets its share."""
        if not self._uses_columns:
            return super().get_train_dataloader()
        if self.train_dataset is None:
            raise ValueError("Training requires a train_dataset.")
        dataset = self._pairs(self.train_dataset)
        batches = GlobalBatches(
            len(dataset),
            self._train_batch_size,
            seed=self._data_seed,
            current_epoch=lambda: int(self.state.epoch or 0),
            drop_last=self.args.dataloader_drop_last,
            batches_held=self.args.batches_held,
            process_index=process_index(),
            num_processes=world_size(),
        )
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
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

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        if self.args.decay_logit_scale:
            return names
        return [name for name in names if not name.endswith("logit_scale")]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self.args.text_learning_rate is not None:
            _give_own_learning_rate(optimizer, self.model, self.args.text_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._records and ("loss" in logs or "train_loss" in logs):
            logs.update({name: (total / count).item() for name, (total, count) in self._records.items()})
            logs["logit_scale"] = self._dual_encoder.logit_scale.detach().exp().item()
            self._records = {}
        super().log(logs, start_time)

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Retrieval on the whole test set: `{prefix}_image_to_text_recall@1` and so on, fractions in [0, 1], and
        `{prefix}_loss`, the InfoNCE over all its pairs (first captions). Sharded over processes, identical on each."""
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
        values = self._metrics(self._encode(eval_dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(eval_dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _encode(self, dataset: Dataset) -> EncodedPairs:
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

    def _metrics(self, encoded: EncodedPairs) -> dict[str, float]:
        metrics = retrieval_metrics(encoded.image, encoded.text, encoded.image_ids, encoded.text_ids)
        first = encoded.first_captions()
        scale = self._dual_encoder.logit_scale.detach().exp()
        loss = info_nce(encoded.image, encoded.text[first], scale, pair_ids=encoded.image_ids, chunk_size=1024)
        metrics["loss"] = loss.item()
        if self.compute_metrics is not None:
            metrics.update(self.compute_metrics(encoded.as_predictions()))
        return metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Embeddings instead of batch-local logits: `predictions = (images (N, D), texts (C, D))`, `label_ids` their
        pair ids, in the order of the rows with all captions of each; `metrics` as `evaluate` names them."""
        encoded = self._encode(test_dataset)
        prediction = encoded.as_predictions()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._metrics(encoded).items()}
        return PredictionOutput(prediction.predictions, prediction.label_ids, metrics)

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the stock files: trainer_state.json, which marks the checkpoint as complete, is written by those.
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            state = {
                f"{index}.{type(callback).__name__}.{name}": tensor.detach().cpu().contiguous()
                for index, callback in enumerate(self.loss_callbacks)
                for name, tensor in callback.state_dict().items()
            }
            save_file(state, os.path.join(folder, LOSS_CALLBACKS_NAME))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, LOSS_CALLBACKS_NAME)
        state = load_file(path) if os.path.exists(path) else {}
        for index, callback in enumerate(self.loss_callbacks):
            prefix = f"{index}.{type(callback).__name__}."
            own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            callback.load_state_dict(own)

    # ---- Parts ----

    @property
    def _dual_encoder(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    @property
    def _needs_teacher(self) -> bool:
        return any(callback.needs_teacher for callback in self.loss_callbacks)

    def _remember_phase_start(self) -> None:
        """Take what the loss callbacks need of the weights as they are now, once."""
        if self._needs_teacher and self.teacher is None:
            self.teacher = teacher_of(self.model)
        if any(callback.needs_phase_start for callback in self.loss_callbacks) and not self._phase_start:
            self._phase_start = {
                name: parameter.detach().clone()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }

    def _context(self, inputs: dict[str, Tensor], counts: list[int]) -> tuple[LossContext, Tensor | None]:
        """The context of the global batch, and which of the gathered rows belong to it (None: all)."""
        names = [name for name in ("row_id", "pair_id", "caption_id") if name in inputs]
        if names:
            ids = all_gather_rows(torch.stack([inputs[name] for name in names], dim=1), counts)
            ids = dict(zip(names, ids.unbind(dim=1), strict=True))
        else:
            ids = {}
        row_ids = ids.get("row_id", torch.arange(sum(counts), device=inputs["input_ids"].device))
        pair_ids = ids.get("pair_id", row_ids)
        if "caption_id" in ids:
            pair_ids = torch.stack([pair_ids, ids["caption_id"]], dim=1)
        # Only a batch that is not full can hold filled-in rows; looking for them costs a synchronisation.
        kept = None
        if world_size() > 1 and not self.args.dataloader_drop_last:
            kept = _first_occurrences(row_ids)
        if kept is not None:
            row_ids, pair_ids = row_ids[kept], pair_ids[kept]
        context = LossContext(
            model=self._dual_encoder,
            batch=inputs,
            pair_ids=pair_ids,
            row_ids=row_ids,
            step=self.state.global_step,
            epoch=self.state.epoch or 0.0,
            phase_start=self._phase_start,
            shard=_shard(counts) if world_size() > 1 and kept is None else None,
        )
        return context, kept

    def _record(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            total, count = self._records.get(name, (torch.zeros((), device=value.device), 0))
            self._records[name] = (total + value.detach(), count + 1)

    def _pairs(self, dataset: Dataset) -> PairDataset:
        return PairDataset(dataset, self.args.image_column, self.args.caption_column, self.args.pair_id_column)

    def _pair_collator(self, mask_duplicates: bool = False) -> PairCollator:
        if self.processing_class is None:
            raise ValueError("ModXTrainer needs a processing_class, for instance CLIPProcessor.from_pretrained(...).")
        return PairCollator(
            self.processing_class,
            self._data_seed,
            self.args.image_augmentation,
            self._longest_caption(),
            mask_duplicates,
        )

    def _longest_caption(self) -> int | None:
        """Tokens that both the tokenizer and the model's position embeddings allow."""
        config = self._dual_encoder.config.get_text_config()
        limits = (self.processing_class.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        return min((limit for limit in limits if limit is not None), default=None)

    def _refuse_engines(self) -> None:
        """What would be wrong without saying so, or has never been run."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"ModXTrainer does not run under {engine}. Use plain data-parallel processes; "
                "gradient_cache_chunk_size, activation checkpointing, bf16 and LoRA save memory."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process would share {self.args.n_gpu} GPUs among replicas that do not see each other's pairs. "
                "Start one process for each GPU with accelerate launch, or set CUDA_VISIBLE_DEVICES to one."
            )

    def _check_data(self) -> None:
        """All that can be told of the data without decoding them, before hours are spent."""
        if self._uses_columns:
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for dataset in (self.train_dataset, *sets.values()):
                if dataset is not None:
                    self._pairs(dataset)
        if self.train_dataset is None:
            return
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
        self._freeze_towers(model)
        return model

    def _freeze_towers(self, model: nn.Module) -> None:
        for frozen, tower in (
            (self.args.freeze_vision_model, "vision_model"),
            (self.args.freeze_text_model, "text_model"),
        ):
            if frozen:
                getattr(model, tower).requires_grad_(False)


def _gather(local: PairEmbeddings, counts: list[int], kept: Tensor | None) -> PairEmbeddings:
    """The embeddings of the global batch, in one exchange."""
    width = local.image.shape[1]
    both = all_gather_rows(torch.cat([local.image, local.text], dim=1), counts)
    if kept is not None:
        both = both[kept]
    return PairEmbeddings(both[:, :width], both[:, width:], local.logit_scale)


def _shard(counts: list[int]) -> Shard:
    """The rows of the global batch that came from this process."""
    start = sum(counts[: process_index()])
    return Shard(start, start + counts[process_index()], len(counts), gather_stacked)


def _first_occurrences(row_ids: Tensor) -> Tensor | None:
    """Positions of the rows without those that give a process something to do in a batch too small for all; None where
    there are no such rows."""
    ordered, places = row_ids.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return None if first.all() else places[first].sort().values


def _refuse(value: Any, name: str, remedy: str) -> None:
    if value is not None:
        raise ValueError(f"ModXTrainer takes no {name}. {remedy}")


def _give_own_learning_rate(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Move the text tower and its projection out of the optimizer's groups into groups with another learning rate."""
    chosen = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(TEXT_TOWER)}
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no parameters named {' or '.join(TEXT_TOWER)}...")
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": rate})
