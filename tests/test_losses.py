"""Losses against a transcription of the paper's equations, row by row, in float64."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_modx.losses import Shard, affinity_distillation, info_nce, modx_loss, sigmoid_loss

N, DIM, TEACHER_DIM = 9, 6, 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}
LOGIT_SCALE = 14.0


def unit(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


class Batch:
    """Embeddings of a new and an old model, leaves with gradient; the old model gets some rows right."""

    def __init__(self, rows: int = N, seed: int = 0, dtype: torch.dtype = torch.float64):
        self.images = unit(rows, DIM, seed, dtype).requires_grad_()
        self.texts = unit(rows, DIM, seed + 100, dtype).requires_grad_()
        self.scale = torch.tensor(LOGIT_SCALE, dtype=dtype, requires_grad=True)
        self.old_texts = unit(rows, TEACHER_DIM, seed + 200, dtype)
        noise = 1.2 * unit(rows, TEACHER_DIM, seed + 300, dtype)
        self.old_images = F.normalize(self.old_texts + noise, dim=1)

    def distillation(self, **options):
        return affinity_distillation(self.images, self.texts, self.old_images, self.old_texts, **options)

    def modx(self, **options):
        return modx_loss(self.images, self.texts, self.old_images, self.old_texts, self.scale, **options)

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        leaves = [self.images, self.texts, self.scale]
        return [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(
                leaves, torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True), strict=True
            )
        ]


def candidates(row: int, rows: int, ids) -> list[int]:
    return [column for column in range(rows) if ids is None or column == row or ids[column] != ids[row]]


def reference_info_nce(images, texts, scale, ids=None):
    """Radford et al., figure 3: the mean of two cross-entropies."""
    total = 0.0
    for queries, keys in ((images, texts), (texts, images)):
        for row in range(len(queries)):
            columns = candidates(row, len(queries), ids)
            logits = scale * torch.stack([queries[row] @ keys[column] for column in columns])
            total = total - torch.log_softmax(logits, dim=0)[columns.index(row)] / len(queries)
    return total / 2


def reference_distillation(images, texts, old_images, old_texts, distill_scale=1.0, ids=None, screen=True):
    """Ni et al., section 4: old rows that are wrong are replaced by the current ones, then KL(old || new)."""
    directions, kept = [], []
    new_matrix, old_matrix = images @ texts.T, old_images @ old_texts.T
    for new, old in ((new_matrix, old_matrix), (new_matrix.T, old_matrix.T)):
        total, right = 0.0, 0
        for row in range(len(new)):
            columns = candidates(row, len(new), ids)
            new_row, old_row = new[row, columns], old[row, columns]
            if screen and old_row.argmax().item() != columns.index(row):
                old_row = new_row.detach()
            else:
                right += 1
            old_probs = torch.softmax(distill_scale * old_row, dim=0)
            new_probs = torch.softmax(distill_scale * new_row, dim=0)
            total = total + (old_probs * (old_probs.log() - new_probs.log())).sum()
        directions.append(total)
        kept.append(right / len(new))
    return (directions[0] + directions[1]) / 2, *kept


def reference_rectification(batch, distill_scale=1.0, ids=None, shared=False):
    """Of a row the old affinity where the old model is right, nothing where only the new one is, else the pairs."""
    directions, counts = [], {"kept": [], "rectified": []}
    new_matrix, old_matrix = batch.images @ batch.texts.T, batch.old_images @ batch.old_texts.T
    for new, old in ((new_matrix, old_matrix), (new_matrix.T, old_matrix.T)):
        total, kept, rectified = 0.0, 0, 0
        for row in range(len(new)):
            columns = list(range(len(new))) if shared else candidates(row, len(new), ids)
            partners = [column for column in columns if shared and ids[column] == ids[row]] or [row]
            own = [columns.index(partner) for partner in partners]
            new_row, old_row = new[row, columns], old[row, columns]
            log_probs = torch.log_softmax(distill_scale * new_row, dim=0)
            if old_row.argmax().item() in own:
                old_probs = torch.softmax(distill_scale * old_row, dim=0)
                total, kept = total + (old_probs * (old_probs.log() - log_probs)).sum(), kept + 1
            elif new_row.argmax().item() not in own:
                target = torch.full((len(own),), 1 / len(own), dtype=log_probs.dtype)
                total, rectified = total + (target * (target.log() - log_probs[own])).sum(), rectified + 1
        directions.append(total)
        counts["kept"].append(kept / len(new))
        counts["rectified"].append(rectified / len(new))
    return sum(directions) / 2, counts


def assert_same_gradients(batch: Batch, loss: torch.Tensor, expected: torch.Tensor, **tolerance):
    for found, wanted in zip(batch.gradients(loss), batch.gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, **(tolerance or EXACT))


def old_model_of_matrix(matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Old embeddings whose cosine matrix has these (unit-norm) rows."""
    images = F.normalize(torch.tensor(matrix, dtype=torch.float64), dim=1)
    return images, torch.eye(len(matrix), dtype=torch.float64)


# --- InfoNCE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_info_nce_is_the_mean_of_two_cross_entropies(seed):
    batch = Batch(seed=seed)
    loss = info_nce(batch.images, batch.texts, batch.scale)
    expected = reference_info_nce(batch.images, batch.texts, batch.scale)
    torch.testing.assert_close(loss, expected, **EXACT)
    assert_same_gradients(batch, loss, expected)


