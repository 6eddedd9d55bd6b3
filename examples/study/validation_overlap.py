"""How many drawings of the final tests were in the validation tests that settings were chosen by.

    python examples/study/validation_overlap.py --seeds 0,1 --tune_seeds 10

A seed decides which drawings are held out, so that another seed's validation tests hold some of them. Each stream and
seed: the share of every final test, in percent.
"""

import argparse
import hashlib

from datasets import Dataset

from hf_modx.demo_streams import DEMO_STREAMS
from hf_modx.markdown import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1", help="of the tables; default: 0,1")
    parser.add_argument("--tune_seeds", default="10", help="of the search; default: 10")
    parser.add_argument("--streams", default="domain,class", help="that the search has run; default: domain,class")
    options = parser.parse_args()
    rows = []
    for name in options.streams.split(","):
        seen = set()
        for seed in options.tune_seeds.split(","):
            for test, _ in DEMO_STREAMS[name](int(seed), validation=True).tests().values():
                seen |= drawings(test)
        for seed in options.seeds.split(","):
            for test_name, (test, _) in DEMO_STREAMS[name](int(seed)).tests().items():
                of_test = drawings(test)
                rows.append([name, seed, test_name, f"{100 * len(of_test & seen) / len(of_test):.0f}"])
    print(table(["stream", "seed", "test", "also in validation, %"], rows))


def drawings(test: Dataset) -> set[str]:
    return {hashlib.sha256(image.tobytes()).hexdigest() for image in test["image"]}


if __name__ == "__main__":
    main()
