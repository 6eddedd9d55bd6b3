"""The old model: copied, cached, or the student without its adapter."""

import copy
import gc
import json
import shutil
import weakref
from collections import namedtuple

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

from hf_modx.data import PairCollator, PairDataset
from hf_modx.data.sampling import GlobalBatches
from hf_modx.embeddings import check_dual_encoder, embed_pairs
from hf_modx.teacher import AdapterOffTeacher, Teacher, adapter_is_fresh, teacher_of
from hf_modx.teacher.cache import build_teacher_cache, cache_obstacle, caption_offsets, choose_cache

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor

# PEFT asks every model for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROWS = 22


def make_accelerator(mixed_precision="no"):
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    return Accelerator(cpu=True, mixed_precision=mixed_precision)


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=False)  # a Trainer before may have left its mixed precision
    yield make_accelerator()
    AcceleratorState._reset_state(reset_partial_state=False)


def make_dataset(rows=ROWS, change=lambda captions: captions):
    """One to four captions a row, short and long ones, and a blank one that does not count."""
    data = tiny_pairs(rows)
    captions = [
        ["a ring", " ", *row["caption"], "in a red red ring on one one bar"][: 1 + k % 5] for k, row in enumerate(data)
    ]
    data = data.remove_columns("caption").add_column("caption", change(captions))
    return PairDataset(data, "image", "caption", "pair_id")


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def collator(processor):
    return PairCollator(processor, seed=3)


def live_teacher(model, accelerator):
    teacher = Teacher(model)
    teacher.prepare(accelerator)
    return teacher


def build(teacher, dataset, collator, accelerator, folder=None, **options):
    mode = "memory" if folder is None else "disk"
    options = {"batch_size": 4, **options}
    return build_teacher_cache(teacher, dataset, collator, accelerator, mode=mode, folder=folder, **options)


def training_batches(dataset, collator, epochs=3):
    for epoch in range(epochs):
        batches = GlobalBatches(len(dataset), 8, seed=7, current_epoch=lambda epoch=epoch: epoch, drop_last=True)
        yield from DataLoader(dataset, batch_sampler=batches, collate_fn=collator)


def largest_difference(first, second, batches):
    pairs = [(first.embed(batch), second.embed(batch)) for batch in batches]
    names = ("image", "text", "logit_scale")
    return torch.stack([(getattr(a, n) - getattr(b, n)).abs().max() for a, b in pairs for n in names]).max().item()


class CountingTeacher(Teacher):
    """Counts the images it embeds, and breaks down after so many calls."""

    def __init__(self, model, breaks_after=None):
        super().__init__(model)
        self.images, self.calls, self.breaks_after = 0, 0, breaks_after

    def embed(self, batch):
        if self.calls == self.breaks_after:
            raise RuntimeError("the power went off")
        self.calls += 1
        self.images += len(batch["pixel_values"])
        return super().embed(batch)


def counting_teacher(model, accelerator, **options):
    teacher = CountingTeacher(model, **options)
    teacher.prepare(accelerator)
    return teacher


# --- What is cached --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-6), ("bfloat16", 0.02)])
def test_cache_gives_what_the_live_teacher_gives(
    model, dataset, collator, accelerator, tmp_path, on_disk, dtype, bound
):
    live = live_teacher(model.to(getattr(torch, dtype)), accelerator)
    cached = build(live, dataset, collator, accelerator, tmp_path if on_disk else None)
    batches = list(training_batches(dataset, collator))
    assert largest_difference(live, cached, batches) < bound
    drawn = torch.cat([torch.stack([batch["row_id"], batch["caption_index"]], dim=1) for batch in batches])
    assert len(drawn.unique(dim=0)) > ROWS
    ours, theirs = cached.embed(batches[0]), live.embed(batches[0])
    assert ours.image.dtype == theirs.image.dtype == getattr(torch, dtype)
    assert ours.logit_scale.dtype == theirs.logit_scale.dtype
    assert not ours.text.requires_grad


