"""Search a recipe's values with Ray Tune: every trial is an ordinary run, the winner becomes a recipe of its own.

<storage_path>/<name>/
    recipe.yaml      the search as it was started; another one is refused
    trials/<trial>/  one run directory for each trial, and the prepared data they share
    tune/            Ray Tune's own state, from which a search that was killed goes on
    trials.json      every trial with its values and metrics, written when the search is complete
    best.yaml        the winner, for `raytx train`
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
import shlex
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util.placement_group import remove_placement_group
from rich.console import Console
from rich.live import Live
from rich.table import Table

from raytx import cluster, ray_internals, storage
from raytx.errors import RaytxError, RecipeError, ResourceError, did_you_mean
from raytx.files import digest, read_json, write_json, write_text
from raytx.plan import resolve
from raytx.prepare import prepare
from raytx.recipe import Recipe, load, parse
from raytx.run import OUTCOME, PLAN, SEARCHING, TRIALS, at_work, differences

SAMPLERS = {
    "uniform": "[low, high]",
    "loguniform": "[low, high] above 0",
    "quniform": "[low, high, step]",
    "randint": "[low, high), whole numbers",
    "choice": "a list of values",
    "grid": "a list of values, every one tried",
}
UNBOUNDED = 10**9
"""Steps beyond any run: asha is to stop weak trials, never to cut one that is about to end."""

REFRESH_S = 0.5

State = Literal["waiting", "running", "finished", "stopped", "failed"]
WORDS: dict[str, State] = {"PENDING": "waiting", "PAUSED": "waiting", "RUNNING": "running"}
"""Tune's words for trials that have not ended."""


@dataclass(frozen=True)
class Trial:
    """One trial: what was tried and what came of it."""

    id: str
    values: dict[str, Any]
    state: State
    evaluations: int = 0
    metrics: dict[str, float] | None = None
    error: str | None = None


@dataclass(frozen=True)
class TuneResult:
    """What a search found."""

    best: Path
    """The winner's recipe, for `raytx train`."""
    metrics: dict[str, float]
    """The winner's evaluation."""
    trials: list[Trial]
    metric: str
    mode: Literal["min", "max"]

    def table(self) -> Table:
        """Return the trials as a table, the best first."""
        return _table(sorted(self.trials, key=partial(_rank, metric=self.metric, mode=self.mode)), self.metric)


def tune(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    verbose: bool = False,
    console: Console | None = None,
) -> TuneResult:
    """Search the space of a recipe, or go on with the search of that name; a search that is complete is only shown."""
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe, overrides)
    console = console or Console()
    search = Search(recipe)
    search.check()
    if (done := search.read()) is None:
        with at_work(search.directory, SEARCHING):
            cluster.connect(address, verbose=verbose)
            with _quiet(verbose=verbose):
                done = search.run(console)
    console.print(done.table())
    console.print(f"best: {done.metric} {done.metrics[done.metric]:.6g}\n{done.best}", highlight=False)
    console.print(f"train it with\n  raytx train {shlex.quote(str(done.best))}", highlight=False)
    return done


