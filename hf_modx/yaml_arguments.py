"""Arguments from a YAML file and flags, typed by one parser."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .nearest import did_you_mean

UNSET = ("", "null", "~")


def yaml_to_flags(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The content of a YAML file as the flags it stands for.

    Every scalar stays the string that stands in the file, so that the parser gives it its type: `1e-4` becomes a float
    and `no` the word, which YAML's own rules would not do. A key without a value, or with null, is left out; a mapping
    becomes JSON.

    Raises:
        ValueError: not a mapping, a key that is no flag (the message suggests the nearest one), or a list where a flag
            takes one value.
    """
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # nosec B506 # it makes strings only
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping from flags to values, as in `num_phases: 5`.")
    known = {option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")}
    flags: list[str] = []
    for key, value in content.items():
        if key not in known:
            raise ValueError(f"{path}: there is no option {key!r}.{did_you_mean(key, known)}")
        if isinstance(value, dict):
            value = json.dumps(_typed(value))
        if isinstance(value, list):
            if parser._option_string_actions[f"--{key}"].nargs not in ("+", "*"):
                raise ValueError(f"{path}: {key} takes one value, not the list {value}.")
            flags += [f"--{key}", *(item if isinstance(item, str) else json.dumps(_typed(item)) for item in value)]
        elif value not in UNSET:
            flags += [f"--{key}={value}"]
    return flags


def _typed(value: Any) -> Any:
    """What no parser types, the inside of a mapping: at every depth a string becomes the JSON value that it reads as
    (`20`, `1e-4`, `true`), null where there is none, and stays a string otherwise (`no`)."""
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_typed(inner) for inner in value]
    if value in UNSET:
        return None
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return value


def parse_arguments(dataclasses: Sequence[type], argv: Sequence[str], defaults: Any = None) -> tuple[Any, ...]:
    """Instances of the dataclasses from `[config.yaml] [--flag value ...]`; flags override the file.

    Args:
        dataclasses: argument classes.
        argv: without the program's name.
        defaults: function of the namespace parsed with the dataclasses' own defaults, and of the set of options that
            are given; returns other defaults. Of these `max_steps` gives way to `num_train_epochs` that are given.

    Raises:
        SystemExit: a usage error, told on standard error.
    """
    parser = HfArgumentParser(dataclasses)
    arguments = list(argv)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        try:
            arguments = yaml_to_flags(Path(arguments[0]), parser) + arguments[1:]
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            parser.error(str(error))
    try:
        if defaults is not None:
            given = _given(parser, arguments)
            own = defaults(parser.parse_known_args(arguments)[0], given)
            if "num_train_epochs" in given:
                own = {name: value for name, value in own.items() if name != "max_steps"}
            parser.set_defaults(**own)
        return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    except Exception as error:  # transformers raises nearly anything on a value that it does not take
        parser.error(f"{type(error).__name__}: {error}")


def _given(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> set[str]:
    """The options that the arguments set, however they spell them: argparse takes hyphens and beginnings of names."""
    unset = object()
    found = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    parser.parse_known_args(arguments, found)
    return {name for name, value in vars(found).items() if value is not unset}
