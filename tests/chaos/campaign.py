"""Kill runs by the hundred and write down what came of it: `python tests/chaos/campaign.py --kills 100`.

Every run is shot at a few times and then compared, bit by bit, with an unbroken run of its recipe. Kinds of kill and
phases are dealt from a deck that a seed shuffles, strategies take turns. Figures go to docs/chaos.json, of which
`python docs/make.py` makes the table in docs/reliability.md. Ends with code 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import audit
from job import ROOT, STEPS, STRATEGIES, Job
from killer import Aim, Kind, Shot, hunt, plan_shots

DECK: list[tuple[Kind, Aim]] = [
    *[("rank", "any")] * 4,
    *[("rank", "step")] * 2,
    *[("rank", "save")] * 3,
    *[("rank", "evaluation")] * 2,
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
"""What twenty-five kills are."""
STEPS_EACH = 8
"""Steps for each kill of a run, so that it is not over before it has had them all."""
STALL_S = 5
"""The stall limit of runs in which a rank is stopped; the usual one would only make them longer."""


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs under way are ended, too
    home = Path(tempfile.mkdtemp(prefix="rx"))
    campaign = Campaign(home, options, store=_store(home) if options.store else "")
    found: list[dict[str, Any]] = []
    before = json.loads(options.out.read_text())["campaigns"] if options.add else []
    try:
        for entry in campaign.runs():
            found.append(entry)
            print(_told(entry), flush=True)
            _write(options.out, [*before, _about(options) | {"runs": sorted(found, key=lambda entry: entry["run"])}])
    except (KeyboardInterrupt, SystemExit):
        campaign.end()
        os._exit(143)  # those who hunt would start their runs again
    finally:
        campaign.end()
    return int(any(entry["problems"] for entry in found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many; as many more as the last run takes")
    parser.add_argument("--each", type=int, default=5, help="kills of one run")
    parser.add_argument("--at-once", type=int, default=1, help="runs that go on side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the moments of kills")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "chaos.json", help="where the figures go")
    parser.add_argument("--store", action="store_true", help="keep the runs in a store, a server on loopback")
    parser.add_argument("--add", action="store_true", help="to the campaigns that are there, instead of replacing them")
    return parser.parse_args()


class Campaign:
    """Runs of one home, which are shot at until there are enough kills."""

    def __init__(self, home: Path, options: argparse.Namespace, *, store: str = "") -> None:
        self._home, self._options, self._store = home, options, store
        self._deck = _dealt(random.Random(options.seed))
        self._steps = max(STEPS, STEPS_EACH * options.each)
        self._jobs: list[Job] = []
        self._whole: dict[str, Job] = {}
        self._one_at_a_time = threading.Lock()

    def runs(self) -> Iterator[dict[str, Any]]:
        """Yield what came of each run, in the order in which they end."""
        done, number, each = 0, 0, self._options.each
        going: set[Future[dict[str, Any]]] = set()
        pool = ThreadPoolExecutor(self._options.at_once)
        while done < self._options.kills or going:
            while len(going) < self._options.at_once and done + len(going) * each < self._options.kills:
                shots = list(itertools.islice(self._deck, each))
                going.add(pool.submit(self._run, number, shots))
                number += 1
            over, going = wait(going, return_when=FIRST_COMPLETED)
            for run in over:
                done += len(run.result()["hits"])
                yield run.result()

    def end(self) -> None:
        """End what still runs, and remove everything."""
        for job in self._jobs:
            job.sweep()
        shutil.rmtree(self._home, ignore_errors=True)

    def _run(self, number: int, shots: list[tuple[Kind, Aim]]) -> dict[str, Any]:
        strategy = list(STRATEGIES)[number % len(STRATEGIES)]
        dice = random.Random(f"{self._options.seed} {number}")
        job = self._job(f"run-{number:03}", strategy, _values(shots), store=self._store)
        return {"run": number + 1, **shot_at(job, self._unbroken(strategy), plan_shots(dice, shots, steps=self._steps))}

    def _unbroken(self, strategy: str) -> Job:
        """Return the run that the others of a strategy are compared with; trained when first asked for."""
        with self._one_at_a_time:
            if strategy not in self._whole:
                self._whole[strategy] = self._trained(strategy)
            return self._whole[strategy]

    def _trained(self, strategy: str) -> Job:
        job = self._job(f"unbroken-{strategy.replace(' ', '-')}", strategy, {})
        if job.start().wait(timeout=600):
            raise RuntimeError(f"the unbroken run failed:\n{job.tail()}")
        return job

    def _job(self, name: str, strategy: str, values: dict[str, Any], store: str = "") -> Job:
        length = {} if self._steps == STEPS else {"train.steps": self._steps}
        self._jobs.append(Job(self._home, name, strategy, values | length, store=store))
        return self._jobs[-1]


def _store(home: Path) -> str:
    """Start a server that speaks S3, for as long as this process lives; return the URI of a storage on it."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    names = {"AWS_ACCESS_KEY_ID": "AKIARAYTXTESTONLY", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
    os.environ |= names | {"RAYTX_CACHE": str(home / "cache")}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    place = "endpoint_override={}:{}&scheme=http".format(*server.get_host_and_port())
    files, _ = fs.FileSystem.from_uri(f"s3://chaos?{place}&allow_bucket_creation=true")
    files.create_dir("chaos")
    return f"s3://chaos/runs?{place}"


def _dealt(dice: random.Random) -> Iterator[tuple[Kind, Aim]]:
    while True:
        yield from dice.sample(DECK, len(DECK))


def _values(shots: list[tuple[Kind, Aim]]) -> dict[str, Any]:
    return {"scaling.stall_s": STALL_S} if any(kind == "stop" for kind, _ in shots) else {}


def shot_at(job: Job, unbroken: Job, shots: Sequence[Shot]) -> dict[str, Any]:
    """Run a job through its shots, and say what they were, how it recovered and what it lost."""
    before, started = audit.shared_memory(), time.time()
    found = hunt(job, shots)
    problems = found.problems or audit.losses(job, unbroken)
    problems = [*problems, *audit.store(job), *audit.leftovers(job, before)]
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


def _about(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a reader must know of a campaign to judge its figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    about = {"date": time.strftime("%Y-%m-%d"), "commit": commit.strip(), "cpus": os.cpu_count()}
    about |= {"storage": "S3" if options.store else "directory"}
    about |= {"load": round(os.getloadavg()[2], 1), "at_once": options.at_once, "each": options.each}
    return about | {"seed": options.seed, "stall_s": STALL_S}


def _write(path: Path, campaigns: Sequence[Mapping[str, Any]]) -> None:
    """Write all campaigns, a run in each line."""
    told = []
    for campaign in campaigns:
        about = json.dumps({key: value for key, value in campaign.items() if key != "runs"})
        runs = ",\n".join(f"  {json.dumps(entry)}" for entry in campaign["runs"])
        told.append(f'{about[:-1]}, "runs": [\n{runs}\n]}}')
    path.write_text('{"campaigns": [\n' + ",\n".join(told) + "\n]}\n")


if __name__ == "__main__":
    sys.exit(main())
