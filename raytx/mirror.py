"""A run in a store: checkpoints, records, artifacts, and how the local directories of its nodes follow.

    <storage_path>/<name>/
        checkpoints/step-00000200.18c2f0a1d2e3f405000001/   as checkpoint.py has it; the number is the attempt's and the
                                                      save's in it
        plan.json  status.json  metrics.jsonl ...           records, as of the last save
        artifacts/hf/                                       artifact.json last
        lease                                               who holds the run; see lease.py

A store has no renaming, so a checkpoint is there exactly when its manifest is, which is put there last. No two attempts
write under one name: one that was given up may still be at it. Each node keeps what it wrote or fetched, and fetches
what it lacks.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from raytx import artifact, checkpoint, pulse, storage
from raytx.checkpoint import MANIFEST, Checkpoint, Files, State
from raytx.errors import CheckpointError, ResourceError, TrainingError
from raytx.files import parse_sealed, sha256, walk
from raytx.journal import LEDGER, METRICS
from raytx.lease import LEASE, Lease
from raytx.plan import Plan
from raytx.run import PLAN
from raytx.storage import Seen, Store, StoreError, persistently, together

JOURNAL = (METRICS, LEDGER, "tensorboard/*")
"""What rank 0 writes, on its node."""
RECORDS = ("*.json", "recipe.yaml", "report.html", "stalls/*")
"""What the driver writes, on its own."""
CHECKPOINTS, ARTIFACTS = "checkpoints", "artifacts"
DAMAGED = f"damaged-{MANIFEST}"
"""What the manifest of a checkpoint is called that has turned out to be damaged."""
POLL_S = 0.1
SMALL_BYTES = 64 * 1024
DOWNLOADS = 2
"""Times a file is fetched whose hash is not what it should be: a network may have done it."""


def of(plan: Plan) -> Mirror | None:
    """Return the mirror of a plan's run, or None where its storage path is a directory."""
    store = storage.of(plan.recipe.storage_path)
    return Mirror(store, plan.run_dir) if store else None


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint in the store."""

    step: int
    attempt: str
    """Attempt and save in it, hexadecimal digits: 16 and 6; of two the later one is greater."""

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}.{self.attempt}"

    @property
    def place(self) -> str:
        return f"{CHECKPOINTS}/{self.name}"


class Mirror:
    """A run in a store, and its directory on this node. Methods raise OSError when the store fails."""

    def __init__(self, store: Store, run_dir: Path) -> None:
        self._store, self._run_dir = store, run_dir
        self._pushed: dict[str, tuple[int, int]] = {}
        self._moved = 0
        """Bytes fetched, or found to be here already. For people who wait: threads may lose a few."""

    @property
    def uri(self) -> str:
        """The run's address, without what the storage path says besides."""
        return f"{self._store.uri.partition('?')[0].rstrip('/')}/{self._run_dir.name}"

    def _at(self, name: str) -> str:
        return f"{self._run_dir.name}/{name}"

    # ---- saving

    def put(self, path: Path, saved: Saved, *, advance: Callable[[int], object] = int) -> None:
        """Put a file of a rank's share into a checkpoint that is not committed yet."""
        self._store.put(path, self._at(f"{saved.place}/{path.name}"), advance=advance)

    def commit(self, staging: Path, saved: Saved, files: Files) -> None:
        """Put what is no rank's share there, and when all is there, the manifest.

        `files` are the ranks'. Raises CheckpointError when one of them is not there as it was put.
        """
        others = [name for path in walk(staging) if (name := str(path.relative_to(staging))) not in {*files, MANIFEST}]
        place = self._at(saved.place)
        together(lambda name: self._store.put(staging / name, f"{place}/{name}"), others)
        sizes = self._store.sizes(place)
        wanted = {name: entry["bytes"] for name, entry in files.items()}
        wanted |= {name: (staging / name).stat().st_size for name in others}
        if lost := [name for name, size in wanted.items() if sizes.get(name) != size]:
            raise CheckpointError(f"{', '.join(lost)}: put there, and now gone from {self.uri} or of another size")
        self.push(JOURNAL)
        self._store.put(staging / MANIFEST, f"{place}/{MANIFEST}")

    def greatest_attempt(self, *, rank: int = 0, gather: Callable[[Any], list[Any]] = lambda value: [value]) -> int:
        """Return the number of the last attempt that has put something there, 0 where none has. Collective.

        Raises TrainingError on every rank when the store cannot be read.
        """
        number: int = self._errand(self._greatest_attempt if rank == 0 else None, gather, self.uri)[0]
        return number

    def _greatest_attempt(self) -> int:
        found = map(_saved, persistently(lambda: self._store.sizes(self._at(CHECKPOINTS))))
        return max((int(one.attempt[:16], 16) for one in found if one), default=0)

    def retain(self, saved: Saved, *, num_to_keep: int | None, best_step: int | None) -> None:
        """Remove checkpoints beyond the newest num_to_keep, and what killed attempts have left; the best one stays.

        Called when one has just been committed, by the one who did. Nothing of a later attempt is touched, as this one
        may have been given up, nor what is ahead, which counts for nothing. Manifests go first: what is half removed
        must not look like a checkpoint.
        """
        sizes = self._store.sizes(self._at(CHECKPOINTS))
        kept = [saved]
        for one in _committed(sizes):
            if one.step < kept[-1].step:
                kept += [one] if num_to_keep is None or len(kept) < num_to_keep or one.step == best_step else []
        spared = {name.partition("/")[0] for name in sizes if name.endswith(f"/{DAMAGED}")}
        spared |= {one.name for one in (*kept, *(one for one in _committed(sizes) if one.step > saved.step))}
        there = {one for one in map(_saved, sizes) if one and one.attempt <= saved.attempt and one.name not in spared}
        for place in sorted(self._at(one.place) for one in there):
            self._store.remove(f"{place}/{MANIFEST}")
            self._store.remove_directory(place)

    # ---- restoring

    def committed(self) -> list[Saved]:
        """Return the run's checkpoints, newest first. What is in them is not looked at."""
        return _committed(self._store.sizes(self._at(CHECKPOINTS)))

    def state(self, saved: Saved | None = None) -> State:
        """Return how far a checkpoint is, by default the newest, without fetching it; step 0 where it does not tell."""
        if saved is None and (saved := next(iter(self.committed()), None)) is None:
            return State()
        try:
            return State(**json.loads(self._store.read(self._at(f"{saved.place}/state.json")) or b"{}"))
        except (ValueError, TypeError):
            return State()

    def newest(
        self,
        *,
        tell: Callable[[str], None] | None = None,
        rank: int = 0,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ) -> Checkpoint | None:
        """Return the newest checkpoint that is as its manifest says, fetched to every node, or None. Collective.

        One rank of each node fetches, rank 0 the journal of then as well. Damaged ones are told, and count no more.
        Raises TrainingError on every rank when the store cannot be read: to go on from an older checkpoint then would
        lose what was learned.
        """
        mine = storage.token(self._run_dir)
        fetches = gather(mine).index(mine) == rank
        found, any_damaged = self._errand(self._begin if fetches else None, gather, self.uri)[0]
        newest, passed_over = None, []
        for saved in found:
            fetch = partial(self.fetch, saved) if fetches else None
            problems = list(filter(None, self._errand(fetch, gather, f"{self.uri}/{saved.place}")))
            if problems and problems[0].startswith(checkpoint.FOREIGN):
                raise TrainingError(f"{self.uri}/{saved.place}: {problems[0]}. {checkpoint.OTHER_VERSION}")
            if not problems:
                self._errand(partial(self.pull, JOURNAL) if rank == 0 else None, gather, self.uri)
                newest = Checkpoint(checkpoint.directory_of(self._run_dir, saved.step))
                break
            passed_over.append(f"checkpoint {saved.name} is damaged and passed over: {problems[0]}")
            if rank == 0:
                self._demote(saved)
        for text in passed_over:  # now that the journal of then is here, it can be written there
            (tell or str)(text)
        if newest is None and (found or any_damaged):
            raise TrainingError(
                f"{self.uri}: held checkpoints, and now none that is whole. {'. '.join(passed_over)}. Bring one back "
                "and run the same command again, or begin anew under another name (name=...)"
            )
        return newest

    def chosen(self, plan: Plan) -> Checkpoint:
        """Return, fetched, the checkpoint that artifacts are made of; as checkpoint.chosen has it."""
        saved, problems = self.committed(), []
        if plan.recipe.save.keep == "best":
            values = {one: self.state(one).metrics.get(plan.metric) for one in saved}
            saved.sort(key=lambda one: _rank(values[one], plan.metric_mode))  # stable: of equals the newest
        for one in saved:
            if (problem := self.fetch(one)) is None:
                return Checkpoint(checkpoint.directory_of(self._run_dir, one.step))
            problems.append(f"checkpoint {one.name} is damaged and passed over: {problem}")
        raise CheckpointError(". ".join([f"{self.uri}: holds no complete checkpoint", *problems]))

    def fetch(self, saved: Saved) -> str | None:
        """Make this node's directory of a checkpoint what the store has; return what is damaged there, or None."""
        if (manifest := persistently(lambda: self._store.read(self._at(f"{saved.place}/{MANIFEST}")))) is None:
            return f"{MANIFEST}: missing"
        try:
            found = parse_sealed(manifest)
            files: Files = found["files"]
        except (ValueError, KeyError, TypeError) as error:
            return f"{MANIFEST}: cannot be read ({type(error).__name__}: {error})"
        if (foreign := checkpoint.other_format(found)) is not None:
            return foreign
        target = checkpoint.directory_of(self._run_dir, saved.step)
        staging = target.with_name(f".{target.name}.fetched")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        problems = together(lambda name: self._bring(saved, name, files[name], target, staging), files)
        if any(problems):
            return "; ".join(filter(None, problems))
        (staging / MANIFEST).write_bytes(manifest)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        return None

    def _begin(self) -> tuple[list[Saved], bool]:
        """Ready this node's directory; return what there is to restore from, and whether there was more."""
        checkpoint.make_room(self._run_dir)
        sizes = persistently(lambda: self._store.sizes(self._at(CHECKPOINTS)))
        found = _committed(sizes)
        if found:  # what is retained no longer need not stay on any node
            checkpoint.drop(self._run_dir, but={one.step for one in found})
        return found, any(name.endswith(f"/{DAMAGED}") for name in sizes)

    def _bring(self, saved: Saved, name: str, wanted: Mapping[str, Any], target: Path, staging: Path) -> str | None:
        """Take a file from this node's directory where it is whole there, else from the store."""
        here, path = target / name, staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if here.is_file() and here.stat().st_size == wanted["bytes"] and sha256(here) == wanted["sha256"]:
            self._advance(wanted["bytes"])
            here.rename(path)
            return None
        get = partial(self._store.get, self._at(f"{saved.place}/{name}"), path, advance=self._advance)
        for _ in range(DOWNLOADS):
            try:
                if persistently(get) == wanted["sha256"]:
                    return None
            except FileNotFoundError:
                return f"{name}: missing"
        return f"{name}: its SHA-256 differs from the manifest"

    def _errand(self, action: Callable[[], Any] | None, gather: Callable[[Any], list[Any]], what: str) -> list[Any]:
        """Have ranks that have something to do there do it; return what came of it, in rank order. Collective.

        They ask each other meanwhile: a collective has a limit, and whoever watches them wants to see progress.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="raytx-mirror") as pool:
            future = pool.submit(_answer, action) if action else None
            before: list[_Answer | None] = []
            while True:
                wait([future] if future else [], timeout=POLL_S)
                answers = gather(future.result() if future and future.done() else future and _Answer(bytes=self._moved))
                if all(answer is None or answer.done for answer in answers):
                    return _agreed([answer for answer in answers if answer], what)
                if answers != before:
                    pulse.phase("restore")
                before = answers

    def _advance(self, size: int) -> None:
        self._moved += size

    def _demote(self, saved: Saved) -> None:
        """Make a damaged checkpoint none, and leave it there to be looked at."""
        with contextlib.suppress(OSError):
            manifest = self._store.read(self._at(f"{saved.place}/{MANIFEST}")) or b""
            self._store.write(self._at(f"{saved.place}/{DAMAGED}"), manifest)
            self._store.remove(self._at(f"{saved.place}/{MANIFEST}"))

    # ---- looking on

    def copy(self, *, whole: bool) -> None:
        """Make this node's directory, an empty one, what the run is like where storage is a directory.

        Unless it is to be whole, of large files there are only names, sizes and times.
        """
        there = self._store.listed(self._run_dir.name)
        local = _where_storage_is_a_directory(there)
        together(lambda name: self._copy(name, local[name], there[name], whole=whole), local)
        for directory in sorted({parent for name in local.values() for parent in Path(name).parents}, reverse=True):
            newest = max(path.stat().st_mtime for path in (self._run_dir / directory).iterdir())
            os.utime(self._run_dir / directory, (newest, newest))

    def _copy(self, name: str, local: str, seen: Seen, *, whole: bool) -> None:
        path = self._run_dir / local
        if whole or seen.size < SMALL_BYTES or path.suffix in {".json", ".jsonl", ".yaml"}:
            persistently(lambda: self._store.get(self._at(name), path))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(seen.size)
        os.utime(path, (seen.changed, seen.changed))

    # ---- records and artifacts

    def lease(self) -> Lease:
        return Lease(self._store, self._at(LEASE), place=storage.token(self._run_dir))

    def leave(self, tell: Callable[[str], None], names: Iterable[str] = RECORDS) -> None:
        """Put the records there as they are at the end; that they cannot be is told, and is no failure of the run."""
        try:
            persistently(lambda: self.push(names))
        except OSError as error:
            tell(f"what this run has written down last cannot be copied to {self.uri}: {error}")

    def push(self, names: Iterable[str]) -> None:
        """Put files of the run's directory there that have changed since this was last done; names are patterns."""
        for path in _matching(self._run_dir, names):
            name, seen = str(path.relative_to(self._run_dir)), path.stat()
            if self._pushed.get(name) != (seen.st_size, seen.st_mtime_ns):
                self._store.put(path, self._at(name))
                self._pushed[name] = (seen.st_size, seen.st_mtime_ns)

    def pull(self, names: Iterable[str], *, grown: bool = False) -> None:
        """Fetch files of the run; with `grown`, only those that are longer there than here."""
        for name, size in self._store.sizes(self._run_dir.name).items():
            path = self._run_dir / name
            if not any(_matches(name, pattern) for pattern in names):
                continue
            if not (grown and path.is_file() and path.stat().st_size >= size):
                persistently(lambda: self._store.get(self._at(name), path))  # noqa: B023  called at once

    def push_artifacts(self) -> None:
        """Put this node's artifacts there, in place of those that were."""
        for directory in sorted((self._run_dir / ARTIFACTS).glob("[!.]*")):
            place = self._at(f"{ARTIFACTS}/{directory.name}")
            persistently(lambda: self._store.remove(f"{place}/{artifact.MANIFEST}"))  # noqa: B023  called at once
            persistently(lambda: self._store.remove_directory(place))  # noqa: B023
            self._store.put_directory(directory, place, last=artifact.MANIFEST)

    def pull_artifacts(self) -> None:
        """Fetch the artifacts that this node lacks or has of another make."""
        names = self._store.sizes(self._at(ARTIFACTS))
        for type_ in sorted({name.partition("/")[0] for name in names if name.endswith(f"/{artifact.MANIFEST}")}):
            target, place = self._run_dir / ARTIFACTS / type_, self._at(f"{ARTIFACTS}/{type_}")
            manifest, here = self._store.read(f"{place}/{artifact.MANIFEST}"), target / artifact.MANIFEST
            if not here.is_file() or here.read_bytes() != manifest:
                staging = target.with_name(f".{type_}.fetched")
                shutil.rmtree(staging, ignore_errors=True)
                if self._store.get_directory(place, staging, last=artifact.MANIFEST):
                    shutil.rmtree(target, ignore_errors=True)
                    staging.rename(target)


