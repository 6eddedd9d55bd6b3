"""A run and its repository on the Hub: what the folder lacks is fetched, what the Hub lacks is published."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from ..distributed import on_main_process
from ..files import as_json, publish_file, publish_folder, read_json, write_json
from ..run.folder import (
    DELETED,
    RECORD,
    RESULTS,
    checkpoints_folder,
    finished_rows,
    forget_start,
    phase_folder,
    state_file,
)
from ..training.checkpoint import LOSS_CALLBACKS_NAME
from ..training_args import ModXTrainingArguments
from .faults import HubAccessError, HubError
from .publisher import CARD, CHECKPOINT, HubPublisher, Revision

logger = logging.getLogger(__name__)

IN_PROGRESS = """---
library_name: transformers
tags: [hf_modx, continual-learning]
---

# Phase {number} is being trained

`last-checkpoint/` holds the state of the training after step {step} of {steps}. The other files are the model after
phase {parent}, from which this phase started. When it is finished, this branch holds its model and its card.
"""


class UnpublishedPhases(RuntimeError):
    """The run is finished and on the disk, but not all of it is on the Hub. `missing` names what is not."""

    missing: tuple[str, ...] = ()


class RunOnHub:
    """The Hub's side of a ContinualRun. Only the main process asks the Hub, and every process learns the outcome; the
    others wait for it, so an upload must not take longer than `ddp_timeout`, half an hour unless told otherwise.

    Args:
        args: used are `hub_model_id` (default: the name of the output folder), `hub_token`, `hub_private_repo`,
            `hub_strategy` ("checkpoint": the last checkpoint inside a phase is published too), `resume_from_hub` and
            `hub_collection`.

    Raises:
        ValueError: `hub_revision` is given, or a name that no repository can have.
        HubAccessError: no token, or one that the Hub does not accept or that is for reading.
        HubError: the Hub does not answer, and the folder has never been published.
    """

    def __init__(self, args: ModXTrainingArguments):
        if args.hub_revision is not None:
            raise ValueError("hub_revision is for a Trainer alone: every phase of a run has a branch of its own.")
        self.args, self.folder = args, Path(args.output_dir)
        name = args.hub_model_id or self.folder.resolve().name
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"{name!r} cannot be a repository. Give hub_model_id another name. {error}") from None
        self.publisher = HubPublisher(
            name,
            self.folder,
            token=args.hub_token,
            private=args.hub_private_repo,
        )
        on_main_process(lambda: self._ask(self.publisher.check_access))

    @property
    def repo_id(self) -> str:
        """Complete on the main process."""
        return self.publisher.repo_id

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of this user on this machine may publish to the repository meanwhile."""
        on_main_process(self.publisher.lock)
        try:
            yield
        finally:
            self.publisher.unlock()

    # ---- Before training ----

    def open(self, record: Mapping[str, Any], *, is_new: bool) -> tuple[str, bool]:
        """Make this folder the writer of the repository, and fetch the phases that only the repository has.

        Args:
            record: what `run.json` holds, with `run_id`, `writer` and `identity`.
            is_new: nothing is trained in the folder.

        Returns:
            The `run_id` that counts, and whether phase 0 is published.

        Raises:
            RepositoryConflict, HubAccessError, HubError: see `HubPublisher.claim`.
        """
        return on_main_process(lambda: self._open(record, is_new))

    def _open(self, record: Mapping[str, Any], is_new: bool) -> tuple[str, bool]:
        run_id = self._ask(partial(self.publisher.claim, record, is_new=is_new))
        if run_id is None:
            return record["run_id"], False
        if run_id != record["run_id"]:
            forget_start(self.folder)
        ids = {"run_id": run_id, "writer": record["writer"]}
        if self.publisher.rolled_back_to is not None:  # phases that were published before do not know of it
            ids["rolled_back_to"] = self.publisher.rolled_back_to
        try:
            self._fetch(ids)
        except HubError as error:
            raise HubError(f"The run on the Hub could not be fetched; the same command tries again. {error}") from None
        return run_id, 0 in self.publisher.on_hub

    def _fetch(self, ids: Mapping[str, Any]) -> None:
        """The phases that the folder lacks, and the checkpoint inside the next one if that is wanted."""
        on_hub = len(self.publisher.on_hub)
        for number in range(finished_rows(self.folder), on_hub):
            self._fetch_phase(number, ids)
        may_know_deleted_pairs = (self.folder / DELETED).exists()
        if self.args.resume_from_hub and finished_rows(self.folder) == on_hub and not may_know_deleted_pairs:
            self._fetch_checkpoint(on_hub)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer. None where there is none and the folder has published before: it goes on and publishes later."""
        try:
            return question()
        except HubAccessError:
            raise
        except HubError as error:
            if not self.publisher.has_pushed:
                raise HubError(f"The Hub does not answer, so nothing is begun. {error}") from None
            logger.warning("The Hub does not answer; phases are published as soon as it does. %s", error)
            return None

    def _fetch_phase(self, number: int, ids: Mapping[str, Any]) -> None:
        """The phase counts as finished when its row is in the results, which come last."""
        final = phase_folder(self.folder, number)
        temporary = final.with_name(f".{final.name}.tmp")
        for leftover in (temporary, final):
            shutil.rmtree(leftover, ignore_errors=True)
        self.publisher.fetch_phase(number, temporary)
        record, results = (read_json(temporary / name) for name in (RECORD, RESULTS))
        for name in (RECORD, RESULTS):
            (temporary / name).unlink()
        write_json(self.folder / RECORD, {**record, **ids})
        if (temporary / LOSS_CALLBACKS_NAME).exists():
            state_file(self.folder, number).parent.mkdir(exist_ok=True)
            publish_file(temporary / LOSS_CALLBACKS_NAME, state_file(self.folder, number))
        publish_folder(temporary, final)
        write_json(self.folder / RESULTS, results)

    def _fetch_checkpoint(self, number: int) -> None:
        folder = checkpoints_folder(self.folder, number)
        temporary = folder / ".fetched.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        if not any(folder.glob("checkpoint-*")) and self.publisher.fetch_checkpoint(number, temporary):
            step = read_json(temporary / "trainer_state.json")["global_step"]
            publish_folder(temporary, folder / f"checkpoint-{step}")
            logger.info("Phase %d goes on from step %d, fetched from %s", number, step, self.repo_id)

    # ---- Publishing ----

    def publish(self, finished: int, revision: Callable[[int], Revision]) -> None:
        """Publish the finished phases that are not yet. What fails is tried again the next time.

        Args:
            finished, revision: see `HubPublisher.publish`.

        Raises:
            RepositoryConflict: another folder has become the writer.
        """
        on_main_process(lambda: self.publisher.publish(finished, revision))

    def revision(self, number: int, parent: int | None, title: str, **contents: Any) -> Revision:
        """All files of a phase's folder, and `contents` as JSON: run for run.json, results for results.json."""
        return revision_of_phase(self.folder, number, parent, title, **contents)

    def checkpoint_callbacks(self, number: int, parent: int, record: Mapping[str, Any]) -> list[TrainerCallback]:
        """What publishes the checkpoints inside a phase, where `hub_strategy` asks for it."""
        if self.args.hub_strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            return []
        return [PushCheckpoints(self.publisher, number, parent, record)]

    def settle(self, finished: int, revision: Callable[[int], Revision], datasets: Iterable[str]) -> None:
        """At the end: try once more what is missing, make the collection, and say what is not on the Hub.

        Args:
            finished, revision: see `HubPublisher.publish`.
            datasets: ids of the data sets for the collection.

        Raises:
            UnpublishedPhases: something is still missing.
        """
        on_main_process(lambda: self._settle(finished, revision, datasets))

    def _settle(self, finished: int, revision: Callable[[int], Revision], datasets: Iterable[str]) -> None:
        publisher = self.publisher
        if publisher.missing:
            publisher.publish(finished, revision)
        if self.args.hub_collection is not None and not publisher.missing:
            publisher.collect(self.args.hub_collection, datasets)
        if publisher.missing:
            error = UnpublishedPhases(
                f"Not on the Hub ({publisher.repo_id}): {', '.join(publisher.missing)}. All is in {self.folder}; the "
                f"same command, run again, publishes what is missing. The last fault: {publisher.reason}"
            )
            error.missing = publisher.missing
            raise error


