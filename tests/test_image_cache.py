"""Images resized once: the same pixel values, and no file that does not belong to them."""

import io
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from transformers import CLIPImageProcessorPil

from hf_modx import ModXTrainer
from hf_modx.data import PairCollator, PairDataset
from hf_modx.data.image_cache import cache_resized_images

from launch import launch
from tiny import SIZE, tiny_clip, tiny_processor

sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import input_pipeline as benchmark


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(noise(50, 80)), "JPEG", exif=exif)


def animation() -> bytes:
    frames = [Image.fromarray(noise(40, 60, seed=seed)) for seed in range(2)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


KINDS = {
    "landscape": encoded(Image.fromarray(noise(300, 451))),
    "portrait": encoded(Image.fromarray(noise(333, 250)), "JPEG"),
    "smaller than the target": encoded(Image.fromarray(noise(11, 17))),
    "one side smaller": encoded(Image.fromarray(noise(20, 400))),
    "a line": encoded(Image.fromarray(noise(400, 2))),
    "of the target's size": encoded(Image.fromarray(noise(224, 224))),
    "grey": encoded(Image.fromarray(noise(70, 90, 1))),
    "palette": encoded(Image.fromarray(noise(70, 90)).convert("P")),
    "palette with transparency": encoded(Image.fromarray(noise(70, 90)).convert("P"), transparency=3),
    "alpha": encoded(Image.fromarray(noise(70, 90, 4))),
    "CMYK": encoded(Image.fromarray(noise(70, 90)).convert("CMYK"), "JPEG"),
    "16 bits": encoded(Image.fromarray(noise(70, 90, 1).astype(np.uint16) * 257)),
    "rotated by EXIF": rotated_jpeg(),
    "animation": animation(),
}


def pairs(*images, captions=None) -> Dataset:
    """Rows of encoded images, paths or None."""
    stored = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    features = Features({"caption": Value("string"), "image": datasets.Image(), "pair_id": Value("int64")})
    captions = captions or ["a red circle"] * len(images)
    return Dataset.from_dict(
        {"caption": captions, "image": stored, "pair_id": list(range(len(images)))}, features=features
    )


def many(rows: int = 12) -> Dataset:
    return pairs(*(encoded(Image.fromarray(noise(40, 50, seed=row))) for row in range(rows)))


def processor_of(**settings):
    processor = tiny_processor()
    processor.image_processor = CLIPImageProcessorPil(**settings)
    return processor


def pixel_values(dataset, processor):
    rows = PairDataset(dataset, "image", "caption", "pair_id").__getitems__(list(range(len(dataset))))
    return PairCollator(processor)(rows)["pixel_values"]


@pytest.fixture
def cached(processor, tmp_path):
    """Cache with the tiny processor, or others."""

    def cached(dataset, processing_class=processor, **options):
        return cache_resized_images(dataset, "image", processing_class, tmp_path / "cache", **options)

    return cached


@pytest.fixture
def files(tmp_path):
    """The Arrow files in the cache."""
    return lambda: sorted((tmp_path / "cache").rglob("*.arrow"))


# --- The same pixel values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"size": {"height": 48, "width": 48}, "do_center_crop": False}])
def test_pixel_values_are_bit_identical(kind, settings, cached):
    data, processor = pairs(KINDS[kind]), processor_of(**settings)
    assert torch.equal(pixel_values(cached(data, processor), processor), pixel_values(data, processor))


def test_image_files_on_the_disk_may_go_once_they_are_cached(cached, processor, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(KINDS["landscape"])
    data = pairs(str(path))
    expected = pixel_values(data, processor)
    resized = cached(data)
    path.unlink()
    assert torch.equal(pixel_values(resized, processor), expected)


def test_training_and_evaluation_are_the_same_to_the_last_bit(cached, make_args, processor):
    results = []
    for data in (many(), cached(many())):
        args = make_args(image_augmentation="affine_color")
        trainer = ModXTrainer(tiny_clip(processor), args, train_dataset=data, processing_class=processor)
        trainer.train()
        values = trainer.evaluate(data)
        results.append((trainer.model.state_dict(), values["eval_loss"], values["eval_image_to_text_mrr"]))
    (weights, *values), (cached_weights, *cached_values) = results
    assert all(torch.equal(weights[name], cached_weights[name]) for name in weights)
    assert values == cached_values


def test_num_proc_writes_the_same(cached, processor):
    data = many()
    assert torch.equal(pixel_values(cached(data, num_proc=2), processor), pixel_values(data, processor))


def test_two_processes_at_once_do_not_harm_each_other(cached, processor):
    data = many(100)
    expected = pixel_values(data, processor)

    def cache_and_compare():
        assert torch.equal(pixel_values(cached(data), processor), expected)

    launch(2, cache_and_compare)


# --- The same data set -----------------------------------------------------------------------------------------------


def test_everything_but_the_image_column_stays(cached):
    data = many().add_column("month", ["may"] * 12)
    resized = cached(data)
    assert resized.features == data.features
    assert resized.remove_columns("image").to_dict() == data.remove_columns("image").to_dict()
    assert {image.size for image in resized["image"]} == {(SIZE, SIZE)}


def test_rows_chosen_from_a_larger_table_keep_their_order(cached, processor, files):
    chosen = many().select([7, 2, 2, 5])
    resized = cached(chosen)
    assert resized["pair_id"] == [7, 2, 2, 5]
    assert torch.equal(pixel_values(resized, processor), pixel_values(chosen, processor))
    assert len(files()) == 1


def test_image_column_alone(cached):
    assert cached(many().select_columns("image")).column_names == ["image"]


def test_no_rows(cached):
    nothing = many().select([])
    assert cached(nothing) is nothing


def test_a_row_takes_three_bytes_a_pixel(cached, files):
    cached(many(200))
    (file,) = files()
    assert file.stat().st_size == pytest.approx(200 * 3 * SIZE * SIZE, rel=0.03)


# --- The file belongs to images and processor ------------------------------------------------------------------------


def test_second_call_reads_what_the_first_wrote(cached, files):
    first = cached(many())
    before = [(file, file.stat().st_mtime_ns) for file in files()]
    second = cached(many())
    assert [(file, file.stat().st_mtime_ns) for file in files()] == before
    assert second._fingerprint == first._fingerprint


def test_another_caption_needs_no_other_file(cached, files):
    cached(pairs(KINDS["grey"], captions=["a red circle"]))
    assert cached(pairs(KINDS["grey"], captions=["a blue ring"]))["caption"] == ["a blue ring"]
    assert len(files()) == 1


@pytest.mark.parametrize("change", ["one image", "the order"])
def test_other_images_get_a_file_of_their_own(change, cached, processor, files):
    images = [encoded(Image.fromarray(noise(40, 50, seed=row))) for row in range(100)]
    cached(pairs(*images))
    images[71], images[72] = (KINDS["grey"], images[72]) if change == "one image" else (images[72], images[71])
    changed = pairs(*images)
    assert torch.equal(pixel_values(cached(changed), processor), pixel_values(changed, processor))
    assert len(files()) == 2


@pytest.mark.parametrize("settings", [{"resample": 2}, {"size": {"shortest_edge": 48}, "crop_size": 48}])
def test_another_processor_gets_a_file_of_its_own(settings, cached, files):
    tiny = {"size": {"shortest_edge": SIZE}, "crop_size": SIZE}
    data, other = many(), processor_of(**{**tiny, **settings})
    cached(data, processor_of(**tiny))
    assert torch.equal(pixel_values(cached(data, other), other), pixel_values(data, other))
    assert len(files()) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 40}, "crop_size": 32},
        {"size": {"height": 32, "width": 32}, "crop_size": 40},
        {
            "do_center_crop": False,
            "size": {"height": 24, "width": 24},
            "do_pad": True,
            "pad_size": {"height": 32, "width": 32},
        },
    ],
)
def test_processor_that_changes_what_it_has_resized_is_refused(settings, cached, files):
    with pytest.raises(ValueError, match="changes an image that it has resized"):
        cached(many(), processor_of(**settings))
    assert files() == []


