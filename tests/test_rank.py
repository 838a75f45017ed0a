"""Rank 0's records on their way to the disk and to the keeper, which no step waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from raytx import rank
from raytx.journal import LEDGER, METRICS, Journal, Record, rows
from raytx.rank import Writer

FED = {"kind": "fed", "step": 1, "samples": [1]}


def step(number: int) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": 1.0}


def test_what_was_logged_is_on_disk_after_a_flush(tmp_path: Path) -> None:
    told: list[Record] = []
    with Writer(tmp_path, tell=told.append) as writer:
        for record in (step(1), FED, step(2)):
            writer.log(record)
        writer.flush()
        assert [row["step"] for row in rows(tmp_path / METRICS)] == [1, 2]
        assert [row["step"] for row in rows(tmp_path / LEDGER)] == [1]
    assert told == [step(1), step(2)]


def test_a_flush_fails_as_long_as_the_disk_is_full_and_then_everything_is_there(tmp_path: Path) -> None:
    told: list[Record] = []
    (tmp_path / LEDGER).symlink_to("/dev/full")
    with Writer(tmp_path, tell=told.append) as writer:
        for record in (FED, step(1)):
            writer.log(record)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left on device") as refused:
                writer.flush()
        (tmp_path / LEDGER).unlink()
        writer.log(step(2))
        writer.flush()
    assert refused.value.filename == str(tmp_path / LEDGER)
    assert [row["step"] for row in rows(tmp_path / METRICS)] == [1, 2]
    assert [row["step"] for row in rows(tmp_path / LEDGER)] == [1]
    remarks = [record["text"] for record in told if record["kind"] == "remark"]
    assert remarks == [f"metrics cannot be written: [Errno 28] No space left on device: '{tmp_path / LEDGER}'"], "once"
    assert [record["step"] for record in told if record["kind"] == "step"] == [1, 2]


def test_a_flush_fails_on_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, take = threading.Event(), Journal.take

    def hanging(journal: Journal, records: Iterable[Record]) -> str | None:
        answers.wait(timeout=10)
        return take(journal, records)

    monkeypatch.setattr(Journal, "take", hanging)
    monkeypatch.setattr(rank, "FLUSH_LIMIT_S", 0.5)
    with Writer(tmp_path, tell=lambda record: None) as writer:
        writer.log(step(1))
        with pytest.raises(OSError, match=r"metrics are not on disk after 0\.5 s"):
            writer.flush()
        answers.set()
