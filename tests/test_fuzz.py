"""Whatever stands in a config file or in a table: arguments or a usage error, a batch or an error that names the rows.

HYPOTHESIS_PROFILE=long python -m pytest tests/test_fuzz.py runs 10,000 examples of each.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import HfArgumentParser

from hf_modx import ModXTrainingArguments
from hf_modx.data import PairCollator, PairDataset
from hf_modx.data.bad_samples import find_bad_samples
from hf_modx.recipes import RECIPES
from hf_modx.yaml_arguments import parse_arguments

from tiny import SIZE, tiny_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import continual_clip

CLASSES = (continual_clip.ScriptArguments, ModXTrainingArguments)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


# ---- The config file ----

# What a person may write where something else belongs: each is the value of any option.
MISFITS = st.sampled_from(
    [
        *("", "null", "~", "no", "yes", "true", "-1", "0", "1", "2", "1e-4", "nan", "inf", "1" * 30, "2026-11-22"),
        *("[]", "{}", "[1, 2]", "[[1], {a: 1}]", "{a: 1}", "{a: {b: [1, 2]}}", "'{\"a\": 1}'", "'{'", "'[1'", "a,b"),
        *("steps", "cpu", "none", "lost/file.yaml", "--seed", "'--seed 1'", "&a [*a]", "!!python/object:os.system x"),
    ]
)
OPTIONS = sorted(name.removeprefix("--") for name in HfArgumentParser(CLASSES)._option_string_actions)
LINES = st.tuples(st.sampled_from(OPTIONS), MISFITS | WORDS.map(json.dumps)).map(": ".join)
RECIPE_OPTIONS = st.dictionaries(
    st.sampled_from(["alpha", "weight", "every", "memory_size", "batch_share", "contrastive", "modx", "er", "texts"])
    | WORDS,
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 3) | st.floats(-2, 2) | WORDS,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["alpha", "weight"]), inner),
        max_leaves=3,
    ),
    max_size=2,
)
RECIPE_NAMES = st.sampled_from([*RECIPES, "modx+er", "er + ewc", "+", "modx+modx", "", "modxx"])
RECIPE_PARTS = st.lists(RECIPE_NAMES | st.dictionaries(RECIPE_NAMES, RECIPE_OPTIONS, max_size=2), max_size=3)
RECIPE_LINES = st.fixed_dictionaries({"recipe": RECIPE_NAMES | RECIPE_PARTS, "recipe_args": RECIPE_OPTIONS}).map(
    json.dumps
)


def parse(tmp_path_factory, text: str) -> None:
    """Arguments of the right classes, or a usage error of one kind."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        found = parse_arguments(CLASSES, [str(path)], continual_clip.defaults)
    except SystemExit as error:
        assert error.code in (0, 2)  # 0 is --help
    else:
        assert tuple(map(type, found)) == CLASSES


def no_accident(message: str) -> bool:
    """Whether it was written for a reader."""
    return not any(name in message for name in ("KeyError", "TypeError", "AttributeError", "IndexError"))


@given(lines=st.lists(LINES, max_size=4, unique_by=lambda line: line.split(":")[0]))
def test_any_values_of_the_options_give_arguments_or_a_usage_error(tmp_path_factory, lines):
    parse(tmp_path_factory, "\n".join(["report_to: none", "use_cpu: true", *lines]))


@given(text=RECIPE_LINES)
def test_any_recipe_and_its_options_give_arguments_or_a_usage_error(tmp_path_factory, text):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        parse(tmp_path_factory, text)
    assert no_accident(told.getvalue())


# ---- The collator ----

FUZZED = tiny_processor()


def encoded(mode: str, image_format: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, image_format)
    return file.getvalue()


