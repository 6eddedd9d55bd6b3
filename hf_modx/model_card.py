"""The card of a model, written from the run: Markdown for people, metadata for the Hub, a picture of the matrix.

What a run does not know is left out. Names and descriptions are strangers' text: Markdown gets them escaped, the
metadata through the YAML library.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from .adapter import has_adapter
from .callbacks import LossCallback
from .card_keeping import kept_rows_notes, retention_notes
from .card_metadata import (
    as_list,
    card_metadata,
    eval_result,
    has_zero_shot_pipeline,
    metric_name,
    model_tags,
    model_type,
    phase_metadata,
    source_of_test,
    write_eval_results,
)
from .evaluation import EvaluationMatrix
from .files import read_json, write_text
from .identity import hyperparameters, is_adapter
from .markdown import escaped, table
from .papers import PAPERS
from .plots import draw_matrix
from .provenance import adapter_base, cached_commit, data_source, environment, is_hub_id

if TYPE_CHECKING:
    from .trainer import ModXTrainer

logger = logging.getLogger(__name__)

TEMPLATE = files("hf_modx").joinpath("templates", "phase_card.md")
PICTURE = "plots/matrix.png"
HEADLINES = ("image_to_text_recall@1", "text_to_image_recall@1", "zero_shot_top1")
OF_LABELS = ("zero_shot_top1", "linear_probe_top1")
"""Metrics of tests of labels that have a matrix of their own below the first one."""
OLD_INDEX = "cross_phase_text_to_image_recall@1"
PIPELINE_POSITIONS = 32
"""The zero-shot pipeline does not truncate: with fewer text positions it fails on longer labels."""
SIGMOID, SIGMOID_POSITIONS = ("siglip", "siglip2"), 64
"""Types of models with a sigmoid loss, and the length to which the zero-shot pipeline pads their labels."""

MOVEMENTS = (
    "images turned",
    "angles between images",
    "texts turned",
    "angles between texts",
    "images against texts",
)
MEANINGS = {
    "average": "mean of all values after a phase",
    "last": "mean of the last row",
    "backward_transfer": "mean change of a test since the phase that taught it",
    "forgetting": "mean loss of a test since its best",
    "transfer": "mean of the tests before the phase that teaches them",
    "forward_transfer": "mean change of a test from the start to right before the phase that teaches it",
    "zero_shot_retention": "part of the start's value that is kept, mean over the tests that no phase has taught",
}


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
    headline = _headlines(results)[0]
    matrix = _matrix(results, number, headline)
    picture = None
    if not _is_empty(matrix):
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
    headline, *_ = headlines = _headlines(results)
    recipe_args = identity["recipe_args"] if number else {}
    record = _training(results, number) if number else {}
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
        matrix=_matrix_table(results, number, headline),
        matrices_of_labels=_matrices_of_labels(results, number, headline),
        old_index=_matrix_table(results, number, OLD_INDEX) if OLD_INDEX in results["matrix"] else "",
        picture=picture,
        summary=_summary_table(results, number, headlines) if number else "",
        scores_of=f"In percent, {f'after phase {number}' if number else 'before the first phase'}; ranks as they are.",
        scores=_scores_table(results, number),
        disorder=_disorder_table(results, number),
        lineage=_lineage(identity, results.get("model", {})),
        recipe=_recipe(results, number) if number else "",
        phases=_phases_table(identity, results, number),
        retention=retention_notes(results, number),
        options=_options_table(recipe_args),
        hyperparameters=_settings_table(identity["hyperparameters"]),
        data=_data_table(identity, results, number),
        data_notes=_data_notes(identity, results, number),
        environment=_environment_table(record.get("environment", {})),
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
        options=_options_table(recipe_args),
        hyperparameters=_settings_table(hyperparameters(args)),
        data=_trainer_data_table(trainer),
        environment=_environment_table(environment(args.device, args.world_size)),
        limits=[],
        papers=_papers(config, recipe_args, args.peft),
    )


def _time_of(history: Sequence[Mapping[str, Any]]) -> str:
    record = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    return f" in {_wall_time(record)}" if record else ""


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
                _dataset_link(source),
                escaped(source.get("licence", "")),
                escaped(source.get("description", "")),
            )
            for name, source in sources.items()
        ],
    )


# ---- What was measured ----


def _headlines(results: Mapping[str, Any]) -> list[str]:
    return [metric for metric in HEADLINES if metric in results["matrix"]] or list(results["matrix"])[:1]


def _matrix(results: Mapping[str, Any], number: int, metric: str, name=str) -> EvaluationMatrix:
    """The matrix as it was after phase `number`, of the tests that have the metric; `name` changes the names of phases
    and tests."""
    rows = results["matrix"][metric][: number + 1]
    learned_at = [None if isinstance(k, int) and k > number else k for k in results["learned_at"]]
    phases, tests = results["phases"][:number], results["tests"]
    return EvaluationMatrix(list(map(name, phases)), list(map(name, tests)), rows, learned_at).measured()


def _is_empty(matrix: EvaluationMatrix) -> bool:
    return all(math.isnan(value) for value in matrix.values.ravel())


def _matrix_table(results: Mapping[str, Any], number: int, metric: str) -> str:
    matrix = _matrix(results, number, metric, escaped)
    return "" if _is_empty(matrix) else matrix.to_markdown()


def _matrices_of_labels(results: Mapping[str, Any], number: int, headline: str) -> list[tuple[str, str]]:
    """Name and table of each metric of tests of labels; the headline's stands above them."""
    metrics = [metric for metric in OF_LABELS if metric in results["matrix"] and metric != headline]
    tables = [(metric_name(metric), _matrix_table(results, number, metric)) for metric in metrics]
    return [(name, table) for name, table in tables if table]


