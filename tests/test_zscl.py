"""ZSCL: its terms as they are written down, its reference data, and classes instead of captions."""

import copy
import re

import datasets
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

from hf_modx import ContinualRun, ModXTrainer, ModXTrainingArguments, Phase, PhaseStream, build_recipe
from hf_modx.callbacks import Classification, Contrastive, ReferenceDistillation, class_pairs
from hf_modx.callbacks.reference import Draw, reference_images, row_keys, stored_images
from hf_modx.losses.reference import reference_distillation

from launch import launch
from tiny import tiny_clip, tiny_dual_encoder, tiny_pairs, tiny_processor

SGD = {"optim": "sgd", "learning_rate": 0.05, "warmup_steps": 0, "lr_scheduler_type": "constant", "max_grad_norm": 0}


@pytest.fixture(scope="module")
def reference():
    """Pictures that are in no phase, with captions."""
    return tiny_pairs(12, style="yellow", shift=2, start=30)


def trainer_of(model, args, processor, data, callbacks):
    return ModXTrainer(
        model=model, args=args, train_dataset=data, processing_class=processor, loss_callbacks=callbacks
    )


def train(*args, resume=None):
    trainer = trainer_of(*args)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def largest_difference(first, second):
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def unit(rows, width, seed):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double))


# ---- The formulas ----


def distill(teacher, student, temperature=2):
    """`CE(s / T, softmax(t / T)) * T^2`, mean over rows."""
    targets = (teacher / temperature).softmax(dim=1)
    return -(targets * (student / temperature).log_softmax(dim=1)).sum(dim=1).mean() * temperature**2


@pytest.mark.parametrize("temperature", [2.0, 1.0, 0.5])
def test_distillation_is_the_cross_entropy_with_the_softened_teacher_in_both_directions(temperature):
    image = unit(6, 5, 0).requires_grad_()
    teacher_image, teacher_text, scale = unit(6, 5, 1), unit(9, 5, 2), 7.0
    found = reference_distillation(image, teacher_text, teacher_image, teacher_text, scale, temperature=temperature)
    old, new = (scale * side @ teacher_text.T for side in (teacher_image, image))
    expected = (distill(old, new, temperature), distill(old.T, new.T, temperature))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        slopes = [torch.autograd.grad(value, image, retain_graph=True)[0] for value in (one, other)]
        torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


