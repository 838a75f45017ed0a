"""The command line: each command calls the function of the same name and shows what it returns."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, cast

import click
from rich.console import Console
from rich.table import Table

from raytx import __version__
from raytx.errors import RaytxError, RecipeError, StoppedError, did_you_mean

if TYPE_CHECKING:
    from raytx.plan import Plan

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""What storage says that is full, read-only or somebody else's: the user's to mend."""
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
ADDRESS = click.option("--address", help="Ray cluster to join; a local one is started when it is left out.")
STORAGE = click.option("--storage-path", help="Where runs are looked up by name; ~/raytx-runs if left out.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
VERBOSE = click.option("--verbose", is_flag=True, help="Let Ray's and DeepSpeed's own output through.")


def main() -> None:
    """Run the command line; what a user can mend ends with one message and exit code 2."""
    told_to_end = _signals()
    try:
        commands(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except StoppedError as stop:
        _console(stderr=True).print(str(stop), highlight=False, markup=False, soft_wrap=True)
        sys.exit(stop.exit_code)
    except RaytxError as error:
        _console(stderr=True).print(f"[bold red]error[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        place = f": {error.filename}" if error.filename else ""
        _console(stderr=True).print(f"error {error.strerror}{place}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _console(stderr=True).print("interrupted; the same command goes on from the last checkpoint")
        sys.exit(128 + max(told_to_end, default=signal.SIGINT))


def _signals() -> list[int]:
    """Have SIGTERM interrupt what is done, as Ctrl-C does, where nothing else handles it; return where it is noted."""
    told: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        told.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    return told


def _console(*, stderr: bool = False) -> Console:
    """Return the console; where the output is no terminal, lines are not folded at 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=cast(IO[str], _Lasting(stream)), width=None if stream.isatty() else 160)


class _Lasting:
    """A stream that can be written to for as long as a command takes, whether or not anybody reads on.

    A reader that ends (`raytx train ... | head`) or a terminal that is closed would end a run that is to go on, or turn
    a stop that has saved into a failure: rich exits there with code 1, and Python with 120 when it flushes.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._into_nothing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._into_nothing():
            self._stream.flush()

    @contextlib.contextmanager
    def _into_nothing(self) -> Iterator[None]:
        """Have the stream lead nowhere from the first error on."""
        try:
            yield
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raytx")
def commands() -> None:
    """One recipe becomes a trained, exported and served transformer on Ray."""


@commands.command()
@click.argument("recipe")
@OVERRIDES
@ADDRESS
@VERBOSE
def train(recipe: str, overrides: tuple[str, ...], address: str | None, verbose: bool) -> None:
    """Train RECIPE, or go on with its run, and publish its artifacts.

    Values of the recipe are overridden by position: raytx train recipe.yaml optim.lr=1e-4 strategy.type=ddp
    """
    console = _console()
    with _starting(console, verbose):
        from raytx.plan import origins, resolve
        from raytx.recipe import load, parse_overrides

        plan = resolve(loaded := load(recipe, overrides), origins=origins(loaded, parse_overrides(overrides)))
        from raytx.train import fit
    result = fit(plan, address=address, verbose=verbose, console=console)
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    console.print(f"done at step {result.steps}: {numbers or 'no held-out split'}", highlight=False)
    console.print(f"report: {result.run_dir / 'report.html'}", highlight=False, soft_wrap=True)
    if result.artifacts:
        directory = next(iter(result.artifacts.values()))
        console.print(f"serve it: raytx serve {_short(directory)}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _starting(console: Console, verbose: bool) -> Iterator[None]:
    """Show that something happens while libraries load and Ray starts; set how much of their output gets through."""
    if verbose:
        os.environ["RAYTX_VERBOSE"] = "1"
    else:
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore", FutureWarning)
    with console.status("loading"):
        yield


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@commands.command()
@click.argument("recipe")
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--address", help="Ray cluster that is asked which node each rank would get now.")
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool, address: str | None) -> None:
    """Show what training RECIPE would do, without starting a process."""
    from raytx.plan import origins, resolve, strategy_settings
    from raytx.recipe import load, parse_overrides
    from raytx.show import show_plan, sizes

    resolved = resolve(loaded := load(recipe, overrides), origins=origins(loaded, parse_overrides(overrides)))
    if as_json:
        settings = {key: value for key, (value, _) in strategy_settings(resolved).items()}
        elastic = {"elastic": sizes(resolved), "unusable": resolved.unusable()} if resolved.elastic else {}
        click.echo(json.dumps(resolved.to_dict() | elastic | {"strategy_settings": settings}, indent=2))
        return
    if address:
        resolved, nodes = _placed(resolved, address)
        show_plan(resolved, _console(), nodes=nodes)
    else:
        show_plan(resolved, _console())


def _placed(plan: Plan, address: str) -> tuple[Plan, list[str]]:
    """Return the plan on as many workers as a cluster has room for, and the node that each rank would get."""
    from raytx import cluster

    scaling, one = plan.recipe.scaling, plan.resources_per_worker
    cluster.connect(address)
    count = cluster.most(plan.sizes, one, nodes=cluster.free(), placement_strategy=scaling.placement_strategy)
    plan = plan.on(count or plan.sizes[0])
    return plan, cluster.placed(
        one,
        num_workers=plan.world_size,
        placement_strategy=scaling.placement_strategy,
        wait_s=scaling.wait_s,
    )


@commands.command()
@click.argument("recipe")
@OVERRIDES
@click.option(
    "--strategy", "strategies", multiple=True, help="Strategy to compare, such as 'deepspeed stage=3'; repeatable."
)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Steps to compare.")
@click.option(
    "--limit", default=1e-5, show_default=True, help="Largest relative difference allowed (exit code 2 above)."
)
@ADDRESS
@VERBOSE
def parity(
    recipe: str,
    overrides: tuple[str, ...],
    strategies: tuple[str, ...],
    steps: int,
    limit: float,
    address: str | None,
    verbose: bool,
) -> None:
    """Train RECIPE for a few steps under several strategies and compare loss and gradient norm at each."""
    console = _console()
    with _starting(console, verbose):
        from raytx.parity import STRATEGIES
        from raytx.parity import parity as run
        from raytx.recipe import load

        loaded = load(recipe, overrides)
    chosen = strategies or STRATEGIES
    run(loaded, strategies=chosen, steps=steps, limit=limit, address=address, verbose=verbose, console=console)


@commands.command()
@click.argument("recipe")
@OVERRIDES
@ADDRESS
@VERBOSE
def tune(recipe: str, overrides: tuple[str, ...], address: str | None, verbose: bool) -> None:
    """Search over the values named in RECIPE's search section, or go on with that search."""
    console = _console()
    with _starting(console, verbose):
        from raytx.recipe import load
        from raytx.tune import tune as run

        loaded = load(recipe, overrides)
    run(loaded, address=address, verbose=verbose, console=console)


@commands.command()
@click.argument("checkpoint")
def export(checkpoint: str) -> None:
    """Export CHECKPOINT, or the chosen one of a run (directory or URI), again, as its recipe says."""
    console = _console()
    with console.status("exporting and replaying golden outputs"):
        from raytx.export import export_again

        exported = export_again(checkpoint, tell=lambda text: console.print(text, style="yellow"))
    exported.show(console)


@commands.command()
@click.argument("checkpoint")
@click.argument("directory")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the numbers written.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file, such as 500MB.")
@click.option("--adapter-only", is_flag=True, help="Write the adapter in peft's layout instead of merging it.")
def consolidate(checkpoint: str, directory: str, **options: Any) -> None:
    """Write CHECKPOINT, or the chosen one of a run (directory or URI), as a Hugging Face DIRECTORY, tensor by tensor.

    No model is built: memory for the largest tensor is enough, whatever the strategy that trained it.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = _console()
    columns = TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with _starting(console, verbose=False):
        from raytx.consolidate import consolidate as run
        from raytx.storage import is_uri

        checkpoint = str(_find(checkpoint, None, whole=True)) if is_uri(checkpoint) else checkpoint
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("writing", total=None)
        written = run(
            checkpoint,
            directory,
            advance=lambda done, of: progress.update(bar, completed=done, total=of),
            **options,
        )
    console.print(f"{written.told()}\n{_short(written.directory)}", highlight=False, soft_wrap=True)


@commands.command()
@click.argument("artifact")
@click.option("--host", help="Address to listen on; loopback when left out.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; 8000 when left out.")
@click.option("--replicas", "num_replicas", type=click.IntRange(1), help="Processes that hold the model.")
@ADDRESS
@VERBOSE
def serve(artifact: str, address: str | None, verbose: bool, **settings: Any) -> None:
    """Serve ARTIFACT, a directory or URI where training has published it, over HTTP."""
    from raytx.artifact import read

    read(artifact)  # a wrong directory is told before Ray starts
    console = _console()
    with _starting(console, verbose):
        from raytx.serve import serve as run
    run(
        artifact,
        address=address,
        verbose=verbose,
        **{key: value for key, value in settings.items() if value is not None},
    )


@commands.command()
@click.argument("recipe")
@OVERRIDES
@click.option(
    "--address", help="The cluster's job server; RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265 if left out."
)
@click.option(
    "--working-dir", help="Directory to upload; where this is run if the recipe lies below, else the recipe's."
)
@click.option("--py-module", "py_modules", multiple=True, help="Plugin directory or wheel to upload; may be repeated.")
@click.option("--python", default="python", show_default=True, help="Interpreter on the cluster.")
@click.option("--no-wait", is_flag=True, help="Return when the job is accepted.")
def submit(recipe: str, overrides: tuple[str, ...], address: str | None, no_wait: bool, **options: Any) -> None:
    """Train RECIPE as a job on a cluster: check it here, upload it, follow its log, return its exit code."""
    from raytx.submit import submit as run

    sys.exit(run(recipe, address=address, overrides=overrides, wait=not no_wait, console=_console(), **options))


@commands.command()
@click.argument("example", default="quickstart")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
def init(example: str, output: Path | None, force: bool) -> None:
    """Write a starter recipe: a copy of one of the examples."""
    found = {path.name.removesuffix(".yaml"): path for path in examples().iterdir() if path.name.endswith(".yaml")}
    if example not in found:
        raise RecipeError(
            f"no example {example!r}.{did_you_mean(example, found)} There are: {', '.join(sorted(found))}"
        )
    target = output or Path(f"{example}.yaml")
    if target.exists() and not force:
        raise RecipeError(f"{target} exists; choose another name with --output or overwrite it with --force")
    with resources.as_file(found[example]) as source:
        shutil.copyfile(source, target)
    click.echo(f"{target} written; next: raytx plan {target}, raytx train {target}")


def examples() -> Any:
    """Return the directory of example recipes: inside an installed package, or beside it in a source checkout."""
    packaged = resources.files("raytx") / "examples"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "examples"


@commands.command()
@click.argument("kind", required=False)
@click.argument("type_", metavar="[TYPE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def plugins(kind: str | None, type_: str | None, as_json: bool) -> None:
    """List installed components, those of one KIND, or the fields of one component (KIND TYPE)."""
    from raytx.schema import catalogue, describe

    if kind and type_:
        described = describe(kind, type_)
        click.echo(json.dumps(described, indent=2)) if as_json else _show_component(described)
        return
    listed = catalogue()
    if kind and kind not in listed["components"]:
        kinds = list(listed["components"])
        raise RecipeError(f"no kind {kind!r}.{did_you_mean(kind, kinds)} Kinds: {', '.join(kinds)}")
    if kind:
        listed["components"] = {kind: listed["components"][kind]}
    click.echo(json.dumps(listed, indent=2)) if as_json else _show_catalogue(listed)


def _show_catalogue(listed: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    for title in ("kind", "type", "what it is", "plugin"):
        table.add_column(title, overflow="fold")
    for kind, components in listed["components"].items():
        for component in components:
            table.add_row(kind, component["type"], _escape(component["summary"]), component["plugin"])
    console = _console()
    console.print(table)
    for plugin in listed["broken"]:
        console.print(f"[bold red]broken[/] {plugin['name']} {plugin['version']}: {_escape(plugin['error'])}")


def _show_component(described: dict[str, Any]) -> None:
    console = _console()
    console.print(
        f"[bold]{described['kind']} {described['type']}[/]  ({described['plugin']} {described['version']})\n"
        f"{_escape(described['summary'])}\n",
        highlight=False,
    )
    table = Table(box=None, header_style="bold")
    for title in ("field", "type", "default", "meaning"):
        table.add_column(title, overflow="fold")
    for one in described["fields"]:
        default = "required" if one.get("required") else json.dumps(one.get("default"))
        table.add_row(one["name"], _escape(str(one["type"])), _escape(default), _escape(one.get("description") or ""))
    console.print(table)


@commands.group()
def runs() -> None:
    """What has been trained: runs and searches, listed, told in full, compared and verified. Changes nothing."""


@runs.command("list")
@click.argument("storage_paths", nargs=-1, metavar="[STORAGE_PATH]...")
@AS_JSON
def list_(storage_paths: tuple[str, ...], as_json: bool) -> None:
    """List the runs below STORAGE_PATH, ~/raytx-runs if left out, or the trials of a search's directory."""
    from raytx.listing import as_json as dumped
    from raytx.listing import show_list
    from raytx.runs import default_storage, list_runs

    found = list_runs(*(_storage(path) for path in storage_paths))
    if as_json:
        click.echo(dumped(found))
    else:
        show_list(found, _console(), where=", ".join(storage_paths) or str(default_storage()))


@runs.command("show")
@click.argument("run")
@STORAGE
@AS_JSON
def show_(run: str, storage_path: str | None, as_json: bool) -> None:
    """Tell all of RUN, a directory or a name: plan, attempts, checkpoints, artifacts and what came of what."""
    from raytx.listing import as_json as dumped
    from raytx.listing import show_details
    from raytx.runs import details

    found = details(_find(run, storage_path))
    click.echo(dumped(found)) if as_json else show_details(found, _console())


@runs.command()
@click.argument("run_a")
@click.argument("run_b")
@STORAGE
@AS_JSON
def diff(run_a: str, run_b: str, storage_path: str | None, as_json: bool) -> None:
    """Show in what RUN_A and RUN_B differ: recipe, data, software, results."""
    from raytx.listing import as_json as dumped
    from raytx.listing import show_comparison
    from raytx.runs import compare

    found = compare(_find(run_a, storage_path), _find(run_b, storage_path))
    click.echo(dumped(found)) if as_json else show_comparison(found, _console())


@runs.command()
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--replay", is_flag=True, help="Load every artifact and hold it to its golden outputs.")
@STORAGE
@AS_JSON
def verify(names: tuple[str, ...], replay: bool, storage_path: str | None, as_json: bool) -> None:
    """Check every hash, lineage and journal of each RUN, of all runs if none is named; exit code 2 if any is wrong."""
    from raytx.listing import as_json as dumped
    from raytx.listing import show_verdict
    from raytx.runs import everything
    from raytx.verify import hashed_bytes, verifiable
    from raytx.verify import verify as look

    named = [_find(name, storage_path, whole=True) for name in names]
    named = named or everything(storage_path and _storage(storage_path, whole=True))
    run_dirs = [run_dir for path in named for run_dir in verifiable(path)]
    console, verdicts, known = _console(), [], {}  # type: ignore[var-annotated]
    with _hashing(console, hashed_bytes(run_dirs), quiet=as_json) as advance:
        for run_dir in run_dirs:
            verdicts.append(look(run_dir, replay=replay, advance=advance, known=known))
            if not as_json:
                show_verdict(verdicts[-1], console)
    if as_json:
        click.echo(dumped(verdicts))
    elif not run_dirs:
        console.print("there are no runs", highlight=False)
    sys.exit(2 if any(verdict.problems for verdict in verdicts) else 0)


def _find(run: str, storage_path: str | None, *, whole: bool = False) -> Path:
    """Return the directory of a run; of one in a store, that of a copy."""
    from raytx.runs import find
    from raytx.storage import is_uri, split

    storage_path, name = split(run) if is_uri(run) else (storage_path, run)
    return find(name, storage_path and _storage(storage_path, only=name, whole=whole))


def _storage(path: str, **what: Any) -> str:
    """Return a storage path's directory; of a store, that of copies of its runs."""
    from raytx.mirror import copies
    from raytx.storage import is_uri

    return str(copies(path, **what)) if is_uri(path) else path


@contextlib.contextmanager
def _hashing(console: Console, total: int, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show how many of the bytes have been looked at, where there is a terminal to show it on."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("verifying", total=total)
        yield lambda count: progress.advance(bar, count)


@commands.command()
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File to write instead of printing."
)
def schema(output: Path | None) -> None:
    """Print the JSON schema of recipes, installed plugins included, for completion in an editor."""
    from raytx.schema import schema as make

    text = json.dumps(make(), indent=2)
    output.write_text(text + "\n") if output else click.echo(text)
