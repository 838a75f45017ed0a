"""Runs, for people: a list, one in full, two side by side, and what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raytx.report import number, size_text
from raytx.runs import Record, Summary
from raytx.verify import Verdict

COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "bold red", "broken": "bold red"}
LEAST_DETAIL = 12
"""Columns that a detail needs beside its run; with less, those of what went wrong stand below the list."""


def as_json(value: Any) -> str:
    """Return JSON of what was found; a number that is not finite, which JSON does not know, becomes null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------- a list


def show_list(found: Sequence[Summary], console: Console, *, where: str) -> None:
    """Print a line for each run."""
    if not found:
        console.print(f"no runs below {where}", highlight=False, soft_wrap=True)
        return
    room = console.width - console.measure(_listed(found)).maximum - 2
    if room >= LEAST_DETAIL:
        console.print(_listed(found, room=room))
        return
    console.print(_listed(found))
    for one in found:
        if one.state in ("failed", "broken"):
            console.print(Text(f"{one.name}: {one.detail}", style="dim"), soft_wrap=False)


def _listed(found: Sequence[Summary], *, room: int = 0) -> Table:
    """Return the list as a table; with room for it, a last column says more of each run, cut to one line."""
    table = _table("name", "state", ">steps", ">last", ">best", "on", ">active", ">size", *([""] if room else []))
    for one in found:
        table.add_row(*_line(one), *([_cropped(one.detail, room)] if room else []))
    return table


def _line(one: Summary) -> list[Text | str]:
    done = f"{one.step or 0:,}/{one.steps:,}" if one.steps else "-" if one.step is None else f"{one.step:,}"
    return [
        Text(one.name),
        Text(one.state, style=COLOURS[one.state]),
        f"{done} trials" if one.kind == "search" else done,
        "-" if one.last is None else f"{one.metric} {number(one.last)}",
        "-" if one.best is None else f"{one.metric} {number(one.best)}" if one.kind == "search" else number(one.best),
        f"{one.strategy} x {one.workers}" if one.strategy else "-",
        f"{age(one.active)} ago" if one.active else "-",
        size_text(one.bytes),
    ]


def _cropped(text: str, room: int) -> Text:
    return Text(text if len(text) <= room else f"{text[: room - 1]}…", style="dim")


# ------------------------------------------------------------------------------------------------------------- one


def show_details(found: Record, console: Console) -> None:
    """Print all that a run tells, what an operator asks first on top."""
    _show_head(found, console)
    sections = [
        ("plan", _pairs(_plan_lines(found["plan"]))),
        ("trials", _trials(found["trials"])),
        ("attempts", _attempts(found["attempts"])),
        ("commands", _turns(found["turns"])),
        ("checkpoints", _checkpoints(found["checkpoints"])),
        ("artifacts", _artifacts(found["artifacts"])),
        ("what came of what", _lineage(found["lineage"])),
        ("software", _pairs(_software(found["environment"]))),
    ]
    for title, table in sections:
        if table.row_count:
            console.print(f"\n[bold]{title}[/]")
            console.print(table)


def _show_head(found: Record, console: Console) -> None:
    told = Summary(**found["summary"])
    state = f"[{COLOURS[told.state]}]{told.state}[/]" + (f": {escape(told.detail)}" if told.detail else "")
    console.print(f"[bold]{escape(told.name)}[/]  {state}", highlight=False, soft_wrap=True)
    console.print(escape(told.directory), style="dim", highlight=False, soft_wrap=True)
    unit = "trials" if told.kind == "search" else "steps"
    parts = [f"{told.step or 0:,} of {told.steps:,} {unit}"] if told.steps else []
    if told.best is not None:
        at = f" at step {told.best_step:,}" if told.best_step is not None else ""
        parts.append(f"best {told.metric} {number(told.best)}{at}")
    if told.last is not None:
        parts.append(f"last {told.metric} {number(told.last)}")
    if found["spent_s"]:
        parts.append(f"{duration(found['spent_s'])} of training up to the newest checkpoint")
    parts += [size_text(told.bytes), f"last active {age(told.active)} ago"]
    console.print("; ".join(parts), highlight=False, soft_wrap=True)


