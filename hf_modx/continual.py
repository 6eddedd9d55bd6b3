"""All phases of a run: teacher hand-over, evaluation after every phase, and going on where it stopped."""

import copy
import gc
import logging
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import AutoProcessor, TrainerCallback, TrainerState

from .adapter import ADAPTER_CONFIG, has_adapter, load_merged, load_peft, merged, save_adapter
from .callbacks import Classification, LossCallback, check_budget, check_recipe, replay_of
from .data import PairCollator, PairDataset, check_processor
from .data.image_cache import cache_resized_images
from .data.loading import concatenate_shared
from .deletion import Deletions
from .demo import BASE_MAX_STEPS, trained_base
from .disk import bytes_of_phase, removed_on_failure, require_room, size_of
from .distributed import on_each_process, on_main_process
from .embeddings import check_dual_encoder, logit_scale_of
from .evaluation import EncodedPairs, EvaluationMatrix
from .evaluation.suite import EvaluationTest
from .files import publish_file, publish_folder, read_json, write_json
from .hub.publisher import Revision
from .hub.run import RunOnHub
from .interruption import StopOnSignal
from .model_card import card_loads, phase_config, write_phase_card
from .phases import PhaseStream
from .pretrained import load_model
from .recipes import Part, build_recipe, check_teachers, recipe_name
from .replay import ReplayMemory, embed_rows
from .rollback import history_in_words, reopen
from .run.argument_checks import check_checkpoints
from .run.cross_phase import RunCrossPhase
from .run.disorder import RunDisorder, training_sample
from .run.evaluation_tests import RunTests
from .run.folder import (
    MEMORY,
    RECORD,
    RESULTS,
    checkpoints_folder,
    forget_start,
    has_trained,
    last_complete_checkpoint,
    last_trained,
    phase_folder,
    refuse_unfinished_rollback,
    state_file,
)
from .run.identity import (
    identity_of_phase,
    refuse_other_weights,
    refused_changes,
    run_identity,
    weights_fingerprint,
)
from .run.lock import alone_in
from .run.provenance import adapter_base, data_source, model_source
from .run.results import RunResults
from .run.retention import RetentionTests, retention_budget
from .run.stream_checks import (
    StreamChecks,
    refuse_other_types,
    refuse_phases_without_classes,
    warn_of_lost_pair_ids,
)
from .run.tracking import track_as_one_run
from .run.training_log import training_record
from .teacher.cache import CachedTeacher
from .trainer import ModXTrainer, PartTrainer
from .training.finite import require_finite_weights
from .training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)


