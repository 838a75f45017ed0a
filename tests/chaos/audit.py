"""What a run lost that was killed: compared with one that was not, bit by bit; and what it left behind.

Every function returns one line for each thing that is wrong, and nothing when all is well.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from job import Job, alive
from safetensors import safe_open

from raytx import checkpoint, ledger, storage
from raytx.files import read_json
from raytx.journal import LEDGER, METRICS, rows
from raytx.mirror import Mirror

LINGER_S = 15.0
"""Processes may take so long to end after the command did."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
AGENTS_LINGER_S = 60.0
"""Ray's agents look now and then whether their raylet lives, and tell the GCS first, which may be dead as well."""
CLOCKS = frozenset({"time", "seconds", "tokens_per_s", "samples_per_s"})
"""What differs between any two runs."""


def losses(job: Job, unbroken: Job) -> list[str]:
    """Compare all that a run must have in common with the unbroken one of its recipe."""
    return [*tensors(job, unbroken), *journal(job, unbroken), *samples(job, unbroken)]


def tensors(job: Job, unbroken: Job) -> list[str]:
    """Compare the last checkpoint's tensors, weights and optimizer state, and its state."""
    last = [checkpoint.newest(each.run_dir) for each in (job, unbroken)]
    if last[0] is None or last[1] is None:
        return [f"{job.name}: no complete checkpoint"]
    got, wanted = contents(last[0].directory), contents(last[1].directory)
    found = [f"{job.name}: tensor {key} is in one run only" for key in sorted(got.keys() ^ wanted.keys())]
    for key in sorted(got.keys() & wanted.keys()):
        if got[key].dtype != wanted[key].dtype or got[key].tobytes() != wanted[key].tobytes():
            differing = int(np.sum(got[key] != wanted[key])) if got[key].shape == wanted[key].shape else -1
            found.append(f"{job.name}: tensor {key} differs in {differing} of {wanted[key].size} elements")
    if not any("|" in key for key in wanted):
        found.append(f"{unbroken.name}: no optimizer state is there to compare")
    states = [{**read_json(each.directory / "state.json"), "seconds": None} for each in last]
    if states[0] != states[1]:
        found.append(f"{job.name}: state {states[0]}, unbroken {states[1]}")
    return found


def contents(directory: Path) -> dict[str, np.ndarray]:
    """Return every tensor below a checkpoint directory, whichever rank wrote it."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            prefix = "golden " if path.stem == "golden" else ""
            found |= {prefix + key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    return found


def journal(job: Job, unbroken: Job) -> list[str]:
    """Compare metrics.jsonl: each step and evaluation once, in order, with the same numbers."""
    found = []
    for kind in ("step", "eval"):
        got, wanted = _of_kind(job, kind), _of_kind(unbroken, kind)
        if (order := [row["step"] for row in got]) != [row["step"] for row in wanted]:
            found.append(f"{job.name}: metrics.jsonl has {kind} rows of {order}")
        by_step = {row["step"]: row for row in wanted}
        found += [
            f"{job.name}: {kind} {row['step']}: {row}, unbroken {by_step[row['step']]}"
            for row in got
            if row["step"] in by_step and row != by_step[row["step"]]
        ]
    return found


def _of_kind(job: Job, kind: str) -> list[dict[str, Any]]:
    found = [row for row in rows(job.run_dir / METRICS) if row["kind"] == kind]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in found]


def samples(job: Job, unbroken: Job) -> list[str]:
    """Compare the ledgers: the samples of every step, and that each came once an epoch."""
    got, wanted = ({row["step"]: row["samples"] for row in rows(each.run_dir / LEDGER)} for each in (job, unbroken))
    return [
        *(f"{job.name}: {line}" for line in ledger.audit(job.run_dir)),
        *(
            f"{job.name}: step {step} was fed samples {got.get(step)}, unbroken {wanted.get(step)}"
            for step in sorted(got.keys() | wanted.keys())
            if got.get(step) != wanted.get(step)
        ),
    ]


def store(job: Job) -> list[str]:
    """Compare a run's last checkpoint in its store with the one here, and look for what lies beside it there."""
    kept = storage.of(job.store)
    if kept is None:
        return []
    with tempfile.TemporaryDirectory() as name:
        told: list[str] = []
        there = Mirror(kept, Path(name) / job.name).newest(tell=told.append)
        here = checkpoint.newest(job.run_dir)
        found = [f"{job.name}: {line}" for line in told]
        if there is None or here is None or there.step != here.step:
            return [*found, f"{job.name}: the last checkpoint in the store is {there}, here {here}"]
        got, wanted = contents(there.directory), contents(here.directory)
    if got.keys() != wanted.keys() or any(got[key].tobytes() != wanted[key].tobytes() for key in wanted):
        found.append(f"{job.name}: the last checkpoint in the store holds other tensors than the one here")
    files = kept.sizes(f"{job.name}/checkpoints")
    places = {name.partition("/")[0] for name in files}
    half = [place for place in sorted(places) if f"{place}/{checkpoint.MANIFEST}" not in files]
    return found + [f"{job.name}: {place} is left in the store without a manifest" for place in half]


def leftovers(job: Job, shared_memory_before: Iterable[str]) -> list[str]:
    """Return what a run that has ended left behind: processes, shared memory, half-written checkpoints."""
    ended = time.monotonic()
    while left := job.processes():
        limit = AGENTS_LINGER_S if all(line.startswith(AGENTS) for line in left.values()) else LINGER_S
        if time.monotonic() > ended + limit:
            break
        time.sleep(0.2)
    found = [f"{job.name}: process {pid} is left: {line.strip()[:80]}" for pid, line in left.items()]
    found += [f"{job.name}: /dev/shm/{name} is left" for name in sorted(_lingering(job, set(shared_memory_before)))]
    rubbish = (job.run_dir / "checkpoints").glob(".step-*")
    return found + [f"{job.name}: {path.name} is left" for path in rubbish]


def _lingering(job: Job, before: set[str]) -> set[str]:
    """Return the shared memory that is new and nobody else's; looked at twice, as others may be at their end."""
    found = shared_memory() - before - _in_use_by_others(job)
    if found:
        time.sleep(1.0)
    return found & shared_memory()


def shared_memory() -> set[str]:
    """Return the names of this machine's shared memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def _in_use_by_others(job: Job) -> set[str]:
    """Return the shared memory that processes of others have mapped: other programs of this machine live, too."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if alive(int(maps.parent.name), job.mark):
            continue
        try:
            found |= {line.rpartition("/dev/shm/")[2] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
        except OSError:
            continue
    return found
