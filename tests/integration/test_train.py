"""Runs on Ray: what they leave behind, and how they end when something dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import ray
from rich.console import Console

from raytx import checkpoint, cluster
from raytx.errors import RaytxError, RecipeError, ResourceError, TrainingError
from raytx.files import read_json
from raytx.journal import rows
from raytx.plan import resolve
from raytx.train import fit

pytestmark = pytest.mark.ray
STEPS = 120


@pytest.fixture(scope="module")
def local_ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster.connect(num_cpus=4)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def slow(recipe):
    """A run of two workers that takes some seconds, with a checkpoint every ten steps."""

    def make(name, **values):
        given = {"strategy": {"type": "ddp"}, "scaling__num_workers": 2, "train__steps": STEPS}
        return recipe(name, **(given | {"train__global_batch_size": 32, "save__every": 10} | values))

    return make


@pytest.fixture(scope="module")
def unbroken(local_ray, slow):
    return fit(resolve(slow("unbroken")), console=Console(quiet=True))


def weights(result_or_dir):
    directory = getattr(result_or_dir, "run_dir", result_or_dir)
    return dict(checkpoint.newest(directory).weights())


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


def steps_in(run_dir):
    return [row["step"] for row in rows(run_dir / "metrics.jsonl") if row["kind"] == "step"]


def workers_below(pid):
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_run_leaves_its_whole_record(unbroken):
    run_dir = unbroken.run_dir
    assert steps_in(run_dir) == list(range(1, STEPS + 1))
    assert read_json(run_dir / "plan.json")["steps"] == STEPS
    assert read_json(run_dir / "environment.json")["packages"]["torch"]
    assert list((run_dir / "tensorboard").glob("events*"))
    page = (run_dir / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert checkpoint.damage(unbroken.checkpoint) is None
    assert not [
        path for path in run_dir.rglob("*") if path.suffix in {".pt", ".pkl", ".bin"} and ".ray" not in path.parts
    ]
    assert len(checkpoint.complete(run_dir)) == 2


def test_a_finished_run_is_not_trained_again(unbroken, slow):
    before = (unbroken.run_dir / "metrics.jsonl").read_text()
    again = fit(resolve(slow("unbroken")), console=Console(quiet=True))
    assert again.steps == STEPS
    assert (unbroken.run_dir / "metrics.jsonl").read_text() == before


def rank_processes(run_dir):
    """Return the process ids of the ranks of the last attempt, in rank order."""
    return [row["pids"] for row in rows(run_dir / "metrics.jsonl") if row["kind"] == "placed"][-1]


@pytest.fixture
def while_training():
    """Do something to a run, in a thread, once it has done 25 steps."""
    threads = []

    def start(run_dir, act):
        def wait():
            wait_until(lambda: len(steps_in(run_dir)) >= 25)
            act()

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def assert_nothing_lost(result, unbroken):
    journal = rows(result.run_dir / "metrics.jsonl")
    assert [row["step"] for row in journal if row["kind"] == "resumed"]
    assert steps_in(result.run_dir) == list(range(1, STEPS + 1))
    assert_same_weights(weights(result), weights(unbroken))


def test_a_run_survives_the_death_of_a_rank_within_the_same_workers(unbroken, slow, while_training, capsys):
    plan = resolve(slow("bereft"))
    workers = []

    def kill():
        workers.append({process.pid for process in workers_below(os.getpid())})
        os.kill(rank_processes(plan.run_dir)[1], signal.SIGKILL)
        wait_until(lambda: any(row["kind"] == "resumed" for row in rows(plan.run_dir / "metrics.jsonl")))
        workers.append({process.pid for process in workers_below(os.getpid())})

    while_training(plan.run_dir, kill)
    result = fit(plan, console=Console(width=200))
    said = capsys.readouterr().out
    assert "rank 1 was ended by SIGKILL" in said
    assert "starting anew from the last checkpoint (restart 1 of at most 3)" in said
    assert workers[0] == workers[1]
    assert_nothing_lost(result, unbroken)


def test_a_run_survives_the_death_of_a_worker(unbroken, slow, while_training, capsys):
    plan = resolve(slow("replaced"))
    while_training(plan.run_dir, lambda: workers_below(os.getpid())[-1].kill())
    result = fit(plan, console=Console(width=200))
    assert "(its process died); replacing the workers (restart 1 of at most 3)" in capsys.readouterr().out
    assert_nothing_lost(result, unbroken)


def test_a_rank_that_is_stopped_is_named_and_replaced(unbroken, slow, while_training, capsys):
    plan = resolve(slow("stalled", scaling__stall_s=3))
    while_training(plan.run_dir, lambda: os.kill(rank_processes(plan.run_dir)[0], signal.SIGSTOP))
    result = fit(plan, console=Console(width=200))
    said = capsys.readouterr().out
    assert "rank 0 is missing: nobody has made progress for" in said
    assert "its process is stopped" in said
    assert "rank 1: File" in said
    assert list((plan.run_dir / "stalls").glob("*.txt"))
    assert_nothing_lost(result, unbroken)


def test_without_a_restart_left_the_first_cause_is_told(local_ray, slow, while_training):
    plan = resolve(slow("unlucky", scaling__max_failures=0))
    while_training(plan.run_dir, lambda: os.kill(rank_processes(plan.run_dir)[1], signal.SIGKILL))
    with pytest.raises(RaytxError, match=r"no restart is left \(scaling.max_failures=0\)") as failed:
        fit(plan, console=Console(quiet=True))
    assert "rank 1 was ended by SIGKILL" in str(failed.value)
    assert "goes on from the last checkpoint" in str(failed.value)


def test_a_run_continues_after_the_death_of_its_driver(unbroken, slow, tmp_path):
    recipe = slow("orphaned")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "raytx", "train", str(path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "COLUMNS": "200"}
    run_dir = resolve(recipe).run_dir
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(steps_in(run_dir)) >= 25)
    family = [driver, *psutil.Process(driver.pid).children(recursive=True)]
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs([p for p in family if isinstance(p, psutil.Process)], timeout=30)
    training = ("RayTrainWorker", "raytx.forkserver")
    assert not [p for p in alive if any(word in " ".join(p.cmdline()) for word in training)], (
        "they outlived their driver"
    )
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from checkpoint" in again.stdout
    assert steps_in(run_dir) == list(range(1, STEPS + 1))
    assert_same_weights(weights(run_dir), weights(unbroken))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_told_to_end_saves_first_and_goes_on_later(unbroken, slow, tmp_path, number, code):
    recipe = slow(f"told-{code}", save__every=None, evaluate__every=10)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "COLUMNS": "200"}
    run_dir = resolve(recipe).run_dir
    command = [sys.executable, "-m", "raytx", "train", str(path)]
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_until(lambda: len(steps_in(run_dir)) >= 15)
    family = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, number)  # as a terminal does, or a supervisor: to every process of the group
    output, _ = driver.communicate(timeout=90)
    assert driver.returncode == code, output
    step = checkpoint.newest(run_dir).step
    assert 15 <= step < STEPS
    assert f"at step {step}, with a checkpoint of it; the same command goes on from there" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [process.cmdline() for process in alive]
    if number == signal.SIGTERM:
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert again.returncode == 0, again.stdout + again.stderr
        assert_same_weights(weights(run_dir), weights(unbroken))


def test_a_run_that_learns_something_else_is_refused_and_the_keys_are_named(unbroken, slow):
    changed = slow("unbroken").override({"optim.lr": 1e-4, "train.seed": 7, "scaling.max_failures": 1})
    with pytest.raises(RecipeError) as refused:
        fit(resolve(changed), console=Console(quiet=True))
    assert "optim.lr: 0.005 in the run, 0.0001 now" in str(refused.value)
    assert "train.seed" in str(refused.value)
    assert "max_failures" not in str(refused.value)


def test_a_run_in_use_is_refused(unbroken, slow):
    plan = resolve(slow("unbroken"))
    from raytx import run

    with run.own(plan), pytest.raises(ResourceError, match="in use by another process"):
        fit(plan, console=Console(quiet=True))


def test_more_workers_than_the_cluster_holds_are_refused_with_the_numbers(local_ray, slow):
    plan = resolve(slow("crowded").override({"scaling.num_workers": 8, "scaling.wait_s": 2}))
    started = time.monotonic()
    with pytest.raises(ResourceError) as refused:
        fit(plan, console=Console(quiet=True))
    assert time.monotonic() - started < 30
    assert "8 x" in str(refused.value)
    assert "4" in str(refused.value)


def test_use_gpu_without_gpus_is_refused(local_ray, slow):
    plan = resolve(slow("gpuless").override({"scaling.use_gpu": True, "scaling.wait_s": 2}))
    with pytest.raises(ResourceError, match="use_gpu"):
        fit(plan, console=Console(quiet=True))


def test_a_diverging_run_stops_once_and_names_the_samples(local_ray, slow, capsys):
    values = {"optim.lr": 1e30, "optim.max_grad_norm": None, "optim.warmup": 0, "save.every": None}
    plan = resolve(slow("diverging").override(values))
    with pytest.raises(TrainingError, match=r"Samples .*: \d+, .*diverged"):
        fit(plan, console=Console(width=200))
    assert "restart" not in capsys.readouterr().out


def test_metrics_are_plain_json_rows(unbroken):
    for line in (unbroken.run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["kind"] in {"started", "baseline", "step", "eval", "checkpoint", "resumed", "placed"}


def test_a_training_run_listens_on_loopback_only(local_ray, slow):
    plan = resolve(slow("listening"))
    heard = []

    def listen():
        wait_until(lambda: len(steps_in(plan.run_dir)) >= 10)
        for process in psutil.Process().children(recursive=True):
            heard.extend(c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN)

    thread = threading.Thread(target=listen)
    thread.start()
    fit(plan, console=Console(quiet=True))
    thread.join()
    assert heard
    assert set(heard) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
