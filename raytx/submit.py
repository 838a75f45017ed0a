"""Send a recipe to a cluster as a Ray job: check it, pack it with its code and plugins, follow its log."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from aiohttp import ClientError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

from raytx import ray_internals
from raytx.errors import RaytxError, RecipeError, ResourceError
from raytx.files import digest
from raytx.plan import resolve
from raytx.recipe import Recipe, load
from raytx.registry import registry

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TAKEN_DOWN_S = 30
"""How long a run that was told to end may take beyond its ranks' grace: for Ray Train to take its workers down."""
EXCLUDED = [".git", ".venv", "__pycache__", "raytx-runs", "*.safetensors"]
"""Left out of the upload, besides what .gitignore names. A slash at the end would leave the directories in, empty."""
SETUP_TIMEOUT_S = 900
SILENT_S = 300.0
"""How long a job server may not answer before its job is followed no further."""
BROKEN = (RuntimeError, OSError, ClientError)
"""What is raised where a proxy or a tunnel has hung up, or has no connection itself."""
INTERRUPTED = 130
"""What a shell calls a command that Ctrl-C ended."""


def submit(
    path: str | Path,
    *,
    address: str | None = None,
    overrides: Sequence[str] = (),
    working_dir: str | Path | None = None,
    py_modules: Sequence[str | Path] = (),
    python: str = "python",
    wait: bool = True,
    console: Console | None = None,
) -> int:
    """Run `raytx train` on a cluster and return the job's exit code; 0 at once without `wait`.

    Submitting the same again, to the last byte of recipe, overrides, code and data that are sent, joins the job that is
    under way or has succeeded, and begins the next attempt after one that failed. Anything else is another job.
    `python` is the interpreter on the cluster. Raises RaytxError for what a user can mend, before anything is uploaded.
    """
    console = console or Console()
    recipe = load(path, overrides)
    directory, inside = _packed(Path(path), Path(working_dir) if working_dir else None)
    _check(recipe, directory, console)
    client = _client(_address(address))
    entrypoint = shlex.join([python, "-m", "raytx", "train", str(inside), *overrides])
    with _modules(recipe, py_modules) as modules:
        runtime_env = _uploaded(client, _runtime_env(directory, modules, recipe.scaling.grace_s))
    content = digest({"recipe": recipe.dump(), "entrypoint": entrypoint, "runtime_env": runtime_env})
    job = _send(
        client,
        prefix=f"{recipe.name}-{content[:12]}",
        entrypoint=entrypoint,
        runtime_env=runtime_env,
        console=console,
    )
    return _follow(client, job, console) if wait else 0


# ------------------------------------------------------------------------------------------------------ before upload


def _packed(path: Path, working_dir: Path | None) -> tuple[Path, Path]:
    """Return the directory to upload and the recipe's path in it: where the command was given, or the recipe's own."""
    path = path.absolute()
    directory = (working_dir or (Path.cwd() if path.is_relative_to(Path.cwd()) else path.parent)).absolute()
    if not directory.is_dir():
        raise RaytxError(f"{directory}: no such directory to upload")
    if directory in (Path.home(), Path("/")):
        raise RaytxError(
            f"the whole of {directory} would be uploaded. Change to the project's directory, or name it (--working-dir)"
        )
    if not path.is_relative_to(directory):
        raise RaytxError(f"{path} is not in {directory}, which is what gets uploaded; name another with --working-dir")
    return directory, path.relative_to(directory)


def _check(recipe: Recipe, directory: Path, console: Console) -> None:
    """Find here what would stop the job there. A file with an absolute path is the cluster's, and cannot be checked."""
    files = [
        (f"{component.kind}.{key}", Path(file))
        for component in recipe.components()
        for key, file in component.local_files()
    ]
    ours = [(key, file) for key, file in files if not file.expanduser().is_absolute()]
    missing = [f"{key}={file}" for key, file in ours if not (directory / file).exists()]
    if missing:
        raise RecipeError(f"not in {directory}, which is what gets uploaded: {', '.join(missing)}")
    absent = [f"{key}={file}" for key, file in files if not file.expanduser().exists() and (key, file) not in ours]
    if absent:
        console.print(f"{', '.join(absent)}: not on this machine; the job will look on the cluster", style="yellow")
    else:
        with contextlib.chdir(directory):
            resolve(recipe)


