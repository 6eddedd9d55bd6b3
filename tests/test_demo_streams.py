"""The built-in streams of new concepts, and the form of all of them for choosing options."""

from collections import Counter

import datasets
import pytest

from hf_modx import PhaseStream
from hf_modx.demo import DEMO_STREAMS
from hf_modx.demo.streams import GROUPS

from tiny import tiny_pairs

NEW_CONCEPTS = ["class", "instance"]
# All drawings have to be made, which takes half a minute.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=list(DEMO_STREAMS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def stream(name):
    return DEMO_STREAMS[name](seed=0)


@pytest.fixture(scope="module")
def validation(name):
    return DEMO_STREAMS[name](seed=0, validation=True)


def concepts(dataset):
    return set(dataset["pair_id"])


def drawings(dataset):
    return {image["bytes"] for image in dataset.cast_column("image", datasets.Image(decode=False))["image"]}


@pytest.mark.parametrize("name", NEW_CONCEPTS)
def test_every_phase_brings_new_concepts_and_tests_each_of_them_once(name):
    phases = DEMO_STREAMS[name](seed=0).all_phases()
    assert len(phases) == 4
    assert sum(len(concepts(phase.train)) for phase in phases) == len(
        set.union(*(concepts(phase.train) for phase in phases))
    )
    for phase in phases:
        assert concepts(phase.train) == concepts(phase.test)
        assert len(concepts(phase.test)) == len(phase.test) > 250


def test_class_stream_goes_by_groups():
    assert [phase.name for phase in DEMO_STREAMS["class"]().all_phases()] == list(GROUPS)


@pytest.mark.parametrize("name", NEW_CONCEPTS)
def test_seed_decides_what_is_held_out(name):
    tests = [drawings(DEMO_STREAMS[name](seed=seed).phases[0].test) for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


def test_tested_drawings_are_not_trained_on(stream):
    trained = set.union(*(drawings(phase.train) for phase in stream.all_phases()))
    assert not any(drawings(phase.test) & trained for phase in stream.all_phases())


@pytest.mark.parametrize("seed", [0, 4, 5, 10])
def test_tests_of_no_seed_hold_a_validation_drawing(name, validation, seed):
    tested = set.union(*(drawings(phase.test) for phase in DEMO_STREAMS[name](seed=seed).all_phases()))
    assert not any(drawings(phase.test) & tested for phase in validation.all_phases())


def test_validation_holds_out_drawings_that_training_would_have(stream, validation):
    assert [phase.name for phase in validation] == [phase.name for phase in stream][:2]
    for phase, whole in zip(validation.all_phases(), stream.all_phases(), strict=False):
        assert drawings(phase.test) < drawings(whole.train)
        assert len(phase.test) > 130


def test_validation_drawings_are_not_trained_on(validation):
    trained = set.union(*(drawings(phase.train) for phase in validation.all_phases()))
    assert not any(drawings(phase.test) & trained for phase in validation.all_phases())


@pytest.mark.parametrize("name", NEW_CONCEPTS)
def test_validation_leaves_out_renderings_of_its_drawings(name):
    for phase in DEMO_STREAMS[name](validation=True).all_phases():
        seen = Counter(phase.train["pair_id"])
        assert {seen[concept] for concept in concepts(phase.test)} == {2}  # by the two other artists


def test_union_test_has_the_pairs_of_all_tests():
    data = tiny_pairs(40)
    splits = {"a_train": data.select(range(10)), "a_test": data.select(range(10, 14))}
    splits |= {"b_train": data.select(range(20, 30)), "b_test": data.select(range(30, 36))}
    tests = PhaseStream.from_splits(splits).with_union_test().tests()
    union, learned_at = tests["union"]
    assert union["caption"] == [*splits["a_test"]["caption"], *splits["b_test"]["caption"]]
    assert learned_at == "all" and list(tests) == ["a", "b", "union"]
