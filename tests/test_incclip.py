"""Pseudo texts by inversion, the recipe that uses them, and the bound on weights."""

import json
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from hf_modx import Contrastive, LossCallback, ModXTrainer, ModXTrainingArguments, build_recipe
from hf_modx.adapter import add_adapter
from hf_modx.callbacks import IncCLIP, PhaseBoundary, WeightNormClip
from hf_modx.callbacks.weight_norm_clip import weight_matrices
from hf_modx.data import PairCollator, PairDataset
from hf_modx.embeddings import embed_pairs, embed_texts, given_token_embeds, token_table
from hf_modx.losses import affinity_distillation
from hf_modx.pseudo_texts import Inversion, PseudoTextSearch

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import pseudo_texts

PAIRS = ("image", "caption", "pair_id")


def arguments(folder, **changes):
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "adam_epsilon": 1e-4,  # see test_distributed
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ModXTrainingArguments(output_dir=str(folder), **{**settings, **changes})


@pytest.fixture(scope="module")
def learned(tmp_path_factory, processor):
    """A model that knows the coloured shapes: where nothing is learned no caption leads, and there is no band."""
    model = tiny_clip(processor)
    trainer = ModXTrainer(
        model=model,
        args=arguments(tmp_path_factory.mktemp("learned"), max_steps=100, learning_rate=3e-3, adam_epsilon=1e-8),
        train_dataset=tiny_pairs(48),
        processing_class=processor,
        loss_callbacks=[Contrastive()],
    )
    trainer.train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def old_model(learned, processor):
    model = tiny_clip(processor)
    model.load_state_dict(learned)
    return model


def search_in(model, processor, data=None, batch_size=16):
    pairs = PairDataset(tiny_pairs(48) if data is None else data, *PAIRS)
    return PseudoTextSearch(model, pairs, PairCollator(processor), batch_size)


# ---- Texts given as token embeddings ----


def test_text_read_by_its_embeddings_is_the_text(processor):
    model = tiny_clip(processor).double()
    tokens = PairCollator(processor).tokens(["a red bar", "one triangle in orange", "a blue ring"])
    expected = model.get_text_features(**tokens).pooler_output
    own = token_table(model)(tokens["input_ids"])
    for given in (own, own[:, :7]):
        with given_token_embeds(model, given, torch.tensor([0, -1, 2])):
            read = model.get_text_features(**tokens).pooler_output
        torch.testing.assert_close(read, expected, rtol=0, atol=1e-12)
    with given_token_embeds(model, own[:1], torch.tensor([-1, -1, 0])):
        read = model.get_text_features(**tokens).pooler_output
    assert torch.equal(read[:2], expected[:2]) and (read[2] - expected[2]).abs().max() > 1e-3
    assert torch.equal(model.get_text_features(**tokens).pooler_output, expected)


def test_gradient_of_a_given_text_reaches_its_embeddings_and_not_the_table(processor):
    model = tiny_clip(processor)
    tokens = PairCollator(processor).tokens(["a red bar"])
    given = token_table(model)(tokens["input_ids"]).detach().requires_grad_()
    with given_token_embeds(model, given, torch.tensor([0])):
        model.get_text_features(**tokens).pooler_output.sum().backward()
    assert given.grad.abs().max() > 0
    assert token_table(model).weight.grad.abs().max() == 0


class Reads(LossCallback):
    """Adds captions to every batch, by their ids or as the embeddings of their tokens, and keeps what they become."""

    def __init__(self, processor, captions, table=None):
        self.inputs = dict(PairCollator(processor).tokens(captions))
        if table is not None:
            self.inputs["token_embeds"] = table[self.inputs["input_ids"]]

    def extra_inputs(self, context):
        return self.inputs

    def loss_terms(self, student, teacher, context):
        self.texts = context.extra.text.detach()
        return {}


@pytest.mark.parametrize("chunk", [None, 2])
def test_every_callback_gets_its_own_texts_back(tmp_path, processor, chunk):
    model = tiny_clip(processor)
    table = token_table(model).weight.detach().clone()
    captions = [["a red bar", "one ring"], ["one triangle in orange"], ["a blue cross", "a pink ring", "one bar"]]
    callbacks = [
        Reads(processor, captions[0], table),
        Reads(processor, captions[1]),
        Reads(processor, captions[2], table),
    ]
    expected = []
    for texts in captions:
        with torch.no_grad():
            expected.append(embed_texts(model.eval(), **PairCollator(processor).tokens(texts)))
    trained(
        tmp_path,
        processor,
        [Contrastive(), *callbacks],
        model,
        memory=False,
        max_steps=1,
        gradient_cache_chunk_size=chunk,
    )
    for callback, texts in zip(callbacks, expected, strict=True):
        torch.testing.assert_close(callback.texts, texts, rtol=0, atol=1e-5)


