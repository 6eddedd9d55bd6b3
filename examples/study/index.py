"""An old index after a phase, in the runs of a study: as it stands, re-aligned by one orthogonal map, and rebuilt.

    python examples/study/run.py --streams domain --recipes finetune,modx --seeds 0,1
    python examples/study/index.py runs/study --recipes finetune,modx

Reads the models of the finished runs of `run.py` and trains nothing. After every phase the index of each test that was
learned before it, and of the phase's own, is asked with the new model's texts; the map is fitted on the training pairs
that were learned before it. Beside one phase it measures all phases at once, with an index of the start model. Writes
`index/`, a file for each run, and `index.md`. Run the command again after an interruption: what is measured stays.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

STUDY = Path(__file__).resolve().parent
sys.path[:0] = [str(STUDY)]

from measures import spread  # noqa: E402
from tables import plus_minus  # noqa: E402

from hf_modx import PhaseStream  # noqa: E402
from hf_modx.data import PairCollator, PairDataset  # noqa: E402
from hf_modx.demo import DEMO_STREAMS  # noqa: E402
from hf_modx.evaluation import (  # noqa: E402
    EncodedPairs,
    cross_phase_metrics,
    encode_pairs,
    fit_alignments,
    index_recalls,
)
from hf_modx.files import read_json, write_json, write_text  # noqa: E402
from hf_modx.index import IndexAlignment  # noqa: E402
from hf_modx.markdown import table  # noqa: E402
from hf_modx.pretrained import load_dual_encoder  # noqa: E402
from hf_modx.run.disorder import training_sample  # noqa: E402

METRICS = ("text_to_image_recall@1", "image_to_text_recall@1")
WAYS = {
    "before": "old model, old index",
    "stale": "as it stands",
    "realigned": "re-aligned",
    "rebuilt": "rebuilt",
    "turned back": "rebuilt, towers turned back",
}
FITTED = "fitted on"  # no name of a test


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for run in finished_runs(options):
        stream, seed = run.parent.name, read_json(run / "run.json")["identity"]["hyperparameters"]["seed"]
        place = options.output_dir / "index" / stream / f"{run.name}.json"
        if not place.exists():
            print(f"{stream}/{run.name}", flush=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, measured(run, DEMO_STREAMS[stream](seed), options))
        recipe = run.name.removesuffix(f"-seed{seed}")
        found.setdefault(stream, {}).setdefault(recipe, {})[seed] = read_json(place)
    if not found:
        raise SystemExit(f"There are no finished runs of these recipes in {options.study}.")
    text = "\n\n".join(["# An index that is kept", explained(options), *map(chapter, found, found.values())]) + "\n"
    write_text(options.output_dir / "index.md", text)
    print(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study, with STREAM/RECIPE-seedN in it")
    parser.add_argument("--recipes", default="finetune,modx", help="comma-separated; default: finetune,modx")
    parser.add_argument("--output_dir", type=Path, help="default: the study")
    parser.add_argument("--fit_samples", type=int, default=4000, help="pairs of base and phases, in equal shares")
    parser.add_argument("--batch_size", type=int, default=64, help="images embedded at once")
    options = parser.parse_args(argv)
    options.output_dir = options.output_dir or options.study
    return options


def finished_runs(options: argparse.Namespace) -> Iterator[Path]:
    """In the order of the recipes, each with its seeds."""
    for stream in DEMO_STREAMS:
        for recipe in options.recipes.split(","):
            runs = sorted((options.study / stream).glob(f"{recipe}-seed*"))
            yield from (run for run in runs if len(list(run.glob("phase-*/*.safetensors"))) > 1)


# ---- Measuring ----


def measured(run: Path, stream: PhaseStream, options: argparse.Namespace) -> list[dict[str, Any]]:
    """An entry for each test, old phase and new phase: the phase before and every later one, the start and the end."""
    last, tests = len(stream), stream.tests()
    embedded = [embed(run / f"phase-{number}", stream, options) for number in range(last + 1)]
    entries = []
    for old, new in [*((k - 1, k) for k in range(1, last + 1)), (0, last)]:
        known = [f"{FITTED} {number}" for number in range(old + 1)]
        maps = fit_alignments(*([embedded[number][part] for part in known] for number in (old, new)))
        for test, (_, learned_at) in tests.items():
            if learned_at is not None and learned_at <= new:
                values = index_recalls(embedded[old][test], embedded[new][test], *maps)
                back = turned_back(embedded[new][test], *maps)
                values["turned back"] = cross_phase_metrics(back, back)
                about = {"old": old, "new": new, "test": test, "learned_at": learned_at, "fitted_on": maps[0].pairs}
                entries.append({**about, "values": values})
    return entries


def turned_back(new: EncodedPairs, of_images: IndexAlignment, of_texts: IndexAlignment) -> EncodedPairs:
    """Each tower by the inverse of the map that its old embeddings need: the recall that this gives back is what
    has been lost to a rotation of the towers against each other, the "inter-modal deviation" of the Mod-X paper."""
    return replace(new, image=of_images.turn_queries(new.image), text=of_texts.turn_queries(new.text))


def embed(model: Path, stream: PhaseStream, options: argparse.Namespace) -> dict[str, EncodedPairs]:
    """The tests, and of every phase a share of the training pairs."""
    encoder, processor = load_dual_encoder(str(model))
    collator = PairCollator.for_model(encoder, processor)
    share = options.fit_samples // (len(stream) + 1)
    parts = {name: test for name, (test, _) in stream.tests().items()}
    parts |= {f"{FITTED} {k}": training_sample(phase.train, share) for k, phase in enumerate(stream.all_phases())}
    columns = ("image", "caption", "pair_id")
    return {
        name: encode_pairs(encoder, PairDataset(part, *columns), collator, batch_size=options.batch_size)
        for name, part in parts.items()
    }


# ---- Telling ----


def explained(options: argparse.Namespace) -> str:
    return (
        "Recall@1 in percent, mean ± standard deviation over the seeds, of the tests that were learned before the"
        " phase, and of the one that it teaches; mean over tests and phases. The index holds the old model's "
        "embeddings, the queries are the new model's. Re-aligned: turned by one orthogonal map, fitted on "
        "training pairs of the base and of each phase that was learned before, on an equal share of each "
        f"({options.fit_samples} for base and all phases). A rebuilt index holds the new model's embeddings. Turned "
        "back: so it does, but each of the new towers is turned by the inverse of its own map; what this gives "
        "back of the recall has been lost to a rotation of the towers against each other."
    )


def chapter(stream: str, recipes: Mapping[str, Mapping[int, list[Mapping[str, Any]]]]) -> str:
    rows = []
    for title, is_wanted in SPANS.items():
        for metric in METRICS:
            for recipe, by_seed in recipes.items():
                cells = [plus_minus(spread(over_seeds(by_seed, is_wanted, metric, way))) for way in WAYS]
                direction = metric.partition("_recall")[0].replace("_", " ")
                rows.append([title, direction, recipe, ",".join(map(str, sorted(by_seed))), *cells])
    header = ["index asked", "direction", "recipe", "seeds", *WAYS.values()]
    return "\n".join([f"## {stream}", "", table(header, rows)])


SPANS = {
    "after one phase": lambda entry: entry["new"] == entry["old"] + 1 and entry["learned_at"] <= entry["old"],
    "of the start, after all phases": lambda entry: entry["new"] > entry["old"] + 1 and entry["learned_at"] == 0,
    "after one phase, its own test": lambda entry: entry["new"] == entry["old"] + 1 == entry["learned_at"],
}


def over_seeds(by_seed: Mapping[int, list], is_wanted, metric: str, way: str) -> dict[int, float]:
    return {
        seed: mean(entry["values"][way][f"cross_phase_{metric}"] for entry in entries if is_wanted(entry))
        for seed, entries in by_seed.items()
    }


if __name__ == "__main__":
    main(sys.argv[1:])
