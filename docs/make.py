"""Write the generated parts of the docs: `python docs/make.py`, or `--check` to see whether they are current.

The matrix of strategies.md comes from tests/integration/parity_matrix.py (what is tried), from the plan (what is
refused, and why) and from docs/parity.json (what was measured):
RAYTX_RECORD_PARITY=docs/parity.json pytest tests/integration/test_parity.py

The tables of kills in reliability.md come from docs/chaos.json, which `make chaos` writes.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEASURED, KILLS = HERE / "parity.json", HERE / "chaos.json"
sys.path.insert(0, str(HERE.parent / "tests" / "integration"))

import parity_matrix as matrix  # noqa: E402

from raytx.errors import RecipeError  # noqa: E402
from raytx.plan import Plan, resolve, strategy_settings  # noqa: E402
from raytx.recipe import Recipe, parse  # noqa: E402

LIMIT = 1e-5
EXAMPLES = [
    ("ZeRO 1", {"type": "deepspeed", "stage": 1}, 2),
    ("ZeRO 2, optimizer state on the host", {"type": "deepspeed", "stage": 2, "offload_optimizer": "cpu"}, 2),
    ("ZeRO 3", {"type": "deepspeed", "stage": 3}, 2),
    ("ZeRO 1 with tensor parallelism", {"type": "deepspeed", "stage": 1, "tensor_parallel_size": 2}, 4),
    ("3D", {"type": "deepspeed-3d", "pipeline_parallel_size": 2, "tensor_parallel_size": 2}, 8),
]


def main(*, check: bool) -> int:
    """Write the pages, or return 1 when one is not what would be written."""
    old = {path: path.read_text(encoding="utf-8") for path in map(HERE.joinpath, PAGES)}
    new = {path: _written(text, PAGES[path.name]) for path, text in old.items()}
    if check:
        return int(new != old)
    for path, text in new.items():
        path.write_text(text, encoding="utf-8")
    return 0


def _written(text: str, sections: dict[str, Callable[[], str]]) -> str:
    for name, section in sections.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = mark.sub(_filled(section()), text)
    return text


def _filled(text: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}\n{text}\n\n{found[2]}"


def compatibility() -> str:
    """A row for each family, a column for each strategy; below it why pairs are refused."""
    cases = [case for case in matrix.CASES if case.everywhere]
    reasons: dict[str, list[str]] = {}
    lines = [_row("family", *(case.label for case in cases)), _row(*["---"] * (len(cases) + 1))]
    for family in matrix.FAMILIES:
        cells = []
        for case in cases:
            reason = _refusal(family, case)
            if reason is not None:
                reasons.setdefault(reason, []).append(f"{family.name} under {case.label}")
            cells.append("refused" if reason else _proven(family.name, case.label))
        lines.append(_row(f"{family.name} ({family.about})", *cells))
    notes = [f"- {', '.join(pairs)}: {reason}" for reason, pairs in reasons.items()]
    return "\n".join([*lines, "", "What is refused, in the words of `raytx plan`:", "", *notes])


def differences() -> str:
    """The largest relative difference to one process at any of twenty steps: loss / gradient norm."""
    measured = _measured()
    cases = [case.label for case in matrix.CASES if case.everywhere]
    lines = [_row("family", *cases), _row(*["---"] * (len(cases) + 1))]
    for family in matrix.FAMILIES:
        lines.append(_row(family.name, *(_far(measured.get(family.name, {}).get(label)) for label in cases)))
    others = [case.label for case in matrix.CASES if not case.everywhere]
    lines += ["", "With our own decoder alone:", "", _row("strategy", "workers", "loss / norm"), _row(*["---"] * 3)]
    own = measured.get(matrix.FAMILIES[0].name, {})
    workers = {case.label: str(case.workers) for case in matrix.CASES}
    return "\n".join([*lines, *(_row(label, workers[label], _far(own.get(label))) for label in others)])


def settings() -> str:
    """What `raytx plan` shows of DeepSpeed's settings, one example of each."""
    parts = []
    for title, strategy, workers in EXAMPLES:
        plan = _plan(strategy, workers)
        generated = {key: value for key, (value, _) in strategy_settings(plan).items()}
        words = ", ".join(f"{key}: {value}" for key, value in strategy.items())
        shown = json.dumps(generated, indent=2)
        parts.append(f"### {title}\n\n`strategy: {{{words}}}` on {workers} workers\n\n```json\n{shown}\n```")
    return "\n\n".join(parts)


def kills() -> str:
    """A row for each kind of kill: how many, and how long the runs took to go on."""
    lines = [_row("killed", "times", "next step after, s: median", "95 %", "longest"), _row("---", *["--:"] * 4)]
    for kind, name in KILLED.items():
        hits = [hit for hit in _hits() if hit["kind"] == kind]
        lines.append(_row(name, str(len(hits)), *_spread(hits)))
    workers = [hit for hit in _hits() if hit["kind"] in IN_PLACE]
    return "\n".join([*lines, _row("**rank or fork server**", str(len(workers)), *_spread(workers))])