def revision_of_phase(run: Path, number: int, parent: int | None, title: str, /, **contents: Any) -> Revision:
    """See `RunOnHub.revision`, of the run in a folder."""
    folder = phase_folder(run, number)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".tmp")
    }
    state = state_file(run, number)
    if number > 0 and files and state.exists():  # that of phase 0 is made anew
        files[LOSS_CALLBACKS_NAME] = state
    jsons = {f"{name}.json": as_json(content).encode() for name, content in contents.items()}
    return Revision(number, parent, " ".join(title.split()), files | jsons)


class PushCheckpoints(TrainerCallback):
    """Publishes each checkpoint of a phase on the branch of that phase, with a card that says what it is.

    `training_args.bin` stays here: it is a pickle that nobody needs to go on.
    """

    def __init__(self, publisher: HubPublisher, number: int, parent: int, record: Mapping[str, Any]):
        self.publisher, self.number, self.parent, self.record = publisher, number, parent, record

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # until every process has written its random state
        on_main_process(lambda: self._push(Path(args.output_dir) / f"checkpoint-{state.global_step}", state))

    def _push(self, checkpoint: Path, state: TrainerState) -> None:
        card = IN_PROGRESS.format(
            number=self.number, step=state.global_step, steps=state.max_steps, parent=self.parent
        )
        files = {
            f"{CHECKPOINT}/{path.relative_to(checkpoint).as_posix()}": path
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.name != TRAINING_ARGS_NAME
        }
        files |= {CARD: card.encode(), RECORD: as_json(dict(self.record)).encode()}
        title = f"Phase {self.number}, step {state.global_step} of {state.max_steps}"
        self.publisher.push_checkpoint(Revision(self.number, self.parent, title, files))
