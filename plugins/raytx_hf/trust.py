"""Whose Python code may run when a directory is opened: none, unless the person who opens it says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytx.errors import ArtifactError

VARIABLE = "RAYTX_TRUST_REMOTE_CODE"


def trusted() -> bool:
    """Return whether this process may run code found in artifacts.

    What a recipe once allowed is recorded in them, but whoever made one could have written anything there.
    """
    return os.environ.get(VARIABLE) == "1"


@contextmanager
def refusing_code(directory: Path) -> Iterator[None]:
    """Turn transformers' refusal to run a directory's code into an ArtifactError that says what to do."""
    try:
        yield
    except ValueError as error:
        if trusted() or "trust_remote_code" not in str(error):
            raise
        raise ArtifactError(
            f"{directory}: this artifact needs code from its own directory; set {VARIABLE}=1 if you trust it"
        ) from None
