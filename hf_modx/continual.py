"""All phases of a run: teacher hand-over, evaluation after every phase, and going on where it stopped."""

import copy
import gc
import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import AutoModel, AutoProcessor, TrainerCallback, TrainerState

from .bad_samples import BadSample, drop_bad_samples, find_bad_samples
from .callbacks import LossCallback, check_recipe
from .data import check_columns, check_pair_ids, check_processor
from .demo import BASE_MAX_STEPS, trained_base
from .distributed import on_each_process, on_main_process
from .embeddings import check_dual_encoder
from .evaluation import EvaluationMatrix
from .evaluation.retrieval import RECALL_AT
from .files import publish_folder, read_json, write_json, write_text
from .identity import changes, run_identity, weights_fingerprint
from .model_card import phase_card
from .overlap import image_digests, shared_rows
from .phases import PhaseStream
from .recipes import build_recipe
from .teacher_cache import CachedTeacher
from .trainer import LOSS_CALLBACKS_NAME, ModXTrainer
from .training_args import ModXTrainingArguments

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

    Args:
        stream: the phases.
        recipe: a name (see `RECIPES`) or a list of loss callbacks.
        args: steps and epochs are per phase.
        model: a dual encoder, or the name or path of one. None: the small CLIP trained on `stream.base`.
        processing_class: its processor. Default: loaded from where the model is.
        recipe_args: options of a recipe given by name.
        revision: of a model given by name.
        base_max_steps: optimizer steps of the small CLIP, where no model is given.
        callbacks: further TrainerCallbacks for every phase.

    Raises:
        TypeError, ValueError: the model is no dual encoder; columns are missing or hold nulls; images cannot be
            decoded (unless `args.bad_samples="skip"`); `output_dir` holds a different run. All before any training.
    """

    def __init__(
        self,
        stream: PhaseStream,
        recipe: str | Sequence[LossCallback],
        args: ModXTrainingArguments,
        *,
        model: nn.Module | str | None = None,
        processing_class: Any = None,
        recipe_args: Mapping[str, Any] | None = None,
        revision: str | None = None,
        base_max_steps: int = BASE_MAX_STEPS,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if args.push_to_hub:
            raise ValueError(
                "This version does not push phases to the Hub. Leave out push_to_hub and upload OUT/phase-K with "
                "`hf upload`."
            )
        if model is None and stream.base is None:
            raise ValueError("Without a model the stream needs a base to train the small CLIP on. Give a model.")
        self.args = args
        self.folder = Path(args.output_dir)
        self.recipe_name, self.loss_callbacks = _named_recipe(recipe, recipe_args or {})
        check_recipe(self.loss_callbacks)
        self.callbacks = list(callbacks)
        self.state = PartialState()
        self.bad_samples: dict[str, list[BadSample]] = {}
        if model is not None:
            model, processing_class = self._load_start(model, processing_class, revision)
        self.stream = self._usable(stream)
        self.tests = self.stream.tests()
        self._refuse_too_few_pairs()
        self.identity = run_identity(self.recipe_name, self.loss_callbacks, args, self.stream)
        if model is None:
            self._refuse_other_run(self.identity)  # before the minutes that the base takes
            model, processing_class = self._load_start(trained_base(self.stream, args, base_max_steps), None, None)
        self.identity["start"] = weights_fingerprint(model)
        self.model, self.processing_class = model, processing_class
        self._model_class = type(model)

    def run(self) -> EvaluationMatrix:
        """Train what is not trained and evaluate what is not evaluated.

        Returns:
            The matrix of image-to-text recall@1; `matrix(name)` has the other metrics.
        """
        self._start()
        self._read_results()
        for number in range(len(self.stream) + 1):
            trainer = None
            if not self._is_finished(number):
                trainer = self._train_phase(number)
            self._evaluate_phase(number, trainer)
            # A Trainer lives in reference cycles: without this its model, teacher and optimizer would stay in memory
            # beside the next phase's.
            del trainer
            gc.collect()
        return self.matrix()

    def _is_finished(self, number: int) -> bool:
        """The phase lies on the disk, or has lain there: its row is in the results."""
        return self.phase_folder(number).exists() or bool(number < len(self._rows) and self._rows[number])

    def phase_folder(self, number: int) -> Path:
        """Where the model after phase `number` lies; 0 is the model before the first phase."""
        return self.folder / f"phase-{number}"

    def steps(self, number: int) -> int:
        """Optimizer steps that phase `number`, 1 being the first, takes."""
        first = 1 if self._starts_from_base else number
        return sum(self.args.phase_steps(len(self.stream.phases[k - 1].train)) for k in range(first, number + 1))

    def matrix(self, metric: str = METRICS[0]) -> EvaluationMatrix:
        """The matrix of one metric as far as it is measured."""
        values = [[row.get(test, {}).get(metric) for test in self.tests] for row in self._rows]
        return EvaluationMatrix(
            [phase.name for phase in self.stream][: len(self._rows) - 1],
            list(self.tests),
            values,
            [k if k is None or k < len(self._rows) else None for k in self._learned_at()],
        )

    # ---- Before training ----

    def _usable(self, stream: PhaseStream) -> PhaseStream:
        """The stream without the rows that cannot be used, or an error that names them."""
        columns = (self.args.image_column, self.args.caption_column)

        def usable(name: str, part: Dataset) -> Dataset:
            check_columns(part, *columns)
            if self.args.pair_id_column in part.column_names:
                check_pair_ids(part, self.args.pair_id_column)
            bad = on_each_process(lambda rank, number: find_bad_samples(part, *columns, name, (rank, number)))
            return self._leave_out(name, part, sorted(bad, key=lambda sample: sample.row))

        return self._without_leaks(stream.map_parts(usable))

    def _without_leaks(self, stream: PhaseStream) -> PhaseStream:
        """No image is both learned and tested. Where it is, the part that came first keeps it: with next month's
        data the months before stay as they were."""
        learned: dict[bytes | None, str] = {}
        tested: dict[bytes | None, str] = {}

        def clean(name: str, part: Dataset) -> Dataset:
            digests = on_main_process(lambda: image_digests(part, self.args.image_column))
            own, others = (tested, learned) if name.endswith("(test)") else (learned, tested)
            shared = shared_rows(digests, others)
            left_out = {sample.row for sample in shared}
            own.update((digest, name) for row, digest in enumerate(digests) if row not in left_out)
            return self._leave_out(name, part, shared)

        return stream.map_parts(clean)

    def _leave_out(self, name: str, part: Dataset, bad: list[BadSample]) -> Dataset:
        if bad:
            self.bad_samples[name] = self.bad_samples.get(name, []) + bad
        return drop_bad_samples(part, bad, self.args.bad_samples, name)

    def _refuse_too_few_pairs(self) -> None:
        for phase in self.stream:
            if min(len(phase.train), self.args.contrastive_batch_size) < 2:
                raise ValueError(
                    f"Phase {phase.name!r}: a contrastive batch of one pair has no negatives "
                    f"({len(phase.train)} pairs, per_device_train_batch_size {self.args.per_device_train_batch_size})."
                )
        for name, (dataset, _) in self.tests.items():
            if len(dataset) < self.state.num_processes:
                raise ValueError(
                    f"Test {name!r} has {len(dataset)} rows, too few for {self.state.num_processes} processes."
                )
        if not self.tests:
            logger.warning("No phase has a test: nothing will tell what was forgotten. See test_fraction.")

    def _load_start(self, model: nn.Module | str | Path, processing_class: Any, revision: str | None) -> tuple:
        self.source = {"name": "a model in memory", "revision": revision}
        if isinstance(model, str | Path):
            self.source["name"] = str(model)
            processing_class = processing_class or AutoProcessor.from_pretrained(model, revision=revision)
            # Weights are trained in fp32 whatever they are stored in; bf16 is a matter of autocast.
            model = AutoModel.from_pretrained(model, revision=revision, dtype=torch.float32)
        check_dual_encoder(model)
        if processing_class is None:
            raise ValueError("Give the model's processor as processing_class, for instance a CLIPProcessor.")
        check_processor(processing_class)
        return model, processing_class

    def _refuse_other_run(self, identity: dict[str, Any]) -> None:
        """Raise unless the folder is free, holds the same run, or one that has trained nothing yet."""
        before = read_json(self.folder / "run.json")
        if before is None and self.phase_folder(0).exists():
            raise ValueError(f"{self.folder} holds phases but no run.json. Choose another output_dir.")
        differences = changes(before["identity"], identity) if before is not None and self._has_trained() else []
        if differences:
            raise ValueError(
                f"{self.folder} holds a different run: {'; '.join(differences)}. Choose another output_dir, or give "
                "the same settings to go on."
            )

    def _has_trained(self) -> bool:
        return any(self.folder.glob("phase-[1-9]*")) or any(self.folder.glob("checkpoints/*/checkpoint-*"))

    def _start(self) -> None:
        """Write run.json and phase-0."""
        self._refuse_other_run(self.identity)
        fresh = self.model is not None and not self._has_trained()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if fresh:
                # Of a start that was given up, or corrected, before it trained.
                shutil.rmtree(self.phase_folder(0), ignore_errors=True)
                (self.folder / "results.json").unlink(missing_ok=True)
            packages = ("hf_modx", "transformers", "accelerate", "datasets", "torch")
            write_json(
                self.folder / "run.json",
                {
                    "identity": self.identity,
                    "model": self.source,
                    "versions": {name: version(name) for name in packages},
                    "processes": self.state.num_processes,
                },
            )
        if fresh:
            self._publish(0, self.model)
        self.model = None  # from here on models come from the folders of the phases

    # ---- One phase ----

    def _train_phase(self, number: int) -> ModXTrainer:
        phase = self.stream.phases[number - 1]
        starts_from = 0 if self._starts_from_base else number - 1
        trainer = self._trainer(number, self._load_phase(starts_from), self._training_data(number))
        logger.info("Phase %d of %d: %s, %d pairs", number, len(self.stream), phase.name, len(trainer.train_dataset))
        folder = trainer.args.output_dir
        checkpoint = on_main_process(lambda: _last_complete_checkpoint(folder))
        state = _state_of(checkpoint) if checkpoint is not None else None
        if state is not None and state.global_step >= self.steps(number):
            # Interrupted between the last step and the publishing: `train` would do one step too many.
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.args.enable_jit_checkpoint and trainer.state.global_step < trainer.state.max_steps:
            # After SIGTERM the Trainer saves a checkpoint and returns as if it had finished.
            raise RuntimeError(f"Phase {number} was interrupted. Run the same command again to go on.")
        self._publish(number, trainer.accelerator.unwrap_model(trainer.model), _training_record(trainer))
        if isinstance(trainer.teacher, CachedTeacher):
            trainer.teacher.remove()
        return trainer

    @property
    def _starts_from_base(self) -> bool:
        return any(callback.starts_from == "base" for callback in self.loss_callbacks)

    def _training_data(self, number: int) -> Dataset:
        if all(callback.trains_on == "phase" for callback in self.loss_callbacks):
            return self.stream.phases[number - 1].train
        known = [self.stream.base] if self.stream.base is not None else []
        columns = [self.args.image_column, self.args.caption_column, self.args.pair_id_column]
        parts = [phase.train for phase in [*known, *self.stream.phases[:number]]]
        shared = [column for column in columns if all(column in part.column_names for part in parts)]
        return concatenate_datasets([part.select_columns(shared) for part in parts])

    def _trainer(self, number: int, model: nn.Module, train_dataset: Dataset | None) -> ModXTrainer:
        args = copy.copy(self.args)
        args.output_dir = str(self.folder / "checkpoints" / f"phase-{number}")
        args.data_seed = _phase_seed(self.args, number)
        if self._starts_from_base:
            args.max_steps = self.steps(number)
        return ModXTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset={name: dataset for name, (dataset, _) in self.tests.items()},  # for eval_strategy
            processing_class=self.processing_class,
            callbacks=list(self.callbacks),
            loss_callbacks=self.loss_callbacks,
        )

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
                write_json(temporary / "training.json", record)
            publish_folder(temporary, final)
        self.state.wait_for_everyone()

    # ---- Evaluation ----

    def _evaluate_phase(self, number: int, trainer: ModXTrainer | None) -> None:
        """Fill the row of a phase: all of it after its training, later only what a longer stream adds."""
        is_new = number == len(self._rows)
        if is_new:
            self._rows.append({})
        row = self._rows[number]
        missing = {name: dataset for name, (dataset, _) in self.tests.items() if name not in row}
        if missing and trainer is None and not self.phase_folder(number).exists():
            logger.warning("%s is gone: its row cannot be completed.", self.phase_folder(number))
            return
        if missing and trainer is None:
            trainer = self._trainer(number, self._load_phase(number), None)
        for name, dataset in missing.items():
            metrics = trainer.evaluate(dataset, metric_key_prefix=name)
            row[name] = {metric: metrics[f"{name}_{metric}"] for metric in METRICS}
        if missing or is_new:
            self._write_results(number)

    def _read_results(self) -> None:
        results = read_json(self.folder / "results.json")
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
        if not self.state.is_main_process:
            return
        matrices = {metric: self.matrix(metric) for metric in METRICS}
        results = {
            "recipe": self.recipe_name,
            "phases": matrices[METRICS[0]].phases,
            "tests": list(self.tests),
            "learned_at": matrices[METRICS[0]].learned_at,
            "matrix": {metric: matrix.to_lists() for metric, matrix in matrices.items()},
            "summary": {metric: matrix.summary() for metric, matrix in matrices.items()},
            "training": [read_json(self.phase_folder(k) / "training.json") for k in range(1, len(self._rows))],
            "test_pairs": {name: len(dataset) for name, (dataset, _) in self.tests.items()},
            "sources": {
                phase.name: {"description": phase.train.info.description, "licence": phase.train.info.license}
                for phase in self.stream.all_phases()
            },
            "bad_samples": {
                name: {"count": len(bad), "first": [str(sample) for sample in bad[:10]]}
                for name, bad in self.bad_samples.items()
                if bad
            },
        }
        write_text(self.phase_folder(number) / "README.md", phase_card(self.identity, results, number))
        write_json(self.folder / "results.json", results)

    def _learned_at(self) -> list[int | None]:
        return [learned_at for _, learned_at in self.tests.values()]


def _named_recipe(
    recipe: str | Sequence[LossCallback], recipe_args: Mapping[str, Any]
) -> tuple[str, list[LossCallback]]:
    if isinstance(recipe, str):
        return recipe, build_recipe(recipe, **recipe_args)
    if recipe_args:
        raise ValueError("recipe_args belong to a recipe given by name; configure the callbacks of a list themselves.")
    return "+".join(type(callback).__name__ for callback in recipe), list(recipe)


def _phase_seed(args: ModXTrainingArguments, number: int) -> int:
    seed = args.data_seed if args.data_seed is not None else args.seed
    return 1000 * seed + number


def _last_complete_checkpoint(folder: str) -> str | None:
    """The newest checkpoint to which nothing is missing, or None to start the phase afresh. The Trainer itself would
    go on from a part of one with a fresh optimizer, and say nothing."""
    checkpoints = sorted(
        Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True
    )
    for checkpoint in checkpoints:
        needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", LOSS_CALLBACKS_NAME)
        if all((checkpoint / name).exists() for name in needed) and any(checkpoint.glob("rng_state*.pth")):
            return str(checkpoint)
        logger.warning("%s is incomplete and left out.", checkpoint)
    return None


def _state_of(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def _training_record(trainer: ModXTrainer) -> dict[str, Any]:
    """What the log of a phase says in short: how many rows the old model had right, and the time."""
    history = trainer.state.log_history
    record: dict[str, Any] = {"steps": trainer.state.global_step, "pairs": len(trainer.train_dataset)}
    for name in ("image_rows_kept", "text_rows_kept"):
        values = [entry[name] for entry in history if name in entry]
        if values:
            record[name] = {"first": values[0], "mean": sum(values) / len(values), "last": values[-1]}
    for name in ("train_runtime", "train_samples_per_second"):
        record[name] = next((entry[name] for entry in reversed(history) if name in entry), None)
    return record
