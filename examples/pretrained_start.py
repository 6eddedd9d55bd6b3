"""Make one model of a pretrained image tower and a pretrained text tower that have never met, to start a stream from.

    python examples/pretrained_start.py --vision_model facebook/dinov2-small \
        --text_model sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/towers
    accelerate launch examples/continual_clip.py --model_name_or_path runs/towers --peft lora --recipe modx

Both towers stay as they are: a linear projection behind each and the logit scale learn the pairs of the base of a
built-in stream (`--demo_stream`) or of `--dataset_name`: locked towers, after Zhai et al., "LiT: Zero-Shot Transfer
with Locked-image text Tuning", CVPR 2022, where only the image tower is locked. All flags of `ModXTrainingArguments`
are taken; 500 steps where neither `--max_steps` nor `--num_train_epochs` says otherwise. The result is a
`VisionTextDualEncoderModel` with its processor.
"""

import sys
from dataclasses import dataclass, field

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    set_seed,
)

from hf_modx import ModXTrainer, ModXTrainingArguments
from hf_modx.data.loading import load_table
from hf_modx.demo import DEMO_STREAMS
from hf_modx.yaml_arguments import parse_arguments


@dataclass
class TowerArguments:
    vision_model: str = field(metadata={"help": "An image tower with its image processor: folder, or id on the Hub."})
    text_model: str = field(metadata={"help": "A text tower with its tokenizer."})
    projection_dim: int = field(default=256, metadata={"help": "Width of the embeddings."})
    dataset_name: str | None = field(default=None, metadata={"help": "Pairs to learn; default: a built-in base."})
    dataset_split: str = field(default="train", metadata={"help": "Of the data set."})
    demo_stream: str | None = field(
        default=None,
        metadata={
            "help": "The built-in stream whose base is learned; default: domain.",
            "choices": sorted(DEMO_STREAMS),
        },
    )

    def __post_init__(self):
        if self.dataset_name is not None and self.demo_stream is not None:
            raise ValueError("--demo_stream does not go with --dataset_name.")


DEFAULTS = {"max_steps": 500, "learning_rate": 1e-3, "freeze_vision_model": True, "freeze_text_model": True}


def assembled(towers: TowerArguments) -> tuple[VisionTextDualEncoderModel, VisionTextDualEncoderProcessor]:
    """Both towers with fresh projections, and a processor for both."""
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(
        towers.vision_model, towers.text_model, projection_dim=towers.projection_dim
    )
    images, texts = (
        AutoImageProcessor.from_pretrained(towers.vision_model),
        AutoTokenizer.from_pretrained(towers.text_model),
    )
    return model, VisionTextDualEncoderProcessor(images, texts)


def main(argv: list[str]) -> None:
    towers, args = parse_arguments([TowerArguments, ModXTrainingArguments], argv, lambda *_: DEFAULTS)
    set_seed(args.seed)  # of the projections
    model, processor = assembled(towers)
    if towers.dataset_name is None:
        pairs = DEMO_STREAMS[towers.demo_stream or "domain"](args.seed).base.train
    else:
        pairs = load_table(towers.dataset_name, towers.dataset_split)
    trainer = ModXTrainer(
        model=model, args=args, train_dataset=pairs, processing_class=processor, loss_callbacks="finetune"
    )
    trainer.train()
    trainer.save_model()
    print(f"{args.output_dir}: start a stream from it with --model_name_or_path")


if __name__ == "__main__":
    main(sys.argv[1:])
