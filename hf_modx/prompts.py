"""Names of classes as texts."""

from collections.abc import Sequence

TEMPLATES = ("a photo of a {}.",)
PLACE = "{}"


def check_templates(templates: Sequence[str]) -> None:
    """Raise a ValueError unless there are templates and each has a place `{}` for the name of a class."""
    if isinstance(templates, str) or not templates or any(PLACE not in template for template in templates):
        raise ValueError(f"A template needs a place {PLACE} for the class's name; got {templates!r}.")


def class_prompts(name: str, templates: Sequence[str]) -> list[str]:
    """The templates with the name of a class in their places."""
    return [template.replace(PLACE, name) for template in templates]
