"""Every dual encoder of transformers: embeddings, loss, whole runs, files. CLIP itself is in all other tests."""

import ast
import json

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, RobertaConfig

from hf_modx import ContinualRun, Contrastive, ModX, ModXTrainer, ModXTrainingArguments, Phase, PhaseStream
from hf_modx.callbacks.contrastive import contrastive_loss
from hf_modx.data import PairCollator, PairDataset
from hf_modx.data.image_cache import cache_resized_images
from hf_modx.embeddings import (
    embed_images,
    embed_pairs,
    embed_texts,
    embedding_width,
    given_token_embeds,
    image_inputs,
    pair_embeddings,
    text_inputs,
    token_table,
)
from hf_modx.gradcache import GradientCache
from hf_modx.pseudo_texts import Inversion, PseudoTextSearch
from hf_modx.recipes import recipe_arguments
from hf_modx.teacher import AdapterOffTeacher, teacher_of

from launch import launch
from test_continual import StopAt
from tiny import ARCHITECTURES, CONTEXT, SIZE, TOWER, tiny_dual_encoder, tiny_pairs

SIGMOID = ["siglip", "siglip2"]
PAIRS = ("image", "caption", "pair_id")


@pytest.fixture(params=list(ARCHITECTURES))
def name(request):
    return request.param


def batch_of(model, processor, rows=6):
    """Pictures of two shapes, which SigLIP 2 cuts into different grids of patches."""
    items = PairDataset(tiny_pairs(rows), *PAIRS).__getitems__(list(range(rows)))
    for item in items[::2]:
        item["image"] = item["image"].crop((0, 0, SIZE, SIZE // 2))
    return PairCollator.for_model(model, processor)(items)


def in_double(batch):
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def arguments(folder, **changes):
    settings = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "save_strategy": "no"}
    settings |= {"warmup_steps": 0}  # or the first step, after which runs are interrupted, would change nothing
    settings |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return ModXTrainingArguments(output_dir=str(folder), **{**settings, **changes})


# ---- Embeddings ----


def test_embeddings_and_scales_are_those_of_the_models_own_forward_pass(name):
    model, processor = tiny_dual_encoder(name)
    model.eval()
    batch = batch_of(model, processor)
    own = model(**image_inputs(batch), **text_inputs(batch))
    found = embed_pairs(model, model, batch)
    assert torch.equal(found.image, own.image_embeds) and torch.equal(found.text, own.text_embeds)
    assert found.image.shape == (6, embedding_width(model))
    logits = found.logit_scale * found.image @ found.text.T
    logits = logits if found.logit_bias is None else logits + found.logit_bias
    torch.testing.assert_close(logits, own.logits_per_image)
    torch.testing.assert_close(embed_images(model, **image_inputs(batch)), own.image_embeds)
    torch.testing.assert_close(embed_texts(model, **text_inputs(batch)), own.text_embeds)


def test_inputs_are_those_of_the_models_own_processor(name):
    model, processor = tiny_dual_encoder(name)
    captions, images = ["a red ring", "one bar in blue"], [row["image"] for row in tiny_pairs(2)]
    padding = {"padding": "max_length", "max_length": CONTEXT} if name in SIGMOID else {"padding": True}
    sizes = {"max_num_patches": 14, "patch_size": 8} if name == "siglip2" else {}
    expected = processor(text=captions, images=images, return_tensors="pt", **padding, **sizes)
    collator = PairCollator.for_model(model, processor)
    found = {**collator.pixels(images), **collator.tokens(captions)}
    assert set(expected) - set(found) <= {"token_type_ids"}  # zeros, as the models fill in
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


def test_caption_longer_than_the_context_is_cut(name):
    model, processor = tiny_dual_encoder(name)
    tokens = PairCollator.for_model(model, processor).tokens(["one red circle in blue " * CONTEXT])
    assert tokens["input_ids"].shape == (1, CONTEXT)
    assert embed_texts(model, **tokens).isfinite().all()


def test_longest_caption_of_roberta_leaves_out_the_places_that_it_does_not_use():
    """Its positions begin behind the one of the padding, and not every tokenizer says how long a text may be."""
    vit_and_bert, processor = tiny_dual_encoder("vision-text-dual-encoder")
    processor.tokenizer.model_max_length = 10**30
    text = {**TOWER, "vocab_size": len(processor.tokenizer), "max_position_embeddings": CONTEXT + 2, "pad_token_id": 1}
    config = type(vit_and_bert.config).from_vision_text_configs(
        vit_and_bert.config.vision_config, RobertaConfig(**text), projection_dim=8
    )
    model = type(vit_and_bert)(config)
    tokens = PairCollator.for_model(model, processor).tokens(["one red circle in blue " * CONTEXT])
    assert tokens["input_ids"].shape == (1, CONTEXT)
    assert embed_texts(model, **tokens).isfinite().all()


def test_words_are_the_tokens_of_the_caption(name):
    model, processor = tiny_dual_encoder(name)
    collator = PairCollator.for_model(model, processor)
    tokens = collator.tokens(["a red bar", "a red ring in blue"])["input_ids"]
    read = processor.tokenizer.decode(tokens[0][collator.words(tokens)[0]])
    assert read.replace(" ", "") == "aredbar"


def test_text_given_as_token_embeddings_is_the_text(name):
    model, processor = tiny_dual_encoder(name)
    tokens = PairCollator.for_model(model.eval(), processor).tokens(["a red bar", "a ring in blue"])
    expected = embed_texts(model, **tokens)
    given = token_table(model)(tokens["input_ids"][:1])
    with given_token_embeds(model, given, torch.tensor([0, -1])):
        torch.testing.assert_close(embed_texts(model, **tokens), expected)
    with given_token_embeds(model, given, torch.tensor([0, 0])):
        assert (embed_texts(model, **tokens)[1] - expected[1]).abs().max() > 1e-4


def test_pseudo_texts_are_found_in_any_text_tower(name):
    model, processor = tiny_dual_encoder(name)
    pairs = PairDataset(tiny_pairs(24), *PAIRS)
    search = PseudoTextSearch(model, pairs, PairCollator.for_model(model, processor), batch_size=16)
    texts = search(Inversion(), seed=0)
    assert texts.in_band[texts.lead > 0].float().mean() > 0.7
    with given_token_embeds(model.eval(), texts.token_embeds, torch.arange(24)):
        read = embed_texts(model, **texts.tokens())
    torch.testing.assert_close(read, texts.text_embeds, rtol=0, atol=1e-5)


# ---- The loss ----


@pytest.mark.parametrize("name", SIGMOID, indirect=True)
def test_sigmoid_loss_and_its_gradients_are_those_of_the_model(name):
    model, processor = tiny_dual_encoder(name)
    model.double().eval()
    batch = in_double(batch_of(model, processor))
    own = model(**image_inputs(batch), **text_inputs(batch), return_loss=True).loss
    own.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    embeds = embed_pairs(model, model, batch)
    loss = contrastive_loss(embeds, pair_ids=batch["pair_id"], chunk_size=4)
    loss.backward()
    torch.testing.assert_close(loss, own, rtol=1e-12, atol=1e-12)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=0, atol=1e-12, msg=key)


