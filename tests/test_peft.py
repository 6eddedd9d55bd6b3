"""LoRA as an argument of a run: every phase an adapter, merged or kept."""

import copy
import json
import sys
from dataclasses import replace

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, CLIPModel, TrainerCallback

from hf_modx import ContinualRun, ModXTrainer, ModXTrainingArguments, PhaseStream
from hf_modx.adapter import add_adapter, has_adapter, merged
from hf_modx.callbacks import EWC, Contrastive, ReferenceDistillation, WeightEnsemble, WiseFT
from hf_modx.merging import merge_models
from hf_modx.model_card import phase_card, write_card_of_run
from hf_modx.pretrained import load_dual_encoder
from hf_modx.run.identity import changes
from hf_modx.trained_weights import leaves_of_trained_weights, set_trained_weights, trained_weights

from card_schema import card_problems
from test_continual import StopAt, make_stream
from test_model_card import snippets
from tiny import tiny_clip

# What a reader of an adapter sees; the library itself asks PEFT not to.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = {"peft": "lora", "lora_rank": 4, "learning_rate": 1e-2}
OPTIONS = {"ewc": {"weight": 50.0, "batches": 2}, "zscl": {"ensemble_every": 2, "images_per_step": 4}}
TOWERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def untested_stream():
    """Quick: nothing is evaluated and nothing drawn."""
    stream = make_stream()
    return PhaseStream(tuple(replace(phase, test=None) for phase in stream), base=replace(stream.base, test=None))


def make_run(folder, processor, recipe="modx", stream=None, callbacks=(), start=None, revision=None, **changes):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = ModXTrainingArguments(
        **{"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 8, **quiet, **LORA, **changes}
    )
    return ContinualRun(
        stream or untested_stream(),
        recipe,
        args,
        model=start or tiny_clip(processor),
        processing_class=processor,
        recipe_args=OPTIONS.get(recipe),
        revision=revision,
        callbacks=callbacks,
    )


@pytest.fixture
def run(processor, tmp_path):
    def run(recipe="modx", folder="out", **options):
        continual = make_run(tmp_path / folder, processor, recipe, **options)
        continual.run()
        return continual

    return run


@pytest.fixture(scope="module")
def finished(processor, tmp_path_factory):
    """Whole runs of "modx" with tests, merged or not; none is changed."""
    done = {}

    def finished(merge):
        if merge not in done:
            folder = tmp_path_factory.mktemp("run")
            saving = {"save_strategy": "steps", "save_steps": 3}
            done[merge] = make_run(folder, processor, stream=make_stream(), lora_merge=merge, **saving)
            done[merge].run()
        return done[merge]

    return finished


def weights(run, number):
    (path,) = run.phase_folder(number).glob("*model.safetensors")
    return load_file(path)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def features(model):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = torch.tensor([[5, 6, 7, 3], [9, 8, 7, 3]])
    model.eval()
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        return torch.cat([images, model.get_text_features(input_ids=texts).pooler_output])


# ---- Whole runs ----


@pytest.mark.slow
def test_initial_teacher_is_beside_the_adapters_from_the_second_phase_on(run, finished):
    other = run(teacher="initial")
    assert same(weights(other, 1), weights(finished(True), 1))
    assert not same(weights(other, 2), weights(finished(True), 2))


EVERY_SECOND = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "settings", "stop"),
    [
        ("modx", {**EVERY_SECOND, "train_logit_scale": True, "lora_dropout": 0.2}, StopAt(2, 3)),
        ("er", {**EVERY_SECOND, "lora_merge": False}, StopAt(2, 3)),
        ("zscl", {**EVERY_SECOND, "lora_dropout": 0.2}, StopAt(2, 3)),
        # Nothing is saved: the phase begins again, but for what comes before its first step.
        ("ewc", {"lora_merge": False, "lora_dropout": 0.5}, StopAt(1, 2)),
    ],
)
def test_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(run, recipe, settings, stop):
    with pytest.raises(SystemError):
        run(recipe, callbacks=[stop], **settings)
    resumed, whole = run(recipe, **settings), run(recipe, "whole", **settings)
    assert same(weights(resumed, 2), weights(whole, 2))
    assert not same(weights(whole, 2), weights(whole, 1))