def test_distillation_of_unequal_references_is_refused():
    with pytest.raises(ValueError, match="the same images and texts"):
        reference_distillation(unit(6, 5, 0), unit(9, 5, 1), unit(5, 5, 2), unit(9, 5, 1), 1.0)
    with pytest.raises(ValueError, match="one width"):
        reference_distillation(unit(6, 5, 0), unit(9, 4, 1), unit(6, 4, 2), unit(9, 4, 1), 1.0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        reference_distillation(*[unit(6, 5, 0)] * 4, 1.0, temperature=0)


def embeddings(model, processor, images, texts):
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    outputs = model(**inputs)
    return outputs.image_embeds, outputs.text_embeds


def test_zscl_trains_the_weights_of_its_description(make_args, processor, pairs, reference):
    """Six steps written out: InfoNCE, both distillations, the sum of squared distances, the running mean of weights at
    iterations 0, 2, 4; the logit scale is not trained."""
    model = tiny_clip(processor).double()
    with torch.no_grad():
        model.visual_projection.weight.mul_(1.3)
    teacher, student = copy.deepcopy(model).eval(), copy.deepcopy(model)
    student.logit_scale.requires_grad_(False)
    recipe = build_recipe("zscl", images=reference, ensemble_every=2, images_per_step=5)
    trainer = trainer_of(model, make_args(**SGD), processor, pairs, recipe)
    batches = list(trainer.get_train_dataloader())
    trainer.train()

    captions = list(dict.fromkeys(caption for row in reference for caption in row["caption"]))
    start, mean, joined = weights(student), weights(student), 0
    assert len(batches) == 6
    with torch.no_grad():
        teacher_image, teacher_text = embeddings(teacher, processor, list(reference["image"]), captions)
        scale = teacher.logit_scale.exp()
    draw = Draw(12, 5, (trainer.args.seed, 1))
    losses = []
    for iteration, batch in enumerate(batches):
        outputs = student(**{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")})
        logits = student.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.T
        rows = torch.arange(len(logits))
        task = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        drawn = draw(iteration).tolist()
        image, _ = embeddings(student, processor, [reference[place]["image"] for place in drawn], ["a"])
        old, new = scale * teacher_image[drawn] @ teacher_text.T, scale * image @ teacher_text.T
        consolidation = sum((now - start[name]).square().sum() for name, now in student.named_parameters())
        loss = task + distill(old, new) + distill(old.T, new.T) + consolidation
        losses.append(loss.item())
        trained = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
        slopes = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for (name, weight), slope in zip(trained.items(), slopes, strict=True):
                weight -= 0.05 * (slope + 0.1 * weight * decays(trainer, name))
        if iteration % 2 == 0:
            joined += 1
            now = weights(student)
            mean = {name: (mean[name] * joined + now[name]) / (1.0 + joined) for name in mean}
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-5)
    assert largest_difference(weights(model), mean) < 1e-7  # what the teacher says is kept in fp32
    assert largest_difference(weights(model), start) > 1e-3


def decays(trainer, name):
    return name in trainer.get_decay_parameter_names(trainer.model)


def test_zscl_star_is_zscl_without_consolidation(make_args, processor, pairs, reference):
    names = [type(callback).__name__ for callback in build_recipe("zscl", images=reference)]
    star = [type(callback).__name__ for callback in build_recipe("zscl_star", images=reference)]
    assert [name for name in names if name != "L2SP"] == star and "L2SP" in names


class ReferenceAlone(ReferenceDistillation):
    """Without any task: what moves is moved by the distillation."""

    owns_contrastive = True


def test_text_tower_is_distilled_only_on_request(make_args, processor, pairs, reference):
    moved = {}
    for request in (False, True):
        model = tiny_clip(processor)
        start = weights(model)
        other = tiny_clip(processor, seed=1)  # at the start the initial model has nothing to teach
        callback = ReferenceAlone(images=reference, distill_text_tower=request)
        train(other, make_args(max_steps=1, learning_rate=0.0), processor, pairs, [callback])
        train(model, make_args(max_steps=1, **SGD, weight_decay=0.0), processor, pairs, [callback])
        moved[request] = {name for name, now in weights(model).items() if not torch.equal(now, start[name])}
    assert {name for name in moved[False] if name.startswith("text")} == set()
    assert "visual_projection.weight" in moved[False]
    assert {"visual_projection.weight", "text_projection.weight"} <= moved[True]


def test_distilled_text_tower_meets_as_many_texts_as_images(make_args, processor, pairs, reference):
    seen = []

    class Look(ReferenceAlone):
        def loss_terms(self, student, teacher, context):
            seen.append((len(context.extra.image), len(context.extra.text)))
            return super().loss_terms(student, teacher, context)

    train(
        tiny_clip(processor),
        make_args(max_steps=1),
        processor,
        pairs,
        [Look(images=reference, images_per_step=4, distill_text_tower=True)],
    )
    assert seen == [(4, 4)]


# ---- The teacher ----


def tables(callback):
    return {name: table.clone() for name, table in callback.state_dict().items()}


def test_teacher_is_the_initial_model_in_every_phase(model, make_args, processor, pairs, reference):
    callback = ReferenceDistillation(images=reference)
    train(model, make_args(), processor, pairs, [Contrastive(), callback])
    first = tables(callback)
    train(model, make_args(), processor, pairs, [Contrastive(), callback])
    assert largest_difference(tables(callback), first) == 0


def test_teacher_knows_its_references_after_a_restart(model, make_args, processor, pairs, reference, tmp_path):
    callback = ReferenceDistillation(images=reference)
    trainer = train(model, make_args(), processor, pairs, [Contrastive(), callback])
    trainer.save_loss_callbacks(tmp_path / "state.safetensors")
    later = ReferenceDistillation(images=reference)
    trainer = trainer_of(model, make_args(), processor, pairs, [Contrastive(), later])
    trainer.load_loss_callbacks(tmp_path / "state.safetensors")
    trainer.train()
    assert largest_difference(tables(later), tables(callback)) == 0


def test_previous_teacher_is_asked_anew_in_every_phase(model, make_args, processor, pairs, reference):
    callback = ReferenceDistillation(images=reference, teacher="previous")
    seen = []

    class Look(Contrastive):
        def loss_terms(self, *args):
            seen.append(tables(callback))
            return super().loss_terms(*args)

    for _ in range(2):
        train(model, make_args(max_steps=1, warmup_steps=0), processor, pairs, [Look(), callback])
    assert largest_difference(*seen) > 1e-3


def test_teacher_may_be_another_model(model, make_args, processor, pairs, reference, tmp_path):
    other = tiny_clip(processor, seed=3)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    callback = ReferenceDistillation(images=reference, teacher=str(tmp_path / "other"))
    train(model, make_args(max_steps=1), processor, pairs, [Contrastive(), callback])
    with torch.no_grad():
        image, text = embeddings(other.eval(), processor, list(reference["image"]), reference_captions(reference))
    found = tables(callback)
    torch.testing.assert_close(found["image"], image, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["text"], text, rtol=0, atol=1e-6)


def test_teacher_in_a_folder_is_told_by_name_and_weights(reference, tmp_path):
    """In identities and cards, which are published: they name no folder of this machine."""
    for place, seed in (("one", 0), ("two", 0), ("three", 1)):
        tiny_clip(tiny_processor(), seed).save_pretrained(tmp_path / place / "phase-3")
    told = [
        ReferenceDistillation(images=reference, teacher=tmp_path / place / "phase-3").teacher
        for place in ("one", "two", "three")
    ]
    assert told[0] == told[1] != told[2]
    assert all(re.fullmatch(r"phase-3 \([0-9a-f]{16}\)", name) for name in told)


def test_teacher_of_another_width_is_refused_before_it_embeds_anything(
    model, make_args, processor, pairs, reference, tmp_path
):
    other, its_processor = tiny_dual_encoder("chinese_clip")
    other.save_pretrained(tmp_path / "other")
    its_processor.save_pretrained(tmp_path / "other")
    callback = ReferenceDistillation(images=reference, teacher=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="embeds in a width of 8 and the student in one of 16.*distill_text_tower"):
        train(model, make_args(max_steps=1), processor, pairs, [Contrastive(), callback])
    assert callback.state_dict() == {}


def reference_captions(reference):
    return list(dict.fromkeys(caption for row in reference for caption in row["caption"]))


# ---- The data ----


def test_draws_depend_on_seed_and_step_alone():
    draw = Draw(100, 10, (7, 1))
    assert draw(3).tolist() == Draw(100, 10, (7, 1))(3).tolist()
    assert len(set(draw(3).tolist())) == 10
    others = [draw(4), Draw(100, 10, (8, 1))(3), Draw(100, 10, (7, 2))(3)]
    assert all(draw(3).tolist() != other.tolist() for other in others)


def test_reference_smaller_than_a_step_is_seen_whole():
    assert Draw(5, 64, (0, 1))(2).tolist() == [0, 1, 2, 3, 4]


def column_alone(reference, column):
    return reference.select_columns([column])


@pytest.mark.parametrize("kind", ["data set", "folder", "folder of splits", "parquet"])
def test_images_and_texts_come_from_wherever_data_lie(model, make_args, processor, pairs, reference, tmp_path, kind):
    images = column_alone(reference, "image").rename_column("image", "picture")
    texts = Dataset.from_dict({"line": ["a red ring", "one bar in blue", "a red ring"]})
    sources = []
    for name, table in (("images", images), ("texts", texts)):
        place = str(tmp_path / name)
        if kind == "folder":
            table.save_to_disk(place)
        elif kind == "folder of splits":
            DatasetDict({"validation": table}).save_to_disk(place)
        elif kind == "parquet":
            place += ".parquet"
            table.to_parquet(place)
        sources.append(table if kind == "data set" else place)
    split = "validation" if kind == "folder of splits" else "train"
    callback = ReferenceDistillation(
        *sources, image_column="picture", text_column="line", image_split=split, text_split=split
    )
    train(model, make_args(max_steps=2), processor, pairs, [Contrastive(), callback])
    assert [len(table) for table in (callback.state_dict()["image"], callback.state_dict()["text"])] == [12, 2]


def test_paths_become_images(model, make_args, processor, pairs, reference, tmp_path):
    for number, row in enumerate(reference):
        row["image"].save(tmp_path / f"{number}.png")
    table = Dataset.from_dict(
        {"image": [str(tmp_path / f"{number}.png") for number in range(12)], "caption": ["a ring"] * 12}
    )
    callback = ReferenceDistillation(images=table)
    train(model, make_args(max_steps=1), processor, pairs, [Contrastive(), callback])
    assert isinstance(callback._images.features["image"], datasets.Image)


def test_without_a_source_the_base_is_the_reference(model, make_args, processor, pairs, reference):
    given, default = ReferenceDistillation(images=reference), ReferenceDistillation()
    default.start_run(reference)
    for callback in (given, default):
        train(tiny_clip(processor), make_args(max_steps=1), processor, pairs, [Contrastive(), callback])
    assert largest_difference(tables(given), tables(default)) == 0


def test_each_run_takes_the_references_of_its_own_base(make_args, processor, pairs, reference):
    callback = ReferenceDistillation()
    for base in (reference, reference.select(range(5))):
        callback.load_state_dict({})
        callback.start_run(base)
        train(tiny_clip(processor), make_args(max_steps=1), processor, pairs, [Contrastive(), callback])
        assert len(tables(callback)["image"]) == len(base)


def test_references_that_have_left_the_base_take_what_the_teacher_said_along(make_args, processor, pairs, reference):
    before, later = ReferenceDistillation(), ReferenceDistillation()
    before.start_run(reference)
    train(tiny_clip(processor), make_args(max_steps=1), processor, pairs, [Contrastive(), before])
    staying = [row for row in range(12) if row != 3]
    later.start_run(reference.select(staying))
    later.load_state_dict(before.state_dict())
    train(tiny_clip(processor, seed=1), make_args(max_steps=1), processor, pairs, [Contrastive(), later])
    gone = reference[3]["caption"]
    texts = [place for place, text in enumerate(before._texts) if text not in gone]
    for side, rows in (("image", staying), ("text", texts)):
        assert torch.equal(tables(later)[side], tables(before)[side][rows])
    strange = ReferenceDistillation()
    strange.start_run(pairs.select(range(3)))
    strange.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="other pairs than the teacher was asked about"):
        train(tiny_clip(processor), make_args(max_steps=1), processor, pairs, [Contrastive(), strange])


def test_reference_images_are_told_apart_without_reading_those_of_other_sources(reference, tmp_path):
    """Those at an address that is no file are told apart by it; a source that stays as it is may be any size."""
    elsewhere = Dataset.from_dict({"image": [f"https://a.place/{k}.png" for k in range(3)]})
    keys = row_keys(stored_images(reference_images(elsewhere, "image")))
    assert len(keys.unique()) == 3
    own = ReferenceDistillation(images=reference)
    assert own._keys() == {}


@pytest.mark.parametrize("start", [lambda c: c.start_run(None), lambda c: c.start_phase(None)])
def test_no_reference_at_all_is_refused_with_the_remedy(start):
    with pytest.raises(ValueError, match=r'no reference images.*Give images="'):
        start(ReferenceDistillation())


def test_missing_column_names_those_there_are(reference):
    with pytest.raises(ValueError, match="no column 'photo'.*image, caption, pair_id"):
        ReferenceDistillation(images=reference, image_column="photo")


def test_reference_without_texts_is_refused(reference):
    with pytest.raises(ValueError, match="holds no texts"):
        ReferenceDistillation(images=reference, texts=Dataset.from_dict({"caption": [" ", ""]}))


def test_other_reference_data_make_another_run(reference):
    one, same, other = (
        ReferenceDistillation(images=data) for data in (reference, reference, reference.select(range(5)))
    )
    assert one.image_source == same.image_source != other.image_source
    assert ReferenceDistillation().image_source == "base"


@pytest.mark.parametrize(
    "options", [{"images_per_step": 0}, {"texts_per_step": 0}, {"temperature": 0}, {"weight": -1.0}]
)
def test_value_out_of_its_range_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ReferenceDistillation(**options)


# ---- Exactness ----


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_phase_ends_with_the_same_weights(model, make_args, processor, pairs, reference, workers):
    start = copy.deepcopy(model)
    args = make_args(save_strategy="steps", save_steps=4, max_steps=7, dataloader_num_workers=workers)

    def recipe():
        return build_recipe("zscl", images=reference, images_per_step=5, ensemble_every=2)

    train(model, args, processor, pairs, recipe())
    resumed = train(start, args, processor, pairs, recipe(), resume=f"{args.output_dir}/checkpoint-4")
    assert largest_difference(weights(resumed.model), weights(model)) == 0


def test_accumulated_batches_see_the_references_of_their_step(make_args, processor, pairs, reference):
    seen = []

    class Look(ReferenceDistillation):
        def loss_terms(self, student, teacher, context):
            seen.append(context.extra.image.detach())
            return super().loss_terms(student, teacher, context)

    args = make_args(max_steps=1, gradient_accumulation_steps=2)
    train(tiny_clip(processor), args, processor, pairs, [Contrastive(), Look(images=reference, images_per_step=5)])
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-6)