def test_every_caption_is_embedded_as_it_is_without_padding(model, dataset, collator, accelerator):
    live = live_teacher(model.double(), accelerator)
    cached = build(live, dataset, collator, accelerator, batch_size=5)
    pairs = [dataset[row] for row in range(ROWS)]
    for pair in pairs:
        for index, caption in enumerate(pair["captions"]):
            alone = {**collator([{**pair, "captions": [caption]}]), "caption_index": torch.tensor([index])}
            assert largest_difference(live, cached, [alone]) < 1e-12
    assert len(cached.text) == sum(len(pair["captions"]) for pair in pairs) > 2 * ROWS


def test_cache_is_made_under_the_training_s_mixed_precision(model, collator):
    accelerator = make_accelerator("bf16")
    one_caption = make_dataset(8, lambda captions: [row[:1] for row in captions])
    live = live_teacher(model, accelerator)
    cached = build(live, one_caption, collator, accelerator, batch_size=8)
    in_order = collator([one_caption[row] for row in range(8)])
    ours, theirs = cached.embed(in_order), live.embed(in_order)
    assert torch.equal(ours.image, theirs.image) and torch.equal(ours.text, theirs.text)
    assert ours.image.dtype == theirs.image.dtype == torch.float32
    in_fp32 = embed_pairs(model, model, in_order)
    assert not torch.equal(ours.image, in_fp32.image)
    AcceleratorState._reset_state(reset_partial_state=False)


def test_no_more_captions_than_the_batch_size_are_embedded_at_once(model, dataset, collator, accelerator):
    captions_at_once = []

    class Watch(Teacher):
        def embed(self, batch):
            captions_at_once.append(len(batch["input_ids"]))
            return super().embed(batch)

    teacher = Watch(model)
    teacher.prepare(accelerator)
    build(teacher, dataset, collator, accelerator, batch_size=4)
    assert max(captions_at_once) <= 4
    assert sum(captions_at_once[1:]) == caption_offsets(dataset)[-1]