# ---- Pseudo texts ----


def test_similarity_lies_in_the_band_for_nearly_all_images(old_model, processor):
    found = search_in(old_model, processor)(Inversion(), seed=0)
    low, high = found.own_similarity - 0.3 * found.lead, found.own_similarity - 0.1 * found.lead
    lies_within = (found.similarity >= low) & (found.similarity <= high) & (found.lead > 0)
    assert torch.equal(lies_within, found.in_band)
    assert lies_within.float().mean() >= 0.9


def test_text_is_neither_the_positive_nor_any_text(old_model, processor):
    search = search_in(old_model, processor)
    found = search(Inversion(), seed=0)
    odd = (search.images @ search.captions.T).mean()
    assert found.similarity.mean() > odd + 0.6 * found.lead.mean()
    captions = search.captions @ search.captions.T
    nearest_other = captions.masked_fill(torch.eye(48, dtype=torch.bool), -1).amax(dim=1)
    assert (found.to_own_caption < nearest_other).float().mean() >= 0.9
    assert found.to_own_caption.mean() > captions.mean() + 0.2
    table = token_table(old_model).weight
    words = torch.cdist(found.token_embeds[:, 1:3], table).amin(dim=-1)
    assert words.min() > 0.1 * table.std() * table.shape[1] ** 0.5  # no words of the vocabulary


def test_similarity_is_what_the_old_model_says_of_the_text(old_model, processor):
    search = search_in(old_model, processor)
    found = search(Inversion(), seed=0)
    with torch.no_grad(), given_token_embeds(old_model, found.token_embeds, torch.arange(48)):
        texts = embed_texts(old_model.eval(), found.input_ids, found.attention_mask)
    torch.testing.assert_close(texts, found.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close((search.images * texts).sum(dim=1), found.similarity, rtol=0, atol=1e-5)


def test_search_starts_from_a_near_caption_of_another_pair(old_model, processor):
    search = search_in(old_model, processor)
    found = search(Inversion(steps=0, noise=0.0), seed=0)
    similarities = search.images @ search.captions.T
    ranks = (similarities > similarities.gather(1, found.start_rows[:, None])).sum(dim=1)
    assert not (found.start_rows == torch.arange(48)).any()
    assert ranks.max() <= 9 and len(ranks.unique()) > 5
    torch.testing.assert_close(found.text_embeds, search.captions[found.start_rows], rtol=0, atol=1e-5)


def test_pairs_of_one_id_and_equal_captions_are_no_other_captions(old_model, processor):
    data = tiny_pairs(6)
    twins = data.remove_columns("pair_id").add_column("pair_id", [0, 0, 0, 1, 2, 3])
    assert set(search_in(old_model, processor, twins)(Inversion(), 0).start_rows[:3].tolist()) <= {3, 4, 5}
    same = [data[0]["caption"]] * 3 + list(data["caption"])[3:]
    copies = data.remove_columns("caption").add_column("caption", same)
    assert set(search_in(old_model, processor, copies)(Inversion(), 0).start_rows[:3].tolist()) <= {3, 4, 5}


def test_memory_without_other_captions_has_no_band(old_model, processor):
    found = search_in(old_model, processor, tiny_pairs(1))(Inversion(), 0)
    assert found.lead.tolist() == [0] and not found.in_band.any()


def test_only_words_are_changed_and_none_grows_longer_than_those_of_the_table(old_model, processor):
    found = search_in(old_model, processor)(Inversion(negative_margin=0.11, steps=20), seed=0)
    table = token_table(old_model).weight.detach()
    moved = (found.token_embeds - table[found.input_ids]).norm(dim=-1) > 0
    last = found.attention_mask.sum(dim=1) - 1
    places = torch.arange(moved.shape[1])
    assert torch.equal(moved, (places > 0) & (places < last[:, None]))
    searched = found.token_embeds[moved & ~found.in_band[:, None]]
    assert searched.numel() == 0 or searched.norm(dim=-1).max() <= table.norm(dim=1).max() * (1 + 1e-6)


def test_old_model_stays_as_it_is(old_model, processor):
    before = {name: tensor.clone() for name, tensor in old_model.state_dict().items()}
    old_model.train()
    search_in(old_model, processor)(Inversion(), seed=0)
    assert old_model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in old_model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in old_model.state_dict().items())


