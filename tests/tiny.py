"""A CLIP of 45,000 parameters and pictures of coloured shapes; also imported by the scripts that tests launch."""

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

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