def test_infonce_stays_the_loss_of_models_without_a_bias():
    model, processor = tiny_dual_encoder("chinese_clip")
    batch = batch_of(model.eval(), processor)
    own = model(**image_inputs(batch), **text_inputs(batch), return_loss=True).loss
    torch.testing.assert_close(contrastive_loss(embed_pairs(model, model, batch), pair_ids=batch["pair_id"]), own)


@pytest.mark.parametrize("name", SIGMOID, indirect=True)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_gradient_cache_has_the_gradient_of_the_whole_batch(name, chunk_size):
    model, processor = tiny_dual_encoder(name)
    model.double().eval()
    batch = in_double(batch_of(model, processor))

    def loss_of(image, text):
        return contrastive_loss(pair_embeddings(model, image, text), pair_ids=batch["pair_id"])

    whole = embed_pairs(model, model, batch)
    loss_of(whole.image, whole.text).backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    GradientCache(chunk_size).backward(
        Accelerator(cpu=True), model, batch, lambda chunk: embed_pairs(model, model, chunk), loss_of
    )
    assert expected["logit_bias"].abs() > 1e-3
    tolerance = 1e-12 if name == "siglip" else 1e-6  # SigLIP 2 resizes its positions in fp32
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=0, atol=tolerance, msg=key)


# ---- Training ----


