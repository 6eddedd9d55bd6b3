"""What is kept of knowledge whose pairs nobody has: `python examples/study/unstored.py --streams domain --seeds 2,3`.

A pretrained model has learned what cannot be replayed. Here that is the base of a built-in stream: the runs start from
the model that has learned it, are never given its pairs, and are tested on it all the same. The first phase has
nothing to replay, later ones replay what earlier phases have brought.

Options are those of `run.py`; runs are begun in this process, one at a time (`--jobs` does not go with it). For two at
a time start it twice, with other seeds. Writes `unstored.md` beside the tables.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

STUDY = Path(__file__).resolve().parent
sys.path.insert(0, str(STUDY))

import run  # noqa: E402
from cells import Cell, finished, read_cells  # noqa: E402
from measures import mean, measures, spread  # noqa: E402
from run import BASE  # noqa: E402
from tables import SHOWN, plus_minus, seeds  # noqa: E402

from hf_modx.demo import DEMO_DEFAULTS, DEMO_STREAMS  # noqa: E402
from hf_modx.files import write_text  # noqa: E402
from hf_modx.markdown import table  # noqa: E402
from hf_modx.model_card.metadata import metric_name  # noqa: E402
from hf_modx.phases import PhaseStream  # noqa: E402

ALONE = "_alone"
DEFAULTS = {
    "--streams": "domain",
    "--recipes": "finetune,modx-2,er,plus-mem,modx_plus",
    "--output_dir": "runs/study-unstored",
}
COLUMNS = ("base before", "base, end", "phases, learned", "phases, end")


def main(argv: Sequence[str]) -> int:
    argv = run.with_defaults(argv, DEFAULTS)
    options, _ = run.parse(argv)
    if options.jobs > 1:
        raise SystemExit("--jobs does not go with these streams: start the program twice, with other seeds.")
    bases, status = options.output_dir / "bases", 0
    # Those of the built-in streams, which a model given by name does not bring along.
    settings = {name: value for name, value in DEMO_DEFAULTS.items() if name not in run.FORMS[options.form]}
    for stream in options.streams:
        DEMO_STREAMS[stream + ALONE] = without_base(DEMO_STREAMS[stream])
        for seed in options.seeds:
            own = [*argv, "--seeds", str(seed)]
            run.main([*own, "--streams", stream, "--recipes", BASE, "--output_dir", str(bases)])
            model = bases / stream / f"{BASE}-seed{seed}" / "phase-0"
            flags = {"model_name_or_path": model, **settings}
            given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            status |= run.main([*own, "--streams", stream + ALONE, *given])
    report = write_report(read_cells(options.output_dir))
    write_text(options.output_dir / "unstored.md", report)
    print(report)
    return status


def without_base(stream: Callable[..., PhaseStream]) -> Callable[..., PhaseStream]:
    """The same phases; the base is a test that nothing teaches."""

    def phases_alone(seed: int = 0, *, validation: bool = False) -> PhaseStream:
        whole = stream(seed, validation=validation)
        return PhaseStream(whole.phases, extra_tests={whole.base.name: whole.base.test})

    return phases_alone


def write_report(cells: Sequence[Cell]) -> str:
    lines = ["# Knowledge whose pairs are not stored", ""]
    for stream in dict.fromkeys(cell.stream for cell in cells):
        recipes = finished([cell for cell in cells if cell.stream == stream])
        for metric in SHOWN:
            rows = []
            for recipe, runs in recipes.items():
                by_seed = {seed: shares(cell, metric) for seed, cell in runs.items()}
                columns = ({seed: found[place] for seed, found in by_seed.items()} for place in range(len(COLUMNS)))
                rows.append([recipe, seeds(runs), *(plus_minus(spread(column)) for column in columns)])
            lines += [f"## {stream.removesuffix(ALONE)}, {metric_name(metric)}, %", ""]
            lines += [table(["recipe", "seeds", *COLUMNS], rows), ""]
    return "\n".join(lines)


def shares(cell: Cell, metric: str) -> tuple[float, float, float, float]:
    """The numbers of `COLUMNS`, as fractions."""
    matrix, tests = cell.results["matrix"][metric], cell.results["learned_at"]
    base = [test for test, phase in enumerate(tests) if phase is None]
    found = measures(cell.results, metric)
    before, end = (mean(row[test] for test in base) for row in (matrix[0], matrix[-1]))
    return before, end, found["plasticity"], found["last"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