def test_info_nce_of_one_pair_is_zero():
    batch = Batch(rows=1)
    assert info_nce(batch.images, batch.texts, batch.scale).item() == 0.0


def test_info_nce_of_a_collapsed_model_is_log_n():
    images = unit(1, DIM, 0).repeat(N, 1)
    assert info_nce(images, images, LOGIT_SCALE).item() == pytest.approx(torch.tensor(float(N)).log().item())


def test_info_nce_takes_a_plain_number_as_scale():
    batch = Batch()
    loss = info_nce(batch.images, batch.texts, LOGIT_SCALE)
    torch.testing.assert_close(loss, info_nce(batch.images, batch.texts, batch.scale), **EXACT)


# --- screened distillation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distill_scale", [1.0, 7.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distillation_equals_literal_row_replacement(seed, distill_scale):
    batch = Batch(seed=seed)
    found = batch.distillation(distill_scale=distill_scale)
    expected, image_kept, text_kept = reference_distillation(
        batch.images, batch.texts, batch.old_images, batch.old_texts, distill_scale
    )
    assert 0 < image_kept < 1, "the batch must hold rows of both kinds"
    assert 0 < text_kept < 1, "the batch must hold rows of both kinds"
    torch.testing.assert_close(found.loss, expected, **EXACT)
    assert_same_gradients(batch, found.loss, expected)
    assert found.image_rows_kept.item() == pytest.approx(image_kept)
    assert found.text_rows_kept.item() == pytest.approx(text_kept)


def test_distillation_does_not_touch_logit_scale():
    batch = Batch()
    assert torch.autograd.grad(batch.modx().distillation, batch.scale, allow_unused=True)[0] is None


def test_distillation_without_screening_keeps_every_row():
    batch = Batch()
    found = batch.distillation(screen=False)
    expected, *_ = reference_distillation(batch.images, batch.texts, batch.old_images, batch.old_texts, screen=False)
    torch.testing.assert_close(found.loss, expected, **EXACT)
    assert_same_gradients(batch, found.loss, expected)
    assert found.image_rows_kept == found.text_rows_kept == 1


def test_each_direction_is_screened_by_its_own_rows():
    # Images 0 and 2 rank their own caption first; of the captions only 2 ranks its own image first.
    old_images, old_texts = old_model_of_matrix([[0.8, 0.6, 0.0], [0.9, 0.4, 0.0], [0.0, 0.0, 1.0]])
    found = affinity_distillation(unit(3, DIM, 0), unit(3, DIM, 1), old_images, old_texts)
    assert found.image_rows_kept.item() == pytest.approx(2 / 3)
    assert found.text_rows_kept.item() == pytest.approx(1 / 3)


def test_swapping_the_modalities_swaps_the_directions():
    batch = Batch()
    swapped = affinity_distillation(batch.texts, batch.images, batch.old_texts, batch.old_images)
    torch.testing.assert_close(swapped.loss, batch.distillation().loss, **EXACT)
    assert swapped.image_rows_kept == batch.distillation().text_rows_kept


def test_row_that_is_not_kept_has_exactly_zero_gradient():
    # Image 2 alone is right, no caption is: the gradient of the images can come from row 2 only.
    old_images, old_texts = old_model_of_matrix([[0.0, 0.8, 0.6], [0.7, 0.0, 0.71], [0.6, 0.5, 0.62]])
    images, texts = unit(3, DIM, 0).requires_grad_(), unit(3, DIM, 1)
    found = affinity_distillation(images, texts, old_images, old_texts)
    assert (found.image_rows_kept.item(), found.text_rows_kept.item()) == (pytest.approx(1 / 3), 0.0)
    (gradient,) = torch.autograd.grad(found.loss, images)
    assert torch.equal(gradient[:2], torch.zeros(2, DIM, dtype=torch.float64))
    assert gradient[2].abs().max() > 0


def test_nothing_kept_gives_a_loss_of_exactly_zero():
    old_images, old_texts = old_model_of_matrix([[0.0, 1.0], [1.0, 0.0]])
    batch = Batch(rows=2)
    found = affinity_distillation(batch.images, batch.texts, old_images, old_texts)
    assert found.loss.item() == pytest.approx(0.0, abs=1e-12)
    assert all(gradient.abs().max() == 0 for gradient in batch.gradients(found.loss))


