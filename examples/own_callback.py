"""A loss callback of your own: new data must not move the texts.

    python examples/own_callback.py
    python examples/own_callback.py --weight 20 --max_steps 60

Who keeps an index of texts, of tags or of the questions that were asked, has to build it anew after every phase, unless
the texts stay where they are and the images come to them. `TextAnchor` sees to that, beside plain fine-tuning on the
built-in stream. All flags of `ModXTrainingArguments` are taken; another weight wants another `--output_dir`.
"""

import sys
from dataclasses import dataclass, field

from torch import Tensor

from hf_modx import ContinualRun, LossCallback, LossContext, ModXTrainingArguments, PairEmbeddings
from hf_modx.demo import BASE_MAX_STEPS, DEMO_DEFAULTS, demo_stream
from hf_modx.evaluation import EvaluationMatrix
from hf_modx.yaml_arguments import parse_arguments


class TextAnchor(LossCallback):
    """`weight * mean_i (1 - <l_i, l'_i>)` with l the unit-norm text embeddings of the student and l' those of the model
    after the phase before.

    Args:
        weight: >= 0.

    Logs `text_anchor` (weighted) and `text_angle`, the mean angle in degrees between a text's two embeddings.
    """

    needs_teacher = True

    def __init__(self, weight: float = 1.0):
        if weight < 0:
            raise ValueError(f"The weight of TextAnchor must not be negative, got {weight}.")
        self.weight = weight

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        cosines = (student.text * teacher.text).sum(dim=-1)
        context.report("text_angle", cosines.detach().clamp(-1, 1).arccos().rad2deg().mean())
        return {"text_anchor": self.weight * (1 - cosines).mean()}


@dataclass
class AnchorArguments:
    weight: float = field(default=5.0, metadata={"help": "Of the anchor."})
    base_max_steps: int = field(default=BASE_MAX_STEPS, metadata={"help": "Steps of the small CLIP before phase 1."})


def main(argv: list[str]) -> EvaluationMatrix:
    defaults = {"output_dir": "runs/text_anchor", **DEMO_DEFAULTS}
    anchor, args = parse_arguments([AnchorArguments, ModXTrainingArguments], argv, lambda *_: defaults)
    recipe = ["finetune", TextAnchor(anchor.weight)]
    matrix = ContinualRun(demo_stream(args.seed), recipe, args, base_max_steps=anchor.base_max_steps).run()
    print(matrix.to_markdown())
    return matrix


if __name__ == "__main__":
    main(sys.argv[1:])