def test_texts_are_a_pure_function_of_seed_and_number(old_model, processor):
    search = search_in(old_model, processor)
    first, again, other_number, other_seed = (
        search(Inversion(), seed, number).token_embeds for seed, number in [(1, 2), (1, 2), (1, 3), (2, 2)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_number) and not torch.equal(first, other_seed)


def search_and_save(folder, weights):
    processor = tiny_processor()
    model = tiny_clip(processor)
    model.load_state_dict(weights)
    found = search_in(model, processor, tiny_pairs(10), batch_size=4)(Inversion(), seed=0)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
    save_file({field.name: getattr(found, field.name).contiguous() for field in fields(found)}, f"{folder}/{rank}")


def test_processes_find_the_same_texts_to_the_bit(tmp_path, learned):
    launch(2, search_and_save, tmp_path, learned)
    search_and_save(tmp_path, learned)
    alone, *shared = (load_file(tmp_path / name) for name in ("alone", "0", "1"))
    assert len(alone["input_ids"]) == 10
    assert all(torch.equal(alone[name], other[name]) for other in shared for name in alone)


@pytest.mark.parametrize(
    "settings",
    [
        {"distill_weight": -1.0},
        {"texts": "none"},
        {"refresh_every": 0},
        {"positive_margin": 0.0},
        {"positive_margin": 0.5},
        {"memory_size": 0},
    ],
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        IncCLIP(**settings)


# ---- Distillation of some of the pairs ----


def unit(rows, seed, width=6):
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, width, dtype=torch.double, generator=generator), dim=1)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_distilled_pairs_are_those_asked_for_and_all_are_candidates(chunk_size):
    images, texts, old_images, old_texts = (unit(7, seed).requires_grad_() for seed in range(4))
    extra, old_extra = unit(3, 5).requires_grad_(), unit(3, 6)
    rows = torch.tensor([True, False, False, True, True, False, False])
    found = affinity_distillation(
        images,
        texts,
        old_images,
        old_texts,
        distill_scale=3.0,
        reduction="mean",
        screen=False,
        row_weights=rows,
        extra_text_embeds=extra,
        teacher_extra_text_embeds=old_extra,
        chunk_size=chunk_size,
    )
    directions = [
        (old_images @ torch.cat([old_texts, old_extra]).T, images @ torch.cat([texts, extra]).T),
        (old_texts @ old_images.T, texts @ images.T),
    ]
    expected = sum(
        nn.functional.kl_div(
            (3 * new).log_softmax(1)[rows], (3 * old).detach().log_softmax(1)[rows], reduction="sum", log_target=True
        )
        for old, new in directions
    ) / (2 * 3)
    torch.testing.assert_close(found.loss, expected, rtol=0, atol=1e-12)
    sides = [images, texts, extra]
    for gradient, wanted in zip(
        torch.autograd.grad(found.loss, sides), torch.autograd.grad(expected, sides), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_no_pair_to_distil_costs_nothing():
    sides = [unit(4, seed) for seed in range(4)]
    nothing = torch.zeros(4, dtype=torch.bool)
    assert affinity_distillation(*sides, row_weights=nothing, reduction="mean").loss == 0


def test_rows_of_another_number_are_refused():
    with pytest.raises(ValueError, match="row_weights must be 4 floats or booleans"):
        affinity_distillation(*[unit(4, seed) for seed in range(4)], row_weights=torch.ones(5, dtype=torch.bool))


# ---- Training ----


class Watch(LossCallback):
    def __init__(self):
        self.contexts = []

    def loss_terms(self, student, teacher, context):
        self.contexts.append(context)
        return {}


def trained(folder, processor, callbacks, model, rows=24, memory=True, **changes):
    trainer = ModXTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=tiny_pairs(rows, style="yellow"),
        processing_class=processor,
        loss_callbacks=callbacks,
    )
    if memory:
        trainer.use_memory(tiny_pairs(20, start=28))
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry and "loss" in entry]


