"""All phases of a run: teacher hand-over, evaluation after every phase, and going on where it stopped."""

import copy
import gc
import logging
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import AutoModel, AutoProcessor, TrainerCallback, TrainerState

from .callbacks import LossCallback, check_recipe, replay_of
from .data import PairCollator, PairDataset, check_processor
from .demo import BASE_MAX_STEPS, trained_base
from .distributed import on_main_process
from .embeddings import check_dual_encoder, longest_caption
from .evaluation import EvaluationMatrix
from .evaluation.retrieval import RECALL_AT
from .files import publish_file, publish_folder, read_json, write_json
from .hub import Revision
from .hub_run import RunOnHub
from .identity import changes, run_identity, weights_fingerprint
from .image_cache import cache_resized_images
from .model_card import write_phase_card
from .phases import PhaseStream
from .provenance import data_source, environment, model_source
from .recipes import Part, build_recipe, recipe_name
from .replay import ReplayMemory, embed_rows
from .run_folder import (
    MEMORY,
    RECORD,
    RESULTS,
    checkpoints_folder,
    forget_start,
    has_trained,
    last_complete_checkpoint,
    phase_folder,
    state_file,
)
from .stream_checks import StreamChecks
from .teacher_cache import CachedTeacher
from .tracking import track_as_one_run
from .trainer import ModXTrainer
from .training_args import ModXTrainingArguments
from .training_log import thinned_log

logger = logging.getLogger(__name__)

