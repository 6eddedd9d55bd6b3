"""A processor and a small CLIP for the built-in data."""

import json
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

_END_OF_WORD = "</w>"
_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def _bpe_merges(captions: Iterable[str], alphabet: list[str], vocab_size: int) -> list[tuple[str, str]]:
    """Byte-pair merges learnt from the captions, cut into words as CLIP's tokenizer cuts them."""
    clip = CLIPTokenizer(vocab={token: i for i, token in enumerate(alphabet + list(_SPECIAL_TOKENS))}, merges=[])
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    tokenizer.normalizer = clip.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    # Ties between pairs are broken by token number. Giving the whole alphabet its numbers beforehand keeps them, and
    # so the merges, from depending on the order in which the trainer's hash map yields the words.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=alphabet, end_of_word_suffix=_END_OF_WORD, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _clip_tokenizer(captions: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """CLIP's vocabulary layout: bytes, bytes that end a word, merged tokens, then the two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = letters + [letter + _END_OF_WORD for letter in letters]
    if vocab_size < len(alphabet) + len(_SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must be at least {len(alphabet) + len(_SPECIAL_TOKENS)}, not {vocab_size}")
    merges = _bpe_merges(captions, alphabet, vocab_size - len(_SPECIAL_TOKENS))
    # Two merges can make the same token ("a" + "bc", "ab" + "c"): it has one number.
    tokens = list(dict.fromkeys(alphabet + [first + second for first, second in merges])) + list(_SPECIAL_TOKENS)
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


def demo_processor(captions: Iterable[str], vocab_size: int = 4096, image_size: int = 64) -> CLIPProcessor:
    """A CLIPProcessor with its own byte-level BPE, learnt from the captions, and CLIP's image preprocessing.

    The vocabulary has at most `vocab_size` tokens (fewer where the captions give no more merges) and depends on the
    captions alone, not on their order. Every byte is in it, so that no text is unknown. Padding is `<|endoftext|>`, as
    in CLIP. Images come out as (batch, 3, image_size, image_size).
    Raises ValueError where `vocab_size` is too small for the bytes and special tokens (514).
    """
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        do_convert_rgb=True,
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=_clip_tokenizer(captions, vocab_size))


def small_clip(processor: CLIPProcessor, seed: int = 0) -> CLIPModel:
    """A CLIPModel of about 1.6 million parameters for the processor's images and tokens, with random weights.

    Both towers give features of shape (batch, 128). The weights depend on the seed alone; the global random state is
    left as it was. The model is made on the CPU.
    """
    tokenizer = processor.tokenizer
    crop = processor.image_processor.crop_size
    width = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    text = width | {
        "num_hidden_layers": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # CLIP takes the text feature at the FIRST token with this number
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = width | {"num_hidden_layers": 3, "image_size": crop["height"], "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    # Only the CPU's generator is forked and seeded: nothing here needs, or should wake, an accelerator.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return CLIPModel(config).eval()