class Search:
    """A recipe with a space to search, and the directory of its search."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.search is None:
            raise RecipeError("search: must be given, with a space such as {optim.lr: {loguniform: [1.0e-5, 1.0e-3]}}")
        if storage.is_uri(recipe.storage_path):
            raise RecipeError(
                f"storage_path={recipe.storage_path}: a search needs a directory, on several nodes one that "
                "all of them share. Its best recipe can be trained to a URI (raytx train best.yaml storage_path=...)"
            )
        self.recipe, self.search = recipe, recipe.search
        self.directory = Path(recipe.storage_path).expanduser().absolute() / recipe.name
        self.trials_dir = self.directory / TRIALS
        self.plan = resolve(trial_recipe(recipe, {}, "prepare", self.trials_dir)).fixed()
        self.metric, self.mode = self.plan.metric, self.plan.metric_mode

    def check(self) -> None:
        """Refuse a space that cannot work, and a directory in which something else was searched."""
        check_space(self.recipe)
        every = self.recipe.evaluate.every
        if self.search.scheduler == "asha" and every is None:
            raise RecipeError(
                "search.scheduler=asha compares trials at their evaluations, and evaluate.every is null: there is only "
                "one at the end. Set evaluate.every, or search.scheduler=fifo"
            )
        self._check_same()

    def read(self) -> TuneResult | None:
        """Return the result of a search that is complete."""
        path = self.directory / "trials.json"
        if not path.is_file():
            return None
        return self._result([Trial(**trial) for trial in read_json(path)])

    def run(self, console: Console) -> TuneResult:
        """Carry out the search on the Ray that this process is connected to."""
        prepare(self.plan, console)  # once, where trials look for it; those that search the data prepare their own
        driver = _driver(cluster.totals())
        concurrent = self._concurrent(driver, console)
        write_text(self.directory / "recipe.yaml", self.recipe.to_yaml())
        trainable = ray_tune.with_resources(
            ray_tune.with_parameters(
                run_trial,
                recipe=self.recipe.dump(),
                trials_dir=str(self.trials_dir),
                environment=cluster.passed_on(),
            ),
            driver,
        )
        tuner = self._restored(trainable, console) or self._fresh(trainable, concurrent)
        with _watched(Board(self, console)) as board:
            tuner.fit()
        trials = [board.read(trial) for trial in board.seen]
        if any(trial.state in ("waiting", "running") for trial in trials):
            console.print("stopped before the end; the same command goes on from here", style="yellow")
            raise KeyboardInterrupt
        return self._finish(trials)

    def trial(self, id_: str, values: Mapping[str, Any], status: str, result: Mapping[str, Any] | None) -> Trial:
        """Return a trial as it stands. What it left in its directory goes before what Tune heard of it."""
        outcome, result = self._outcome(id_), result or {}
        heard = {self.metric: result[self.metric]} if self.metric in result else None
        steps = outcome.get("steps") or result.get("step", 0)
        state = WORDS[status] if status in WORDS else self.ended(id_, failed=status == "ERROR")
        return Trial(
            id=id_,
            values={path: _plain(value) for path, value in values.items()},
            state=state,
            evaluations=math.ceil(steps / (self.recipe.evaluate.every or max(steps, 1))),
            metrics=outcome.get("metrics") or heard,
            error=outcome.get("error") if state == "failed" else None,  # being stopped looks like an error from inside
        )

    def ended(self, id_: str, *, failed: bool) -> State:
        """Tell how a trial ended: one that came to its last step has said so in its directory."""
        return "failed" if failed else "finished" if self._outcome(id_).get("metrics") else "stopped"

    def _outcome(self, id_: str) -> dict[str, Any]:
        path = self.trials_dir / id_ / OUTCOME
        return read_json(path) if path.is_file() else {}

    def _check_same(self) -> None:
        path = self.directory / "recipe.yaml"
        if not path.is_file():
            return
        recipe = load(path)
        if recipe.search is None or (self.directory / PLAN).is_file():
            raise RecipeError(
                f"{self.recipe.name!r} in {self.directory} is a training run; give the search another name (name=...)"
            )
        earlier, now = _identity(recipe), _identity(self.recipe)
        if digest(earlier) != digest(now):
            changed = differences(earlier, now)
            lines = "\n".join(f"  {key}: {old!r} in the search, {new!r} now" for key, (old, new) in changed.items())
            raise RecipeError(
                f"search {self.recipe.name!r} in {self.directory} is another one, so it cannot go on:\n{lines}\n"
                "Give the new search another name (name=...), or put the values back"
            )

    def _concurrent(self, driver: dict[str, float], console: Console) -> int:
        """Return how many trials run at once: as many as have room with all their workers, so that none starves."""
        plan, scaling = self.plan, self.recipe.scaling
        group: dict[str, Any] = {"num_workers": plan.world_size, "placement_strategy": scaling.placement_strategy}
        cluster.wait_for(plan.resources_per_worker, wait_s=scaling.wait_s, console=console, **group)
        room = cluster.groups(plan.resources_per_worker, driver=driver, nodes=cluster.free(), **group)
        if room == 0:
            raise ResourceError(
                f"a trial needs {plan.world_size} x {plan.resources_per_worker} for its workers and {driver} for its "
                f"driver, and the cluster holds one but not both. Start Ray with --resources "
                f"'{{\"{cluster.DRIVER}\": {cluster.DRIVERS}}}', which makes drivers free, or lower scaling.num_workers"
            )
        concurrent = min(room, self.search.max_concurrent or room)
        console.print(
            f"search [bold]{self.recipe.name}[/]: {self.search.samples} samples of {', '.join(self.search.space)}; "
            f"{concurrent} at once, {plan.world_size} workers each",
            highlight=False,
        )
        return concurrent

    def _fresh(self, trainable: Any, concurrent: int) -> ray_tune.Tuner:
        samples = BasicVariantGenerator(random_state=self.search.seed, max_concurrent=concurrent)
        return ray_tune.Tuner(
            trainable,
            param_space={path: sampler(spec) for path, spec in self.search.space.items()},
            tune_config=ray_tune.TuneConfig(
                metric=self.metric,
                mode=self.mode,
                num_samples=self.search.samples,
                search_alg=ray_internals.numbered(samples),
                scheduler=self._scheduler(),
            ),
            run_config=ray_tune.RunConfig(
                name="tune", storage_path=str(self.directory), verbose=0, callbacks=[Watch()],
            ),
        )  # fmt: skip

    def _scheduler(self) -> TrialScheduler:
        """Rungs are counted in steps, not in reports: a trial that was resumed reports less often than it evaluated."""
        if self.search.scheduler == "fifo":
            return FIFOScheduler()
        return ASHAScheduler(
            time_attr="step",
            max_t=UNBOUNDED,
            grace_period=self.search.grace_period * (self.recipe.evaluate.every or 1),
            reduction_factor=self.search.reduction_factor,
        )

    def _restored(self, trainable: Any, console: Console) -> ray_tune.Tuner | None:
        """Return the tuner of a search that was cut off.

        Ray unpickles it, and a pickle runs code as it is read: so only from files that nobody else can have written.
        """
        path = self.directory / "tune"
        if not path.is_dir() or not ray_tune.Tuner.can_restore(str(path)):
            return None
        for file in (self.directory, path, *path.iterdir()):
            found = file.lstat()
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022 or stat.S_ISLNK(found.st_mode):
                raise RaytxError(
                    f"{file} can be written by other users, and going on with a search runs what is in it as code. "
                    "Make it yours alone (chown, chmod go-w), or give the search another name"
                )
        console.print(f"going on with the search in {self.directory}", highlight=False)
        return ray_tune.Tuner.restore(str(path), trainable=trainable, resume_unfinished=True, resume_errored=True)

    def _finish(self, trials: list[Trial]) -> TuneResult:
        """Write the winner's recipe and the table of trials, the one that says the search is complete last."""
        result = self._result(trials)
        winner = min(result.trials, key=partial(_rank, metric=self.metric, mode=self.mode))
        chosen = {"name": f"{self.recipe.name}-best", "storage_path": str(self.directory.parent), "search": None}
        write_text(result.best, self.recipe.override(winner.values | _aim(self.recipe) | chosen).to_yaml())
        write_text(self.directory / "trials.csv", _csv(trials))
        write_json(self.directory / "trials.json", [asdict(trial) for trial in trials])
        return result

    def _result(self, trials: list[Trial]) -> TuneResult:
        """Name the winner among the trials that ran to their end; one that was stopped is compared only without any."""
        winner = min(trials, key=partial(_rank, metric=self.metric, mode=self.mode))
        if winner.metrics is None or winner.state == "failed":
            errors = "\n".join(f"  {trial.id}: {trial.error or 'no evaluation'}" for trial in trials)
            raise RaytxError(f"search {self.recipe.name!r}: no trial has a result\n{errors}")
        return TuneResult(self.directory / "best.yaml", winner.metrics, trials, self.metric, self.mode)


