"""From any stored image to RGB, augmentation that depends on one generator an image, and the batch of pairs."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_modx.data import PairCollator
from hf_modx.data.images import augment_affine_color, to_rgb

WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]


def reopened(image: Image.Image, image_format: str = "PNG", **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return Image.open(file)


def pixels(image: Image.Image) -> list:
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


# --- to_rgb ----------------------------------------------------------------------------------------------------------


def test_rgb_stays_as_it_is():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))


def test_grey_becomes_three_equal_channels():
    image = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    assert pixels(to_rgb(image)) == [BLACK, (100, 100, 100), WHITE]


def test_one_bit_becomes_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(to_rgb(image)) == [BLACK, WHITE]


def test_grey_with_transparency_lies_on_white():
    image = Image.new("LA", (3, 1))
    image.putdata([(0, 0), (0, 255), (100, 255)])
    assert pixels(to_rgb(image)) == [WHITE, BLACK, (100, 100, 100)]


def test_colour_with_transparency_lies_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 51)])
    assert pixels(to_rgb(image)) == [WHITE, RED, (204, 204, 204)]


def test_palette_with_one_transparent_colour_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    stored = reopened(image, transparency=0)
    assert stored.mode == "P"
    assert pixels(to_rgb(stored)) == [WHITE, BLUE]


def test_palette_with_degrees_of_transparency_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*BLACK, *BLUE])
    image.putdata([0, 1])
    stored = reopened(image, transparency=bytes([51, 255]))
    assert pixels(to_rgb(stored)) == [(204, 204, 204), BLUE]


def test_palette_without_transparency_gives_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([1, 0])
    assert pixels(to_rgb(reopened(image))) == [BLUE, RED]


def test_rgb_with_one_transparent_colour_lies_on_white():
    image = Image.new("RGB", (2, 1))
    image.putdata([RED, BLUE])
    assert pixels(to_rgb(reopened(image, transparency=RED))) == [WHITE, BLUE]


def test_inks_become_colours():
    image = Image.new("CMYK", (2, 1))
    image.putdata([(0, 0, 0, 0), (0, 255, 255, 0)])
    white, red = pixels(to_rgb(image))
    assert white == WHITE
    assert red[0] > 200
    assert max(red[1:]) < 60


def test_sixteen_bit_ramp_scales_to_eight_bits():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    stored = reopened(Image.fromarray(ramp))
    assert stored.mode == "I;16"
    found = np.asarray(to_rgb(stored))
    assert np.array_equal(found, np.repeat((ramp / 257).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_ramp_scales_to_eight_bits(dtype):
    ramp = np.arange(0, 65536, 257).astype(dtype).reshape(16, 16)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0].ravel(), np.arange(256))


def test_float_image_of_eight_bit_values_keeps_them():
    values = np.arange(256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(values)))[..., 0], values.astype(np.uint8))


def test_values_out_of_range_are_clipped():
    values = np.array([[-5.0, 0.0, 255.0]], dtype=np.float32)
    assert pixels(to_rgb(Image.fromarray(values))) == [BLACK, BLACK, WHITE]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    stored = reopened(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert stored.n_frames == 2
    assert set(pixels(to_rgb(stored))) == {RED}


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, [[RED, BLUE]]), (2, [[BLUE, RED]]), (3, [[BLUE, RED]]), (6, [[RED], [BLUE]]), (8, [[BLUE], [RED]])],
)
def test_exif_orientation_is_applied(orientation, expected):
    image = Image.new("RGB", (2, 1))
    image.putdata([RED, BLUE])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.asarray(to_rgb(reopened(image, exif=exif))).tolist() == np.array(expected).tolist()


def test_exif_orientation_and_transparency_together():
    image = Image.new("RGBA", (2, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 255, 255)])
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.asarray(to_rgb(reopened(image, exif=exif))).tolist() == [[list(WHITE)], [list(BLUE)]]


@pytest.mark.parametrize("mode", MODES)
def test_one_pixel_of_any_mode(mode):
    image = to_rgb(Image.new(mode, (1, 1)))
    assert (image.mode, image.size) == ("RGB", (1, 1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_the_image_given_is_not_changed(mode):
    image = Image.new(mode, (3, 2))
    before = image.tobytes()
    to_rgb(image)
    assert (image.mode, image.tobytes()) == (mode, before)


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(MODES), width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_mode_and_size_becomes_rgb_of_the_same_size(mode, width, height, seed):
    image = Image.new(mode, (width, height))
    if mode not in ("F", "RGBa"):
        image.frombytes(np.random.default_rng(seed).bytes(len(image.tobytes())))
    found = to_rgb(image)
    assert (found.mode, found.size) == ("RGB", (width, height))


# --- augment_affine_color --------------------------------------------------------------------------------------------


def batch(size: int = 6, height: int = 12, width: int = 12) -> torch.Tensor:
    return torch.randn(size, 3, height, width, generator=torch.Generator().manual_seed(0))


def generators(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds]


@pytest.mark.parametrize("size", [(12, 12), (8, 20), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_augmentation_keeps_shape_and_type_and_is_finite(dtype, size):
    images = batch(6, *size).to(dtype)
    found = augment_affine_color(images, generators(*range(6)))
    assert (found.shape, found.dtype) == (images.shape, dtype)
    assert torch.isfinite(found).all()


def test_augmented_image_depends_on_its_own_generator_alone():
    images = batch()
    together = augment_affine_color(images, generators(*range(6)))
    for row in range(6):
        alone = augment_affine_color(images[row : row + 1], generators(row))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)


def test_augmented_image_does_not_depend_on_its_place_in_the_batch():
    images, order = batch(), [3, 0, 5, 1, 4, 2]
    shuffled = augment_affine_color(images[order], generators(*order))
    expected = augment_affine_color(images, generators(*range(6)))[order]
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-6)


def test_same_generators_give_the_same_images():
    first, second = (augment_affine_color(batch(), generators(*range(6))) for _ in range(2))
    assert torch.equal(first, second)


def test_other_generators_give_other_images():
    images = batch(1).repeat(8, 1, 1, 1)
    found = augment_affine_color(images, generators(*range(8)))
    assert len({tuple(image.flatten().tolist()) for image in found}) == 8


def test_augmentation_leaves_its_input_alone():
    images = batch()
    before = images.clone()
    augment_affine_color(images, generators(*range(6)))
    assert torch.equal(images, before)


def test_float_images_of_unit_range_are_scaled():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [image.mode, *np.asarray(to_rgb(image))[0, :, 0].tolist()] == ["F", 0, 127, 255]


# --- PairCollator ----------------------------------------------------------------------------------------------------

CAPTIONS = [["a red ring"], ["one blue bar", "a bar in blue", "a blue bar"], ["a red ring", "one ring in red"]]


def items(epoch: int = 0, row_captions: list[list[str]] = CAPTIONS) -> list[dict]:
    image = Image.new("RGB", (32, 32), "red")
    return [
        {"row_id": row, "epoch": epoch, "pair_id": 7 * row, "image": image, "captions": captions}
        for row, captions in enumerate(row_captions)
    ]


@pytest.mark.parametrize("image_augmentation", ["none", "affine_color"])
def test_drawn_caption_is_the_first_draw_of_the_row_and_the_epoch(processor, image_augmentation):
    collator = PairCollator(processor, seed=5, image_augmentation=image_augmentation)
    drawn = set()
    for epoch in range(6):
        batch = collator(items(epoch))
        draws = [np.random.default_rng([5, epoch, row]).integers(len(own)) for row, own in enumerate(CAPTIONS)]
        assert batch["caption_index"].tolist() == draws
        expected = collator.tokens([own[draw] for own, draw in zip(CAPTIONS, draws, strict=True)])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        drawn.update(enumerate(draws))
    assert {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)} <= drawn


def test_equal_captions_have_equal_ids_and_others_have_other_ids(processor):
    collator = PairCollator(processor, mask_duplicates=True)
    ids = collator(items(row_captions=[["a red ring"], ["one bar"], ["a red ring"], ["a red Ring"]]))["caption_id"]
    assert ids.dtype == torch.int64
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 3
    assert (ids >= 0).all()


def test_id_of_a_caption_is_the_same_in_every_process(processor):
    collator = PairCollator(processor, mask_duplicates=True)
    assert collator(items())["caption_id"][0] == 5363382719747995163  # b2sum -l 64, without its last bit


def test_captions_have_no_ids_unless_asked_for(processor):
    assert "caption_id" not in PairCollator(processor)(items())


def test_rows_without_captions_are_named(processor):
    with pytest.raises(ValueError, match=r"Rows \[1\] have no caption"):
        PairCollator(processor)(items(row_captions=[["a red ring"], []]))
