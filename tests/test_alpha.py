"""What alpha means in batches of different sizes, and when Mod-X says that it has too little or too much to keep."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distributed import arguments
from torch.nn.functional import normalize

from hf_modx import ModX, ModXTrainer, PairEmbeddings
from hf_modx.callbacks import LossContext
from hf_modx.callbacks.modx import reference_batches
from hf_modx.losses import affinity_distillation
from hf_modx.losses.affinity import rows_ranked_first

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor

SCALE = torch.tensor(14.0)


def context(rows, positives=False, order=None, replayed=0):
    ids = torch.arange(rows) if order is None else order
    return LossContext(None, {}, ids, ids, ids >= rows - replayed, 0, 0.0, {}, positives)


def embeddings(rows, noise, seed=0):
    """Unit-norm images, and texts that are their noisy copies: with more noise fewer rows are kept."""
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(rows, 16, generator=generator, dtype=torch.float64), dim=1)
    text = normalize(image + noise * torch.randn(rows, 16, generator=generator, dtype=torch.float64), dim=1)
    return PairEmbeddings(image, text, SCALE, None)


def term(callback, student, teacher, **options):
    own = context(len(student.image), **options)
    return callback.loss_terms(student, teacher, own)["modx_distillation"], own.metrics


def test_at_the_reference_alpha_is_what_it_is():
    student, teacher = embeddings(24, 0.5, seed=1), embeddings(24, 0.5)
    plain, _ = term(ModX(3.0), student, teacher)
    for reference in (ModX(3.0, reference_batch_size=24), ModX(3.0, reference_batch_size=24, screen=False)):
        _, metrics = term(reference, student, teacher)
        assert metrics["modx_alpha"].item() == pytest.approx(3.0)
    assert term(ModX(3.0, reference_batch_size=24), student, teacher)[0].item() == pytest.approx(plain.item())


def test_rows_kept_in_batches_of_the_reference_are_what_counts():
    student, teacher = embeddings(48, 0.8, seed=1), embeddings(48, 0.8)
    plain, metrics = term(ModX(3.0), student, teacher)
    cosines = teacher.image @ teacher.text.T
    kept, parts = 0.0, reference_batches(context(48), 12)
    assert torch.cat(parts).sort().values.equal(torch.arange(48))
    for part in parts:
        block = cosines[part][:, part]
        kept += sum((block.argmax(dim=side) == torch.arange(12)).double().mean() for side in (0, 1)) / 8
    kept_here = (metrics["image_rows_kept"] + metrics["text_rows_kept"]) / 2
    assert kept > kept_here > 0
    found, _ = term(ModX(3.0, reference_batch_size=12), student, teacher)
    assert found.item() == pytest.approx((plain * (12 * kept) / (48 * kept_here)).item())


def test_replayed_rows_have_their_share_of_a_reference_that_does_not_divide_the_batch():
    """The last quarter of the batch is what the old model knows: so is a quarter of what a batch of 28 would be."""
    new, known = embeddings(36, 3.0), embeddings(12, 0.0, seed=3)
    teacher = PairEmbeddings(torch.cat([new.image, known.image]), torch.cat([new.text, known.text]), SCALE, None)
    _, metrics = term(ModX(3.0, reference_batch_size=28), embeddings(48, 0.8, seed=1), teacher, replayed=12)
    (chosen,) = reference_batches(context(48, replayed=12), 28)
    assert (chosen >= 36).sum() == 7
    cosines = teacher.image[chosen] @ teacher.text[chosen].T
    kept = sum((cosines.argmax(dim=side) == torch.arange(28)).sum() for side in (0, 1))
    kept_here = 24 * (metrics["image_rows_kept"] + metrics["text_rows_kept"])
    assert metrics["modx_alpha"].item() == pytest.approx((3.0 * kept / 2 / kept_here).item())


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_rows_kept_in_batches_of_the_reference_count_with_their_weights(alpha):
    student, teacher = embeddings(48, 0.8, seed=1), embeddings(48, 0.8)
    callback = ModX(alpha, reference_batch_size=12, replay_alpha=3.0)
    _, metrics = term(callback, student, teacher, replayed=16)
    cosines, replayed = teacher.image @ teacher.text.T, torch.arange(48) >= 32

    def kept_among(rows):
        block = cosines[rows][:, rows]
        first = torch.stack([block.argmax(dim=side) == torch.arange(len(rows)) for side in (0, 1)])
        return (first * torch.where(replayed[rows], 3.0, alpha)).sum()

    kept = sum(map(kept_among, reference_batches(context(48, replayed=16), 12))) / 4
    weight = (kept / kept_among(torch.arange(48))).item()
    assert metrics["modx_alpha"].item() == pytest.approx(alpha * weight)
    assert metrics["modx_replay_alpha"].item() == pytest.approx(3.0 * weight)
    assert 0 < weight < 1


@pytest.mark.parametrize("screen", [True, False])
def test_weight_of_a_reference_is_not_rounded_to_the_precision_of_the_embeddings(screen):
    pairs = embeddings(28, 0.5)
    half = PairEmbeddings(pairs.image.bfloat16(), pairs.text.bfloat16(), SCALE, None)
    _, metrics = term(ModX(3.0, reference_batch_size=100, screen=screen), half, half)
    assert metrics["modx_alpha"].item() == pytest.approx(3.0 * 100 / 28)


@pytest.mark.parametrize("positives", [True, False])
@pytest.mark.parametrize("lost", [None, 11])
def test_rows_ranked_first_are_those_that_the_distillation_keeps(positives, lost):
    pairs, ids = embeddings(40, 0.8), torch.arange(40) // 2 * torch.arange(40).remainder(3).sign()
    if lost is not None:
        pairs.image[lost] = torch.nan  # no text row is right then
    found = rows_ranked_first(pairs.image, pairs.text, pair_ids=ids, positives=positives, chunk_size=7)
    sides = (pairs.image, pairs.text)
    expected = affinity_distillation(*sides, *sides, pair_ids=ids, positives=positives)
    kept = [expected.image_rows_kept, expected.text_rows_kept]
    assert [side.double().mean().item() for side in found] == pytest.approx([part.item() for part in kept])
    assert 0 < kept[0] < 1 and (lost is None) == (kept[1] > 0)


def test_order_in_which_processes_gather_the_batch_does_not_matter():
    """Of two processes that hold four batches, the first has the first half of each."""
    order = torch.arange(120).view(4, 2, 15).transpose(0, 1).flatten()
    one, other = embeddings(120, 0.8, seed=1), embeddings(120, 0.8)
    found = []
    for rows in (torch.arange(120), order):
        student, teacher = (PairEmbeddings(side.image[rows], side.text[rows], SCALE, None) for side in (one, other))
        _, metrics = term(ModX(3.0, reference_batch_size=12), student, teacher, order=rows, replayed=30)
        found.append(metrics["modx_alpha"].item())
    assert found[0] == found[1]


def train_and_log(folder, batch_size, accumulation):
    args = arguments(
        folder, batch_size, max_steps=3, gradient_accumulation_steps=accumulation, gradient_cache_chunk_size=2
    )
    processor = tiny_processor()
    trainer = ModXTrainer(
        tiny_clip(processor).double(), args, train_dataset=tiny_pairs(48), processing_class=processor,
        loss_callbacks=[{"modx": {"reference_batch_size": 4, "replay_alpha": 50.0}}, "er"],
    )  # fmt: skip
    trainer.use_memory(tiny_pairs(10, "yellow"))
    trainer.train()
    alpha = [entry["modx_alpha"] for entry in trainer.state.log_history if "modx_alpha" in entry]
    save_file({"alpha": torch.tensor(alpha)}, f"{folder}/rank-{args.process_index}.safetensors")


@pytest.mark.slow
def test_processes_chunks_and_accumulation_weigh_as_one_batch_does(tmp_path):
    found = []
    for processes, batch_size, accumulation in ((1, 24, 1), (2, 3, 4)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(processes, train_and_log, folder, batch_size, accumulation)
        found.append(load_file(folder / "rank-0.safetensors")["alpha"])
    assert len(found[0].unique()) > 1 and torch.allclose(*found, rtol=1e-6)


def test_nothing_kept_is_no_division_by_zero():
    student = embeddings(8, 0.1)
    teacher = PairEmbeddings(student.image, student.text.roll(1, dims=0), SCALE, None)
    assert term(ModX(3.0, reference_batch_size=4), student, teacher)[0].item() == 0.0


@pytest.mark.parametrize("screen", [True, False])
def test_pull_is_the_same_in_every_batch_of_a_reference_and_grows_without(screen):
    """The gradient of the term in one weight matrix, mean over batches."""
    pool = embeddings(2048, 0.7)
    turn = torch.eye(16, dtype=torch.float64) + 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    turn.requires_grad_(True)

    def pull(callback, rows):
        total = 0.0
        for batch in torch.arange(2048).split(rows):
            teacher = PairEmbeddings(pool.image[batch], pool.text[batch], SCALE, None)
            student = PairEmbeddings(normalize(pool.image[batch] @ turn, dim=1), pool.text[batch], SCALE, None)
            total = total + term(callback, student, teacher)[0]
        return torch.autograd.grad(total / (2048 // rows), turn)[0].norm().item()

    small, large = (pull(ModX(2.0, reference_batch_size=32, screen=screen), rows) for rows in (32, 256))
    assert large == pytest.approx(small, rel=0.1)
    assert pull(ModX(2.0, screen=screen), 256) > 2 * pull(ModX(2.0, screen=screen), 32)


@pytest.mark.parametrize(
    ("teacher", "screen", "said"),
    [("knows", True, "nearly every row"), ("knows", False, None), ("ignorant", True, "little to keep")],
)
def test_warns_once_a_phase_of_what_it_keeps(caplog, teacher, screen, said):
    callback, student = ModX(screen=screen), embeddings(16, 0.01)
    old = student if teacher == "knows" else PairEmbeddings(student.image, student.text.roll(1, 0), SCALE, None)
    callback.on_train_begin(None, None, None)
    with caplog.at_level(logging.WARNING, "hf_modx"):
        for _ in range(2):
            term(callback, student, old)
            callback.on_log(None, None, None)
    assert len(caplog.messages) == (said is not None)
    assert all(said in message for message in caplog.messages)
    assert all("% of the pairs first" in message for message in caplog.messages)  # replayed ones count, too
