"""Each command that the pages tell their reader has arguments that exist, and each link leads somewhere."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from hf_modx import ModXTrainingArguments
from hf_modx.cli import make_parser
from hf_modx.yaml_arguments import parse_arguments

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "study")]

import own_callback  # noqa: E402
import pretrained_start  # noqa: E402
import run as study  # noqa: E402

import continual_clip  # noqa: E402
from tiny import tiny_pairs  # noqa: E402

PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md", "examples/KEEPING.md", "examples/STUDY.md"]
LINKED = ["README.md", "CONTRIBUTING.md", *(f"{folder}/**/*.md" for folder in ("examples", "model_cards", "tests"))]
OF_OTHERS = {"git", "pip", "hf", "pytest", "ruff", "pre-commit", "pdoc", "python3"}
"""Programs that are not ours."""
STUDIES = {f"examples/study/{name}.py" for name in ("run", "budget", "batch_size", "confirm")}
"""Scripts with the options of `run.py`."""


def commands(page: str) -> list[str]:
    """The lines of the page's shell blocks, and of its inline code what runs a script of ours."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return lines + [code for code in inline if re.match(r"(python|accelerate launch .*) ?examples/", code)]


def words_of(command: str) -> list[str]:
    """The words of a command without settings of the environment and the folder of the programs."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return [words[0].removeprefix(".venv/bin/"), *(word for word in words[1:] if word != "...")]


def check_script(script: str, flags: list[str]) -> None:
    if script == "examples/continual_clip.py":
        kinds = (continual_clip.ScriptArguments, ModXTrainingArguments)
        parse_arguments(kinds, [*flags, "--use_cpu", "true"], continual_clip.defaults)
    elif script == "examples/own_callback.py":
        parse_arguments((own_callback.RelationArguments, ModXTrainingArguments), [*flags, "--use_cpu", "true"])
    elif script == "examples/pretrained_start.py":
        kinds = (pretrained_start.TowerArguments, ModXTrainingArguments)
        parse_arguments(kinds, [*flags, "--use_cpu", "true"])
    elif script in STUDIES:
        _, further = study.parse(flags)
        check_script("examples/continual_clip.py", further)
    else:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [flag for flag in flags if flag.startswith("--") and f'"{flag}"' not in source] == []


def check(command: str) -> None:
    program, *arguments = words_of(command)
    if program == "accelerate":
        assert arguments[0] == "launch"
        launched = launch_command_parser().parse_args(arguments[1:])
        assert launched.config_file is None or (ROOT / launched.config_file).exists()
        check_script(launched.training_script, launched.training_script_args)
    elif program == "hf-modx":
        make_parser().parse_args(arguments)
    elif program == "python" and arguments[0] != "-m":
        check_script(arguments[0], arguments[1:])
    else:
        assert program in OF_OTHERS | {"python"}, command


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """The repository and beside it what a reader is told to have, as far as it is looked at before a run begins."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "config.yaml").write_text("recipe: modx")
    tiny_pairs(4).to_parquet(tmp_path / "reference.parquet")
    tiny_pairs(4).save_to_disk(tmp_path / "my_data" / "reference_pairs")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("readers_folder")
def test_every_command_that_is_written_down_has_arguments_that_exist(page):
    written = commands(page)
    assert len(written) > 5
    for command in written:
        try:
            check(command)
        except (SystemExit, ValueError, OSError) as error:
            pytest.fail(f"{page}: {command}: {error!r}")


def test_wrong_argument_is_found():
    with pytest.raises(SystemExit):
        check("accelerate launch examples/continual_clip.py --learning_rates 1e-4")


def anchors(page: Path) -> set[str]:
    """The headings of a page as its links name them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links to files of the repository that are not there, and to headings that their page does not have."""
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_links_lead_to_files_and_headings_that_exist():
    pages = [page for pattern in LINKED for page in ROOT.glob(pattern)]
    assert len(pages) > 10
    assert {str(page): found for page in pages if (found := broken_links(page))} == {}


def test_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, two\n\n[a](#one-two) [b](#three) [c](page.md#one-two) [d](other.md) [e](https://a.b)\n")
    assert broken_links(page) == ["#three", "other.md"]
