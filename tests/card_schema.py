"""The Hub's rules for the metadata of a model card, and what a card must never hold.

The rules are those of the specification of the metadata (hub-docs, modelcard.md), which the Hub checks at every push.
"""

import math
import re
from typing import Any

import yaml

PIPELINE_TAGS = {
    "feature-extraction",
    "image-classification",
    "image-feature-extraction",
    "image-text-to-text",
    "image-to-text",
    "sentence-similarity",
    "text-classification",
    "text-to-image",
    "visual-document-retrieval",
    "visual-question-answering",
    "zero-shot-image-classification",
    "zero-shot-object-detection",
}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TEXTS = ("library_name", "pipeline_tag", "license", "license_name", "license_link", "base_model_relation")
LISTS = ("tags", "datasets", "language", "metrics")
KEYS = {*TEXTS, *LISTS, "base_model", "model-index"}

NEVER = {
    "None": r"\bNone\b",
    "an absolute path": r"(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]+|\b[A-Z]:\\",
    "a token": r"\bhf_[A-Za-z0-9]{20,}",
}
NEVER_IN_THE_TEXT = {
    "unknown": r"(?i)\bunknown\b",
    "nan": r"(?i)\bnan\b",
    "a link to nothing": r"\[[^\]]*\]\(\s*\)|(?<!!)\[\]\(",
    "a template variable": r"\{\{|\{%",
    "an HTML element": r"<\s*/?\s*[A-Za-z!]",
    "an empty table": r"(?m)^\|(?:\s*:?-{3,}:?\s*\|)+\n(?!\|)",
}


def card_problems(card: str) -> list[str]:
    """What is wrong with a card, in words; empty for a good one."""
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if match is None:
        return ["no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"metadata: {error}"]
    if not isinstance(data, dict):
        return ["the metadata are no mapping"]
    text = card[match.end() :]
    problems = [f"it holds {what}" for what, pattern in NEVER.items() if re.search(pattern, card)]
    problems += [f"its text holds {what}" for what, pattern in NEVER_IN_THE_TEXT.items() if re.search(pattern, text)]
    problems += [f"{place} is empty or null" for place in _empty("metadata", data)]
    problems += [f"{key} is no key of a model card" for key in sorted(set(data) - KEYS)]
    return problems + _fields(data) + _model_index(data.get("model-index", []))


def _empty(place: str, value: Any) -> list[str]:
    if value in (None, "", [], {}):
        return [place]
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in parts for found in _empty(f"{place}.{key}", part)]


def _fields(data: dict) -> list[str]:
    problems = [f"{key} is no string" for key in TEXTS if key in data and not isinstance(data[key], str)]
    for key in LISTS:
        values = data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            problems.append(f"{key} is no list of strings")
    problems += [f"{key} is missing" for key in ("library_name", "pipeline_tag", "tags") if key not in data]
    if data.get("pipeline_tag", "image-to-text") not in PIPELINE_TAGS:
        problems.append("pipeline_tag is no task of the Hub")
    if not LICENCE.fullmatch(str(data.get("license", "mit"))):
        problems.append("license is no identifier of the Hub")
    if data.get("license") == "other" and "license_name" not in data:
        problems.append("license is other and has no name")
    bases = data.get("base_model", [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and REPOSITORY.fullmatch(base) for base in bases):
        problems.append("base_model is no repository")
    if not all(isinstance(name, str) and REPOSITORY.fullmatch(name) for name in data.get("datasets") or []):
        problems.append("datasets are no repositories")
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        problems.append("base_model_relation is none of the Hub's")
    if "base_model_relation" in data and "base_model" not in data:
        problems.append("base_model_relation without a base_model")
    return problems


def _model_index(index: Any) -> list[str]:
    if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
        return ["model-index is no list of models"]
    problems = []
    for model in index:
        if not isinstance(model.get("name"), str):
            problems.append("a model of the model-index has no name")
        results = model.get("results")
        if not isinstance(results, list) or not results:
            problems.append("a model of the model-index has no results")
            continue
        places = []
        for result in results:
            problems += _result(result)
            dataset = result.get("dataset") or {}
            places.append(str([result.get("task"), [dataset.get(key) for key in ("type", "config", "split")]]))
        if len(set(places)) < len(places):
            problems.append("two results are of one task and data set")
    return problems


def _result(result: dict) -> list[str]:
    problems = [f"a result has no {part}" for part in ("task", "dataset", "metrics") if not result.get(part)]
    task, dataset = result.get("task") or {}, result.get("dataset") or {}
    required = {"task.type": task, "dataset.type": dataset, "dataset.name": dataset}
    optional = {"task.name": task, **{f"dataset.{key}": dataset for key in ("config", "split", "revision")}}
    for place, part in {**required, **optional}.items():
        key = place.split(".")[1]
        if (place in required or key in part) and not isinstance(part.get(key), str):
            problems.append(f"{place} is no string")
    for metric in result.get("metrics") or []:
        if not isinstance(metric.get("type"), str):
            problems.append("metric.type is no string")
        value = metric.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append("metric.value is no finite number")
    return problems