# ------------------------------------------------------------------------------------------------------- the space


def check_space(recipe: Recipe) -> None:
    """Try values of every path of the space on the recipe; raise RecipeError with all mistakes and their paths."""
    assert recipe.search is not None
    mistakes = []
    for path, spec in recipe.search.space.items():
        try:
            _check_path(path)
            for value in _probes(path, spec):
                resolve(recipe.override({path: value, "search": None}))
        except RaytxError as error:
            mistakes.append(str(error) if path in str(error) else f"{path}: {error}")
    if mistakes:
        raise RecipeError("search.space: " + "\n".join(mistakes))


def _check_path(path: str) -> None:
    section = path.partition(".")[0]
    if section in ("name", "storage_path", "search", "scaling", "serving"):
        raise RecipeError(f"{path}: cannot be searched; trials differ in what they learn, not in where they run")


def _probes(path: str, spec: Mapping[str, Any]) -> list[Any]:
    """Return values the sampler may draw: all of a list, both ends of a range."""
    if len(spec) != 1:
        raise RecipeError(f"{path}: must name one sampler, such as {{uniform: [0, 1]}}, not {len(spec)}")
    ((name, given),) = spec.items()
    if name not in SAMPLERS:
        hint = did_you_mean(name, SAMPLERS)
        raise RecipeError(f"{path}: no sampler {name!r}.{hint} Allowed: {', '.join(SAMPLERS)}")
    values = list(given) if isinstance(given, list | tuple) else []
    if name in ("choice", "grid"):
        if not values:
            raise RecipeError(f"{path}: {name} must be {SAMPLERS[name]}, not {given!r}")
        return values
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    wanted = 3 if name == "quniform" else 2
    if len(numbers) != wanted or len(values) != wanted or not numbers[0] < numbers[1]:
        raise RecipeError(f"{path}: {name} must be {SAMPLERS[name]}, not {given!r}")
    if name == "loguniform" and numbers[0] <= 0:
        raise RecipeError(f"{path}: {name} must be {SAMPLERS[name]}, not {given!r}")
    if name == "randint":
        if not all(isinstance(number, int) for number in numbers):
            raise RecipeError(f"{path}: {name} must be {SAMPLERS[name]}, not {given!r}")
        return [numbers[0], numbers[1] - 1]
    if name == "quniform" and numbers[2] <= 0:
        raise RecipeError(f"{path}: {name} must be {SAMPLERS[name]} with a step above 0, not {given!r}")
    return numbers[:2]