def _summary_table(results: Mapping[str, Any], number: int, metrics: Sequence[str]) -> str:
    summaries = [_matrix(results, number, metric).summary() for metric in metrics]
    rows = []
    for name in summaries[0]:
        values = ["" if summary[name] is None else f"{100 * summary[name]:.1f}" for summary in summaries]
        if any(values):
            rows.append([name.replace("_", " "), *values, MEANINGS.get(name, "")])
    return table(["measure", *map(metric_name, metrics), "meaning"], rows)


def _scores_table(results: Mapping[str, Any], number: int) -> str:
    rows = [
        [escaped(metric_name(metric)), *(_score(metric, value) for value in values[number])]
        for metric, values in {**results["matrix"], **results.get("ranks", {})}.items()
    ]
    return table(["metric", *map(escaped, results["tests"])], [row for row in rows if any(row[1:])])


def _score(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:g}" if metric.endswith("_rank") else f"{100 * value:.1f}"


def _disorder_table(results: Mapping[str, Any], number: int) -> str:
    """Mean angles in degrees; see `hf_modx.evaluation.disorder`."""
    phases = results.get("spatial_disorder", {}).get("phases", [])
    found = phases[number] if number < len(phases) else None
    rows = []
    for since, name in (("since_previous", "the phase before"), ("since_start", "the start")):
        if found is None or (since == "since_start" and number == 1):  # the same
            continue
        for test, measured in found[since]["tests"].items():
            if measured is not None:
                angles = [measured[side][kind]["mean"] for side in ("image", "text") for kind in ("ram", "sam")]
                angles.append(measured["intermodal_rotation"])
                rows.append([name, escaped(test), *("" if angle is None else f"{angle:.1f}" for angle in angles)])
    return table(["compared with", "test", *MOVEMENTS], rows)


def _limits(results: Mapping[str, Any], number: int, metric: str) -> list[str]:
    matrix = _matrix(results, number, metric)
    if _is_empty(matrix):
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
    return (
        f"{what}, fine-tuned with the recipe {escaped(results['recipe'])} of hf_modx on a stream of phases: {learned}."
    )


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


