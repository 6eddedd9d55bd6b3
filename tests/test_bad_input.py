"""What happens to strange and bad input: one table for images, one for captions, one for what a run is given.

A row of the data that cannot be used is told before any training, and `bad_samples` decides what becomes of it.
"""

import io
import json
import struct
import zlib

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_modx import ContinualRun, Phase, PhaseStream
from hf_modx.data import PairCollator, PairDataset
from hf_modx.data.bad_samples import find_bad_samples
from hf_modx.data.loading import load_splits
from hf_modx.embeddings import text_inputs

from tiny import SIZE, tiny_pairs, tiny_processor

GOOD = None
"""In the tables below: the row is trained on."""


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says to be so large and holds a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise(), "JPEG", exif=exif)


SIXTEEN_BITS = Image.fromarray((np.arange(400, dtype=np.uint16) * 160).reshape(20, 20))

IMAGES = {
    "null": (None, "the image is null"),
    "empty": (b"", "no known image format"),
    "truncated": (saved(noise())[:200], "cannot be decoded"),
    "truncated jpeg": (saved(noise(), "JPEG")[:300], "cannot be decoded"),
    "text file": (b"<html>404 Not Found</html>", "no known image format"),
    "of size zero": (png_of_size(0, 0), "cannot be decoded"),
    "20,000 x 20,000": (png_of_size(20_000, 20_000), "decompression bomb"),
    "missing file": ("/nowhere/cat.jpg", "No such file"),
    "dead address": ("http://127.0.0.1:9/cat.jpg", "is an address and no file: fetch the images first"),
    "1 x 1": (saved(noise(size=(1, 1))), GOOD),
    "1 x 500": (saved(noise(size=(1, 500))), GOOD),
    "grey": (saved(noise("L")), GOOD),
    "palette": (saved(noise("P")), GOOD),
    "transparent": (saved(noise("RGBA")), GOOD),
    "CMYK": (saved(noise("CMYK"), "JPEG"), GOOD),
    "16 bits": (saved(SIXTEEN_BITS), GOOD),
    "animated": (saved(noise("P"), "GIF", save_all=True, append_images=[noise("P").rotate(90)]), GOOD),
    "rotated by EXIF": (rotated(), GOOD),
}

CAPTIONS = {
    "null": (None, "the caption is null"),
    "empty": ("", "the caption is empty"),
    "whitespace": (" \t\n\u2003\u00a0", "the caption is empty"),
    "control characters alone": ("\x00\x07\x1b", "the caption is empty"),
    "invisible characters alone": ("\u200b\u200f\ufeff", "the caption is empty"),
    "a list of nothing": ([], "the caption is empty"),
    "a list of null": ([None, " "], "the caption is empty"),
    "10,000 words": ("a red circle " * 3_334, GOOD),
    "one word of 10,000 letters": ("a" * 10_000, GOOD),
    "with control characters": ("a red\x00 \x1b[31mcircle\r\n", GOOD),
    "right to left": ("دائرة حمراء", GOOD),
    "emoji": ("🔴", GOOD),
    "emoji of several": ("👩\u200d🚀", GOOD),
    "markup": ("<script>alert('a')</script> | **b** |", GOOD),
    "one good one in a list": ([None, "", "a red circle"], GOOD),
}


def stored(image) -> dict | None:
    if image is None:
        return None
    return {"bytes": None, "path": image} if isinstance(image, str) else {"bytes": image, "path": None}


def as_list(caption) -> list | None:
    return caption if caption is None or isinstance(caption, list) else [caption]


def table(rows) -> Dataset:
    features = Features({"image": datasets.Image(), "caption": List(Value("string"))})
    rows = [{"image": stored(image), "caption": as_list(caption)} for image, caption in rows]
    return Dataset.from_list(rows, features=features)


def of_images() -> list[tuple]:
    return [(image, "a red circle") for image, _ in IMAGES.values()]


def of_captions() -> list[tuple]:
    return [(saved(noise(size=(9 + row, 9))), caption) for row, (caption, _) in enumerate(CAPTIONS.values())]


@pytest.mark.parametrize(("image", "problem"), IMAGES.values(), ids=IMAGES)
def test_image(processor, image, problem):
    data = table([(image, "a red circle")])
    found = [sample.problem for sample in find_bad_samples(data, "image", "caption")]
    if problem is not GOOD:
        assert len(found) == 1 and problem in found[0]
        return
    assert found == []
    batch = PairCollator(processor)([PairDataset(data, "image", "caption", "pair_id")[0]])
    assert batch["pixel_values"].shape == (1, 3, SIZE, SIZE) and batch["pixel_values"].isfinite().all()


@pytest.mark.parametrize(("caption", "problem"), CAPTIONS.values(), ids=CAPTIONS)
def test_caption(model, processor, caption, problem):
    in_a_list = table([(saved(noise()), caption)])
    check_caption(in_a_list, model, processor, problem)
    if not isinstance(caption, list):
        alone = in_a_list.remove_columns("caption").add_column("caption", [caption], feature=Value("string"))
        check_caption(alone, model, processor, problem)