def _address(address: str | None) -> str:
    """Return the job server's address. Ray would let its variables win over what was asked for; that is refused."""
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        found = os.environ.get(variable)
        if found and address and _url(found) != _url(address):
            raise RaytxError(f"{variable}={found} would send the job there and not to {address}: unset it, or agree")
        address = address or found
    return _url(address or DEFAULT_ADDRESS)


def _url(address: str) -> str:
    return (address if "://" in address else f"http://{address}").rstrip("/")


def _client(address: str) -> JobSubmissionClient:
    """Connect to the job server, with the token of this user in token mode; raise one clear error where that fails."""
    if urlsplit(address).scheme not in ("http", "https"):
        raise RaytxError(f"{address} is no job server; its address looks like {DEFAULT_ADDRESS}")
    if ray_internals.has_token():
        ray_internals.use_token()
    for kind in JobSubmissionClient.__mro__[:-1]:  # its words on uploads and sockets; each module set its own level
        logging.getLogger(kind.__module__).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        raise _refusal(address, error) from None


def _refusal(address: str, error: Exception) -> ResourceError:
    kind, text = type(error).__name__, str(error)
    if kind == "AuthenticationError" or "401" in text or "403" in text:
        return ResourceError(
            f"{address} asks for the cluster's token, and this machine has none or another one. Copy the cluster's "
            "~/.ray/auth_token to the same place here, or set RAY_AUTH_TOKEN; RAY_AUTH_MODE must not be 'disabled'"
        )
    if isinstance(error, ConnectionError):
        return ResourceError(
            f"no job server answers at {address}. Is the cluster up, and is its port forwarded "
            "(`ray dashboard cluster.yaml`, or ssh -L 8265:127.0.0.1:8265 head)?"
        )
    return ResourceError(f"{address}: {text.splitlines()[0] if text else kind}")


# ------------------------------------------------------------------------------------------------------ what is sent


def _runtime_env(directory: Path, modules: Sequence[Path], grace_s: float) -> dict[str, Any]:
    environment: dict[str, Any] = {
        "working_dir": str(directory),
        "excludes": EXCLUDED,
        "env_vars": {**_stop(grace_s), "PYTHONUNBUFFERED": "1"},
        "config": {"setup_timeout_seconds": SETUP_TIMEOUT_S},
    }
    return environment | ({"py_modules": [str(module) for module in modules]} if modules else {})


def _stop(grace_s: float) -> dict[str, str]:
    """Return what lets a job that is stopped save: Ray by itself would kill it three seconds after SIGTERM.

    SIGINT, which Ray also knows, would end the run at once where somebody stops the job a second time.
    """
    wait_s = math.ceil(grace_s) + TAKEN_DOWN_S
    return {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(wait_s)}


def _uploaded(client: JobSubmissionClient, runtime_env: dict[str, Any]) -> dict[str, Any]:
    """Upload the directory and the modules; return the environment with their addresses, which name their content.

    submit_job would do the same, but only after the job has its name. What the cluster has already is not sent again.
    """
    runtime_env = dict(runtime_env)
    try:
        client._upload_working_dir_if_needed(runtime_env)
        client._upload_py_modules_if_needed(runtime_env)
    except Exception as error:
        raise ResourceError(f"{runtime_env['working_dir']} cannot be uploaded: {_last_line(error)}") from error
    return runtime_env