@pytest.mark.slow
def test_merged_phases_are_plain_models_that_differ_in_the_layers_of_the_towers(finished):
    continual = finished(merge=True)
    CLIPModel.from_pretrained(continual.phase_folder(2))
    for number in (1, 2):
        before, after = weights(continual, number - 1), weights(continual, number)
        changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
        assert changed == set(TOWERS)


def test_logit_scale_is_trained_where_it_is_asked_for_and_told_to_be_frozen_otherwise(model, make_args, caplog):
    with caplog.at_level("INFO"):
        adapted = add_adapter(model, make_args(**LORA))
    assert "the logit scale stays at 14.28; train_logit_scale would train it" in caplog.text
    assert not adapted.logit_scale.requires_grad
    assert add_adapter(merged(adapted), make_args(**LORA, train_logit_scale=True)).logit_scale.requires_grad


@pytest.mark.slow
def test_one_adapter_holds_all_phases_so_far(finished, monkeypatch):
    continual = finished(merge=False)
    for number in (1, 2):
        folder = continual.phase_folder(number)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4 * number, 8 * number)
        assert config["base_model_name_or_path"] == "phase-0"
        adapted = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(continual.phase_folder(0)), folder)
        evaluated = continual._load_phase(number)
        torch.testing.assert_close(features(adapted), features(evaluated), rtol=0, atol=1e-5)
        assert same(adapted.merge_and_unload().state_dict(), evaluated.state_dict())
    monkeypatch.chdir(continual.folder)
    torch.testing.assert_close(features(AutoModel.from_pretrained("phase-2")), features(evaluated), rtol=0, atol=1e-5)
    first, second = weights(continual, 1), weights(continual, 2)
    for name, tensor in first.items():
        kept = second[name][:4] if "lora_A" in name else second[name][:, :4]
        assert torch.equal(kept, tensor)


