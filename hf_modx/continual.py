"""All phases of a run: teacher hand-over, evaluation after every phase, and going on where it stopped."""

import copy
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import AutoModel, AutoProcessor, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .bad_samples import BadSample, drop_bad_samples, find_bad_samples
from .callbacks import LossCallback
from .demo import trained_base
from .embeddings import check_dual_encoder
from .evaluation import EvaluationMatrix
from .evaluation.retrieval import RECALL_AT
from .files import publish_folder, read_json, write_json
from .model_card import phase_card
from .overlap import leaked_rows
from .phases import PhaseStream, content_fingerprint
from .recipes import build_recipe
from .trainer import ModXTrainer
from .training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)

METRICS = [
    *(f"{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in RECALL_AT),
    "image_to_text_mrr",
    "text_to_image_mrr",
]
# What decides the weights of a run: changing one of these makes it a different run.
HYPERPARAMETERS = [
    "image_augmentation",
    "text_learning_rate",
    "freeze_vision_model",
    "freeze_text_model",
    "decay_logit_scale",
    "max_logit_scale",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "bad_samples",
    "contrastive_batch_size",
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
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if args.push_to_hub:
            raise ValueError(
                "This version does not push phases to the Hub. Leave out push_to_hub and upload OUT/phase-K with "
                "`hf upload`."
            )
        self.args = args
        self.folder = Path(args.output_dir)
        self.recipe_name, self.loss_callbacks = _named_recipe(recipe, recipe_args or {})
        self.recipe_args = {type(callback).__name__: _options(callback) for callback in self.loss_callbacks}
        self.callbacks = list(callbacks)
        self.state = PartialState()
        self.bad_samples: dict[str, list[BadSample]] = {}
        self.stream = self._usable(stream)
        self._refuse_single_pairs()
        self.tests = self.stream.tests()
        self.model, self.processing_class = self._load_start(model, processing_class, revision)

    def run(self) -> EvaluationMatrix:
        """Train what is not trained and evaluate what is not evaluated.

        Returns:
            The matrix of image-to-text recall@1; `matrix(name)` has the other metrics.
        """
        self._identify()
        self._save_start()
        self._read_results()
        for number in range(len(self.stream) + 1):
            trainer = None
            if not self.phase_folder(number).exists():
                trainer = self._train_phase(number)
            self._evaluate_phase(number, trainer)
        return self.matrix()

    def phase_folder(self, number: int) -> Path:
        """Where the model after phase `number` lies; 0 is the model before the first phase."""
        return self.folder / f"phase-{number}"

    def steps(self, number: int) -> int:
        """Optimizer steps of phase `number`, 1 being the first."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        batches, rest = divmod(len(self.stream.phases[number - 1].train), self.args.contrastive_batch_size)
        if rest and (batches == 0 or not self.args.dataloader_drop_last):
            batches += 1
        return math.ceil(self.args.num_train_epochs * math.ceil(batches / self.args.gradient_accumulation_steps))

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
        tests = {name: dataset for name, (dataset, _) in stream.tests().items()}

        def usable(name: str, part: Dataset) -> Dataset:
            def find() -> list[BadSample]:
                bad = find_bad_samples(part, *columns, name)
                return bad if name.endswith("(test)") else bad + leaked_rows(part, tests, self.args.image_column)

            self.bad_samples[name] = _on_main_process(find)
            return drop_bad_samples(part, self.bad_samples[name], self.args.bad_samples, name)

        return stream.map_parts(usable)

    def _refuse_single_pairs(self) -> None:
        for phase in self.stream:
            if min(len(phase.train), self.args.contrastive_batch_size) < 2:
                raise ValueError(
                    f"Phase {phase.name!r}: a contrastive batch of one pair has no negatives "
                    f"({len(phase.train)} pairs, per_device_train_batch_size {self.args.per_device_train_batch_size})."
                )

    def _load_start(self, model: nn.Module | str | None, processing_class: Any, revision: str | None) -> tuple:
        source = "a model in memory"
        if model is None:
            if self.stream.base is None:
                raise ValueError("Without a model the stream needs a base to train the small CLIP on. Give a model.")
            model = trained_base(self.stream, self.args)
        if isinstance(model, str | Path):
            source = str(model)
            processing_class = processing_class or AutoProcessor.from_pretrained(source, revision=revision)
            # Weights are trained in fp32 whatever they are stored in; bf16 is a matter of autocast.
            model = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32)
        check_dual_encoder(model)
        if processing_class is None:
            raise ValueError("Give the model's processor as processing_class, for instance a CLIPProcessor.")
        self.source = {"name": source, "revision": revision, "weights": weights_fingerprint(model)}
        return model, processing_class

    def _identify(self) -> None:
        """Write run.json, or refuse to go on in a folder that holds a different run."""
        path = self.folder / "run.json"
        identity = self._identity()
        before = read_json(path)
        if before is not None:
            changes = _changes(before["identity"], identity)
            if changes:
                raise ValueError(
                    f"{self.folder} holds a different run: {'; '.join(changes)}. Choose another output_dir, or give "
                    "the same settings to go on."
                )
        elif self.phase_folder(0).exists():
            raise ValueError(f"{self.folder} holds phases but no run.json. Choose another output_dir.")
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            packages = ("hf_modx", "transformers", "accelerate", "datasets", "torch")
            write_json(
                path,
                {
                    "identity": identity,
                    "versions": {name: version(name) for name in packages},
                    "processes": self.state.num_processes,
                },
            )

    def _identity(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe_name,
            "recipe_args": self.recipe_args,
            "hyperparameters": {name: _plain(getattr(self.args, name)) for name in HYPERPARAMETERS},
            "start": self.source["weights"],
            "base": content_fingerprint(self.stream.base.train) if self.stream.base is not None else None,
            "phases": [
                {"name": phase.name, "rows": len(phase.train), "data": content_fingerprint(phase.train)}
                for phase in self.stream
            ],
            "tests": {name: content_fingerprint(dataset) for name, (dataset, _) in self.tests.items()},
        }

    def _save_start(self) -> None:
        if not self.phase_folder(0).exists():
            self._publish(0, self.model)
        self._model_class = type(self.model)
        self.model = None

    # ---- One phase ----

    def _train_phase(self, number: int) -> ModXTrainer:
        phase = self.stream.phases[number - 1]
        starts_from = 0 if self._starts_from_base else number - 1
        trainer = self._trainer(number, self._load_phase(starts_from), self._training_data(number))
        logger.info("Phase %d of %d: %s, %d pairs", number, len(self.stream), phase.name, len(trainer.train_dataset))
        folder = trainer.args.output_dir
        trainer.train(resume_from_checkpoint=_on_main_process(lambda: _last_complete_checkpoint(folder)))
        if trainer.args.enable_jit_checkpoint and trainer.state.global_step < trainer.state.max_steps:
            # After SIGTERM the Trainer saves a checkpoint and returns as if it had finished.
            raise RuntimeError(f"Phase {number} was interrupted. Run the same command again to go on.")
        self._publish(number, trainer.accelerator.unwrap_model(trainer.model), _training_record(trainer))
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
            args.max_steps = sum(self.steps(k) for k in range(1, number + 1))
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
        return self._model_class.from_pretrained(self.phase_folder(number), dtype=torch.float32)

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
        while len(self._rows) <= number:
            self._rows.append({})
        row = self._rows[number]
        missing = {name: dataset for name, (dataset, _) in self.tests.items() if name not in row}
        if missing:
            trainer = trainer or self._trainer(number, self._load_phase(number), None)
            for name, dataset in missing.items():
                metrics = trainer.evaluate(dataset, metric_key_prefix=name)
                row[name] = {metric: metrics[f"{name}_{metric}"] for metric in METRICS}
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
            "learned_at": self._learned_at(),
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
        card = self.phase_folder(number) / "README.md"
        card.write_text(phase_card(self._identity(), results, number), encoding="utf-8")
        write_json(self.folder / "results.json", results)

    def _learned_at(self) -> list[int | None]:
        return [learned_at for _, learned_at in self.tests.values()]


def _on_main_process(function: Callable[[], Any]) -> Any:
    """Call the function on the main process alone; every process gets its result, or raises its error: one that
    raised alone would leave the others waiting for ever."""
    answer: list = [None]
    if PartialState().is_main_process:
        try:
            answer = [function()]
        except Exception as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters, the first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _named_recipe(
    recipe: str | Sequence[LossCallback], recipe_args: Mapping[str, Any]
) -> tuple[str, list[LossCallback]]:
    if isinstance(recipe, str):
        return recipe, build_recipe(recipe, **recipe_args)
    if recipe_args:
        raise ValueError("recipe_args belong to a recipe given by name; configure the callbacks of a list themselves.")
    return "+".join(type(callback).__name__ for callback in recipe), list(recipe)


def _options(callback: LossCallback) -> dict[str, Any]:
    """The public settings of a callback that are plain values, for the identity of a run."""
    return {
        name: value
        for name, value in sorted(vars(callback).items())
        if not name.startswith("_") and isinstance(value, bool | int | float | str)
    }


def _phase_seed(args: ModXTrainingArguments, number: int) -> int:
    seed = args.data_seed if args.data_seed is not None else args.seed
    return 1000 * seed + number


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | type(None)) else str(value)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words; more phases at the end are no difference."""
    found = []
    for name in ("recipe", "recipe_args", "start", "base"):
        if before[name] != now[name]:
            found.append(f"{name} was {before[name]!r} and is {now[name]!r}")
    for name, value in now["hyperparameters"].items():
        old = before["hyperparameters"].get(name)
        if old != value:
            found.append(f"{name} was {old!r} and is {value!r}")
    if len(before["phases"]) > len(now["phases"]):
        found.append(f"it has {len(before['phases'])} phases and {len(now['phases'])} are given")
    for number, (old, new) in enumerate(zip(before["phases"], now["phases"], strict=False), start=1):
        if old != new:
            found.append(f"phase {number} was {old['name']!r} with other data than {new['name']!r}")
    for name, old in before["tests"].items():
        if old != now["tests"].get(name, old):
            found.append(f"the test {name!r} had other data")
    return found


def _last_complete_checkpoint(folder: str) -> str | None:
    """The newest checkpoint whose last file was written, or None to start the phase afresh."""
    root = Path(folder)
    while root.exists():
        checkpoint = get_last_checkpoint(folder)
        if checkpoint is None:
            return None
        needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors")
        if all((Path(checkpoint) / name).exists() for name in needed):
            return checkpoint
        logger.warning("%s is incomplete and left out.", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def _training_record(trainer: ModXTrainer) -> dict[str, Any]:
    """What the log of a phase says in short: how many rows the old model had right, and the time."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    record: dict[str, Any] = {"steps": trainer.state.global_step, "pairs": len(trainer.train_dataset)}
    for name in ("image_rows_kept", "text_rows_kept"):
        values = [entry[name] for entry in history if name in entry]
        if values:
            record[name] = {"first": values[0], "mean": sum(values) / len(values), "last": values[-1]}
    for name in ("train_runtime", "train_samples_per_second"):
        record[name] = next((entry[name] for entry in reversed(trainer.state.log_history) if name in entry), None)
    return record
