"""One run of `raytx train`, started as a user starts it: its recipe, its processes, and how far it is."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from raytx import storage

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MARK = "RAYTX_CHAOS"
"""Variable by whose value all processes of a run are known, whoever their parents are by then."""
STEPS = 48
ROWS = "import os\n\ndef f{0}(x):\n    '''Return x plus {0}.'''\n    return x + {0}\n" * 3

STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {
    "single": ({"type": "single"}, 1),
    "ddp": ({"type": "ddp"}, 2),
    "fsdp": ({"type": "fsdp"}, 2),
    "zero 1": ({"type": "deepspeed", "stage": 1}, 2),
    "zero 2": ({"type": "deepspeed", "stage": 2}, 2),
    "zero 3": ({"type": "deepspeed", "stage": 3}, 2),
    "3d 1x2x2": ({"type": "deepspeed-3d", "pipeline_parallel_size": 2, "tensor_parallel_size": 2}, 4),
}
"""Strategy and number of workers by label."""


class Now(NamedTuple):
    """What a rank does at this moment."""

    pid: int
    phase: str
    step: int
    """Optimizer updates done."""
    time: float


@dataclass(frozen=True)
class Job:
    """A run of its own name, in a home that it may share with others of its data."""

    home: Path
    name: str
    strategy: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """Dotted recipe values that differ from the usual."""
    plugins: Sequence[Path] = ()
    """Modules that its processes load besides: bugs to be found."""
    store: str = ""
    """The URI of a storage, where it is no directory."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def storage_path(self) -> str:
        return self.store or str(self.home / "storage")

    @functools.cached_property
    def run_dir(self) -> Path:
        """Where it is worked on; for a store, in this machine's cache."""
        return storage.directory(self.storage_path) / self.name

    @property
    def probe(self) -> Path:
        """Where its ranks tell what they do; probe.py knows."""
        return self.run_dir.parent.parent / "probe" / self.name

    @property
    def output(self) -> Path:
        return self.home / f"{self.name}.out"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command, the same every time."""
        recipe = self.home / f"{self.name}.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(self)))
        with open(self.output, "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "raytx", "train", str(recipe), *(f"{k}={v}" for k, v in self.values.items())],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """Ours, with the mark, short paths for Ray's sockets and the probe among the plugins."""
        path = [_installed(module, self.home / "plugins") for module in (HERE / "probe.py", *self.plugins)]
        temporary = self.home / "t"
        temporary.mkdir(exist_ok=True)
        return os.environ | {
            MARK: self.mark,
            "RAY_TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")]),
        }

    def processes(self) -> dict[int, str]:
        """Return {pid: command line} of all that is left of this run's processes, wherever they hang."""
        return dict(marked(self.mark))

    def ranks(self) -> dict[int, Now]:
        """Return what each rank whose process lives is doing."""
        found = {}
        for path in sorted(self.probe.glob("rank-*.now")):
            words = path.read_text().split()
            if len(words) == 4 and alive(pid := int(words[0]), self.mark):
                found[int(path.stem.removeprefix("rank-"))] = Now(pid, words[1], int(words[2]), float(words[3]))
        return found

    def done(self, rank: int = 0) -> list[dict[str, Any]]:
        """Return every step that a rank did, in the order of doing, those done again included."""
        path = self.probe / f"rank-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def tail(self, lines: int = 15) -> str:
        """Return the end of what the command said."""
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-lines:])

    def sweep(self) -> None:
        """End every process that is left of this run."""
        for pid in self.processes():
            kill(pid, signal.SIGKILL)


def recipe_of(job: Job) -> dict[str, Any]:
    """Return a tiny recipe with dropout, several epochs, and frequent saves and evaluations."""
    strategy, workers = STRATEGIES[job.strategy]
    return {
        "name": job.name,
        "storage_path": job.storage_path,
        "model": {
            "type": "hf",
            "task": "causal-lm",
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
                "vocab_size": 320,
                "max_position_embeddings": 64,
                "attention_dropout": 0.1,  # or no random number would be drawn that could be lost
            },
            "tokenizer": {"train": "bpe", "vocab_size": 320},
        },
        "data": {"type": "text-files", "path": str(corpus(job.home)), "split": {"test": 0.2}},
        "strategy": strategy,
        "optim": {"lr": 2e-3, "weight_decay": 0.1, "warmup": 3, "schedule": "cosine", "max_grad_norm": 0.5},
        "train": {
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "max_length": 32,
            "seed": 3,
            "ledger": True,
        },
        "evaluate": {"every": 6},
        "save": {"every": 4},
        "scaling": {"num_workers": workers, "resources_per_worker": {"CPU": 0.25}, "max_failures": 100},
    }


def corpus(home: Path) -> Path:
    """Make some small source files, of which an epoch is a few steps."""
    directory = home / "corpus"
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(24):
        path = directory / f"file{number:02}.txt"
        if not path.is_file():
            path.write_text(ROWS.format(number))
    return directory


def marked(mark: str) -> Iterator[tuple[int, str]]:
    """Yield (pid, command line) of the processes that were started with a mark and live."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name), mark):
            try:
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue


def alive(pid: int, mark: str) -> bool:
    """Tell whether a process with a mark lives; one that only waits to be reaped does not."""
    try:
        if f"{MARK}={mark}".encode() not in Path(f"/proc/{pid}/environ").read_bytes():
            return False
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parent(pid: int) -> int:
    """Return the process id of a process's parent; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill(pid: int, number: int) -> bool:
    """Send a signal; tell whether the process was there to get it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _installed(module: Path, directory: Path) -> Path:
    """Make a module a plugin that is found by its entry point, and return the directory for the path."""
    name = f"raytx_chaos_{module.stem}"
    target = directory / name
    metadata = target / f"{name}-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (target / f"{name}.py").write_text(module.read_text())
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[raytx]\nzz_{name} = {name}\n")
    return target