@pytest.mark.parametrize("matrix", [[[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]], ids=["later", "earlier"])
def test_a_tie_is_kept(matrix):
    old_images, old_texts = old_model_of_matrix(matrix)
    found = affinity_distillation(unit(2, DIM, 0), unit(2, DIM, 1), old_images, old_texts)
    assert found.image_rows_kept == found.text_rows_kept == 1


@pytest.mark.parametrize("chunk_size", [None, 1, 332])
def test_a_tie_is_kept_in_fp32_whatever_the_block(chunk_size):
    old_images = unit(1, 256, 0, torch.float32).repeat(333, 1)
    old_texts = unit(1, 256, 1, torch.float32).repeat(333, 1)
    new = unit(333, DIM, 2, torch.float32)
    found = affinity_distillation(new, new, old_images, old_texts, chunk_size=chunk_size)
    assert found.image_rows_kept == found.text_rows_kept == 1


@pytest.mark.parametrize(("units", "kept"), [(8, 1.0), (9, 0.5)])
def test_a_tie_ends_8_units_in_the_last_place_above_the_partner(units, kept):
    old_images = torch.tensor([[0.75, 0.75 + units * torch.finfo(torch.float64).eps], [0.0, 1.0]], dtype=torch.float64)
    old_texts = torch.eye(2, dtype=torch.float64)
    found = affinity_distillation(unit(2, DIM, 0), unit(2, DIM, 1), old_images, old_texts)
    assert found.image_rows_kept.item() == kept


def test_a_slightly_larger_column_is_no_tie():
    old_images, old_texts = old_model_of_matrix([[1.0, 1.0 + 1e-5], [0.0, 1.0]])
    found = affinity_distillation(unit(2, DIM, 0), unit(2, DIM, 1), old_images.float(), old_texts.float())
    assert found.image_rows_kept.item() == 0.5


def test_mean_divides_by_all_rows():
    batch = Batch()
    mean, total = batch.distillation(reduction="mean"), batch.distillation(reduction="sum")
    assert mean.image_rows_kept < 1
    torch.testing.assert_close(mean.loss, total.loss / N, **EXACT)


def test_a_model_that_did_not_move_pays_nothing():
    batch = Batch()
    found = affinity_distillation(batch.images, batch.texts, batch.images, batch.texts, screen=False)
    assert abs(found.loss.item()) < 1e-14


def test_a_common_rotation_of_both_towers_pays_nothing():
    batch = Batch()
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[
        0
    ]
    found = affinity_distillation(
        batch.images @ rotation, batch.texts @ rotation, batch.images, batch.texts, screen=False
    )
    assert abs(found.loss.item()) < 1e-14


def test_the_old_model_gets_no_gradient():
    batch = Batch()
    batch.old_images.requires_grad_()
    batch.old_texts.requires_grad_()
    batch.modx().loss.backward()
    assert batch.old_images.grad is None
    assert batch.old_texts.grad is None
    assert batch.images.grad is not None


def test_kept_fractions_carry_no_gradient():
    found = Batch().distillation()
    assert not found.image_rows_kept.requires_grad
    assert not found.text_rows_kept.requires_grad


# --- values that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_old_image_that_is_not_finite_is_left_out_without_harm(value, chunk_size):
    batch = Batch()
    clean = batch.distillation()
    right = (batch.old_images @ batch.old_texts.T).argmax(dim=1) == torch.arange(N)
    broken = int(right.nonzero()[0])
    batch.old_images[broken, 0] = value
    found = batch.distillation(chunk_size=chunk_size)
    assert found.image_rows_kept.item() == pytest.approx(clean.image_rows_kept.item() - 1 / N)
    assert found.text_rows_kept.item() == 0.0, "every caption has the broken image among its candidates"
    assert torch.isfinite(found.loss)
    assert all(torch.isfinite(gradient).all() for gradient in batch.gradients(found.loss))


def test_the_other_rows_count_as_before_beside_a_broken_one():
    batch = Batch()
    batch.old_images[0] = float("nan")
    new, old = batch.images @ batch.texts.T, batch.old_images @ batch.old_texts.T
    expected = 0.0
    for row in range(1, N):
        if old[row].argmax() == row:
            old_probs = torch.softmax(old[row], dim=0)
            expected = expected + (old_probs * (old_probs.log() - torch.log_softmax(new[row], dim=0))).sum() / 2
    found = batch.distillation()
    torch.testing.assert_close(found.loss, expected, **EXACT)
    assert_same_gradients(batch, found.loss, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_new_embedding_that_is_not_finite_makes_every_loss_not_finite(value):
    batch = Batch()
    with torch.no_grad():
        batch.texts[3, 2] = value
    assert not torch.isfinite(info_nce(batch.images, batch.texts, batch.scale))
    assert not torch.isfinite(batch.distillation().loss)
    assert not torch.isfinite(batch.modx().loss)


def test_new_embedding_that_is_not_finite_shows_even_where_nothing_is_kept():
    old_images, old_texts = old_model_of_matrix([[0.0, 1.0], [1.0, 0.0]])
    images = unit(2, DIM, 0)
    images[0, 0] = float("nan")
    assert not torch.isfinite(affinity_distillation(images, unit(2, DIM, 1), old_images, old_texts).loss)


# --- rectifying what both models get wrong ---------------------------------------------------------------------------

DIFFERENT, NEUTRAL, SHARED = (None, False), ([4, 7, 4, 1, 9, 7, 4, 2, 3], False), ([4, 7, 4, 1, 9, 7, 4, 2, 3], True)


@pytest.mark.parametrize("distill_scale", [1.0, 60.0])
@pytest.mark.parametrize("relations", [DIFFERENT, NEUTRAL, SHARED], ids=["different", "neutral", "positives"])
def test_rectifying_treats_each_row_by_who_gets_it_right(relations, distill_scale):
    """Alone and beside InfoNCE, in blocks and in one."""
    ids, shared = relations
    batch = Batch(seed=3)
    expected, counts = reference_rectification(batch, distill_scale, ids, shared)
    for kept, rectified in zip(*counts.values(), strict=True):
        assert min(kept, rectified, 1 - kept - rectified) > 1e-6, "the batch must hold rows of all kinds"
    options = {"screen": "rectify", "distill_scale": distill_scale, "positives": shared}
    options["pair_ids"] = None if ids is None else torch.tensor(ids)
    for chunk_size in (None, 2):
        found, modx = (make(chunk_size=chunk_size, **options) for make in (batch.distillation, batch.modx))
        for result, divergence in ((found, found.loss), (modx, modx.distillation)):
            torch.testing.assert_close(divergence, expected, **EXACT)
            assert_same_gradients(batch, divergence, expected)
            for kind, fractions in counts.items():
                sides = [getattr(result, f"{side}_rows_{kind}").item() for side in ("image", "text")]
                assert sides == pytest.approx(fractions)


def test_rectifying_is_screening_and_a_part_of_its_own_that_rows_share():
    batch, rows = Batch(), torch.arange(N) % 3 == 0
    whole, screened = batch.distillation(screen="rectify"), batch.distillation()
    assert whole.loss > screened.loss and whole.image_rows_kept == screened.image_rows_kept
    parts = [batch.distillation(row_weights=which, screen="rectify").loss for which in (rows, ~rows)]
    torch.testing.assert_close(sum(parts), whole.loss, **EXACT)


def test_row_of_which_the_old_model_says_nothing_is_not_rectified():
    batch = Batch()
    batch.old_texts[0] = float("nan")
    found = batch.distillation(screen="rectify")
    assert found.image_rows_kept == found.image_rows_rectified == 0 and found.text_rows_rectified > 0
    assert all(torch.isfinite(gradient).all() for gradient in batch.gradients(found.loss))


@pytest.mark.parametrize("make", [Batch.distillation, Batch.modx])
def test_unknown_screening_is_refused(make):
    with pytest.raises(ValueError, match="screen must be true, false or \"rectify\", got 'rectfy'"):
        make(Batch(), screen="rectfy")


# --- Mod-X -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "reduction"), [(20.0, "sum"), (3.5, "sum"), (5600.0, "mean")])
def test_modx_is_contrastive_plus_alpha_times_distillation(alpha, reduction):
    batch = Batch()
    found = batch.modx(alpha=alpha, reduction=reduction)
    contrastive = reference_info_nce(batch.images, batch.texts, batch.scale)
    distillation, *_ = reference_distillation(batch.images, batch.texts, batch.old_images, batch.old_texts)
    distillation = distillation / (N if reduction == "mean" else 1)
    torch.testing.assert_close(found.contrastive, contrastive, **EXACT)
    torch.testing.assert_close(found.distillation, distillation, **EXACT)
    torch.testing.assert_close(found.loss, contrastive + alpha * distillation, **EXACT)
    assert_same_gradients(batch, found.loss, contrastive + alpha * distillation)


def test_modx_defaults_are_those_of_the_authors_code():
    batch = Batch()
    explicit = batch.modx(alpha=20.0, distill_scale=1.0, reduction="sum", pair_ids=None, chunk_size=None)
    assert batch.modx().loss == explicit.loss


def test_modx_reports_the_kept_fractions_of_the_distillation():
    batch = Batch()
    found, distilled = batch.modx(), batch.distillation()
    assert found.image_rows_kept == distilled.image_rows_kept
    assert found.text_rows_kept == distilled.text_rows_kept


def test_modx_with_alpha_zero_is_plain_contrastive_learning():
    batch = Batch()
    assert batch.modx(alpha=0.0).loss == info_nce(batch.images, batch.texts, batch.scale)


def test_modx_passes_distill_scale_on():
    batch = Batch()
    assert batch.modx(distill_scale=4.0).distillation == batch.distillation(distill_scale=4.0).loss


def test_gradients_agree_with_finite_differences():
    batch = Batch(rows=5)

    def loss(images, texts, scale):
        return modx_loss(images, texts, batch.old_images, batch.old_texts, scale, distill_scale=2.0).loss

    assert torch.autograd.gradcheck(loss, (batch.images, batch.texts, batch.scale))


# --- duplicates ------------------------------------------------------------------------------------------------------

IDS = torch.tensor([4, 7, 4, 1, 9, 7, 4, 2, 3])


def test_info_nce_with_ids_equals_deleting_the_duplicates_columns():
    batch = Batch()
    loss = info_nce(batch.images, batch.texts, batch.scale, pair_ids=IDS)
    expected = reference_info_nce(batch.images, batch.texts, batch.scale, IDS.tolist())
    torch.testing.assert_close(loss, expected, **EXACT)
    assert_same_gradients(batch, loss, expected)


@pytest.mark.parametrize("screen", [True, False])
def test_distillation_with_ids_equals_deleting_the_duplicates_columns(screen):
    batch = Batch()
    found = batch.distillation(pair_ids=IDS, screen=screen)
    expected, image_kept, text_kept = reference_distillation(
        batch.images, batch.texts, batch.old_images, batch.old_texts, ids=IDS.tolist(), screen=screen
    )
    torch.testing.assert_close(found.loss, expected, **EXACT)
    assert_same_gradients(batch, found.loss, expected)
    assert found.image_rows_kept.item() == pytest.approx(image_kept)
    assert found.text_rows_kept.item() == pytest.approx(text_kept)


def test_a_duplicate_that_the_old_model_prefers_does_not_screen_a_row_out():
    old_images, old_texts = old_model_of_matrix([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    new = unit(3, DIM, 0), unit(3, DIM, 1)
    assert affinity_distillation(*new, old_images, old_texts).image_rows_kept.item() == pytest.approx(2 / 3)
    ids = torch.tensor([5, 5, 6])
    assert affinity_distillation(*new, old_images, old_texts, pair_ids=ids).image_rows_kept == 1


def test_ids_that_are_all_different_change_nothing():
    batch = Batch()
    assert batch.modx(pair_ids=torch.arange(N)).loss == batch.modx().loss


def test_ids_that_are_all_the_same_leave_nothing_to_learn():
    found = Batch().modx(pair_ids=torch.zeros(N, dtype=torch.long))
    assert found.loss.item() == pytest.approx(0.0, abs=1e-12)


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair_ids", [None, IDS], ids=["no ids", "ids"])
@pytest.mark.parametrize("chunk_size", [1, 3, N - 1, N, N + 5])
def test_blocks_change_neither_values_nor_gradients(chunk_size, pair_ids):
    batch = Batch()
    whole, blocks = batch.modx(pair_ids=pair_ids), batch.modx(pair_ids=pair_ids, chunk_size=chunk_size)
    for name in ("loss", "contrastive", "distillation", "image_rows_kept", "text_rows_kept"):
        torch.testing.assert_close(getattr(blocks, name), getattr(whole, name), **EXACT)
    assert_same_gradients(batch, blocks.loss, whole.loss)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_bf16_embeddings_are_accumulated_in_fp32(chunk_size):
    batch = Batch(rows=64, dtype=torch.bfloat16)
    found = batch.modx(chunk_size=chunk_size)
    expected = modx_loss(
        batch.images.float(),
        batch.texts.float(),
        batch.old_images.float(),
        batch.old_texts.float(),
        batch.scale.float(),
    )
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.contrastive, expected.contrastive, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.distillation, expected.distillation, rtol=1e-5, atol=1e-6)
    assert all(gradient.dtype == torch.bfloat16 for gradient in batch.gradients(found.loss))


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_autocast_does_not_lower_the_precision(chunk_size):
    batch = Batch(rows=64, dtype=torch.float32)
    plain = batch.modx(chunk_size=chunk_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = batch.modx(chunk_size=chunk_size)
    assert inside.loss.dtype == torch.float32
    torch.testing.assert_close(inside.loss, plain.loss, rtol=1e-6, atol=1e-6)
    assert_same_gradients(batch, inside.loss, plain.loss, rtol=1e-5, atol=1e-6)


def test_float64_stays_float64():
    assert Batch().modx().loss.dtype == torch.float64


# --- refusals --------------------------------------------------------------------------------------------------------

PAIR = unit(4, DIM, 0), unit(4, DIM, 1)


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        (unit(4, DIM, 0), unit(3, DIM, 1)),
        (unit(4, DIM, 0), unit(4, DIM + 1, 1)),
        (unit(4, DIM, 0)[0], unit(4, DIM, 1)[0]),
        (unit(4, DIM, 0)[:0], unit(4, DIM, 1)[:0]),
    ],
    ids=["other number", "other width", "vectors", "no rows"],
)
def test_embeddings_that_do_not_fit_are_refused(images, texts):
    with pytest.raises(ValueError, match="two \\(N, D\\) matrices"):
        info_nce(images, texts, 1.0)
    with pytest.raises(ValueError, match="two \\(N, D\\) matrices"):
        affinity_distillation(images, texts, *PAIR)
    with pytest.raises(ValueError, match="two \\(N, D\\) matrices"):
        affinity_distillation(*PAIR, images, texts)


@pytest.mark.parametrize("ids", [torch.arange(3), torch.arange(4.0), torch.zeros(2, 2, dtype=torch.long)])
def test_ids_that_are_not_one_integer_a_pair_are_refused(ids):
    with pytest.raises(ValueError, match="pair_ids must be 4 integers"):
        info_nce(*PAIR, 1.0, pair_ids=ids)
    with pytest.raises(ValueError, match="pair_ids must be 4 integers"):
        affinity_distillation(*PAIR, *PAIR, pair_ids=ids)


@pytest.mark.parametrize("weights", [torch.ones(3, dtype=torch.bool), torch.arange(4)])
def test_row_weights_that_are_not_one_float_a_pair_are_refused(weights):
    with pytest.raises(ValueError, match="row_weights must be 4 floats or booleans"):
        affinity_distillation(*PAIR, *PAIR, row_weights=weights)
    with pytest.raises(ValueError, match="row_weights must be 4 floats or booleans"):
        modx_loss(*PAIR, *PAIR, 1.0, row_weights=weights)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("screen", [True, False, "rectify"])
def test_weighted_rows_are_their_parts_of_the_whole_so_often(screen, chunk_size):
    batch, some = Batch(), torch.arange(N) % 3
    found = batch.distillation(row_weights=torch.tensor([0.5, 3.0, 0.0])[some], screen=screen, chunk_size=chunk_size)
    half, thrice = (batch.distillation(row_weights=some == which, screen=screen) for which in (0, 1))
    expected = 0.5 * half.loss + 3 * thrice.loss
    torch.testing.assert_close(found.loss, expected, **EXACT)
    assert_same_gradients(batch, found.loss, expected)
    counted = half.image_rows_kept * (some == 0).sum() + thrice.image_rows_kept * (some == 1).sum()
    assert found.image_rows_kept.item() == pytest.approx((counted / (some < 2).sum()).item())


def test_distillation_of_some_rows_is_the_part_of_the_whole_that_they_have():
    batch, rows = Batch(), torch.arange(N) % 3 == 0
    parts = [batch.distillation(row_weights=which, screen=False).loss for which in (rows, ~rows)]
    torch.testing.assert_close(sum(parts), batch.distillation(screen=False).loss, **EXACT)
    assert all(part > 0 for part in parts)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("screen", [True, False, "rectify"])
def test_modx_distils_the_rows_that_the_distillation_alone_does(screen, reduction):
    batch, options = Batch(), {"row_weights": torch.arange(N) % 3 == 0, "screen": screen, "reduction": reduction}
    whole, part = batch.modx(**options), batch.distillation(**options)
    torch.testing.assert_close(whole.contrastive, batch.modx().contrastive, **EXACT)
    torch.testing.assert_close(whole.distillation, part.loss, **EXACT)
    assert_same_gradients(batch, whole.distillation, part.loss)
    for name in ("image_rows_kept", "text_rows_kept", "image_rows_rectified", "text_rows_rectified"):
        assert getattr(whole, name) == getattr(part, name)


def test_old_model_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="embedded 3 pairs and the new one 4"):
        affinity_distillation(*PAIR, unit(3, DIM, 0), unit(3, DIM, 1))


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'batchmean'"):
        modx_loss(*PAIR, *PAIR, 1.0, reduction="batchmean")


def test_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha must not be negative"):
        modx_loss(*PAIR, *PAIR, 1.0, alpha=-1.0)


def test_chunk_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        info_nce(*PAIR, 1.0, chunk_size=0)


# --- The kernel ------------------------------------------------------------------------------------------------------

# With a small scale rows and columns share their powers, with a large one they are shifted.
SCALES = [2.0, 14.0, 100.0]
BOTH_IDS = torch.tensor([[4, 1], [7, 2], [4, 3], [1, 4], [9, 2], [7, 6], [4, 7], [2, 8], [3, 1]])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_every_scale_gives_the_values_of_the_reference(scale, chunk_size):
    batch = Batch()
    batch.scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    found = batch.modx(distill_scale=scale / 2, chunk_size=chunk_size)
    contrastive = reference_info_nce(batch.images, batch.texts, batch.scale)
    embeds = (batch.images, batch.texts, batch.old_images, batch.old_texts)
    distillation, *kept = reference_distillation(*embeds, distill_scale=scale / 2)
    torch.testing.assert_close(found.contrastive, contrastive, **EXACT)
    torch.testing.assert_close(found.distillation, distillation, rtol=1e-11, atol=1e-11)
    assert [found.image_rows_kept.item(), found.text_rows_kept.item()] == pytest.approx(kept)
    assert_same_gradients(batch, found.loss, contrastive + 20 * distillation, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_numerical_gradients(scale):
    batch = Batch(rows=5)

    def losses(images, texts, log_scale):
        found = modx_loss(
            F.normalize(images, dim=1), F.normalize(texts, dim=1), batch.old_images, batch.old_texts, log_scale.exp()
        )
        return found.contrastive, found.distillation

    log_scale = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
    assert torch.autograd.gradcheck(losses, (batch.images, batch.texts, log_scale))


def test_rows_that_agree_in_any_id_are_no_candidates_of_each_other():
    batch = Batch()
    found = batch.modx(pair_ids=BOTH_IDS, chunk_size=4)
    same = (BOTH_IDS[:, None] == BOTH_IDS[None]).any(dim=-1) & ~torch.eye(N, dtype=torch.bool)
    logits = (batch.scale * batch.images @ batch.texts.T).masked_fill(same, -torch.inf)
    target = torch.arange(N)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(found.contrastive, expected, **EXACT)
    assert_same_gradients(batch, found.contrastive, expected)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_extra_texts_widen_the_image_to_text_denominators_only(chunk_size, scale):
    batch, extra = Batch(), unit(4, DIM, 77).requires_grad_()
    found = info_nce(batch.images, batch.texts, scale, extra_text_embeds=extra, chunk_size=chunk_size)
    target = torch.arange(N)
    logits = scale * batch.images @ torch.cat([batch.texts, extra]).T
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :N].T, target)) / 2
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients(batch, found, expected, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(loss, extra, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("distill_scale", [1.0, 50.0])
def test_extra_texts_are_candidates_in_the_distillation(distill_scale):
    batch, extra, old_extra = Batch(), unit(4, DIM, 77), unit(4, TEACHER_DIM, 78)
    found = batch.distillation(
        extra_text_embeds=extra, teacher_extra_text_embeds=old_extra, distill_scale=distill_scale, screen=False
    )
    new = distill_scale * batch.images @ torch.cat([batch.texts, extra]).T
    old = distill_scale * batch.old_images @ torch.cat([batch.old_texts, old_extra]).T
    by_image = F.kl_div(new.log_softmax(1), old.log_softmax(1), log_target=True, reduction="sum")
    new, old = new[:, :N].T, old[:, :N].T
    by_text = F.kl_div(new.log_softmax(1), old.log_softmax(1), log_target=True, reduction="sum")
    torch.testing.assert_close(found.loss, (by_image + by_text) / 2, rtol=1e-11, atol=1e-11)
    assert_same_gradients(batch, found.loss, (by_image + by_text) / 2, rtol=1e-10, atol=1e-10)


def test_extra_texts_of_one_model_only_are_refused():
    with pytest.raises(ValueError, match="of both models"):
        Batch().distillation(extra_text_embeds=unit(4, DIM, 77))


def test_extra_texts_of_another_width_are_refused():
    batch = Batch()
    with pytest.raises(ValueError, match="Extra text embeddings must be"):
        info_nce(batch.images, batch.texts, 1.0, extra_text_embeds=unit(4, DIM + 1, 77))


class Exchange:
    """What processes do when they gather, for threads: each waits for all others."""

    def __init__(self, number: int):
        self.barrier = threading.Barrier(number, timeout=20)
        self.parts = [None] * number

    def gather(self, index: int):
        def stacked(tensor):
            self.parts[index] = tensor
            self.barrier.wait()
            result = torch.stack(self.parts)
            self.barrier.wait()
            return result

        return stacked


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("bounds", [[0, 5, 9], [0, 0, 1, 9]], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        {"pair_ids": IDS},
        {"pair_ids": BOTH_IDS, "positives": True},
        {"screen": "rectify", "row_weights": torch.arange(N) % 3 * 1.5},
        {"screen": "rectify", "pair_ids": BOTH_IDS, "positives": True},
    ],
    ids=["one", "two", "rectifying some", "rectifying two"],
)
def test_shards_sum_to_the_whole(rows, bounds, scale):
    batch = Batch()
    batch.scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    options = {**rows, "distill_scale": scale / 2}
    whole = batch.modx(**options)
    number = len(bounds) - 1
    exchange = Exchange(number)

    def one_process(index):
        shard = Shard(bounds[index], bounds[index + 1], number, exchange.gather(index))
        found = batch.modx(shard=shard, chunk_size=2, **options)
        return found, batch.gradients(found.loss)

    with ThreadPoolExecutor(number) as pool:
        answers = list(pool.map(one_process, range(number)))
    for found, _ in answers:
        for name in vars(whole):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-11, atol=1e-11)
    for parts, expected in zip(
        zip(*[grads for _, grads in answers], strict=True), batch.gradients(whole.loss), strict=True
    ):
        torch.testing.assert_close(sum(parts) / number, expected, rtol=1e-10, atol=1e-10)


