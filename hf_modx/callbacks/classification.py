"""Learning classes instead of pairs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from torch import Tensor

from ..data import as_captions
from ..embeddings import PairEmbeddings
from ..prompts import TEMPLATES, check_templates, class_prompts
from .base import LossCallback, LossContext, PhaseBoundary
from .reference import own_share


class Classification(LossCallback):
    """Cross-entropy over the classes of the phase, in the place of the contrastive term: each image against the texts
    of ALL classes, `CE(s V C^T, labels)` with C the text embeddings of one prompt a class. The task term of ZSCL and
    of the MTIL benchmark.

    A class is what shares an id in the pair id column; its prompt is its first caption. `class_pairs` makes such data
    from labels. The prompts go through the text tower in every step. Pairs of other phases cannot be replayed: their
    classes are not among these.

    Args:
        label_smoothing: in [0, 1); 0.2 in ZSCL.

    Raises:
        ValueError: a value out of its range, or a phase without pair ids or of one class alone.

    Logs `classification`.
    """

    owns_contrastive = True
    refuses_replay = True

    def __init__(self, label_smoothing: float = 0.2):
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
        self.label_smoothing = label_smoothing
        self._ids = torch.empty(0)
        self._tokens: dict[str, Tensor] = {}

    def start_phase(self, phase: PhaseBoundary) -> None:
        if phase.collator is None:
            raise ValueError("Classification needs the Trainer's own collator. Leave data_collator out.")
        prompts = _prompts(phase.train_dataset, phase.args.pair_id_column, phase.args.caption_column)
        self._ids = torch.tensor(sorted(prompts), device=phase.args.device)
        self._tokens = phase.collator.tokens([prompts[number] for number in sorted(prompts)])

    def extra_inputs(self, context: LossContext) -> dict[str, Tensor]:
        own = own_share(len(self._ids))
        return {name: tokens[own] for name, tokens in self._tokens.items()} if own.stop > own.start else {}

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        pair_ids = context.pair_ids if context.pair_ids.ndim == 1 else context.pair_ids[:, 0]
        labels = torch.searchsorted(self._ids, pair_ids.contiguous())
        logits = student.logit_scale * student.image @ context.extra.text.T
        if student.logit_bias is not None:  # changes no probability, and distributed training wants it used
            logits = logits + student.logit_bias
        return {"classification": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}


def class_pairs(
    dataset: Dataset,
    label_column: str,
    templates: Sequence[str] = TEMPLATES,
    *,
    class_names: Sequence[str] | None = None,
    caption_column: str = "caption",
    pair_id_column: str = "pair_id",
) -> Dataset:
    """Labelled images as image-caption pairs: the captions are the templates with the class's name, the pair id is the
    label.

    Args:
        label_column: integers, the numbers of the classes.
        templates: each with one `{}`; the first makes the prompt of `Classification`.
        class_names: by label; None: those of a `datasets.ClassLabel` column.

    Raises:
        ValueError: no such column, no integers, no names, rows of no class, or a template without a place for the
            names.
    """
    if label_column not in dataset.column_names:
        raise ValueError(f"There is no column {label_column!r}. The columns are: {', '.join(dataset.column_names)}.")
    feature = dataset.features[label_column]
    if not isinstance(feature, ClassLabel) and "int" not in str(getattr(feature, "dtype", "")):
        raise ValueError(
            f"Column {label_column!r} does not hold numbers of classes: {feature}. Where it holds their names, "
            f"dataset.class_encode_column({label_column!r}) numbers them."
        )
    if class_names is None and not isinstance(feature, ClassLabel):
        raise ValueError(f"Column {label_column!r} has no class names: give class_names, or cast it to a ClassLabel.")
    check_templates(templates)
    names = list(class_names) if class_names is not None else feature.names
    labels = dataset.with_format(None)[label_column]
    without = [row for row, label in enumerate(labels) if label is None or not 0 <= label < len(names)]
    if without:
        raise ValueError(
            f"Column {label_column!r} holds no class in {len(without)} of {len(labels)} rows (first in row "
            f"{without[0]}). Leave these rows out, or give the names of all classes as class_names."
        )
    captions = [class_prompts(names[label], templates) for label in labels]
    replaced = {caption_column, pair_id_column} & set(dataset.column_names)
    dataset = dataset.remove_columns(sorted(replaced))
    return dataset.add_column(caption_column, captions).add_column(pair_id_column, [int(label) for label in labels])


def _prompts(dataset: Dataset, pair_id_column: str, caption_column: str) -> dict[int, str]:
    """The first caption of each class."""
    if pair_id_column not in dataset.column_names:
        raise ValueError(
            f"Classification needs a column {pair_id_column!r} that numbers the classes; see class_pairs."
        )
    columns = dataset.select_columns([pair_id_column, caption_column]).with_format(None)
    prompts: dict[int, str] = {}
    for number, captions in zip(columns[pair_id_column], columns[caption_column], strict=True):
        prompts.setdefault(number, as_captions(captions)[0])
    if len(prompts) < 2:
        raise ValueError("Classification needs at least two classes in a phase.")
    return prompts
