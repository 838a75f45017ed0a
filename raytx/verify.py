"""Verify runs: every file that has a hash, what came of what, and a journal in which no step is missing.

Nothing is changed, and a run may go on meanwhile: what it replaces or removes while it is looked at is no problem.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raytx import checkpoint, ledger, prepare, status
from raytx.artifact import MANIFEST as ARTIFACT
from raytx.artifact import Artifact, open_artifact, read
from raytx.checkpoint import MANIFEST, REPLACED, directory_of, step_of
from raytx.errors import ArtifactError
from raytx.export import made_of
from raytx.files import disagreements, read_json
from raytx.journal import METRICS
from raytx.plan import identity
from raytx.prepare import Samples
from raytx.run import OUTCOME, PLAN, TRIALS, differences
from raytx.runs import UNREADABLE, directories

LEDGER = "ledger.jsonl"
STEPS_SHOWN = 5
"""Ranges of steps that one line names; a journal may miss thousands."""
DONE = frozenset({"step", "nonfinite"})
"""Records that stand for a step: one that was done, or left out because it was not finite."""

Row = dict[str, Any] | None
Journal = Sequence[Row]
"""The journal's lines; None where one is no record."""
Advance = Callable[[int], object]
"""Is told the bytes that have been looked at since it was last told."""


@dataclass(frozen=True)
class Finding:
    """A file or directory, by its path from the run's directory, and what is wrong with it."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


@dataclass(frozen=True)
class Verdict:
    """What was looked at in a run, and what was found."""

    directory: str
    problems: list[Finding] = field(default_factory=list)
    """What is lost, damaged or contradictory."""
    notes: list[Finding] = field(default_factory=list)
    """What is no loss, but may surprise: rubbish of killed saves, prepared data that must be made again."""
    checkpoints: int = 0
    artifacts: int = 0
    steps: int = 0
    """Steps in the journal."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    run_dir: Path, *, replay: bool = False, advance: Advance = int, known: dict[Path, list[Finding]] | None = None
) -> Verdict:
    """Look at everything a run keeps; with `replay` load its artifacts too and hold them to their golden outputs.

    `known` keeps what was found of prepared data for other runs that share it.
    """
    saved = checkpoint.complete(run_dir)  # before the journal, which is always ahead of what is saved
    artifacts = sorted(path for path in run_dir.glob("artifacts/[!.]*") if path.is_dir())
    journal = list(_rows(run_dir))
    wrong, notes = _prepared(run_dir, advance, {} if known is None else known)
    damaged, rubbish = _leftovers(run_dir)
    problems = [finding for path in saved for finding in _steady(_checkpoint, path, advance)]
    problems += [finding for path in artifacts for finding in _steady(_artifact, path, advance)]
    problems += [*_records(run_dir), *_saves(run_dir, saved, journal), *_journal(run_dir, saved, journal)]
    problems += [*_ledger(run_dir), *wrong, *damaged]
    if replay:
        sound = [path for path in artifacts if not any(Path(found.file).is_relative_to(path) for found in problems)]
        problems += [finding for path in sound for finding in _steady(_replay, path, advance)]
    return Verdict(
        directory=str(run_dir),
        problems=[_below(finding, run_dir) for finding in problems],
        notes=[_below(finding, run_dir) for finding in (*notes, *rubbish)],
        checkpoints=len(saved),
        artifacts=len(artifacts),
        steps=len(set(_steps(journal))),
    )


def verifiable(run_dir: Path) -> list[Path]:
    """Return the directories to verify of a run: its own, and those of its trials where it is a search."""
    return [run_dir, *directories(run_dir)] if (run_dir / TRIALS).is_dir() else [run_dir]


def hashed_bytes(run_dirs: Sequence[Path]) -> int:
    """Return how many bytes verifying runs will hash, as their manifests say; prepared data that they share, once."""
    manifests = [
        path
        for run_dir in run_dirs
        for path in (*run_dir.glob(f"checkpoints/step-*/{MANIFEST}"), *run_dir.glob(f"artifacts/[!.]*/{ARTIFACT}"))
    ]
    prepared = {found / prepare.MANIFEST for run_dir in run_dirs if (found := _prepared_directory(run_dir)) is not None}
    return sum(map(_listed_bytes, [*manifests, *prepared]))


def _listed_bytes(manifest: Path) -> int:
    try:
        return sum(entry["bytes"] for entry in read_json(manifest)["files"].values())
    except UNREADABLE:
        return 0


def _below(finding: Finding, run_dir: Path) -> Finding:
    """Name a finding's file by its path from the run's directory; prepared data lies elsewhere and keeps its own."""
    path = Path(finding.file)
    return Finding(str(path.relative_to(run_dir)), finding.reason) if path.is_relative_to(run_dir) else finding


# -------------------------------------------------------------------------------------------- checkpoints, artifacts


def _steady(look: Callable[[Path, Advance], list[Finding]], directory: Path, advance: Advance) -> list[Finding]:
    """Look at a directory that the run may replace or remove meanwhile; look again if it did."""
    while (before := _inode(directory)) is not None:
        try:
            found = look(directory, advance)
        except OSError as error:
            found = [Finding(str(directory), f"cannot be read ({error})")]
        if not found or _inode(directory) == before:
            return found
    return []


