"""Runs, told from their directories alone: which there are, how far each is, what it came from, how two differ.

Nothing here writes, locks for longer than an instant or trusts a file: a run may be going on, broken or read-only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from raytx import checkpoint, status
from raytx.artifact import MANIFEST as ARTIFACT
from raytx.errors import RaytxError, RunError, did_you_mean
from raytx.files import digest, read_json
from raytx.journal import FRESH, METRICS, rows
from raytx.layout import Layout
from raytx.plan import identity
from raytx.recipe import Recipe
from raytx.run import EXPORTING, OUTCOME, PLAN, TRIALS, differences

State = Literal["running", "finished", "stopped", "failed", "broken"]
Record = dict[str, Any]

MARKS = (PLAN, METRICS, status.LOCK, status.STATUS, "checkpoints", TRIALS)
"""What makes a directory a run or a search; any one of them will do."""
TAIL_BYTES = 64 * 1024
"""End of a metrics file that a list reads: some hundreds of steps."""
FRESH_S = 120.0
"""A run of another machine that has written so lately goes on, where this machine cannot see its lock."""
READERS = 16
"""Runs read at once: a shared file system answers slowly, but many at a time."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a file that holds anything at all may raise."""


@dataclass(frozen=True)
class Summary:
    """A run, or a search, in a line."""

    name: str
    directory: str
    kind: Literal["run", "search"]
    state: State
    detail: str = ""
    """Who is at it, why it failed, or where it would go on."""
    step: int | None = None
    """Steps done; of a search, trials that have ended."""
    steps: int | None = None
    """Steps, or trials, in all."""
    saved: int | None = None
    """Step of the newest checkpoint."""
    metric: str | None = None
    last: float | None = None
    """The newest value of the metric."""
    best: float | None = None
    best_step: int | None = None
    strategy: str | None = None
    workers: int | None = None
    active: float = 0.0
    """When it last wrote something, in seconds since 1970."""
    bytes: int = 0
    """Size on disk."""
    trials: dict[str, int] = field(default_factory=dict)
    """Of a search, how many trials are in each state."""


# -------------------------------------------------------------------------------------------------------- finding


def default_storage() -> Path:
    """Return where recipes put their runs when they do not say."""
    return Path(Recipe.model_fields["storage_path"].default).expanduser()


def list_runs(*storages: str | Path) -> list[Summary]:
    """Return the runs below storage paths, the one that was active last first; of a search's directory, its trials."""
    found = [run_dir for storage in storages for run_dir in directories(storage)] if storages else everything()
    with ThreadPoolExecutor(READERS) as pool:
        return sorted(pool.map(summary, found), key=lambda run: (-run.active, run.name))


def everything(storage: str | Path | None = None) -> list[Path]:
    """Return the run directories of a storage path; of the default one, which no run may have made yet, by default."""
    return directories(storage or default_storage()) if storage or default_storage().is_dir() else []


def directories(storage: str | Path) -> list[Path]:
    """Return the run directories of a storage path, those of a search's trials, or the run directory itself."""
    place = Path(storage).expanduser().absolute()
    if not place.is_dir():
        raise RunError(f"{storage}: no such directory")
    if (place / TRIALS).is_dir():
        place = place / TRIALS
    elif is_run(place):
        return [place]
    return sorted(path for path in place.iterdir() if not path.name.startswith(".") and is_run(path))


def is_run(path: Path) -> bool:
    return any((path / mark).exists() for mark in MARKS)


def find(name: str, storage: str | Path | None = None) -> Path:
    """Return the directory of a run given by its path, or by its name below a storage path."""
    storage = Path(storage).expanduser() if storage else default_storage()
    for path in (Path(name).expanduser(), storage / name):
        if is_run(path):
            return path.absolute()
    there = [path.name for path in directories(storage)] if storage.is_dir() else []
    listed = "" if there else " There are no runs."
    raise RunError(
        f"no run {name!r}: neither a run's directory nor a name below {storage}.{did_you_mean(name, there)}{listed} "
        "`raytx runs list` shows what there is; --storage-path looks elsewhere"
    )


# ------------------------------------------------------------------------------------------------------ in a line


def summary(run_dir: Path) -> Summary:
    """Return a run in a line, from small files and the end of its journal; one that is broken says what is."""
    told = _search if (run_dir / TRIALS).is_dir() else _run
    try:
        return told(run_dir)
    except UNREADABLE as error:
        kind: Literal["run", "search"] = "search" if told is _search else "run"
        detail = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else _gist(error)
        return Summary(run_dir.name, str(run_dir), kind, "broken", detail, active=_active(run_dir), bytes=size(run_dir))


