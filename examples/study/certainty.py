"""How certain a difference between settings is: `python examples/study/certainty.py runs/study-tune modx-2 modx-5`.

Compares every further recipe of a study, or entry of a search, with the first one named: the difference of their mean
reciprocal rank after the last phase, and its standard error over the queries, each of which both models were asked.
What another seed would change is not in it, so the true uncertainty is larger. Reads the models of the finished runs
and trains nothing.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

STUDY = Path(__file__).resolve().parent
sys.path[:0] = [str(STUDY)]

from cells import Cell, read_cells, shows_validation  # noqa: E402

from hf_modx import PhaseStream  # noqa: E402
from hf_modx.data import PairCollator, PairDataset  # noqa: E402
from hf_modx.demo import DEMO_STREAMS  # noqa: E402
from hf_modx.evaluation import encode_pairs  # noqa: E402
from hf_modx.evaluation.retrieval import retrieval_ranks  # noqa: E402
from hf_modx.markdown import table  # noqa: E402
from hf_modx.pretrained import load_dual_encoder  # noqa: E402

COLUMNS = ("image", "caption", "pair_id")


def main(folder: Path, first: str, others: Sequence[str]) -> None:
    cells = {(c.recipe, c.stream, c.seed): c for c in read_cells(folder) if c.results is not None}
    streams: dict[tuple[str, int], PhaseStream] = {}
    rows = []
    for other in others:
        places = [(stream, seed) for name, stream, seed in cells if name == first and (other, stream, seed) in cells]
        if not places:
            raise SystemExit(f"{first} and {other} have no finished run of one stream and seed in {folder}.")
        parts = []
        for stream, seed in places:
            one, two = cells[first, stream, seed], cells[other, stream, seed]
            if (stream, seed) not in streams:
                streams[stream, seed] = DEMO_STREAMS[stream](seed, validation=shows_validation(one))
            parts += differences(one, two, streams[stream, seed])
        middle, error = mean_of_means(parts)
        where = ", ".join(sorted({stream for stream, _ in places}))
        rows.append([f"{other} - {first}", f"{100 * middle:+.1f}", f"{100 * error:.1f}", where])
    print(table(["mean reciprocal rank", "difference", "standard error", "streams"], rows))


def differences(first: Cell, other: Cell, stream: PhaseStream) -> list[torch.Tensor]:
    """For each test of the stream, (queries,) reciprocal ranks after the last phase: the other's less the first's."""
    one, two = (reciprocal_ranks(cell.folder / f"phase-{len(stream)}", stream) for cell in (first, other))
    return [after - before for before, after in zip(one, two, strict=True)]


def reciprocal_ranks(model: Path, stream: PhaseStream) -> list[torch.Tensor]:
    encoder, processor = load_dual_encoder(str(model))
    collator = PairCollator.for_model(encoder, processor)
    found = []
    for test, _ in stream.tests().values():
        pairs = encode_pairs(encoder, PairDataset(test, *COLUMNS), collator, batch_size=128)
        found.append(1 / retrieval_ranks(pairs.image, pairs.text, pairs.image_ids, pairs.text_ids).double())
    return found


def mean_of_means(parts: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The mean over tests of each test's mean, and its standard error; queries are independent."""
    middle = sum(part.mean().item() for part in parts) / len(parts)
    variance = sum(part.var().item() / len(part) for part in parts) / len(parts) ** 2
    return middle, math.sqrt(variance)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