def test_two_calls_give_the_same_bits():
    batch = Batch(rows=200, dtype=torch.float32)
    first, second = batch.modx(chunk_size=64), batch.modx(chunk_size=64)
    assert torch.equal(first.loss, second.loss)
    for one, other in zip(batch.gradients(first.loss), batch.gradients(second.loss), strict=True):
        assert torch.equal(one, other)


def test_gradient_in_single_precision_is_as_exact_as_autograd():
    batch = Batch(rows=500, dtype=torch.float32)
    double = Batch(rows=500)
    found, exact = batch.gradients(batch.modx().loss), double.gradients(double.modx().loss)
    for single, wanted in zip(found, exact, strict=True):
        assert (single.double() - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("scale", [31.0, 100.0])
def test_single_precision_stands_the_largest_scale(scale):
    batch, double = Batch(rows=60, dtype=torch.float32), Batch(rows=60)
    batch.scale, double.scale = (
        torch.tensor(scale, dtype=each.images.dtype, requires_grad=True) for each in (batch, double)
    )
    found = batch.gradients(batch.modx(chunk_size=7, distill_scale=scale / 2, alpha=0.1).loss)
    exact = double.gradients(double.modx(distill_scale=scale / 2, alpha=0.1).loss)
    for single, wanted in zip(found, exact, strict=True):
        assert (single.double() - wanted).norm() / wanted.norm() < 1e-5


def test_a_column_far_from_all_images_does_not_underflow():
    """exp(100 * -0.99) is next to nothing in fp32, and the text's own probabilities are as large as any."""
    texts = unit(4, DIM, 0, torch.float32)
    images = F.normalize(-texts[:1] + 0.05 * unit(4, DIM, 1, torch.float32), dim=1)
    found = info_nce(images, texts, 100.0, chunk_size=2)
    torch.testing.assert_close(found.double(), info_nce(images.double(), texts.double(), 100.0), rtol=1e-5, atol=0)


def test_ids_of_which_one_kind_never_repeats_still_count():
    batch = Batch()
    unique = torch.stack([torch.arange(N), IDS], dim=1)
    torch.testing.assert_close(batch.modx(pair_ids=unique).loss, batch.modx(pair_ids=IDS).loss, **EXACT)
    assert batch.modx(pair_ids=unique).loss != batch.modx().loss


def test_second_derivatives_are_refused():
    batch = Batch()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(batch.modx().loss, batch.images, create_graph=True)


def test_scale_may_have_one_element():
    batch = Batch()
    one = batch.scale.detach()[None].requires_grad_()
    info_nce(batch.images, batch.texts, one).backward()
    expected = batch.gradients(info_nce(batch.images, batch.texts, batch.scale))[2]
    torch.testing.assert_close(one.grad, expected[None], **EXACT)


# --- the sigmoid loss ------------------------------------------------------------------------------------------------


class SigmoidBatch(Batch):
    """With a bias in the place of an old model."""

    def __init__(self, rows: int = N, dtype: torch.dtype = torch.float64):
        super().__init__(rows, dtype=dtype)
        self.bias = torch.tensor(-10.0, dtype=dtype, requires_grad=True)

    def leaves(self) -> list[torch.Tensor]:
        return [self.images, self.texts, self.scale, self.bias]

    def loss(self, **options):
        return sigmoid_loss(*self.leaves(), **options)

    def reference(self, ids=None, extra=None):
        """Zhai et al., section 3.2, one pair after the other."""
        total = 0.0
        for row, image in enumerate(self.images):
            for column, text in enumerate(self.texts):
                together = row == column or (ids is not None and ids[row] == ids[column])
                logit = self.scale * image @ text + self.bias
                total = total - F.logsigmoid(logit if together else -logit)
            for text in extra if extra is not None else []:
                total = total - F.logsigmoid(-(self.scale * image @ text + self.bias))
        return total / len(self.images)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, N + 5])