def test_adapter_of_a_phase_is_read_as_any_model_is_from_wherever(finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    continual = finished(merge=False)
    model, _ = load_dual_encoder(str(continual.phase_folder(2)))
    assert type(model) is CLIPModel and not has_adapter(model)
    assert same(model.state_dict(), continual._load_phase(2).state_dict())
    first, second = (str(continual.phase_folder(number)) for number in (0, 2))
    merge_models(first, second, 1.0, tmp_path / "merged")
    assert same(load_file(tmp_path / "merged" / "model.safetensors"), model.state_dict())


def test_adapter_of_a_phase_may_be_the_teacher_of_references(finished, model, make_args, processor, pairs, tmp_path):
    continual = finished(merge=False)
    teacher = ReferenceDistillation(images=pairs, teacher=str(continual.phase_folder(2)))
    train(model, make_args(max_steps=1), processor, pairs, [Contrastive(), teacher])
    continual._load_phase(2).save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    plain = ReferenceDistillation(images=pairs, teacher=str(tmp_path / "merged"))
    train(tiny_clip(processor), make_args(max_steps=1), processor, pairs, [Contrastive(), plain])
    assert same(teacher.state_dict(), plain.state_dict())


def test_kept_adapters_and_merged_ones_leave_the_same_models(finished):
    kept, plain = finished(merge=False), finished(merge=True)
    for number in (1, 2):
        expected, found = weights(plain, number), kept._load_phase(number).state_dict()
        assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-6


def test_phase_that_starts_from_the_base_leaves_an_adapter_of_its_own(run):
    continual = run("joint", lora_merge=False)
    assert {len(weight) for name, weight in weights(continual, 2).items() if "lora_A" in name} == {4}


def test_frozen_run_leaves_the_start_model(run):
    continual = run("frozen")
    assert same(weights(continual, 2), weights(continual, 0))


def test_evaluation_is_of_the_model_that_lies_on_the_disk(finished, processor, make_args):
    continual = finished(merge=True)
    learned = CLIPModel.from_pretrained(continual.phase_folder(2))
    trainer = ModXTrainer(learned, make_args(), processing_class=processor)
    for column, (test, _) in enumerate(continual.tests.pairs.values()):
        measured = trainer.evaluate(test, metric_key_prefix="t")["t_image_to_text_mrr"]
        assert continual.matrix("image_to_text_mrr").values[2][column] == measured


def test_adapter_of_a_checkpoint_names_no_path(finished):
    run = finished(merge=False).folder
    for phase in (1, 2):
        folder = run / "checkpoints" / f"phase-{phase}" / "checkpoint-3"
        for name in ("adapter_config.json", "README.md"):
            assert str(run) not in (folder / name).read_text()


# ---- The Hub and the card ----


PUBLISHED = {"lora_merge": False, "push_to_hub": True, "hub_model_id": "owner/clip"}


@pytest.fixture
def published(processor, hub, prepared, short_waits, tmp_path):
    """A published run that keeps its adapters, as it would be started again."""
    folder = tmp_path / "published"
    prepared("adapters", hub, folder, lambda: make_run(folder, processor, **PUBLISHED).run())
    return make_run(folder, processor, **PUBLISHED)


def test_adapter_of_a_phase_loads_from_its_revision(published, run):
    base = CLIPModel.from_pretrained("owner/clip", revision="phase-0")
    adapted = peft.PeftModel.from_pretrained(base, "owner/clip", revision="phase-2")
    assert same(adapted.merge_and_unload().state_dict(), published._load_phase(2).state_dict())
    config = peft.PeftConfig.from_pretrained("owner/clip", revision="phase-2")
    assert (config.base_model_name_or_path, config.revision) == ("owner/clip", "phase-0")
    elsewhere = run(**PUBLISHED)
    assert same(weights(elsewhere, 2), weights(published, 2))


def test_run_goes_on_from_the_adapter_of_a_revision(published, run):
    stream = PhaseStream(published.stream.phases[:1], base=published.stream.base)
    second = run(stream=stream, start="owner/clip", revision="phase-1", lora_merge=False)
    assert same(weights(second, 0), published._load_phase(1).state_dict())
    source = json.loads((second.folder / "run.json").read_text())["model"]
    assert (source["repo_id"], source["revision"]) == ("owner/clip", "phase-1") and len(source["commit"]) == 40
    # The start of the second run is no model on the Hub: its own phase 0 is the only plain one.
    assert peft.PeftConfig.from_pretrained(second.phase_folder(1)).base_model_name_or_path == "phase-0"
    card = (second.phase_folder(1) / "README.md").read_text()
    assert card_problems(card) == [] and 'AutoModel.from_pretrained("phase-0")' in card


def test_card_of_an_adapter_names_its_base_and_loads_as_it_says(finished, tmp_path, monkeypatch, capsys):
    continual = finished(merge=False)
    write_card_of_run(continual.folder, 2, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert card_problems(card) == []
    assert ModelCard(card).data.library_name == "peft"
    monkeypatch.chdir(continual.folder)
    (loading,) = snippets(card)
    exec(loading, {})
    assert "a red square" in capsys.readouterr().out
    results = json.loads((continual.folder / "results.json").read_text())
    results["model"] = {"name": "a/b", "repo_id": "a/b", "commit": "c0ffee", "licence": "mit"}
    card = phase_card(continual.identity, results, 2, repo_id="me/clip", revision="phase-2")
    assert (ModelCard(card).data.base_model, ModelCard(card).data.base_model_relation) == ("a/b", "adapter")
    assert 'AutoModel.from_pretrained("a/b", revision="c0ffee")' in card
    assert 'PeftModel.from_pretrained(model, "me/clip", revision="phase-2")' in card
    assert "hu2022lora" in card
    before = phase_card(continual.identity, results, 0, repo_id="me/clip", revision="phase-0")
    assert "PeftModel" not in before and ModelCard(before).data.library_name == "transformers"


# ---- The weights that an adapter changes ----


def trained_adapter(model, make_args, **changes):
    """An adapter that has learned, on a model in double precision."""
    adapted = add_adapter(model.double(), make_args(**{**LORA, **changes}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return adapted


def test_trained_weights_are_those_of_the_merged_model(model, make_args):
    adapted = trained_adapter(model, make_args)
    found = {name: weight.detach().clone() for name, weight in trained_weights(adapted).items()}
    plain = merged(adapted).state_dict()
    assert len(found) == 24 and all(torch.equal(weight, plain[name]) for name, weight in found.items())


def test_trained_weights_of_a_plain_model_are_its_parameters(model):
    found = trained_weights(model)
    assert all(found[name] is parameter for name, parameter in model.named_parameters())


def test_gradient_of_trained_weights_is_that_of_the_merged_model(model, make_args):
    adapted = trained_adapter(model, make_args)
    plain = merged(copy.deepcopy(adapted)).requires_grad_(True)
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.double)
    with leaves_of_trained_weights(adapted) as leaves:
        adapted.get_image_features(pixel_values=pixels).pooler_output.sin().sum().backward()
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    plain.get_image_features(pixel_values=pixels).pooler_output.sin().sum().backward()
    expected = dict(plain.named_parameters())
    assert len(found) == 12  # of the vision tower
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=0, atol=1e-12)
    assert not any(p.requires_grad for name, p in adapted.named_parameters() if "base_layer" in name)


def test_trained_weights_can_be_set_to_what_no_adapter_holds(model, make_args):
    adapted = trained_adapter(model, make_args)
    wanted = {name: torch.randn_like(weight) for name, weight in trained_weights(adapted).items()}
    set_trained_weights(adapted, wanted)
    plain = merged(adapted).state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in wanted.items())


class KeepWeights(TrainerCallback):
    """The trained weights after every step."""

    def __init__(self):
        self.after_step = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after_step.append({name: weight.detach().clone() for name, weight in trained_weights(model).items()})


def train(model, args, processor, pairs, callbacks, **options):
    keep = KeepWeights()
    trainer = ModXTrainer(
        model,
        args,
        train_dataset=pairs,
        processing_class=processor,
        loss_callbacks=callbacks,
        callbacks=[keep],
        **options,
    )
    start = {name: weight.detach().clone() for name, weight in trained_weights(trainer.model).items()}
    trainer.train()
    return trainer, start, keep.after_step


def test_wise_ft_of_an_adapter_is_between_the_weights(model, make_args, processor, pairs):
    args = make_args(**LORA, max_steps=3, train_logit_scale=True)
    trainer, start, steps = train(model.double(), args, processor, pairs, [Contrastive(), WiseFT(0.3)])
    for name, weight in trained_weights(trainer.model).items():
        torch.testing.assert_close(weight, 0.7 * start[name] + 0.3 * steps[-1][name], rtol=0, atol=1e-12)


def test_wise_ft_refuses_an_adapter_that_has_learned_before(model, make_args, processor, pairs):
    with pytest.raises(ValueError, match="Merge it"):
        train(trained_adapter(model, make_args), make_args(), processor, pairs, [Contrastive(), WiseFT()])


def test_weight_ensemble_of_an_adapter_is_the_mean_of_the_weights(model, make_args, processor, pairs):
    args = make_args(**LORA, max_steps=4)
    trainer, start, steps = train(model.double(), args, processor, pairs, [Contrastive(), WeightEnsemble(2)])
    for name, weight in merged(trainer.model).state_dict().items():
        if name in start:
            mean = (start[name] + steps[0][name] + steps[2][name]) / 3
            torch.testing.assert_close(weight, mean, rtol=0, atol=1e-12)


def test_l2sp_of_an_adapter_is_the_squared_change_of_the_weights(model, make_args, processor, pairs):
    args = make_args(**LORA, max_steps=2, lr_scheduler_type="constant", warmup_steps=0)
    trainer, start, steps = train(model.double(), args, processor, pairs, "l2sp")
    change = sum((steps[0][name] - start[name]).square().sum() for name in start)
    logged = [entry["l2sp"] for entry in trainer.state.log_history if "l2sp" in entry]
    assert logged[0] == 0 and logged[1] == pytest.approx(change.item(), rel=1e-5)


def test_fisher_matrix_with_an_adapter_is_that_of_the_weights(model, processor, pairs, make_args):
    adapted, plain = EWC(batches=2), EWC(batches=2)
    for ewc, settings in ((adapted, LORA), (plain, {})):
        args = make_args(**settings)
        ModXTrainer(
            copy.deepcopy(model).double(),
            args,
            train_dataset=pairs,
            processing_class=processor,
            loss_callbacks=[Contrastive(), ewc],
        ).finish_phase()
    found, expected = adapted.state_dict(), plain.state_dict()
    assert len(found) == 24 and found.keys() < expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-15)