def _run(run_dir: Path) -> Summary:
    newest = next(iter(checkpoint.complete(run_dir)), None)
    saved: Record = _read(newest / "state.json") if newest else {"step": None}
    plan = _read(run_dir / PLAN) or (_read(newest / PLAN) if newest else {})
    tail = _tail(run_dir / METRICS)
    metric = plan.get("metric")
    step = max([row["step"] for row in tail if row.get("kind") == "step"], default=saved["step"])
    best = saved if saved.get("metric") == f"{metric} {plan.get('metric_mode')}" else {}  # it may be of another metric
    done = step is not None and saved["step"] == plan.get("steps")
    active = _active(run_dir)
    state, detail = _state(run_dir, done=done, at=active)
    return Summary(
        name=run_dir.name,
        directory=str(run_dir),
        kind="run",
        state=state,
        detail="; ".join(part for part in (detail, _place(state, step, saved["step"])) if part),
        step=step,
        steps=plan.get("steps"),
        saved=saved["step"],
        metric=metric,
        last=_last([saved.get("metrics", {}) | {"kind": "eval"}, *tail], metric),
        best=best.get("best"),
        best_step=best.get("best_step"),
        strategy=plan["recipe"]["strategy"]["type"] if plan else None,
        workers=Layout(**plan["layout"]).world_size if plan else None,
        active=active,
        bytes=size(run_dir),
    )


def _state(run_dir: Path, *, done: bool, at: float) -> tuple[State, str]:
    """Return a run's state and what there is to say of it: the lock decides, then how its last turn ended."""
    if (owner := status.holder(run_dir)) is not None:
        doing = "" if owner.get("doing") in (None, "training") else f"{owner['doing']}, "
        return "running", f"{doing}pid {owner.get('pid')} on {owner.get('host')}" if owner else ""
    turns = [turn for turn in status.turns(run_dir) if done or turn.get("doing") != EXPORTING]
    turn = turns[-1] if turns else {}
    error = turn.get("error")
    if turn and "ended" not in turn and not status.here(turn) and time.time() - at < FRESH_S:
        return "running", f"pid {turn.get('pid')} on {turn.get('host')}, by what it writes"
    if done:
        return "finished", f"its last command failed: {gist(error)}" if error and error != status.INTERRUPTED else ""
    if error and error != status.INTERRUPTED:
        return "failed", gist(error)
    killed = bool(turn) and "ended" not in turn
    return "stopped", "killed" if killed else error or ""


def _place(state: State, step: int | None, saved: int | None) -> str:
    """Say where a run that ended early would go on."""
    if state not in ("stopped", "failed") or not step:
        return ""
    return f"goes on from step {saved:,}" if saved else "goes on from the beginning: nothing was saved"


def _search(run_dir: Path) -> Summary:
    trials = trials_of(run_dir)
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8")) or {}
    plan: Record = next((found for trial in trials if (found := _try(Path(trial["directory"]) / PLAN))), {})
    counts = Counter(trial["state"] for trial in trials)
    active = max([_active(run_dir), *(trial["active"] for trial in trials)])
    state, detail = _state(run_dir, done=(run_dir / "trials.json").is_file(), at=active)
    wanted = (recipe.get("search") or {}).get("samples")
    best = _best(trials, plan)
    return Summary(
        name=run_dir.name,
        directory=str(run_dir),
        kind="search",
        state=state,
        detail=", ".join([f"{count} {word}" for word, count in counts.items()] + ([detail] if detail else [])),
        step=len(trials) - counts["running"],
        steps=max(wanted or 0, len(trials)),
        metric=plan.get("metric"),
        best=best,
        strategy=plan["recipe"]["strategy"]["type"] if plan else None,
        workers=Layout(**plan["layout"]).world_size if plan else None,
        active=active,
        bytes=size(run_dir),
        trials=dict(counts),
    )


def trials_of(run_dir: Path) -> list[Record]:
    """Return the trials of a search: what it wrote down of each at its end, else what each has left."""
    written = {trial["id"]: trial for trial in _try(run_dir / "trials.json") or []}
    found = []
    for path in directories(run_dir):
        outcome = _try(path / OUTCOME) or {}
        held = status.holder(path) is not None
        state = "running" if held else "finished" if outcome.get("metrics") else "stopped"
        known = {"id": path.name, "state": state, "metrics": outcome.get("metrics"), "error": outcome.get("error")}
        found.append(known | written.get(path.name, {}) | {"directory": str(path), "active": _active(path)})
    return found


