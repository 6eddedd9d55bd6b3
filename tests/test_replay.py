"""The memory: its distribution, its table on disk, and the batches and losses that come of it."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Image, load_from_disk
from safetensors.torch import load_file, save_file

from hf_modx import Contrastive, LossCallback, ModX, ModXTrainer, ModXTrainingArguments
from hf_modx.callbacks import DarkExperienceReplay, ExperienceReplay, replay_of
from hf_modx.data import PairCollator, PairDataset
from hf_modx.embeddings import embed_images, embed_texts
from hf_modx.replay import Replay, ReplayMemory, StoredEmbeddings, choose, embed_rows

from launch import launch
from tiny import picture, tiny_clip, tiny_pairs, tiny_processor

COLUMNS = ["image", "caption", "pair_id"]
PAIRS = ("image", "caption", "pair_id")


# ---- Which pairs are kept ----


def sampled(memory_size, parts, generator):
    """Numbers of the pairs that are in the memory after parts of these lengths."""
    memory, seen = np.empty(0, dtype=int), 0
    for new in parts:
        staying, entering = choose(memory_size, len(memory), seen, new, generator)
        memory = np.concatenate([memory[staying], seen + entering])
        seen += new
    return memory


def p_value(statistic, degrees):
    return torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(statistic / 2)).item()


def test_every_pair_is_kept_equally_often():
    """Chi-squared; sampling without replacement has (n - 1) / n of the variance of independent draws."""
    size, draws, generator = 6, 10_000, np.random.default_rng(0)
    kept = [sampled(size, [9, 14, 7], generator) for _ in range(draws)]
    counts, share = np.bincount(np.concatenate(kept), minlength=30), size / 30
    statistic = 29 / 30 * ((counts - draws * share) ** 2).sum() / (draws * share * (1 - share))
    assert p_value(statistic, 29) > 0.01


def test_every_set_of_pairs_is_equally_likely():
    sets = dict.fromkeys(combinations(range(6), 3), 0)
    generator = np.random.default_rng(0)
    for _ in range(4000):
        sets[tuple(sorted(sampled(3, [4, 2], generator)))] += 1
    expected = 4000 / len(sets)
    statistic = sum((count - expected) ** 2 / expected for count in sets.values())
    assert p_value(statistic, len(sets) - 1) > 0.01


def test_memory_of_fixed_size_is_never_larger_and_holds_no_pair_twice():
    for parts in ([3], [3, 2], [3, 4, 50], [100, 1]):
        found = sampled(7, parts, np.random.default_rng(0))
        assert len(set(found)) == len(found) == min(7, sum(parts))


@pytest.mark.parametrize(("share", "expected"), [(0.2, [2, 4, 1]), (1.0, [9, 20, 3])])
def test_share_of_every_phase_is_kept_for_good(share, expected):
    found = sampled(share, [9, 20, 3], np.random.default_rng(0))
    assert [int(((found >= low) & (found < high)).sum()) for low, high in [(0, 9), (9, 29), (29, 32)]] == expected
    assert set(sampled(share, [9, 20], np.random.default_rng(0))) <= set(found)


# ---- The table on disk ----


def memory_in(folder, size=5, seed=0, stores_embeddings=False, columns=COLUMNS):
    return ReplayMemory(Path(folder), Replay(size, 0.25, stores_embeddings), columns, seed)


def content(table):
    return table.cast_column("image", Image(decode=False)).to_list()


def test_table_is_a_uniform_sample_of_all_phases_so_far(tmp_path):
    memory = memory_in(tmp_path, size=12)
    for number in range(3):
        table = memory.extend(number, tiny_pairs(16, start=16 * number))
    assert len(table) == 12
    assert table.column_names == [*COLUMNS, "learned_in_phase"]
    assert [row["learned_in_phase"] for row in table] == [row["pair_id"] // 16 for row in table]
    assert len(set(table["pair_id"])) == 12 and len(set(table["learned_in_phase"])) == 3


def test_images_lie_in_it_as_they_were_stored(tmp_path):
    data = tiny_pairs(9)
    stored = {row["pair_id"]: row["image"]["bytes"] for row in content(data)}
    table = memory_in(tmp_path).extend(0, data)
    assert all(row["image"]["bytes"] == stored[row["pair_id"]] for row in content(table))


def test_format_of_the_data_is_not_that_of_the_memory(tmp_path):
    pairs = tiny_pairs(6)
    plain, formatted = memory_in(tmp_path / "plain"), memory_in(tmp_path / "formatted")
    table = formatted.extend(1, pairs.with_format("torch"))
    assert table.features["image"] == pairs.features["image"]
    assert content(table) == content(plain.extend(1, pairs))


def test_images_in_files_are_taken_in(tmp_path):
    for number in range(4):
        picture("red", "ring", shift=number).save(tmp_path / f"{number}.png")
    files = {name: [str(tmp_path / f"{number}.png") for number in range(4)] for name in ("image", "caption")}
    memory_in(tmp_path / "memory").extend(0, Dataset.from_dict(files).cast_column("image", Image()))
    bytes_before = {(tmp_path / f"{number}.png").read_bytes() for number in range(4)}
    for number in range(4):
        (tmp_path / f"{number}.png").unlink()
    table = load_from_disk(tmp_path / "memory" / "phase-0")
    assert {row["image"]["bytes"] for row in content(table)} == bytes_before


def test_table_is_a_pure_function_of_seed_and_data(tmp_path):
    tables = []
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        memory = memory_in(tmp_path / folder, seed=seed)
        memory.extend(0, tiny_pairs(20))
        tables.append(content(memory.extend(1, tiny_pairs(20, start=20))))
    assert tables[0] == tables[1] != tables[2]


def test_tables_that_are_missing_are_made_and_those_that_are_there_are_not(tmp_path):
    parts = [None, tiny_pairs(9), tiny_pairs(9, start=9), tiny_pairs(9, start=18)]
    memory = memory_in(tmp_path)
    assert memory.after(0, parts, None) is None
    table = memory.after(2, parts, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["phase-1", "phase-2"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert content(memory.after(2, parts, None)) == content(table)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps


def test_interrupted_table_is_made_again(tmp_path, monkeypatch):
    whole = memory_in(tmp_path / "whole")
    whole.extend(0, tiny_pairs(20))
    expected = content(whole.extend(1, tiny_pairs(20, start=20)))

    memory = memory_in(tmp_path / "cut")
    memory.extend(0, tiny_pairs(20))
    with monkeypatch.context() as patched:
        patched.setattr("hf_modx.replay.publish_folder", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            memory.extend(1, tiny_pairs(20, start=10))
    assert memory.find(1) is None and len(memory.find(0)) == 5
    assert content(memory.extend(1, tiny_pairs(20, start=20))) == expected
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["phase-0", "phase-1"]


def test_phase_may_leave_the_memory_as_it_was(tmp_path):
    memory = memory_in(tmp_path, size=1, stores_embeddings=True)
    stored = []

    def embed(number, rows):
        stored.append(len(rows))
        return [[1.0, 2.0]] * len(rows), [[[3.0, 4.0]]] * len(rows)

    before = memory.extend(0, tiny_pairs(40), embed)
    after = memory.extend(1, tiny_pairs(1, start=41), embed)
    assert stored == [1, 0]
    assert content(before) == content(after)


def test_columns_that_a_later_phase_lacks_are_left_out(tmp_path):
    memory = memory_in(tmp_path)
    memory.extend(0, tiny_pairs(4))
    assert "pair_id" not in memory.extend(1, tiny_pairs(4).remove_columns("pair_id")).column_names


def test_pairs_keep_the_embeddings_with_which_they_came(tmp_path, processor):
    old, new = tiny_clip(processor, seed=1), tiny_clip(processor, seed=2)
    memory = memory_in(tmp_path, size=8, stores_embeddings=True)

    def embed(number, rows):
        options = {"batch_size": 3, "device": torch.device("cpu")}
        return embed_rows((old, new)[number], PairDataset(rows, *PAIRS), PairCollator(processor), **options)

    table = memory.after(1, [tiny_pairs(20), tiny_pairs(20, start=20)], embed)
    assert set(table["learned_in_phase"]) == {0, 1}
    lookup = StoredEmbeddings(table)
    for caption in (0, 1):
        rows = torch.arange(len(table))
        image, text = lookup.look_up(rows, torch.full_like(rows, caption))
        for row, example in enumerate(table):
            model = (old, new)[example["learned_in_phase"]]
            inputs = processor(text=[example["caption"][caption]], images=[example["image"]], return_tensors="pt")
            expected = embed_images(model, inputs["pixel_values"])[0]
            torch.testing.assert_close(image[row], expected, rtol=0, atol=1e-5)
            expected = embed_texts(model, inputs["input_ids"], inputs["attention_mask"])[0]
            torch.testing.assert_close(text[row], expected, rtol=0, atol=1e-5)


def embed_in_a_process(folder):
    processor = tiny_processor()
    rows = PairDataset(tiny_pairs(7), *PAIRS)
    options = {"batch_size": 2, "device": torch.device("cpu")}
    image, text = embed_rows(tiny_clip(processor), rows, PairCollator(processor), **options)
    tensors = {"image": torch.tensor(np.array(image)), "text": torch.tensor(np.array(text))}
    save_file(tensors, f"{folder}/{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}")


def test_processes_embed_rows_to_the_bit_as_one_does(tmp_path):
    launch(3, embed_in_a_process, tmp_path)
    shared = [load_file(tmp_path / str(rank)) for rank in range(3)]
    embed_in_a_process(tmp_path)
    alone = load_file(tmp_path / "0")
    assert alone["text"].shape == (7, 2, 16)
    assert all(torch.equal(alone[name], other[name]) for other in shared for name in alone)


# ---- Settings ----


@pytest.mark.parametrize(
    "settings", [{"memory_size": 0}, {"memory_size": 1.5}, {"batch_share": 0.0}, {"batch_share": 1.0}]
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ExperienceReplay(**settings)


def test_two_memories_in_one_recipe_are_refused():
    with pytest.raises(ValueError, match="share one memory.*0.05, 0.25 and 10, 0.25"):
        replay_of([DarkExperienceReplay(), ExperienceReplay(memory_size=10, contrastive=False)])


def test_callbacks_of_one_recipe_share_a_memory():
    recipe = [ExperienceReplay(memory_size=9), ModX(contrastive=False), DarkExperienceReplay(memory_size=9)]
    assert replay_of(recipe) == Replay(9, 0.25, stores_embeddings=True)
    assert replay_of([ModX()]) is None


# ---- Training ----


class Watch(LossCallback):
    """Keep what the loss callbacks are told."""

    def __init__(self):
        self.contexts = []

    def loss_terms(self, student, teacher, context):
        self.contexts.append(context)
        return {}


def arguments(folder, **changes):
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 5,
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


def memory_table(folder, processor, model=None, rows=10):
    """What the model has kept of shapes on yellow ground."""
    data = tiny_pairs(rows, style="yellow", start=20)
    if model is None:
        return memory_in(folder, size=rows).extend(0, data)

    def embed(number, entering):
        pairs = PairDataset(entering, *PAIRS)
        return embed_rows(model, pairs, PairCollator(processor), batch_size=4, device=torch.device("cpu"))

    return memory_in(folder, size=rows, stores_embeddings=True).extend(0, data, embed)


def trained(folder, processor, callbacks, memory, model=None, rows=24, **changes):
    trainer = ModXTrainer(
        model=model if model is not None else tiny_clip(processor),
        args=arguments(folder, **changes),
        train_dataset=tiny_pairs(rows),
        processing_class=processor,
        loss_callbacks=callbacks,
    )
    if memory is not None:
        trainer.use_memory(memory)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_batch_tells_which_pairs_are_replayed(tmp_path, processor):
    watch = Watch()
    memory = memory_table(tmp_path / "memory", processor)
    trained(tmp_path, processor, [ExperienceReplay(), watch], memory)
    ids = memory["pair_id"]
    for context in watch.contexts:
        assert context.is_replay.sum() == 2 and len(context.is_replay) == 8
        expected = [ids[row - 24] for row in context.row_ids[context.is_replay].tolist()]
        assert context.pair_ids[context.is_replay].tolist() == expected
    assert len({row for context in watch.contexts for row in context.row_ids[context.is_replay].tolist()}) == 10


def test_without_a_memory_nothing_is_replayed(tmp_path, processor):
    watch = Watch()
    trained(tmp_path, processor, [ExperienceReplay(), watch], None)
    assert not any(context.is_replay.any() for context in watch.contexts)


def test_replayed_pair_of_a_new_concept_is_no_negative_of_it(tmp_path, processor):
    """Without ids in the memory every row is a pair of its own; with them equal ids meet."""
    memory = memory_table(tmp_path / "memory", processor)
    for table, meet in [(memory, True), (memory.remove_columns("pair_id"), False)]:
        watch = Watch()
        trained(tmp_path, processor, [ExperienceReplay(batch_share=0.5), watch], table, max_steps=12)
        repeated = [len(context.pair_ids.unique()) < len(context.pair_ids) for context in watch.contexts]
        assert any(repeated) == meet


def test_replayed_images_are_those_of_the_memory(tmp_path, processor):
    watch = Watch()
    memory = memory_table(tmp_path / "memory", processor)
    trained(tmp_path, processor, [ExperienceReplay(), watch], memory)
    context = watch.contexts[0]
    for place in context.is_replay.nonzero().flatten().tolist():
        image = memory[int(context.row_ids[place]) - 24]["image"]
        expected = processor.image_processor([image], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(context.batch["pixel_values"][place], expected)


def test_phase_takes_as_many_steps_with_replay(tmp_path, processor):
    steps = [
        trained(tmp_path, processor, [ExperienceReplay()], memory, max_steps=-1, num_train_epochs=2).state.global_step
        for memory in (None, memory_table(tmp_path / "memory", processor))
    ]
    assert steps == [6, 6]


def test_stored_embeddings_are_those_of_the_row_and_the_caption(tmp_path, processor):
    old = tiny_clip(processor, seed=3)
    memory = memory_table(tmp_path / "memory", processor, old)
    watch = Watch()
    trained(tmp_path, processor, [DarkExperienceReplay(), watch], memory)
    for context in watch.contexts:
        batch = {name: tensor[context.is_replay] for name, tensor in context.batch.items()}
        with torch.no_grad():
            image = embed_images(old, batch["pixel_values"])
            text = embed_texts(old, batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(context.stored, (image, text), rtol=0, atol=1e-5)
    assert {index for context in watch.contexts for index in context.batch["caption_index"].tolist()} == {0, 1}


def test_embeddings_of_the_model_itself_cost_nothing_until_it_moves(tmp_path, processor):
    memory = memory_table(tmp_path / "memory", processor, tiny_clip(processor))
    drift = logged(trained(tmp_path, processor, [DarkExperienceReplay()], memory), "dark_replay")
    assert drift[0] == pytest.approx(0, abs=1e-5) and drift[-1] > 1e-3


def test_term_is_the_drift_of_both_modalities(tmp_path, processor):
    model, old = tiny_clip(processor), tiny_clip(processor, seed=3)
    memory = memory_table(tmp_path / "memory", processor, old)
    watch = Watch()
    trainer = trained(tmp_path, processor, [DarkExperienceReplay(alpha=0.5), watch], memory, model, max_steps=1)
    context, fresh = watch.contexts[0], tiny_clip(processor)
    with torch.no_grad():
        image = embed_images(fresh, context.batch["pixel_values"])[context.is_replay]
        text = embed_texts(fresh, context.batch["input_ids"], context.batch["attention_mask"])[context.is_replay]
    stored_image, stored_text = context.stored
    expected = 1 - F.cosine_similarity(image, stored_image).mean() + 1 - F.cosine_similarity(text, stored_text).mean()
    assert logged(trainer, "dark_replay") == [pytest.approx(0.5 * expected.item(), abs=1e-5)]


def test_stored_embeddings_hold_the_model(tmp_path, processor):
    def moved(alpha):
        model = tiny_clip(processor)
        memory = memory_table(tmp_path / str(alpha), processor, model)
        trained(tmp_path, processor, [DarkExperienceReplay(alpha)], memory, model, max_steps=20)
        pixels = processor.image_processor(list(memory["image"]), return_tensors="pt")["pixel_values"]
        stored = torch.tensor(memory["image_embedding"][:])
        return 1 - F.cosine_similarity(embed_images(model.eval(), pixels), stored).mean().item()

    assert moved(10.0) < 0.5 * moved(0.0)


def test_beside_another_owner_it_brings_no_term_of_its_own(tmp_path, processor):
    memory = memory_table(tmp_path / "memory", processor)
    trainer = trained(tmp_path, processor, [ModX(), ExperienceReplay(contrastive=False)], memory)
    terms = set(trainer.state.log_history[0])
    assert {"contrastive", "modx_distillation"} <= terms and "dark_replay" not in terms


def test_cached_teacher_covers_the_memory(tmp_path, processor):
    memory = memory_table(tmp_path / "memory", processor)
    recipe = [ModX(), ExperienceReplay(contrastive=False)]
    cached, live = (
        trained(tmp_path, processor, recipe, memory, tiny_clip(processor).double(), teacher_cache=mode).model
        for mode in ("memory", "off")
    )
    for name, tensor in cached.state_dict().items():
        torch.testing.assert_close(tensor, live.state_dict()[name], rtol=0, atol=1e-9, msg=name)


def test_another_memory_than_the_teacher_is_cached_for_is_refused(tmp_path, processor):
    recipe = [ModX(), ExperienceReplay(contrastive=False)]
    memory = memory_table(tmp_path / "memory", processor)
    trainer = trained(tmp_path, processor, recipe, memory, teacher_cache="memory", max_steps=1)
    trainer.use_memory(memory.select(range(9, -1, -1)))
    with pytest.raises(ValueError, match="or the memory is, than"):
        trainer.train()


def test_memory_that_no_callback_replays_is_refused(tmp_path, processor):
    with pytest.raises(ValueError, match="no callback of the recipe replays it"):
        trained(tmp_path, processor, [Contrastive()], memory_table(tmp_path / "memory", processor))


def test_memory_without_embeddings_is_refused_where_they_are_needed(tmp_path, processor):
    with pytest.raises(ValueError, match="no column image_embedding and no text_embeddings"):
        trained(tmp_path, processor, [DarkExperienceReplay()], memory_table(tmp_path / "memory", processor))


def test_memory_with_a_collator_of_ones_own_is_refused(tmp_path, processor):
    trainer = ModXTrainer(
        model=tiny_clip(processor),
        args=arguments(tmp_path),
        train_dataset=tiny_pairs(8),
        data_collator=lambda rows: rows,
        loss_callbacks=[ExperienceReplay()],
    )
    with pytest.raises(ValueError, match="Leave data_collator out"):
        trainer.use_memory(tiny_pairs(8))


# ---- Several processes ----

RECIPES = {
    "er": lambda: [ExperienceReplay()],
    "der": lambda: [DarkExperienceReplay(alpha=2.0)],
    "modx+der": lambda: [ModX(), DarkExperienceReplay(contrastive=False)],
}


def train_and_save(folder, memory, batch_size, recipe, rows, changes):
    processor = tiny_processor()
    changes = {"per_device_train_batch_size": batch_size, "dataloader_drop_last": rows == 48, **changes}
    table = load_from_disk(memory)
    trainer = trained(folder, processor, RECIPES[recipe](), table, tiny_clip(processor).double(), rows, **changes)
    tensors = {**trainer.model.state_dict(), "loss": torch.tensor(logged(trainer, "loss"))}
    save_file(tensors, f"{folder}/rank-{trainer.args.process_index}.safetensors")


def largest_difference(first, second):
    first, second = load_file(first), load_file(second)
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


# The last batch of 18 rows holds 2 pairs: fewer than there are processes.
TRAININGS = [*((recipe, 18) for recipe in RECIPES), ("modx+der", 48)]


def train_all(folder, memory, batch_size, changes):
    for recipe, rows in TRAININGS:
        place = folder / f"{recipe}-{rows}"
        place.mkdir(parents=True, exist_ok=True)
        train_and_save(place, memory, batch_size, recipe, rows, changes)


@pytest.fixture(scope="module")
def one_big_batch(tmp_path_factory, processor):
    """Folders of the memory and of what one process learns with it."""
    folder = tmp_path_factory.mktemp("one")
    memory_table(folder / "memory", processor, tiny_clip(processor, seed=3))
    memory = str(folder / "memory" / "phase-0")
    launch(1, train_all, folder, memory, 8, {})
    return memory, folder


HELD = {"gradient_accumulation_steps": 2, "gradient_cache_chunk_size": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batch_size", "changes"), [(2, 4, {}), (2, 2, HELD), (4, 2, {})])
def test_processes_and_chunks_train_the_weights_of_one(tmp_path, one_big_batch, processes, batch_size, changes):
    memory, one = one_big_batch
    launch(processes, train_all, tmp_path, memory, batch_size, changes)
    for recipe, rows in TRAININGS:
        training = f"{recipe}-{rows}"
        ranks = [tmp_path / training / f"rank-{rank}.safetensors" for rank in range(processes)]
        assert all(largest_difference(ranks[0], other) == 0 for other in ranks[1:]), training
        assert largest_difference(one / training / "rank-0.safetensors", ranks[0]) < 1e-9, training
