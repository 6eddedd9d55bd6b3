"""One process at a time in the folder of a run."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

from hf_modx.deletion import forget
from hf_modx.rollback import rollback
from hf_modx.run.lock import LOCK, alone_in

from test_continual import make_stream, run  # noqa: F401 - run is a fixture

HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print(flush=True)
    time.sleep(60)
"""


@contextmanager
def held_by_another_process(folder):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.kill()


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr("hf_modx.run.lock.LOCK_WAIT", 0.1)


def test_training_is_refused_while_another_process_is_in_the_folder_and_goes_on_when_it_is_killed(run, tmp_path):  # noqa: F811
    with held_by_another_process(tmp_path / "out"):
        with pytest.raises(BlockingIOError, match="Another process is training in .*out"):
            run(make_stream(1))
        assert not (tmp_path / "out" / "run.json").exists()
    assert run(make_stream(1)).phase_folder(1).exists()


@pytest.mark.parametrize("change", [lambda folder: rollback(folder, 0), lambda folder: forget(folder, [1])])
def test_a_run_is_not_changed_while_another_process_is_in_the_folder(run, tmp_path, change):  # noqa: F811
    run(make_stream(1))
    before = (tmp_path / "out" / "run.json").read_bytes()
    with held_by_another_process(tmp_path / "out"), pytest.raises(BlockingIOError, match="Another process"):
        change(tmp_path / "out")
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    change(tmp_path / "out")
    assert (tmp_path / "out" / "run.json").read_bytes() != before


def test_the_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), alone_in(tmp_path):
        raise KeyError
    with alone_in(tmp_path):
        pass
