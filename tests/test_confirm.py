"""The stream for confirming a choice: which drawings of a clip-art library it takes, and what it tests."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "study")]

import confirm  # noqa: E402
from cells import is_finished  # noqa: E402

from hf_modx.demo import DEMO_STREAMS  # noqa: E402

METADATA = """<svg><metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title><dc:subject><rdf:Bag>
<rdf:li></rdf:li><rdf:li>{keyword}</rdf:li></rdf:Bag></dc:subject><dc:publisher><dc:title>Somebody</dc:title>
</dc:publisher><cc:license rdf:resource="{license}"/></cc:Work></rdf:RDF></metadata></svg>"""


def put(library, place, title, picture, license=confirm.PUBLIC_DOMAIN):
    for kind in ("svg", "png"):
        (library / kind / place).parent.mkdir(parents=True, exist_ok=True)
    svg = METADATA.format(title=title, keyword="Sea_Animal", license=license)
    (library / "svg" / f"{place}.svg").write_text(svg)
    picture.save(library / "png" / f"{place}.png")


def drawing(number, size=(90, 60)):
    """A page with a few coloured squares, other ones for every number."""
    art = Image.new("RGBA", size)
    for row, colour in enumerate(np.random.default_rng(number).integers(0, 255, (6, 3)).tolist()):
        art.paste((*colour, 255), (5 + 10 * row, 5 + (7 * number + 11 * row) % 40, 15 + 10 * row, 55))
    return art


@pytest.fixture
def library(tmp_path, monkeypatch):
    folder = tmp_path / "library"
    for number, name in enumerate(["anchor", "boat", "crab", "dolphin", "eel", "fish", "gull", "heron"]):
        put(folder, f"animals/{name}", f"Old_{name.title()}2", drawing(number))
    monkeypatch.setattr(confirm, "LIBRARY", folder)
    return folder


def titles(tmp_path):
    return confirm.drawn(tmp_path / "drawings")["original"]["test_caption"]


def test_titles_are_captions_in_words_with_keywords_beside_them(library, tmp_path):
    data = confirm.drawn(tmp_path / "drawings")
    assert data["original"]["test_caption"][:2] == ["old anchor", "old boat"]
    assert set(data["pastel"]["captions"][0]) == {"old anchor", "old anchor, sea animal"}
    assert data["original"][0]["image"].size == data["mosaic"][0]["image"].size == (64, 64)


@pytest.mark.parametrize("place", ["shapes/star", "signs_and_symbols/flags/asia/iran"])
def test_series_are_left_out(library, tmp_path, place):
    put(library, place, "star", drawing(20))
    assert len(titles(tmp_path)) == 8


def test_only_the_public_domain_is_taken(library, tmp_path):
    put(library, "animals/whale", "whale", drawing(20), license="http://creativecommons.org/licenses/GPL/2.0/")
    assert "whale" not in titles(tmp_path)


def test_a_title_of_two_drawings_names_neither(library, tmp_path):
    put(library, "plants/crab", "old crab", drawing(20))
    assert "old crab" not in titles(tmp_path) and len(titles(tmp_path)) == 7


def test_a_drawing_with_two_titles_is_no_test_of_either(library, tmp_path):
    put(library, "plants/weed", "weed", drawing(2))
    assert not {"weed", "old crab"} & set(titles(tmp_path))


def test_a_drawing_that_shows_nothing_is_left_out(library, tmp_path):
    put(library, "plants/air", "air", Image.new("RGBA", (40, 40)))
    put(library, "plants/snow", "snow", Image.new("RGBA", (40, 40), "white"))
    assert len(titles(tmp_path)) == 8


def test_base_is_tested_on_drawings_that_it_knows_in_renderings_alone(library, tmp_path):
    drawings = confirm.drawn(tmp_path / "drawings")
    phase = confirm.clipart_phase(drawings, seed=3)
    tested = phase.test["pair_id"]
    assert len(tested) == 2 and len(phase.train) == 4 * 8 - 2
    assert [phase.train["pair_id"].count(number) for number in tested] == [3, 3]
    as_it_is = phase.train.cast_column("image", datasets.Image(decode=False))["image"]
    assert not any(
        picture in as_it_is for picture in phase.test.cast_column("image", datasets.Image(decode=False))["image"]
    )


def test_drawings_of_a_killed_process_are_drawn_again(library, tmp_path, monkeypatch):
    save = datasets.DatasetDict.save_to_disk

    def killed(data, folder):
        save(datasets.DatasetDict({"original": data["original"]}), folder)
        raise SystemExit("power cut")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="power cut"):
        patch.setattr(datasets.DatasetDict, "save_to_disk", killed)
        confirm.drawn(tmp_path / "drawings")
    assert set(confirm.drawn(tmp_path / "drawings")) == {"original", "mosaic", "pastel", "popart"}


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(confirm, "LIBRARY", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="apt-get install openclipart-png openclipart-svg"):
        confirm.drawn(tmp_path / "drawings")


@pytest.mark.parametrize("option", [["--jobs", "2"], ["--tune"]])
def test_nothing_is_chosen_on_it(library, tmp_path, option):
    with pytest.raises(SystemExit, match="do not go with this stream"):
        confirm.main([*option, "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_tiny_form_runs_a_recipe_on_it(library, tmp_path):
    command = ["--tiny", "--recipes", "er", "--seeds", "0", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    try:
        assert confirm.main(command) == 0
        with pytest.raises(ValueError, match="no validation drawings"):
            DEMO_STREAMS[confirm.STREAM](0, validation=True)
    finally:
        DEMO_STREAMS.pop(confirm.STREAM)
    assert is_finished(tmp_path / "clipart" / "er-seed0")
    assert "| er | 0 |" in (tmp_path / "tables.md").read_text()