METRICS = [
    *(f"{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in RECALL_AT),
    "image_to_text_mrr",
    "text_to_image_mrr",
]


class ContinualRun:
    """Train a model phase after phase and evaluate every test after every phase.

    The folder `args.output_dir` holds the run: `run.json` (what runs), `results.json` (the matrix), and `phase-K/`,
    each a plain model that `from_pretrained` loads; `phase-0/` is the model before the first phase. Call `run` again
    after any interruption: finished phases stay as they are, a phase begun goes on from its last checkpoint. A
    finished run with MORE phases trains only the new ones.

    With `args.push_to_hub` every finished phase becomes a revision of one repository on the Hub before the next one
    begins (see `hub.py`). An empty `output_dir` goes on with the run that the repository holds. What cannot be
    published is tried again after each phase, at the end, and when `run` is called again.

    Args:
        stream: the phases.
        recipe: what `build_recipe` takes: a name (see `RECIPES`), several as in "modx+er", or a list of parts or loss
            callbacks.
        args: steps and epochs are per phase.
        model: a dual encoder, or the name or path of one. None: the small CLIP trained on `stream.base`.
        processing_class: its processor. Default: loaded from where the model is.
        recipe_args: options of a recipe given by name; of a combination by part, as in {"modx": {"alpha": 5}}.
        revision: of a model given by name.
        base_max_steps: optimizer steps of the small CLIP, where no model is given.
        callbacks: further TrainerCallbacks for every phase.

    Raises:
        TypeError, ValueError: the model is no dual encoder; columns are missing or hold nulls; images cannot be
            decoded (unless `args.bad_samples="skip"`); `output_dir` holds a different run. All before any training.
        HubAccessError: with `push_to_hub`, no token, or one that may not write.
    """

    def __init__(
        self,
        stream: PhaseStream,
        recipe: str | Sequence[Part],
        args: ModXTrainingArguments,
        *,
        model: nn.Module | str | None = None,
        processing_class: Any = None,
        recipe_args: Mapping[str, Any] | None = None,
        revision: str | None = None,
        base_max_steps: int = BASE_MAX_STEPS,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if model is None and stream.base is None:
            raise ValueError("Without a model the stream needs a base to train the small CLIP on. Give a model.")
        self.args = args
        self.folder = Path(args.output_dir)
        self.recipe_name, self.loss_callbacks = recipe_name(recipe), build_recipe(recipe, **(recipe_args or {}))
        check_recipe(self.loss_callbacks)
        replay, seed = replay_of(self.loss_callbacks), args.data_seed if args.data_seed is not None else args.seed
        self.memory = ReplayMemory(self.folder / MEMORY, replay, self._columns, seed) if replay is not None else None
        self.callbacks = list(callbacks)
        self.state = PartialState()
        self.hub = RunOnHub(args) if args.push_to_hub else None
        self.model = self.processing_class = self.source = None
        if model is not None:
            self._load_start(model, processing_class, revision)
        checks = StreamChecks(args)
        self.stream, self.bad_samples = checks.usable(stream), checks.bad_samples
        self.tests = self.stream.tests()
        for callback in self.loss_callbacks:
            callback.start_run(self.stream.base.train if self.stream.base is not None else None)
        self.identity = run_identity(self.recipe_name, self.loss_callbacks, args, self.stream)
        self._base_max_steps = base_max_steps
        if model is None:
            self.identity["base_max_steps"] = base_max_steps
        else:
            self.identity["start"] = weights_fingerprint(self.model)
        self._refuse_other_run()

    def run(self) -> EvaluationMatrix:
        """Train what is not trained, evaluate what is not evaluated, publish what is not published.

        Returns:
            The matrix of image-to-text recall@1; `matrix(name)` has the other metrics.

        Raises:
            RepositoryConflict: the repository holds another run, or another folder has gone on with this one.
            UnpublishedPhases: all is trained and on the disk, but the Hub has not taken all of it.
        """
        with self.hub.alone() if self.hub is not None else nullcontext():
            return self._run()

    def _run(self) -> EvaluationMatrix:
        self._start()
        self._read_results()
        self._push()
        for number in range(len(self.stream) + 1):
            trainer = None
            if not self._is_finished(number):
                trainer = self._train_phase(number)
            if self._evaluate_phase(number, trainer):
                self._push()
            # A Trainer lives in reference cycles: without this its model, teacher and optimizer would stay in memory
            # beside the next phase's.
            del trainer
            gc.collect()
        if self.hub is not None:
            self.hub.settle(self._revisions, self._datasets_on_hub())
        return self.matrix()

    def _is_finished(self, number: int) -> bool:
        """The phase lies on the disk, or has lain there: its row is in the results."""
        return self.phase_folder(number).exists() or bool(number < len(self._rows) and self._rows[number])

    def phase_folder(self, number: int) -> Path:
        """Where the model after phase `number` lies; 0 is the model before the first phase."""
        return phase_folder(self.folder, number)

    def steps(self, number: int) -> int:
        """Optimizer steps that phase `number`, 1 being the first, takes."""
        first = 1 if self._starts_from_base else number
        return sum(self.args.phase_steps(len(self.stream.phases[k - 1].train)) for k in range(first, number + 1))

    def matrix(self, metric: str = METRICS[0], number: int | None = None) -> EvaluationMatrix:
        """The matrix of one metric as far as it is measured, or as it is after phase `number`."""
        rows = self._rows if number is None else self._rows[: number + 1]
        return EvaluationMatrix(
            [phase.name for phase in self.stream][: len(rows) - 1],
            list(self.tests),
            [[row.get(test, {}).get(metric) for test in self.tests] for row in rows],
            [k if k is None or k < len(rows) else None for k in self._learned_at()],
        )

    # ---- Before training ----

    def _load_start(self, model: nn.Module | str | Path, processing_class: Any, revision: str | None) -> None:
        self.source = {"name": "a model in memory"}
        if isinstance(model, str | Path):
            name = model
            processing_class = processing_class or AutoProcessor.from_pretrained(model, revision=revision)
            # Weights are trained in fp32 whatever they are stored in; bf16 is a matter of autocast.
            model = AutoModel.from_pretrained(model, revision=revision, dtype=torch.float32)
            self.source = on_main_process(lambda: model_source(name, revision))
        check_dual_encoder(model)
        if processing_class is None:
            raise ValueError("Give the model's processor as processing_class, for instance a CLIPProcessor.")
        check_processor(processing_class)
        self.model, self.processing_class, self._model_class = model, processing_class, type(model)

    def _refuse_other_run(self) -> None:
        """Raise unless the folder is free, holds the same run, or one that has trained nothing yet."""
        before = read_json(self.folder / RECORD)
        if before is None and self.phase_folder(0).exists():
            raise ValueError(f"{self.folder} holds phases but no run.json. Choose another output_dir.")
        is_begun = before is not None and has_trained(self.folder)
        differences = changes(before["identity"], self.identity) if is_begun else []
        if differences:
            raise ValueError(
                f"{self.folder} holds a different run: {'; '.join(differences)}. Choose another output_dir, or give "
                "the same settings to go on."
            )

    def _start(self) -> None:
        """Write run.json and phase-0, or find them in the folder or on the Hub."""
        self._refuse_other_run()
        self._ids = on_main_process(self._own_ids)
        is_on_hub = False
        if self.hub is not None:
            self._ids["run_id"], is_on_hub = self.hub.open(self._record(), is_new=not has_trained(self.folder))
        if self.processing_class is None:
            start = self.phase_folder(0) if is_on_hub else trained_base(self.stream, self.args, self._base_max_steps)
            self._load_start(start, None, None)
            self.source = {"name": "small CLIP", "trained_on": self.stream.base.name}
            self.identity["start"] = weights_fingerprint(self.model)
            self._refuse_other_run()
        fresh = self.model is not None and not is_on_hub and not has_trained(self.folder)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if fresh:
                forget_start(self.folder)
            write_json(self.folder / RECORD, self._record())
        if self.args.image_cache is not None:
            self._keep_resized_images()  # the identity of the run is that of the images as they are
        if fresh:
            self._publish(0, self.model)
        self.model = None  # from here on models come from the folders of the phases

    def _keep_resized_images(self) -> None:
        """Train and test on images that are resized already, the same to the last bit."""

        def resized(_: str, part: Dataset) -> Dataset:
            workers = self.args.dataloader_num_workers or None
            return cache_resized_images(
                part, self.args.image_column, self.processing_class, self.args.image_cache, workers
            )

        with self.args.main_process_first(local=True):
            self.stream = self.stream.map_parts(resized)
        self.tests = self.stream.tests()

    def _own_ids(self) -> dict[str, str]:
        """Which run this is, and which of its copies: a run that goes on elsewhere keeps its `run_id`."""
        before = read_json(self.folder / RECORD) or {}
        return {name: before.get(name) or uuid.uuid4().hex for name in ("run_id", "writer")}

    def _record(self) -> dict[str, Any]:
        """What run.json holds."""
        packages = ("hf_modx", "transformers", "accelerate", "datasets", "torch")
        return {
            **self._ids,
            "identity": self.identity,
            "model": self.source,
            "versions": {name: version(name) for name in packages},
            "processes": self.state.num_processes,
        }

    # ---- One phase ----

    def _train_phase(self, number: int) -> ModXTrainer:
        phase = self.stream.phases[number - 1]
        starts_from = self._parent(number)
        trainer = self._trainer(number, self._load_phase(starts_from), self._training_data(number))
        memory = self._memory_after(number - 1)
        if memory is not None:
            trainer.use_memory(memory)
        for callback in self.hub.checkpoint_callbacks(number, starts_from, self._record()) if self.hub else []:
            trainer.add_callback(callback)
        logger.info("Phase %d of %d: %s, %d pairs", number, len(self.stream), phase.name, len(trainer.train_dataset))
        self._restore_state(trainer, starts_from)
        checkpoint = on_main_process(lambda: last_complete_checkpoint(checkpoints_folder(self.folder, number)))
        state = _state_of(checkpoint) if checkpoint is not None else None
        if state is not None and state.global_step >= self.steps(number):
            # Interrupted between the last step and the publishing: `train` would do one step too many.
            trainer.finish_from(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.args.enable_jit_checkpoint and trainer.state.global_step < trainer.state.max_steps:
            # After SIGTERM the Trainer saves a checkpoint and returns as if it had finished.
            raise RuntimeError(f"Phase {number} was interrupted. Run the same command again to go on.")
        record = _training_record(trainer) | {"starts_from": starts_from}
        if state is not None:
            record["resumed_at_step"] = state.global_step
        self._save_state(number, trainer)
        self._publish(number, trainer.accelerator.unwrap_model(trainer.model), record)
        if isinstance(trainer.teacher, CachedTeacher):
            trainer.teacher.remove()
        return trainer

    def _restore_state(self, trainer: ModXTrainer, number: int) -> None:
        """Give the loss callbacks what they knew after phase `number`, which is what they go on from."""
        path = state_file(self.folder, number)
        learn_base = self.stream.base is not None and any(c.learns_from_base for c in self.loss_callbacks)
        is_there = on_main_process(path.exists)
        if number == 0 and not is_there and learn_base:
            before = self._trainer(0, self._load_phase(0), self.stream.base.train)
            before.load_loss_callbacks(path)
            before.finish_phase()
            self._save_state(0, before)
        keepers = self._keepers()
        if number > 0 and not is_there and keepers:
            raise FileNotFoundError(
                f"{path} is needed to go on and is not there: it holds what {' and '.join(keepers)} keep from phase "
                f"{number}."
            )
        trainer.load_loss_callbacks(path)

    def _keepers(self) -> list[str]:
        """The loss callbacks that keep something from phase to phase."""
        return [type(c).__name__ for c in self.loss_callbacks if type(c).state_dict is not LossCallback.state_dict]

    def _save_state(self, number: int, trainer: ModXTrainer) -> None:
        if not self._keepers():
            return
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            path = state_file(self.folder, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            trainer.save_loss_callbacks(temporary)
            publish_file(temporary, path)
        self.state.wait_for_everyone()

    @property
    def _starts_from_base(self) -> bool:
        return any(callback.starts_from == "base" for callback in self.loss_callbacks)

    def _parent(self, number: int) -> int:
        """The phase whose weights a phase starts from."""
        return 0 if self._starts_from_base else number - 1

    def _training_data(self, number: int) -> Dataset:
        if all(callback.trains_on == "phase" for callback in self.loss_callbacks):
            return self.stream.phases[number - 1].train
        known = [self.stream.base] if self.stream.base is not None else []
        parts = [phase.train for phase in [*known, *self.stream.phases[:number]]]
        shared = [column for column in self._columns if all(column in part.column_names for part in parts)]
        return concatenate_datasets([part.select_columns(shared) for part in parts])

    @property
    def _columns(self) -> list[str]:
        return [self.args.image_column, self.args.caption_column, self.args.pair_id_column]

    def _memory_after(self, number: int) -> Dataset | None:
        """What is kept for replay of the base and the phases up to this one."""
        if self.memory is None:
            return None
        base = self.stream.base.train if self.stream.base is not None else None
        return self.memory.after(number, [base, *(phase.train for phase in self.stream)], self._embed)

    def _embed(self, number: int, rows: Dataset) -> tuple[list, list]:
        """The embeddings of some rows under the model after a phase."""
        model = self._load_phase(number)
        longest = longest_caption(model, self.processing_class.tokenizer)
        return embed_rows(
            model,
            PairDataset(rows, *self._columns),
            PairCollator(self.processing_class, max_length=longest),
            batch_size=self.args.eval_batch_size,
            device=self.args.device,
        )

    def _trainer(self, number: int, model: nn.Module, train_dataset: Dataset | None) -> ModXTrainer:
        args = copy.copy(self.args)
        args.output_dir = str(checkpoints_folder(self.folder, number))
        args.data_seed = _phase_seed(self.args, number)
        args.push_to_hub, args.hub_token = False, None  # the run publishes; checkpoints hold the arguments
        if number > 0 and any(callback.trains_on != "phase" for callback in self.loss_callbacks):
            args.max_steps = self.steps(number)  # not those of an epoch of all data
        args.run_name = args.run_name or self.folder.resolve().name  # one run for the trackers
        trainer = ModXTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset={name: dataset for name, (dataset, _) in self.tests.items()},  # for eval_strategy
            processing_class=self.processing_class,
            callbacks=list(self.callbacks),
            loss_callbacks=self.loss_callbacks,
        )
        steps = [self.steps(k) for k in range(1, number + 1)]
        name = f"phase-{number}-{self.stream.phases[number - 1].name if number else 'start'}"
        track_as_one_run(
            trainer, self.folder, name, list(self.tests), steps_before=sum(steps[:-1]), steps=sum(steps[-1:])
        )
        return trainer

    def _load_phase(self, number: int) -> nn.Module:
        folder = self.phase_folder(number)
        if not folder.exists():
            raise FileNotFoundError(f"{folder} is needed to go on and is not there any more.")
        return self._model_class.from_pretrained(folder, dtype=torch.float32)

    def _publish(self, number: int, model: nn.Module, record: dict[str, Any] | None = None) -> None:
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            final = self.phase_folder(number)
            temporary = final.with_name(f".{final.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            model.save_pretrained(temporary)
            self.processing_class.save_pretrained(temporary)
            if record is not None:
                write_json(temporary / "training.json", record | {"weights": weights_fingerprint(model)})
            publish_folder(temporary, final)
        self.state.wait_for_everyone()

    # ---- Evaluation ----

    def _evaluate_phase(self, number: int, trainer: ModXTrainer | None) -> bool:
        """Fill the row of a phase: all of it after its training, later only what a longer stream adds. Whether it is a
        new row."""
        is_new = number == len(self._rows)
        if is_new:
            self._rows.append({})
        row = self._rows[number]
        missing = {name: dataset for name, (dataset, _) in self.tests.items() if name not in row}
        if missing and trainer is None and not self.phase_folder(number).exists():
            logger.warning("%s is gone: its row cannot be completed.", self.phase_folder(number))
            return is_new
        if missing and trainer is None:
            trainer = self._trainer(number, self._load_phase(number), None)
        for name, dataset in missing.items():
            metrics = trainer.evaluate(dataset, metric_key_prefix=name)
            row[name] = {metric: metrics[f"{name}_{metric}"] for metric in METRICS}
        if missing or is_new:
            on_main_process(lambda: self._write_results(number))
        return is_new

    def _read_results(self) -> None:
        results = read_json(self.folder / RESULTS)
        self._rows: list[dict[str, dict[str, float]]] = []
        if results is None:
            return
        for number in range(len(results["matrix"][METRICS[0]])):
            row: dict[str, dict[str, float]] = {}
            for column, test in enumerate(results["tests"]):
                cell = {metric: results["matrix"][metric][number][column] for metric in METRICS}
                if test in self.tests and None not in cell.values():
                    row[test] = cell
            self._rows.append(row)

    def _write_results(self, number: int) -> None:
        """The card of a phase, and then the results, which make it a finished one."""
        results = self._results(len(self._rows) - 1)
        published = {} if self.hub is None else {"repo_id": self.hub.repo_id, "revision": f"phase-{number}"}
        write_phase_card(self.phase_folder(number), self.identity, results, number, **published)
        write_json(self.folder / RESULTS, results)

    def _results(self, number: int) -> dict[str, Any]:
        """The results as they are after a phase."""
        matrices = {metric: self.matrix(metric, number) for metric in METRICS}
        return {
            "recipe": self.recipe_name,
            "phases": matrices[METRICS[0]].phases,
            "tests": list(self.tests),
            "learned_at": matrices[METRICS[0]].learned_at,
            "matrix": {metric: matrix.to_lists() for metric, matrix in matrices.items()},
            "summary": {metric: matrix.summary() for metric, matrix in matrices.items()},
            "training": [read_json(self.phase_folder(k) / "training.json") for k in range(1, number + 1)],
            "test_pairs": {name: len(dataset) for name, (dataset, _) in self.tests.items()},
            "model": self.source,
            "sources": {phase.name: data_source(phase.train) for phase in self.stream.all_phases()},
            "test_sources": {name: data_source(dataset) for name, (dataset, _) in self.tests.items()},
            "bad_samples": {
                name: {"count": len(bad), "first": [str(sample) for sample in bad[:10]]}
                for name, bad in self.bad_samples.items()
                if bad
            },
        }

    def _learned_at(self) -> list[int | None]:
        return [learned_at for _, learned_at in self.tests.values()]

    # ---- The Hub ----

    def _push(self) -> None:
        """Publish the finished phases that are not published."""
        if self.hub is not None and self._rows:
            self.hub.publish(self._revisions)

    def _datasets_on_hub(self) -> list[str]:
        """Ids of the data sets that the stream was loaded from."""
        parts = [phase.train for phase in self.stream.all_phases()] + [dataset for dataset, _ in self.tests.values()]
        found = {data_source(part).get("dataset_id") for part in parts}
        return sorted(found - {None})

    def _revisions(self) -> list[Revision]:
        """All finished phases as they are to be published, each with the results as they were after it."""
        revisions = []
        for number in range(len(self._rows)):
            title, parent = "Before the first phase", None
            if number:
                title, parent = f"Phase {number}: {self.stream.phases[number - 1].name}", self._parent(number)
            record = {**self._record(), "phase": number}
            revisions.append(self.hub.revision(number, parent, title, run=record, results=self._results(number)))
        return revisions


def _phase_seed(args: ModXTrainingArguments, number: int) -> int:
    seed = args.data_seed if args.data_seed is not None else args.seed
    return 1000 * seed + number


def _state_of(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def _training_record(trainer: ModXTrainer) -> dict[str, Any]:
    """What the log of a phase says in short: how many rows the old model had right, the time, and the curves."""
    history = trainer.state.log_history
    record: dict[str, Any] = {"steps": trainer.state.global_step, "pairs": len(trainer.train_dataset)}
    if trainer.memory is not None:
        record["memory_pairs"] = len(trainer.memory)
    for name in ("image_rows_kept", "text_rows_kept"):
        values = [entry[name] for entry in history if name in entry]
        if values:
            record[name] = {"first": values[0], "mean": sum(values) / len(values), "last": values[-1]}
    record["environment"] = environment(trainer.args.device, trainer.args.world_size)
    for name in ("train_runtime", "train_samples_per_second"):
        record[name] = next((entry[name] for entry in reversed(history) if name in entry), None)
    joules = [entry["train_energy_joules"] for entry in history if "train_energy_joules" in entry]
    if joules:
        record["train_energy_joules"] = joules[-1]
    record["log"] = thinned_log(history)
    return record