class KeepTexts(IncCLIP):
    """Remember the texts of the phase, the rows of each batch, and the global pairs that they were made for."""

    def __init__(self, **options):
        self.made, self.seen = [], []
        super().__init__(**options)

    def loss_terms(self, student, teacher, context):
        if self._texts is not None and (not self.made or self.made[-1] is not self._texts):
            self.made.append(self._texts)
        if self._texts is not None:
            self.seen.append((context, self._rows(context), self._number))
        return super().loss_terms(student, teacher, context)


def test_loss_is_the_formula(tmp_path, processor, old_model, learned):
    """From the definition, with dense matrices: the first step, before which student and old model are the same but
    for the texts that the student reads again; and the second, with the weights after the first."""
    keep = KeepTexts(batch_share=0.5, distill_weight=3.0)
    weights = [learned]

    class KeepWeights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    trainer = ModXTrainer(
        model=old_model,
        args=arguments(tmp_path, max_steps=2, optim="sgd", learning_rate=0.1),
        train_dataset=tiny_pairs(24, style="yellow").remove_columns("pair_id"),
        processing_class=processor,
        loss_callbacks=[keep],
        callbacks=[KeepWeights()],
    )
    trainer.use_memory(tiny_pairs(20, start=28))
    trainer.train()
    (texts,) = keep.made
    for step, (context, rows, _) in enumerate(keep.seen):
        assert len(rows) >= 2
        new, old = tiny_clip(processor), tiny_clip(processor)
        new.load_state_dict(weights[step])
        old.load_state_dict(learned)
        predictions = {}
        for name, model in (("new", new), ("old", old)):
            with torch.no_grad():
                pairs = embed_pairs(model.eval(), model, context.batch)
                with given_token_embeds(model, texts.token_embeds[rows], torch.arange(len(rows))):
                    extra = embed_texts(model, texts.input_ids[rows], texts.attention_mask[rows])
            scaled = pairs.logit_scale * pairs.image
            predictions[name] = (
                (scaled @ torch.cat([pairs.text, extra]).T).log_softmax(1),
                (scaled @ pairs.text.T).T.log_softmax(1),
            )
        contrastive = -sum(side[:, :8].diagonal().mean() for side in predictions["new"]) / 2
        divergence = sum(
            nn.functional.kl_div(
                side[context.is_replay], old_side[context.is_replay], reduction="sum", log_target=True
            )
            for side, old_side in zip(predictions["new"], predictions["old"], strict=True)
        ) / (2 * context.is_replay.sum())
        assert logged(trainer, "contrastive")[step] == pytest.approx(contrastive.item(), abs=1e-4)
        assert logged(trainer, "incclip_distillation")[step] == pytest.approx(3 * divergence.item(), abs=1e-4)
    assert logged(trainer, "incclip_distillation")[0] == pytest.approx(0, abs=1e-4)
    assert logged(trainer, "incclip_distillation")[1] > 1e-3


def test_text_is_left_out_where_the_pair_it_started_from_is_in_the_batch(tmp_path, processor, old_model):
    keep = KeepTexts(batch_share=0.5)
    trainer = trained(tmp_path, processor, [keep], old_model, rows=32, max_steps=12)
    (texts,) = keep.made
    memory_ids = torch.tensor(tiny_pairs(20, start=28)["pair_id"])
    usable = (texts.lead > 0) & texts.in_band & ~texts.is_rewording
    left_out = 0
    for context, rows, _ in keep.seen:
        replayed = context.row_ids[context.is_replay] - 32
        in_batch = torch.isin(memory_ids[texts.start_rows[replayed]], context.pair_ids)
        assert rows.tolist() == replayed[usable[replayed] & ~in_batch].tolist()
        left_out += int((usable[replayed] & in_batch).sum())
    assert left_out > 0
    assert logged(trainer, "pseudo_texts") == [len(rows) for _, rows, _ in keep.seen]


def test_without_a_memory_it_is_plain_fine_tuning(tmp_path, processor, learned):
    models = [tiny_clip(processor), tiny_clip(processor)]
    for model, recipe in zip(models, ([IncCLIP()], [Contrastive()]), strict=True):
        model.load_state_dict(learned)
        trained(tmp_path, processor, recipe, model, memory=False)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_texts_are_made_anew_as_often_as_asked(tmp_path, processor, old_model):
    keep = KeepTexts(batch_share=0.5, refresh_every=2)
    trained(tmp_path, processor, [keep], old_model, max_steps=5)
    assert [number for _, _, number in keep.seen] == [0, 0, 1, 1, 2]
    assert len({texts.token_embeds.sum().item() for texts in keep.made}) == 3
    # All from the old model: their images are those of the start, however far the student has moved.
    assert all(torch.equal(texts.own_similarity, keep.made[0].own_similarity) for texts in keep.made)