def _plan_lines(plan: Record) -> Record:
    if not plan:
        return {}
    size, trained = plan["parameters"], plan["trainable"]
    strategy = {key: value for key, value in plan["strategy"].items() if key != "type" and value is not None}
    layout = " x ".join(f"{n} {name.removesuffix('_size')}" for name, n in plan["layout"].items() if n > 1)
    batch = f"{plan['global_batch_size']} = {plan['micro_batch_size']} micro x {plan['gradient_accumulation_steps']} "
    optimizer = plan["optimizer"]
    return {
        "model": plan["model"] + f", {size:,} parameters" + (f", {trained:,} trained" if trained != size else ""),
        "data": plan["data"] + (f", {plan['samples']:,} samples" if plan["samples"] else ""),
        "strategy": f"{plan['strategy']['type']}, {layout.replace('_', ' ') or 'one worker'}{_settings(strategy)}",
        "batch": batch + "accumulation x data-parallel ranks",
        "optimizer": f"{optimizer['type']}, lr {optimizer['lr']:g}, {optimizer['schedule']}, {plan['precision']}",
        "metric": plan["metric"],
        "plugins": ", ".join(f"{name} {version}" for name, version in plan["plugins"].items()),
        "fingerprint": plan["fingerprint"],
    }


def _settings(strategy: Record) -> str:
    return "".join(f", {key}={json.dumps(value)}" for key, value in strategy.items() if value not in (False, {}, []))


def _trials(trials: Sequence[Record]) -> Table:
    metrics = list(dict.fromkeys(key for trial in trials for key in trial["metrics"] or {}))
    values = list(dict.fromkeys(key for trial in trials for key in trial.get("values") or {}))
    table = _table("trial", "state", *values, *(f">{name}" for name in metrics), "error")
    for trial in trials:
        shown = [number(trial.get("values", {}).get(key)) or "-" for key in values]
        scores = [number((trial["metrics"] or {}).get(key)) or "-" for key in metrics]
        error = (trial["error"] or "").partition("\n")[0]
        table.add_row(
            trial["id"], Text(trial["state"], COLOURS.get(trial["state"], "")), *shown, *scores, escape(error)
        )
    return table


def _attempts(attempts: Sequence[Record]) -> Table:
    table = _table("", ">steps", "since", ">for", "on", "and then")
    for place, one in enumerate(attempts):
        last = place == len(attempts) - 1
        known = one["since"] is not None and one["until"] is not None
        told = "; ".join(one["told"]) or ("" if last else "ended without a word")
        table.add_row(
            one["kind"],
            f"{one['from']:,} - {one['to']:,}",
            when(one["since"]),
            duration(one["until"] - one["since"]) if known else "-",
            _nodes(one),
            escape(told),
        )
    return table


def _nodes(attempt: Record) -> str:
    nodes = ", ".join(
        f"{count} on {escape(str(name))}" if name else str(count) for name, count in attempt["nodes"].items()
    )
    return nodes or "-"


def _turns(turns: Sequence[Record]) -> Table:
    table = _table("command", "at", "by", ">for", "outcome")
    for turn in turns:
        lasted = duration(turn["ended"] - turn["started"]) if turn.get("ended") else "-"
        by = f"pid {turn.get('pid')} on {turn.get('host')}"
        outcome = escape(turn["outcome"])
        table.add_row(escape(f"{turn.get('command')}"), when(turn.get("started")), escape(by), lasted, outcome)
    return table


def _checkpoints(checkpoints: Sequence[Record]) -> Table:
    table = _table("name", ">size", "committed", "held-out", "stays as")
    for one in checkpoints:
        name, kept = one["name"], ", ".join(one.get("kept", []))
        table.add_row(name, size_text(one["bytes"]), when(one["committed"]), _metrics(one["metrics"]), kept or "-")
    return table


