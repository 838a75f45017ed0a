"""Kill runs by the hundred and write down what came of it: `python tests/chaos/campaign.py --kills 100`.

Every run is shot at a few times and then compared, bit by bit, with an unbroken run of its recipe. Kinds of kill and
phases are dealt from a deck that a seed shuffles, strategies take turns. Figures go to docs/chaos.json, of which
`python docs/make.py` makes the table in docs/reliability.md. Ends with code 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audit
from job import ROOT, STRATEGIES, Job
from killer import Aim, Kind, hunt, plan_shots

DECK: list[tuple[Kind, Aim]] = [
    *[("rank", "any")] * 2,
    ("rank", "step"),
    *[("rank", "save")] * 2,
    ("rank", "evaluation"),
    ("rank", "restart"),
    ("worker", "any"),
    ("worker", "save"),
    ("worker", "restart"),
    ("server", "any"),
    ("supervisor", "any"),
    ("supervisor", "evaluation"),
    ("controller", "any"),
    ("driver", "any"),
    ("driver", "save"),
    ("driver", "start"),
    ("raylet", "any"),
    ("gcs", "any"),
    ("stop", "any"),
]
"""What twenty kills are."""
EACH = 5
"""Kills of one run."""
STALL_S = 5
"""The stall limit of runs in which a rank is stopped; the usual one would only make them longer."""


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way is ended, too
    home = Path(tempfile.mkdtemp(prefix="rx"))
    found: list[dict[str, Any]] = []
    try:
        for entry in campaign(home, kills=options.kills, seed=options.seed):
            found.append(entry)
            print(_told(entry), flush=True)
            _write(options.out, found, seed=options.seed)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return int(any(entry["problems"] for entry in found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many; as many more as the last run takes")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the moments of kills")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "chaos.json", help="where the figures go")
    return parser.parse_args()


def campaign(home: Path, *, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what came of each run until so many kills are done."""
    dice = random.Random(seed)
    wanted = _deal(dice)
    unbroken: dict[str, Job] = {}
    done = number = 0
    while done < kills:
        strategy = list(STRATEGIES)[number % len(STRATEGIES)]
        if strategy not in unbroken:
            unbroken[strategy] = _trained(home, strategy)
        shots = [next(wanted) for _ in range(EACH)]
        entry = shot_at(Job(home, f"run-{number:03}", strategy, _values(shots)), unbroken[strategy], dice, shots)
        done, number = done + len(entry["hits"]), number + 1
        yield {"run": number, **entry}


def _deal(dice: random.Random) -> Iterator[tuple[Kind, Aim]]:
    while True:
        yield from dice.sample(DECK, len(DECK))


def _values(shots: list[tuple[Kind, Aim]]) -> dict[str, Any]:
    return {"scaling.stall_s": STALL_S} if any(kind == "stop" for kind, _ in shots) else {}


def _trained(home: Path, strategy: str) -> Job:
    job = Job(home, f"unbroken-{strategy.replace(' ', '-')}", strategy)
    if job.start().wait(timeout=600):
        sys.exit(f"the unbroken run failed:\n{job.tail()}")
    return job


def shot_at(job: Job, unbroken: Job, dice: random.Random, shots: list[tuple[Kind, Aim]]) -> dict[str, Any]:
    """Run a job through its shots, and say what they were, how it recovered and what it lost."""
    before, started = audit.shared_memory(), time.time()
    found = hunt(job, plan_shots(dice, shots))
    problems = found.problems or audit.losses(job, unbroken)
    problems = [*problems, *audit.leftovers(job, before)]
    if not problems:
        shutil.rmtree(job.run_dir)
    return {
        "strategy": job.strategy,
        "starts": found.starts,
        "seconds": round(time.time() - started, 1),
        "hits": [hit.to_dict() for hit in found.hits],
        "problems": problems,
    }


def _told(entry: dict[str, Any]) -> str:
    hits = "; ".join(f"{h['kind']} during {h['phase']} at {h['step']}: {h['recovery_s']} s" for h in entry["hits"])
    end = "; ".join(entry["problems"]) or "nothing lost"
    return f"run {entry['run']} ({entry['strategy']}, {entry['seconds']:.0f} s): {hits}. {end}"


def _write(path: Path, found: list[dict[str, Any]], *, seed: int) -> None:
    """Write all runs, one a line."""
    runs = ",\n".join(f"  {json.dumps(entry)}" for entry in found)
    about = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "seed": seed, "stall_s": STALL_S}
    path.write_text(f'{{"about": {json.dumps(about)},\n"runs": [\n{runs}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