def test_refreshed_texts_are_those_of_an_undisturbed_training(tmp_path, processor, learned):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise SystemError("power cut")

    def train(folder, stop=False, **options):
        model = tiny_clip(processor)
        model.load_state_dict(learned)
        trainer = ModXTrainer(
            model=model,
            args=arguments(folder, **settings),
            train_dataset=tiny_pairs(24, style="yellow"),
            processing_class=processor,
            loss_callbacks=build_recipe("incclip", refresh_every=2, batch_share=0.5),
            callbacks=[Stop()] if stop else [],
        )
        trainer.use_memory(tiny_pairs(20, start=28))
        trainer.train(**options)
        return model.state_dict()

    with pytest.raises(SystemError):
        train(tmp_path / "cut", stop=True)
    resumed = train(tmp_path / "cut", resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    whole = train(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_control_reads_real_captions(tmp_path, processor, old_model, learned):
    asked = []

    class Record(KeepTexts):
        def extra_inputs(self, context):
            asked.append(super().extra_inputs(context))
            return asked[-1]

    keep = Record(batch_share=0.5, texts="captions")
    trained(tmp_path, processor, [keep], old_model)
    captions = PairCollator(processor).tokens([captions[0] for captions in tiny_pairs(20, start=28)["caption"]])
    (texts,) = keep.made
    for inputs, (_, rows, _) in zip(asked, keep.seen, strict=True):
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert torch.equal(inputs["input_ids"], captions["input_ids"][texts.start_rows[rows]])
    model = tiny_clip(processor)
    model.load_state_dict(learned)
    with torch.no_grad():
        expected = embed_texts(model.eval(), **captions)[texts.start_rows]
    torch.testing.assert_close(texts.text_embeds, expected, rtol=0, atol=1e-5)


def test_few_usable_texts_are_told(tmp_path, processor, caplog):
    trained(tmp_path, processor, [IncCLIP(inversion_steps=0)], tiny_clip(processor))
    assert "remembered images have a pseudo text" in caplog.text


def test_texts_are_given_up_with_the_phase(tmp_path, processor, old_model):
    callback = IncCLIP(refresh_every=2)
    trained(tmp_path, processor, [callback], old_model)
    assert callback._search is None and callback._texts is None


# ---- Several processes ----


def train_and_save(folder, weights, batch_size, rows, options, changes):
    processor = tiny_processor()
    model = tiny_clip(processor).double()
    model.load_state_dict(weights)
    changes = {
        "per_device_train_batch_size": batch_size,
        "dataloader_drop_last": rows == 48,
        "max_steps": 5,
        **changes,
    }
    recipe = build_recipe("incclip", batch_share=0.5, **options)
    trainer = trained(folder, processor, recipe, model, rows, per_device_eval_batch_size=8, **changes)
    tensors = {**model.state_dict(), "loss": torch.tensor(logged(trainer, "loss"))}
    save_file(tensors, f"{folder}/rank-{trainer.args.process_index}.safetensors")


def largest_difference(first, second):
    first, second = load_file(first), load_file(second)
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


# The last batch of 18 rows holds 2 pairs: fewer than there are processes.
TRAININGS = [({}, 48), ({}, 18), ({"refresh_every": 2}, 18), ({"texts": "captions"}, 18)]


def train_all(folder, weights, batch_size, changes):
    for number, (options, rows) in enumerate(TRAININGS):
        place = folder / str(number)
        place.mkdir(parents=True, exist_ok=True)
        train_and_save(place, weights, batch_size, rows, options, changes)


@pytest.fixture(scope="module")
def one_big_batch(tmp_path_factory, learned):
    folder = tmp_path_factory.mktemp("one")
    launch(1, train_all, folder, learned, 8, {})
    return folder


HELD = {"gradient_accumulation_steps": 2, "gradient_cache_chunk_size": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batch_size", "changes"), [(1, 4, HELD), (2, 4, {}), (2, 2, HELD), (4, 2, {})])
def test_processes_and_chunks_train_the_weights_of_one(
    tmp_path, learned, one_big_batch, processes, batch_size, changes
):
    launch(processes, train_all, tmp_path, learned, batch_size, changes)
    for number, training in enumerate(TRAININGS):
        ranks = [tmp_path / str(number) / f"rank-{rank}.safetensors" for rank in range(processes)]
        assert all(largest_difference(ranks[0], other) == 0 for other in ranks[1:]), training
        assert largest_difference(one_big_batch / str(number) / "rank-0.safetensors", ranks[0]) < 1e-9, training


# ---- Weight norms ----


def test_no_matrix_gets_longer_than_it_was(tmp_path, processor):
    model = tiny_clip(processor)
    start = {name: matrix.detach().norm() for name, matrix in weight_matrices(model).items()}
    unclipped = tiny_clip(processor)
    trained(tmp_path, processor, [Contrastive()], unclipped, memory=False, learning_rate=1e-2)
    assert any(matrix.norm() > start[name] * 1.01 for name, matrix in weight_matrices(unclipped).items())
    longest = dict.fromkeys(start, 0.0)

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for name, matrix in weight_matrices(model).items():
                longest[name] = max(longest[name], float(matrix.detach().norm() / start[name]))

    trainer = ModXTrainer(
        model=model,
        args=arguments(tmp_path, learning_rate=1e-2),
        train_dataset=tiny_pairs(24),
        processing_class=processor,
        loss_callbacks=[Contrastive(), WeightNormClip()],
        callbacks=[Measure()],
    )
    trainer.train()
    assert max(longest.values()) == pytest.approx(1, abs=1e-5)


def boundary(model):
    """The start of a phase, for a callback that looks at the model alone."""
    return PhaseBoundary(model, {}, None, None, None, None, nullcontext, None, None, [])


def test_clipping_keeps_directions_and_leaves_short_matrices_alone(processor):
    model = tiny_clip(processor)
    clip = WeightNormClip()
    clip.start_phase(boundary(model))
    matrix, short = model.visual_projection.weight, model.text_projection.weight
    start, direction, shorter = matrix.detach().norm(), torch.randn_like(matrix), 0.5 * short.detach()
    with torch.no_grad():
        matrix.copy_(7 * direction)
        short.copy_(shorter)
    clip.on_optimizer_step(None, None, None, model=model)
    torch.testing.assert_close(matrix.detach(), direction * start / direction.norm())
    assert torch.equal(short.detach(), shorter)


def test_embedding_tables_and_vectors_are_no_matrices(processor):
    names = set(weight_matrices(tiny_clip(processor)))
    assert {"visual_projection.weight", "text_model.encoder.layers.0.mlp.fc1.weight"} <= names
    assert not [name for name in names if "token_embedding" in name or "position_embedding" in name]
    assert not [name for name in names if name.endswith("bias") or "norm" in name or "scale" in name]


def test_matrix_that_starts_at_zero_may_grow(processor):
    model = tiny_clip(processor)
    with torch.no_grad():
        model.text_projection.weight.zero_()
    clip = WeightNormClip()
    clip.start_phase(boundary(model))
    with torch.no_grad():
        model.text_projection.weight.fill_(1.0)
    clip.on_optimizer_step(None, None, None, model=model)
    assert (model.text_projection.weight == 1).all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_adapter_is_left_alone_and_that_is_told(processor, caplog):
    model = add_adapter(tiny_clip(processor), ModXTrainingArguments(peft="lora", use_cpu=True))
    clip = WeightNormClip()
    clip.start_phase(boundary(model))
    assert "has no weight matrix to clip" in caplog.text
    first = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        first.fill_(9.0)
    clip.on_optimizer_step(None, None, None, model=model)
    assert (first == 9).all()


# ---- The picture ----


def test_example_draws_where_the_texts_of_a_run_lie(tmp_path, old_model, processor):
    old_model.save_pretrained(tmp_path / "run" / "phase-1")
    processor.save_pretrained(tmp_path / "run" / "phase-1")
    tiny_pairs(30).save_to_disk(tmp_path / "run" / "memory" / "phase-1")
    flags = ["--run", str(tmp_path / "run"), "--phase", "1", "--memory_size", "20", "--output_dir", str(tmp_path)]
    numbers = pseudo_texts.main(flags)
    assert numbers["images"] == 20 and numbers["in_band"] >= 0.9
    assert numbers["cosine_of_other_captions_to_own_caption"] < numbers["cosine_to_own_caption"] < 0.95
    assert json.loads((tmp_path / "pseudo_texts.json").read_text()) == numbers
    assert (tmp_path / "pseudo_texts.png").read_bytes().startswith(b"\x89PNG")
