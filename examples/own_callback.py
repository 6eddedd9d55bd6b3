"""A loss callback of your own: which images resemble each other must not change.

    python examples/own_callback.py
    python examples/own_callback.py --weight 100 --max_steps 60 --output_dir runs/relations-100

"More like this" is a search from image to image, and no term of a contrastive loss looks at it. `ImageRelations` keeps
the cosines between the images of a batch as the old model has them, beside plain fine-tuning on the built-in stream.
All flags of `ModXTrainingArguments` are taken; another weight wants another `--output_dir`.
"""

import sys
from dataclasses import dataclass, field

from torch import Tensor

from hf_modx import ContinualRun, LossCallback, LossContext, ModXTrainingArguments, PairEmbeddings
from hf_modx.demo import BASE_MAX_STEPS, DEMO_DEFAULTS, demo_stream
from hf_modx.evaluation import EvaluationMatrix
from hf_modx.yaml_arguments import parse_arguments


class ImageRelations(LossCallback):
    """`weight * mean_ij (<v_i, v_j> - <v'_i, v'_j>)^2` with v the unit-norm image embeddings of the student and v'
    those of the model after the phase before. A rotation of all of them costs nothing (after Park et al., "Relational
    Knowledge Distillation", CVPR 2019, who compare distances and angles).

    Args:
        weight: >= 0.

    Logs `image_relations` (weighted) and `cosines_moved`, the root of the mean square, in [0, 2].
    """

    needs_teacher = True

    def __init__(self, weight: float = 20.0):
        if weight < 0:
            raise ValueError(f"The weight of ImageRelations must not be negative, got {weight}.")
        self.weight = weight

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        moved = student.image @ student.image.T - teacher.image @ teacher.image.T
        mean_square = moved.square().mean()
        context.report("cosines_moved", mean_square.sqrt())
        return {"image_relations": self.weight * mean_square}


@dataclass
class RelationArguments:
    weight: float = field(default=20.0, metadata={"help": "Of the term."})
    base_max_steps: int = field(default=BASE_MAX_STEPS, metadata={"help": "Steps of the small CLIP before phase 1."})


def main(argv: list[str]) -> EvaluationMatrix:
    defaults = {"output_dir": "runs/image_relations", **DEMO_DEFAULTS}
    relations, args = parse_arguments([RelationArguments, ModXTrainingArguments], argv, lambda *_: defaults)
    recipe = ["finetune", ImageRelations(relations.weight)]
    matrix = ContinualRun(demo_stream(args.seed), recipe, args, base_max_steps=relations.base_max_steps).run()
    print(matrix.to_markdown())
    return matrix


if __name__ == "__main__":
    main(sys.argv[1:])
