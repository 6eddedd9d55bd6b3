"""The metadata at the head of a README.md, checked as the Hub checks it."""

import re
from typing import Any

import yaml


def front_matter(text: str) -> dict[str, Any] | None:
    """The block between the two lines `---`; None where there is none, or where it is no mapping."""
    block = _block(text)
    try:
        found = yaml.safe_load(block) if block is not None else None
    except yaml.YAMLError:
        return None
    return found if isinstance(found, dict) else None


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Errors, for which a commit is refused, and warnings."""
    block = _block(text)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if not isinstance(card, dict):
        return ["the metadata must be a mapping"], []
    return list(_model_index_errors(card.get("model-index", []))), []


def _block(text: str) -> str | None:
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    return match[1] if match else None


def _model_index_errors(index: Any):
    """What a result needs: a task, a data set and metrics, each with a type; null is no value of `config`."""
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for number, model in enumerate(index):
        where = f'"model-index[{number}]'
        if not isinstance(model.get("name"), str):
            yield f'{where}.name" is required'
        for place, result in enumerate(model.get("results") or []):
            where = f'"model-index[{number}].results[{place}]'
            dataset = result.get("dataset") or {}
            if not isinstance((result.get("task") or {}).get("type"), str):
                yield f'{where}.task.type" is required'
            yield from (f'{where}.dataset.{key}" is required' for key in ("name", "type") if key not in dataset)
            if not isinstance(dataset.get("config", ""), str):
                yield f'{where}.dataset.config" must be a string'
            metrics = result.get("metrics") or []
            if not metrics:
                yield f'{where}.metrics" is required'
            for metric in metrics:
                yield from (f'{where}.metrics: {key}" is required' for key in ("type", "value") if key not in metric)