@pytest.mark.parametrize("pair_ids", [None, IDS], ids=["no ids", "ids"])
@pytest.mark.parametrize("extra", [False, True])
def test_sigmoid_loss_and_gradients_are_those_of_the_paper(chunk_size, pair_ids, extra):
    batch = SigmoidBatch()
    more = unit(4, DIM, 55).requires_grad_() if extra else None
    leaves = [*batch.leaves(), *([more] if extra else [])]
    expected = batch.reference(pair_ids, more)
    found = batch.loss(pair_ids=pair_ids, extra_text_embeds=more, chunk_size=chunk_size)
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_sigmoid_loss_takes_plain_numbers_as_scale_and_bias():
    batch = SigmoidBatch()
    scale, bias = 14.1, -10.3
    expected = sigmoid_loss(batch.images, batch.texts, *(torch.tensor(x, dtype=torch.float64) for x in (scale, bias)))
    torch.testing.assert_close(sigmoid_loss(batch.images, batch.texts, scale, bias), expected, **EXACT)


@pytest.mark.parametrize("bounds", [[0, 5, 9], [0, 0, 1, 9]], ids=str)
def test_shards_of_the_sigmoid_loss_sum_to_the_whole(bounds):
    batch = SigmoidBatch()
    number = len(bounds) - 1
    exchange = Exchange(number)

    def one_process(index):
        shard = Shard(bounds[index], bounds[index + 1], number, exchange.gather(index))
        loss = batch.loss(pair_ids=IDS, shard=shard, chunk_size=2)
        return loss, torch.autograd.grad(loss, batch.leaves())

    with ThreadPoolExecutor(number) as pool:
        answers = list(pool.map(one_process, range(number)))
    whole = batch.loss(pair_ids=IDS)
    assert all(torch.allclose(loss, whole, **EXACT) for loss, _ in answers)
    parts = zip(*[gradients for _, gradients in answers], strict=True)
    for shares, expected in zip(parts, torch.autograd.grad(whole, batch.leaves()), strict=True):
        torch.testing.assert_close(sum(shares) / number, expected, **EXACT)


