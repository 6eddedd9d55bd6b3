"""Rows that cannot be trained on are found, named, refused or left out."""

import io
import struct

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from PIL import Image

from hf_modx.data.bad_samples import BadSample, drop_bad_samples, find_bad_samples


def encoded(image_format: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


TEXT = Value("string")
GOOD = {"bytes": encoded(), "path": None}


def pairs(*rows: tuple, captions=TEXT) -> Dataset:
    features = Features({"image": datasets.Image(), "caption": captions})
    return Dataset.from_dict({"image": [r[0] for r in rows], "caption": [r[1] for r in rows]}, features=features)


def check(dataset: Dataset) -> list[BadSample]:
    return find_bad_samples(dataset, "image", "caption")


def only_problem(image, caption="a dog", captions=TEXT) -> str:
    """The problem of one bad row between two good ones."""
    good = "a cat" if captions == TEXT else ["a cat"]
    bad = check(pairs((GOOD, good), (image, caption), (GOOD, good), captions=captions))
    assert [sample.row for sample in bad] == [1]
    return bad[0].problem


def test_good_data_have_no_bad_samples():
    assert check(pairs((GOOD, "a cat"), (GOOD, "a dog"))) == []


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_every_usual_format_is_good(image_format):
    assert check(pairs(({"bytes": encoded(image_format), "path": None}, "a cat"))) == []


def test_what_is_published_of_a_bad_sample_names_no_folder(tmp_path):
    """results.json goes to the Hub."""
    (tmp_path / "cat.jpg").write_text("no image")
    rows = [(str(tmp_path / name), "a cat") for name in ("cat.jpg", "gone.png")]
    bad = check(pairs((GOOD, "a cat"), *rows))
    assert all(str(tmp_path) in str(sample) for sample in bad)
    assert not any(str(tmp_path) in sample.without_folder() for sample in bad)
    assert bad[0].without_folder().startswith("row 1: the image (cat.jpg) cannot be decoded")
    assert "(gone.png)" in bad[1].without_folder()


def test_truncated_image():
    assert "cannot be decoded" in only_problem({"bytes": encoded()[:200], "path": None})


def test_text_file_named_as_an_image(tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_text("<html>404 Not Found</html>")
    assert only_problem(str(path)) == f"the image ({path}) cannot be decoded: it has no known image format"


def test_image_file_that_is_not_there(tmp_path):
    problem = only_problem(str(tmp_path / "lost.jpg"))
    assert "lost.jpg" in problem
    assert "No such file" in problem


def test_image_of_no_bytes():
    assert only_problem({"bytes": b"", "path": None}) == "the image cannot be decoded: it has no known image format"


def test_image_that_is_null():
    assert only_problem(None) == "the image is null"


def test_image_with_neither_bytes_nor_path_is_null():
    # As a parquet file may hold it.
    features = Features({"image": {"bytes": Value("binary"), "path": TEXT}, "caption": TEXT})
    stored = Dataset.from_dict({"image": [{"bytes": None, "path": None}], "caption": ["a cat"]}, features=features)
    assert check(stored.cast_column("image", datasets.Image())) == [BadSample(0, "the image is null")]


def test_broken_file_on_which_pillow_raises_a_type_error():
    # The TIFF's strip offsets declared as floating point numbers.
    broken = encoded("TIFF").replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, 12))
    assert "cannot be decoded" in only_problem({"bytes": broken, "path": None})


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_no_corruption_stops_the_check(image_format):
    random, images = np.random.default_rng(0), []
    for _ in range(40):
        data = bytearray(encoded(image_format))
        for position in random.integers(0, len(data), size=4):
            data[position] = random.integers(0, 256)
        for position in random.integers(2, 60, size=2):
            data[position] = random.integers(0, 256)
        images.append({"bytes": bytes(data[: random.integers(1, len(data) + 1)]), "path": None})
    bad = check(pairs(*((image, "a cat") for image in images)))
    assert len(bad) > 10
    assert all("the image" in sample.problem for sample in bad)


def test_caption_that_is_null():
    assert only_problem(GOOD, None) == "the caption is null"


@pytest.mark.parametrize("caption", ["", "  \t\n"])
def test_caption_that_is_blank(caption):
    assert only_problem(GOOD, caption) == "the caption is empty"


@pytest.mark.parametrize("captions", [[], ["", "  "], [None]])
def test_list_of_no_caption(captions):
    assert only_problem(GOOD, captions, captions=List(TEXT)) == "the caption is empty"


def test_one_caption_of_a_list_is_enough():
    assert check(pairs((GOOD, ["", None, "a cat"]), captions=List(TEXT))) == []


def test_every_bad_row_is_found_with_its_number():
    bad = check(pairs((None, "x"), (GOOD, "x"), (GOOD, ""), (GOOD, "x"), ({"bytes": b"?", "path": None}, "x")))
    assert [sample.row for sample in bad] == [0, 2, 4]


def test_the_check_leaves_the_data_set_as_it_is():
    dataset = pairs((GOOD, "a cat"))
    check(dataset)
    assert dataset.features["image"] == datasets.Image()
    assert dataset[0]["image"].size == (16, 16)


def test_a_missing_column_is_refused():
    with pytest.raises(ValueError, match="no column 'text' \\(caption_column\\)"):
        find_bad_samples(pairs((GOOD, "a cat")), "image", "text")


def test_a_column_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"'caption' holds .* not images"):
        find_bad_samples(pairs((GOOD, "a cat")), "caption", "caption")


# --- what is done about them -----------------------------------------------------------------------------------------


def numbered(rows: int) -> Dataset:
    return Dataset.from_dict({"n": list(range(rows))})


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_good_data_are_untouched(policy):
    dataset = numbered(3)
    assert drop_bad_samples(dataset, [], policy, "phase_1 (train)") is dataset


def test_error_names_the_rows_and_the_remedy():
    bad = [BadSample(1, "the image is null"), BadSample(3, "the caption is empty")]
    with pytest.raises(ValueError) as error:
        drop_bad_samples(numbered(5), bad, "error", "phase_1 (train)")
    assert str(error.value) == (
        "2 of 5 rows of phase_1 (train) cannot be used: row 1: the image is null; row 3: the caption is empty. Mend "
        "them, or leave them out with bad_samples='skip'."
    )


def test_error_names_only_the_first_of_many():
    bad = [BadSample(row, "the image is null") for row in range(8)]
    with pytest.raises(ValueError, match=r"8 of 9 rows .* row 4: the image is null \.\.\.\. Mend"):
        drop_bad_samples(numbered(9), bad, "error", "phase_1 (train)")


def test_skip_leaves_out_exactly_the_bad_rows():
    bad = [BadSample(0, "x"), BadSample(3, "x")]
    assert list(drop_bad_samples(numbered(5), bad, "skip", "phase_1 (train)")["n"]) == [1, 2, 4]


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_data_without_a_good_row_are_refused(policy):
    bad = [BadSample(row, "the image is null") for row in range(2)]
    with pytest.raises(ValueError, match=r"phase_1 \(train\) can.* be used: row 0: the image is null; row 1"):
        drop_bad_samples(numbered(2), bad, policy, "phase_1 (train)")


def test_found_and_skipped_data_are_good():
    dataset = pairs((GOOD, "a"), (None, "b"), (GOOD, " "), (GOOD, "c"))
    left = drop_bad_samples(dataset, check(dataset), "skip", "phase_1 (train)")
    assert list(left["caption"]) == ["a", "c"]
    assert check(left) == []
