"""Distillation on reference data from the model that the run began with."""

import hashlib
import os
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from ..data import PairCollator
from ..data.loading import load_table
from ..embeddings import PairEmbeddings, embedding_width
from ..losses.reference import reference_distillation
from ..phases import content_fingerprint
from ..pretrained import load_dual_encoder
from .base import LossCallback, LossContext, PhaseBoundary
from .reference import (
    Draw,
    embed_references,
    reference_images,
    reference_pixels,
    reference_texts,
    row_keys,
    stored_images,
)

IMAGES, TEXTS = 1, 2  # set the draws apart from each other and from those of the training data

Source = Dataset | str | os.PathLike


class ReferenceDistillation(LossCallback):
    """ZSCL's way to keep what a model knows without any of its data: on reference images and texts, which have nothing
    to do with each other nor with what is learned, the student answers as a frozen teacher does (Zheng et al.,
    "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models", ICCV 2023).

    As in the authors' code `weight * (distill(A', A) + distill(A'^T, A^T))` with `A' = s V' L'^T` of the teacher and
    `A = s V L'^T`: the student's image embeddings against the TEACHER's text embeddings, so that the student's text
    tower is not distilled. `distill` and its temperature are in `hf_modx.losses.reference`. The scale s is the
    teacher's on both sides; in the original it is not trained, and so is the student's too.

    Any images and any texts will do; they should share nothing with any phase or test. Without a source of its own it
    takes the pairs of the stream's base, which is more than the original has: these are what the teacher has learned.
    Where some of them are gone in a later phase, as on request, what the teacher has said of them goes too.

    The teacher embeds all reference images and texts once and leaves memory: R images and M texts of width D cost
    4 (R + M) D bytes, in memory and in every checkpoint. So reference images are not augmented. Which of them a step
    sees depends on the seed, the phase and the step alone.

    Args:
        images: a `Dataset`, a folder written by `save_to_disk`, a parquet file, or a name for `load_dataset`. None:
            the pairs of the stream's base.
        texts: likewise; None: the captions that stand beside the images.
        image_column, image_split, text_column, text_split: of the sources. Of the base, the columns of the run.
        teacher: "initial", the model that the first phase starts from; "previous", the one that this phase starts
            from; or folder or Hub id of another one, with `@REVISION` where it is not the main branch. Its embeddings
            must have the width of the student's and its texts lie in the student's space, unless
            `distill_text_tower`.
        images_per_step: reference images a step, on all processes together, >= 1. With gradient accumulation and no
            gradient cache every batch of a step takes the same ones again.
        texts_per_step: reference texts a step, >= 1. None: all, as in the original, or as many as images where the
            text tower is distilled.
        temperature: T of `distill`, > 0.
        weight: of both directions, >= 0; 1 in the authors' code, 5 in their class-incremental one.
        distill_text_tower: `A = s V L^T` with the student's own text embeddings, as the paper's figure suggests.

    Raises:
        ValueError: a value out of its range, a missing column, or no reference data at all.

    Logs `reference_images` and `reference_texts`, the two directions (weighted).
    """

    def __init__(
        self,
        images: Source | None = None,
        texts: Source | None = None,
        *,
        image_column: str = "image",
        text_column: str = "caption",
        image_split: str = "train",
        text_split: str = "train",
        teacher: str = "initial",
        images_per_step: int = 64,
        texts_per_step: int | None = None,
        temperature: float = 2.0,
        weight: float = 1.0,
        distill_text_tower: bool = False,
    ):
        for name, number in (("images_per_step", images_per_step), ("texts_per_step", texts_per_step)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if weight < 0:
            raise ValueError(f"The weight of the reference distillation must not be negative, got {weight}.")
        self._teacher = str(teacher)
        # What a run's identity and its cards say, which are published.
        self.teacher = _told_of_folder(Path(teacher)) if os.path.isdir(teacher) else self._teacher
        self.images_per_step = images_per_step
        self.texts_per_step = images_per_step if texts_per_step is None and distill_text_tower else texts_per_step
        self.temperature = temperature
        self.weight = weight
        self.distill_text_tower = distill_text_tower
        self.image_source = self.text_source = "base"  # what the data are, for a run's identity
        self._images: Dataset | None = None
        self._texts: list[str] | None = None
        if images is not None:
            table = load_table(images, image_split)
            self._images = reference_images(table, image_column)
            self.image_source = content_fingerprint(self._images)
            texts = table if texts is None else texts
        if texts is not None:
            table = load_table(texts, text_split)
            self._texts = reference_texts(table, text_column)
            self.text_source = content_fingerprint(table.select_columns([text_column]))
        self._base: Dataset | None = None
        self._tables: dict[str, Tensor] = {}
        self._pictures = None
        self._pixels: dict[str, Tensor] = {}

    # ---- The data ----

    def start_run(self, base: Dataset | None) -> None:
        self._base = base
        if self.image_source == "base":
            self._images = None
        if self.text_source == "base":
            self._texts = None
        self._refuse_no_data()

    def start_phase(self, phase: PhaseBoundary) -> None:
        self._refuse_no_data()
        if phase.collator is None:
            raise ValueError("Reference images need the Trainer's own collator. Leave data_collator out.")
        if self._images is None:
            self._images = reference_images(self._base, phase.args.image_column)
        if self._texts is None:
            self._texts = reference_texts(self._base, phase.args.caption_column)
        self._collator = phase.collator
        seed = phase.args.effective_data_seed
        self._drawn_images = Draw(len(self._images), self.images_per_step, (seed, IMAGES))
        self._drawn_texts = Draw(len(self._texts), self.texts_per_step or len(self._texts), (seed, TEXTS))
        if self.teacher == "previous" or not self._tables:
            self._tables = self._ask_teacher(phase) | self._keys()
        elif any(len(self._tables[side]) != number for side, number in self._sizes().items()):
            self._leave_out_what_is_gone()

    def _refuse_no_data(self) -> None:
        if self._base is None and (self._images is None or self._texts is None):
            raise ValueError(
                "ReferenceDistillation has no reference images and texts, and the stream has no base to take them "
                'from. Give images="..." (a data set on the Hub, a save_to_disk folder or a parquet file; any images '
                'will do) and, if the texts do not stand beside them, texts="...".'
            )

    def _sizes(self) -> dict[str, int]:
        return {"image": len(self._images), "text": len(self._texts)}

    def _keys(self) -> dict[str, Tensor]:
        """By which what comes from the base is known again where other pairs have left it; a source of its own stays
        as it is and may be large: it is not read for this."""
        keys = {}
        if self.image_source == "base":
            keys["image_keys"] = row_keys(stored_images(self._images))
        if self.text_source == "base":
            keys["text_keys"] = row_keys(text.encode() for text in self._texts)
        return keys

    def _leave_out_what_is_gone(self) -> None:
        """Of pairs that a run was asked to forget, what the teacher had said of them goes too."""
        for name, keys in self._keys().items():
            side = name.removesuffix("_keys")
            places = {key: place for place, key in enumerate(self._tables[name].tolist())}
            if not all(key in places for key in keys.tolist()):
                raise ValueError("The base holds other pairs than the teacher was asked about. Give the ones it had.")
            staying = torch.tensor([places[key] for key in keys.tolist()])
            self._tables |= {name: keys, side: self._tables[side][staying.to(self._tables[side].device)]}

    def _ask_teacher(self, phase: PhaseBoundary) -> dict[str, Tensor]:
        model, collator = phase.model, phase.collator
        if self._teacher not in ("initial", "previous"):
            model, processor = load_dual_encoder(self._teacher, phase.args.device)
            collator = PairCollator.for_model(model, processor)
            self._refuse_other_width(embedding_width(model), embedding_width(phase.model))
        return embed_references(
            model,
            self._images,
            self._texts,
            collator,
            autocast=phase.autocast,
            batch_size=phase.args.eval_batch_size,
            num_workers=phase.args.dataloader_num_workers,
            device=phase.args.device,
        )

    def _refuse_other_width(self, width: int, students: int) -> None:
        if width != students and not self.distill_text_tower:
            raise ValueError(
                f"The teacher {self._teacher!r} embeds in a width of {width} and the student in one of {students}, so "
                "that its texts are not comparable with the student's images: give another teacher, or "
                "distill_text_tower, which compares the student's images with its own texts."
            )

    # ---- A step ----

    def on_train_begin(self, args, state, control, **kwargs):
        steps = range(state.global_step, state.max_steps)
        workers = args.dataloader_num_workers
        self._pictures = reference_pixels(self._images, self._drawn_images.own, steps, self._collator, workers)

    def on_step_begin(self, args, state, control, **kwargs):
        self._pixels = next(self._pictures)

    def extra_inputs(self, context: LossContext) -> dict[str, Tensor]:
        inputs = dict(self._pixels)
        if self.distill_text_tower:
            own = self._drawn_texts.own(context.step)
            inputs |= self._collator.tokens([self._texts[place] for place in own]) if len(own) else {}
        return inputs

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        like = student.image
        self._tables["text"] = self._tables["text"].to(like)
        teacher_images = self._tables["image"][self._drawn_images(context.step)].to(like)
        teacher_texts = self._tables["text"]
        if self._drawn_texts.number < len(teacher_texts):
            teacher_texts = teacher_texts[self._drawn_texts(context.step)]
        loss = reference_distillation(
            context.extra.image,
            context.extra.text if self.distill_text_tower else teacher_texts,
            teacher_images,
            teacher_texts,
            self._tables["logit_scale"].to(like),
            temperature=self.temperature,
        )
        return {"reference_images": self.weight * loss.image, "reference_texts": self.weight * loss.text}

    # ---- Between phases ----

    def finish_phase(self, phase: PhaseBoundary) -> None:
        self._pictures = None
        if self.teacher == "previous":
            self._tables = {}

    def state_dict(self) -> dict[str, Tensor]:
        return self._tables

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._tables = dict(state)


def _told_of_folder(model: Path) -> str:
    """The name of a model's folder and a hash of its weights: not where it lies, nor the same for every phase-3."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"{model.resolve().name} ({digest.hexdigest()[:16]})"