def _artifacts(artifacts: Sequence[Record]) -> Table:
    table = _table("name", "format", "compression", ">size", "published", ">golden difference", "held-out", ">of step")
    for one in artifacts:
        table.add_row(
            one["name"],
            one["exporter"] or "?",
            ", ".join(map(str, one["compression"])) or "-",
            size_text(one["bytes"]),
            when(one["published"]),
            number(one["golden_difference"]) or "-",
            _metrics(one["metrics"]),
            number(one["step"]) or "-",
        )
    return table


def _metrics(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in metrics.items()) or "-"


def _lineage(links: Sequence[str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    for link in links:
        table.add_row(escape(link))
    return table


def _software(environment: Record) -> Record:
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    others = {key: environment[key] for key in ("python", "platform", "processor", "cpus") if environment.get(key)}
    return others | ({"packages": packages} if packages else {})


# ------------------------------------------------------------------------------------------------------------- two


def show_comparison(found: Record, console: Console) -> None:
    """Print what differs between two runs, and their figures side by side."""
    first, second = found["runs"]
    marks = {key for key in found["recipe"] if any(_within(key, other) for other in found["another_run"])}
    marks |= {"prepared data"} if found["other_data"] else set()
    told = "each could go on as the other: nothing that decides the numbers differs" if not marks else (
        "two different runs: what is marked * decides the numbers"
    )  # fmt: skip
    console.print(f"[bold]{escape(first)}[/] and [bold]{escape(second)}[/]: {told}", highlight=False, soft_wrap=True)
    for title in ("recipe", "data", "plugins", "software", "results"):
        if not (values := found[title]):
            continue
        table = _table("", first, second)
        for key, pair in values.items():
            table.add_row(f"{escape(key)}{' *' if key in marks else ''}", *(_value(value) for value in pair))
        console.print(f"\n[bold]{title}[/]")
        console.print(table)


def _within(key: str, other: str) -> bool:
    """Tell whether one dotted path is the other, or above or below it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _value(value: Any) -> str:
    if value is None:
        return "-"
    shown = number(value) if isinstance(value, int | float) and not isinstance(value, bool) else json.dumps(value)
    return escape(value if isinstance(value, str) else shown)


# --------------------------------------------------------------------------------------------------------- verified


def show_verdict(verdict: Verdict, console: Console) -> None:
    """Print a run's verdict: a line for the run, one for each problem, one for each note."""
    name = escape(verdict.directory)
    counts = {"checkpoint": verdict.checkpoints, "artifact": verdict.artifacts, "step": verdict.steps}
    looked = ", ".join(_counted(word, count) for word, count in counts.items())
    wrong = len(verdict.problems)
    mark = f"[bold red]{_counted('problem', wrong)}[/]" if wrong else "[green]ok[/]"
    console.print(f"{mark}  {name}  [dim]{looked}[/]", highlight=False, soft_wrap=True)
    for finding in verdict.problems:
        console.print(f"  [red]{escape(str(finding))}[/]", highlight=False, soft_wrap=True)
    for finding in verdict.notes:
        console.print(f"  [yellow]note[/] {escape(str(finding))}", highlight=False, soft_wrap=True)


def _counted(word: str, count: int) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


# ----------------------------------------------------------------------------------------------------------- pieces


def _table(*titles: str) -> Table:
    """Return a table without lines; a title that begins with > is of numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        right = title.startswith(">")
        table.add_column(title.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def _pairs(values: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(key, escape(str(value)))
    return table


def when(seconds: float | None) -> str:
    """Return a time of day as people read it, on this machine's clock."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def age(seconds: float) -> str:
    """Return how long ago a time was."""
    return duration(time.time() - seconds) if seconds else "-"


def duration(seconds: float) -> str:
    """Return a duration in its largest unit: 42 s, 3 min, 5.2 h, 12 d."""
    for unit, limit in (("s", 60), ("min", 60), ("h", 24)):
        if abs(seconds) < limit:
            return f"{seconds:.1f} {unit}" if unit == "h" else f"{max(seconds, 0):.0f} {unit}"
        seconds /= limit
    return f"{seconds:.0f} d"
