"""What makes two runs the same run."""

import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..callbacks import LossCallback
from ..phases import FINGERPRINT_ROWS, PhaseStream, content_fingerprint
from ..training_args import ModXTrainingArguments

# What decides the weights of a run: changing one of these makes it a different run.
HYPERPARAMETERS = [
    "image_augmentation",
    "text_learning_rate",
    "freeze_vision_model",
    "freeze_text_model",
    "decay_logit_scale",
    "max_logit_scale",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "image_column",
    "caption_column",
    "pair_id_column",
    "lr_scheduler_kwargs",
    "optim_args",
    "mask_duplicates",
    "contrastive_batch_size",
    "text_learning_rate_factor",
    "peft",
    "teacher",
    "load_best_model_at_end",
]
BEST = ["metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps"]
PAIRS = ["same_pair_id", "pairs_in_batch"]
STACKED = ["peft", "lora_merge", "lora_rank", "lora_alpha", "lora_targets"]
REFERENCES = ["teacher", "image_source", "text_source"]
LORA = ["lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_merge", "train_logit_scale"]


STAYING_TESTS = (
    " (forgetting pairs leaves tests as they are; to go on without some of their rows, or where the data are cut anew "
    "because they have fewer, start a new run from a finished phase: --model_name_or_path RUN/phase-K)"
)


def hyperparameters(args: ModXTrainingArguments) -> dict[str, Any]:
    """The values of `HYPERPARAMETERS` as JSON takes them, and those of an adapter where one is trained, and
    how the best weights are found where they are kept."""
    names = [*HYPERPARAMETERS, *(LORA if args.peft is not None else [])]
    names += BEST if args.load_best_model_at_end else []
    return {name: _plain(getattr(args, name)) for name in names}


def run_identity(
    recipe: str,
    callbacks: Sequence[LossCallback],
    args: ModXTrainingArguments,
    stream: PhaseStream,
) -> dict[str, Any]:
    """All that decides the weights and the matrix of a run, as JSON takes it, but for the start weights (`start`)."""

    def data(part: Dataset) -> str:
        return content_fingerprint(part, args.pair_columns)  # others, as a price, may change from month to month

    return {
        "recipe": recipe,
        "recipe_args": {type(callback).__name__: _options(callback) for callback in callbacks},
        "hyperparameters": hyperparameters(args) | _of_pairs_together(args, stream),
        "base": data(stream.base.train) if stream.base is not None else None,
        "phases": [{"name": phase.name, "rows": len(phase.train), "data": data(phase.train)} for phase in stream],
        "tests": {name: data(dataset) for name, (dataset, _) in stream.tests().items()},
        "union_tests": list(stream.union_tests),
    }


def _of_pairs_together(args: ModXTrainingArguments, stream: PhaseStream) -> dict[str, Any]:
    """The settings of pairs that belong together, where some may."""
    parts = [phase.train for phase in stream.all_phases()]
    if not args.mask_duplicates and not any(args.pair_id_column in part.column_names for part in parts):
        return {}
    return {name: getattr(args, name) for name in PAIRS}


def is_adapter(identity: Mapping[str, Any], number: int) -> bool:
    """Whether a run leaves an adapter after a phase, and no model of its own."""
    settings = identity["hyperparameters"]
    return number > 0 and settings.get("peft") is not None and not settings["lora_merge"]


def changes(before: Mapping[str, Any], now: Mapping[str, Any], settled: int | None = None) -> list[str]:
    """What differs between two identities, in words; more phases at the end are no difference, and neither are fewer
    rows in a run that was asked to forget pairs: they may be gone from the data too.

    Args:
        settled: a phase up to which alone the two must agree, as after a rollback to it: settings, recipe, and the
            data of later phases and of their tests may differ.
    """
    found = setting_changes(before, now)
    if settled is not None:
        found = adapter_changes(before, now, settled) + (reference_changes(before, now) if settled else [])
    asked, known = before.get("deletions", 0), now.get("deletions", 0)
    if asked > known:
        found.append(
            f"it was asked {asked} times to forget pairs, and the deleted.json here, which has to go with the run, "
            f"knows of {known}"
        )
    if not known and "base" in before and before["base"] != now["base"]:
        found.append(
            "the base, which are the pairs of replay_dataset where that is given, had other data (to begin with other "
            "pairs to replay, start a new run from a finished phase: --model_name_or_path RUN/phase-K)"
        )
    for name in ("base_max_steps", "start"):
        if name in before and name in now and before[name] != now[name]:
            found.append(f"{name} was {before[name]!r} and is {now[name]!r}")
    kept, later = before["phases"][:settled], before["phases"][len(before["phases"][:settled]) :]
    if len(kept) > len(now["phases"]):
        found.append(f"it has {len(kept)} phases and {len(now['phases'])} are given")
    for number, (old, new) in enumerate(zip(kept, now["phases"], strict=False), start=1):
        if old["name"] != new["name"]:
            found.append(f"phase {number} was {old['name']!r} and is {new['name']!r}")
        elif old != new and not (known and old["rows"] > new["rows"]):
            found.append(
                f"phase {number} was {old['name']!r} with other data (the number of rows and {FINGERPRINT_ROWS} of "
                "them are compared, in the columns of images, captions and pair ids)"
            )
    free = {phase["name"] for phase in later} | set(now.get("union_tests", ()))  # which hold what the others hold
    for name, old in before.get("tests", {}).items():
        if old != now["tests"].get(name, old) and name not in free:
            found.append(f"the test {name!r} had other data{STAYING_TESTS if known else ''}")
    return found


