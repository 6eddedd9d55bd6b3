"""Shared by all tests: nothing leaves the machine, caches are temporary, models are tiny."""

import gc
import os
import tempfile
from functools import partial

from hub_server import reserve_port

# Read by huggingface_hub and datasets at import time. The Hub is a port of this machine where nobody listens
# except while a test uses the fixture `hub`.
# The workers of one run share the caches of the process that started them.
_HOME = os.environ.get("HF_MODX_TESTS_HOME") or tempfile.mkdtemp(prefix="hf_modx-tests-")
_HUB_PORT = reserve_port()
os.environ.update(
    HF_MODX_TESTS_HOME=_HOME,
    HF_HOME=_HOME,
    HF_DATASETS_CACHE=f"{_HOME}/datasets",
    # Not this one: each worker has a Hub of its own, with other repositories of the same names.
    HF_HUB_CACHE=f"{_HOME}/hub-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}",
    HF_ENDPOINT=f"http://127.0.0.1:{_HUB_PORT.getsockname()[1]}",
    HF_HUB_OFFLINE="0",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="127.0.0.1",
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from tiny import quick_arguments, tiny_clip, tiny_pairs, tiny_processor

pytest_plugins = ["hub_fixtures"]

torch.set_num_threads(1)
# No test cuts the real power, and whole runs would wait for the disk a seventh of their time. (`kill_points.py` knows
# what is flushed and what is not.)
os.fsync = lambda file: None
# Examples of each fuzzed property; HYPOTHESIS_PROFILE=long takes the time for many.
settings.register_profile("short", max_examples=50, deadline=None)
settings.register_profile("long", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_collection_finish():
    """Garbage is collected several times in every run, half a second each time with all that is imported here: what is
    there now stays for good and need not be looked through."""
    gc.freeze()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture
def model(processor):
    return tiny_clip(processor)


@pytest.fixture(scope="session")
def pairs():
    return tiny_pairs(48)


@pytest.fixture
def make_args(tmp_path):
    """Arguments for six quick steps; keywords override."""
    return partial(quick_arguments, tmp_path / "out")


@pytest.fixture
def start(model, processor, tmp_path):
    """The tiny model as a folder."""
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


@pytest.fixture
def one_thread(monkeypatch):
    """The example would take all cores of this process, and processes forked off threads hang."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
