"""A CLIP of 45,000 parameters and pictures of coloured shapes; also imported by the scripts that tests launch."""

import math

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTImageProcessorPil,
)

from hf_modx import ModXTrainingArguments

COLORS = ["red", "green", "blue", "orange", "purple", "black", "pink", "brown"]
SHAPES = ["circle", "square", "triangle", "cross", "ring", "bar"]
SIZE = 32


def picture(color: str, shape: str, style: str = "plain", shift: int = 0) -> PILImage.Image:
    image = PILImage.new("RGB", (SIZE, SIZE), "white" if style == "plain" else "lightyellow")
    draw = ImageDraw.Draw(image)
    box = (6 + shift, 6, 25 + shift, 25)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "triangle":
        draw.polygon([(16 + shift, 5), (26 + shift, 26), (6 + shift, 26)], fill=color)
    elif shape == "cross":
        draw.line((6 + shift, 6, 26 + shift, 26), fill=color, width=5)
        draw.line((26 + shift, 6, 6 + shift, 26), fill=color, width=5)
    elif shape == "ring":
        draw.ellipse(box, outline=color, width=4)
    else:
        draw.rectangle((13 + shift, 4, 18 + shift, 28), fill=color)
    return image


def tiny_pairs(rows: int = 48, style: str = "plain", shift: int = 0, start: int = 0) -> Dataset:
    """Different coloured shapes with two captions each; `pair_id` numbers them."""
    kinds = [(color, shape) for shape in SHAPES for color in COLORS]
    chosen = [(start + i) % len(kinds) for i in range(rows)]
    return Dataset.from_dict(
        {
            "image": [picture(*kinds[i], style, shift) for i in chosen],
            "caption": [[f"a {kinds[i][0]} {kinds[i][1]}", f"one {kinds[i][1]} in {kinds[i][0]}"] for i in chosen],
            "pair_id": chosen,
        },
        features=Features({"image": Image(), "caption": List(Value("string")), "pair_id": Value("int64")}),
    )


def tiny_processor() -> CLIPProcessor:
    """Every letter a token: training a BPE is not deterministic from process to process."""
    letters = sorted(set("".join(["a one in", *COLORS, *SHAPES])) - {" "})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_convert_rgb=True
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def tiny_clip(processor: CLIPProcessor, seed: int = 0) -> CLIPModel:
    tokenizer = processor.tokenizer
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(config)


def quick_arguments(folder, **changes) -> ModXTrainingArguments:
    """Six quick steps; keywords override."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "spatial_disorder": False,  # a fifth of a tiny run's time, and what few tests are about
    }
    return ModXTrainingArguments(**{**settings, **changes})


# ---- Other architectures ----

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
APART = {"initializer_range": 0.3}  # otherwise all texts are the same to a model that has learned nothing
CONTEXT = 24
WORDS = ["a", "one", "in", *COLORS, *SHAPES]


def _with_bert_tokens() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=CONTEXT)


def _with_siglip_tokens() -> PreTrainedTokenizerFast:
    """No start, an end, and no attention mask, as the tokenizers of Google's checkpoints."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids"],
    )


def _with_siglip2_tokens() -> Siglip2Tokenizer:
    """Every letter a token: transformers makes it of this class, whatever class was saved."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *sorted(set("".join(WORDS)))]
    return Siglip2Tokenizer(
        vocab={letter: number for number, letter in enumerate(letters)},
        padding_side="right",
        model_input_names=["input_ids"],
    )


def _siglip_text(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **special}


def _siglip() -> tuple[SiglipConfig, SiglipProcessor]:
    tokenizer = _with_siglip_tokens()
    vision = {**TOWER, "image_size": SIZE, "patch_size": 8}
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    config = SiglipConfig(text_config=_siglip_text(tokenizer), vision_config=vision)
    return config, SiglipProcessor(images, tokenizer)


def _siglip2() -> tuple[Siglip2Config, Siglip2Processor]:
    tokenizer = _with_siglip2_tokens()
    vision = {**TOWER, "patch_size": 8, "num_patches": 16}
    images = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=14)
    config = Siglip2Config(text_config=_siglip_text(tokenizer), vision_config=vision)
    return config, Siglip2Processor(images, tokenizer)


def _chinese_clip() -> tuple[ChineseCLIPConfig, ChineseCLIPProcessor]:
    tokenizer = _with_bert_tokens()
    text = {**TOWER, **APART, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    vision = {**TOWER, "image_size": SIZE, "patch_size": 8}
    images = ChineseCLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return config, ChineseCLIPProcessor(images, tokenizer)


def _vit_and_bert() -> tuple[VisionTextDualEncoderConfig, VisionTextDualEncoderProcessor]:
    tokenizer = _with_bert_tokens()
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**TOWER, image_size=SIZE, patch_size=8),
        BertConfig(**TOWER, **APART, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT),
        projection_dim=8,
    )
    images = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return config, VisionTextDualEncoderProcessor(images, tokenizer)


ARCHITECTURES = {
    "siglip": (SiglipModel, _siglip),
    "siglip2": (Siglip2Model, _siglip2),
    "chinese_clip": (ChineseCLIPModel, _chinese_clip),
    "vision-text-dual-encoder": (VisionTextDualEncoderModel, _vit_and_bert),
}


def tiny_dual_encoder(name: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model of a few thousand parameters with random weights, and its processor."""
    kind, parts = ARCHITECTURES[name]
    config, processor = parts()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        if hasattr(model, "logit_bias"):  # what Zhai et al. begin with; the class begins with zeros
            model.logit_scale.data.fill_(math.log(10.0))
            model.logit_bias.data.fill_(-10.0)
    return model, processor