def adapter_changes(before: Mapping[str, Any], now: Mapping[str, Any], settled: int) -> list[str]:
    """What keeps the phases after a rollback from stacking their adapters on those that stay."""
    if not is_adapter(before, settled) and not is_adapter(now, settled):
        return []
    old, new = before["hyperparameters"], now["hyperparameters"]
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}, and adapters that are kept must agree in it"
        for name in STACKED
        if old.get(name) != new.get(name)
    ]


def reference_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What keeps the phases after a rollback from asking the teacher of a `ReferenceDistillation`, whose answers the
    phases hand on."""
    old, new = (identity.get("recipe_args", {}).get("ReferenceDistillation", {}) for identity in (before, now))
    if new.get("teacher", "previous") == "previous":
        return []
    if old.get("teacher", "previous") == "previous":
        told = (
            "ReferenceDistillation asks the model that the run began with, and the phases so far have not kept what "
            'it says: name that model, as in --recipe_args \'{"teacher": "RUN/phase-0"}\''
        )
        return [told] if new["teacher"] == "initial" else []
    return [
        f"{name} of ReferenceDistillation was {old.get(name)!r} and is {new.get(name)!r}, and what the teacher has "
        "said of the references is handed on (for others start a new run from a finished phase: --model_name_or_path "
        "RUN/phase-K)"
        for name in REFERENCES
        if old.get(name) != new.get(name)
    ]


def setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How recipe, options and hyper-parameters of two identities differ, in words."""
    found = []
    for name in ("recipe", "recipe_args"):
        if name in before and name in now and before[name] != now[name]:
            found.append(f"{name} was {before[name]!r} and is {now[name]!r}")
    for name, value in now["hyperparameters"].items():
        old = before["hyperparameters"].get(name)
        if old != value:
            found.append(f"{name} was {old!r} and is {value!r}")
    return found


def identity_of_phase(
    history: Sequence[Mapping[str, Any]], identity: Mapping[str, Any], number: int
) -> Mapping[str, Any]:
    """The identity of a run as it was when a phase was trained: with other settings than now, where a rollback has
    permitted it since.

    Args:
        history: see `hf_modx.rollback.reopen`.
        identity: of now.
        number: of the phase.
    """
    return next((entry["identity"] for entry in history if entry["until_phase"] >= number), identity)


def refused_changes(record: Mapping[str, Any], now: Mapping[str, Any], trained: int) -> list[str]:
    """What differs between a run as run.json knows it and a start of it, and must not: all, or after a rollback only
    what concerns the phases before.

    Args:
        record: the content of run.json; `rolled_back_to` is the phase of a rollback.
        now: the identity of the start.
        trained: the last phase of which something is trained.
    """
    settled = record.get("rolled_back_to")
    is_open = settled is not None and trained <= settled
    return changes(record["identity"], now, settled if is_open else None)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters, the first 16 hexadecimal digits. The values are those in fp32,
    which is what a run trains in, whatever it was given."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().contiguous()
        values = values.float() if values.is_floating_point() else values
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_other_weights(model: nn.Module, expected: str | None, folder: Path) -> None:
    """Raise a ValueError unless the model has the `weights_fingerprint` that was written down when its phase ended;
    None: none was.

    Args:
        folder: that the model came from, for the message.
    """
    found = weights_fingerprint(model) if expected is not None else None
    if found != expected:
        raise ValueError(
            f"{folder} holds other weights ({found}) than the phase ended with ({expected}, says the run): the next "
            "one would start from another model and keep to it as its teacher. Put the folder back as it was, or "
            "choose another output_dir."
        )


def _options(callback: LossCallback) -> dict[str, Any]:
    """The public settings of a callback that are plain values; `chunk_size` bounds memory and decides nothing."""
    return {
        name: value
        for name, value in sorted(vars(callback).items())
        if not name.startswith("_") and name != "chunk_size" and isinstance(value, bool | int | float | str)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, int | float | str | bool | type(None)) else str(value)
