"""The benchmark scripts run, in small."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
SMALL = {
    "loss": "--sizes 64 --dimensions 16 --repeats 1",
    "gradient_cache": "--batch 12 --chunk 4 --repeats 1",
    "training_step": "--steps 2 --rounds 1 --batch 4",
    "gpu_check": "--device cpu --sizes 64 --repeats 1",
    "retrieval": "--images 40 --captions_per_image 2 --dim 16 --repeats 1",
    "recipe_cost": "--recipes modx,zscl --batch 4 --steps 2 --rounds 1 --reference_texts 20",
    "long_stream": "--phases 6 --rows 2",
    "alpha_pull": "--sizes 8 16 --steps 1 --base_max_steps 1 --batches 1",
    "input_pipeline": "--images 8 --batch_size 4 --workers 0,1 --repeats 1",
}


def test_every_script_is_run():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"measure", "published_matrices"}
    assert scripts == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_script_prints_its_table(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [script, *SMALL[script].split()])
    failed = importlib.import_module(script).main()
    assert not failed
    assert "| ---" in capsys.readouterr().out
