"""Which rows are in which batch: with and without a memory, on any number of processes."""

import numpy as np
import pytest

from hf_modx.data.sampling import GlobalBatches

NEW, MEMORY = 50, 22


def batches(epoch=0, batch_size=8, process_index=0, num_processes=1, **options):
    settings = {"seed": 3, "drop_last": True, **options}
    sampler = GlobalBatches(
        NEW,
        batch_size,
        current_epoch=lambda: epoch,
        process_index=process_index,
        num_processes=num_processes,
        **settings,
    )
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def with_memory(epoch=0, **options):
    return batches(epoch, **{"memory_rows": MEMORY, "memory_share": 0.25, **options})


def rows(batch):
    return [index % (NEW + MEMORY) for index in batch]


def replayed(batch):
    return [row for row in rows(batch) if row >= NEW]


def test_all_rows_are_seen_once_an_epoch():
    found = [index for batch in batches(epoch=2, drop_last=False) for index in batch]
    assert sorted(found) == list(range(2 * NEW, 3 * NEW))


@pytest.mark.parametrize("drop_last", [True, False])
def test_memory_changes_neither_number_nor_size_of_batches(drop_last):
    plain, mixed = batches(drop_last=drop_last), with_memory(drop_last=drop_last)
    assert [len(batch) for batch in mixed] == [len(batch) for batch in plain]


@pytest.mark.parametrize(("share", "expected"), [(0.25, 2), (0.01, 1), (0.99, 7)])
def test_share_of_every_batch_comes_from_the_memory(share, expected):
    assert {len(replayed(batch)) for batch in with_memory(memory_share=share)} == {expected}


def test_last_smaller_batch_has_its_share_of_the_memory():
    sizes = [(len(batch), len(replayed(batch))) for batch in with_memory(drop_last=False, batch_size=12)]
    assert sizes == [(12, 3)] * 4 + [(2, 1)]


def test_memory_smaller_than_its_share_is_in_every_batch_whole():
    found = batches(memory_rows=1, memory_share=0.5)
    assert all([index % (NEW + 1) for index in batch].count(NEW) == 1 for batch in found)


def test_no_row_is_twice_in_a_contrastive_batch():
    for epoch in range(20):
        found = with_memory(epoch, batch_size=4, batches_held=4, memory_share=0.6)
        for start in range(0, len(found), 4):
            contrastive = [row for batch in found[start : start + 4] for row in rows(batch)]
            assert len(set(contrastive)) == len(contrastive) == 16


def test_new_rows_of_an_epoch_are_seen_once_and_other_epochs_leave_out_others():
    seen = [[row for batch in with_memory(epoch) for row in rows(batch) if row < NEW] for epoch in range(10)]
    assert all(len(set(epoch)) == len(epoch) == 36 for epoch in seen)
    assert set().union(*seen) == set(range(NEW))


def test_rows_of_the_memory_are_seen_about_equally_often():
    counts = np.bincount(
        [row for epoch in range(50) for batch in with_memory(epoch) for row in replayed(batch)], minlength=NEW + MEMORY
    )[NEW:]
    assert counts.sum() == 50 * 6 * 2
    # 27 passes of 11 batches each, and each pass shows every row: 22 is a multiple of 2.
    assert counts.min() >= 27 and counts.max() <= 28


def test_every_pass_leaves_out_other_rows_of_the_memory():
    # 6 of 22 a batch: a pass has 3 batches and leaves out 4 rows.
    seen = {row for epoch in range(10) for batch in with_memory(epoch, memory_share=0.75) for row in replayed(batch)}
    assert seen == set(range(NEW, NEW + MEMORY))


def test_memory_row_comes_with_another_pass_each_time():
    """The pass stands where new rows have the epoch: caption and augmentation are drawn from it."""
    indices = [index for epoch in range(10) for batch in with_memory(epoch) for index in batch]
    memory = [index for index in indices if index % (NEW + MEMORY) >= NEW]
    assert len(set(memory)) == len(memory)


def test_order_is_a_pure_function_of_seed_and_epoch():
    assert with_memory(epoch=4) == with_memory(epoch=4)
    assert with_memory(epoch=4) != with_memory(epoch=4, seed=5)
    assert replayed(with_memory(epoch=0)[0]) != replayed(with_memory(epoch=1)[0])


@pytest.mark.parametrize("setting", [(1, 4, 2), (2, 4, 1), (4, 1, 2), (3, 1, 1)], ids=str)
def test_contrastive_batches_hold_the_same_rows_however_they_are_split(setting):
    processes, batch_size, held = setting
    total = processes * batch_size * held
    expected = [sorted(batch) for batch in with_memory(epoch=1, batch_size=total)]
    parts = [
        with_memory(epoch=1, batch_size=batch_size, process_index=k, num_processes=processes, batches_held=held)
        for k in range(processes)
    ]
    found = [
        sorted(index for part in parts for batch in part[start : start + held] for index in batch)
        for start in range(0, len(parts[0]), held)
    ]
    assert found == expected
