"""Rank what a search has tried: `python examples/study/choose.py runs/study-tune`.

    python examples/study/run.py --tune --recipes search --streams domain,class --seeds 10
    python examples/study/choose.py runs/study-tune

The score of an entry is its mean reciprocal rank over the validation tests after the last phase, mean over the streams
that the search has run. Settings are chosen by it alone, for every recipe alike.
"""

import statistics
import sys
from pathlib import Path

from hf_modx.files import read_json
from hf_modx.markdown import escaped, table

METRIC = "image_to_text_mrr"


def main(folder: Path) -> None:
    streams = read_json(folder / "measures.json")
    if streams is None:
        raise SystemExit(f"There are no measures in {folder}: run the search first.")
    names = [name for name in next(iter(streams.values())) if all(name in found for found in streams.values())]
    score = {name: mean(streams, name, "last") for name in names}
    rows = [
        [
            escaped(name),
            *(f"{100 * mean(streams, name, measure):.1f}" for measure in ("last", "plasticity", "forgetting")),
        ]
        for name in sorted(names, key=score.get, reverse=True)
    ]
    print(table(["entry", "last MRR", "plasticity", "forgetting"], rows))


def mean(streams: dict, name: str, measure: str) -> float:
    return statistics.mean(found[name][METRIC][measure]["mean"] for found in streams.values())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