def _training(results: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    return results["training"][number - 1] or {}


def _recipe(results: Mapping[str, Any], number: int) -> str:
    """Its name, and what was changed on the way: after a rollback a run may go on with other settings."""
    changed = [
        f"Other settings held up to phase {entry['until_phase']}: {escaped('; '.join(entry['changes']))}."
        for entry in results.get("changed_settings", [])
        if entry["until_phase"] < number
    ]
    return " ".join([f"Recipe {escaped(results['recipe'])}.", *changed])


def _phases_table(identity: Mapping[str, Any], results: Mapping[str, Any], number: int) -> str:
    rows = []
    for k, phase in enumerate(identity["phases"][:number], start=1):
        record = _training(results, k)
        rows.append(
            [
                str(k),
                escaped(phase["name"]),
                f"{record.get('pairs', phase['rows']):,}",
                str(record.get("steps", "")),
                f"phase-{record['starts_from']}" if "starts_from" in record else "",
                *(
                    f"{100 * record[kept]['mean']:.1f} %" if kept in record else ""
                    for kept in ("image_rows_kept", "text_rows_kept")
                ),
                " to ".join(f"{value:.4g}" for value in record.get("logit_scale", [])),
                _wall_time(record),
                _energy(record),
                escaped(record.get("weights", "")),
            ]
        )
    header = ["phase", "name", "pairs", "steps", "starts from", "image rows kept", "text rows kept", "logit scale"]
    return table([*header, "time", "energy of the GPUs", "weights after it"], rows)


def _wall_time(record: Mapping[str, Any]) -> str:
    """Of a phase that was interrupted the log only knows the time since it went on."""
    seconds = record.get("train_runtime")
    if seconds is None:
        return ""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            text = f"{seconds / size:.1f} {unit}"
            break
    else:
        text = f"{seconds:.1f} s"
    return f"{text} from step {record['resumed_at_step']} on" if "resumed_at_step" in record else text


def _energy(record: Mapping[str, Any]) -> str:
    """In kilowatt-hours; of a phase that was interrupted, as the time."""
    joules = record.get("train_energy_joules")
    return "" if joules is None else f"{joules / 3.6e6:.2g} kWh"


def _options_table(recipe_args: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (escaped(callback), escaped(name), _value(value))
        for callback, options in recipe_args.items()
        for name, value in options.items()
    ]
    return table(["loss callback", "option", "value"], rows)


def _settings_table(settings: Mapping[str, Any]) -> str:
    rows = [(escaped(name), _value(value)) for name, value in settings.items() if value is not None]
    return table(["hyper-parameter", "value"], rows)


def _value(value: Any) -> str:
    return escaped(value.value if isinstance(value, Enum) else value)


def _data_table(identity: Mapping[str, Any], results: Mapping[str, Any], number: int) -> str:
    sources, phases = results.get("sources", {}), identity["phases"]
    base = next((name for name in sources if name not in {phase["name"] for phase in phases}), None)
    rows = []
    if base is not None:
        rows.append(_data_row("base", base, sources[base], identity["base"]))
    for k, phase in enumerate(phases[:number], start=1):
        source = {"rows": phase["rows"], **sources.get(phase["name"], {})}
        rows.append(_data_row(f"phase {k}", phase["name"], source, phase["data"]))
    for test, pairs in results["test_pairs"].items():
        source = {"rows": pairs, **source_of_test(results, test)}
        rows.append(_data_row("test", test, source, identity["tests"].get(test)))
    return table(["used as", "name", "pairs", "fingerprint", "data set", "licence"], rows)


def _data_row(used_as: str, name: str, source: Mapping[str, Any], fingerprint: str | None) -> list[str]:
    rows = f"{source['rows']:,}" if "rows" in source else ""
    licence = escaped(source.get("licence") or "")
    return [used_as, escaped(name), rows, escaped(fingerprint or ""), _dataset_link(source), licence]


def _data_notes(identity: Mapping[str, Any], results: Mapping[str, Any], number: int) -> str:
    learned = [phase["name"] for phase in identity["phases"][:number]]
    later = [phase["name"] for phase in identity["phases"][number:]]
    sources = {name: source for name, source in results.get("sources", {}).items() if name not in later}
    described = [(escaped(name), escaped(source.get("description") or "")) for name, source in sources.items()]
    notes = [table(["name", "description"], [row for row in described if row[1]])]
    silent = [name for name in learned if not sources.get(name, {}).get("licence")]
    if silent:
        notes.append(f"The data state no licence: {', '.join(map(escaped, silent))}.")
    left_out = [f"{bad['count']} of {escaped(name)}" for name, bad in results.get("bad_samples", {}).items()]
    if left_out:
        notes.append(f"Rows left out as bad samples: {', '.join(left_out)}.")
    if deleted := results.get("deleted_pairs"):
        notes.append(_deletions(deleted))
    return "\n\n".join(note for note in notes if note)


def _deletions(deleted: Mapping[str, int]) -> str:
    asked = [f"{deleted[kind]} {kind.replace('_', ' ')}" for kind in ("pair_ids", "images") if deleted[kind]]
    known = deleted["trained_before"]
    earlier = f" The models of phases 1 to {known} were trained before some of this was asked." if known else ""
    return (
        f"Deleted on request, from the replay memory ({deleted['rows_from_memory']} rows) and from what this phase "
        f"was trained on: {' and '.join(asked)}.{earlier} What a model has learned before may remain in it."
    )


def _environment_table(known: Mapping[str, Any]) -> str:
    rows = [(escaped(name), escaped(value)) for name, value in known.get("versions", {}).items()]
    rows += [(key, escaped(known[key])) for key in ("device", "processes") if key in known]
    return table(["used", "version or name"], rows)


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
    card = ModelCard.from_template(
        metadata,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        location=location,
        is_published=is_published,
        base_location=_location(*adapter_base) if adapter_base is not None else None,
        padding=f'padding="max_length", max_length={positions}' if is_sigmoid else "padding=True",
        probabilities="sigmoid()" if is_sigmoid else "softmax(dim=-1)",
        has_pipeline=enough and has_zero_shot_pipeline(config) and adapter_base is None,
        **sections,
    )
    return str(card).rstrip() + "\n"


def _location(name: str, revision: str | None) -> str:
    """The arguments of `from_pretrained`."""
    # JSON's strings are Python's too, on one line whatever they hold.
    return json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")


def _architecture(config: Mapping[str, Any]) -> str:
    return escaped((config.get("architectures") or ["CLIP"])[0])


def _papers(config: Mapping[str, Any], recipe_args: Mapping[str, Any], peft: str | None) -> str:
    """Each once: two callbacks may be of one paper."""
    return "\n\n".join(
        dict.fromkeys(PAPERS[name] for name in (model_type(config), *recipe_args, peft) if name in PAPERS)
    )


def _hub_link(repo_id: str) -> str:
    return f"[{escaped(repo_id)}](https://huggingface.co/{quote(repo_id)})"


def _dataset_link(source: Mapping[str, Any]) -> str:
    if "dataset_id" not in source:
        return escaped(source.get("homepage", ""))
    link = f"[{escaped(source['dataset_id'])}](https://huggingface.co/datasets/{quote(source['dataset_id'])})"
    details = [f"{key} {escaped(source[key])}" for key in ("config", "split", "revision") if key in source]
    return ", ".join([link, *details])
