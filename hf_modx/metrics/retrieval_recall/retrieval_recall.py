"""Image-text retrieval for `evaluate`."""

import datasets
import evaluate
import torch
import torch.nn.functional as F

from hf_modx.evaluation import retrieval_metrics

DESCRIPTION = """\
Recall at 1, 5 and 10, mean reciprocal rank, mean average precision and median rank of image-text retrieval in both
directions, from embeddings. A tie counts against the model."""
INPUTS = """
Args:
    image_embeds: N vectors, one an image.
    text_embeds: N lists of vectors, the captions of each image, at least one; any number each.
Returns:
    `image_to_text_recall@1`, `@5`, `@10`, `image_to_text_mrr`, `image_to_text_map`, fractions in [0, 1],
    `image_to_text_median_rank` from 1 on, and the same from `text_to_image`.
"""
CITATION = ""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class RetrievalRecall(evaluate.Metric):
    def _info(self):
        vector = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"image_embeds": vector, "text_embeds": datasets.Sequence(vector)}),
            reference_urls=["https://github.com/openai/CLIP"],
        )

    def _compute(self, image_embeds, text_embeds):
        counts = torch.tensor([len(captions) for captions in text_embeds])
        if (counts == 0).any():
            raise ValueError(f"Image {int((counts == 0).nonzero()[0])} has no caption.")
        images = F.normalize(torch.tensor(image_embeds), dim=1)
        texts = F.normalize(torch.tensor([vector for captions in text_embeds for vector in captions]), dim=1)
        ids = torch.arange(len(images))
        return retrieval_metrics(images, texts, ids, ids.repeat_interleave(counts))