def test_teacher_leaves_memory_after_release(model, dataset, collator, accelerator):
    live = live_teacher(model, accelerator)
    copied = weakref.ref(live.model)
    cached = build(live, dataset, collator, accelerator)
    live.release()
    del live
    gc.collect()
    assert copied() is None
    assert cached.embed(next(training_batches(dataset, collator))).image.shape == (8, 16)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_building_leaves_the_random_numbers_of_training_alone(model, dataset, collator, accelerator, num_workers):
    live = live_teacher(model, accelerator)
    before = torch.get_rng_state()
    build(live, dataset, collator, accelerator, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


# --- On disk ---------------------------------------------------------------------------------------------------------


def test_finished_cache_is_opened_without_embedding_anything(model, dataset, collator, accelerator, tmp_path):
    first = build(live_teacher(model, accelerator), dataset, collator, accelerator, tmp_path)
    again = counting_teacher(copy.deepcopy(model), accelerator)
    cached = build(again, dataset, collator, accelerator, tmp_path)
    assert again.calls == 0
    assert largest_difference(first, cached, training_batches(dataset, collator)) == 0


def test_interrupted_pass_goes_on_where_it_stopped(model, dataset, collator, accelerator, tmp_path):
    whole = build(live_teacher(model, accelerator), dataset, collator, accelerator)
    breaking = counting_teacher(model, accelerator, breaks_after=6)
    with pytest.raises(RuntimeError, match="the power went off"):
        build(breaking, dataset, collator, accelerator, tmp_path)
    rest = counting_teacher(model, accelerator)
    cached = build(rest, dataset, collator, accelerator, tmp_path)
    batches_finished = (ROWS - rest.images) / 4
    assert 1 <= batches_finished <= 4 and batches_finished.is_integer()
    assert largest_difference(whole, cached, training_batches(dataset, collator)) == 0


@pytest.mark.parametrize("name", ["image", "text", "checksum"])
def test_damaged_rows_are_embedded_again(model, dataset, collator, accelerator, tmp_path, name):
    cached = build(live_teacher(model, accelerator), dataset, collator, accelerator, tmp_path)
    before = cached.image.copy(), cached.text.copy()
    with open(cached.folder / name, "r+b") as file:
        file.write(b"\1\2\3")
    mending = counting_teacher(model, accelerator)
    mended = build(mending, dataset, collator, accelerator, tmp_path)
    assert mending.images == 4
    assert (mended.image == before[0]).all() and (mended.text == before[1]).all()


@pytest.mark.parametrize("name", ["image", "text", "checksum", "meta.json"])
def test_cache_with_a_short_file_is_made_afresh(model, dataset, collator, accelerator, tmp_path, name):
    cached = build(live_teacher(model, accelerator), dataset, collator, accelerator, tmp_path)
    content = (cached.folder / name).read_bytes()
    (cached.folder / name).write_bytes(content[:-9])
    again = counting_teacher(model, accelerator)
    build(again, dataset, collator, accelerator, tmp_path)
    assert again.images == ROWS + 1  # and one to learn the width
    assert (cached.folder / name).read_bytes() == content


def test_used_tokenizer_is_the_same_tokenizer(model, dataset, accelerator, tmp_path):
    live, used = live_teacher(model, accelerator), tiny_processor()
    first = build(live, dataset, PairCollator(tiny_processor()), accelerator, tmp_path)
    used.tokenizer(["a ring", "one"], padding="max_length", truncation=True, max_length=12)
    assert build(live, dataset, PairCollator(used), accelerator, tmp_path).folder == first.folder


def other_weights(model, *parts):
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1e-6
    return model, *parts


def other_config(model, *parts):
    model.config.vision_config.num_attention_heads = 1
    return model, *parts


def other_dtype(model, *parts):
    return model.double(), *parts


def other_caption(model, dataset, *parts):
    return model, make_dataset(change=lambda rows: [*rows[:-1], ["a bar"]]), *parts


def other_image(model, dataset, *parts):
    data = dataset.dataset.to_list()
    data[13]["image"] = data[12]["image"]
    changed = copy.copy(dataset)
    changed.dataset = type(dataset.dataset).from_list(data, features=dataset.dataset.features)
    return model, changed, *parts


def other_image_processor(model, dataset, collator, *parts):
    processor = tiny_processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    return model, dataset, PairCollator(processor), *parts


def other_length(model, dataset, collator, *parts):
    return model, dataset, PairCollator(tiny_processor(), max_length=9), *parts


def other_tokenizer(model, dataset, collator, *parts):
    processor = tiny_processor()
    vocabulary = processor.tokenizer.get_vocab()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    processor.tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
    return model, dataset, PairCollator(processor), *parts


def other_precision(model, dataset, collator, accelerator):
    return model, dataset, collator, make_accelerator("bf16")


CHANGES = [
    other_weights,
    other_config,
    other_dtype,
    other_caption,
    other_image,
    other_image_processor,
    other_length,
    other_tokenizer,
    other_precision,
]


@pytest.mark.parametrize("change", CHANGES)
def test_cache_of_something_else_is_not_used(processor, dataset, collator, accelerator, tmp_path, change):
    first = build(live_teacher(tiny_clip(processor), accelerator), dataset, collator, accelerator, tmp_path)
    model, *parts = change(tiny_clip(processor), dataset, collator, accelerator)
    teacher = counting_teacher(model, parts[-1])
    second = build(teacher, *parts, tmp_path)
    assert teacher.images == ROWS + 1
    assert second.folder != first.folder


def test_saved_processor_is_the_same_processor(processor, model, dataset, accelerator, tmp_path):
    used = tiny_processor()
    first = build(live_teacher(model, accelerator), dataset, PairCollator(used), accelerator, tmp_path / "cache")
    used.save_pretrained(tmp_path / "saved")
    again = counting_teacher(model, accelerator)
    second = build(again, dataset, PairCollator(used), accelerator, tmp_path / "cache")
    assert second.folder == first.folder and again.images == 0


def test_removing_leaves_nothing_behind_and_what_is_open_readable(model, dataset, collator, accelerator, tmp_path):
    folder = tmp_path / "teacher_cache"
    live = live_teacher(model, accelerator)
    cached = build(live, dataset, collator, accelerator, folder)
    assert json.loads((cached.folder / "meta.json").read_text())["width"] == 16
    cached.remove()
    assert not folder.exists()
    assert largest_difference(live, cached, training_batches(dataset, collator, 1)) < 1e-6


def test_too_little_room_is_said_before_anything_is_written(
    model, dataset, collator, accelerator, tmp_path, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match="needs .* GiB in .* set teacher_cache to 'off'"):
        build(live_teacher(model, accelerator), dataset, collator, accelerator, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# --- Several processes -----------------------------------------------------------------------------------------------


def build_in_processes(folder, on_disk, rows):
    processor, accelerator = tiny_processor(), Accelerator(cpu=True)
    teacher = counting_teacher(tiny_clip(processor), accelerator)
    where = folder / "cache" if on_disk else None
    cached = build(teacher, make_dataset(rows), PairCollator(processor), accelerator, where)
    tensors = {"image": torch.tensor(cached.image), "text": torch.tensor(cached.text)}
    save_file({**tensors, "images": torch.tensor(teacher.images)}, folder / f"rank-{accelerator.process_index}")


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(("rows", "shares"), [(11, [4, 7]), (3, [0, 3])], ids=["uneven", "fewer batches"])
def test_two_processes_make_the_cache_of_one(model, collator, accelerator, tmp_path, on_disk, rows, shares):
    one = build(live_teacher(model, accelerator), make_dataset(rows), collator, accelerator)
    launch(2, build_in_processes, tmp_path, on_disk, rows)
    ranks = [load_file(tmp_path / f"rank-{rank}") for rank in (0, 1)]
    for rank, share in zip(ranks, shares, strict=True):
        assert (rank["image"].numpy() == one.image).all() and (rank["text"].numpy() == one.text).all()
        assert rank["images"] == share + 1  # and one to learn the width


def test_two_processes_finish_what_one_began(model, collator, accelerator, tmp_path):
    breaking = counting_teacher(model, accelerator, breaks_after=4)
    with pytest.raises(RuntimeError):
        build(breaking, make_dataset(11), collator, accelerator, tmp_path / "cache")
    one = build(live_teacher(model, accelerator), make_dataset(11), collator, accelerator)
    launch(2, build_in_processes, tmp_path, True, 11)
    ranks = [load_file(tmp_path / f"rank-{rank}") for rank in (0, 1)]
    assert 3 <= sum(int(rank["images"]) for rank in ranks) < 11
    assert all((rank["text"].numpy() == one.text).all() for rank in ranks)


def build_on_two_disks(folder):
    processor, accelerator = tiny_processor(), Accelerator(cpu=True)
    own = folder / f"disk-{accelerator.process_index}"
    with pytest.raises(OSError, match="the processes share no disk"):
        build(
            live_teacher(tiny_clip(processor), accelerator),
            make_dataset(4),
            PairCollator(processor),
            accelerator,
            own,
        )
    (folder / f"refused-{accelerator.process_index}").touch()


def test_disk_that_not_all_processes_see_is_refused_on_all(tmp_path):
    launch(2, build_on_two_disks, tmp_path)
    assert {path.name for path in tmp_path.glob("refused-*")} == {"refused-0", "refused-1"}


# --- When to cache ---------------------------------------------------------------------------------------------------


def test_random_images_are_refused(model, dataset, processor, accelerator):
    augmenting = PairCollator(processor, image_augmentation="affine_color")
    with pytest.raises(ValueError, match="image_augmentation is 'affine_color'. Set teacher_cache to 'off'"):
        build(live_teacher(model, accelerator), dataset, augmenting, accelerator)


def test_collator_of_one_s_own_is_refused(model, dataset, collator, accelerator):
    class Flipping(PairCollator):
        pass

    for own in (Flipping(tiny_processor()), lambda pairs: collator(pairs)):
        with pytest.raises(ValueError, match="leave data_collator out"):
            build(live_teacher(model, accelerator), dataset, own, accelerator)


def test_rows_without_captions_are_named_before_anything_is_embedded(model, collator, accelerator):
    holes = make_dataset(change=lambda rows: [[""] if row in (2, 5) else own for row, own in enumerate(rows)])
    teacher = counting_teacher(model, accelerator)
    with pytest.raises(ValueError, match=r"Rows \[2, 5\] have no caption"):
        build(teacher, holes, collator, accelerator)
    assert teacher.calls == 0


GIB = 2**30


@pytest.mark.parametrize(
    ("pairs_seen", "rows", "captions", "width", "expected"),
    [
        (1000, 1000, 1000, 512, "off"),
        (1001, 1000, 1000, 512, "memory"),
        (3000, 1000, 5000, 512, "off"),
        (3001, 1000, 5000, 512, "memory"),
        (10**9, 2**18, 2**18, 512, "memory"),
        (10**9, 2**18, 2**18 + 1, 512, "disk"),
        (10**9, 2**18, 2**18, 513, "disk"),
    ],
)
def test_auto_caches_where_it_saves_work(pairs_seen, rows, captions, width, expected):
    assert choose_cache("auto", rows=rows, captions=captions, width=width, pairs_seen=pairs_seen) == expected


@pytest.mark.parametrize("mode", ["off", "memory", "disk"])
def test_mode_that_is_asked_for_is_taken(mode):
    assert choose_cache(mode, rows=1000, captions=1000, width=512, pairs_seen=1) == mode


def test_auto_does_not_cache_against_an_obstacle(processor):
    obstacle = cache_obstacle(PairCollator(processor, image_augmentation="affine_color"))
    assert choose_cache("auto", obstacle=obstacle, rows=10, captions=10, width=16, pairs_seen=10**6) == "off"
    assert choose_cache("off", obstacle=obstacle) == "off"
    with pytest.raises(ValueError, match="image_augmentation"):
        choose_cache("memory", obstacle=obstacle)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'auto', 'off', 'memory', 'disk', got 'ram'"):
        choose_cache("ram")


# --- The student without its adapter ---------------------------------------------------------------------------------


def with_adapter(model, **options):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def step(student, batch, optimizer, between=lambda: None):
    """Move away from the start, with something done between the forward and the backward pass."""
    embeds = embed_pairs(student, student, batch)
    between()
    (embeds.image @ embeds.text.T).square().mean().backward()
    optimizer.step()


def sgd(student):
    return torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=3.0)


def test_peft_model_is_a_dual_encoder(model, dataset, collator):
    batch = collator([dataset[row] for row in range(4)])
    expected = embed_pairs(model, model, batch)
    student = with_adapter(model)
    check_dual_encoder(student)
    embeds = embed_pairs(student.eval(), student, batch)
    assert torch.equal(embeds.image, expected.image) and torch.equal(embeds.text, expected.text)
    assert embeds.logit_scale == expected.logit_scale


def test_student_without_adapter_is_the_copy_taken_at_the_start(model, dataset, collator, accelerator):
    for layer in (*model.text_model.encoder.layers, *model.vision_model.encoder.layers):
        layer.self_attn.dropout = 0.5
    student = with_adapter(model.double())
    copied, without = live_teacher(student, accelerator), teacher_of(student)
    without.prepare(accelerator)
    optimizer, batches = sgd(student), list(training_batches(dataset, collator))
    assert isinstance(without, AdapterOffTeacher)
    for batch in batches:
        step(student, batch, optimizer, between=lambda batch=batch: without.embed(batch))
    moved = Teacher(student)
    moved.prepare(accelerator)
    assert largest_difference(copied, moved, batches) > 1e-3
    assert largest_difference(copied, without, batches) < 1e-12


def test_embedding_without_the_adapter_changes_nothing_of_the_student_s_step(model, dataset, collator, accelerator):
    batches = list(training_batches(dataset, collator))
    students = [with_adapter(copy.deepcopy(model)) for _ in range(2)]
    for student, is_watched in zip(students, (False, True), strict=True):
        teacher = AdapterOffTeacher(student)
        teacher.prepare(accelerator)
        optimizer = sgd(student)
        torch.manual_seed(1)
        for batch in batches:
            step(student, batch, optimizer, lambda batch=batch, t=teacher, on=is_watched: on and t.embed(batch))
    first, second = (student.state_dict() for student in students)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_modes_and_frozen_parameters_are_as_they_were(model, dataset, collator, accelerator):
    student = with_adapter(model).train()
    student.get_base_model().text_model.requires_grad_(False)  # the adapter in it as well
    student.get_base_model().vision_model.embeddings.eval()
    teacher = AdapterOffTeacher(student)
    teacher.prepare(accelerator)
    modes = [module.training for module in student.modules()]
    trained = [parameter.requires_grad for parameter in student.parameters()]
    teacher.embed(next(training_batches(dataset, collator)))
    assert [module.training for module in student.modules()] == modes
    assert [parameter.requires_grad for parameter in student.parameters()] == trained
    assert {True, False} == set(modes) == set(trained)


def test_student_is_as_it_was_after_an_error_too(model, dataset, collator, accelerator):
    student = with_adapter(model).train()
    teacher = AdapterOffTeacher(student)
    teacher.prepare(accelerator)
    with pytest.raises(ValueError, match="input_ids"):
        teacher.embed({"pixel_values": torch.zeros(1, 3, 32, 32)})
    assert all(module.training for module in student.modules())
    assert student.get_model_status().enabled


def test_logit_scale_that_is_trained_along_is_remembered(model, dataset, collator, accelerator):
    student = with_adapter(model)
    student.logit_scale.requires_grad_(True)
    teacher = teacher_of(student)
    teacher.prepare(accelerator)
    before = student.logit_scale.exp().item()
    with torch.no_grad():
        student.get_base_model().logit_scale += 1
    assert isinstance(teacher, AdapterOffTeacher)
    assert teacher.embed(next(training_batches(dataset, collator))).logit_scale == before


def test_cache_of_the_student_without_adapter_is_found_again_in_the_middle_of_training(
    model, dataset, collator, accelerator, tmp_path
):
    student = with_adapter(model)
    student.logit_scale.requires_grad_(True)
    teacher = teacher_of(student)
    teacher.prepare(accelerator)
    first = build(teacher, dataset, collator, accelerator, tmp_path)
    step(student, next(training_batches(dataset, collator)), sgd(student))
    with torch.no_grad():
        student.get_base_model().logit_scale += 1
    assert build(teacher, dataset, collator, accelerator, tmp_path).folder == first.folder


def a_plain_model(model):
    return model


def a_trained_adapter(model):
    student = with_adapter(model)
    with torch.no_grad():
        next(p for name, p in student.named_parameters() if "lora_B" in name)[0, 0] = 1e-3
    return student


def a_base_that_is_trained_along(model):
    student = with_adapter(model)
    student.visual_projection.weight.requires_grad_(True)
    return student


def biases_that_are_trained_along(model):
    return with_adapter(model, bias="all")


def modules_that_are_trained_along(model):
    return with_adapter(model, modules_to_save=["visual_projection"])


@pytest.mark.parametrize(
    "change",
    [
        a_plain_model,
        a_trained_adapter,
        a_base_that_is_trained_along,
        biases_that_are_trained_along,
        modules_that_are_trained_along,
    ],
)
def test_copy_is_taken_where_the_base_is_not_the_old_model(model, change):
    student = change(model)
    assert not adapter_is_fresh(student)
    assert type(teacher_of(student)) is Teacher
    with pytest.raises(ValueError, match="takes a copy"):
        AdapterOffTeacher(student)
