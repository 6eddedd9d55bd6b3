"""The old model that a run keeps to: the one before a phase, or the one that the run began with."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from hf_modx import ContinualRun, Contrastive, ModX, ModXTrainer, PhaseStream, build_recipe
from hf_modx.callbacks import IncCLIP, ReferenceDistillation
from hf_modx.embeddings import embed_pairs
from hf_modx.recipes import check_teachers

from test_continual import StopAt, make_stream, results, training_without_clocks
from tiny import quick_arguments, tiny_clip


class Look(ModX):
    """Keeps what the teacher says to the first batch of each phase."""

    def __init__(self):
        super().__init__(screen="rectify")
        self.looks = []

    def loss_terms(self, student, teacher, context):
        if context.step == 0:
            self.looks.append((context.batch, teacher))
        return super().loss_terms(student, teacher, context)


def run_of(folder, processor, callbacks=(), look=None, phases=2, **changes):
    """Quick: nothing is evaluated."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, **changes}
    return ContinualRun(
        PhaseStream(tuple(replace(phase, test=None) for phase in make_stream(phases))),
        [look or Look()],
        quick_arguments(folder, **settings),
        model=tiny_clip(processor),
        processing_class=processor,
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def finished(processor, tmp_path_factory):
    """Whole runs under both teachers, and what the teachers have said; nobody changes them."""
    runs = {}
    for teacher in ("previous", "initial"):
        look = Look()
        run = run_of(tmp_path_factory.mktemp(teacher), processor, look=look, teacher=teacher)
        run.run()
        runs[teacher] = run, look.looks
    return runs


def weights(run, number):
    return load_file(run.phase_folder(number) / "model.safetensors")


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_teachers_are_the_same_in_the_first_phase_and_differ_from_the_second_on(finished):
    previous, initial = (finished[teacher][0] for teacher in ("previous", "initial"))
    assert same(weights(previous, 1), weights(initial, 1))
    assert not same(weights(previous, 2), weights(initial, 2))


@pytest.mark.parametrize(("teacher", "phase"), [("previous", 1), ("initial", 0)])
def test_teacher_of_the_second_phase_is_the_model_of(finished, teacher, phase):
    run, looks = finished[teacher]
    batch, said = looks[1]
    far = []
    for number in (0, 1):
        model = CLIPModel.from_pretrained(run.phase_folder(number)).eval()
        with torch.no_grad():
            embeds = embed_pairs(model, model, batch)
        far.append(max((embeds.image - said.image).abs().max().item(), (embeds.text - said.text).abs().max().item()))
    assert far[phase] < 1e-5 and far[1 - phase] > 1e-3


def test_interrupted_run_goes_on_with_the_initial_teacher_and_no_other(finished, processor, tmp_path):
    with pytest.raises(SystemError):
        run_of(tmp_path / "out", processor, [StopAt(2, 2)], teacher="initial").run()
    with pytest.raises(ValueError, match="teacher was 'initial' and is 'previous'"):
        run_of(tmp_path / "out", processor)
    resumed = run_of(tmp_path / "out", processor, teacher="initial")
    resumed.run()
    whole = finished["initial"][0]
    assert same(weights(resumed, 2), weights(whole, 2))
    assert training_without_clocks(resumed) == training_without_clocks(whole)


def test_initial_model_that_is_gone_is_asked_for_by_name(finished, processor, tmp_path):
    shutil.copytree(finished["initial"][0].folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "phase-0")
    with pytest.raises(FileNotFoundError, match="phase-0 is needed to go on.*Put it back"):
        run_of(tmp_path / "out", processor, phases=3, teacher="initial").run()


def test_kept_and_rectified_rows_of_each_phase_are_in_the_results(finished):
    for record in results(finished["initial"][0])["training"]:
        for side in ("image", "text"):
            kept, rectified = (record[f"{side}_rows_{kind}"]["mean"] for kind in ("kept", "rectified"))
            assert min(kept, rectified) > 0 and kept + rectified <= 1


def test_trainer_alone_wants_the_initial_model_to_be_given(model, make_args, processor, pairs):
    settings = {"args": make_args(max_steps=1, teacher="initial"), "train_dataset": pairs}
    with pytest.raises(ValueError, match=r"setting of ContinualRun.*ModXTrainer\(..., teacher=model\)"):
        ModXTrainer(model=model, processing_class=processor, **settings)
    trainer = ModXTrainer(model=model, processing_class=processor, teacher=tiny_clip(processor, seed=1), **settings)
    trainer.train()
    assert trainer.state.global_step == 1


class OwnIncCLIP(IncCLIP):
    pass


TWO = [ModX(), ReferenceDistillation()]


@pytest.mark.parametrize(
    ("recipe", "options", "teacher", "reason"),
    [
        ("finetune", {}, "initial", "no effect: nothing in the recipe finetune asks"),
        ("zscl", {}, "initial", "has an option teacher of its own"),
        ([Contrastive()], {}, "initial", "no effect"),
        ("incclip", {}, "initial", "IncCLIP makes pseudo texts with the model that a phase starts from"),
        ([OwnIncCLIP()], {}, "initial", "IncCLIP makes pseudo texts"),
        ("zscl+modx", {}, "previous", "of ModX is the model after the phase before.*'initial'.*teacher='previous' or"),
        (
            "zscl+modx",
            {"zscl": {"teacher": "previous"}},
            "initial",
            "of ModX is the model that the run began with.*'previous'.*teacher='initial' or",
        ),
        ("modx+zscl+lwf", {"zscl": {"teacher": "me/clip"}}, "initial", "ModX and LwF.*'me/clip'.*'initial', or keep"),
    ],
)
def test_teacher_that_a_recipe_cannot_have_is_refused(recipe, options, teacher, reason):
    with pytest.raises(ValueError, match=reason):
        check_teachers(recipe, build_recipe(recipe, **options), teacher)


@pytest.mark.parametrize(
    ("recipe", "options", "teacher"),
    [
        ("zscl+modx+lwf", {"zscl": {"teacher": "previous"}}, "previous"),
        ("zscl+modx", {}, "initial"),
        ("modx+der+ewc", {}, "initial"),
        (TWO, {}, "previous"),
        (TWO, {}, "initial"),
    ],
)
def test_teacher_that_a_recipe_can_have(recipe, options, teacher):
    check_teachers(recipe, build_recipe(recipe, **options), teacher)


def test_two_teachers_are_refused_before_a_run_begins(model, make_args, processor):
    with pytest.raises(ValueError, match="Two teachers"):
        ContinualRun(make_stream(), "zscl+modx", make_args(), model=model, processing_class=processor)
    with pytest.raises(ValueError, match="teacher must be 'previous' or 'initial', got 'first'"):
        make_args(teacher="first")
