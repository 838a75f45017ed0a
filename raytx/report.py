"""The report: one HTML page that shows a run from its files alone, and asks nothing of the network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from raytx.files import read_json, write_text
from raytx.layout import Layout

REPORT = "report.html"
MAX_POINTS = 1000
"""Points of a curve that are drawn; longer runs are averaged in groups, so that the page stays small."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run directory tells. Any part may be missing: the run may have been killed early."""

    name: str
    plan: Record = field(default_factory=dict)
    steps: list[Record] = field(default_factory=list)
    """One record a step; of a step done again after a restart, the last."""
    evaluations: list[Record] = field(default_factory=list)
    baselines: list[Record] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    """Node of each rank of the last attempt."""
    environment: Record = field(default_factory=dict)
    parity: Any = None
    compression: Any = None
    artifacts: list[Record] = field(default_factory=list)


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory and return its path."""
    path = Path(run_dir) / REPORT
    write_text(path, page(read_run(Path(run_dir))))
    return path


# ------------------------------------------------------------------------------------------------------- reading


def read_run(run_dir: Path) -> Run:
    """Read what there is of a run."""
    records = list(_lines(run_dir / "metrics.jsonl"))
    return Run(
        name=run_dir.name,
        plan=_json(run_dir / "plan.json") or {},
        steps=_by_step(records, "step"),
        evaluations=_by_step(records, "eval"),
        baselines=[record for record in records if record.get("kind") == "baseline"],
        nodes=next((record["nodes"] for record in reversed(records) if record.get("kind") == "placed"), []),
        resumed=[record["step"] for record in records if record.get("kind") == "resumed" and "step" in record],
        environment=_json(run_dir / "environment.json") or {},
        parity=_json(run_dir / "parity.json"),
        compression=_json(run_dir / "compression.json"),
        artifacts=[_artifact(path) for path in sorted(run_dir.glob("artifacts/*/artifact.json"))],
    )


def _json(path: Path) -> Any:
    """Return a file's JSON; None where it is missing or was cut short."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> Iterator[Record]:
    """Yield the whole records of a file of JSON lines; a killed run leaves the last one cut short."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _by_step(records: Iterable[Record], kind: str) -> list[Record]:
    last = {record["step"]: record for record in records if record.get("kind") == kind and "step" in record}
    return [last[step] for step in sorted(last)]


def _artifact(path: Path) -> Record:
    manifest = _json(path) or {}
    files = manifest.get("files") or {}
    return {
        "artifact": path.parent.name,
        "format": (manifest.get("exporter") or {}).get("type"),
        "compression": ", ".join(step.get("type", "?") for step in manifest.get("compression") or []) or None,
        "files": len(files),
        "size": size_text(sum(entry.get("bytes", 0) for entry in files.values())),
        "golden difference": manifest.get("golden_difference"),
        **{key: value for key, value in (manifest.get("metrics") or {}).items() if _is_number(value)},
    }


# ------------------------------------------------------------------------------------------------------- writing


def page(run: Run) -> str:
    """Return the whole HTML page of a run."""
    sections = [
        ("Curves", _curves(run)),
        ("Evaluation", _table(_evaluation_rows(run))),
        ("Parity of strategies: largest relative differences", _table(_rows(run.parity, "strategy"))),
        ("Compression", _table(_rows(run.compression, "step"))),
        ("Artifacts", _table(run.artifacts)),
        ("Plan", _plan(run.plan)),
        ("Ranks", _table(_ranks(run))),
        ("Recipe", _recipe(run.plan)),
        ("Environment", _table(_pairs(run.environment))),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections if content)
    title = escape(str(_dig(run.plan, "recipe", "name") or run.name))
    return PAGE.format(title=title, style=STYLE, lead=_lead(run), tiles=_tiles(run), body=body)


def _lead(run: Run) -> str:
    """Return the line below the title: what was trained on what, and how far it came."""
    kinds = ("model", "data", "strategy")
    parts = [f"{kind} <b>{escape(str(_dig(run.plan, 'recipe', kind, 'type')))}</b>" for kind in kinds if run.plan]
    if run.steps:
        done, planned = run.steps[-1]["step"] + _offset(run), run.plan.get("steps")
        parts.append(f"{done} of {planned} steps" if planned else f"{done} steps")
    else:
        parts.append("no step was recorded")
    if run.resumed:
        parts.append("resumed at step " + ", ".join(str(step) for step in run.resumed))
    return " · ".join(parts)


def _offset(run: Run) -> int:
    """Return 1 where records count steps from 0, so that the number of steps done is shown right."""
    return 1 if run.steps[0]["step"] == 0 else 0


def _tiles(run: Run) -> str:
    """Return the figures that a reader looks for first."""
    figures: list[tuple[str, Any]] = []
    if run.steps:
        figures.append(("train loss", _last(run.steps, "loss")))
    if run.evaluations:
        figures.append(("held-out loss", _last(run.evaluations, "loss")))
        metric = run.plan.get("metric")
        if metric and metric != "loss":
            figures.append((f"held-out {metric}", _last(run.evaluations, metric)))
    figures += [(record.get("name", "baseline"), record.get("loss")) for record in run.baselines]
    speeds = [value for _, value in _points(run.steps, "tokens_per_s")]
    figures.append(("tokens/s (median)", round(median(speeds)) if speeds else None))
    figures.append(("parameters", _dig(run.plan, "size", "parameters")))
    tiles = (
        f"<div><dt>{escape(str(name))}</dt><dd>{number(value)}</dd></div>"
        for name, value in figures
        if value is not None
    )
    return "".join(tiles)


def _evaluation_rows(run: Run) -> list[Record]:
    """Return the evaluations, and below them what the model had to beat."""
    named = [{**record, "step": record.get("name", "baseline")} for record in run.baselines]
    hidden = {"kind", "name", "time", "seconds"}
    return [{key: value for key, value in row.items() if key not in hidden} for row in (*run.evaluations, *named)]


def _plan(plan: Record) -> str:
    if not plan:
        return ""
    layout = plan.get("layout") or {}
    batch = {
        "global batch": _dig(plan, "recipe", "train", "global_batch_size"),
        "micro batch": _dig(plan, "recipe", "train", "micro_batch_size"),
        "accumulation": plan.get("gradient_accumulation_steps"),
        **{key.replace("_", " "): value for key, value in layout.items()},
    }
    memory = _largest_stage(plan.get("memory") or [])
    held = _table([{"a rank holds, by estimate": name, "bytes": value} for name, value in memory.items()])
    return f'<div class="pair">{_table(_pairs(batch))}{held}</div>'


def _ranks(run: Run) -> list[Record]:
    """Return where each rank of the last attempt ran, and its place in the grid."""
    layout = Layout(**(run.plan.get("layout") or {}))
    copies, rest = divmod(len(run.nodes), layout.ranks_per_replica)  # an elastic run may be on fewer than its plan
    if rest or not copies:
        return []
    layout = replace(layout, data_parallel_size=copies)
    used = {name for name, count in asdict(layout).items() if count > 1}
    return [
        {"node": node, "rank": str(rank)}
        | {name: str(at) for name, at in asdict(layout.coordinate(rank)).items() if f"{name}_parallel_size" in used}
        for rank, node in enumerate(run.nodes)
    ]


def _largest_stage(memory: Sequence[Record]) -> dict[str, str]:
    """The rank that holds most is the one that must fit."""
    largest = max(memory, key=lambda stage: sum(stage.values()), default={})
    return {name: size_text(value) for name, value in largest.items()}


def _recipe(plan: Record) -> str:
    import yaml

    if "recipe" not in plan:
        return ""
    text = yaml.safe_dump(plan["recipe"], sort_keys=False, allow_unicode=True)
    return f"<details><summary>every value, defaults included</summary><pre>{escape(text)}</pre></details>"


# -------------------------------------------------------------------------------------------------------- tables


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return an HTML table with a column for every key of the rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row if any(r.get(key) is not None for r in rows)))
    if not columns:
        return ""
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(column)) for column in columns) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    return f'<td class="n">{number(value)}</td>' if _is_number(value) else f"<td>{_text(value)}</td>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _pairs(values: Mapping[str, Any]) -> list[Record]:
    """Return a mapping as rows of name and value, inner mappings by dotted name."""
    rows: list[Record] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += [{"": f"{key}.{row['']}", "value": row["value"]} for row in _pairs(value)]
        else:
            rows.append({"": key, "value": value})
    return rows


def _rows(value: Any, name: str) -> list[Record]:
    """Return rows from a list of mappings, or from a mapping of names to mappings or single values."""
    if isinstance(value, list):
        return [dict(row) if isinstance(row, Mapping) else {name: row} for row in value]
    if isinstance(value, Mapping):
        return [{name: key, **(v if isinstance(v, Mapping) else {"value": v})} for key, v in value.items()]
    return []


def number(value: Any) -> str:
    """Return a number as people read it: 1,234,567 or 0.002130 or 3.10e-07; other values as they are."""
    if not _is_number(value):
        return _text(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:#,.4g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.2e}"


def size_text(count: float) -> str:
    """Return bytes as people read them: 512 B, 3.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _last(records: Sequence[Record], key: str) -> Any:
    return next((record[key] for record in reversed(records) if record.get(key) is not None), None)


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


