"""The model card of a phase, written from the run."""

from importlib.metadata import version
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .evaluation import EvaluationMatrix

HEADLINE = "image_to_text_recall@1"
TEMPLATE = files("hf_modx").joinpath("templates", "phase_card.md")


def phase_card(identity: dict[str, Any], results: dict[str, Any], number: int) -> str:
    """Markdown with metadata for the model after phase `number` (0: before the first phase).

    Args:
        identity: of the run, as in run.json.
        results: as in results.json.
    """
    rows = results["matrix"][HEADLINE][: number + 1]
    learned_at = [k if k is None or k <= number else None for k in results["learned_at"]]
    matrix = EvaluationMatrix(results["phases"][:number], results["tests"], rows, learned_at)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["hf_modx", "clip", "continual-learning", results["recipe"]],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=f"CLIP after phase {number} of {len(identity['phases'])}",
        what=_what(identity, results, number),
        matrix=matrix.to_markdown(),
        summary=_summary(matrix) if number else "",
        training=_training(identity, results, number),
        sources=_sources(results),
    )
    return str(card)


def _what(identity: dict[str, Any], results: dict[str, Any], number: int) -> str:
    if number == 0:
        return "The model before the first phase of a continual run."
    learned = ", ".join(phase["name"] for phase in identity["phases"][:number])
    return (
        f"A dual encoder fine-tuned continually with the recipe `{results['recipe']}` of hf_modx "
        f"{version('hf_modx')}, one phase after the other: {learned}."
    )


def _summary(matrix: EvaluationMatrix) -> str:
    values = matrix.summary()
    return "\n".join(
        f"- {name.replace('_', ' ')}: {100 * value:.1f}" for name, value in values.items() if value is not None
    )


def _training(identity: dict[str, Any], results: dict[str, Any], number: int) -> str:
    lines = [f"- weights before the first phase: `{identity['start']}` (SHA-256, shortened)"]
    lines += [
        f"- phase {k}: {phase['name']}, {phase['rows']} pairs{_kept(results['training'][k - 1])}"
        for k, phase in enumerate(identity["phases"][:number], start=1)
    ]
    for callback, options in identity["recipe_args"].items():
        lines += [f"- {callback}: {name} {value}" for name, value in options.items()]
    lines += [f"- {name}: {value}" for name, value in identity["hyperparameters"].items() if value is not None]
    return "\n".join(lines)


def _sources(results: dict[str, Any]) -> str:
    lines = []
    for name, source in results["sources"].items():
        known = [" ".join(text.split()) for text in (source["description"], source["licence"]) if text]
        lines.append(f"- {name}: {'; licence: '.join(known) or 'the data set states no licence'}")
    return "\n".join(lines)


def _kept(record: dict[str, Any] | None) -> str:
    kept = (record or {}).get("image_rows_kept")
    return f", {100 * kept['mean']:.1f} % of image rows kept by Mod-X" if kept else ""