def kills_by_phase() -> str:
    """What the run was doing, and how often it was hit in that."""
    found = Counter(hit["phase"] for hit in _hits())
    return "\n".join(
        [_row("phase", "kills"), _row("---", "--:"), *(_row(name, str(count)) for name, count in found.most_common())]
    )


def kills_by_strategy() -> str:
    """A row for each strategy: runs and kills, and in how many of them anything was lost, or left behind."""
    lines = [_row("strategy", "runs", "kills", "runs that lost or left anything"), _row("---", *["--:"] * 3)]
    for strategy in dict.fromkeys(run["strategy"] for run in _runs()):
        runs = [run for run in _runs() if run["strategy"] == strategy]
        lost = sum(bool(run["problems"]) for run in runs)
        lines.append(_row(strategy, *map(str, (len(runs), sum(len(run["hits"]) for run in runs), lost))))
    hits, lost = len(_hits()), sum(bool(run["problems"]) for run in _runs())
    return "\n".join([*lines, _row("**all**", str(len(_runs())), str(hits), str(lost))])


def campaigns() -> str:
    """A row for each campaign: when, of which code, how many, and how busy the machine was."""
    head = ("date", "commit", "storage", "runs", "side by side", "kills", "load average at the end", "seed")
    lines = [_row(*head), _row(*["---"] * 3, *["--:"] * 5)]
    for one in _campaigns():
        runs, kills = len(one["runs"]), sum(len(run["hits"]) for run in one["runs"])
        told = (runs, one["at_once"], kills, one["load"], one["seed"])
        lines.append(_row(one["date"], one["commit"], one["storage"], *map(str, told)))
    return "\n".join(lines)


KILLED = {
    "rank": "rank",
    "stop": "rank, by SIGSTOP",
    "server": "fork server",
    "worker": "Ray Train worker",
    "supervisor": "supervisor",
    "controller": "Ray Train's controller",
    "driver": "`raytx train`",
    "raylet": "raylet",
    "gcs": "GCS",
}
"""Kinds of kill in words."""
IN_PLACE = frozenset({"rank", "server"})
"""Kills after which ranks are forked anew and all else stays."""


def _spread(hits: list[dict[str, Any]]) -> tuple[str, str, str]:
    seconds = sorted(hit["recovery_s"] for hit in hits if hit["recovery_s"] is not None)
    if not seconds:
        return "-", "-", "-"
    high = seconds[math.ceil(0.95 * len(seconds)) - 1]
    return f"{statistics.median(seconds):.1f}", f"{high:.1f}", f"{seconds[-1]:.1f}"


def _hits() -> list[dict[str, Any]]:
    return [hit for run in _runs() for hit in run["hits"]]


def _runs() -> list[dict[str, Any]]:
    return [run for campaign in _campaigns() for run in campaign["runs"]]


def _campaigns() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(KILLS.read_text(encoding="utf-8"))["campaigns"]
    return found


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "strategies.md": {"compatibility": compatibility, "differences": differences, "settings": settings},
    "reliability.md": {
        "campaigns": campaigns,
        "kills": kills,
        "kills by phase": kills_by_phase,
        "kills by strategy": kills_by_strategy,
    },
}
"""The generated parts of each page."""


def _refusal(family: matrix.Family, case: matrix.Case) -> str | None:
    values = matrix.values(family, case)
    if "data" in values:
        values["data"] = {**values["data"], "path": str(HERE / "parity.json")}  # any file will do: none is read
    try:
        resolve(_recipe().override(values))
    except RecipeError as error:
        return str(error)
    return None


def _proven(family: str, label: str) -> str:
    """Only what was measured, and near enough, is said to work."""
    far = _measured().get(family, {}).get(label)
    if far is None or not max(far.values()) <= LIMIT:
        raise SystemExit(f"{MEASURED}: {family} under {label} is neither refused nor measured within {LIMIT:.0e}")
    return "works"


def _measured() -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def _plan(strategy: dict[str, object], workers: int) -> Plan:
    return resolve(_recipe().override({"strategy": strategy, "scaling.num_workers": workers}))


def _recipe() -> Recipe:
    return parse(
        {
            "name": "docs",
            "model": matrix.DECODER,
            "data": {"type": "text-files", "path": str(HERE)},
            "strategy": {"type": "single"},
            "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "max_length": 32},
        }
    )


def _far(pair: dict[str, float] | None) -> str:
    return f"{pair['loss']:.0e} / {pair['grad_norm']:.0e}" if pair else "-"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
