"""Pairs that a run is asked to forget: they leave the replay memory and are kept out of what is trained from then on.

What a phase has learned stays in its weights: the models of phases that were trained on a pair may still know it.
Tests are not touched, nor what lies outside the run's folder, as an image cache or the data themselves. No pairs are
published with a run, so its repository on the Hub has only to know that it was asked.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from .data.overlap import image_digest, image_digests
from .files import publish_folder, read_json, write_json
from .hub.faults import HubError, RepositoryConflict
from .hub.publisher import HubPublisher
from .phases import PhaseStream
from .run.folder import DELETED, MEMORY, PUBLISHED, RECORD, finished_rows, refuse_unfinished_rollback
from .run.lock import alone_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """Pairs to forget.

    Attributes:
        pair_ids: rows of these ids.
        images: rows with these images, by `image_digest` in hexadecimal digits. The memory of a run with an image
            cache holds them resized, where only ids find them.
        after_phase: phases that were trained before; they may know the pairs.
        from_memory: rows that left the replay memory.
        is_done: they have left it.
    """

    pair_ids: tuple[int, ...] = ()
    images: tuple[str, ...] = ()
    after_phase: int = 0
    from_memory: int = 0
    is_done: bool = False


class Deletions:
    """All requests of a run.

    Args:
        run: its folder.
        columns: of images and of pair ids.
    """

    def __init__(self, run: Path, columns: tuple[str, str]):
        self.run = run
        self.image_column, self.pair_id_column = columns
        stored = read_json(run / DELETED) or []
        self.requests = [
            Request(**{**request, "pair_ids": tuple(request["pair_ids"]), "images": tuple(request["images"])})
            for request in stored
        ]

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, pair_ids: Iterable[int], images: Iterable[bytes]) -> Request:
        """Write a request down and carry it out; killed in between, the run does the rest when it goes on."""
        asked = tuple(sorted(set(pair_ids))), tuple(sorted({digest.hex() for digest in images}))
        request = Request(*asked, after_phase=self._trained())
        newest = max(self._tables(), default=None)
        table = load_from_disk(str(newest[1])) if newest is not None else None
        if request.pair_ids and table is not None and self.pair_id_column not in table.column_names:
            raise ValueError(
                f"The pairs of this run have no column {self.pair_id_column!r}: no id names one. Ask for their images."
            )
        rows = self._matching(table, [request]) if table is not None else []
        self.requests.append(replace(request, from_memory=len(rows)))
        self._write()
        self.carry_out()
        return self.requests[-1]

    def carry_out(self) -> None:
        """Take the pairs out of every table of the memory, and remove what a phase has begun with them: it starts
        again. After a rollback, what was undone counts as not trained. Does nothing where nothing is left to do."""
        trained = self._trained()
        if all(request.is_done and request.after_phase <= trained for request in self.requests):
            return
        for leftover in (self.run / MEMORY).glob(".*"):  # what was begun and killed may hold the pairs
            shutil.rmtree(leftover)
        for _, place in self._tables():
            self._clean(place)
        begun = () if all(request.is_done for request in self.requests) else (self.run / "checkpoints").glob("phase-*")
        for folder in begun:
            if _number(folder) > trained:
                shutil.rmtree(folder)
        self.requests = [
            replace(request, is_done=True, after_phase=min(request.after_phase, trained)) for request in self.requests
        ]
        self._write()

    def kept(self, stream: PhaseStream) -> PhaseStream:
        """The stream without the pairs in its training parts.

        Raises:
            ValueError: nothing is left of a part.
        """
        if not self.requests:
            return stream
        has_ids = any(self.pair_id_column in phase.train.column_names for phase in stream.all_phases())
        if not has_ids and any(request.pair_ids for request in self.requests):
            logger.warning("Pairs were to be forgotten by ids, and no data have a column %r.", self.pair_id_column)

        def clean(name: str, part: Dataset) -> Dataset:
            if name.endswith("(test)"):
                return part
            rows = set(self._matching(part, self.requests))
            if not rows:
                return part
            logger.info("%d rows of %s are kept out on request.", len(rows), name)
            return part.select([row for row in range(len(part)) if row not in rows])

        return stream.map_parts(clean)

    def results(self, number: int) -> dict[str, Any]:
        """For the results of a phase: what was asked before it was trained. Counts, no ids."""
        before = [request for request in self.requests if request.after_phase < number]
        if not before:
            return {}
        counts = {
            "pair_ids": sum(len(request.pair_ids) for request in before),
            "images": sum(len(request.images) for request in before),
            "rows_from_memory": sum(request.from_memory for request in before),
            "trained_before": max(request.after_phase for request in before),
        }
        return {"deleted_pairs": counts}

    def _tables(self) -> list[tuple[int, Path]]:
        """Number of a phase and the memory after it, in their order."""
        places = (self.run / MEMORY).glob("phase-*")
        return sorted((_number(place), place) for place in places)

    def _trained(self) -> int:
        """Phases that are trained, evaluated or not."""
        return max([0, finished_rows(self.run) - 1, *map(_number, self.run.glob("phase-*"))])

    def _matching(self, table: Dataset, requests: Sequence[Request]) -> list[int]:
        ids = {number for request in requests for number in request.pair_ids}
        images = {digest for request in requests for digest in request.images}
        found: set[int] = set()
        if ids and self.pair_id_column in table.column_names:
            found |= {row for row, number in enumerate(table.with_format(None)[self.pair_id_column]) if number in ids}
        if images:
            digests = image_digests(table, self.image_column)
            found |= {row for row, digest in enumerate(digests) if digest is not None and digest.hex() in images}
        return sorted(found)

    def _clean(self, place: Path) -> None:
        table = load_from_disk(str(place))
        rows = set(self._matching(table, self.requests))
        if not rows:
            return
        cleaned, old = (place.with_name(f".{place.name}.{name}") for name in ("cleaned", "old"))
        staying = [row for row in range(len(table)) if row not in rows]
        if staying:
            table.select(staying).save_to_disk(str(cleaned))
            shutil.copy(place / "memory.json", cleaned / "memory.json")
        os.replace(place, old)  # without a table, the run makes it again, without the pairs
        if staying:
            publish_folder(cleaned, place)
        shutil.rmtree(old)

    def _write(self) -> None:
        write_json(self.run / DELETED, [asdict(request) for request in self.requests])


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def forget(run: Path, pair_ids: Sequence[int] = (), images: Sequence[Path] = ()) -> Request:
    """Ask a run to forget pairs.

    Args:
        run: its folder.
        pair_ids: of the pairs.
        images: files with their images, byte for byte as the data store them.

    Raises:
        ValueError: the folder holds no run, one whose rollback is not finished, or one whose pairs have no ids and
            are asked for by id; or nothing is asked.
        BlockingIOError: another process is training in the folder, or changing it.
        OSError: an image file cannot be read.
    """
    if not (run / RECORD).exists():
        raise ValueError(f"{run} holds no run: there is no {RECORD}.")
    if not pair_ids and not images:
        raise ValueError("Say which pairs to forget: ids, images or both.")
    with alone_in(run):
        return _forget(run, pair_ids, [image_digest(path.read_bytes()) for path in images])


def _forget(run: Path, pair_ids: Sequence[int], images: Sequence[bytes]) -> Request:
    refuse_unfinished_rollback(run)
    record = read_json(run / RECORD)
    settings = record["identity"]["hyperparameters"]
    deletions = Deletions(run, (settings["image_column"], settings["pair_id_column"]))
    request = deletions.add(pair_ids, images)
    record["identity"]["deletions"] = len(deletions)
    write_json(run / RECORD, record)
    return request


def tell_hub(run: Path) -> str | None:
    """Let the repository of a run know how often the run was asked: from then on no folder goes on with it that was
    not. What is published of a phase begun is removed. The run's next start does the same.

    Returns:
        The name of the repository; None where the run was never published.

    Raises:
        RepositoryConflict: another folder has gone on with the run on the Hub, or is publishing.
        HubError: the Hub refuses it, or does not answer.
    """
    published = read_json(run / PUBLISHED)
    if published is None:
        return None
    publisher = HubPublisher(published["repo_id"], run)
    publisher.lock()
    try:
        publisher.check_access()
        if not publisher.has_repository():  # claiming would make it again
            raise HubError("There is no such repository, or not for this token.")
        publisher.claim(read_json(run / RECORD), is_new=False)
    except RepositoryConflict as error:
        raise RepositoryConflict(f"{error} Ask that folder to forget the pairs, too.") from None
    except HubError as error:
        raise HubError(
            f"{publisher.repo_id} does not know of it yet; the run tells it as soon as it goes on with push_to_hub. "
            f"{error}"
        ) from None
    finally:
        publisher.unlock()
    return publisher.repo_id
