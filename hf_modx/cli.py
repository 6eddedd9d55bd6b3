"""Arguments from a YAML file and flags, typed by one parser."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

UNSET = ("", "null", "~")


def yaml_to_flags(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The content of a YAML file as the flags it stands for.

    Every scalar stays the string that stands in the file, so that the parser gives it its type: `1e-4` becomes a float
    and `no` the word, which YAML's own rules would not do. A key without a value, or with null, is left out; a mapping
    becomes JSON.

    Raises:
        ValueError: not a mapping, or a key that is no flag; the message suggests the nearest one.
    """
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping from flags to values, as in `num_phases: 5`.")
    known = {option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")}
    flags: list[str] = []
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{path}: there is no option {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        if isinstance(value, dict):
            value = _json(value)
        if isinstance(value, list):
            flags += [f"--{key}", *value]
        elif value not in UNSET:
            flags += [f"--{key}={value}"]
    return flags


def _json(mapping: dict[str, str]) -> str:
    """A YAML mapping of strings as JSON; each value is JSON where it reads as such."""
    parts = []
    for key, value in mapping.items():
        typed = yaml.safe_load(value) if isinstance(value, str) else value
        if isinstance(typed, str):
            try:
                typed = float(typed)  # 1e-4 is a string to YAML
            except ValueError:
                pass
        parts.append((key, typed))
    import json

    return json.dumps(dict(parts))


def parse_arguments(
    dataclasses: Sequence[type], argv: Sequence[str], defaults: Any = None
) -> tuple[Any, ...]:
    """Instances of the dataclasses from `[config.yaml] [--flag value ...]`; flags override the file.

    Args:
        dataclasses: argument classes.
        argv: without the program's name.
        defaults: function of the namespace parsed with the dataclasses' own defaults; returns other defaults.

    Raises:
        SystemExit: a usage error, told on standard error.
    """
    parser = HfArgumentParser(dataclasses)
    arguments = list(argv)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        try:
            arguments = yaml_to_flags(Path(arguments[0]), parser) + arguments[1:]
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(str(error))
    if defaults is not None:
        parser.set_defaults(**defaults(parser.parse_known_args(arguments)[0]))
    try:
        return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
