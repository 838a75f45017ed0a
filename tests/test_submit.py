"""Jobs: a recipe is checked before it leaves, arrives with its plugins, and its exit code comes back."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from aiohttp import ServerDisconnectedError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

from raytx.errors import RaytxError, RecipeError, ResourceError

submit = importlib.import_module("raytx.submit")  # `raytx.submit` itself is the function

RECIPE: dict[str, Any] = {
    "name": "job",
    "model": {
        "type": "decoder",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "vocab_size": 300,
        "tokenizer": {"train": "bpe", "vocab_size": 300},
    },
    "data": {"type": "text-files", "path": "texts", "split": {"test": 0}},
    "strategy": {"type": "single"},
    "train": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "max_length": 16},
}

HEAD = """
import sys, ray
from raytx import cluster
cluster.connect(num_cpus=2, dashboard=True)
print("http://" + ray._private.worker._global_node.webui_url, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a recipe and its data, and a shell standing in it."""
    directory = tmp_path / "project"
    (directory / "texts").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (directory / "texts" / f"{name}.txt").write_text(f"the quick brown fox {name} jumps over the lazy dog\n" * 20)
    (directory / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "storage_path": str(tmp_path / "runs")}))
    monkeypatch.chdir(directory)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return directory


class FakeClient(JobSubmissionClient):  # type: ignore[misc]
    """A job server that remembers what it was sent; what is uploaded gets its address from Ray itself."""

    def __init__(self, **jobs: JobStatus) -> None:
        self.jobs, self.sent, self.uploads = dict(jobs), [], []

    def _package_exists(self, package_uri: str) -> bool:
        return package_uri in self.uploads

    def _upload_package(self, package_uri: str, *args: Any, **kwargs: Any) -> None:
        self.uploads.append(package_uri)

    def get_job_status(self, job: str) -> JobStatus:
        if job not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return self.jobs[job]

    def submit_job(self, **job: Any) -> str:
        self.sent.append(job)
        self.jobs[job["submission_id"]] = JobStatus.SUCCEEDED
        return str(job["submission_id"])


def send(client: FakeClient) -> str:
    return submit._send(
        client,
        prefix="job-0",
        entrypoint="python -m raytx train r.yaml",
        runtime_env={},
        console=Console(quiet=True),
    )


def test_a_recipe_is_sent_once_under_its_own_name() -> None:
    client = FakeClient()
    assert send(client) == "job-0-1"
    assert [job["submission_id"] for job in client.sent] == ["job-0-1"]


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING, JobStatus.SUCCEEDED])
def test_a_job_that_is_there_is_joined_and_not_sent_again(status: JobStatus) -> None:
    client = FakeClient(**{"job-0-1": status})
    assert send(client) == "job-0-1"
    assert client.sent == []


def test_after_failed_and_stopped_attempts_comes_the_next_one() -> None:
    client = FakeClient(**{"job-0-1": JobStatus.FAILED, "job-0-2": JobStatus.STOPPED})
    assert send(client) == "job-0-3"


# ------------------------------------------------------------------------------------------- what makes it the same


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(submit, "_client", lambda address: fake)
    return fake


def submitted(client: FakeClient, **options: Any) -> str:
    """Submit the project's recipe; return what was printed."""
    console = Console(record=True, width=400, file=open(os.devnull, "w"))  # noqa: SIM115
    submit.submit("recipe.yaml", wait=False, console=console, **options)
    return console.export_text()


def test_the_same_again_joins_the_job_that_succeeded_and_says_that_nothing_was_started(
    project: Path, client: FakeClient
) -> None:
    submitted(client)
    told = submitted(client)
    assert len(client.sent) == len(client.uploads) == 1
    assert "is there already: succeeded, with exactly this recipe, code and data. Nothing was started" in told


@pytest.mark.parametrize("name", ["texts/a.txt", "metric.py"])
def test_changed_data_or_code_in_what_is_uploaded_is_another_job(project: Path, client: FakeClient, name: str) -> None:
    submitted(client)
    (project / name).write_text("print('something else')")
    assert "already" not in submitted(client)
    assert len({job["submission_id"] for job in client.sent}) == 2


def test_what_is_not_uploaded_does_not_make_another_job(project: Path, client: FakeClient) -> None:
    (project / ".gitignore").write_text("*.log\n")
    submitted(client)
    (project / "raytx-runs").mkdir()
    (project / "raytx-runs" / "metrics.jsonl").write_text("{}")
    (project / "yesterday.log").write_text("a line")
    (project / "__pycache__").mkdir()
    assert "already" in submitted(client)
    assert len(client.sent) == 1


def test_other_overrides_are_another_job(project: Path, client: FakeClient) -> None:
    submitted(client)
    submitted(client, overrides=["optim.lr=1e-5"])
    submitted(client, overrides=["train.steps=2"])  # as in the recipe, so the two recipes are equal
    assert len({job["submission_id"] for job in client.sent}) == 3


def test_a_changed_module_is_another_job(project: Path, client: FakeClient, tmp_path: Path) -> None:
    module = tmp_path / "extra"
    module.mkdir()
    (module / "__init__.py").write_text("scale = 1")
    submitted(client, py_modules=[module])
    submitted(client, py_modules=[module])
    assert len(client.sent) == 1
    (module / "__init__.py").write_text("scale = 2")
    submitted(client, py_modules=[module])
    assert len({job["submission_id"] for job in client.sent}) == 2


def test_a_plugin_whose_code_changed_but_not_its_version_is_uploaded_again_as_another_job(
    project: Path, client: FakeClient, tmp_path: Path
) -> None:
    for code in ("scale = 1", "scale = 1", "scale = 2"):
        submitted(client, py_modules=[make_wheel(tmp_path, code)])
    (first,), (second,) = (job["runtime_env"]["py_modules"] for job in client.sent)
    assert first != second
    assert {first, second} <= set(client.uploads)
    assert client.sent[0]["submission_id"] != client.sent[1]["submission_id"]


def make_wheel(directory: Path, code: str) -> Path:
    """Write a wheel whose name does not tell its content."""
    wheel = directory / "extra-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("extra.py", code)
    return wheel


def test_a_module_that_is_no_wheel_is_refused_with_its_path(project: Path, client: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "extra-1.0-py3-none-any.whl").write_text("no archive")
    with pytest.raises(RaytxError, match=r"extra-1\.0-py3-none-any\.whl: not a wheel that can be sent"):
        submitted(client, py_modules=[tmp_path / "extra-1.0-py3-none-any.whl"])


def test_a_job_that_is_stopped_has_its_grace_to_save_and_time_to_be_taken_down(tmp_path: Path) -> None:
    environment = submit._runtime_env(tmp_path, [], 12.5)
    assert environment["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGTERM"
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) == 13 + submit.TAKEN_DOWN_S
    assert ".git" in environment["excludes"]
    assert "py_modules" not in environment


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_a_variable_that_would_win_over_the_address_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://10.0.0.1:8265")
    with pytest.raises(RaytxError, match=f"{variable}=http://10.0.0.1:8265 would send the job there"):
        submit._address("http://10.0.0.2:8265")
    assert submit._address("10.0.0.1:8265/") == "http://10.0.0.1:8265"
    assert submit._address(None) == "http://10.0.0.1:8265"


def test_a_mistake_in_the_recipe_is_found_before_anything_is_contacted(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"optim\.lrr: unknown key"):
        submit.submit("recipe.yaml", overrides=["optim.lrr=1"], address="http://127.0.0.1:1")


def test_impossible_arithmetic_is_found_before_anything_is_contacted(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.global_batch_size=3"):
        submit.submit("recipe.yaml", overrides=["train.global_batch_size=3"], address="http://127.0.0.1:1")


def test_a_relative_file_must_be_in_what_is_uploaded(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"which is what gets uploaded: data\.path=nowhere"):
        submit.submit("recipe.yaml", overrides=["data.path=nowhere"], address="http://127.0.0.1:1")


def test_an_absolute_file_is_the_clusters_and_only_mentioned(project: Path) -> None:
    console = Console(record=True, width=200)
    with pytest.raises(ResourceError, match="no job server answers"):
        submit.submit("recipe.yaml", overrides=["data.path=/only/there"], address="http://127.0.0.1:1", console=console)
    assert "data.path=/only/there: not on this machine; the job will look on the cluster" in console.export_text()


def test_a_recipe_outside_the_uploaded_directory_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(RaytxError, match="--working-dir"):
        submit.submit("recipe.yaml", working_dir=tmp_path / "project" / "texts")


def test_a_whole_home_directory_is_never_uploaded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    with pytest.raises(RaytxError, match="would be uploaded"):
        submit.submit("recipe.yaml")


def test_no_server_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ResourceError, match=f"no job server answers at {address}"):
            submit._client(address)


def test_a_clusters_own_address_is_no_job_server() -> None:
    with pytest.raises(RaytxError, match="is no job server"):
        submit._client("ray://127.0.0.1:10001")


# ------------------------------------------------------------------------------------------------------- its log


class Tunnel(FakeClient):
    """A job of two lines; its server answers, or does not, as it is told, and with the last answer the job is done."""

    def __init__(self, *answers: bool) -> None:
        super().__init__()
        self.answers, self.tails = list(answers), 0

    def get_address(self) -> str:
        return "http://head:8265"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.tails += 1
        if self.tails == 2:
            raise ServerDisconnectedError
        yield "one\n"
        if len(self.answers) == 1:
            yield "two\n"

    def get_job_info(self, job: str) -> JobDetails:
        if not self.answers.pop(0):
            raise ConnectionError("connection refused")
        status = JobStatus.RUNNING if self.answers else JobStatus.SUCCEEDED
        code = None if self.answers else 0
        return JobDetails(
            type="SUBMISSION", entrypoint="raytx", submission_id=job, status=status, driver_exit_code=code
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only where somebody waits."""
    now = [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(submit.asyncio, "sleep", sleep)
    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: now[0]))


def test_a_job_is_followed_through_a_connection_that_is_down_for_minutes(
    clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Tunnel(True, *[False] * 290, True, *[False] * 290, True)
    assert submit._follow(client, "job-0-1", Console()) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_job_server_that_does_not_answer_any_more_is_given_up_on_and_the_job_goes_on(clock: None) -> None:
    client = Tunnel(True, *[False] * 400, True)
    with pytest.raises(
        ResourceError, match=r"head:8265 has not answered for 5 minutes: .*refused\. Job job-0-1 goes on"
    ):
        submit._follow(client, "job-0-1", Console(quiet=True))
    assert 90 < len(client.answers) < 110


# --------------------------------------------------------------------------------------------- on a real job server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    """The address of a job server that this test started, and that ends with its standard input."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HEAD], env=environment(home), stdin=pipe, stdout=pipe, text=True
    ) as head:
        assert head.stdout is not None
        yield head.stdout.readline().strip()


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1"} | more


def run_submit(project: Path, home: Path, server: str, *overrides: str, **more: Any) -> tuple[int, str]:
    """Submit in a process of its own, as a shell would; return the exit code and what was printed."""
    options = {"address": server, "overrides": overrides, "python": sys.executable, **more.pop("options", {})}
    script = f"import sys; from raytx.submit import submit; sys.exit(submit('recipe.yaml', **{options!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=project,
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_job_trains_where_it_was_sent_and_its_log_and_exit_code_come_back(
    project: Path, home: Path, server: str, tmp_path: Path
) -> None:
    code, text = run_submit(project, home, server)
    assert code == 0, text
    assert "step-00000002 committed" in text
    assert "WebSocket" not in text
    plan = json.loads((tmp_path / "runs" / "job" / "plan.json").read_text())
    assert plan["recipe"]["data"]["path"] == "texts"
    assert list((tmp_path / "runs" / "job" / "checkpoints").glob("step-*"))
    code, text = run_submit(project, home, server)
    assert code == 0
    assert "is there already: succeeded" in text


@pytest.mark.slow
def test_a_job_that_fails_returns_its_exit_code_and_is_tried_anew_the_next_time(
    project: Path, home: Path, server: str
) -> None:
    first = run_submit(project, home, server, "data.path=/only/there", "name=lost")
    second = run_submit(project, home, server, "data.path=/only/there", "name=lost")
    assert (first[0], second[0]) == (2, 2)
    assert "no such file: data.path=/only/there" in first[1]
    assert "-1: " in first[1]
    assert "-2: " in second[1]


@pytest.mark.slow
def test_a_wrong_token_is_one_clear_error(project: Path, home: Path, server: str) -> None:
    code, text = run_submit(project, home, server, RAY_AUTH_TOKEN="0" * 64)
    assert code == 1
    assert "asks for the cluster's token" in text.splitlines()[-1]
    code, text = run_submit(project, home, server, RAY_AUTH_MODE="disabled")
    assert "asks for the cluster's token" in text.splitlines()[-1]


@pytest.mark.slow
def test_a_plugin_project_travels_as_a_wheel_and_is_found_by_its_entry_point(
    project: Path, home: Path, server: str, tmp_path: Path
) -> None:
    plugin = make_plugin(tmp_path / "plugin")
    # Here the plugin is not installed, so this machine cannot check a recipe that names it: the job lists it instead.
    script = tmp_path / "project" / "raytx_probe.py"
    script.write_text("from raytx.registry import registry; print('found', sorted(registry().components['export']))")
    wheel = submit._module(plugin, tmp_path)
    job = f"""
        import importlib, sys
        from pathlib import Path
        from rich.console import Console
        submit = importlib.import_module("raytx.submit")
        client = submit._client({server!r})
        env = submit._runtime_env(Path.cwd(), [Path({str(wheel)!r})], 30)
        job = submit._send(client, prefix="probe", entrypoint="{sys.executable} raytx_probe.py", runtime_env=env,
                           console=Console())
        sys.exit(submit._follow(client, job, Console()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(job)],
        cwd=project,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'probe-format'" in done.stdout


def make_plugin(directory: Path) -> Path:
    """Write a small plugin project that provides an export component."""
    package = directory / "probe_plugin"
    package.mkdir(parents=True)
    (directory / "pyproject.toml").write_text(
        textwrap.dedent("""
            [build-system]
            requires = ["hatchling"]
            build-backend = "hatchling.build"
            [project]
            name = "probe-plugin"
            version = "1.0"
            [project.entry-points.raytx]
            probe_plugin = "probe_plugin"
        """)
    )
    (package / "__init__.py").write_text(
        textwrap.dedent("""
            from typing import Literal
            from raytx import hookimpl
            from raytx.components import ExportConfig
            RAYTX_API = 1

            class Probe(ExportConfig):
                "A format that only says that it is there."
                type: Literal["probe-format"] = "probe-format"

            @hookimpl
            def raytx_export():
                return [Probe]
        """)
    )
    return directory
