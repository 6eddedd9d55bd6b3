"""Trackers see all phases of a run as one training."""

import pytest
from tensorboard.backend.event_processing import event_accumulator
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from hf_modx import ContinualRun, Phase, PhaseStream

from tiny import tiny_clip, tiny_pairs


class Recorder(TrainerCallback):
    """A tracker that keeps what it is told, by the names that trackers make of it."""

    points, runs = [], set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.runs.add(args.run_name)
        self.points += [(name, state.global_step) for name in integration_utils.rewrite_logs(logs)]


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "points", [])
    monkeypatch.setattr(Recorder, "runs", set())
    return Recorder


def stream(phases=("first", "second"), extra=()):
    data = tiny_pairs(48)
    parts = [
        Phase(name, data.select(range(12 * k, 12 * k + 9)), data.select(range(12 * k + 9, 12 * k + 12)))
        for k, name in enumerate(phases)
    ]
    return PhaseStream(tuple(parts), extra_tests={name: tiny_pairs(4, start=40) for name in extra})


@pytest.fixture
def run(make_args, processor):
    def run(stream, report_to, **options):
        args = make_args(max_steps=2, report_to=report_to, seed=0)
        return ContinualRun(
            stream, "modx", args, model=tiny_clip(processor), processing_class=processor, **options
        ).run()

    return run


def steps_of(points, name):
    return [step for found, step in points if found == name]


def test_steps_go_on_from_phase_to_phase_and_names_tell_phase_and_test(run, recorder):
    run(stream(), "recorder")
    assert steps_of(recorder.points, "train/phase-1-first/loss") == [1, 2]
    assert steps_of(recorder.points, "train/phase-2-second/modx_distillation") == [3, 4]
    for test in ("first", "second"):
        assert steps_of(recorder.points, f"eval/{test}/image_to_text_recall@1") == [0, 2, 4]
    assert all(name.startswith(("train/phase-", "eval/first/", "eval/second/")) for name, _ in recorder.points)
    assert recorder.runs == {"out"}


def test_a_test_that_is_added_later_stands_where_its_phases_end(run, recorder):
    run(stream(), "recorder")
    recorder.points.clear()
    run(stream(extra=["late"]), "recorder")
    assert steps_of(recorder.points, "eval/late/image_to_text_recall@1") == [0, 2, 4]


def test_longer_test_name_is_not_taken_for_a_shorter_ones_metric(run, recorder):
    run(stream(phases=("a", "a_b")), "recorder")
    assert steps_of(recorder.points, "eval/a_b/loss") == [0, 2, 4] == steps_of(recorder.points, "eval/a/loss")
    assert not steps_of(recorder.points, "eval/a/b_loss")


def test_phase_may_be_called_train(run, recorder):
    run(stream(phases=("train",)), "recorder")
    assert steps_of(recorder.points, "eval/train/loss") == [0, 2]
    assert steps_of(recorder.points, "train/phase-1-train/train_loss") == [2]


def test_tracker_that_serves_all_phases_is_shifted_once_each(run, recorder):
    run(stream(phases=("a", "b", "c")), "none", callbacks=[Recorder()])
    assert steps_of(recorder.points, "train/phase-3-c/loss") == [5, 6]


def test_event_files_of_tensorboard_are_one_run(run, make_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run(stream(), "tensorboard")
    events = event_accumulator.EventAccumulator(str(tmp_path / "out" / "logs")).Reload()
    steps = {name: [point.step for point in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert steps["train/phase-1-first/loss"] == [1, 2] and steps["train/phase-2-second/loss"] == [3, 4]
    assert steps["eval/first/image_to_text_recall@1"] == [0, 2, 4]
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("out/checkpoints/**/*tfevents*"))
