"""The Hub on loopback for a test, in its own process and in others."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, HfFileSystem, constants

from hub_server import OWNER, LoopbackHub

TESTS = Path(__file__).parent


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub at HF_ENDPOINT; whoever names no token is "owner". What clients had cached is forgotten."""
    monkeypatch.setenv("HF_TOKEN", OWNER)
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    HfFileSystem.clear_instance_cache()
    with LoopbackHub(tmp_path / "hub", port=int(constants.ENDPOINT.rpartition(":")[2])) as running:
        yield running
    assert running.crashes == []


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """State of the Hub and of the folder `out` by name, made once and copied into the test afterwards."""
    kept = {}

    def prepared(name, hub, out, make):
        if name not in kept:
            make()
            kept[name] = tmp_path_factory.mktemp(name)
            shutil.copytree(hub.folder, kept[name] / "hub")
            shutil.copytree(out, kept[name] / "out")
        else:
            shutil.copytree(kept[name] / "hub", hub.folder, dirs_exist_ok=True)
            shutil.copytree(kept[name] / "out", out)

    return prepared


@pytest.fixture
def short_waits(monkeypatch):
    """Ours, and those of the client between its own attempts."""
    monkeypatch.setattr("hf_modx.hub.faults.FIRST_WAIT", 0.01)
    monkeypatch.setattr("hf_modx.hub.publisher.LOCK_WAIT", 0.2)
    sleep = time.sleep
    quick = SimpleNamespace(sleep=lambda seconds: sleep(seconds / 100))
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)


def pytest_itemcollected(item):
    # huggingface_hub sends large files with an argument that its HTTP library calls deprecated.
    if "hub" in item.fixturenames:
        item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


def run_with_hub(
    hub: LoopbackHub, script: str | Path, *arguments: str, token: str | None = OWNER, check: bool = True, **environment
) -> subprocess.CompletedProcess:
    """A Python process of its own, with an empty cache, that knows the Hub by its environment alone.

    Args:
        script: a file, or Python code.
        token: None for nobody.
        check: an exit status other than 0 is an error that shows what the process wrote.
    """
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, *([script] if isinstance(script, Path) else ["-c", script]), *arguments]
        result = subprocess.run(
            command, env=hub_environment(hub, home, token, **environment), capture_output=True, text=True
        )
    if check and result.returncode != 0:
        raise RuntimeError(f"The process ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def hub_environment(hub: LoopbackHub, home: str | Path, token: str | None = OWNER, **changes: str) -> dict[str, str]:
    """What a process needs in its environment; what conftest.py has set for all tests holds there too."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_DATASETS_CACHE": f"{home}/datasets"}
    environment |= {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return environment | ({"HF_TOKEN": token} if token else {}) | changes
