"""Continual learning for `evaluate`: what a matrix of phases and tests says."""

import datasets
import evaluate

from hf_modx.evaluation import EvaluationMatrix

DESCRIPTION = """\
Average, last, backward and forward transfer, forgetting, transfer and retained zero-shot value of a continual run,
from the matrix of every test after every phase."""
INPUTS = """
Args:
    values: one row a phase, in their order, with the value of every test; None or NaN where it was not measured.
    learned_at: for each test the number of the phase that teaches it, 1 being the first; 0: known before; None: never
        taught; "all": a union of the other tests, left out. Default: test i is taught by phase i + 1.
    has_initial_row: the first row was measured before the first phase, as in a run's results.json. Default: no.
Returns:
    `average`, `last`, `backward_transfer`, `forgetting`, `transfer`, `forward_transfer`, `zero_shot_retention`; None
    where the matrix does not determine one.
"""
CITATION = """\
@inproceedings{zheng2023zscl,
  title = {Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models},
  author = {Zheng, Zangwei and Ma, Mingyuan and Wang, Kai and Qin, Ziheng and Yue, Xiangyu and You, Yang},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023}
}"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ContinualLearning(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"values": datasets.Sequence(datasets.Value("float64"))}),
            reference_urls=["https://arxiv.org/abs/2303.06628"],
        )

    def _compute(self, values, learned_at=None, has_initial_row=False):
        phases = [str(number) for number in range(1, len(values) + (not has_initial_row))]
        tests = [str(number) for number in range(1, len(values[0]) + 1)]
        return EvaluationMatrix(phases, tests, values, learned_at, has_initial_row).summary()
