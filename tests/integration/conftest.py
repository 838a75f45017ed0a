"""A tiny real recipe, and process groups of several ranks on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raytx import worker
from raytx.plan import CACHE, Plan, resolve
from raytx.prepare import prepare
from raytx.recipe import Recipe, parse

RANK = Path(__file__).with_name("rank.py")
ROWS = "import os\n\ndef f{0}(x):\n    '''Return x plus {0}.'''\n    return x + {0}\n" * 3


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small source files."""
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (directory / f"file{number:02}.txt").write_text(ROWS.format(number))
    return directory


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data that all runs share."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A storage path for the runs of one file of tests: a name of theirs must not meet another file's run."""
    directory = tmp_path_factory.mktemp("runs")
    (directory / CACHE).symlink_to(shared_cache)
    return directory


@pytest.fixture(scope="module")
def recipe(corpus: Path, storage: Path) -> Callable[..., Recipe]:
    """Make a recipe of a tiny decoder, with dotted values replaced."""

    def make(name: str, **values: Any) -> Recipe:
        plain = {
            "name": name,
            "storage_path": str(storage),
            "model": {
                "type": "decoder",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 64,
                "vocab_size": 320,
                "tokenizer": {"train": "bpe", "vocab_size": 320},
            },
            "data": {"type": "text-files", "path": str(corpus), "split": {"test": 0.2}},
            "strategy": {"type": "single"},
            "optim": {"lr": 5e-3, "weight_decay": 0.1, "warmup": 3, "schedule": "cosine", "max_grad_norm": 0.5},
            "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "max_length": 32, "seed": 3},
        }
        return parse(plain).override({key.replace("__", "."): value for key, value in values.items()})

    return make


@pytest.fixture
def train_here() -> Callable[..., tuple[worker.State, list[dict[str, Any]]]]:
    """Train a recipe of one worker in this process; return the final state and what was logged."""

    def run(recipe: Recipe) -> tuple[worker.State, list[dict[str, Any]]]:
        log: list[dict[str, Any]] = []
        session = worker.Session(rank=0, log=log.append, flush=lambda: None, report=lambda metrics: None)
        return worker.train(prepared(recipe), session), log

    return run


def prepared(recipe: Recipe) -> Plan:
    return prepare(resolve(recipe), Console(quiet=True))[0]


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[list[dict[str, Any]]]]:
    """Train recipes of one world size, one after the other, in one group of rank processes; return what each logged.

    `on` is the number of ranks where the recipes have a range of them; `omitted` has for each a step that it does not
    do, or 0.
    """

    def run(
        recipes: Sequence[Recipe], *, on: int | None = None, omitted: Sequence[int] | None = None
    ) -> list[list[dict[str, Any]]]:
        directory = tmp_path_factory.mktemp("ranks")
        plans = [prepared(recipe) for recipe in recipes]
        plans = [plan.on(on) for plan in plans] if on else plans
        (world_size,) = {plan.world_size for plan in plans}
        paths = []
        for place, plan in enumerate(plans):
            paths.append(directory / f"{place:02}.json")
            paths[-1].write_text(json.dumps(plan.to_dict()))
        _launch(world_size, directory / uuid.uuid4().hex, paths, omitted or [0] * len(paths))
        return [[json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()] for path in paths]

    return run


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty labelled rows of unequal length."""
    path = tmp_path_factory.mktemp("labelled") / "rows.csv"
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    lines = [
        f"{' '.join(words[(row * place) % 8] for place in range(1, 3 + row % 9))},{'good' if row % 3 else 'bad'}"
        for row in range(60)
    ]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def run_workers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Sequence[Recipe]], list[list[dict[str, Any]]]]]:
    """Train recipes one after the other, through Ray Train, in one group of workers for each world size."""
    import ray
    import ray_workers

    from raytx import cluster

    ray.cloudpickle.register_pickle_by_value(ray_workers)

    def run(recipes: Sequence[Recipe]) -> list[list[dict[str, Any]]]:
        plans = [prepared(recipe) for recipe in recipes]
        logs: dict[str, list[dict[str, Any]]] = {}
        for size in sorted({plan.world_size for plan in plans}):
            group = [plan for plan in plans if plan.world_size == size]
            found = ray_workers.train_all(group, tmp_path_factory.mktemp(f"workers{size}"))
            logs |= {plan.recipe.name: log for plan, log in zip(group, found, strict=True)}
        return [logs[plan.recipe.name] for plan in plans]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        cluster.connect(num_cpus=8)
        yield run
        ray.shutdown()


def _launch(world_size: int, rendezvous: Path, plans: Sequence[Path], omitted: Sequence[int]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    environment["RAYTX_OMITTED"] = json.dumps(omitted)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(world_size), str(rendezvous), *map(str, plans)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    assert codes == [0] * world_size, "\n".join(output[-3000:] for output in outputs)