def run_on_processes(folder, batch_size, chunk, images_per_step, distill_text_tower):
    processor = tiny_processor()
    model = tiny_clip(processor).double()
    args = ModXTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_cache_chunk_size=chunk,
        max_steps=5,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    recipe = build_recipe(
        "zscl",
        images=tiny_pairs(11, style="yellow", start=30),
        images_per_step=images_per_step,
        ensemble_every=2,
        distill_text_tower=distill_text_tower,
    )
    trainer = train(model, args, processor, tiny_pairs(48), recipe)
    tensors = {**weights(model), **{f"teacher.{name}": table for name, table in tables(recipe[1]).items()}}
    save_file(tensors, f"{folder}/rank-{trainer.args.process_index}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk", "images_per_step", "distill_text_tower"),
    [(None, 5, False), (2, 5, False), (None, 1, False), (2, 3, True)],
)
def test_two_processes_train_the_weights_of_one(tmp_path, chunk, images_per_step, distill_text_tower):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        own_chunk = chunk if number == 2 else None
        launch(number, run_on_processes, folder, 8 // number, own_chunk, images_per_step, distill_text_tower)
    one, first, second = (
        load_file(tmp_path / f"{place}.safetensors") for place in ("1/rank-0", "2/rank-0", "2/rank-1")
    )
    assert largest_difference(first, second) == 0
    assert largest_difference(one, first) < 1e-9


# ---- Classes ----


def labelled(rows=32):
    """Pictures by their shapes: four classes."""
    data = tiny_pairs(rows)
    names = ["circle", "square", "triangle", "cross"]
    labels = [names.index(captions[0].split()[-1]) for captions in data["caption"]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return Dataset.from_dict({"image": list(data["image"]), "label": labels}, features=features)


TEMPLATES = ("a {}", "one {}")


def test_labels_become_captions_and_ids():
    data = class_pairs(labelled(), "label", TEMPLATES)
    assert data[9]["caption"] == ["a square", "one square"] and data[9]["pair_id"] == 1
    assert data.column_names == ["image", "label", "caption", "pair_id"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "class"}, "no column 'class'"),
        ({"label_column": "label", "templates": ["a photo"]}, "needs a place"),
        ({"label_column": "number"}, "class_names"),
        ({"label_column": "name", "class_names": ["a", "b"]}, r"'name' does not hold numbers.*class_encode_column"),
    ],
)
def test_labels_that_cannot_become_captions_are_refused(options, message):
    data = labelled().add_column("number", list(range(32))).add_column("name", ["a", "b"] * 16)
    with pytest.raises(ValueError, match=message):
        class_pairs(data, **options)


