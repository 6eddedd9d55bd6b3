"""A model between two others."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from .files import publish_folder, write_text
from .markdown import escaped, table
from .model_card.metadata import card_metadata, model_type
from .papers import PAPERS
from .pretrained import load_dual_encoder, split_revision
from .run.identity import weights_fingerprint
from .run.provenance import model_source


def merge_models(first: str, second: str, weight: float, folder: Path) -> None:
    """Write `(1 - weight) first + weight second`, tensor by tensor, as a model with processor and card (WiSE-FT,
    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022).

    The mixture is computed in fp32 and saved as the first model is stored; the processor is the first's.

    Args:
        first, second: folders, or ids on the Hub with `@REVISION`.
        weight: of the second, in [0, 1].
        folder: a new one, or an empty one; it appears complete.

    Raises:
        ValueError: the models differ in architecture or vocabulary, the weight is out of its range, or the folder
            holds something.
        OSError, TypeError: see `load_dual_encoder`.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"The weight must be in [0, 1], got {weight}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty. Choose another folder.")
    model, processor = load_dual_encoder(first, dtype="auto")
    other, its_processor = load_dual_encoder(second, dtype="auto")
    if processor.tokenizer.get_vocab() != its_processor.tokenizer.get_vocab():
        raise ValueError(f"{first} and {second} have different vocabularies: their texts cannot be merged.")
    refuse_other_architecture(first, model, second, other)
    sources = [describe(name, weights) for name, weights in ((first, model), (second, other))]
    interpolate(model, other.state_dict(), weight)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    write_text(temporary / "README.md", merge_card(sources, weight, model, folder.name))
    publish_folder(temporary, folder)


def refuse_other_architecture(first: str, model: nn.Module, second: str, other: nn.Module) -> None:
    """Raise a ValueError that names the first tensor that one model lacks or has in another shape."""
    if type(model) is not type(other):
        raise ValueError(f"{first} is a {type(model).__name__} and {second} a {type(other).__name__}.")
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, other))
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            shapes = [f"{shapes[name]}" if name in shapes else "missing" for shapes in (ours, theirs)]
            raise ValueError(
                f"{first} and {second} have different architectures: {name} is {shapes[0]} in the first and "
                f"{shapes[1]} in the second."
            )


@torch.no_grad()
def interpolate(model: nn.Module, other: Mapping[str, Tensor], weight: float) -> None:
    """`model <- (1 - weight) model + weight other`, in fp32 for each tensor; exactly one of them at 0 and at 1."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(tensor.float(), other[name].float(), weight))


def describe(name: str, model: nn.Module) -> dict[str, Any]:
    return {**model_source(*split_revision(name)), "weights": weights_fingerprint(model)}


def merge_card(sources: list[dict[str, Any]], weight: float, model: nn.Module, name: str) -> str:
    """Markdown with metadata; `sources` are the first and the second model (see `model_source`)."""
    config = model.config.to_dict()
    on_hub = list(dict.fromkeys(source["repo_id"] for source in sources if "repo_id" in source))
    licences = {
        json.dumps([source.get(key) for key in ("licence", "licence_name", "licence_link")]) for source in sources
    }
    licence = sources[0].get("licence") if len(licences) == 1 and on_hub else None
    metadata = card_metadata(
        [],
        name,
        config,
        base_model=on_hub,
        base_model_relation="merge" if on_hub else None,
        license=licence,
        license_name=sources[0].get("licence_name") if licence else None,
        license_link=sources[0].get("licence_link") if licence else None,
        tags=["hf_modx", model_type(config), "merge", "wise-ft"],
    )
    rows = [
        [f"{share:g}", *(escaped(source.get(key, "")) for key in ("name", "revision", "commit", "licence", "weights"))]
        for share, source in zip((1 - weight, weight), sources, strict=True)
    ]
    header = ["weight", "model", "revision", "commit", "licence", "weights before (SHA-256, first 16 digits)"]
    loading = json.dumps(name)
    text = f"""# {escaped(name)}

A {escaped(type(model).__name__)} between two others: every weight is the weighted mean of theirs (WiSE-FT), made with
hf_modx. Nothing was trained, and nothing was measured: evaluate it before it is used.

{table(header, rows)}

## How to load it

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({loading})
processor = AutoProcessor.from_pretrained({loading})
```

## Citation

```bibtex
{PAPERS["WiseFT"]}
```
"""
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}"))