def _inode(directory: Path) -> int | None:
    try:
        return directory.stat().st_ino
    except OSError:
        return None


def _checkpoint(directory: Path, advance: Advance) -> list[Finding]:
    """Hold a checkpoint to its manifest, to its own name and to what the run learns."""
    if flaws := checkpoint.flaws(directory, advance=advance):
        return [_flaw(directory, flaw) for flaw in flaws]
    found = []
    for file in (MANIFEST, "state.json"):
        if (step := read_json(directory / file).get("step")) != step_of(directory):
            found.append(Finding(str(directory / file), f"is of step {step}"))
    plan = directory.parent.parent / PLAN
    if plan.is_file() and (changed := _other_identity(plan, directory / "plan.json")):
        found.append(Finding(str(directory), f"was trained by another plan than the run's ({', '.join(changed)})"))
    return found


def _other_identity(first: Path, second: Path) -> list[str]:
    try:
        return list(differences(identity(read_json(first)["recipe"]), identity(read_json(second)["recipe"])))
    except UNREADABLE:  # what cannot be read is a finding of its own
        return []


def _flaw(directory: Path, flaw: str) -> Finding:
    file, _, reason = flaw.partition(": ")
    return Finding(str(directory / file), reason)


def _artifact(directory: Path, advance: Advance) -> list[Finding]:
    """Hold an artifact to its manifest and to the checkpoint that it says it is made of."""
    manifest = directory / ARTIFACT
    try:
        artifact = read(directory, verify=False)
        wrong = disagreements(directory, artifact.files, manifest=ARTIFACT, advance=advance)
        return [_flaw(directory, flaw) for flaw in wrong] + _another_origin(directory, artifact)
    except ArtifactError as error:
        return [Finding(str(manifest), str(error).removeprefix(f"{manifest}: "))]
    except UNREADABLE as error:
        return [Finding(str(manifest), f"cannot be read ({type(error).__name__}: {error})")]


def _another_origin(directory: Path, artifact: Artifact) -> list[Finding]:
    """Tell when the checkpoint that an artifact names is there, but is not the one that it was made of."""
    lineage = artifact.lineage
    source = directory.parent.parent / "checkpoints" / lineage["checkpoint"] / MANIFEST
    if not source.is_file():
        return []  # retention may have removed it since
    made = {"plugins": artifact.plugins, "exporter": artifact.exporter, "compression": artifact.compression}
    if lineage["made_of"] == made_of(read_json(source), **made, serving=lineage["recipe"]["serving"]):
        return []
    return [Finding(str(directory), f"was made of another {lineage['checkpoint']} than the one that is there")]


def _replay(directory: Path, _: Advance) -> list[Finding]:
    try:
        open_artifact(directory)
    except Exception as error:  # a plugin's loader may raise anything; whatever it is, this does not serve
        return [Finding(str(directory), f"cannot be replayed: {error or type(error).__name__}")]
    return []


# ---------------------------------------------------------------------------------------------------- small records


def _records(run_dir: Path) -> list[Finding]:
    """Try to read the small files that others are understood by."""
    names = [PLAN, "environment.json", status.STATUS, "trials.json", OUTCOME, "parity.json", "compression.json"]
    found = []
    for path in (run_dir / name for name in names):
        try:
            if path.is_file():
                read_json(path)
        except (OSError, ValueError) as error:
            found.append(Finding(str(path), f"cannot be read ({type(error).__name__}: {error})"))
    return found


def _saves(run_dir: Path, saved: Sequence[Path], journal: Journal) -> list[Finding]:
    """Look for checkpoints that ought to be there: with a manifest, the best one, any at all."""
    there = [path for path in run_dir.glob("checkpoints/step-*") if not (path / MANIFEST).is_file() and path.is_dir()]
    found = [Finding(str(path), f"has no {MANIFEST}") for path in sorted(there)]
    if not saved and not found and any(row and row.get("kind") == "checkpoint" for row in journal):
        found.append(Finding(str(run_dir / "checkpoints"), f"is empty, though {METRICS} tells of checkpoints"))
    saved = checkpoint.complete(run_dir)  # a run that goes on may have found a better one
    best = _best(saved[0]) if saved else None
    if best and not best.is_dir() and checkpoint.complete(run_dir)[:1] == saved[:1]:
        found.append(Finding(str(best), "the best checkpoint is gone"))
    return found


def _best(newest: Path) -> Path | None:
    """Return the best checkpoint, where the run keeps it."""
    try:
        step = read_json(newest / "state.json")["best_step"]
        keeps = read_json(newest / PLAN)["recipe"]["save"]["keep"] == "best"
    except UNREADABLE:
        return None
    if not keeps or step is None:
        return None
    best = directory_of(newest.parent.parent, step)
    replaced = best.with_name(f"{best.name}{REPLACED}")  # killed while it was replaced
    return replaced if replaced.is_dir() and not best.is_dir() else best