@pytest.mark.parametrize("label", [-1, None, 4])
def test_rows_of_no_class_are_refused_with_their_number(label):
    data = labelled(8).remove_columns("label").add_column("label", [0, 1, label, 3, label, 0, 1, 2])
    with pytest.raises(ValueError, match=r"'label' holds no class in 2 of 8 rows \(first in row 2\)"):
        class_pairs(data, "label", TEMPLATES, class_names=["circle", "square", "triangle", "cross"])


def test_classification_is_the_cross_entropy_over_all_classes_of_the_phase(model, make_args, processor):
    data = class_pairs(labelled(), "label", TEMPLATES)
    before = copy.deepcopy(model).eval()
    callback = Classification(label_smoothing=0.2)
    trainer = train(model, make_args(max_steps=1), processor, data, [callback])
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        texts = [f"a {name}" for name in ("circle", "square", "triangle", "cross")]
        _, prompts = embeddings(before, processor, [data[0]["image"]], texts)
        image = before(**{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}).image_embeds
        logits = before.logit_scale.exp() * image @ prompts.T
    smooth = torch.full((8, 4), 0.05) + 0.8 * F.one_hot(batch["pair_id"], 4)
    expected = -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert logged(trainer, "classification")[0] == pytest.approx(expected.item(), rel=1e-5)


