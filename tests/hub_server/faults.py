"""Which requests fail, and how: drawn from a seed, or the next few that match."""

import random
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

# Where each kind can happen, as an expression on "METHOD /path". A proxy's 502 carries HTML and no JSON; "drop" closes
# the connection before anything is done, "drop_after" when all is done; "cut" closes it in the middle of a file, up or
# down; "full" finds the disk full when half is written; "timeout" says nothing for `stall` seconds and then closes.
KINDS = {
    "500": "",
    "502": "",
    "503": "",
    "429": "",
    "401": "",
    "403": "",
    "409": r"^POST /api/(repos/create$|.*/commit/)",
    "412": r"^POST /api/.*/commit/",
    "timeout": "",
    "drop": "",
    "drop_after": "",
    "cut": r"^PUT .*/lfs/|^GET .*/resolve/",
    "full": r"^PUT .*/lfs/|^POST /api/(repos/create$|.*/commit/)",
}


@dataclass
class Faults:
    """Every request that `where` matches fails with probability `rate`, in one of the `kinds` that can happen there.

    A draw depends on the seed, the method, the path and how often both came before, and on nothing else: requests
    that come from several threads in any order meet the same fate.

    Args:
        seed: of the draws.
        rate: in [0, 1].
        kinds: names in `KINDS`.
        where: an expression searched for in "METHOD /path".
        stall: seconds of silence of a "timeout".
    """

    seed: int = 0
    rate: float = 0.0
    kinds: Sequence[str] = tuple(KINDS)
    where: str = ""
    stall: float = 2.0
    _seen: Counter = field(default_factory=Counter, repr=False)
    _listed: list[tuple[str, str]] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self):
        _check(self.kinds)

    def fail_next(self, count: int, kind: str, where: str = "") -> None:
        """The next `count` requests that `where` matches fail; what was listed first comes first."""
        _check([kind])
        with self._lock:
            self._listed += [(kind, where)] * count

    def choose(self, method: str, path: str) -> str | None:
        """The kind in which this request fails, or None."""
        request = f"{method} {path}"
        with self._lock:
            for number, (kind, where) in enumerate(self._listed):
                if re.search(where, request) and _can_happen(kind, request):
                    del self._listed[number]
                    return kind
            self._seen[request] += 1
            draws = random.Random(f"{self.seed} {request} {self._seen[request]}")
        possible = [kind for kind in self.kinds if _can_happen(kind, request)]
        if draws.random() < self.rate and possible and re.search(self.where, request):
            return draws.choice(possible)
        return None

    @property
    def pending(self) -> list[str]:
        """The kinds that `fail_next` listed and no request has met yet."""
        with self._lock:
            return [kind for kind, _ in self._listed]


def _can_happen(kind: str, request: str) -> bool:
    return re.search(KINDS[kind], request) is not None


def _check(kinds: Sequence[str]) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"There are no faults of the kinds {unknown}. Choose from {list(KINDS)}.")