def sampler(spec: Mapping[str, Any]) -> Any:
    """Return Ray Tune's sampler for one checked entry of the space."""
    ((name, values),) = spec.items()
    if name == "grid":
        return ray_tune.grid_search(list(values))
    return ray_tune.choice(list(values)) if name == "choice" else getattr(ray_tune, name)(*values)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Return what a search that goes on must have in common with its beginning: not where it runs, nor how wide."""
    plain = recipe.dump()
    for free in ("storage_path", "scaling", "serving", "export"):
        plain.pop(free)
    plain["search"].pop("max_concurrent")
    return plain


# -------------------------------------------------------------------------------------------------------- one trial


def trial_recipe(recipe: Recipe, values: Mapping[str, Any], id_: str, trials_dir: Path) -> Recipe:
    """Return the recipe of one trial: an ordinary run among the trials' runs, without exports."""
    fixed: dict[str, Any] = {"name": id_, "storage_path": str(trials_dir), "search": None, "export": []}
    return recipe.override({path: _plain(value) for path, value in values.items()} | _aim(recipe) | fixed)


def _aim(recipe: Recipe) -> dict[str, Any]:
    """Let a trial choose its best checkpoint by what the search is after."""
    assert recipe.search is not None
    aim = {"evaluate.metric": recipe.search.metric, "evaluate.mode": recipe.search.mode}
    return {path: value for path, value in aim.items() if value is not None}


def run_trial(
    values: dict[str, Any], *, recipe: dict[str, Any], trials_dir: str, environment: Mapping[str, str]
) -> None:
    """Train one trial. Runs in an actor of Ray Tune's; the training's own workers report to it."""
    from raytx.train import fit

    ray_internals.without_cleaner()
    os.environ.update(environment)
    os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))  # Tune moved it, and a recipe's paths are relative
    original = parse(recipe, where="search")
    context = ray_tune.get_context()
    # fixed: trials that grew would take one another's place, and the numbers are the same on any number of workers
    chosen = resolve(trial_recipe(original, values, context.get_trial_id(), Path(trials_dir))).fixed()
    plan, _ = prepare(chosen, Console(quiet=True))
    assert plan.steps is not None
    outcome = plan.run_dir / OUTCOME
    outcome.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = fit(plan, callbacks=[Report(plan.metric, before_step=plan.steps)], export=False)
    except Exception as error:
        write_json(outcome, {"error": str(error) or type(error).__name__})
        raise
    write_json(outcome, {"metrics": result.metrics, "steps": plan.steps})
    ray_tune.report({**result.metrics, "step": result.steps})


class Report(TuneReportCallback):  # type: ignore[misc]
    """Pass evaluations on to Tune, but the last: a trial that got so far is not to be stopped before it has saved."""

    def __init__(self, metric: str, *, before_step: int) -> None:
        super().__init__()
        self._metric, self._before_step = metric, before_step

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if self._metric in metrics[0] and metrics[0]["step"] < self._before_step:
            super().after_report(run_context, metrics, None)