def keep_local(staging: Path, target: Path) -> None:
    """Keep what this node wrote of a committed checkpoint: that need not be fetched. Any rank of a node may call it."""
    with contextlib.suppress(OSError):
        if staging.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)


def tidy(run_dir: Path) -> None:
    """Remove what this node alone wrote of checkpoints that others completed, but for the newest."""
    shares = [path for path in (run_dir / CHECKPOINTS).glob("step-*") if not (path / MANIFEST).is_file()]
    for path in sorted(shares)[:-1]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def held(plan: Plan, *, doing: str, tell: Callable[[str], None]) -> Iterator[Mirror | None]:
    """Hold a plan's run in its store while the block runs, beginning with its records, and leaving them there.

    Does nothing where the storage path is a directory. Raises ResourceError when it is in use or cannot be used.
    """
    if (mirror := of(plan)) is None:
        yield None
        return
    with _as_mistake(mirror.uri), mirror.lease().held(doing=doing, tell=tell) as ours:
        mirror.pull(RECORDS)
        try:
            yield mirror
        finally:
            if ours():
                mirror.leave(tell)


@contextlib.contextmanager
def _as_mistake(uri: str) -> Iterator[None]:
    """Say of a store that fails what the user can do."""
    try:
        yield
    except StoreError as error:
        raise ResourceError(
            f"storage_path: {uri} cannot be used: {error}. Repair it, or the way to it, and run the same command again"
        ) from error