class ContinualRun:
    """Train a model phase after phase and evaluate every test after every phase.

    The folder `args.output_dir` holds the run: `run.json` (what runs), `results.json` (the matrix), and `phase-K/`,
    each a plain model that `from_pretrained` loads; `phase-0/` is the model before the first phase. Call `run` again
    after any interruption: finished phases stay as they are, a phase begun goes on from its last checkpoint. A
    finished run with MORE phases trains only the new ones.

    With `args.push_to_hub` every finished phase becomes a revision of one repository on the Hub before the next one
    begins (see `hf_modx.hub.publisher`). An empty `output_dir` goes on with the run that the repository holds. What
    cannot be published is tried again after each phase, at the end, and when `run` is called again.

    With `args.peft` each phase trains a fresh adapter on what it starts from. At its end the adapter is merged; or,
    with `lora_merge` False, `phase-K/` holds for K > 0 one adapter of the model in `phase-0/` (see `adapter.py`).

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
        callbacks: further TrainerCallbacks for every phase. What a checkpoint keeps of those that transformers calls
            `ExportableState`, as early stopping, they have again when the phase goes on.
        tests: further tests by name, evaluated after every phase beside the stream's own (see `load_tests`).

    Raises:
        ImportError: `args.peft` without PEFT.
        FloatingPointError: the model has NaN or infinite weights.
        TypeError, ValueError: the model is no dual encoder, or has an adapter already; columns are missing or hold
            nulls; images cannot be decoded (unless `args.bad_samples="skip"`); `output_dir` holds a different run;
            checkpoints that nothing goes on from, or a best one by what is not measured. All before any training.
        HubAccessError: with `push_to_hub`, no token, or one that may not write. It and the errors of `run` are in
            `hf_modx.hub`.
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
        tests: Mapping[str, EvaluationTest] | None = None,
    ):
        if model is None and stream.base is None:
            raise ValueError("Without a model the stream needs a base to train the small CLIP on. Give a model.")
        self.args = args
        self.folder = Path(args.output_dir)
        self.recipe_name = recipe_name(recipe)
        self.loss_callbacks = [*build_recipe(recipe, **(recipe_args or {})), *retention_budget(args)]
        check_recipe(self.loss_callbacks)
        check_budget(self.loss_callbacks)
        check_teachers(recipe, self.loss_callbacks, args.teacher)
        replay = replay_of(self.loss_callbacks)
        self.memory = None
        if replay is not None:
            self.memory = ReplayMemory(self.folder / MEMORY, replay, args.pair_columns, args.effective_data_seed)
        self.stop = StopOnSignal()
        self.callbacks = [*callbacks, self.stop]
        self._check_adapter()
        self.state = PartialState()
        self.hub = RunOnHub(args) if args.push_to_hub else None
        self.model = self.processing_class = self.source = None
        if model is not None:
            self._load_start(model, processing_class, revision)
        self.tests = RunTests(stream, tests or {}, self.args.pair_columns)
        check_checkpoints(args, self.tests.pairs)
        self.disorder, self.cross_phase = RunDisorder(self._encode), RunCrossPhase(self._encode)
        if self.memory is not None or not self._trains_on_phases_alone:
            refuse_other_types(self.tests.stream, self.args.pair_columns)
            warn_of_lost_pair_ids(self.tests.stream, self.args.pair_id_column)
        if any(isinstance(callback, Classification) for callback in self.loss_callbacks):
            refuse_phases_without_classes(self.tests.stream, args.pair_id_column)
        checks = StreamChecks(args)
        stream = checks.usable(self.tests.stream, self.tests.labels)
        self.bad_samples = checks.bad_samples
        self.deletions = Deletions(self.folder, (args.image_column, args.pair_id_column))
        self.stream = self.deletions.kept(stream)
        if self.memory is not None and self.stream.base is None:
            logger.warning(
                "There is nothing to replay in %r, the first phase. Pairs of what the model knows already are given "
                "with --replay_dataset or PhaseStream.with_replay.",
                self.stream.phases[0].name,
            )
        self.tests.follow(self.stream)
        self.table = RunResults([phase.name for phase in self.stream], self.tests)
        learned_at = self.tests.learned_at()
        metrics = {name: known for name, (_, known) in self.tests.measurements().items()}
        self.retention = RetentionTests(
            self.loss_callbacks, args.retention_dataset, learned_at, len(self.stream), metrics
        )
        for callback in self.loss_callbacks:
            callback.start_run(self.stream.base.train if self.stream.base is not None else None)
        self.identity = run_identity(self.recipe_name, self.loss_callbacks, args, stream)
        self.identity["deletions"] = len(self.deletions)
        self.identity["tests"] |= {name: test.fingerprint() for name, test in self.tests.labels.items()}
        self._base_max_steps = base_max_steps
        if model is None:
            self.identity["base_max_steps"] = base_max_steps
        else:
            self.identity["start"] = weights_fingerprint(self.model)
        self._refuse_other_run()

    def run(self) -> EvaluationMatrix:
        """Train what is not trained, evaluate what is not evaluated, publish what is not published.

        Returns:
            The matrix of the first of `metrics`, image-to-text recall@1 where there is a retrieval test;
            `matrix(name)` has the others.

        Raises:
            RepositoryConflict: the repository holds another run, or another folder has gone on with this one.
            UnpublishedPhases: all is trained and on the disk, but the Hub has not taken all of it.
            BlockingIOError: another process is training in `output_dir`, or changing it.
            OSError: the disk has too little room for a phase, or was full.
            Interrupted: SIGTERM or SIGINT came; all that is done is on the disk.
        """
        with ExitStack() as held:
            held.enter_context(self.stop)
            on_main_process(lambda: held.enter_context(alone_in(self.folder)))
            if self.hub is not None:
                held.enter_context(self.hub.alone())
            return self._run()

    def _run(self) -> EvaluationMatrix:
        self._start()
        self.table = RunResults(self.table.phases, self.tests, read_json(self.folder / RESULTS))
        self._push()
        for number in range(len(self.stream) + 1):
            self.stop.raise_if_asked()
            trainer = None
            if not self._is_finished(number):
                trainer = self._train_phase(number)
            if self.args.peft is not None:
                gc.collect()  # the model that is evaluated is not the one that was trained
            if self._evaluate_phase(number, trainer):
                self._push()
            # A Trainer lives in reference cycles: without this its model, teacher and optimizer would stay in memory
            # beside the next phase's.
            del trainer
            gc.collect()
        if self.hub is not None:
            self.hub.settle(len(self.table.rows), self._revision, self._datasets_on_hub())
        return self.matrix()

    def _is_finished(self, number: int) -> bool:
        """The phase lies on the disk, or has lain there: its row is in the results. Phase 0 is never trained."""
        return number == 0 or self.phase_folder(number).exists() or self.table.has(number)

    def phase_folder(self, number: int) -> Path:
        """Where the model after phase `number` lies; 0 is the model before the first phase."""
        return phase_folder(self.folder, number)

    def steps(self, number: int) -> int:
        """Optimizer steps that phase `number`, 1 being the first, takes."""
        first = 1 if self._starts_from_base else number
        return sum(self.args.phase_steps(len(self.stream.phases[k - 1].train)) for k in range(first, number + 1))

    @property
    def metrics(self) -> list[str]:
        """The metrics of the run's tests, each of which makes a matrix."""
        return self.table.metrics

    def matrix(self, metric: str | None = None, number: int | None = None) -> EvaluationMatrix:
        """The matrix of one metric (default: the first of `metrics`) as far as it is measured, or as it is after phase
        `number`; NaN for tests that have no such metric."""
        return self.table.matrix(metric if metric is not None else self.metrics[0], number)

    # ---- Before training ----

    def _load_start(self, model: nn.Module | str | Path, processing_class: Any, revision: str | None) -> None:
        self.source = {"name": "a model in memory"}
        if isinstance(model, str | Path):
            name = model
            processing_class = processing_class or AutoProcessor.from_pretrained(model, revision=revision)
            # Weights are trained in fp32 whatever they are stored in; bf16 is a matter of autocast.
            model = load_model(model, revision)
            self.source = on_main_process(lambda: model_source(name, revision))
        check_dual_encoder(model)
        if has_adapter(model):
            raise ValueError("A run starts from a plain model: merge the adapter first, model.merge_and_unload().")
        if processing_class is None:
            raise ValueError("Give the model's processor as processing_class, for instance a CLIPProcessor.")
        check_processor(processing_class)
        require_finite_weights(model, "Nothing can be trained from here: the model has")
        self.model, self.processing_class, self._model_class = model, processing_class, type(model)

    def _check_adapter(self) -> None:
        """Raise unless PEFT is there, where it is asked for, and the recipe leaves what an adapter can be."""
        if self.args.peft is None:
            return
        load_peft()
        needing = [type(callback).__name__ for callback in self.loss_callbacks if callback.needs_merge]
        if needing and not self.args.lora_merge:
            raise ValueError(f"What {' and '.join(needing)} leaves is no adapter: it needs lora_merge.")

    def _refuse_other_run(self) -> None:
        """Raise unless the folder is free, holds the same run, or one that has trained nothing yet."""
        refuse_unfinished_rollback(self.folder)
        before = read_json(self.folder / RECORD)
        if before is None and self.phase_folder(0).exists():
            raise ValueError(f"{self.folder} holds phases but no run.json. Choose another output_dir.")
        is_begun = before is not None and has_trained(self.folder)
        differences = refused_changes(before, self.identity, last_trained(self.folder)) if is_begun else []
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
        on_main_process(self.deletions.carry_out)
        fresh = self.model is not None and not is_on_hub and not has_trained(self.folder)
        self._ids |= on_main_process(lambda: reopen(self.folder, self.identity, self._keepers()))
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
        self.tests.follow(self.stream)

    def _own_ids(self) -> dict[str, str]:
        """Which run this is, and which of its copies: a run that goes on elsewhere keeps its `run_id`."""
        before = read_json(self.folder / RECORD) or {}
        kept = {name: before[name] for name in ("rolled_back_to", "history") if name in before}
        return {name: before.get(name) or uuid.uuid4().hex for name in ("run_id", "writer")} | kept

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

    def _train_phase(self, number: int) -> ModXTrainer | None:
        """Train and publish a phase. Its trainer, for the evaluation; None where the model on the disk is another one
        than the trainer has, which is trained with an adapter."""
        phase = self.stream.phases[number - 1]
        starts_from = self._parent(number)
        trainer = self._trainer(number, self._load_parent(starts_from), self._training_data(number))
        logit_scale = [logit_scale_of(trainer.model)]
        memory = self._memory_after(number - 1)
        if memory is not None:
            trainer.use_memory(memory)
        for callback in self.hub.checkpoint_callbacks(number, starts_from, self._record()) if self.hub else []:
            trainer.add_callback(callback)
        logger.info("Phase %d of %d: %s, %d pairs", number, len(self.stream), phase.name, len(trainer.train_dataset))
        self._restore_state(trainer, starts_from)
        self.retention.watch(number, {name: test for name, (test, _) in self.tests.measurements().items()})
        on_main_process(lambda: self._require_room(number, trainer))
        checkpoint = on_main_process(lambda: last_complete_checkpoint(checkpoints_folder(self.folder, number)))
        state = _state_of(checkpoint) if checkpoint is not None else None
        if state is not None and (state.global_step >= self.steps(number) or _was_stopped(state)):
            # Interrupted between the last step and the publishing: `train` would do one step too many.
            trainer.finish_from(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        logit_scale.append(logit_scale_of(trainer.model))
        record = training_record(trainer) | {"starts_from": starts_from, "logit_scale": logit_scale}
        if state is not None:
            record["resumed_at_step"] = state.global_step
        self._save_state(number, trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._publish(number, merged(model) if self.args.peft is not None and self.args.lora_merge else model, record)
        if isinstance(trainer.teacher, CachedTeacher):
            trainer.teacher.remove()
        return trainer if self.args.peft is None else None

    def _require_room(self, number: int, trainer: ModXTrainer) -> None:
        there = size_of(checkpoints_folder(self.folder, number))
        needed = bytes_of_phase(trainer.model, trainer.args, trainer.loss_callbacks)
        require_room(self.folder, needed - there, f"Phase {number}")

    def _restore_state(self, trainer: ModXTrainer, number: int) -> None:
        """Give the loss callbacks what they knew after phase `number`, which is what they go on from."""
        path = state_file(self.folder, number)
        learn_base = self.stream.base is not None and any(c.learns_from_base for c in self.loss_callbacks)
        is_there = on_main_process(path.exists)
        if number == 0 and not is_there and learn_base:
            before = self._trainer(0, self._load_phase(0), self.stream.base.train)
            before.load_loss_callbacks(path)
            before.learn_from_base()
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

    @property
    def _trains_on_phases_alone(self) -> bool:
        return all(callback.trains_on == "phase" for callback in self.loss_callbacks)

    def _parent(self, number: int) -> int:
        """The phase whose weights a phase starts from."""
        return 0 if self._starts_from_base else number - 1

    def _training_data(self, number: int) -> Dataset:
        if self._trains_on_phases_alone:
            return self.stream.phases[number - 1].train
        known = [self.stream.base] if self.stream.base is not None else []
        parts = [phase.train for phase in [*known, *self.stream.phases[:number]]]
        return concatenate_shared(parts, self.args.pair_columns)

    def _memory_after(self, number: int) -> Dataset | None:
        """What is kept for replay of the base and the phases up to this one."""
        if self.memory is None:
            return None
        base = self.stream.base.train if self.stream.base is not None else None
        return self.memory.after(number, [base, *(phase.train for phase in self.stream)], self._embed)

    def _embed(self, number: int, rows: Dataset) -> tuple[list, list]:
        """The embeddings of some rows under the model after a phase."""
        model = self._load_phase(number)
        return embed_rows(
            model,
            PairDataset(rows, *self.args.pair_columns),
            PairCollator.for_model(model, self.processing_class),
            batch_size=self.args.eval_batch_size,
            device=self.args.device,
        )

    def _trainer(self, number: int, model: nn.Module, train_dataset: Dataset | None) -> ModXTrainer:
        args = copy.copy(self.args)
        args.output_dir = str(checkpoints_folder(self.folder, number))
        args.data_seed = 1000 * self.args.effective_data_seed + number
        args.push_to_hub, args.hub_token = False, None  # the run publishes; checkpoints hold the arguments
        args.enable_jit_checkpoint = False  # `stop` does it
        args.teacher, teacher = "previous", None  # which is also the initial one, unless it is handed over here
        if self.args.teacher == "initial" and train_dataset is not None and self._parent(number) > 0:
            teacher = self._load_parent(0)
        if train_dataset is None:
            args.peft = None
        if number > 0 and not self._trains_on_phases_alone:
            args.max_steps = self.steps(number)  # not those of an epoch of all data
        args.run_name = args.run_name or self.folder.resolve().name  # one run for the trackers
        trainer = PartTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset={name: dataset for name, (dataset, _) in self.tests.pairs.items()},  # for eval_strategy
            processing_class=self.processing_class,
            callbacks=list(self.callbacks),
            loss_callbacks=self.loss_callbacks,
            teacher=teacher,
        )
        steps = [self.steps(k) for k in range(1, number + 1)]
        name = f"phase-{number}-{self.stream.phases[number - 1].name if number else 'start'}"
        track_as_one_run(
            trainer, self.folder, name, self.tests.names, steps_before=sum(steps[:-1]), steps=sum(steps[-1:])
        )
        return trainer

    def _load_phase(self, number: int) -> nn.Module:
        return self._load(self.phase_folder(number))

    def _load_parent(self, number: int) -> nn.Module:
        """The model that a phase starts from or has as its teacher, which must be the one that the run has left."""
        model, folder, expected = self._load_phase(number), self.phase_folder(number), self.identity["start"]
        if number > 0:
            known = read_json(self.folder / RESULTS)["training"][number - 1] or {}
            # An adapter is merged into its base here, which another machine may round in another way.
            expected = None if (folder / ADAPTER_CONFIG).exists() else known.get("weights")
        on_each_process(lambda *_: refuse_other_weights(model, expected, folder) or [])
        return model

    def _load(self, folder: Path) -> nn.Module:
        """The model of a phase, an adapter merged into the base that it is one of."""
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder} is needed to go on and is not there any more. Put it back: of a run on the Hub it is the "
                f"revision {folder.name}."
            )
        if (folder / ADAPTER_CONFIG).exists():
            model = load_merged(self._load_phase(0), folder)
        else:
            model = self._model_class.from_pretrained(folder, dtype=torch.float32)
        model.name_or_path = model.config.name_or_path = ""  # PEFT writes it into checkpoints: no path of this machine
        return model

    def _save_adapter(self, model: nn.Module, number: int, folder: Path) -> None:
        before = self.phase_folder(self._parent(number)) if self._parent(number) > 0 else None
        published = self.hub.repo_id if self.hub is not None else None
        save_adapter(model, folder, before, *adapter_base(self.source, published))

    def _publish(self, number: int, model: nn.Module, record: dict[str, Any] | None = None) -> None:
        require_finite_weights(model, f"Phase {number} is not kept: at its end the model has")
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            final = self.phase_folder(number)
            temporary = final.with_name(f".{final.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            with removed_on_failure(temporary, f"Phase {number}"):
                self._write_phase(number, model, record, temporary)
                publish_folder(temporary, final)
        self.state.wait_for_everyone()

    def _write_phase(self, number: int, model: nn.Module, record: dict[str, Any] | None, folder: Path) -> None:
        if has_adapter(model):
            self._save_adapter(model, number, folder)
            model = self._load(folder)
        else:
            model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        if record is not None:
            write_json(folder / "training.json", record | {"weights": weights_fingerprint(model)})

    # ---- Evaluation ----

    def _evaluate_phase(self, number: int, trainer: ModXTrainer | None) -> bool:
        """Fill the row of a phase: all of it after its training, later only what a longer stream adds. Whether it is a
        new row."""
        is_new, began = number == len(self.table.rows), perf_counter()
        if is_new:
            self.table.rows.append({})
        row, missing = self.table.rows[number], self.table.missing(number)
        if missing and trainer is None and not self.phase_folder(number).exists():
            logger.warning("%s is gone: its row cannot be completed.", self.phase_folder(number))
            return is_new
        if missing and trainer is None:
            trainer = self._trainer(number, self._load_phase(number), None)
        if trainer is not None:
            trainer.on_encoded = partial(self._keep, number)
            trainer.on_classes = partial(self.table.notes.keep_classes, number)
        for name in missing:
            test, metrics = self.tests.measurements()[name]
            values = trainer.evaluate(test, metric_key_prefix=name)
            row[name] = {metric: values[f"{name}_{metric}"] for metric in metrics}
        self._live = {number: trainer} if trainer is not None else {}
        if is_new and self.args.spatial_disorder:
            self._measure_disorder(number)
        asked = self.args.cross_phase and self.cross_phase.complete(
            number, row, self.tests.learned_at(self.tests.pairs)
        )
        self._live = {}
        if missing or is_new or asked:
            self.table.notes.add_seconds(number, perf_counter() - began)
            on_main_process(lambda: self._write_results(number))
        return is_new

    def _keep(self, number: int, test: str, encoded: EncodedPairs) -> None:
        for asks, measure in ((self.args.spatial_disorder, self.disorder), (self.args.cross_phase, self.cross_phase)):
            if asks:
                measure.keep(number, test, encoded)

    def _measure_disorder(self, number: int) -> None:
        first = 0 if self.stream.base is not None else 1
        sampled = range(first, len(self.stream) + 1) if self.args.imav_samples else ()
        try:
            self.table.disorder[number] = self.disorder.measure(number, self.tests.pairs, sampled)
        except FileNotFoundError as error:
            logger.warning("No spatial disorder of phase %d. %s", number, error)

    def _encode(self, number: int, what: str | int) -> EncodedPairs:
        """What the model after a phase says to a test, or to training pairs of a phase."""
        if isinstance(what, str):
            dataset, _ = self.tests.pairs[what]
        else:
            part = self.stream.base if what == 0 else self.stream.phases[what - 1]
            dataset = training_sample(part.train, self.args.imav_samples)
        trainer = self._live.get(number) or self._trainer(number, self._load_phase(number), None)
        return trainer.encode(dataset)

    def _write_results(self, number: int) -> None:
        """The card of a phase, and then the results, which make it a finished one."""
        if self.phase_folder(number).exists():
            self._write_card(number, self._results(number))
        write_json(self.folder / RESULTS, self._results(len(self.table.rows) - 1))

    def _write_card(self, number: int, results: Mapping[str, Any]) -> None:
        published = {} if self.hub is None else {"repo_id": self.hub.repo_id, "revision": f"phase-{number}"}
        config = phase_config(self.folder, number)
        then = identity_of_phase(self._ids.get("history", []), self.identity, number)
        identity = {**self.identity, **{name: then[name] for name in ("recipe_args", "hyperparameters")}}
        write_phase_card(self.phase_folder(number), identity, results, number, config=config, **published)

    def _results(self, number: int) -> dict[str, Any]:
        """The results as they are after a phase."""
        history = self._ids.get("history", [])
        return {
            "recipe": identity_of_phase(history, self.identity, number)["recipe"],
            **self.table.results(number),
            "training": [self._training_record(k) for k in range(1, number + 1)],
            "model": self.source,
            "sources": {phase.name: data_source(phase.train) for phase in self.stream.all_phases()},
            "test_sources": {name: data_source(table) for name, table in self.tests.tables().items()},
            "bad_samples": {
                name: {"count": len(bad), "first": [sample.without_folder() for sample in bad[:10]]}
                for name, bad in self.bad_samples.items()
                if bad
            },
            **self.deletions.results(number),
            **history_in_words(history, self.identity, number),
        }

    def _training_record(self, number: int) -> dict[str, Any] | None:
        """Of a phase; where its folder is gone, what results.json knows of it."""
        record = read_json(self.phase_folder(number) / "training.json")
        if record is None:
            known = (read_json(self.folder / RESULTS) or {}).get("training", [])
            record = known[number - 1] if number <= len(known) else None
        return record

    # ---- The Hub ----

    def _push(self) -> None:
        """Publish the finished phases that are not published."""
        if self.hub is not None and self.table.rows:
            self.hub.publish(len(self.table.rows), self._revision)

    def _datasets_on_hub(self) -> list[str]:
        """Ids of the data sets that the stream was loaded from."""
        parts = [*(phase.train for phase in self.stream.all_phases()), *self.tests.tables().values()]
        found = {data_source(part).get("dataset_id") for part in parts}
        return sorted(found - {None})

    def _revision(self, number: int) -> Revision:
        """A finished phase as it is to be published, with the results as they were after it."""
        title, parent = "Before the first phase", None
        if number:
            title, parent = f"Phase {number}: {self.stream.phases[number - 1].name}", self._parent(number)
        record, results, folder = {**self._record(), "phase": number}, self._results(number), self.phase_folder(number)
        if folder.exists() and not card_loads(folder, self.hub.repo_id, folder.name):
            self._write_card(number, results)  # it was finished before it was to be published here
        return self.hub.revision(number, parent, title, run=record, results=results)


def _state_of(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def _was_stopped(state: TrainerState) -> bool:
    """Whether a callback, as early stopping or a retention budget, had ended the phase at this step."""
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
