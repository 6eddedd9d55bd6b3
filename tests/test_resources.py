"""Too little room on the disk, or in memory: told before or clearly, with all that was saved before in place."""

import resource

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_modx import ContinualRun, Contrastive, LossCallback, ModXTrainer
from hf_modx.disk import bytes_of_phase, require_room, size_of
from hf_modx.run.folder import checkpoints_folder, last_complete_checkpoint
from hf_modx.run.lock import LOCK

from test_continual import make_stream


class FullDisk(TrainerCallback):
    """From a step on the system refuses to write files of more than so many bytes."""

    def __init__(self, step, room):
        self.step, self.room = step, room

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(autouse=True)
def room_again():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def start(model, processor, make_args):
    def start(callbacks=(), recipe="modx", **changes):
        args = make_args(**{"max_steps": 5, "save_strategy": "steps", "save_steps": 2, **changes})
        args.spatial_disorder = False
        return ContinualRun(
            make_stream(1), recipe, args, model=model, processing_class=processor, callbacks=list(callbacks)
        )

    return start


@pytest.mark.parametrize("room", [20_000, 300_000])
def test_checkpoint_that_finds_the_disk_full_leaves_the_one_before(start, tmp_path, room):
    """The weights do not fit, and the weights fit and the optimizer does not."""
    with pytest.raises(OSError, match=r"The checkpoint of step 4 could not be written to .*make room, and run"):
        start([FullDisk(4, room)]).run()
    folder = checkpoints_folder(tmp_path / "out", 1)
    assert [path.name for path in folder.glob("*")] == ["checkpoint-2"]
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    start().run()
    start(output_dir=str(tmp_path / "whole")).run()
    resumed, whole = (load_file(tmp_path / name / "phase-1" / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_phase_that_finds_the_disk_full_is_not_there(start, tmp_path):
    with pytest.raises(OSError, match=r"Phase 1 could not be written to .*out, where .* are free"):
        start([FullDisk(5, 20_000)], save_strategy="no").run()
    assert not (tmp_path / "out" / "phase-1").exists() and (tmp_path / "out" / "phase-0").exists()
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [LOCK]


def test_phase_that_will_not_fit_is_refused_before_it_begins(start):
    seen = []
    with pytest.raises(OSError, match=r"Phase 1 needs about \d+\.\d GB in .*out, and .* are free.*save_total_limit"):
        start([Watch(seen)], save_total_limit=10**12).run()
    assert seen == []


class Watch(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def test_what_a_phase_is_said_to_need_is_what_it_takes(start, make_args, model, tmp_path):
    run = start(save_total_limit=2)
    run.run()
    taken = size_of(checkpoints_folder(tmp_path / "out", 1)) + size_of(run.phase_folder(1))
    one = size_of(checkpoints_folder(tmp_path / "out", 1)) / 2
    said = bytes_of_phase(model, run.args)
    assert 0.6 * (taken + one) < said < taken + one  # the rest are files of a few kilobytes, which count here alone


def test_weights_that_callbacks_keep_in_checkpoints_need_room_too(start, model, tmp_path):
    options = {"max_forgetting": 0.99, "on_forgetting": "restore", "retention_steps": 1, "save_total_limit": 2}
    run = start(recipe="weight_ensemble", **options)
    run.run()
    (state, *_) = checkpoints_folder(tmp_path / "out", 1).glob("*/loss_callbacks.safetensors")
    more = bytes_of_phase(model, run.args, run.loss_callbacks) - bytes_of_phase(model, run.args)
    assert more == pytest.approx(3 * state.stat().st_size, rel=0.1)  # names of weights beside them
    assert more == 3 * 2 * sum(weight.numel() * 4 for weight in model.parameters())


def test_there_is_room_for_nothing_more(tmp_path):
    require_room(tmp_path, 0, "Phase 1")
    with pytest.raises(OSError, match=r"Phase 1 needs about 1000000000\.0 GB"):
        require_room(tmp_path, 10**18, "Phase 1")


class TakesAllMemory(LossCallback):
    def loss_terms(self, student, teacher, context):
        return {"all": torch.empty(1 << 60).sum()}


@pytest.mark.parametrize(
    ("chunk", "advice"),
    [
        (None, "All 8 pairs of a process are held at once: set gradient_cache_chunk_size to fewer"),
        (2, r"Lower gradient_cache_chunk_size \(now 2; per_device_train_batch_size is 8\)"),
    ],
)
def test_out_of_memory_names_the_chunk_and_the_batch(model, processor, pairs, make_args, chunk, advice):
    trainer = ModXTrainer(
        model=model,
        args=make_args(gradient_cache_chunk_size=chunk),
        train_dataset=pairs,
        processing_class=processor,
        loss_callbacks=[Contrastive(), TakesAllMemory()],
    )
    with pytest.raises(RuntimeError, match=f"can't allocate memory.*{advice}"):
        trainer.train()
