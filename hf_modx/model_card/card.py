"""The card of a model, written from the run: Markdown for people, metadata for the Hub, a picture of the matrix.

What a run does not know is left out. Names and descriptions are strangers' text: Markdown gets them escaped, the
metadata through the YAML library.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import ModelCardData
from jinja2 import Template

from ..adapter import has_adapter
from ..callbacks import LossCallback
from ..files import read_json, write_text
from ..markdown import escaped, table
from ..papers import PAPERS
from ..plots import draw_matrix
from ..run.identity import hyperparameters, is_adapter
from ..run.provenance import adapter_base, cached_commit, data_source, environment, is_hub_id
from .keeping import kept_rows_notes, retention_notes
from .measures import (
    disorder_table,
    headlines_of,
    is_empty,
    matrices_of_labels,
    matrix_after,
    matrix_table,
    scores_table,
    summary_table,
)
from .metadata import (
    as_list,
    card_metadata,
    eval_result,
    has_zero_shot_pipeline,
    metric_name,
    model_tags,
    model_type,
    phase_metadata,
    write_eval_results,
)
from .training import (
    data_notes,
    data_table,
    dataset_link,
    environment_table,
    options_table,
    phases_table,
    recipe_in_words,
    record_of_phase,
    settings_table,
    wall_time,
)

if TYPE_CHECKING:
    from ..trainer import ModXTrainer

logger = logging.getLogger(__name__)

TEMPLATE = files("hf_modx").joinpath("templates", "phase_card.md")
PICTURE = "plots/matrix.png"
OLD_INDEX = "cross_phase_text_to_image_recall@1"
PIPELINE_POSITIONS = 32
"""The zero-shot pipeline does not truncate: with fewer text positions it fails on longer labels."""
SIGMOID, SIGMOID_POSITIONS = ("siglip", "siglip2"), 64
"""Types of models with a sigmoid loss, and the length to which the zero-shot pipeline pads their labels."""


# ---- A phase of a run ----


def write_phase_card(
    folder: Path,
    identity: Mapping[str, Any],
    results: Mapping[str, Any],
    number: int,
    *,
    config: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> None:
    """Write `README.md`, the picture `plots/matrix.png` and the `.eval_results` files of a phase.

    Without matplotlib the card has no picture, and the log says how to get one.

    Args:
        folder: of the phase, or any other that is there.
        identity, results, number, repo_id, revision: see `phase_card`.
        config: of the model. Default: `config.json` in the folder.
    """
    headline = headlines_of(results)[0]
    matrix = matrix_after(results, number, headline)
    picture = None
    if not is_empty(matrix):
        try:
            draw_matrix(matrix, folder / PICTURE, f"{metric_name(headline)} in percent")
            picture = PICTURE
        except ImportError as error:
            logger.info("The card of phase %d has no picture. %s", number, error)
    write_eval_results(folder, results, number)
    config = read_json(folder / "config.json") if config is None else config
    card = phase_card(identity, results, number, config=config, picture=picture, repo_id=repo_id, revision=revision)
    write_text(folder / "README.md", card)


def write_card_of_run(run: Path, number: int, folder: Path) -> None:
    """Write the card of a phase of a run on the disk, with its picture, into another folder, which is made.

    Args:
        run: the folder with `run.json` and `results.json`.
        number: of the phase, 0 being the model before the first one.
        folder: gets `README.md` and `plots/matrix.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity, results = read_json(run / "run.json")["identity"], read_json(run / "results.json")
    write_phase_card(folder, identity, results, number, config=phase_config(run, number))


def card_loads(folder: Path, repo_id: str, revision: str) -> bool:
    """Whether the card in the folder of a phase says how to load this revision, and not the folder or another one."""
    card = folder / "README.md"
    return card.exists() and f"from_pretrained({_location(repo_id, revision)})" in card.read_text(encoding="utf-8")


def phase_config(run: Path, number: int) -> dict[str, Any] | None:
    """The `config.json` of the model of a phase; an adapter has that of its base."""
    return read_json(run / f"phase-{number}" / "config.json") or read_json(run / "phase-0" / "config.json")


def phase_card(
    identity: Mapping[str, Any],
    results: Mapping[str, Any],
    number: int,
    *,
    config: Mapping[str, Any] | None = None,
    picture: str | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> str:
    """Markdown with metadata for the model after phase `number` (0: before the first phase).

    The model-index holds every metric of every test that was measured after THIS phase, as a fraction at full
    precision. Rows of earlier phases stand in the table alone: a model-index describes one model.

    Args:
        identity: of the run, as in run.json.
        results: as in results.json. Used where they are there: `model` (see `model_source`; `trained_on` names the
            data of a start that was trained from scratch), `sources` and `test_sources` by name (see `data_source`),
            and of each phase's record in `training`: `environment` (see `environment`), `starts_from` (number of a
            phase), `weights` (fingerprint after the phase), `resumed_at_step`.
        config: of the model, as in config.json.
        picture: relative link to a picture of the matrix.
        repo_id, revision: where the model is published. Default: the card loads the local folder `phase-K`.
    """
    config = config or {}
    headline, *_ = headlines = headlines_of(results)
    recipe_args = identity["recipe_args"] if number else {}
    record = record_of_phase(results, number) if number else {}
    adapts = is_adapter(identity, number)
    return _render(
        phase_metadata(results, number, config, repo_id, adapts),
        config,
        repo_id or f"phase-{number}",
        revision,
        is_published=repo_id is not None,
        adapter_base=adapter_base(results.get("model", {}), repo_id) if adapts else None,
        title=_title(identity, number, config),
        what=_what(identity, results, number),
        headline=metric_name(headline),
        matrix=matrix_table(results, number, headline),
        matrices_of_labels=matrices_of_labels(results, number, headline),
        old_index=matrix_table(results, number, OLD_INDEX) if OLD_INDEX in results["matrix"] else "",
        picture=picture,
        summary=summary_table(results, number, headlines) if number else "",
        scores_of=f"In percent, {f'after phase {number}' if number else 'before the first phase'}; ranks as they are.",
        scores=scores_table(results, number),
        disorder=disorder_table(results, number),
        lineage=_lineage(identity, results.get("model", {})),
        recipe=recipe_in_words(results, number) if number else "",
        phases=phases_table(identity, results, number),
        retention=retention_notes(results, number),
        options=options_table(recipe_args),
        hyperparameters=settings_table(identity["hyperparameters"]),
        data=data_table(identity, results, number),
        data_notes=data_notes(identity, results, number),
        environment=environment_table(record.get("environment", {})),
        limits=[*_limits(results, number, headline), *kept_rows_notes(identity, results, number)],
        papers=_papers(config, recipe_args, identity["hyperparameters"].get("peft") if number else None),
    )


# ---- One training with the Trainer alone ----


def trainer_card(
    trainer: "ModXTrainer",
    *,
    model_name: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    dataset_tags: str | Sequence[str] | None = None,
) -> str:
    """Markdown with metadata for the model of a `ModXTrainer` that was used alone: recipe, hyper-parameters, sizes of
    the data, and the last values of everything that was evaluated.

    Args:
        trainer: after training.
        model_name: title and name in the model-index. Default: the name of the output folder.
        language, license, tags: for the metadata.
        finetuned_from: the base model on the Hub. Default: what the model was loaded from, if that was the Hub.
        dataset_tags: ids of the data sets on the Hub.
    """
    args, config = trainer.args, trainer.model.config.to_dict()
    folder = Path(args.output_dir).resolve().name
    repo_id = trainer.hub_model_id
    history = trainer.state.log_history
    recipe_args = {type(callback).__name__: _public_settings(callback) for callback in trainer.loss_callbacks}
    base = finetuned_from or _hub_origin(trainer.model)
    scores = _last_evaluations(history)
    metadata = card_metadata(
        [eval_result(test, metric, value, {}) for test, values in scores.items() for metric, value in values.items()],
        model_name or folder,
        config,
        base_model=base,
        base_model_relation=("adapter" if has_adapter(trainer.model) else "finetune") if base else None,
        library_name="peft" if has_adapter(trainer.model) else None,
        datasets=as_list(dataset_tags),
        language=language,
        license=license,
        tags=[*model_tags(config, "+".join(recipe_args)), *as_list(tags)],
    )
    return _render(
        metadata,
        config,
        repo_id or folder,
        None,
        is_published=repo_id is not None,
        title=escaped(model_name or folder),
        what=f"A dual encoder ({_architecture(config)}), fine-tuned on images with captions with hf_modx.",
        scores_of="As evaluated last.",
        scores=table(
            ["test", "metric", "value"],
            [
                (escaped(test), escaped(metric_name(metric)), f"{value:.4f}")
                for test, values in scores.items()
                for metric, value in values.items()
            ],
        ),
        lineage=f"- Base model: {_hub_link(base)}" if base else "",
        recipe=f"{escaped(' + '.join(recipe_args))}: {trainer.state.global_step} steps{_time_of(history)}.",
        options=options_table(recipe_args),
        hyperparameters=settings_table(hyperparameters(args)),
        data=_trainer_data_table(trainer),
        environment=environment_table(environment(args.device, args.world_size)),
        limits=[],
        papers=_papers(config, recipe_args, args.peft),
    )


def _time_of(history: Sequence[Mapping[str, Any]]) -> str:
    record = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    return f" in {wall_time(record)}" if record else ""


def _public_settings(callback: LossCallback) -> dict[str, Any]:
    values = {name: value for name, value in sorted(vars(callback).items()) if not name.startswith("_")}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


def _hub_origin(model: Any) -> str | None:
    """The repository that the model was loaded from; a name alone is no proof, its files in the cache are."""
    name = getattr(model, "name_or_path", "")
    return name if is_hub_id(name) and cached_commit(name) is not None else None


def _last_evaluations(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Test -> metric -> the last value that was logged. The entry of an evaluation is known by its running time."""
    found: dict[str, dict[str, float]] = {}
    for entry in history:
        prefixes = [key.removesuffix("_runtime") for key in entry if key.endswith("_runtime") and key[:6] != "train_"]
        for prefix in prefixes:
            values = {key.removeprefix(f"{prefix}_"): entry[key] for key in entry if key.startswith(f"{prefix}_")}
            speed = [name for name in values if name == "runtime" or name.endswith("_per_second")]
            found[prefix.removeprefix("eval_")] = {
                name: float(value)
                for name, value in values.items()
                if name not in speed and isinstance(value, int | float) and math.isfinite(value)
            }
    return {test: values for test, values in found.items() if values}


def _trainer_data_table(trainer: "ModXTrainer") -> str:
    tests = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    parts = {"training": trainer.train_dataset, **tests}
    sources = {name: data_source(part) for name, part in parts.items() if hasattr(part, "info")}
    return table(
        ["used as", "pairs", "data set", "licence", "description"],
        [
            (
                escaped(name),
                str(source.get("rows", "")),
                dataset_link(source),
                escaped(source.get("licence", "")),
                escaped(source.get("description", "")),
            )
            for name, source in sources.items()
        ],
    )


# ---- What was measured ----


def _limits(results: Mapping[str, Any], number: int, metric: str) -> list[str]:
    matrix = matrix_after(results, number, metric)
    if is_empty(matrix):
        return ["No test was held out: nothing tells what was learned and what was forgotten."]
    lost = {}
    for column, test in enumerate(matrix.tests):
        before = [value for value in matrix.values[:-1, column] if not math.isnan(value)]
        loss = max(before, default=math.nan) - matrix.values[-1, column]
        if loss > 0:
            lost[test] = loss
    limits = []
    if lost:
        listed = ", ".join(f"{escaped(test)} {100 * loss:.1f}" for test, loss in lost.items())
        limits.append(f"Points of {metric_name(metric)} that tests have lost since their best row: {listed}.")
    smallest = min(results["test_pairs"][test] for test in matrix.tests)
    limits.append(f"One pair of the smallest test, which has {smallest}, is worth {100 / smallest:.1f} points.")
    return limits


# ---- How it came to be ----


def _what(identity: Mapping[str, Any], results: Mapping[str, Any], number: int) -> str:
    if number == 0:
        return "The model before the first phase of a continual run with hf_modx."
    learned = ", ".join(escaped(phase["name"]) for phase in identity["phases"][:number])
    what = "A dual encoder for images and texts"
    if is_adapter(identity, number):
        what = "A LoRA adapter of a dual encoder for images and texts, one for all phases so far"
    recipe = f"the recipe {escaped(results['recipe'])} of hf_modx"
    if all(record_of_phase(results, k).get("steps") == 0 for k in range(1, number + 1)):
        return f"{what}, kept as it was by {recipe} over a stream of phases: {learned}."
    return f"{what}, fine-tuned with {recipe} on a stream of phases: {learned}."


def _title(identity: Mapping[str, Any], number: int, config: Mapping[str, Any]) -> str:
    if number == 0:
        return f"{_architecture(config)} before the first phase"
    phases = identity["phases"]
    return f"{_architecture(config)} after phase {number} of {len(phases)}: {escaped(phases[number - 1]['name'])}"


def _lineage(identity: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    lines = []
    if "repo_id" in model:
        details = [f"{key} {escaped(model[key])}" for key in ("revision", "commit") if key in model]
        lines.append(", ".join([f"- Base model: {_hub_link(model['repo_id'])}", *details]))
    elif "trained_on" in model:
        lines.append(f"- Start: trained from scratch on {escaped(model['trained_on'])}")
    elif "name" in model:
        lines.append(f"- Start: {escaped(model['name'])}")
    licence = [escaped(model[key]) for key in ("licence", "licence_name", "licence_link") if key in model]
    if licence:
        lines.append(f"- Its licence: {', '.join(licence)}")
    if "start" in identity:
        lines.append(
            f"- Weights before the first phase: {escaped(identity['start'])} (SHA-256 over names and values of all "
            "parameters, the first 16 digits)"
        )
    return "\n".join(lines)


# ---- Words and links ----


def _render(
    metadata: ModelCardData,
    config: Mapping[str, Any],
    load_from: str,
    revision: str | None,
    *,
    is_published: bool,
    adapter_base: tuple[str, str | None] | None = None,
    **sections: Any,
) -> str:
    """The card; a section that is empty is left out. `adapter_base`: name and revision of what it is an adapter of."""
    location = _location(load_from, revision)
    is_sigmoid = model_type(config) in SIGMOID
    positions = config.get("text_config", {}).get("max_position_embeddings", 0)
    enough = positions >= (SIGMOID_POSITIONS if is_sigmoid else PIPELINE_POSITIONS)
    card = _template().render(
        card_data=metadata.to_yaml(),
        location=location,
        is_published=is_published,
        base_location=_location(*adapter_base) if adapter_base is not None else None,
        padding=f'padding="max_length", max_length={positions}' if is_sigmoid else "padding=True",
        probabilities="sigmoid()" if is_sigmoid else "softmax(dim=-1)",
        has_pipeline=enough and has_zero_shot_pipeline(config) and adapter_base is None,
        **sections,
    )
    return card.rstrip() + "\n"


@cache
def _template() -> Template:
    return Template(TEMPLATE.read_text(encoding="utf-8"))


def _location(name: str, revision: str | None) -> str:
    """The arguments of `from_pretrained`."""
    # JSON's strings are Python's too, on one line whatever they hold.
    return json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")


def _architecture(config: Mapping[str, Any]) -> str:
    return escaped((config.get("architectures") or ["CLIP"])[0])


def _papers(config: Mapping[str, Any], recipe_args: Mapping[str, Any], peft: str | None) -> str:
    """Each once: two callbacks may be of one paper."""
    rectifies = recipe_args.get("ModX", {}).get("screen") == "rectify"
    names = [model_type(config), *recipe_args, *(["DKR"] if rectifies else []), peft]
    return "\n\n".join(dict.fromkeys(PAPERS[name] for name in names if name in PAPERS))


def _hub_link(repo_id: str) -> str:
    return f"[{escaped(repo_id)}](https://huggingface.co/{quote(repo_id)})"