# -------------------------------------------------------------------------------------------------------- curves

INK, MUTED, GRID, FIRST, SECOND, THIRD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
"""Placeholders that matplotlib draws in; the page's own colours take their place, light or dark."""
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", THIRD: "third"}

Point = tuple[float, float]


def _curves(run: Run) -> str:
    """Return the plots for which there are points."""
    plots: list[tuple[str, Callable[[Any], None]]] = [
        ("Loss", lambda axes: _loss(axes, run)),
        ("Gradient norm, before clipping", lambda axes: _line(axes, _points(run.steps, "grad_norm"), FIRST)),
        ("Learning rate", lambda axes: _line(axes, _points(run.steps, "lr"), FIRST)),
        ("Throughput, tokens/s", lambda axes: _speed(axes, run)),
    ]
    present = [bool(run.steps or run.evaluations), *(bool(_points(run.steps, k)) for k in ("grad_norm", "lr"))]
    present.append(bool(_points(run.steps, "tokens_per_s") or _points(run.steps, "samples_per_s")))
    figures = (
        f"<figure><figcaption>{escape(title)}</figcaption>{_svg(title, draw, run.resumed)}</figure>"
        for (title, draw), there in zip(plots, present, strict=True)
        if there
    )
    return f'<div class="plots">{content}</div>' if (content := "".join(figures)) else ""


