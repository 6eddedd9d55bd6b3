"""What comes with data, models and checkpoints is not run, and writes nothing where it likes.

What they say is escaped in cards and reports (test_model_card, test_report), YAML is read as strings
(test_yaml_arguments), and tokens are told nowhere (test_hub).
"""

import json
import pickle

import pytest
import torch
from transformers import TrainerCallback

from hf_modx import ContinualRun, Phase, PhaseStream
from hf_modx.files import seal
from hf_modx.pretrained import load_model

from test_continual import make_stream
from tiny import tiny_pairs


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_names_and_paths_in_data_lead_nowhere(model, processor, make_args, tmp_path):
    up = "../../../up"
    data = tiny_pairs(14).cast_column("image", tiny_pairs(1).features["image"].__class__(decode=False))
    rows = data.to_list()
    for number, row in enumerate(rows):
        row["image"]["path"] = f"{up}/{number}.png"
    data = data.from_list(rows, features=tiny_pairs(1).features)
    stream = PhaseStream((Phase(up, data.select(range(10)), data.select(range(10, 14))),))
    work = tmp_path / "a" / "b" / "c"
    args = make_args(
        output_dir=str(work / "out"),
        image_cache=str(work / "images"),
        teacher_cache="disk",
        save_strategy="steps",
        report_to="tensorboard",
        max_steps=2,
    )
    ContinualRun(stream, "modx+er", args, model=model, processing_class=processor).run()
    assert not [path for path in tmp_path.rglob("*") if work not in path.parents and path not in (work, *work.parents)]
    assert {path.name for path in work.iterdir()} == {"out", "images"}
    assert not list(tmp_path.rglob("up*"))


def test_code_that_lies_beside_a_model_is_not_run(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')")
    assert type(load_model(tmp_path)) is type(model)
    assert not (tmp_path / "trapped").exists()


def test_pickle_in_the_place_of_weights_is_not_unpickled(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"logit_scale": Trap(tmp_path / "trapped")}, tmp_path / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        load_model(tmp_path)
    assert not (tmp_path / "trapped").exists()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise SystemError("power cut")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_pickle_in_a_checkpoint_is_not_unpickled(model, processor, make_args, tmp_path, name):
    def run(callbacks=()):
        args = make_args(save_strategy="steps", save_steps=2, max_steps=4)
        ContinualRun(
            make_stream(1), "finetune", args, model=model, processing_class=processor, callbacks=callbacks
        ).run()

    with pytest.raises(SystemError):
        run([Stop()])
    checkpoint = tmp_path / "out" / "checkpoints" / "phase-1" / "checkpoint-2"
    torch.save(Trap(tmp_path / "trapped"), checkpoint / name)
    seal(checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        run()
    assert not (tmp_path / "trapped").exists()
