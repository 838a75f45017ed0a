"""The ledger of a run: the samples that ranks were fed at each step, and the audit that each came once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raytx.components import Engine, Microbatch
from raytx.files import read_json
from raytx.journal import FED, LEDGER, rows
from raytx.run import PLAN

STEPS = 100
"""Steps that are kept in memory at most."""
SHOWN = 8
Rows = dict[int, list[int]]
"""The samples of each step, which counts from 1."""


class Ledger:
    """What one rank was fed since it last told: kept in memory, so that a step costs no message."""

    def __init__(self, *, speaks: bool) -> None:
        """`speaks` says whether this rank stands for those that share its samples."""
        self._speaks = speaks
        self._fed: Rows = {}

    def note(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        self._fed[step] = [index for microbatch in microbatches for index in microbatch.samples]

    @property
    def is_full(self) -> bool:
        """Whether it is time to tell; on all ranks at once."""
        return len(self._fed) >= STEPS

    def tell(self, engine: Engine, log: Callable[[dict[str, Any]], None] | None) -> None:
        """Log a row for each step, of what all ranks were fed, on the rank that has a log. Collective."""
        fed, self._fed = self._fed, {}
        gathered = [of_rank for of_rank in engine.gather(fed if self._speaks else None) if of_rank is not None]
        for step in fed if log is not None else ():
            assert log is not None
            log({"kind": FED, "step": step, "samples": [index for of_rank in gathered for index in of_rank[step]]})


def audit(run_dir: Path) -> list[str]:
    """Return what is wrong with the samples that a run was fed, in its ledger's words; nothing when all is well.

    Every epoch must have had each of its samples once, the last one, where it is unfinished, none of them twice.
    """
    if not (run_dir / LEDGER).is_file():
        return [f"{run_dir}: no {LEDGER}; it is written with train.ledger=true"]
    plan, fed = read_json(run_dir / PLAN), rows(run_dir / LEDGER)
    per_epoch, num_samples = plan["steps_per_epoch"], plan["num_samples"]
    told, problems = _by_step(fed)
    last = max([*told, *_saved(run_dir)], default=0)
    problems += _missing(told, last)
    for first in range(1, last + 1, per_epoch):
        epoch = {step: told[step] for step in range(first, min(first + per_epoch, last + 1)) if step in told}
        whole = first + per_epoch - 1 <= last
        name = f"epoch {(first - 1) // per_epoch + 1} (steps {first} to {min(first + per_epoch - 1, last)})"
        problems += [f"{name}: {problem}" for problem in _wrong(epoch, num_samples, whole=whole)]
    return problems


def _by_step(fed: Sequence[dict[str, Any]]) -> tuple[Rows, list[str]]:
    """Return the rows by step, and the steps that have several."""
    counts = Counter(row["step"] for row in fed)
    return (
        {row["step"]: row["samples"] for row in fed},
        [f"step {step}: {count} rows" for step, count in sorted(counts.items()) if count > 1],
    )


def _saved(run_dir: Path) -> Iterator[int]:
    """Yield the steps of checkpoints: up to there nothing may be missing."""
    yield from (int(path.name[5:13]) for path in (run_dir / "checkpoints").glob("step-*"))


def _missing(told: Rows, last: int) -> list[str]:
    gone = [step for step in range(1, last + 1) if step not in told]
    return [f"no row of {len(gone)} steps: {_listed(gone)}"] if gone else []


def _wrong(epoch: Rows, num_samples: int, *, whole: bool) -> Iterator[str]:
    """Yield what is wrong with the rows of one epoch."""
    counts = Counter(index for samples in epoch.values() for index in samples)
    unknown = sorted(index for index in counts if not 0 <= index < num_samples)
    repeated = sorted(index for index, count in counts.items() if count > 1 and 0 <= index < num_samples)
    lost = [index for index in range(num_samples) if index not in counts] if whole else []
    for word, found in (("lost", lost), ("repeated", repeated), ("unknown", unknown)):
        if found:
            yield f"{len(found)} of {num_samples} samples {word}: {_listed(found)}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