def _loss(axes: Any, run: Run) -> None:
    _line(axes, _points(run.steps, "loss"), FIRST, label="training")
    _line(axes, _points(run.evaluations, "loss"), SECOND, label="held out", marker="o")
    for record in run.baselines:
        if _is_number(record.get("loss")):
            axes.axhline(record["loss"], color=THIRD, linewidth=1, linestyle="--", label=record.get("name", "baseline"))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _speed(axes: Any, run: Run) -> None:
    key = "tokens_per_s" if _points(run.steps, "tokens_per_s") else "samples_per_s"
    _line(axes, _points(run.steps, key), FIRST)
    axes.set_ylim(bottom=0)


def _line(axes: Any, points: Sequence[Point], color: str, *, label: str | None = None, marker: str = "") -> None:
    if points:
        steps, values = zip(*thinned(points), strict=True)
        single = "o" if len(points) == 1 else marker
        axes.plot(steps, values, color=color, linewidth=1.4, label=label, marker=single, markersize=4)


def _points(records: Iterable[Record], key: str) -> list[Point]:
    """Return (step, value) where there is a finite value."""
    return [(r["step"], r[key]) for r in records if _is_number(r.get(key)) and math.isfinite(r[key])]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most MAX_POINTS points: the means of groups of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    if not groups:
        return list(points)
    return [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]


def _svg(title: str, draw: Callable[[Any], None], resumed: Sequence[int]) -> str:
    """Return one plot as an <svg> element whose colours are the page's CSS variables."""
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        _dress(axes, resumed)
        text = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=none)
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for color, name in VARIABLES.items():
        drawn = drawn.replace(color, f"var(--{name})")
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _dress(axes: Any, resumed: Sequence[int]) -> None:
    """Leave only what helps reading: a light grid, no box, and a mark where the run was taken up again."""
    for step in resumed:
        axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=":")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.set_xlabel("step", color=MUTED)


# --------------------------------------------------------------------------------------------------------- style

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --muted: #69707a; --grid: #e4e6ea; --paper: #ffffff; --panel: #f7f8fa;
  --first: #2b6cb0; --second: #c05621; --third: #2f855a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --muted: #9aa1ab; --grid: #31363e; --paper: #16181c;
  --panel: #1d2025; --first: #7ab3ea; --second: #f0a36b; --third: #7fcfa2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 3rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 2rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.15;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 .9rem; font-size: 1.05rem; font-weight: 600; }
section { margin-top: 2.6rem; }
.lead { margin: .5rem 0 0; color: var(--muted); }
.lead b { color: var(--ink); font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.8rem 0 0; }
dl div { background: var(--panel); border: 1px solid var(--grid); border-radius: .5rem; padding: .7rem .9rem; }
dt { color: var(--muted); font-size: .8rem; line-height: 1.3; }
dd { margin: .2rem 0 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; border: 1px solid var(--grid); border-radius: .5rem; padding: .9rem 1rem .5rem; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--muted); font-weight: 500; font-size: .85rem; }
td.n { font-feature-settings: "tnum"; }
summary { cursor: pointer; color: var(--muted); }
pre { margin: .8rem 0 0; padding: 1rem 1.2rem; background: var(--panel); border: 1px solid var(--grid);
  border-radius: .5rem; overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { body { padding: 0; } section { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="lead">{lead}</p><dl>{tiles}</dl></header>
{body}
</body>
</html>
"""
