"""The DataLoader of batches that are shared out among processes already."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..training_args import ModXTrainingArguments


def dataloader_of_shares(
    dataset: torch.utils.data.Dataset,
    batches: Iterable[list[int]],
    collator: Callable[[list], dict[str, Any]],
    args: ModXTrainingArguments,
    accelerator: Accelerator,
) -> DataLoader:
    """With the workers that the arguments ask for, prepared as for one process: `batches` holds the indices of this
    process's share of each batch."""
    workers = args.dataloader_num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=workers,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        timeout=args.dataloader_timeout if workers else 0,
    )
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        non_blocking=accelerator.non_blocking,
    )