def test_classes_are_learned(model, make_args, processor):
    data = class_pairs(labelled(), "label", TEMPLATES)
    args = make_args(max_steps=60, learning_rate=3e-3)
    trainer = train(model, args, processor, data, [Classification(label_smoothing=0.0)])
    found = logged(trainer, "classification")
    assert found[-1] < 0.5 * found[0]


def test_zscl_learns_classes_when_asked(model, make_args, processor, reference):
    data = class_pairs(labelled(), "label", TEMPLATES)
    recipe = build_recipe("zscl", classes=True, label_smoothing=0.1, images=reference)
    trainer = train(model, make_args(max_steps=2), processor, data, recipe)
    assert {"classification", "reference_images", "reference_texts", "l2sp"} <= set(trainer.state.log_history[0])
    assert "contrastive" not in trainer.state.log_history[0]


def test_classes_with_replay_are_refused_before_anything_is_trained(reference):
    with pytest.raises(ValueError, match="Classification knows the classes of one phase, and ExperienceReplay brings"):
        build_recipe("zscl+er", zscl={"classes": True, "images": reference})


@pytest.mark.parametrize("rows", [32, 8])
def test_phase_without_classes_is_refused(model, make_args, processor, rows):
    data = class_pairs(labelled(), "label", TEMPLATES).select(range(rows))
    data = data.remove_columns("pair_id") if rows == 32 else data
    with pytest.raises(ValueError, match="class_pairs" if rows == 32 else "at least two classes"):
        train(model, make_args(max_steps=1), processor, data, [Classification()])


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["pair_id"], r"'two' has no column 'pair_id' \(pair_id_column\), .* Classification learns.*class_pairs"),
        ([], "'two' has one class alone in column 'pair_id', and Classification needs at least two"),
    ],
)
def test_later_phase_without_classes_is_refused_before_the_first_is_trained(
    model, make_args, processor, without, message
):
    data = class_pairs(labelled(), "label", TEMPLATES)
    later = data.select(range(8)).remove_columns(without)
    stream = PhaseStream((Phase("one", data.select(range(8, 32))), Phase("two", later)))
    with pytest.raises(ValueError, match=message):
        ContinualRun(stream, [Classification()], make_args(), model=model, processing_class=processor)


def classes_on_processes(folder, batch_size):
    processor = tiny_processor()
    model = tiny_clip(processor).double()
    args = ModXTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=4,
        adam_epsilon=1e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = class_pairs(labelled(), "label", TEMPLATES)
    trainer = train(model, args, processor, data, [Classification()])
    save_file(weights(model), f"{folder}/rank-{trainer.args.process_index}.safetensors")


@pytest.mark.slow
def test_two_processes_learn_classes_as_one_does(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        launch(number, classes_on_processes, tmp_path / str(number), 8 // number)
    one, two = (load_file(tmp_path / str(number) / "rank-0.safetensors") for number in (1, 2))
    assert largest_difference(one, two) < 1e-9
