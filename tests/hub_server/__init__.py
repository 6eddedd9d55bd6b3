"""A Hugging Face Hub on loopback for the tests: real git repositories, real large files, faults on request."""

from .faults import KINDS, Faults
from .repository import HubError, Repository
from .server import ACCOUNTS, OWNER, READER, STRANGER, Account, Logged, LoopbackHub, reserve_port

__all__ = [
    "ACCOUNTS",
    "KINDS",
    "OWNER",
    "READER",
    "STRANGER",
    "Account",
    "Faults",
    "HubError",
    "Logged",
    "LoopbackHub",
    "Repository",
    "reserve_port",
]
