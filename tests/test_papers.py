"""What is to be cited."""

import re
from pathlib import Path

import yaml

from hf_modx.papers import PAPERS


def test_citation_file_names_every_paper_of_the_cards():
    file = yaml.safe_load((Path(__file__).parent.parent / "CITATION.cff").read_text())
    named = {reference["title"] for reference in file["references"]}
    assert {re.search(r"title = {(.*)},", paper)[1] for paper in PAPERS.values()} == named
