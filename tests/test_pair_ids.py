"""Pairs that belong together: positives of each other in the losses, right answers in screening, and where the sampler
puts them."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from test_distributed import arguments, largest_difference
from test_losses import BOTH_IDS, EXACT, IDS, Batch, SigmoidBatch, assert_same_gradients, old_model_of_matrix

from hf_modx import ContinualRun, Contrastive, ModXTrainer, Phase, PhaseStream
from hf_modx.data.pair_groups import Arrangement
from hf_modx.data.sampling import GlobalBatches
from hf_modx.losses import affinity_distillation, info_nce
from hf_modx.run.identity import changes, run_identity
from hf_modx.run.stream_checks import StreamChecks

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor

SAME = IDS[:, None] == IDS
ANY_SAME = (BOTH_IDS[:, None] == BOTH_IDS).any(dim=-1)


def unified_contrastive(batch: Batch, same: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
    """Yang et al., CVPR 2022, as cross-entropies against soft targets."""
    targets = same.double() / same.sum(dim=1, keepdim=True)
    logits = batch.scale * batch.images @ batch.texts.T
    more = batch.scale * batch.images @ extra.T if extra is not None else logits[:, :0]
    wide = F.pad(targets, (0, more.shape[1]))
    to_texts = F.cross_entropy(torch.cat([logits, more], dim=1), wide)
    return (to_texts + F.cross_entropy(logits.T, targets)) / 2


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("ids", "same"), [(IDS, SAME), (BOTH_IDS, ANY_SAME)], ids=["one id", "two ids"])
def test_info_nce_with_positives_is_cross_entropy_against_equal_shares(ids, same, chunk_size):
    batch = Batch()
    found = info_nce(batch.images, batch.texts, batch.scale, pair_ids=ids, positives=True, chunk_size=chunk_size)
    expected = unified_contrastive(batch, same)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients(batch, found, expected)


def test_extra_texts_are_never_positives():
    batch, extra = Batch(), Batch(rows=4, seed=7).texts.detach()
    found = info_nce(batch.images, batch.texts, batch.scale, pair_ids=IDS, positives=True, extra_text_embeds=extra)
    expected = unified_contrastive(batch, SAME, extra)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients(batch, found, expected)


def test_modx_screens_by_any_positive_and_distils_the_whole_row():
    batch = Batch()
    found = batch.modx(pair_ids=BOTH_IDS, positives=True, chunk_size=4)
    old, new = batch.old_images @ batch.old_texts.T, batch.images @ batch.texts.T
    total, shares = 0.0, []
    for one, other in ((old, new), (old.T, new.T)):
        kept = ANY_SAME.gather(1, one.argmax(dim=1, keepdim=True))[:, 0]
        divergence = F.kl_div(other.log_softmax(dim=1), one.log_softmax(dim=1), log_target=True, reduction="none")
        total, shares = total + divergence.sum(dim=1)[kept].sum() / 2, [*shares, kept.double().mean().item()]
    torch.testing.assert_close(found.distillation, total, **EXACT)
    assert_same_gradients(batch, found.distillation, total)
    assert [found.image_rows_kept.item(), found.text_rows_kept.item()] == pytest.approx(shares)
    assert shares != [batch.modx().image_rows_kept.item(), batch.modx().text_rows_kept.item()]


def test_a_row_whose_positive_the_old_model_prefers_is_right():
    old = old_model_of_matrix([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.9, 0.0, 0.1]])
    new = Batch(rows=3)
    kept = affinity_distillation(new.images, new.texts, *old, pair_ids=torch.tensor([5, 5, 6]), positives=True)
    assert kept.image_rows_kept.item() == pytest.approx(2 / 3)


def test_sigmoid_loss_asks_nothing_about_pairs_that_are_no_positives():
    batch = SigmoidBatch()
    found = batch.loss(pair_ids=IDS, positives=False, chunk_size=4)
    logits = batch.scale * batch.images @ batch.texts.T + batch.bias
    own = torch.eye(len(IDS), dtype=torch.bool)
    answers = F.logsigmoid(torch.where(own, logits, -logits))
    expected = -answers[~(SAME & ~own)].sum() / len(IDS)
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(
        torch.autograd.grad(found, batch.leaves()), torch.autograd.grad(expected, batch.leaves()), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


# --- the sampler -----------------------------------------------------------------------------------------------------

GROUPS = [row // 3 if row < 30 else row for row in range(50)]


def batches(how, epoch=0, groups=GROUPS, batch_size=8, **options):
    table = Dataset.from_dict({"pair_id": groups})
    sampler = GlobalBatches(
        len(groups),
        batch_size,
        seed=3,
        current_epoch=lambda: epoch,
        drop_last=False,
        arrange=Arrangement(how, table, "pair_id") if how != "any" else None,
        **options,
    )
    found = [[index % (len(groups) + sampler.memory_rows) for index in batch] for batch in sampler]
    assert len(found) == len(sampler)
    return found


def meetings(found):
    """Pairs of rows of one group in one batch."""
    return sum(
        GROUPS[one] == GROUPS[other]
        for batch in found
        for place, one in enumerate(batch)
        for other in batch[:place]
        if max(one, other) < len(GROUPS)
    )


@pytest.mark.parametrize("memory", [{}, {"memory_rows": 10, "memory_share": 0.25}], ids=["new rows", "with a memory"])
def test_rows_of_one_id_are_kept_apart(memory):
    assert sum(meetings(batches("any", epoch, **memory)) for epoch in range(5)) > 0
    assert all(meetings(batches("apart", epoch, **memory)) == 0 for epoch in range(5))


def test_rows_of_one_id_are_kept_together_but_at_the_edges_of_batches():
    for epoch in range(5):
        found = batches("together", epoch)
        assert meetings(found) >= 30 - 2 * (len(found) - 1)  # ten groups of three; an edge divides one of them
        assert found != batches("together", epoch + 1)


@pytest.mark.parametrize("how", ["any", "apart", "together"])
def test_an_arranged_epoch_shows_every_row_once_in_batches_of_the_same_sizes(how):
    found = batches(how)
    assert sorted(row for batch in found for row in batch) == list(range(50))
    assert [len(batch) for batch in found] == [8] * 6 + [2]


def test_a_group_larger_than_there_are_batches_is_spread_evenly():
    found = batches("apart", groups=[0] * 20 + list(range(1, 21)))
    assert [sum(row < 20 for row in batch) for batch in found] == [4] * 5


def test_arranged_batches_are_the_same_on_any_number_of_processes():
    shares = [batches("apart", batch_size=4, process_index=rank, num_processes=2) for rank in (0, 1)]
    assert [first + second for first, second in zip(*shares, strict=True)] == batches("apart")


def test_rows_belong_together_through_others():
    captions = [["a cup", "a mug"], ["a jar"], ["a mug "], ["a pot"], [None, "a jar"]]
    table = Dataset.from_dict({"pair_id": [1, 2, 3, 3, 4], "caption": captions})
    groups = Arrangement("apart", table, "pair_id", "caption").groups.tolist()
    assert groups == [0, 1, 0, 0, 1]
    assert Arrangement("apart", table, "pair_id").groups.tolist() == [0, 1, 2, 2, 4]
    assert Arrangement("apart", table, "none", "caption").groups.tolist() == [0, 1, 0, 3, 1]


# --- training --------------------------------------------------------------------------------------------------------


def with_ids(pairs, ids):
    return pairs.remove_columns("pair_id").add_column("pair_id", ids)


def test_training_takes_pairs_of_one_id_as_positives_unless_told_otherwise(model, make_args, processor):
    pairs = with_ids(tiny_pairs(8), [0, 0, 1, 1, 2, 3, 4, 5])
    for meaning in ("positive", "neutral"):
        seen = []

        class Watch(Contrastive):
            def loss_terms(self, student, teacher, context, seen=seen):
                terms = super().loss_terms(student, teacher, context)
                embeds = (student.image.detach(), student.text.detach(), student.logit_scale.detach())
                seen.append((terms["contrastive"].item(), embeds, context.pair_ids))
                return terms

        args = make_args(max_steps=1, same_pair_id=meaning)
        trainer = ModXTrainer(model, args, train_dataset=pairs, processing_class=processor, loss_callbacks=[Watch()])
        trainer.train()
        ((loss, embeds, ids),) = seen
        assert sorted(ids.tolist()) == pairs["pair_id"][:]
        expected = info_nce(*embeds, pair_ids=ids, positives=meaning == "positive").item()
        assert loss == pytest.approx(expected) != info_nce(*embeds).item()


def test_chunks_and_replayed_pairs_with_ids_train_the_weights_of_one_batch(make_args, processor):
    new = with_ids(tiny_pairs(16), [row // 2 for row in range(16)])
    memory = with_ids(tiny_pairs(6, "yellow"), [0, 1, 2, 3, 90, 90])
    weights = []
    for size, accumulation, chunk in ((8, 1, None), (4, 2, 3)):
        model = tiny_clip(processor).double()
        args = make_args(
            max_steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            gradient_cache_chunk_size=chunk,
            pairs_in_batch="together",
            adam_epsilon=1e-4,
        )
        trainer = ModXTrainer(model, args, train_dataset=new, processing_class=processor, loss_callbacks="modx+er")
        trainer.use_memory(memory)
        trainer.train()
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-9


def train_together(folder, batch_size):
    processor = tiny_processor()
    model = tiny_clip(processor).double()
    settings = arguments(folder, batch_size, max_steps=3, pairs_in_batch="together", mask_duplicates=True)
    pairs = with_ids(tiny_pairs(16), [row // 3 for row in range(16)])
    trainer = ModXTrainer(model, settings, train_dataset=pairs, processing_class=processor, loss_callbacks="modx")
    trainer.train()
    save_file(dict(model.state_dict()), f"{folder}/rank-{settings.process_index}.safetensors")


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        launch(processes, train_together, tmp_path / name, 8 // processes)
    one, two = (tmp_path / name / "rank-0.safetensors" for name in ("one", "two"))
    assert largest_difference(one, two) < 1e-9


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"pairs_in_batch": "apart"}, {}, "needs a column 'pair_id'.*mask_duplicates"),
        ({"pairs_in_batch": "apart"}, {"data_collator": list}, "a data_collator has taken over"),
    ],
)
def test_what_belongs_together_must_be_known(model, make_args, processor, changes, options, message):
    data = tiny_pairs(8).remove_columns("pair_id")
    with pytest.raises(ValueError, match=message):
        ModXTrainer(model, make_args(**changes), train_dataset=data, processing_class=processor, **options)


@pytest.mark.parametrize("tests", [None, tiny_pairs(8), {"a": tiny_pairs(8)}], ids=["none", "one", "named"])
def test_trainer_refuses_a_column_of_ids_that_no_data_have(model, make_args, processor, tests):
    with pytest.raises(
        ValueError, match=r"no column 'pairid' \(pair_id_column\) in any part\. Did you mean 'pair_id'"
    ):
        ModXTrainer(
            model, make_args(pair_id_column="pairid"), train_dataset=tiny_pairs(8), eval_dataset=tests,
            processing_class=processor,
        )  # fmt: skip


def test_phase_may_lack_the_ids_that_others_have(model, make_args, processor):
    new = tiny_pairs(8, start=8).remove_columns("pair_id")
    stream = PhaseStream((Phase("one", tiny_pairs(8).rename_column("pair_id", "product")), Phase("two", new)))
    args = make_args(pair_id_column="product", max_steps=1)
    ContinualRun(stream, "finetune", args, model=model, processing_class=processor).run()


def test_later_phase_without_ids_is_refused_before_the_first_is_trained(make_args):
    later = tiny_pairs(8, start=8).remove_columns("pair_id")
    stream = PhaseStream((Phase("one", tiny_pairs(8)), Phase("two", later)))
    with pytest.raises(ValueError, match="pairs_in_batch='apart' needs a column 'pair_id'"):
        StreamChecks(make_args(pairs_in_batch="apart")).usable(stream, {})


@pytest.mark.parametrize(("recipe", "is_told"), [("er", True), ("joint", True), ("finetune", False)])
def test_ids_that_do_not_count_beside_pairs_without_any_are_told(model, make_args, processor, caplog, recipe, is_told):
    base = Phase("old", tiny_pairs(8, start=8).remove_columns("pair_id"))
    stream = PhaseStream((Phase("new", tiny_pairs(8)),), base=base)
    ContinualRun(stream, recipe, make_args(), model=model, processing_class=processor)
    assert ("no column 'pair_id' in 'old'" in caplog.text) == is_told


@pytest.mark.parametrize("name", ["same_pair_id", "pairs_in_batch"])
def test_unknown_choice_is_refused(make_args, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        make_args(**{name: "beside"})


def test_what_belongs_together_is_a_part_of_the_run_where_the_data_have_ids(make_args):
    def settings(data, **changes):
        stream = PhaseStream((Phase("one", data),))
        return run_identity("finetune", [Contrastive()], make_args(**changes), stream)

    before, now = (settings(tiny_pairs(8), same_pair_id=choice) for choice in ("neutral", "positive"))
    assert changes(before, now) == ["same_pair_id was 'neutral' and is 'positive'"]
    assert "same_pair_id" not in settings(tiny_pairs(8).remove_columns("pair_id"))["hyperparameters"]