# --- Interruptions and bad input -------------------------------------------------------------------------------------


class KilledInTheMiddle(CLIPImageProcessorPil):
    """Ends its process with the 100th image."""

    images = 0

    def __call__(self, *args, **kwargs):
        self.images += 1
        if self.images == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*args, **kwargs)


def test_a_killed_process_leaves_no_file_that_is_used(cached, files, tmp_path):
    data, processor = many(150), processor_of(size={"shortest_edge": SIZE}, crop_size=SIZE)
    processor.image_processor.__class__ = KilledInTheMiddle
    killed = multiprocessing.get_context("fork").Process(target=cached, args=(data, processor))
    killed.start()
    killed.join(timeout=60)
    assert killed.exitcode == -signal.SIGKILL
    assert list((tmp_path / "cache").rglob("tmp*")) and files() == []
    processor.image_processor.images = 1000
    assert torch.equal(pixel_values(cached(data, processor), processor), pixel_values(data, processor))


def test_what_was_given_up_is_deleted_and_what_is_being_written_stays(cached, files):
    cached(many())
    folder = files()[0].parent
    old, new = folder / "tmpold", folder / "tmpnew"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cached(many())
    assert not old.exists() and new.exists()


def test_only_the_missing_part_is_written_again(cached, files, processor):
    data = many()
    cached(data, num_proc=2)
    kept, lost = files()
    written = kept.stat().st_mtime_ns
    lost.unlink()
    assert torch.equal(pixel_values(cached(data), processor), pixel_values(data, processor))
    assert files() == [kept, lost] and kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("num_proc", [None, 2])
def test_image_that_cannot_be_decoded_is_named(cached, files, num_proc):
    images = [KINDS["grey"]] * 9
    images[6] = KINDS["grey"][:100]
    with pytest.raises(ValueError, match="image in row 6 cannot be decoded"):
        cached(pairs(*images), num_proc=num_proc)
    assert len(files()) < 2


@pytest.mark.parametrize("row", [0, 8])
def test_null_image_is_named(cached, row):
    images = [KINDS["grey"]] * 9
    images[row] = None
    with pytest.raises(ValueError, match=f"image in row {row} is null"):
        cached(pairs(*images))


def test_full_disk_is_told_before_writing(cached, files, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="name a folder on another disk"):
        cached(many())
    assert files() == []


@pytest.mark.parametrize("bytes_left", [0, 1000, 200_000])
def test_damaged_file_is_named(cached, files, bytes_left):
    cached(many(150))
    (file,) = files()
    os.truncate(file, bytes_left)
    with pytest.raises(ValueError, match=f"{file.parent} are damaged"):
        cached(many(150))


def test_file_with_fewer_rows_is_named(cached, files):
    cached(many(150))
    (file,) = files()
    reader = pa.ipc.open_stream(file.read_bytes())
    with pa.ipc.new_stream(str(file), reader.schema) as writer:
        writer.write_batch(reader.read_next_batch())
    with pytest.raises(ValueError, match=f"{file.parent} are damaged"):
        cached(many(150))


def test_benchmark(capsys):
    sizes = ["--images", "16", "--size", "64x48", "--image_size", "32"]
    benchmark.main([*sizes, "--workers", "0,1", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "| 0 |" in printed and "| 1 |" in printed
    assert "pixel values the same to the last bit" in printed