def check_caption(data, model, processor, problem):
    found = [sample.problem for sample in find_bad_samples(data, "image", "caption")]
    if problem is not GOOD:
        assert found == [problem]
        return
    assert found == []
    batch = PairCollator.for_model(model, processor)([PairDataset(data, "image", "caption", "pair_id")[0]])
    assert 2 <= batch["input_ids"].shape[1] <= 32
    assert model.get_text_features(**text_inputs(batch)).pooler_output.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]))), max_size=4))
def test_any_captions_become_tokens_or_are_named(captions):
    data = table([(saved(noise(size=(2, 2))), captions)])
    is_bad = bool(find_bad_samples(data, "image", "caption"))
    pair = PairDataset(data, "image", "caption", "pair_id")[0]
    if is_bad:
        with pytest.raises(ValueError, match=r"Rows \[0\] have no caption"):
            PairCollator(FUZZED)([pair])
    else:
        assert PairCollator(FUZZED)([pair])["input_ids"].shape[0] == 1


FUZZED = tiny_processor()


# ---- A run ----


@pytest.fixture
def start(model, processor, make_args):
    """A run of one phase, ready to train."""

    def start(data, test=None, processing_class=processor, **changes):
        stream = PhaseStream((Phase("strange", data, test),))
        args = make_args(**{"max_steps": 2, "spatial_disorder": False, **changes})
        return ContinualRun(stream, "modx", args, model=model, processing_class=processing_class)

    return start


def test_bad_rows_of_both_tables_are_left_out_and_counted_and_all_others_trained_on(start):
    entries = [*IMAGES.values(), *CAPTIONS.values()]
    run = start(table([*of_images(), *of_captions()]), bad_samples="skip", max_steps=4, save_strategy="no")
    run.run()
    results = json.loads((run.folder / "results.json").read_text())
    bad = sum(problem is not GOOD for _, problem in entries)
    assert results["bad_samples"]["strange (train)"]["count"] == bad
    assert results["bad_samples"]["strange (train)"]["first"][0] == "row 0: the image is null"
    assert results["training"][0]["pairs"] == len(entries) - bad


def test_bad_rows_are_refused_with_their_number_and_the_first_of_them(start, tmp_path):
    with pytest.raises(
        ValueError, match=r"16 of 33 rows of strange \(train\) cannot be used: row 0: the image is nul"
    ):
        start(table([*of_images(), *of_captions()]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption_column": "captoin"}, r"no column 'captoin' \(caption_column\)\. Did you mean 'caption'\? The col"),
        ({"image_column": "img"}, r"no column 'img' \(image_column\)\.( Did you mean 'image'\?)? The columns are"),
        ({"pair_id_column": "pairid"}, r"no column 'pairid' \(pair_id_column\) in any part\. Did you mean 'pair_id'"),
        ({"caption_column": "pair_id"}, "'pair_id' holds .*int64.*, not strings"),
        ({"image_column": "caption"}, "'caption' holds .*, not images"),
    ],
)
def test_columns_that_are_missing_misspelt_or_of_another_type(start, columns, message):
    with pytest.raises((ValueError, TypeError), match=message):
        start(tiny_pairs(9), **columns)


def test_images_that_were_saved_undecoded_are_decoded_or_told_of(start, tmp_path):
    undecoded = tiny_pairs(9).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(TypeError, match=r"holds Image\(.*decode=False\).*cast_column\('image', datasets.Image\(\)\)"):
        start(undecoded)
    undecoded.save_to_disk(str(tmp_path / "data"))
    start(load_splits(str(tmp_path / "data"))["train"])


def test_data_without_pair_ids_need_none(start):
    start(tiny_pairs(9).remove_columns("pair_id"))


def test_pair_ids_are_looked_at_where_rows_are_used(start):
    ids = [None if row == 4 else row for row in range(9)]
    with_null = tiny_pairs(9).remove_columns("pair_id").add_column("pair_id", ids)
    start(with_null.filter(lambda row: row["pair_id"] is not None))
    with pytest.raises(TypeError, match=r"'pair_id' must hold integers below 2\^63 without nulls"):
        start(with_null)


@pytest.mark.parametrize("captions", [[3] * 9, [1.5] * 9, [[1, 2]] * 9, [{"en": "a"}] * 9, [True] * 9])
def test_captions_that_are_no_strings(start, captions):
    data = tiny_pairs(9).remove_columns("caption").add_column("caption", captions)
    with pytest.raises(TypeError, match="'caption' holds .*, not strings or lists of strings"):
        start(data)


def test_phase_with_fewer_pairs_than_a_batch_is_trained_on_what_there_is(start):
    run = start(tiny_pairs(5), per_device_train_batch_size=8)
    run.run()
    assert json.loads((run.folder / "results.json").read_text())["training"][0]["steps"] == 2


def test_tokenizer_without_a_padding_token(start):
    processor = tiny_processor()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer\.eos_token"):
        start(tiny_pairs(9), processing_class=processor)


def test_unknown_phase_column_suggests_the_nearest():
    data = tiny_pairs(9).add_column("month", ["may"] * 5 + ["june"] * 4)
    with pytest.raises(ValueError, match=r"no column 'mnoth'\. Did you mean 'month'\?"):
        PhaseStream.from_column(data, "mnoth")