def _leftovers(run_dir: Path) -> tuple[list[Finding], list[Finding]]:
    """Return what was set aside as damaged, and rubbish of saves and exports that were killed."""
    damaged = [
        Finding(str(path), "was damaged and set aside by a restart; once it is understood, it can be deleted")
        for path in sorted(run_dir.glob("checkpoints/damaged-*"))
    ]
    if status.holder(run_dir) is not None:  # what looks left over is being written
        return damaged, []
    rubbish = sorted([*run_dir.glob("checkpoints/.step-*"), *run_dir.glob("artifacts/.*"), *run_dir.glob(".*.tmp")])
    return damaged, [Finding(str(path), "left by a save or export that was cut short; harmless") for path in rubbish]


# ------------------------------------------------------------------------------------------------------- the journal


def _journal(run_dir: Path, saved: Sequence[Path], journal: Journal) -> list[Finding]:
    """Hold the journal to its promise: each step once, in order, none missing, as far as what is saved."""
    steps = _steps(journal)
    last = max(steps, default=0)
    # A kill may have cut the last line short; the run drops it when it goes on.
    told = [f"line {place} is no record" for place, row in enumerate(journal[:-1], 1) if row is None]
    if repeated := [step for step, times in Counter(steps).items() if times > 1]:
        told.append(f"there more than once: {_spans(repeated)}")
    if missing := sorted(set(range(1, last + 1)) - set(steps)):
        told.append(f"missing: {_spans(missing)}")
    if not repeated and steps != sorted(steps):
        told.append("its steps are not in order")
    if saved and last < (reached := step_of(saved[0])):
        told.append(f"ends at step {last}, before checkpoint {saved[0].name} (step {reached})")
    return [Finding(str(run_dir / METRICS), text) for text in told]


def _rows(run_dir: Path) -> Iterator[Row]:
    """Yield the record of each line of the journal, None for a line that is none."""
    try:
        lines = (run_dir / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else None


def _steps(journal: Journal) -> list[int]:
    return [row["step"] for row in journal if row and row.get("kind") in DONE and isinstance(row.get("step"), int)]


def _spans(steps: Sequence[int]) -> str:
    """Return steps as people read them: steps 3, 7-9."""
    spans: list[list[int]] = []
    for step in sorted(steps):
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    shown = [f"{first}-{last}" if last > first else f"{first}" for first, last in spans[:STEPS_SHOWN]]
    more = f" and {len(spans) - STEPS_SHOWN} more" if len(spans) > STEPS_SHOWN else ""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(shown)}{more}"


def _ledger(run_dir: Path) -> list[Finding]:
    """Return what the audit of the sample ledger finds, where the run keeps one."""
    if not _keeps_ledger(run_dir):
        return []
    try:
        return [Finding(str(run_dir / LEDGER), problem) for problem in ledger.audit(run_dir)]
    except UNREADABLE as error:
        return [Finding(str(run_dir / LEDGER), f"cannot be audited ({type(error).__name__}: {error})")]


def _keeps_ledger(run_dir: Path) -> bool:
    try:
        return bool(read_json(run_dir / PLAN)["recipe"]["train"].get("ledger"))
    except UNREADABLE:
        return (run_dir / LEDGER).is_file()


# -------------------------------------------------------------------------------------------------- prepared data


def _prepared(run_dir: Path, advance: Advance, known: dict[Path, list[Finding]]) -> tuple[list[Finding], list[Finding]]:
    """Hold the prepared data to its manifest and to the plan's count; data that is gone is made again."""
    if (directory := _prepared_directory(run_dir)) is None:
        return [], []
    if not (directory / prepare.META).is_file():
        return [], [Finding(str(directory), "prepared data is gone; training makes it again")]
    if directory not in known:
        known[directory] = _steady(_data, directory, advance)
    return known[directory] or _miscounted(run_dir, directory), []


def _data(directory: Path, advance: Advance) -> list[Finding]:
    manifest = directory / prepare.MANIFEST
    if not manifest.is_file():  # prepared before there were manifests
        return []
    try:
        wrong = disagreements(directory, read_json(manifest)["files"], manifest=prepare.MANIFEST, advance=advance)
    except UNREADABLE as error:
        return [Finding(str(manifest), f"cannot be read ({type(error).__name__}: {error})")]
    return [_flaw(directory, flaw) for flaw in wrong]


def _miscounted(run_dir: Path, directory: Path) -> list[Finding]:
    try:
        count, wanted = len(Samples.open(directory / "train.arrow")), read_json(run_dir / PLAN)["num_samples"]
    except UNREADABLE as error:  # Arrow's own errors are ValueErrors
        return [Finding(str(directory / "train.arrow"), f"cannot be read ({type(error).__name__}: {error})")]
    if count == wanted:
        return []
    return [Finding(str(directory / "train.arrow"), f"holds {count:,} samples, the plan says {wanted:,}")]


def _prepared_directory(run_dir: Path) -> Path | None:
    try:
        prepared = read_json(run_dir / PLAN)["prepared"]
    except UNREADABLE:
        return None
    return Path(prepared) if prepared else None
