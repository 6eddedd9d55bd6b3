"""The Hub: a revision of one repository for each phase of a run, and streams as data sets.

Here are the errors that these raise. `hf_modx.hub.publisher` says how a run lies on the Hub.
"""

from .faults import HubAccessError, HubError, RepositoryConflict
from .run import UnpublishedPhases
from .stream import NotAStream

__all__ = ["HubAccessError", "HubError", "NotAStream", "RepositoryConflict", "UnpublishedPhases"]