def recorded(uri: str) -> Plan:
    """Return the plan of a run that a URI names, to be carried out there, wherever the run was made.

    Raises CheckpointError where there is no run, ResourceError when the store cannot be used.
    """
    storage_path, name = storage.split(uri)
    with _as_mistake(uri):
        if (said := Store(storage_path).read(f"{name}/{PLAN}")) is None:
            raise CheckpointError(f"{uri}: no run there (no {PLAN})")
    plan = Plan.from_dict(json.loads(said))
    return replace(plan, recipe=plan.recipe.override({"storage_path": storage_path, "name": name}))


def copies(uri: str, *, only: str | None = None, whole: bool = False) -> Path:
    """Return a new directory with the runs of a store, or only one of them, to look at; see Mirror.copy.

    It lasts as long as this process.
    """
    store, directory = Store(uri), Path(tempfile.mkdtemp(prefix="raytx-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    with _as_mistake(uri):
        names = {name.partition("/")[0] for name in store.sizes() if not name.startswith(".")}
        for name in sorted(names & {only} or names):
            Mirror(store, directory / name).copy(whole=whole)
    return directory


def _where_storage_is_a_directory(names: Iterable[str]) -> dict[str, str]:
    """Return the names that files have there; what killed attempts have left has none, nor has of several checkpoints
    of a step any but the last."""
    places: dict[str, str] = {}
    for name in sorted(names):
        directory, _, file = name.rpartition("/")
        if directory.startswith(f"{CHECKPOINTS}/") and file in {MANIFEST, DAMAGED}:
            mark = file.removesuffix(MANIFEST)
            places[f"{CHECKPOINTS}/{mark}{directory.removeprefix(f'{CHECKPOINTS}/').partition('.')[0]}"] = directory
    found = {name: name for name in names if not name.startswith(f"{CHECKPOINTS}/")}
    for place, directory in places.items():
        found |= {name: name.replace(directory, place, 1) for name in names if name.startswith(f"{directory}/")}
    return found


def _committed(sizes: Mapping[str, int]) -> list[Saved]:
    """Return the checkpoints whose manifest is there, newest first."""
    return sorted((one for name in sizes if name.endswith(f"/{MANIFEST}") and (one := _saved(name))), reverse=True)


def _saved(name: str) -> Saved | None:
    """Return what a name below checkpoints/ belongs to, where it is a checkpoint's, committed or not."""
    match = re.match(r"step-(\d{8,})\.([0-9a-f]+)/", name)
    return Saved(int(match[1]), match[2]) if match else None


def _matches(name: str, pattern: str) -> bool:
    """A star stands for a part of one name, as in Path.glob."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(directory.glob(pattern)) if path.is_file()]


def _rank(value: float | None, mode: str) -> float:
    if value is None or not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value


@dataclass(frozen=True)
class _Answer:
    """How far a rank is with what it does for its node."""

    done: bool = False
    found: Any = None
    error: str | None = None
    bytes: int = 0


def _answer(action: Callable[[], Any]) -> _Answer:
    try:
        return _Answer(done=True, found=action())
    except OSError as error:
        return _Answer(done=True, error=str(error))


def _agreed(answers: list[_Answer], what: str) -> list[Any]:
    """Return what was found; raise TrainingError when any could not."""
    if errors := [answer.error for answer in answers if answer.error]:
        raise TrainingError(
            f"cannot read {what}: {errors[0]}. Repair the storage, or the way to it, and run the same command again"
        )
    return [answer.found for answer in answers]
