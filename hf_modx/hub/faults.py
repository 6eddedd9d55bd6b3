"""What goes wrong between here and the Hub: how often to try, how long to wait, and what to say of it.

Measured with huggingface_hub 2.4: uploads of large files and the questions before them are tried again by the client
itself. Commits, branches, tags, references, and who one is are not: a server error or a broken connection is raised at
once, and silence is waited for without end.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import _http
from transformers.utils.hub import PushInProgress

logger = logging.getLogger(__name__)

FAULTS = (HTTPError, OSError, RuntimeError, ValueError)
"""What a fault arrives as: HTTPError has both the Hub's refusals and broken connections below it, a failed upload of a
large file is a RuntimeError, a proxy's HTML in the place of JSON a ValueError."""

ATTEMPTS = 5
FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
"""Seconds; each wait is twice the one before, up to the longest, and between half and the whole of that by chance."""

SILENCE = (10.0, 120.0, 120.0, None)
"""Seconds to connect, without a byte read, without a byte written; None: no limit on waiting for a free connection."""


class HubError(RuntimeError):
    """What the Hub was asked for did not succeed. `status` is that of its answers, None where they had none or not all
    the same."""

    status: int | None = None


class HubAccessError(HubError):
    """There is no token, or it does not permit what is wanted."""


class RepositoryConflict(ValueError):
    """The repository belongs to somebody or something else. Trying again would not help."""


def insist(
    step: Callable[[], Any],
    *,
    attempts: int | None = None,
    secret: str | None = None,
    final: tuple[type[Exception], ...] = (),
) -> Any:
    """Try until it succeeds, with growing waits. The step must be safe to repeat: it looks at what is there first.

    Args:
        step: what to do.
        attempts: how often. Default: `ATTEMPTS`.
        secret: never shown, whatever the error says.
        final: errors that are no faults but answers; they are passed on at once.

    Raises:
        HubError: the last attempt failed too. One from within, a RepositoryConflict and a name that no repository can
            have are passed on at once.
    """
    attempts = attempts or ATTEMPTS
    statuses = set()
    for attempt in range(1, attempts + 1):
        try:
            return step()
        except (HubError, RepositoryConflict, HFValidationError, *final):
            raise
        except FAULTS as error:
            text = describe(error, secret)
            statuses.add(_status(error))
        if attempt < attempts:
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            logger.info("%s (attempt %d of %d, the next in %.1f s)", text, attempt, attempts, wait)
            time.sleep(wait)
    # Outside of the handler: the error that is hidden here could hold the token in its text.
    failure = HubError(text)
    failure.status = statuses.pop() if len(statuses) == 1 else None
    raise failure


def describe(error: BaseException, secret: str | None = None) -> str:
    """The error, and what it hides, on one line: without token, and without the queries of addresses, which sign
    uploads."""
    # Errors of HTTP repeat their cause.
    chain = [error] if isinstance(error, HTTPError) or error.__cause__ is None else [error, error.__cause__]
    text = ", caused by ".join(f"{type(link).__name__}: {' '.join(str(link).split())}" for link in chain)
    if secret:
        text = text.replace(secret, "[token]")
    for found, shown in (
        (r"Bearer [^\s'\"]+", "Bearer [token]"),
        (r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1"),
        (r"For more information check: \S+ ?", ""),
    ):
        text = re.sub(found, shown, text)
    return text if len(text) <= 500 else f"{text[:500]}..."


def warn_of_failed_pushes(push: PushInProgress | None, secret: str | None = None) -> None:
    """Log what went wrong in the uploads that a Trainer has made in the background."""
    for job in push.jobs if push is not None else []:
        if job.done() and job.exception() is not None:
            logger.warning("A checkpoint was not pushed. %s", describe(job.exception(), secret))


def limit_silence(limits: tuple[float | None, ...] = SILENCE) -> None:
    """From now on requests of huggingface_hub in this process give up after so many seconds of silence.

    A client that has a limit on reading already keeps its own. Whoever has set a client factory keeps that, too: it
    still makes the client, which only gets the limit.
    """
    make = _http._GLOBAL_CLIENT_FACTORY
    if getattr(make, "limits_silence", False):
        return

    def make_limited():
        client = make()
        if client.timeout.read is None:
            client.timeout = limits
        return client

    make_limited.limits_silence = True
    set_client_factory(make_limited)


def _status(error: BaseException) -> int | None:
    for link in (error, error.__cause__):
        if getattr(link, "response", None) is not None:
            return link.response.status_code
    return None