def trained(name, args, callbacks="finetune", rows=16):
    """A trainer after training, and its model before."""
    model, processor = tiny_dual_encoder(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = ModXTrainer(
        model=model,
        args=args,
        train_dataset=tiny_pairs(rows),
        eval_dataset=tiny_pairs(8),
        processing_class=processor,
        loss_callbacks=callbacks,
    )
    trainer.train()
    return trainer, before


def test_every_weight_is_trained_the_scale_among_them(name, make_args):
    trainer, before = trained(name, make_args(max_steps=2, weight_decay=0.0))
    still = {key for key, tensor in trainer.model.state_dict().items() if torch.equal(tensor, before[key])}
    assert not [key for key, parameter in trainer.model.named_parameters() if parameter.grad is None and key in still]
    assert not still & {"logit_scale", "logit_bias"}
    logged = next(entry for entry in trainer.state.log_history if "logit_scale" in entry)
    assert ("logit_bias" in logged) == (name in SIGMOID)


def test_modx_of_a_sigmoid_model_is_its_own_loss_and_the_distillation_of_cosines(make_args):
    trainer, _ = trained("siglip", make_args(max_steps=1, learning_rate=0.0), [ModX(alpha=2.0)])
    logged = next(entry for entry in trainer.state.log_history if "contrastive" in entry)
    apart, _ = trained(
        "siglip", make_args(max_steps=1, learning_rate=0.0), [Contrastive(), ModX(alpha=2.0, contrastive=False)]
    )
    expected = next(entry for entry in apart.state.log_history if "contrastive" in entry)
    for key in ("contrastive", "modx_distillation", "image_rows_kept", "text_rows_kept"):
        assert logged[key] == pytest.approx(expected[key], abs=1e-6)


def test_scale_of_a_sigmoid_model_has_no_bound_and_that_of_others_has(make_args):
    for name, bounded in (("siglip", False), ("chinese_clip", True)):
        model, processor = tiny_dual_encoder(name)
        model.logit_scale.data.fill_(6.0)
        settings = {"args": make_args(max_steps=1), "train_dataset": tiny_pairs(8), "loss_callbacks": "finetune"}
        ModXTrainer(model=model, processing_class=processor, **settings).train()
        assert (model.logit_scale.item() <= 4.6053) == bounded


def test_evaluation_loss_is_the_models_own(name, make_args):
    trainer, _ = trained(name, make_args(max_steps=1))
    data = tiny_pairs(8)
    items = PairDataset(data, *PAIRS).__getitems__(list(range(8)))
    collator = PairCollator.for_model(trainer.model, trainer.processing_class)
    inputs = {
        **collator.pixels([item["image"] for item in items]),
        **collator.tokens([item["captions"][0] for item in items]),
    }
    with torch.no_grad():
        own = trainer.model.eval()(**inputs, return_loss=True).loss.item()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("name", SIGMOID, indirect=True)
def test_cached_teacher_trains_as_the_live_one(name, make_args):
    weights = [
        trained(name, make_args(max_steps=4, teacher_cache=mode, optim="sgd"), "modx")[0].model.state_dict()
        for mode in ("off", "memory", "disk")
    ]
    for other in weights[1:]:
        assert max((weights[0][key] - other[key]).abs().max() for key in other) < 1e-6


def train_and_save(folder, processes, changes):
    model, processor = tiny_dual_encoder("siglip")
    args = arguments(folder, per_device_train_batch_size=8 // processes, max_steps=4, adam_epsilon=1e-4, **changes)
    ModXTrainer(
        model=model.double(),
        args=args,
        train_dataset=tiny_pairs(24),
        processing_class=processor,
        loss_callbacks=[Contrastive(), ModX(contrastive=False)],
    ).train()
    save_file(model.state_dict(), f"{folder}/rank-{args.process_index}.safetensors")


@pytest.mark.slow
def test_two_processes_train_the_scale_bias_and_weights_of_one(tmp_path):
    settings = [(1, {}), (2, {}), (2, {"gradient_cache_chunk_size": 3}), (2, {"teacher_cache": "memory"})]
    found = []
    for number, (processes, changes) in enumerate(settings):
        (tmp_path / str(number)).mkdir()
        launch(processes, train_and_save, tmp_path / str(number), processes, changes)
        found.append([load_file(tmp_path / str(number) / f"rank-{rank}.safetensors") for rank in range(processes)])
    one = found[0][0]
    assert abs(one["logit_bias"].item() + 10) > 1e-4
    for ranks in found[1:]:
        for rank in ranks:
            assert max((one[key] - rank[key]).abs().max() for key in one) < 1e-9


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_old_model_of_an_adapter_keeps_its_scale_and_bias():
    student = peft.get_peft_model(tiny_dual_encoder("siglip")[0], peft.LoraConfig(target_modules=["q_proj"], r=2))
    for scale in (student.logit_scale, student.logit_bias):
        scale.requires_grad_(True)
    teacher = teacher_of(student)
    assert isinstance(teacher, AdapterOffTeacher)
    teacher.prepare(Accelerator(cpu=True))
    for scale in (student.logit_scale, student.logit_bias):
        scale.data += 1.0
    old = teacher.embed(batch_of(student, tiny_dual_encoder("siglip")[1]))
    assert old.logit_scale.item() == pytest.approx(10.0) and old.logit_bias.item() == -10.0


# ---- Whole runs ----


def make_stream(phases=2, tests=True):
    data = tiny_pairs(36)
    parts = [
        Phase(f"part {k}", data.select(range(12 * k, 12 * k + 9)), data.select(range(12 * k + 9, 12 * k + 12)))
        for k in range(1 + phases)
    ]
    parts = parts if tests else [Phase(part.name, part.train) for part in parts]
    return PhaseStream(tuple(parts[1:]), base=parts[0])


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Of each architecture a folder with a model and its processor."""

    def start(name):
        folder = tmp_path_factory.mktemp(name)
        for part in tiny_dual_encoder(name):
            part.save_pretrained(folder)
        return str(folder)

    return {name: start(name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def finished(started, tmp_path_factory):
    """Of each architecture a run of two phases with Mod-X and replay, loaded from that folder."""
    runs = {}

    def finish(name):
        if name not in runs:
            args = arguments(tmp_path_factory.mktemp(f"{name}-run"))
            runs[name] = ContinualRun(make_stream(), "modx+er", args, model=started[name])
            runs[name].run()
        return runs[name]

    return finish


def test_two_phases_leave_models_of_the_class_and_a_full_matrix(name, finished):
    continual = finished(name)
    results = json.loads((continual.folder / "results.json").read_text())
    for matrix in results["matrix"].values():
        assert len(matrix) == 3 and all(value is not None for row in matrix for value in row)
    assert "image_rows_kept" in results["training"][1]
    kind, _ = ARCHITECTURES[name]
    start, processor = tiny_dual_encoder(name)
    assert type(AutoModel.from_pretrained(continual.phase_folder(2))) is kind
    model = kind.from_pretrained(continual.phase_folder(2))
    assert (model.logit_scale - start.logit_scale).abs().item() > 0
    loaded = AutoProcessor.from_pretrained(continual.phase_folder(2))
    assert type(loaded) is type(processor)
    first, second = batch_of(model, loaded), batch_of(start, processor)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_interrupted_run_goes_on_to_the_weights_of_an_undisturbed_one(name, started, finished, tmp_path):
    def go(*callbacks):
        args = arguments(tmp_path, save_strategy="steps", save_steps=1)
        stream = make_stream(1, tests=False)
        continual = ContinualRun(stream, "modx+er", args, model=started[name], callbacks=callbacks)
        continual.run()
        return load_file(continual.phase_folder(1) / "model.safetensors")

    with pytest.raises(SystemError):
        go(StopAt(1, 2))
    resumed, whole = go(), load_file(finished(name).phase_folder(1) / "model.safetensors")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("siglip", "incclip", {"inversion_steps": 2}),
        ("chinese_clip", "incclip", {"inversion_steps": 2}),
        ("siglip2", "zscl", {"ensemble_every": 1, "classes": True, "distill_text_tower": True}),
        ("siglip", "ewc", {}),
        ("siglip2", "der", {}),
        ("siglip", "cclip", {}),
    ],
    indirect=["name"],
)
def test_recipes_that_ask_more_of_a_model(name, recipe, options, started, tmp_path):
    stream = make_stream(1, tests=False)
    args = arguments(tmp_path, **recipe_arguments(recipe))
    continual = ContinualRun(stream, recipe, args, model=started[name], recipe_args=options)
    continual.run()
    before, after = (load_file(continual.phase_folder(k) / "model.safetensors") for k in (0, 1))
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any((after[key] != before[key]).any() for key in after)


# ---- Cards ----


@pytest.mark.parametrize("name", ["siglip", "chinese_clip", "vision-text-dual-encoder"], indirect=True)
def test_snippet_of_the_card_runs_on_the_phase(name, finished, monkeypatch, capsys):
    folder = finished(name).phase_folder(2)
    monkeypatch.chdir(folder.parent)
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(snippet, "card", "exec"), {})
    said = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert set(said) == {"a red square", "a blue circle"}
    # Of classes that exclude each other, or each for itself.
    assert (abs(sum(said.values()) - 1) < 1e-5) == (name != "siglip")


def test_card_names_the_zero_shot_pipeline_only_where_there_is_one(name, finished):
    card = (finished(name).phase_folder(2) / "README.md").read_text()
    has_pipeline = name != "vision-text-dual-encoder"
    assert ("pipeline_tag: zero-shot-image-classification" in card) == has_pipeline
    assert ("zhai2023siglip" in card) == (name in SIGMOID)


# ---- What does not go ----


def test_patches_are_neither_augmented_nor_kept_as_images(make_args, tmp_path):
    model, processor = tiny_dual_encoder("siglip2")
    with pytest.raises(ValueError, match="Siglip2ImageProcessorPil gives patches"):
        ModXTrainer(
            model=model,
            args=make_args(image_augmentation="affine_color"),
            train_dataset=tiny_pairs(8),
            processing_class=processor,
        )
    with pytest.raises(ValueError, match="images cannot be cached"):
        cache_resized_images(tiny_pairs(4), "image", processor, tmp_path)