# ---- The adapter, and what is refused ----


def test_text_tower_of_an_adapter_has_its_own_learning_rate(model, make_args, processor, pairs):
    args = make_args(**LORA, max_steps=1, text_learning_rate_factor=10)
    trainer, *_ = train(model, args, processor, pairs, "finetune")
    rates = {
        id(parameter): group["initial_lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(0.1 if "text_model" in name else 0.01)


def test_adapter_is_the_same_every_time_and_another_with_another_seed(make_args, processor):
    def first_factor(**seed):
        adapted = add_adapter(tiny_clip(processor), make_args(**LORA, **seed))
        return next(parameter for name, parameter in adapted.named_parameters() if "lora_A" in name)

    state = torch.get_rng_state()
    assert torch.equal(first_factor(data_seed=3), first_factor(data_seed=3))
    assert not torch.equal(first_factor(data_seed=3), first_factor(data_seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_may_be_chosen_by_name(model, make_args):
    adapted = add_adapter(model, make_args(**LORA, lora_targets="q_proj, vision_model.encoder.layers.0.mlp.fc1"))
    chosen = {
        name.split(".lora_A")[0].removeprefix("base_model.model.")
        for name, _ in adapted.named_parameters()
        if "lora_A" in name
    }
    assert len(chosen) == 5 and sum("fc1" in name for name in chosen) == 1


def test_layer_that_is_not_there_is_named_with_those_that_are(model, make_args):
    with pytest.raises(ValueError, match="CLIPModel has no linear layer query. Its linear layers are named fc1, fc2"):
        add_adapter(model, make_args(**LORA, lora_targets="q_proj,query"))


def test_attention_of_torch_gets_no_adapter(model, make_args):
    model.vision_model.pooling = torch.nn.MultiheadAttention(32, 2)
    adapted = add_adapter(model, make_args(**LORA))
    assert not any("pooling" in name and "lora" in name for name, _ in adapted.named_parameters())


def test_adapter_on_an_adapter_is_refused(model, make_args, run):
    adapted = add_adapter(model, make_args(**LORA))
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(adapted, make_args(**LORA))
    with pytest.raises(ValueError, match="merge the adapter first"):
        run(start=adapted)


def test_weights_that_are_no_adapter_s_need_to_be_merged(run):
    with pytest.raises(ValueError, match="WeightEnsemble leaves is no adapter: it needs lora_merge"):
        run("zscl", lora_merge=False)


def test_missing_peft_is_said_with_the_remedy_before_training(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_modx\[peft\]'"):
        run()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft": "ia3"}, "peft must be 'lora'"),
        ({"train_logit_scale": True}, "train_logit_scale is for peft"),
        ({**LORA, "train_logit_scale": True, "lora_merge": False}, "train_logit_scale needs lora_merge"),
        ({**LORA, "lora_rank": 0}, "lora_rank must be at least 1"),
        ({**LORA, "lora_alpha": 0}, "lora_alpha must be positive"),
        ({**LORA, "lora_dropout": 1}, r"lora_dropout must be in \[0, 1\)"),
        ({"text_learning_rate": 1.0, "text_learning_rate_factor": 2.0}, "not both"),
        ({"text_learning_rate_factor": 0.0}, "must be positive"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=reason):
        ModXTrainingArguments(str(tmp_path), **settings)


def test_another_rank_is_another_run_and_an_older_run_goes_on(finished, processor, tmp_path):
    done = finished(merge=True)
    with pytest.raises(ValueError, match="lora_rank was 4 and is 8"):
        make_run(done.folder, processor, stream=make_stream(), lora_rank=8)
    plain = make_run(tmp_path, processor, peft=None).identity
    older = copy.deepcopy(plain)
    del older["hyperparameters"]["peft"], older["hyperparameters"]["text_learning_rate_factor"]
    assert changes(older, plain) == []
