"""The metrics as the library `evaluate` loads them."""

import re
from pathlib import Path

import evaluate
import pytest
import torch
import torch.nn.functional as F
import yaml

from hf_modx.evaluation import EvaluationMatrix, retrieval_metrics
from hf_modx.metrics import METRICS, metric_path


@pytest.fixture(scope="module")
def load():
    """Loads each metric once: it is copied into a cache of modules."""
    loaded = {}
    return lambda name: loaded.setdefault(name, evaluate.load(metric_path(name)))


def test_recall_from_batches_of_images_with_several_captions(load):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 4, generator=generator)
    captions = [torch.randn(1 + i % 3, 4, generator=generator) for i in range(12)]
    metric = load("retrieval_recall")
    for start in (0, 6):
        batch = slice(start, start + 6)
        metric.add_batch(image_embeds=images[batch].tolist(), text_embeds=[c.tolist() for c in captions[batch]])
    ids = torch.arange(12)
    texts, text_ids = torch.cat(captions), ids.repeat_interleave(torch.tensor([len(c) for c in captions]))
    expected = retrieval_metrics(F.normalize(images, dim=1), F.normalize(texts, dim=1), ids, text_ids)
    assert metric.compute() == pytest.approx(expected)
    assert 0 < expected["image_to_text_recall@1"] < 1


def test_image_without_a_caption_is_named(load):
    with pytest.raises(ValueError, match="Image 1 has no caption"):
        load("retrieval_recall").compute(image_embeds=[[1.0], [1.0]], text_embeds=[[[1.0]], []])


def test_measures_of_a_matrix(load):
    values = [[0.1, 0.2, 0.4], [0.8, 0.3, 0.5], [0.6, None, 0.3]]
    expected = EvaluationMatrix(["1", "2"], ["1", "2", "3"], values, [1, 2, None]).summary()
    metric = load("continual_learning")
    assert metric.compute(values=values, learned_at=[1, 2, None], has_initial_row=True) == expected
    assert metric.compute(values=[[0.8, 0.3], [0.6, 0.9]])["forgetting"] == pytest.approx(0.2)


@pytest.mark.parametrize("name", METRICS)
def test_card_has_metadata_and_an_example_that_runs(name):
    card = (Path(metric_path(name)) / "README.md").read_text()
    metadata, text = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    assert {"evaluate", "metric"} <= set(yaml.safe_load(metadata)["tags"])
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="there are retrieval_recall, continual_learning"):
        metric_path("accuracy")
