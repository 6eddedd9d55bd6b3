"""Recipes on a stream on which nothing was searched: clip art, then emoji.

    apt-get install openclipart-png openclipart-svg
    python examples/study/confirm.py --seeds 0,1,2

The base has learned some 1,300 drawings of the Open Clip Art Library (Debian's package; those whose authors have put
them into the public domain and given them a title of their own), with captions as people type them, some in French or
Italian. The phases are those of the instance-incremental stream: random parts of all emoji. One choice was settled
here, by a rule written down before: that `modx_plus` holds replayed pairs harder than new ones, as `plus-mem` was
ahead of `plus-a2`.

Options are those of `run.py`; runs are begun in this process, one at a time (`--jobs` does not go with it). For two at
a time start it twice, with other seeds.
"""

import html
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets import Dataset, DatasetDict, Features, List, Value
from filelock import FileLock
from PIL import Image

STUDY = Path(__file__).resolve().parent
sys.path.insert(0, str(STUDY))

import run  # noqa: E402

from hf_modx.demo import DEMO_STREAMS, instance_stream  # noqa: E402
from hf_modx.demo.base import hold_out  # noqa: E402
from hf_modx.demo.data import fold_concepts  # noqa: E402
from hf_modx.demo.drawings import RENDERERS, drawn_on_white, encoded, is_blank  # noqa: E402
from hf_modx.phases import Phase, PhaseStream  # noqa: E402

LIBRARY = Path("/usr/share/openclipart")
STREAM = "clipart"
DEFAULTS = {
    "--streams": STREAM,
    "--recipes": "finetune,modx,er,plus-a2,plus-mem,incclip,modx_plus",
    "--output_dir": "runs/study-confirm",
}
LEFT_OUT = ("buttons", "computer/icons", "decorations", "logos", "recreation/games/cards", "shapes", "special")
LEFT_OUT += ("signs_and_symbols/flags",)
"""Folders of series whose members no caption tells apart."""

PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
CAPTIONS, MAX_KEYWORDS = 5, 2
FIRST_PAIR_ID = 100_000
"""Above those of the emoji."""

FEATURES = Features(
    {
        "image": datasets.Image(),
        "captions": List(Value("string")),
        "test_caption": Value("string"),
        "pair_id": Value("int64"),
        "group": Value("string"),
    }
)


class Drawing(NamedTuple):
    """One that can be shown: its place below the library's folders, its title and further words for it."""

    place: str
    title: str
    keywords: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    argv = run.with_defaults(argv, DEFAULTS)
    options, _ = run.parse(argv)
    if options.jobs > 1 or options.tune:
        raise SystemExit("--jobs and --tune do not go with this stream: it is for confirming, one run at a time.")
    drawings = drawn(options.output_dir / "drawings")

    def clipart_stream(seed: int = 0, *, validation: bool = False) -> PhaseStream:
        if validation:
            raise ValueError("Nothing is chosen on this stream: it has no validation drawings.")
        return PhaseStream(instance_stream(seed).phases, base=clipart_phase(drawings, seed))

    DEMO_STREAMS[STREAM] = clipart_stream
    return run.main(argv)


def clipart_phase(drawings: DatasetDict, seed: int) -> Phase:
    """All drawings as they are and in three renderings; a quarter of them is tested as it is, and trained on in its
    renderings alone."""
    tested = fold_concepts(drawings["original"], 4, seed)[0]
    train, test = hold_out(drawings["original"], tested)
    others = [hold_out(drawings[rendering], [])[0] for rendering in RENDERERS]
    return Phase("clipart", datasets.concatenate_datasets([train, *others]), test)


# ---- The drawings ----


def drawn(folder: Path) -> DatasetDict:
    """The drawings as they are and in each rendering, with the same rows; drawn once, then read from the folder. Of
    several processes one draws, and the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            # Renamed when it is whole: a killed process leaves no half of it under that name.
            scratch = folder.with_name(f"{folder.name}.part")
            draw_library().save_to_disk(scratch)
            scratch.rename(folder)
    return datasets.load_from_disk(str(folder))


def draw_library() -> DatasetDict:
    if not LIBRARY.is_dir():
        raise SystemExit("The drawings are missing: apt-get install openclipart-png openclipart-svg")
    shown = with_own_picture([(one, picture_of(one)) for one in with_own_title(titled(LIBRARY))])
    styles = {"original": lambda picture: picture, **RENDERERS}
    return DatasetDict(
        {name: table(name, [(one, paint(picture)) for one, picture in shown]) for name, paint in styles.items()}
    )


def titled(library: Path) -> Iterator[Drawing]:
    """What is in the public domain and no member of a series, with what its drawing says of itself."""
    for file in sorted((library / "svg").rglob("*.svg")):
        place = file.relative_to(library / "svg").with_suffix("").as_posix()
        if place.startswith(LEFT_OUT):
            continue
        about = re.search(r"<metadata.*?</metadata>", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if about is None or set(re.findall(r'license[^>]*resource="([^"]*)"', about[0])) != {PUBLIC_DOMAIN}:
            continue
        title = re.search(r"<dc:title>(.*?)</dc:title>", about[0], re.DOTALL)
        keywords = map(in_words, re.findall(r"<rdf:li>(.*?)</rdf:li>", about[0], re.DOTALL))
        yield Drawing(place, in_words(title[1] if title else ""), tuple(dict.fromkeys(filter(None, keywords))))


def in_words(text: str) -> str:
    """Lower-case letters, hyphens and apostrophes: "Rubber_Duck1" becomes "rubber duck"."""
    plain = unicodedata.normalize("NFKD", html.unescape(text)).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z' -]", " ", plain).split())


def with_own_title(found: Iterable[Drawing]) -> list[Drawing]:
    drawings = list(found)
    shared = Counter(one.title for one in drawings)
    return [one for one in drawings if len(one.title) > 2 and shared[one.title] == 1]


def with_own_picture(drawings: Sequence[tuple[Drawing, Image.Image | None]]) -> list[tuple[Drawing, Image.Image]]:
    """Some are there twice, under two titles: one picture with two captions is no test of retrieval."""
    shared = Counter(picture.tobytes() for _, picture in drawings if picture is not None)
    return [(one, picture) for one, picture in drawings if picture is not None and shared[picture.tobytes()] == 1]


def picture_of(drawing: Drawing) -> Image.Image | None:
    """None where nothing is to be seen on white, or the drawing is too large to open."""
    try:
        art = Image.open(LIBRARY / "png" / f"{drawing.place}.png").convert("RGBA")
    except Image.DecompressionBombError:
        return None
    picture = drawn_on_white(art)
    return None if picture is None or is_blank(picture) else picture


def table(style: str, drawings: Sequence[tuple[Drawing, Image.Image]]) -> Dataset:
    columns = {
        "image": [{"bytes": encoded(picture), "path": None} for _, picture in drawings],
        "captions": [captions(one, style) for one, _ in drawings],
        "test_caption": [one.title for one, _ in drawings],
        "pair_id": [FIRST_PAIR_ID + row for row in range(len(drawings))],
        "group": [one.place.split("/")[0] for one, _ in drawings],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def captions(drawing: Drawing, style: str) -> list[str]:
    """The title alone and with keywords, drawn from style and place alone."""
    draw = random.Random(f"{style}/{drawing.place}")
    counts = [0, *(draw.randint(0, min(MAX_KEYWORDS, len(drawing.keywords))) for _ in range(CAPTIONS - 1))]
    return [", ".join([drawing.title, *draw.sample(drawing.keywords, count)]) for count in counts]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
