"""The built-in stream and its base model."""

import pytest
import torch
from transformers import CLIPModel

from hf_modx import ContinualRun, Phase, PhaseStream
from hf_modx.demo import demo_stream, trained_base
from hf_modx.demo.drawings import RENDERINGS

from tiny import tiny_pairs


@pytest.fixture(scope="module")
def stream():
    return demo_stream(seed=0)


def concepts(dataset):
    return set(dataset["pair_id"])


@pytest.mark.slow
def test_stream_has_a_base_and_three_renderings(stream):
    assert [phase.name for phase in stream.all_phases()] == ["drawings", *RENDERINGS]
    assert len(RENDERINGS) == 3


@pytest.mark.slow
def test_tests_share_no_concept_and_have_hundreds(stream):
    tests = [concepts(phase.test) for phase in stream.all_phases()]
    assert sum(map(len, tests)) == len(set.union(*tests))
    assert min(map(len, tests)) > 300


@pytest.mark.slow
def test_tested_drawings_are_not_trained_on(stream):
    for phase in stream:
        assert not concepts(phase.train) & concepts(phase.test), phase.name
    trained = {image.tobytes() for image in stream.base.train["image"]}
    assert not trained & {image.tobytes() for image in stream.base.test["image"]}


@pytest.mark.slow
def test_tested_concepts_are_known_from_other_drawings(stream):
    assert all(concepts(phase.test) <= concepts(stream.base.train) for phase in stream.all_phases())


@pytest.mark.slow
def test_held_out_concepts_depend_on_the_seed(stream):
    assert concepts(demo_stream(seed=1).base.test) != concepts(stream.base.test)


@pytest.mark.slow
def test_rows_have_several_training_captions_and_one_test_caption(stream):
    assert all(len(captions) == 5 for captions in stream.phases[0].train["caption"])
    assert all(isinstance(caption, str) for caption in stream.phases[0].test["caption"])


@pytest.fixture
def small_stream():
    base = Phase("base", tiny_pairs(40), tiny_pairs(8, start=40))
    return PhaseStream((Phase("one", tiny_pairs(20, "tinted")),), base=base)


def test_base_is_trained_once_for_a_seed(small_stream, make_args):
    folder = trained_base(small_stream, make_args(), 2)
    assert trained_base(small_stream, make_args(), 2) == folder


def test_base_does_not_depend_on_the_settings_of_the_phases(small_stream, make_args):
    folder = trained_base(small_stream, make_args(), 3)
    other = make_args(freeze_vision_model=True, learning_rate=7.0, weight_decay=0.5, max_steps=99)
    assert trained_base(small_stream, other, 3) == folder


def test_phases_train_in_the_precision_of_the_base(small_stream, make_args):
    args = make_args(bf16=True)
    run = ContinualRun(small_stream, "finetune", args, model=trained_base(small_stream, args, 5))
    assert run.run().phases == ["one"]


def test_base_depends_on_seed_steps_and_precision(small_stream, make_args):
    folders = {
        trained_base(small_stream, make_args(), 2),
        trained_base(small_stream, make_args(bf16=True), 2),
        trained_base(small_stream, make_args(seed=1), 2),
        trained_base(small_stream, make_args(), 3),
    }
    assert len(folders) == 4


def test_base_is_trained(small_stream, make_args):
    untrained = CLIPModel.from_pretrained(trained_base(small_stream, make_args(seed=5), 1))
    trained = CLIPModel.from_pretrained(trained_base(small_stream, make_args(seed=5), 4))
    assert not torch.equal(untrained.visual_projection.weight, trained.visual_projection.weight)
