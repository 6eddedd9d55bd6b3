"""Imports go one way: what is below knows nothing of what is above."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_modx"
ABOVE = {
    "losses": {"callbacks", "recipes", "trainer", "continual", "phases", "evaluation", "data", "cli"},
    "evaluation": {"callbacks", "recipes", "trainer", "continual", "cli"},
    "callbacks": {"recipes", "trainer", "continual", "evaluation", "cli"},
    "recipes": {"trainer", "continual", "phases", "cli"},
    "data": {"callbacks", "teacher", "training", "trainer", "phases", "run", "continual", "cli"},
    "teacher": {"callbacks", "training", "recipes", "trainer", "phases", "run", "continual", "cli"},
    "training": {"recipes", "trainer", "phases", "run", "hub", "continual", "cli"},
    "trainer": {"continual", "phases", "run", "cli"},
    "run": {"continual", "demo", "hub", "cli"},
    "continual": {"cli", "report"},
}


def imported(file: Path) -> set[str]:
    """The parts of the package that a file imports from, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].relative_to(PACKAGE)
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(folder / name.split(".")[0]).parts[0] for name in names}
    return found


@pytest.mark.parametrize("part", ABOVE)
def test_part_imports_nothing_from_above(part):
    files = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    assert {file.name: imported(file) & ABOVE[part] for file in files if imported(file) & ABOVE[part]} == {}