WHOLE = [
    encoded(mode, image_format)
    for mode, image_format in [
        *(("RGB", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("I;16", "PNG"), ("1", "PNG"), ("RGB", "JPEG")),
        *(("CMYK", "JPEG"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "TIFF"), ("F", "TIFF"), ("RGBA", "WEBP")),
    ]
]


@st.composite
def damaged(draw) -> bytes:
    """An image with some bytes changed, and cut."""
    content = bytearray(draw(st.sampled_from(WHOLE)))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)):
        content[place] = value
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


IMAGES = st.none() | st.sampled_from(WHOLE) | st.sampled_from(WHOLE) | damaged() | st.binary(max_size=30)
CAPTIONS = {
    "text": (Value("string"), st.none() | WORDS),
    "long text": (Value("large_string"), st.none() | WORDS),
    "list": (List(Value("string")), st.none() | st.lists(st.none() | WORDS, max_size=3)),
    "list of lists": (List(List(Value("string"))), st.lists(st.lists(WORDS, max_size=2), max_size=2)),
    "number": (Value("int32"), st.none() | st.integers(-9, 9)),
    "mapping": ({"en": Value("string")}, st.fixed_dictionaries({"en": WORDS})),
}
PAIR_IDS = {
    "int64": (Value("int64"), st.integers(-(2**63), 2**63 - 1)),
    "uint64": (Value("uint64"), st.integers(0, 2**64 - 1)),
    "null": (Value("int8"), st.none() | st.integers(0, 9)),
    "float": (Value("float32"), st.floats(width=32)),
    "text": (Value("string"), WORDS),
}


@st.composite
def tables(draw) -> Dataset:
    """A few rows with columns of any of these types."""
    rows = draw(st.integers(1, 3))
    caption_type, caption = CAPTIONS[draw(st.sampled_from(["text", "list", *CAPTIONS]))]
    columns = {
        "image": [None if image is None else {"bytes": image, "path": None} for image in several(draw, IMAGES, rows)],
        "caption": several(draw, caption, rows),
    }
    features = {"image": datasets.Image(), "caption": caption_type}
    if kind := draw(st.none() | st.sampled_from(["int64", *PAIR_IDS])):
        features["pair_id"], pair_id = PAIR_IDS[kind]
        columns["pair_id"] = pa.array(several(draw, pair_id, rows), features["pair_id"].pa_type)
    return Dataset.from_dict(columns, features=Features(features))


def several(draw, strategy, number: int) -> list:
    return [draw(strategy) for _ in range(number)]


@pytest.fixture(scope="module", autouse=True)
def smaller_bombs():
    """A damaged header may promise any size, and 179 million pixels take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        yield


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@given(
    table=tables(),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    mask_duplicates=st.booleans(),
    augmentation=st.sampled_from(["none", "affine_color"]),
)
def test_any_table_gives_a_batch_or_an_error_that_names_the_rows(table, epoch, seed, mask_duplicates, augmentation):
    try:
        bad = {sample.row for sample in find_bad_samples(table, "image", "caption")}
        pairs = PairDataset(table, "image", "caption", "pair_id")
    except TypeError as error:
        assert "Column 'caption' holds" in str(error) or "Column 'pair_id' must hold" in str(error)
        return
    collator = PairCollator(FUZZED, seed, augmentation, mask_duplicates=mask_duplicates)
    rows = list(range(len(table)))
    if bad:
        with pytest.raises(
            ValueError, match=r"(An image among the r|R)ows \[\d.*\] (cannot be decoded|have no caption)"
        ):
            collator(pairs.__getitems__([epoch * len(table) + row for row in rows]))
        return
    batch = collator(pairs.__getitems__([epoch * len(table) + row for row in rows]))
    assert batch["row_id"].tolist() == rows
    assert batch["pixel_values"].shape == (len(rows), 3, SIZE, SIZE) and batch["pixel_values"].isfinite().all()
    assert batch["input_ids"].shape == batch["attention_mask"].shape and len(batch["input_ids"]) == len(rows)
    assert ("caption_id" in batch) == mask_duplicates
