"""IncCLIP: replay with generated hard negative texts and distillation of the replayed pairs."""

import copy
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..data import PairDataset
from ..distributed import process_index, world_size
from ..embeddings import PairEmbeddings
from ..losses import affinity_distillation
from ..pseudo_texts import Inversion, PseudoTexts, PseudoTextSearch
from ..replay import Replay
from .base import LossCallback, LossContext, PhaseBoundary
from .contrastive import contrastive_loss

logger = logging.getLogger(__name__)

FEW_TEXTS = 0.5


class IncCLIP(LossCallback):
    """Generative negative text replay: our RECONSTRUCTION of IncCLIP (Yan et al., "Generative Negative Text Replay for
    Continual Vision-Language Pretraining", ECCV 2022). The paper's code is not public; the parts are the paper's, the
    formulas are ours. The complete recipe "incclip" adds `WeightNormClip`.

    A share of every batch comes from a memory of earlier pairs. Each replayed image brings a pseudo text, which the
    old model was made to imagine beside it (see `Inversion`).

    `L = InfoNCE + distill_weight * mean_i (KL(p'_i || p_i) + KL(q'_i || q_i)) / 2`

    InfoNCE is symmetric over the whole batch; the pseudo texts are further negatives in its image-to-text
    denominators and nothing else. The distillation runs over the replayed pairs i: p_i is the softmax of the scaled
    cosines of image i and all texts, pseudo texts among them, q_i that of text i and all images, p' and q' are the
    old model's, each model with its own logit scale. A model that is made for the sigmoid loss has that in the place
    of InfoNCE, with the pseudo texts as negatives of every image.

    A pseudo text is left out of a batch in which the pair is that its search started from: it would be a false
    negative there. So is, for good, one that missed its band or rewords the caption of its own image.

    Args:
        distill_weight: >= 0.
        memory_size, batch_share: see `Replay`.
        texts: "generated", or "captions": the captions that the searches started from, a control with real hard
            negatives from the memory.
        refresh_every: make new texts every so many optimizer steps, which keeps a copy of the old model in memory.
            None: once a phase.
        positive_margin, negative_margin, inversion_steps: see `Inversion`.
        chunk_size: rows of the similarity matrices held at once; None chooses.

    Logs `contrastive`, `incclip_distillation` (weighted) and `pseudo_texts`, their number in the batch.

    Raises:
        ValueError: a value out of its range.
    """

    needs_teacher = True
    owns_contrastive = True

    def __init__(
        self,
        distill_weight: float = 1.0,
        memory_size: int | float = 0.05,
        batch_share: float = 0.25,
        texts: str = "generated",
        refresh_every: int | None = None,
        positive_margin: float = 0.1,
        negative_margin: float = 0.3,
        inversion_steps: int = 30,
        chunk_size: int | None = None,
    ):
        if distill_weight < 0:
            raise ValueError(f"distill_weight must not be negative, got {distill_weight}.")
        if texts not in ("generated", "captions"):
            raise ValueError(f"texts must be 'generated' or 'captions', got {texts!r}.")
        if refresh_every is not None and refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {refresh_every}.")
        self.distill_weight = distill_weight
        self.memory_size = memory_size
        self.batch_share = batch_share
        self.texts = texts
        self.refresh_every = refresh_every
        self.positive_margin = positive_margin
        self.negative_margin = negative_margin
        self.inversion_steps = inversion_steps
        self.chunk_size = chunk_size
        self.inversion, self.replay  # noqa: B018  refuse values out of range
        self._forget()

    @property
    def replay(self) -> Replay:
        return Replay(self.memory_size, self.batch_share)

    @property
    def inversion(self) -> Inversion:
        margins = {"positive_margin": self.positive_margin, "negative_margin": self.negative_margin}
        if self.texts == "captions":
            return Inversion(**margins, steps=0, noise=0.0)
        return Inversion(**margins, steps=self.inversion_steps)

    # ---- Pseudo texts ----

    def start_phase(self, phase: PhaseBoundary) -> None:
        """The model is the old one still."""
        self._forget()
        if phase.memory is None:
            return
        pairs = PairDataset(phase.memory, *phase.args.pair_columns)
        model = phase.model if self.refresh_every is None else copy.deepcopy(phase.model).requires_grad_(False)
        self._search = PseudoTextSearch(model, pairs, phase.collator, phase.args.eval_batch_size)
        self._seed = phase.args.effective_data_seed
        self._new_rows = len(phase.train_dataset)
        self._pair_ids = torch.arange(self._new_rows, self._new_rows + len(pairs))
        if pairs.pair_id_column and pairs.pair_id_column in phase.train_dataset.column_names:
            self._pair_ids = self._search.pair_ids.cpu()
        if self.refresh_every is None:
            self._make_texts(0)
            self._search = None  # with it the old model

    def finish_phase(self, phase: PhaseBoundary) -> None:
        self._forget()

    def extra_inputs(self, context: LossContext) -> Mapping[str, Tensor]:
        if self._texts is None and self._search is None:
            return {}
        if self.refresh_every is not None:
            self._make_texts(context.step // self.refresh_every)
        rows = self._rows(context).tensor_split(world_size())[process_index()]
        inputs = {name: tensor[rows] for name, tensor in self._texts.tokens().items()}
        if self.texts == "generated":
            inputs["token_embeds"] = self._texts.token_embeds[rows]
        return inputs

    def _rows(self, context: LossContext) -> Tensor:
        """Which rows of the memory bring a text into this global batch."""
        rows = context.row_ids[context.is_replay].cpu() - self._new_rows
        ids = context.pair_ids.reshape(len(context.row_ids), -1)[:, 0].cpu()
        start_is_here = torch.isin(self._pair_ids[self._texts.start_rows[rows]], ids)
        return rows[self._usable[rows] & ~start_is_here]

    def _make_texts(self, number: int) -> None:
        if number == self._number:
            return
        texts = self._search(self.inversion, self._seed, number)
        self._usable = (texts.lead > 0) & ~texts.is_rewording
        if self.texts == "generated":
            self._usable &= texts.in_band
        self._texts, self._number = texts, number
        share = float(self._usable.float().mean())
        logger.log(
            logging.WARNING if share < FEW_TEXTS else logging.INFO,
            "%.0f %% of %d remembered images have a pseudo text (%.0f %% in the band).",
            100 * share,
            len(texts),
            100 * float(texts.in_band.float().mean()),
        )

    def _forget(self) -> None:
        self._search: PseudoTextSearch | None = None
        self._texts: PseudoTexts | None = None
        self._number: int | None = None

    # ---- The loss ----

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        shared = {**context.relations, "chunk_size": self.chunk_size}
        new_texts = old_texts = None
        if self._texts is not None:
            rows = self._rows(context)
            new_texts, old_texts = context.extra.text, self._texts.text_embeds[rows].to(teacher.text)
            context.report("pseudo_texts", torch.tensor(float(len(rows))))
        contrastive = contrastive_loss(student, extra_text_embeds=new_texts, **shared)
        if not context.is_replay.any():
            return {"contrastive": contrastive}
        distillation = affinity_distillation(
            student.image * student.logit_scale,
            student.text,
            teacher.image * teacher.logit_scale,
            teacher.text,
            reduction="mean",
            screen=False,
            row_weights=context.is_replay,
            extra_text_embeds=new_texts,
            teacher_extra_text_embeds=old_texts,
            **shared,
        ).loss
        return {"contrastive": contrastive, "incclip_distillation": self.distill_weight * distillation}