def _best(trials: Sequence[Record], plan: Record) -> float | None:
    values = [trial["metrics"].get(plan.get("metric")) for trial in trials if trial["metrics"]]
    numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return (min if plan.get("metric_mode") == "min" else max)(numbers, default=None)


# ------------------------------------------------------------------------------------------------------- in full


def details(run_dir: Path) -> Record:
    """Return all that a run tells, as plain data; what cannot be read is left out, and the summary says so."""
    plan = _try(run_dir / PLAN) or next((_try(path / PLAN) for path in checkpoint.complete(run_dir)), None) or {}
    saved = [_checkpoint(path) for path in checkpoint.complete(run_dir)]
    artifacts = [_artifact(path) for path in sorted(run_dir.glob(f"artifacts/*/{ARTIFACT}"))]
    return {
        "summary": asdict(summary(run_dir)),
        "plan": _told(brief, plan) or {},
        "attempts": _told(attempts, rows(run_dir / METRICS), status.turns(run_dir)) or [],
        "turns": _turns(run_dir),
        "checkpoints": _told(_kept, saved, plan) or saved,
        "artifacts": artifacts,
        "lineage": _told(lineage, run_dir, plan, artifacts) or [],
        "spent_s": saved[0]["seconds"] if saved else None,
        "trials": trials_of(run_dir) if (run_dir / TRIALS).is_dir() else [],
        "environment": _try(run_dir / "environment.json") or {},
    }


