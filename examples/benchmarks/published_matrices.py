"""Transfer, Avg and Last of published matrices: what `EvaluationMatrix` computes beside what is printed.

The authors of ZSCL (Zheng et al., ICCV 2023) keep the accuracies of 14 runs on MTIL, 11 tasks after each of
11 phases, in their repository:

    git clone https://github.com/Thunderbeee/ZSCL
    python examples/benchmarks/published_matrices.py ZSCL

Ends with status 1 where a number differs by more than 0.1.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from hf_modx.evaluation import EvaluationMatrix

TASKS = [
    "Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food",
    "MNIST", "OxfordPet", "StanfordCars", "SUN397",
]  # fmt: skip
CIFAR10 = 2
"""The column of a further test in the files, which the paper's tables leave out."""
ORDERS = {"t3": list(range(11)), "t9": [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]}
"""Order I and order II; all files hold rows and columns in order I."""

MEASURES = ("transfer", "average", "last")
PRINTED = {
    "t3_1": ("fine-tuning, order I", 44.6, 55.9, 77.3),
    "t3_2": ("LwF, order I", 56.9, 64.7, 74.6),
    "t3_3": ("iCaRL, order I", 50.4, 65.7, 80.1),
    "t3_4": ("LwF-VR, order I", 57.2, 65.1, 76.6),
    "t3_5": ("WiSE-FT, order I", 52.3, 60.7, 77.7),
    "t3_6": ("ZSCL*, order I", 62.2, 72.6, 84.5),
    "t3_7": ("ZSCL, order I", 68.1, 75.4, 83.6),
    "t9_1": ("fine-tuning, order II", 46.6, 56.2, 67.4),
    "t9_2": ("LwF, order II", 53.2, 62.2, 71.9),
    "t9_3": ("iCaRL, order II", 50.9, 56.9, 71.6),
    "t9_4": ("LwF-VR, order II", 53.1, 60.6, 68.3),
    "t9_5": ("WiSE-FT, order II", 51.0, 61.5, 72.2),
    "t9_6": ("ZSCL*, order II", 59.8, 71.8, 83.3),
    "t9_7": ("ZSCL, order II", 64.2, 74.5, 83.4),
}
"""By file: the run, and its numbers in the paper (order I) and in the authors' notebook (order II)."""
TOLERANCE = 0.1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="clone of the repository")
    folder = parser.parse_args(argv).folder / "mtil" / "results"
    if missing := [name for name in PRINTED if not (folder / f"{name}.npy").exists()]:
        parser.error(f"{folder} does not hold {', '.join(f'{name}.npy' for name in missing)}.")
    largest = 0.0
    print("| run | Transfer | Avg | Last |\n" + "| --- " * 4 + "|")
    for name, (run, *printed) in PRINTED.items():
        summary = read_matrix(folder / f"{name}.npy", ORDERS[name.split("_")[0]]).summary()
        found = [100 * summary[measure] for measure in MEASURES]
        largest = max(largest, *(abs(one - other) for one, other in zip(found, printed, strict=True)))
        cells = [f"{one:.2f} ({other:.1f})" for one, other in zip(found, printed, strict=True)]
        print(f"| {run} | {' | '.join(cells)} |")
    print(f"\nIn brackets: as printed. Largest difference {largest:.3f}.")
    return int(largest > TOLERANCE)


def read_matrix(file: Path, order: list[int]) -> EvaluationMatrix:
    """The accuracies of a file, fractions, without the row before the first phase, which it does not hold."""
    accuracies = np.load(file, allow_pickle=False).reshape(len(TASKS), -1)
    accuracies = np.delete(accuracies, CIFAR10, axis=1)[np.ix_(order, order)] / 100
    tasks = [TASKS[task] for task in order]
    return EvaluationMatrix(tasks, tasks, accuracies, has_initial_row=False)


if __name__ == "__main__":
    sys.exit(main())