def test_sigmoid_loss_of_bf16_embeddings_is_accumulated_in_fp32():
    batch = SigmoidBatch(rows=64, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = batch.loss(chunk_size=16)
    expected = sigmoid_loss(*(leaf.float() for leaf in batch.leaves()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert all(gradient.dtype == torch.bfloat16 for gradient in torch.autograd.grad(found, batch.leaves()))


def test_sigmoid_loss_in_single_precision_is_as_exact_as_autograd():
    batch, double = SigmoidBatch(rows=500, dtype=torch.float32), SigmoidBatch(rows=500)
    found = torch.autograd.grad(batch.loss(), batch.leaves())
    exact = torch.autograd.grad(double.loss(), double.leaves())
    for single, wanted in zip(found, exact, strict=True):
        assert (single.double() - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_embedding_that_is_not_finite_makes_the_sigmoid_loss_not_finite(value):
    batch = SigmoidBatch()
    batch.images = batch.images.detach().clone()
    batch.images[3, 0] = value
    assert not batch.loss(chunk_size=2).isfinite()


def test_second_derivatives_of_the_sigmoid_loss_are_refused():
    batch = SigmoidBatch()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(batch.loss(), batch.images, create_graph=True)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation has made at once."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_sigmoid_loss_holds_no_matrix_of_all_pairs():
    batch = SigmoidBatch(rows=50)
    with LargestTensor() as largest:
        torch.autograd.grad(batch.loss(pair_ids=torch.arange(50) // 2, chunk_size=4), batch.leaves())
    assert largest.elements <= max(4 * 50, 50 * DIM)