def _told(part: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a part tells, or None where its files hold something else than raytx writes."""
    try:
        return part(*arguments)
    except UNREADABLE:
        return None


def brief(plan: Record) -> Record:
    """Return what a reader asks of a plan first."""
    if not plan:
        return {}
    recipe = plan["recipe"]
    train, optim = recipe["train"], recipe["optim"]
    return {
        "model": origin(recipe["model"], seed=train["seed"]),
        "parameters": plan["size"]["parameters"],
        "trainable": plan["size"]["trainable"],
        "data": origin(recipe["data"]),
        "samples": plan["num_samples"],
        "strategy": recipe["strategy"],
        "layout": plan["layout"],
        "global_batch_size": train["global_batch_size"],
        "micro_batch_size": train["micro_batch_size"],
        "gradient_accumulation_steps": plan["gradient_accumulation_steps"],
        "steps": plan["steps"],
        "steps_per_epoch": plan["steps_per_epoch"],
        "precision": train["precision"],
        "optimizer": {key: optim[key] for key in ("type", "lr", "schedule")},
        "metric": f"{plan['metric']} ({plan['metric_mode']})",
        "plugins": plan["plugins"],
        "fingerprint": digest(identity(recipe)),
    }


def origin(component: Mapping[str, Any], *, seed: int | None = None) -> str:
    """Say where a model's weights or a source's rows come from, and what is put upon them."""
    parts = []
    if component.get("path"):
        parts.append(str(component["path"]))
    elif seed is not None:
        parts.append(f"random weights of seed {seed}")
    if component.get("revision"):
        parts.append(f"at {component['revision']}")
    if adapter := component.get("adapter"):
        parts.append(f"with {adapter['type']} adapters on it")
    return f"{component['type']}, {' '.join(parts)}" if parts else str(component["type"])


def attempts(records: Iterable[Record], turns: Sequence[status.Turn] = ()) -> list[Record]:
    """Return each beginning and continuation: from where, on which nodes, how long, how far, and what ended it.

    A step that was done again belongs to the attempt that did it last, so earlier ones may look shorter than they were.
    """
    found: list[Record] = []
    placed: list[str] = []
    for record in records:
        kind = record.get("kind")
        if kind in FRESH:
            found.append(_attempt(record, placed))
            placed = []
        elif kind == "placed":
            if found and not found[-1]["nodes"]:
                _fill(found[-1], record["nodes"])
            else:  # a first attempt is placed before it says that it has started
                placed = record["nodes"]
        if found:
            _extend(found[-1], record)
    for one, following in zip(found, [*found[1:], None], strict=True):
        one["told"] = list(dict.fromkeys(one["told"] + _said_between(turns, one, following)))
    return found


def _attempt(record: Record, nodes: Sequence[str]) -> Record:
    began: Record = {"kind": record["kind"], "from": record["step"], "to": record["step"], "since": record.get("time")}
    began |= {"until": record.get("time"), "workers": None, "nodes": {}, "told": []}
    _fill(began, nodes)
    return began


def _fill(attempt: Record, nodes: Sequence[str]) -> None:
    attempt |= {"workers": len(nodes) or None, "nodes": dict(Counter(nodes))}


def _extend(attempt: Record, record: Record) -> None:
    """Let an attempt last until a record of it."""
    attempt["until"] = record.get("time", attempt["until"])
    attempt["to"] = max(attempt["to"], record.get("step", 0))
    if record.get("kind") == "remark":
        attempt["told"].append(gist(record["text"]))


def _said_between(turns: Sequence[status.Turn], one: Record, following: Record | None) -> list[str]:
    """Return what commands were told, and failed with, from one attempt's beginning to the next one's."""
    said = [(remark["time"], remark["text"]) for turn in turns for remark in turn.get("remarks", [])]
    said += [(turn["ended"], gist(turn["error"])) for turn in turns if turn.get("error")]
    said += [(after["started"], f"its command was killed (pid {turn.get('pid')})") for turn, after in _killed(turns)]
    until = following["since"] if following else math.inf
    return [gist(text) for at, text in sorted(said) if one["since"] <= at < until]


def _killed(turns: Sequence[status.Turn]) -> list[tuple[status.Turn, status.Turn]]:
    """Return the turns that were killed and the one that came after each, which is when it was known."""
    return [(turn, after) for turn, after in pairwise(turns) if "ended" not in turn]


def _turns(run_dir: Path) -> list[status.Turn]:
    """Return the commands at work on a run, each with its outcome: only the last can still be at it."""
    found, held = status.turns(run_dir), status.holder(run_dir) is not None
    for place, turn in enumerate(found, 1):
        alive = held and place == len(found)
        turn["outcome"] = (turn.get("error") or "done") if "ended" in turn else "at work" if alive else "killed"
    return found


def _checkpoint(directory: Path) -> Record:
    state = _try(directory / "state.json") or {}
    return {
        "name": directory.name,
        "step": state.get("step"),
        "bytes": size(directory),
        "metrics": state.get("metrics", {}),
        "committed": (directory / checkpoint.MANIFEST).stat().st_mtime,
        "seconds": state.get("seconds"),
        "best_step": state.get("best_step"),
    }


def _kept(saved: Sequence[Record], plan: Record) -> list[Record]:
    """Add to each checkpoint, of which the newest is first, why it stays."""
    best = saved[0].pop("best_step") if saved else None
    keep = plan["recipe"]["save"]["num_to_keep"] if plan else None
    told = []
    for place, one in enumerate(saved):
        recent = "newest" if place == 0 else "all are kept" if keep is None else f"one of the newest {keep}"
        why = ([recent] if keep is None or place < keep else []) + (["best"] if one["step"] == best else [])
        told.append({key: value for key, value in one.items() if key != "best_step"} | {"kept": why})
    return told


def _artifact(path: Path) -> Record:
    manifest = _try(path) or {}
    files = manifest.get("files") or {}
    come_from = manifest.get("lineage") or {}
    return {
        "name": path.parent.name,
        "exporter": (manifest.get("exporter") or {}).get("type"),
        "compression": [step.get("type") for step in manifest.get("compression") or []],
        "bytes": sum(entry.get("bytes", 0) for entry in files.values()),
        "files": len(files),
        "golden_difference": manifest.get("golden_difference"),
        "metrics": manifest.get("metrics") or {},
        "published": path.stat().st_mtime,
        "step": come_from.get("step"),
        "checkpoint": come_from.get("checkpoint"),
        "plan": come_from.get("plan"),
    }


def lineage(run_dir: Path, plan: Record, artifacts: Sequence[Record]) -> list[str]:
    """Return what came of what, a line for each link: artifact, checkpoint, plan, prepared data, model and rows."""
    links = []
    for one in artifacts:
        there = "" if (run_dir / "checkpoints" / str(one["checkpoint"])).is_dir() else " (no longer there)"
        links.append(f"artifacts/{one['name']} <- checkpoints/{one['checkpoint']}{there} <- plan {one['plan']}")
    if plan:
        recipe = plan["recipe"]
        links.append(f"plan {digest(identity(recipe))} <- recipe.yaml, raytx {plan['version']}")
        links.append(f"weights <- {origin(recipe['model'], seed=recipe['train']['seed'])}")
        if prepared := plan["prepared"]:
            there = "" if Path(prepared).is_dir() else " (no longer there; made again when it is needed)"
            links.append(f"samples <- prepared data {prepared}{there} <- {origin(recipe['data'])}")
    return links


# ------------------------------------------------------------------------------------------------------- compared


def compare(first: Path, second: Path) -> Record:
    """Return in what two runs differ, each part as {key: [of the first, of the second]}; equal values are left out."""
    plans = [_plan(run_dir) for run_dir in (first, second)]
    recipes = [{k: v for k, v in plan["recipe"].items() if k not in ("name", "storage_path")} for plan in plans]
    software = [_try(run_dir / "environment.json") or {} for run_dir in (first, second)]
    return {
        "runs": [first.name, second.name],
        "recipe": _differences(*recipes),
        "another_run": list(differences(identity(plans[0]["recipe"]), identity(plans[1]["recipe"]))),
        "other_data": plans[0].get("content") != plans[1].get("content"),
        "data": _differences(*(_data(plan) for plan in plans)),
        "plugins": _differences(*(plan["plugins"] for plan in plans)),
        "software": _differences(*({k: v for k, v in one.items() if k != "command"} for one in software)),
        "results": _paired(*(_results(run_dir) for run_dir in (first, second))),
    }


def _plan(run_dir: Path) -> Record:
    try:
        return _read(run_dir / PLAN) or _without_plan(run_dir)
    except UNREADABLE as error:
        raise RunError(f"{run_dir / PLAN}: cannot be read ({_gist(error)})") from None


def _without_plan(run_dir: Path) -> Record:
    what = "is a search; compare its trials, which are runs" if (run_dir / TRIALS).is_dir() else f"has no {PLAN}"
    raise RunError(f"{run_dir} {what}, so there is nothing to compare")


def _data(plan: Record) -> Record:
    return {"prepared data": plan.get("content"), "training samples": plan["num_samples"], "steps": plan["steps"]}


def _results(run_dir: Path) -> Record:
    """Return a run's last figures, by the names that they are shown under."""
    told, records = summary(run_dir), rows(run_dir / METRICS)
    steps = [row for row in records if row.get("kind") == "step"]
    held_out: Record = next((row for row in reversed(records) if row.get("kind") == "eval"), {})
    speeds = sorted(row["tokens_per_s"] for row in steps if "tokens_per_s" in row)
    saved = [_checkpoint(path) for path in checkpoint.complete(run_dir)[:1]]
    return {
        "state": told.state,
        "steps done": told.step,
        "training loss": steps[-1].get("loss") if steps else None,
        **{f"held-out {k}": v for k, v in held_out.items() if k not in ("kind", "step", "seconds", "time")},
        f"best {told.metric}": told.best,
        "at step": told.best_step,
        "tokens/s (median)": speeds[len(speeds) // 2] if speeds else None,
        "seconds of training": saved[0]["seconds"] if saved else None,
    }


def _differences(first: Any, second: Any) -> dict[str, list[Any]]:
    return {key: list(pair) for key, pair in differences(first, second).items()}


def _paired(first: Record, second: Record) -> dict[str, list[Any]]:
    return {key: [first.get(key), second.get(key)] for key in dict.fromkeys([*first, *second])}


# -------------------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> Record:
    """Return the mapping in a JSON file, an empty one where there is none; raise ValueError naming what is no JSON."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is damaged: it holds no mapping")
    return value


def _try(path: Path) -> Any:
    """Return a file's JSON, or None where it is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _tail(path: Path) -> list[Record]:
    """Return the records at the end of a metrics file, however long it is."""
    try:
        with open(path, "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return list(_records(lines[1:] if start else lines))


def _records(lines: Iterable[str]) -> Iterator[Record]:
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


def _last(tail: Sequence[Record], metric: str | None) -> float | None:
    values = (row.get(metric) for row in reversed(tail) if metric and row.get("kind") == "eval")
    return next((value for value in values if value is not None), None)


def size(directory: Path) -> int:
    """Return the bytes of the files below a directory; files that go away meanwhile count nothing."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _active(run_dir: Path) -> float:
    """Return when a run last wrote something that tells how far it is."""
    times = [0.0]
    for name in (METRICS, status.STATUS, PLAN, "checkpoints", "artifacts", "trials.json", OUTCOME, "."):
        with contextlib.suppress(OSError):
            times.append((run_dir / name).stat().st_mtime)
    return max(times[:-1]) or times[-1]


def _gist(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"something holds no {error}"
    return str(error) if isinstance(error, ValueError | RaytxError) else f"{type(error).__name__}: {error}"


def gist(error: str) -> str:
    """Return the first line of an error, where raytx says what happened."""
    return error.strip().partition("\n")[0]
