"""Ways of training that would be wrong without saying so, or that have never been run."""

import logging

from ..training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)


def check_engine(args: ModXTrainingArguments, sharding: str | None) -> None:
    """Refuse what `ModXTrainer` does not run under.

    Args:
        sharding: the engine that shards the model, for the message; None: the model is whole on every process.

    Raises:
        ValueError: a sharded model, a `parallelism_config`, several GPUs in one process, or what does not go with the
            gradient cache.
    """
    if sharding is not None:
        raise ValueError(
            f"ModXTrainer does not run under {sharding}. Use plain data-parallel processes; "
            "gradient_cache_chunk_size, activation checkpointing, bf16 and LoRA save memory."
        )
    if args.parallelism_config is not None:
        raise ValueError("ModXTrainer runs with plain data-parallel processes. Leave out parallelism_config.")
    if args.gradient_cache_chunk_size is not None:
        _check_gradient_cache(args)
    if args.n_gpu > 1:
        raise ValueError(
            f"One process would share {args.n_gpu} GPUs among replicas that do not see each other's pairs. "
            "Start one process for each GPU with accelerate launch, or set CUDA_VISIBLE_DEVICES to one."
        )


def _check_gradient_cache(args: ModXTrainingArguments) -> None:
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "layerwise" in optimizer or "lomo" in optimizer:
        raise ValueError(f"optim={optimizer!r} steps in the backward pass, which gradient_cache_chunk_size repeats.")
    if getattr(args, "ddp_static_graph", False):
        raise ValueError("ddp_static_graph does not go with gradient_cache_chunk_size: leave one of them out.")


def check_contrastive_batch(args: ModXTrainingArguments, rows: int) -> bool:
    """Whether a training set of so many rows fills a contrastive batch.

    Raises:
        ValueError: it gives a batch of one pair at most.
    """
    pairs = min(args.contrastive_batch_size, rows)
    if pairs < 2:
        raise ValueError(
            f"A contrastive batch of {pairs} pair has no negatives: raise per_device_train_batch_size (now "
            f"{args.per_device_train_batch_size}) or give more data (now {rows} rows)."
        )
    return pairs == args.contrastive_batch_size


def warn_of_accumulation(args: ModXTrainingArguments) -> None:
    """Say that accumulated batches are contrasted each with itself, where they are."""
    if args.gradient_accumulation_steps > 1 and args.gradient_cache_chunk_size is None:
        logger.warning(
            "Gradient accumulation adds no negatives: each of the %d batches of a step is contrasted with itself. "
            "With gradient_cache_chunk_size they form one contrastive batch.",
            args.gradient_accumulation_steps,
        )
