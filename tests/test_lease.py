from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid

import pytest

from raytx import lease
from raytx.errors import ResourceError
from raytx.lease import Lease
from raytx.storage import Store, StoreError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 0.5)
    monkeypatch.setattr(lease, "SETTLE_S", 0.02)


@pytest.fixture
def store():
    return Store(f"memory://{uuid.uuid4().hex}/runs")


def at(store, place):
    return Lease(store, "run/lease", place)


def held(store):
    return json.loads(store.read("run/lease"))


def test_a_second_holder_is_refused_and_told_who_the_first_is(store):
    with at(store, "here").held(doing="training", tell=print) as ours:
        with pytest.raises(ResourceError, match=r"in use by another process \(training, pid \d+ on"):
            at(store, "there").held(doing="training", tell=print).__enter__()
        assert ours()
        assert held(store)["place"] == "here"
    assert store.read("run/lease") is None


def test_a_lease_whose_holder_is_gone_is_taken_over_and_told(store):
    store.write(
        "run/lease", json.dumps({"place": "there", "id": "x", "doing": "training", "pid": 7, "host": "h"}).encode()
    )
    told, started = [], time.monotonic()
    with at(store, "here").held(doing="training", tell=told.append):
        assert time.monotonic() - started >= lease.STALE_S
        assert held(store)["place"] == "here"
    assert told[0].startswith("training, pid 7 on h has held this run")
    assert told[1] == "training, pid 7 on h is gone; this run is taken over"


def test_a_holder_that_stops_renewing_by_and_by_is_outlived(store):
    """A lease that is given back while it is watched need not be watched to the end."""
    store.write("run/lease", json.dumps({"place": "there", "id": "x"}).encode())
    threading.Timer(0.1, lambda: store.remove("run/lease")).start()
    started = time.monotonic()
    with at(store, "here").held(doing="training", tell=print):
        assert time.monotonic() - started < lease.STALE_S


def test_where_the_lock_was_held_the_lease_is_taken_over_at_once(store, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 60.0)
    store.write("run/lease", json.dumps({"place": "here", "id": "x", "pid": 7}).encode())
    told = []
    with at(store, "here").held(doing="training", tell=told.append):
        assert held(store)["id"] != "x"
    assert told == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_lease_that_cannot_be_read_is_somebodys_until_it_is_stale(store, content):
    store.write("run/lease", content)
    told = []
    with at(store, "here").held(doing="training", tell=told.append):
        assert held(store)["place"] == "here"
    assert len(told) == 2


def test_a_lease_is_renewed_through_failures_of_the_store(store, monkeypatch):
    with at(store, "here").held(doing="training", tell=print) as ours:
        write = Store.write
        failures = iter([True, True, True])

        def failing(self, name, data):
            if next(failures, False):
                raise StoreError("busy")
            write(self, name, data)

        monkeypatch.setattr(Store, "write", failing)
        deadline = time.monotonic() + 5
        while held(store)["beat"] < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert held(store)["beat"] >= 5
        assert ours()


def test_who_loses_the_lease_is_told_to_end_and_leaves_the_other_in_peace(store):
    told, lost = [], threading.Event()
    with at(store, "here").held(doing="training", tell=told.append, lost=lost.set) as ours:
        store.write("run/lease", json.dumps({"place": "there", "id": "x", "doing": "training", "pid": 7}).encode())
        assert lost.wait(5)
        assert not ours()
    assert "pid 7" in told[0]
    assert held(store)["id"] == "x"


HOLD = """
import sys, time
from raytx import lease
from raytx.storage import Store
lease.RENEW_S, lease.SETTLE_S = 0.05, 0.01
try:
    with lease.Lease(Store(sys.argv[1]), "run/lease", place="here").held(doing="training", tell=print):
        print("held", flush=True)
        time.sleep(60)
finally:
    print("saved what is another's by now")
"""


def test_who_loses_the_lease_ends_at_once_without_a_last_word_to_the_store(tmp_path):
    store = Store(f"file://{tmp_path}/runs")
    command = [sys.executable, "-c", HOLD, store.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        store.write("run/lease", json.dumps({"place": "there", "id": "x", "doing": "training", "pid": 7}).encode())
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "has taken this run over; this process ends" in said
    assert "saved" not in said
    assert held(store)["id"] == "x"


def test_a_store_that_cannot_be_used_is_a_mistake_to_mend():
    nowhere = Store("s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http&region=x")
    with pytest.raises(ResourceError, match=r"storage_path: cannot use s3://bucket/runs"):
        at(nowhere, "here").held(doing="training", tell=print).__enter__()