def _driver(nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what a trial's own actor reserves: a resource made for it, else a sliver of a CPU."""
    return {cluster.DRIVER: 1.0} if any(node.get(cluster.DRIVER) for node in nodes) else {"CPU": 0.01}


# ------------------------------------------------------------------------------------------------------- the watch


class Watch(ray_tune.Callback):  # type: ignore[misc]
    """Tune's way to the board of this process. It is pickled with the search, and a terminal cannot be."""

    board: Board | None = None

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if Watch.board:
            Watch.board.show(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if Watch.board:
            Watch.board.show(trials, last=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if Watch.board:
            Watch.board.tell(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)


def reap() -> None:
    """Remove the placement groups of trials that are gone.

    A group belongs to the job and outlives its trial; a search whose trials are stopped early would starve on them
    (ray-project/ray#58515).
    """
    for group in ray_internals.ownerless_placement_groups():
        remove_placement_group(group)


class Board:
    """A live table of the trials; without a terminal, one line for each that ended."""

    def __init__(self, search: Search, console: Console) -> None:
        self.search, self.console = search, console
        self.seen: list[Any] = []
        """Tune's trials, as of its last step."""
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self._next = 0.0

    def show(self, trials: list[Any], *, last: bool = False) -> None:
        """Take Tune's trials; now and then, for Tune steps often, refresh the table and reap."""
        self.seen = list(trials)
        if time.monotonic() < self._next and not last:
            return
        self._next = time.monotonic() + REFRESH_S
        reap()
        if self.console.is_terminal:
            self.live.update(_table([self.read(trial) for trial in trials], self.search.metric), refresh=True)

    def tell(self, trial: Any) -> None:
        """Print a trial that ended, where there is no table."""
        if not self.console.is_terminal:
            ended = replace(self.read(trial), state=self.search.ended(trial.trial_id, failed=trial.status == "ERROR"))
            self.console.print("  ".join(_cells(ended, self.search.metric)), highlight=False, soft_wrap=True)

    def read(self, trial: Any) -> Trial:
        return self.search.trial(trial.trial_id, trial.config, trial.status, trial.last_result)


@contextlib.contextmanager
def _watched(board: Board) -> Iterator[Board]:
    Watch.board = board
    try:
        with board.live if board.console.is_terminal else contextlib.nullcontext():
            yield board
    finally:
        Watch.board = None


@contextlib.contextmanager
def _quiet(*, verbose: bool) -> Iterator[None]:
    """Keep Tune's own tables, log files and traces away; the trials' journals and this search's table say it all."""
    logger, level = logging.getLogger("ray.tune"), logging.getLogger("ray.tune").level
    settings = {"TUNE_GLOBAL_CHECKPOINT_S": "5", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    with cluster.environment(settings if verbose else settings | {"RAY_AIR_NEW_OUTPUT": "0"}):
        if not verbose:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------- the table


def _rank(trial: Trial, *, metric: str, mode: str) -> tuple[bool, float]:
    """Order trials: those that ran to their end before the others, then by the metric; no number comes last."""
    value = (trial.metrics or {}).get(metric, math.nan)
    worst = math.isnan(value) or trial.state == "failed"
    return trial.state != "finished", math.inf if worst else value if mode == "min" else -value


def _table(trials: Sequence[Trial], metric: str) -> Table:
    paths = list(trials[0].values) if trials else []
    table = Table(box=None, pad_edge=False)
    for column in ("trial", *paths, "evaluations", metric, "state"):
        table.add_column(column)
    for trial in trials:
        table.add_row(*_cells(trial, metric))
    return table


def _cells(trial: Trial, metric: str) -> list[str]:
    value = (trial.metrics or {}).get(metric)
    shown = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in trial.values.values()]
    state = f"{trial.state}: {trial.error.splitlines()[0][:60]}" if trial.error else trial.state
    return [trial.id, *shown, str(trial.evaluations), "-" if value is None else f"{value:.5g}", state]


def _csv(trials: Sequence[Trial]) -> str:
    """Return a row for each trial: its values and metrics as they are, unrounded."""
    rows = [
        {"trial": t.id, **t.values, "evaluations": t.evaluations, "state": t.state, **(t.metrics or {})} for t in trials
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    """Turn numpy's numbers, which samplers return, into Python's."""
    return value.item() if hasattr(value, "item") else value