@contextlib.contextmanager
def _modules(recipe: Recipe, given: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Yield what goes along as Python modules: those asked for, and the recipe's plugins that are installed from here.

    A project is built into a wheel, because a bare directory has no entry points and so would be no plugin.
    """
    sources = dict.fromkeys([*(Path(module).absolute() for module in given), *_local_plugins(recipe)])
    with tempfile.TemporaryDirectory(prefix="raytx-") as built:
        yield [_module(source, Path(built)) for source in sources]


def _module(source: Path, target: Path) -> Path:
    """Return a source as Ray takes it: a project as a wheel, and every wheel under a name of its own."""
    if (source / "pyproject.toml").is_file():
        source = _wheel(source, target)
    return _stamped(source, target) if source.suffix == ".whl" else source


def _stamped(wheel: Path, target: Path) -> Path:
    """Copy a wheel to a name with its content in it, as a build tag.

    Ray takes a wheel's file name for its content: changed code of an unchanged version would never arrive.
    """
    try:
        name, version, *_, python, abi, platform = wheel.stem.split("-")
        with zipfile.ZipFile(wheel) as archive:
            content = digest({name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()})
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RaytxError(f"{wheel}: not a wheel that can be sent: {error}") from None
    return Path(shutil.copy(wheel, target / f"{name}-{version}-0{content}-{python}-{abi}-{platform}.whl"))


def _local_plugins(recipe: Recipe) -> list[Path]:
    """Return the projects of plugins that the recipe uses and that are installed editable: no registry has them."""
    owners = {registry().owner(component).distribution for component in recipe.components()} - {"raytx"}
    return [project for owner in sorted(owners) if (project := _project(owner))]


def _project(distribution: str) -> Path | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        origin = json.loads(metadata.distribution(distribution).read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            return Path(url2pathname(urlsplit(origin["url"]).path))
    return None


def _wheel(project: Path, target: Path) -> Path:
    """Build a project's wheel and return it."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(target), str(project)]
    before = set(target.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    built = set(target.glob("*.whl")) - before
    if done.returncode or not built:
        words = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
        raise RaytxError(f"{project}: cannot be built into a wheel for the cluster: {words[-1]}")
    return built.pop()


def _send(
    client: JobSubmissionClient, *, prefix: str, entrypoint: str, runtime_env: dict[str, Any], console: Console
) -> str:
    """Submit under the first attempt's name that has not failed, and return it. A job under way is joined."""
    attempt = 1
    while (status := _status(client, f"{prefix}-{attempt}")) in (JobStatus.FAILED, JobStatus.STOPPED):
        attempt += 1
    job = f"{prefix}-{attempt}"
    if status == JobStatus.SUCCEEDED:
        console.print(
            f"job {job} is there already: succeeded, with exactly this recipe, code and data. Nothing was started. "
            "To train anew, give the run another name (name=...)",
            highlight=False,
            soft_wrap=True,
        )
        return job
    if status is not None:
        console.print(f"job {job} is there already: {status.value.lower()}", highlight=False)
        return job
    try:
        client.submit_job(
            submission_id=job, entrypoint=entrypoint, runtime_env=runtime_env, metadata={"raytx": entrypoint}
        )
    except Exception as error:
        if "already exists" not in str(error):
            raise ResourceError(f"the job was refused: {_last_line(error)}") from error
    console.print(f"job {job}: {entrypoint}", highlight=False, soft_wrap=True)
    return job


def _status(client: JobSubmissionClient, job: str) -> JobStatus | None:
    """Return a job's status, or None for a job that was never submitted."""
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise ResourceError(f"the job server failed: {_last_line(error)}") from error


# ------------------------------------------------------------------------------------------------------ its log


def _follow(client: JobSubmissionClient, job: str, console: Console) -> int:
    """Print the job's log as it grows; return its exit code. Ctrl-C ends the following, not the job."""
    try:
        info = asyncio.run(_print_log(client, job, console))
    except KeyboardInterrupt:
        address = client.get_address()
        console.print(
            f"\njob {job} goes on. Follow it again with the same command; stop it with\n"
            f"  ray job stop --address {address} {job}",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    if info.status != JobStatus.SUCCEEDED:
        console.print(f"job {job} {info.status.value.lower()}: {info.message or ''}", style="red", soft_wrap=True)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    return 0 if info.status == JobStatus.SUCCEEDED else 1


async def _print_log(client: JobSubmissionClient, job: str, console: Console) -> JobDetails:
    """Print each part of the log once, and return how the job ended.

    A connection that breaks is made again, and begins at the beginning. Raises ResourceError when none can be made for
    minutes.
    """
    seen, silent_since = 0, math.inf
    while True:
        position = 0
        with contextlib.suppress(*BROKEN):
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, seen - position) :]
                position += len(text)
                seen = max(seen, position)
                console.file.write(fresh)
                console.file.flush()
        try:
            info = client.get_job_info(job)
        except BROKEN as error:
            silent_since = min(silent_since, time.monotonic())
            if time.monotonic() - silent_since > SILENT_S:
                raise _given_up(client, job, error) from error
        else:
            if info.status.is_terminal():
                return info
            silent_since = math.inf
        await asyncio.sleep(1)


def _given_up(client: JobSubmissionClient, job: str, error: Exception) -> ResourceError:
    return ResourceError(
        f"{client.get_address()} has not answered for {SILENT_S / 60:g} minutes: {_last_line(error)}. Job {job} goes "
        "on without that; follow it again with the same command"
    )


def _last_line(error: BaseException) -> str:
    return (str(error).strip().replace("\\n", "\n").splitlines() or [type(error).__name__])[-1]
