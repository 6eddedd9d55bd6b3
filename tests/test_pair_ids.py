"""Pairs that belong together: positives of each other in the losses, right answers in screening, and where the sampler
puts them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from test_losses import BOTH_IDS, EXACT, IDS, Batch, Exchange, SigmoidBatch, assert_same_gradients, old_model_of_matrix

from hf_modx.losses import Shard, affinity_distillation, info_nce

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


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("bounds", [[0, 5, 9], [0, 0, 1, 9]], ids=str)
def test_shards_with_positives_sum_to_the_whole(bounds, scale):
    batch = Batch()
    batch.scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    options = {"pair_ids": BOTH_IDS, "positives": True, "distill_scale": scale / 2}
    number = len(bounds) - 1
    exchange = Exchange(number)

    def one_process(index):
        shard = Shard(bounds[index], bounds[index + 1], number, exchange.gather(index))
        found = batch.modx(shard=shard, chunk_size=2, **options)
        return found, batch.gradients(found.loss)

    with ThreadPoolExecutor(number) as pool:
        answers = list(pool.map(one_process, range(number)))
    whole = batch.modx(**options)
    for found, _ in answers:
        for name in ("contrastive", "distillation", "image_rows_kept", "text_rows_kept"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-11, atol=1e-11)
    parts = zip(*[gradients for _, gradients in answers], strict=True)
    for shares, expected in zip(parts, batch.gradients(whole.loss), strict=True):
        torch.testing.assert_close(sum(shares) / number, expected, rtol=1e-10, atol=1e-10)


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
