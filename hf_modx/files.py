"""Writing files so that a reader sees the old or the new content, never a part."""

import json
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import yaml

SEAL = "complete.json"
"""In a folder that is complete: its files and their sizes."""


def write_text(path: Path, content: str) -> None:
    """Write to a temporary name, flush to the disk, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def as_json(content: Any) -> str:
    """The content as it stands in the files of a run."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    """`write_text` of the content as JSON."""
    write_text(path, as_json(content))


def read_yaml(path: Path) -> Any:
    """The content.

    Raises:
        ValueError: it is no YAML; the message names the file and the line.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def read_json(path: Path) -> Any | None:
    """The content, or None where there is no such file.

    Raises:
        ValueError: it is no JSON; the message names the file and the line.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def publish_file(temporary: Path, final: Path) -> None:
    """Flush a complete file and give it its final name."""
    _flush(temporary)
    os.replace(temporary, final)


def publish_folder(temporary: Path, final: Path) -> None:
    """Flush every file of a complete folder and give it its final name in one step."""
    for file in _files(temporary):
        _flush(file)
    os.replace(temporary, final)


def seal(folder: Path) -> None:
    """Flush every file of a folder that others have written, and then write down in `SEAL` how long each is."""
    (folder / SEAL).unlink(missing_ok=True)
    files = _files(folder)
    for file in files:
        _flush(file)
    write_json(folder / SEAL, {file.relative_to(folder).as_posix(): file.stat().st_size for file in files})


def has_whole_seal(folder: Path, may_lack: Container[str] = ()) -> bool:
    """Whether the folder was sealed and every file, but for those that it may lack, is there in its whole length."""
    try:
        sizes = read_json(folder / SEAL)
    except ValueError:
        return False
    return sizes is not None and all(
        name in may_lack or ((folder / name).is_file() and (folder / name).stat().st_size == size)
        for name, size in sizes.items()
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
