"""What a user can fix, said once: where, what, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RaytxError(Exception):
    """A mistake or a shortage that the user can mend; the command line prints it and exits with 2."""


class RecipeError(RaytxError):
    """The recipe says something unknown, of the wrong type or impossible."""


class PluginError(RaytxError):
    """A plugin is missing, broken, ambiguous or of another version than asked for."""


class DataError(RaytxError):
    """The data is absent, empty or not of the promised shape."""


class ResourceError(RaytxError):
    """The cluster or machine has less than the plan needs."""


class TrainingError(RaytxError):
    """Training cannot go on and every rank knows it at the same step: the loss is not finite, nothing can be saved."""


class StoppedError(RaytxError):
    """The run was told to end, and has; the same command goes on with it."""

    def __init__(self, message: str, *, exit_code: int = 143) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """128 and the signal's number, as shells have it."""


class CheckpointError(RaytxError):
    """A checkpoint is incomplete, damaged or belongs to another plan."""


class ArtifactError(RaytxError):
    """An artifact is incomplete, damaged or disagrees with its golden outputs."""


class RunError(RaytxError):
    """A run that is asked for is not there, or has not left what is asked of it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known word, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
