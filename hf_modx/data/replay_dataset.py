"""Pairs from elsewhere in the form of a stream's, so that a memory can hold both."""

from datasets import Dataset, Features, Value

from .loading import require_columns, with_images
from .pairs import as_captions, check_columns, check_pair_ids


def like_stream(pairs: Dataset, part: Dataset, columns: tuple[str, str, str]) -> Dataset:
    """The pairs with the columns and the types of a part of the stream.

    A string becomes a list of one where the stream has lists of captions, and of a list its first caption is taken
    where it has strings. Pairs without ids get negative ones where the stream has ids: they belong together with none.

    Args:
        columns: of images, captions and pair ids.

    Raises:
        ValueError: a column is missing.
        TypeError: a column of a wrong type.
    """
    image_column, caption_column, pair_id_column = columns
    require_columns(pairs, "The data set to replay", image_column=image_column, caption_column=caption_column)
    pairs = with_images(pairs.with_format(None), image_column)
    check_columns(pairs, image_column, caption_column)
    ids = {}
    if pair_id_column in part.column_names:
        ids = {pair_id_column: range(-1, -1 - len(pairs), -1)}
        if pair_id_column in pairs.column_names:
            check_pair_ids(pairs, pair_id_column)
            ids = {pair_id_column: pairs[pair_id_column]}
    captions = {caption_column: [_in_form(value, part.features[caption_column]) for value in pairs[caption_column]]}
    beside = {name: list(values) for name, values in {**captions, **ids}.items()}
    features = Features({name: part.features[name] for name in (image_column, *beside)})
    found = pairs.select_columns([image_column])
    for name, values in beside.items():
        found = found.add_column(name, values, feature=features[name])
    return found.cast(features)


def _in_form(value: str | list[str] | None, feature: object) -> str | list[str] | None:
    captions = as_captions(value)
    if isinstance(feature, Value):
        return captions[0] if captions else None
    return captions
