"""One phase of training."""

import copy
import gc
import hashlib
import inspect
import logging
import re
import warnings
import weakref

import peft
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, CLIPModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_modx import Contrastive, LossCallback, ModX, ModXTrainer
from hf_modx.callbacks import FixedLogitScale, WeightEnsemble
from hf_modx.losses import info_nce, modx_loss
from hf_modx.teacher import AdapterOffTeacher, Teacher
from hf_modx.teacher.cache import CachedTeacher

from tiny import tiny_clip


def train(model, args, processor, data, loss_callbacks="modx", **options):
    trainer = ModXTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=processor,
        loss_callbacks=loss_callbacks,
        **options,
    )
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def largest_difference(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_parameters_are_those_of_the_stock_trainer_and_two_more():
    stock = list(inspect.signature(Trainer.__init__).parameters)
    assert list(inspect.signature(ModXTrainer.__init__).parameters) == [*stock, "loss_callbacks", "teacher"]


def test_training_lowers_the_contrastive_loss(model, make_args, processor, pairs):
    trainer = train(model, make_args(max_steps=40, learning_rate=3e-3), processor, pairs, "finetune")
    losses = logged(trainer, "contrastive")
    assert losses[-1] < losses[0] - 0.3


def test_logged_terms_add_up_to_the_loss(model, make_args, processor, pairs):
    trainer = train(model, make_args(), processor, pairs)
    for entry in trainer.state.log_history[:-1]:
        assert entry["loss"] == pytest.approx(entry["contrastive"] + entry["modx_distillation"], abs=1e-4)


def test_kept_row_fractions_and_logit_scale_are_logged(model, make_args, processor, pairs):
    trainer = train(model, make_args(), processor, pairs)
    assert all(0 <= value <= 1 for value in logged(trainer, "image_rows_kept") + logged(trainer, "text_rows_kept"))
    assert len(logged(trainer, "image_rows_kept")) == 6
    assert logged(trainer, "logit_scale")[0] == pytest.approx(1 / 0.07, rel=0.05)


def test_first_loss_is_the_mod_x_loss_of_the_batch(model, make_args, processor, pairs):
    before = copy.deepcopy(model).eval()
    trainer = ModXTrainer(model=model, args=make_args(max_steps=1), train_dataset=pairs, processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    outputs = before(**{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")})
    embeds = (outputs.image_embeds, outputs.text_embeds)
    expected = modx_loss(*embeds, *embeds, before.logit_scale.exp(), pair_ids=batch["pair_id"])
    assert logged(trainer, "loss")[0] == pytest.approx(expected.loss.item(), rel=1e-5)


def test_teacher_is_the_model_as_it_was_handed_over(model, make_args, processor, pairs):
    before = copy.deepcopy(model)
    trainer = train(model, make_args(), processor, pairs)
    assert largest_difference(trainer.teacher.model, before) == 0
    assert largest_difference(model, before) > 0


def test_teacher_is_a_copy_in_memory_even_of_weights_that_no_file_holds(model, make_args, processor, pairs):
    with torch.no_grad():
        model.visual_projection.weight.mul_(1.5)
    model.config._name_or_path = "somebody/else"
    trainer = train(model, make_args(max_steps=1), processor, pairs)
    assert trainer.teacher.model.visual_projection.weight.abs().sum() > 0
    assert largest_difference(trainer.teacher.model, model) < 0.1


def test_teacher_has_no_gradient_and_is_in_eval_mode_while_the_student_trains(model, make_args, processor, pairs):
    modes = []

    class Watch(LossCallback):
        def loss_terms(self, student, teacher, context):
            modes.append((context.model.training, trainer.teacher.model.training, teacher.image.requires_grad))
            return {}

    trainer = ModXTrainer(
        model=model,
        args=make_args(max_steps=2),
        train_dataset=pairs,
        processing_class=processor,
        loss_callbacks=[ModX(), Watch()],
    )
    trainer.train()
    assert modes == [(True, False, False)] * 2
    assert not any(parameter.requires_grad for parameter in trainer.teacher.model.parameters())


def test_given_teacher_is_used_and_left_untouched(model, make_args, processor, pairs):
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.text_projection.weight.neg_()
    trainer = train(model, make_args(max_steps=1), processor, pairs, teacher=teacher)
    assert torch.equal(trainer.teacher.model.text_projection.weight, teacher.text_projection.weight)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_cached_teacher_gives_the_weights_of_a_live_one(model, make_args, processor, pairs, mode):
    live = copy.deepcopy(model)
    train(live, make_args(optim="sgd", learning_rate=0.05, teacher_cache="off"), processor, pairs)
    trainer = train(model, make_args(optim="sgd", learning_rate=0.05, teacher_cache=mode), processor, pairs)
    assert isinstance(trainer.teacher, CachedTeacher)
    assert largest_difference(model, live) < 1e-5


def test_cached_teacher_has_left_memory(model, make_args, processor, pairs):
    trainer = ModXTrainer(
        model=model, args=make_args(teacher_cache="memory"), train_dataset=pairs, processing_class=processor
    )
    copy_of_model = weakref.ref(trainer.teacher.model)
    trainer.train()
    gc.collect()
    assert copy_of_model() is None


def test_teacher_is_cached_by_itself_where_pairs_are_seen_often(model, make_args, processor, pairs):
    assert isinstance(train(model, make_args(max_steps=40), processor, pairs).teacher, CachedTeacher)


def test_teacher_is_not_cached_by_itself_where_images_are_augmented(model, make_args, processor, pairs):
    args = make_args(max_steps=40, image_augmentation="affine_color")
    assert isinstance(train(model, args, processor, pairs).teacher, Teacher)


def test_cache_of_augmented_images_is_refused(make_args):
    with pytest.raises(ValueError, match="teacher_cache='disk' needs images that are the same every time"):
        make_args(teacher_cache="disk", image_augmentation="affine_color")


def test_student_with_an_adapter_needs_no_copy(model, make_args, processor, pairs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        trainer = train(adapted, make_args(teacher_cache="off"), processor, pairs)
    assert isinstance(trainer.teacher, AdapterOffTeacher)
    assert all(0 <= value <= 1 for value in logged(trainer, "image_rows_kept"))


def test_finetuning_makes_no_teacher(model, make_args, processor, pairs):
    assert train(model, make_args(max_steps=1), processor, pairs, "finetune").teacher is None


def test_teacher_is_in_no_checkpoint_and_no_optimizer(model, make_args, processor, pairs):
    trainer = train(model, make_args(save_strategy="steps", save_steps=6), processor, pairs)
    saved = CLIPModel.from_pretrained(get_last_checkpoint(trainer.args.output_dir))
    assert largest_difference(saved, model) == 0
    optimized = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert optimized == sum(parameter.numel() for parameter in model.parameters())


def test_callback_added_later_counts(model, make_args, processor, pairs):
    trainer = ModXTrainer(
        model=model, args=make_args(max_steps=1), train_dataset=pairs, processing_class=processor, loss_callbacks=[]
    )
    trainer.add_callback(ModX())
    trainer.train()
    assert "modx_distillation" in trainer.state.log_history[0]


def test_callbacks_compose(model, make_args, processor, pairs):
    class Pull(LossCallback):
        def loss_terms(self, student, teacher, context):
            return {"pull": 0.1 * student.image.square().sum()}

    trainer = train(model, make_args(), processor, pairs, [Contrastive(), ModX(contrastive=False, alpha=2.0), Pull()])
    assert {"contrastive", "modx_distillation", "pull"} <= set(trainer.state.log_history[0])
    assert logged(trainer, "pull")[0] == pytest.approx(0.8, rel=1e-4)


@pytest.mark.parametrize("callbacks", [[], [ModX(contrastive=False)], [ModX(), Contrastive()]])
def test_recipe_without_exactly_one_contrastive_term_is_refused(model, make_args, processor, pairs, callbacks):
    with pytest.raises(ValueError, match="contrastive term"):
        train(model, make_args(), processor, pairs, callbacks)


@pytest.mark.parametrize("name", ["loss", "logit_scale"])
def test_terms_with_the_name_of_what_is_logged_anyway_are_refused(model, make_args, processor, pairs, name):
    class Other(LossCallback):
        def loss_terms(self, student, teacher, context):
            return {name: student.image.sum()}

    with pytest.raises(ValueError, match=f"logged as {name}: rename"):
        train(model, make_args(max_steps=1), processor, pairs, [Contrastive(), Other()])


def test_two_terms_of_one_name_are_refused(model, make_args, processor, pairs):
    class Same(LossCallback):
        def loss_terms(self, student, teacher, context):
            return {"contrastive": student.image.sum()}

    with pytest.raises(ValueError, match="name a term 'contrastive'"):
        train(model, make_args(), processor, pairs, [Contrastive(), Same()])


def test_context_holds_what_a_callback_may_know(model, make_args, processor, pairs):
    seen = []

    class Watch(LossCallback):
        needs_phase_start = True

        def loss_terms(self, student, teacher, context):
            drift = sum((p - context.phase_start[n]).abs().sum() for n, p in context.model.named_parameters())
            seen.append((context.step, context.row_ids.tolist(), context.pair_ids.tolist(), drift.item()))
            with pytest.raises(AttributeError):
                context.step = 7
            return {}

    train(model, make_args(max_steps=3, warmup_steps=0), processor, pairs, [Contrastive(), Watch()])
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert all(pair_ids == [pairs[row]["pair_id"] for row in rows] for _, rows, pair_ids, _ in seen)
    assert seen[0][3] == 0 and seen[1][3] > 0


def test_state_of_loss_callbacks_survives_with_the_checkpoint(model, make_args, processor, pairs):
    class Counter(LossCallback):
        def __init__(self):
            self.count = torch.zeros(1)

        def on_step_end(self, args, state, control, **kwargs):
            self.count = self.count + 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    args = make_args(save_strategy="steps", save_steps=4)
    train(copy.deepcopy(model), args, processor, pairs, [Contrastive(), Counter()])
    counter = Counter()
    trainer = ModXTrainer(
        model=model,
        args=args,
        train_dataset=pairs,
        processing_class=processor,
        loss_callbacks=[Contrastive(), counter],
    )
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-4")
    assert counter.count.item() == 6


def test_resumed_training_ends_with_the_same_weights(model, make_args, processor, pairs):
    start = copy.deepcopy(model)
    args = make_args(max_steps=14, save_strategy="steps", save_steps=8, image_augmentation="affine_color")
    train(model, args, processor, pairs)
    resumed = ModXTrainer(model=start, args=args, train_dataset=pairs, processing_class=processor)
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-8")
    assert largest_difference(resumed.model, model) == 0


def test_workers_do_not_change_the_weights(model, make_args, processor, pairs):
    other = copy.deepcopy(model)
    settings = {"image_augmentation": "affine_color", "max_steps": 8}
    train(model, make_args(**settings), processor, pairs)
    train(
        other,
        make_args(**settings, dataloader_num_workers=2, dataloader_persistent_workers=True),
        processor,
        pairs,
    )
    assert largest_difference(model, other) == 0


def test_logit_scale_is_clamped_after_every_step(model, make_args, processor, pairs):
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
    trainer = train(model, make_args(max_steps=1), processor, pairs, "finetune")
    assert trainer.model.logit_scale.item() == pytest.approx(4.60517, abs=1e-5)


@pytest.mark.parametrize(("decay", "expected"), [(False, 0.0), (True, 0.1)])
def test_weight_decay_of_the_logit_scale_is_an_option(model, make_args, processor, pairs, decay, expected):
    trainer = train(model, make_args(max_steps=1, decay_logit_scale=decay), processor, pairs)
    decays = [g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"] if p is model.logit_scale]
    assert decays == [expected]


def test_text_learning_rate_concerns_the_text_tower_alone(model, make_args, processor, pairs):
    trainer = train(model, make_args(max_steps=1, text_learning_rate=5e-2), processor, pairs)
    rates = {id(p): g["initial_lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (5e-2 if name.startswith("text_") else 1e-3), name


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_frozen_tower_does_not_move(model, make_args, processor, pairs, tower):
    before = copy.deepcopy(model)
    train(model, make_args(**{f"freeze_{tower}_model": True}), processor, pairs)
    other = "text" if tower == "vision" else "vision"
    assert largest_difference(getattr(model, f"{tower}_model"), getattr(before, f"{tower}_model")) == 0
    assert largest_difference(getattr(model, f"{other}_model"), getattr(before, f"{other}_model")) > 0


def test_frozen_tower_stays_frozen_with_model_init(make_args, processor, pairs):
    trainer = ModXTrainer(
        model_init=lambda: tiny_clip(processor),
        args=make_args(freeze_vision_model=True),
        train_dataset=pairs,
        processing_class=processor,
    )
    trainer.train()
    assert largest_difference(trainer.model.vision_model, tiny_clip(processor).vision_model) == 0


def test_phase_starts_anew_with_each_model_of_model_init(make_args, processor, pairs):
    trainer = ModXTrainer(
        model_init=lambda: tiny_clip(processor),
        args=make_args(max_steps=1),
        train_dataset=pairs,
        processing_class=processor,
        loss_callbacks=[Contrastive(), FixedLogitScale(), WeightEnsemble(every=1)],
    )
    for _ in range(2):  # as a search for hyper-parameters does
        trainer.train()
        assert torch.equal(trainer.model.logit_scale, tiny_clip(processor).logit_scale)


def test_both_towers_may_be_frozen(model, make_args, processor, pairs):
    before = copy.deepcopy(model)
    train(model, make_args(freeze_vision_model=True, freeze_text_model=True), processor, pairs)
    assert largest_difference(model.visual_projection, before.visual_projection) > 0


def test_captions_are_cut_to_what_the_model_can_take(make_args, processor, pairs):
    short = CLIPModel(
        tiny_clip(processor).config.__class__.from_dict(
            {
                **tiny_clip(processor).config.to_dict(),
                "text_config": {**tiny_clip(processor).config.text_config.to_dict(), "max_position_embeddings": 8},
            }
        )
    )
    assert train(short, make_args(), processor, pairs).state.global_step == 6


def test_missing_caption_is_named_with_its_row(model, make_args, processor, pairs):
    data = pairs.select(range(8)).map(lambda row, i: {"caption": [] if i == 3 else row["caption"]}, with_indices=True)
    with pytest.raises(ValueError, match=r"Rows \[3\] have no caption"):
        train(model, make_args(), processor, data)


def test_formatted_data_train_too(model, make_args, processor, pairs):
    assert train(model, make_args(), processor, pairs.with_format("torch")).state.global_step == 6


def test_labels_column_changes_nothing(model, make_args, processor, pairs):
    other = copy.deepcopy(model)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3}
    train(model, make_args(**settings), processor, pairs)
    train(other, make_args(**settings), processor, pairs.add_column("labels", [1] * len(pairs)))
    assert largest_difference(model, other) == 0


def test_accumulated_batches_average_their_losses(model, make_args, processor, pairs):
    args = make_args(max_steps=1, gradient_accumulation_steps=3)
    trainer = train(model, args, processor, pairs)
    assert logged(trainer, "loss")[0] == pytest.approx(logged(trainer, "contrastive")[0], abs=2)


def test_phase_smaller_than_a_batch_trains_on_what_there_is(model, make_args, processor, pairs):
    trainer = train(model, make_args(per_device_train_batch_size=64, max_steps=2), processor, pairs)
    assert trainer.state.global_step == 2


def test_evaluation_gives_recall_and_loss(model, make_args, processor, pairs):
    trainer = ModXTrainer(
        model=model,
        args=make_args(),
        eval_dataset=pairs,
        processing_class=processor,
        compute_metrics=lambda prediction: {"width": prediction.predictions[0].shape[1]},
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        outputs = model.eval()(
            **processor(
                images=[row["image"] for row in pairs],
                text=[row["caption"][0] for row in pairs],
                return_tensors="pt",
                padding=True,
            )
        )
    expected = info_nce(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= metrics["eval_image_to_text_recall@1"] <= metrics["eval_image_to_text_recall@10"] <= 1
    assert metrics["eval_width"] == 16


def test_several_evaluation_sets_keep_their_names(model, make_args, processor, pairs):
    sets = {"old": pairs.select(range(10)), "new": pairs.select(range(10, 20))}
    trainer = ModXTrainer(model=model, args=make_args(), eval_dataset=sets, processing_class=processor)
    metrics = trainer.evaluate()
    assert {"eval_old_image_to_text_recall@1", "eval_new_text_to_image_recall@5"} <= set(metrics)


def test_best_model_is_found_by_recall(model, make_args, processor, pairs):
    args = make_args(
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="image_to_text_recall@1",
    )
    trainer = train(model, args, processor, pairs, "finetune", eval_dataset=pairs.select(range(12)))
    assert trainer.state.best_metric is not None


def test_evaluation_leaves_the_mode_of_the_model(model, make_args, processor, pairs):
    trainer = ModXTrainer(model=model.train(), args=make_args(), eval_dataset=pairs, processing_class=processor)
    trainer.evaluate()
    assert model.training


def test_predict_returns_the_embeddings_of_every_row_in_order(model, make_args, processor, pairs):
    args = make_args(image_augmentation="affine_color", per_device_eval_batch_size=5)
    trainer = ModXTrainer(model=model, args=args, processing_class=processor)
    images, texts = trainer.predict(pairs).predictions
    assert images.shape == (48, 16) and texts.shape == (96, 16)
    single, _ = trainer.predict(pairs.select([7])).predictions
    assert abs(images[7] - single[0]).max() < 1e-5


def test_bf16_trains(model, make_args, processor, pairs):
    trainer = train(model, make_args(bf16=True), processor, pairs)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_few_kept_rows_are_warned_about_once(model, make_args, processor, pairs, caplog):
    class Wrong(ModX):
        def loss_terms(self, student, teacher, context):
            swapped = type(teacher)(teacher.image, -teacher.image, teacher.logit_scale)
            return super().loss_terms(student, swapped, context)

    with caplog.at_level(logging.WARNING, logger="hf_modx"):
        train(model, make_args(), processor, pairs, [Wrong()])
    assert sum("Replay some old pairs" in record.message for record in caplog.records) == 1


def test_model_that_is_no_dual_encoder_is_refused(make_args, processor, pairs):
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(TypeError, match="BertModel is no dual encoder"):
        ModXTrainer(model=bert, args=make_args(), train_dataset=pairs, processing_class=processor)


def test_missing_column_names_those_there_are(model, make_args, processor, pairs):
    with pytest.raises(ValueError, match=r"no column 'text' \(caption_column\).*image, caption, pair_id"):
        train(model, make_args(caption_column="text"), processor, pairs)


def test_column_of_a_wrong_type_is_refused(model, make_args, processor, pairs):
    with pytest.raises(TypeError, match="not images"):
        train(model, make_args(image_column="caption"), processor, pairs)


def test_streamed_data_are_refused_with_the_remedy(model, make_args, processor, pairs):
    with pytest.raises(TypeError, match=r"load_dataset\(\.\.\., split='train'\)"):
        train(model, make_args(), processor, pairs.to_iterable_dataset())


def test_batch_of_one_pair_is_refused(model, make_args, processor, pairs):
    with pytest.raises(ValueError, match="no negatives"):
        train(model, make_args(per_device_train_batch_size=1), processor, pairs)


def test_single_row_is_refused(model, make_args, processor, pairs):
    with pytest.raises(ValueError, match="no negatives"):
        train(model, make_args(), processor, pairs.select([0]))


@pytest.mark.parametrize("name", ["compute_loss_func", "preprocess_logits_for_metrics"])
def test_parameters_without_a_meaning_here_are_refused(model, make_args, processor, pairs, name):
    with pytest.raises(ValueError, match=name):
        ModXTrainer(
            model=model, args=make_args(), train_dataset=pairs, processing_class=processor, **{name: lambda *a: None}
        )


def test_missing_processor_is_refused(model, make_args, pairs):
    with pytest.raises(ValueError, match="processing_class"):
        ModXTrainer(model=model, args=make_args(), train_dataset=pairs)


def test_one_string_a_row_is_a_caption_too(model, make_args, processor, pairs):
    single = Dataset.from_dict({"image": pairs["image"], "caption": [c[0] for c in pairs["caption"]]})
    single = single.cast_column("image", pairs.features["image"])
    assert train(model, make_args(), processor, single).state.global_step == 6


@pytest.mark.parametrize("ids", [["sku"] * 48, [None, *range(47)]])
def test_pair_ids_must_be_whole_numbers(model, make_args, processor, pairs, ids):
    data = pairs.remove_columns("pair_id").add_column("pair_id", ids)
    with pytest.raises(TypeError, match="the same in all parts .* as int") as error:
        train(model, make_args(), processor, data)
    (remedy,) = re.findall(r" as (int\(.*, 16\)),", str(error.value))
    numbers = [eval(remedy, {"hashlib": hashlib, "id": one}) for one in ("A17", "B3", "A17")]
    assert numbers[0] == numbers[2] != numbers[1] and min(numbers) >= 0 and max(numbers) < 2**63


@pytest.mark.slow
def test_compiled_model_trains_the_same_weights(model, make_args, processor, pairs):
    changes = {"optim": "sgd", "learning_rate": 0.05, "teacher_cache": "off"}
    plain = copy.deepcopy(model)
    train(plain, make_args(**changes), processor, pairs)
    train(model, make_args(**changes, torch_compile=True, torch_compile_backend="aot_eager"), processor, pairs)
    assert largest_difference(model, plain) < 1e-5


def test_several_gpus_in_one_process_are_refused(model, make_args, processor, pairs):
    args = make_args()
    args._n_gpu = 2
    with pytest.raises(ValueError, match="Start one process for each GPU"):
        ModXTrainer(model=model, args=args, train_dataset=pairs, processing_class=processor)


class OwnCollator:
    """A user's, in the manner of the example scripts: with a flag for the model's own loss."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, items):
        captions = [item["caption"][0] for item in items]
        batch = self.processor(
            text=captions, images=[item["image"] for item in items], padding=True, return_tensors="pt"
        )
        return {**batch, "return_loss": True}


@pytest.mark.parametrize("chunk", [None, 3])
def test_collator_with_a_flag_for_the_models_own_loss(model, make_args, processor, pairs, chunk):
    args = make_args(max_steps=2, gradient_cache_chunk_size=chunk)
    trainer = train(model, args, processor, pairs, data_collator=OwnCollator(processor))
    assert len(logged(trainer, "modx_distillation")) == 2


def test_masking_of_duplicates_needs_ids_of_an_own_collator(model, make_args, processor, pairs):
    with pytest.raises(ValueError, match="mask_duplicates needs a caption_id"):
        train(model, make_args(mask_duplicates=True), processor, pairs, data_collator=OwnCollator(processor))


def test_equal_captions_of_different_ids_are_no_negatives_when_asked(model, make_args, processor, pairs):
    same = pairs.map(lambda row: {"caption": ["a red bar"]})

    def loss(masked):
        args = make_args(max_steps=1, mask_duplicates=masked, same_pair_id="neutral")
        return logged(train(copy.deepcopy(model), args, processor, same, "finetune"), "contrastive")[0]

    assert loss(masked=True) == pytest.approx(0, abs=1e-5)
    assert loss(masked=False) > 1


def test_data_set_cannot_be_swapped_under_a_cached_teacher(model, make_args, processor, pairs):
    trainer = train(model, make_args(teacher_cache="memory", max_steps=2), processor, pairs)
    trainer.train()
    trainer.train_dataset = pairs.select(range(20))
    with pytest.raises(ValueError, match="train_dataset is another one"):
        trainer.train()


def test_transform_of_the_data_set_is_refused_as_it_would_be_lost(model, make_args, processor, pairs):
    with pytest.raises(ValueError, match="has a transform"):
        train(model, make_args(), processor, pairs.with_transform(lambda rows: rows))


def test_term_that_is_no_scalar_is_named(model, make_args, processor, pairs):
    class Wrong(LossCallback):
        def loss_terms(self, student, teacher, context):
            return {"wrong": 1.0}

    with pytest.raises(TypeError, match="Wrong gives 'wrong'"):
        train(model, make_args(), processor, pairs, [Contrastive(), Wrong()])


def test_batches_that_shrink_where_memory_is_short_are_refused(make_args):
    with pytest.raises(ValueError, match="auto_find_batch_size .* gradient_cache_chunk_size"):
        make_args(auto_find_batch_size=True)


def test_another_order_of_the_rows_is_refused(make_args):
    with pytest.raises(ValueError, match="train_sampling_strategy='sequential' has no effect"):
        make_args(train_sampling_strategy="sequential")


def test_label_smoothing_of_transformers_is_refused(make_args):
    with pytest.raises(ValueError, match="label_smoothing_factor has no effect"):
        make_args(label_smoothing_factor=0.1)


def test_learning_rate_of_the_text_tower_beside_a_ready_optimizer_is_refused(model, make_args, processor, pairs):
    optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-3), None)
    with pytest.raises(ValueError, match="Leave out text_learning_rate"):
        train(model, make_args(text_learning_rate=1e-4), processor, pairs, optimizers=optimizers)


def test_optimizer_that_steps_in_the_backward_pass_is_refused_with_the_cache(model, make_args, processor, pairs):
    args = make_args(gradient_cache_chunk_size=4, optim="galore_adamw_layerwise", optim_target_modules=["q_proj"])
    with pytest.raises(ValueError, match="steps in the backward pass"):
        ModXTrainer(model=model, args=args, train_dataset=pairs, processing_class=processor)
