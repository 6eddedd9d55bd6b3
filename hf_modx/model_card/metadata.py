"""What the Hub reads of a model: the metadata of its card, and the `.eval_results` files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..evaluation.cross_phase import PREFIX as CROSS_PHASE
from ..files import write_text

RETRIEVAL = ("image-text-retrieval", "Image-text retrieval")
TASKS = {
    "zero_shot": ("zero-shot-image-classification", "Zero-shot image classification"),
    "linear_probe": ("image-classification", "Image classification with a linear probe"),
}
"""Type and name of the task by the first words of a metric; all others are retrieval."""


def card_metadata(
    results: list[EvalResult], model_name: str, config: Mapping[str, Any], **fields: Any
) -> ModelCardData:
    """Metadata of these results and fields; what is empty is left out, and without results the model-index."""
    pipeline_tag = "zero-shot-image-classification" if has_zero_shot_pipeline(config) else "feature-extraction"
    known = {"library_name": "transformers", "pipeline_tag": pipeline_tag}
    known |= {name: value for name, value in fields.items() if value}
    if results:
        known |= {"eval_results": results, "model_name": model_name}
    return ModelCardData(**known)


def phase_metadata(
    results: Mapping[str, Any], number: int, config: Mapping[str, Any], repo_id: str | None, is_adapter: bool = False
) -> ModelCardData:
    """Metadata of the model after a phase, or of the adapter that it is; see `phase_card` for the arguments."""
    model = results.get("model", {})
    base = model.get("repo_id")
    name = repo_id.split("/")[-1] if repo_id else f"{model_type(config)}-{results['recipe']}-phase-{number}"
    learned = [results.get("sources", {}).get(phase, {}) for phase in results["phases"][:number]]
    licence = model if base and _is_licence(model) else {}
    return card_metadata(
        _eval_results(results, number),
        name,
        config,
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "finetune") if base and number else None,
        library_name="peft" if is_adapter else None,
        datasets=list(dict.fromkeys(source["dataset_id"] for source in learned if "dataset_id" in source)),
        license=licence.get("licence"),
        license_name=licence.get("licence_name"),
        license_link=licence.get("licence_link"),
        tags=model_tags(config, results["recipe"], ["lora"] if is_adapter else []),
    )


def _is_licence(model: Mapping[str, Any]) -> bool:
    """The Hub takes its own identifiers, and "other" with a name."""
    licence = model.get("licence", "")
    return bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence)) and (licence != "other" or "licence_name" in model)


def model_tags(config: Mapping[str, Any], recipe: str, more: Sequence[str] = ()) -> list[str]:
    return ["hf_modx", model_type(config), "continual-learning", "image-text-retrieval", *more, recipe]


def _eval_results(results: Mapping[str, Any], number: int) -> list[EvalResult]:
    """Everything that was measured of the model after a phase alone, not together with another one."""
    return [
        eval_result(test, metric, rows[number][column], source_of_test(results, test))
        for column, test in enumerate(results["tests"])
        for metric, rows in {**results["matrix"], **results.get("ranks", {})}.items()
        if rows[number][column] is not None and not metric.startswith(CROSS_PHASE)
    ]


def eval_result(test: str, metric: str, value: float, source: Mapping[str, Any]) -> EvalResult:
    """One entry of a model-index; `source` is what is known of the test's data (see `data_source`)."""
    task_type, task_name = next((task for prefix, task in TASKS.items() if metric.startswith(prefix)), RETRIEVAL)
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type=source.get("dataset_id", "custom"),
        dataset_name=test,
        dataset_config=test,  # results that share type, config and split would be taken for one test's
        dataset_split=source.get("split", "test"),
        dataset_revision=source.get("revision"),
        metric_type=metric,
        metric_name=metric_name(metric),
        metric_value=float(value),
    )


def write_eval_results(folder: Path, results: Mapping[str, Any], number: int) -> list[Path]:
    """Write `.eval_results/*.yaml`, which the Hub shows on the page of the model and on leaderboards of data sets.

    The format (https://huggingface.co/docs/hub/eval-results) speaks of data sets on the Hub alone. So there are
    entries only for tests that are the whole of a split of such a data set, which `test_sources` in the results says
    (see `data_source`), one for each metric; for all others there is nothing to write. The Hub shows an entry where
    the data set's `eval.yaml` has a task of its name: `SPLIT_METRIC`, as in `test_image_to_text_recall@1`, or
    `CONFIG_SPLIT_METRIC` for a configuration that is not "default". Values are fractions in [0, 1], ranks are ranks.

    Returns:
        The files, one a data set.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for result in _eval_results(results, number):
        source = source_of_test(results, result.dataset_name)
        if not {"dataset_id", "split"} <= set(source):
            continue
        config = source.get("config", "default")
        entry = EvalResultEntry(
            dataset_id=source["dataset_id"],
            task_id="_".join([*([config] if config != "default" else []), source["split"], result.metric_type]),
            value=result.metric_value,
            dataset_revision=source.get("revision"),
            notes=f"{result.metric_name}, after phase {number} of a continual run",
        )
        entries.setdefault(source["dataset_id"], []).append(entry)
    files = []
    for dataset_id, own in entries.items():
        file = folder / ".eval_results" / f"{dataset_id.replace('/', '--')}.yaml"
        file.parent.mkdir(exist_ok=True)
        write_text(file, yaml.safe_dump(eval_result_entries_to_yaml(own), sort_keys=False, allow_unicode=True))
        files.append(file)
    return files


def metric_name(metric: str) -> str:
    """`image_to_text_recall@1` -> `Image-to-text recall@1`."""
    name = re.sub(r"(zero|cross)_", r"\1-", metric.replace("_to_", "-to-")).replace("_", " ")
    name = re.sub(r"\bmrr\b", "MRR", re.sub(r"\bmap\b", "mAP", re.sub(r"\btop(?=\d)", "top-", name)))
    return name[:1].upper() + name[1:]


def model_type(config: Mapping[str, Any]) -> str:
    return config.get("model_type", "clip")


def has_zero_shot_pipeline(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a pipeline for models of this type, which `VisionTextDualEncoderModel` is not."""
    return model_type(config) in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES


def source_of_test(results: Mapping[str, Any], test: str) -> Mapping[str, Any]:
    return results.get("test_sources", {}).get(test, {})


def as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
