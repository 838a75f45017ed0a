"""The journal: one row a step, whatever happened in between."""

from __future__ import annotations

import io
import os
import resource

import pytest
from rich.console import Console

from raytx.journal import FED, LEDGER, METRICS, Display, Journal, rows


def step(number, loss=1.0):
    return {"kind": "step", "step": number, "loss": loss, "tokens_per_s": 10.0, "lr": 0.1, "seconds": 0.5}


def test_a_resumed_attempt_replaces_the_rows_it_does_again(tmp_path):
    first = Journal(tmp_path)
    first.take([{"kind": "started", "step": 0}, *(step(n) for n in range(1, 6))])
    second = Journal(tmp_path)
    second.take([{"kind": "resumed", "step": 3, "checkpoint": "step-3"}, *(step(n, 2.0) for n in range(4, 7))])
    found = [(row["step"], row["loss"]) for row in rows(tmp_path / METRICS) if row["kind"] == "step"]
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_a_fresh_start_forgets_everything(tmp_path):
    for _ in range(2):
        journal = Journal(tmp_path)
        journal.take([{"kind": "started", "step": 0}, step(1), step(2)])
    assert [row["step"] for row in rows(tmp_path / METRICS) if row["kind"] == "step"] == [1, 2]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    journal = Journal(tmp_path)
    journal.take([step(1)])
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "step", "st')
    assert [row["step"] for row in rows(tmp_path / METRICS)] == [1]


def test_tensorboard_reads_one_value_a_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path)
    journal.take([{"kind": "started", "step": 0}, *(step(n) for n in range(1, 6))])
    journal = Journal(tmp_path)
    journal.take([{"kind": "resumed", "step": 3, "checkpoint": "c"}, *(step(n, 2.0) for n in range(4, 7))])
    journal._events.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_display_shows_loss_speed_and_time_left_and_never_reads_markup():
    words = io.StringIO()
    with Display(total_steps=10, console=Console(file=words, width=200)) as display:
        display.show(step(10, 0.125))
        display.show({"kind": "eval", "step": 10, "loss": 0.5, "seconds": 1.0})
        display.show({"kind": "remark", "text": "worker 1 failed ([/tmp/pair.cc:5] closed)"})
    assert "step     10/10  loss 0.1250  10 tokens/s" in words.getvalue()
    assert "ETA 0:00" in words.getvalue()
    assert "held-out: loss 0.5000" in words.getvalue()
    assert "[/tmp/pair.cc:5] closed" in words.getvalue()


def test_a_record_that_cannot_be_written_is_told_and_those_behind_it_are_written(tmp_path):
    journal = Journal(tmp_path)
    fed = {"kind": FED, "step": 2, "samples": [1]}
    assert "not JSON serializable" in journal.take([{"kind": "eval", "step": 1, "loss": object()}, step(2), fed])
    assert journal.take([step(3)]) is None
    assert [row["step"] for row in rows(tmp_path / METRICS)] == [2, 3]
    assert [row["step"] for row in rows(tmp_path / LEDGER)] == [2]
    journal.sync()


def full(path):
    """Let a file be one of a disk that is full."""
    path.symlink_to("/dev/full")


def test_what_a_full_disk_does_not_take_is_written_in_order_when_there_is_room(tmp_path):
    journal = Journal(tmp_path)
    full(tmp_path / LEDGER)
    fed = {"kind": FED, "step": 1, "samples": [1]}
    assert f"No space left on device: '{tmp_path / LEDGER}'" in journal.take([step(1), fed, step(2)])
    assert "No space left on device" in journal.take([step(3)])
    with pytest.raises(OSError, match="No space left on device"):
        journal.sync()
    (tmp_path / LEDGER).unlink()
    assert journal.take([step(4)]) is None
    journal.sync()
    assert [row["step"] for row in rows(tmp_path / METRICS)] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(tmp_path / LEDGER)] == [1]


def committed(number):
    """Of a kind that TensorBoard has no part in."""
    return {"kind": "checkpoint", "step": number, "name": f"step-{number:08d}"}


def test_a_row_of_which_the_disk_took_a_part_is_taken_back(tmp_path):
    journal = Journal(tmp_path)
    journal.take([committed(1)])
    size, limits = (tmp_path / METRICS).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        assert "File too large" in journal.take([committed(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / METRICS).stat().st_size == size
    assert journal.take([committed(3)]) is None
    assert [row["step"] for row in rows(tmp_path / METRICS)] == [1, 2, 3]


def test_tensorboard_that_failed_costs_no_row_and_is_begun_anew(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path)
    journal.take([step(1)])
    journal._events._writer._async_writer._worker.exception = OSError(28, "No space left on device")
    assert "TensorBoard: [Errno 28] No space left on device" in journal.take([step(2), step(3)])
    assert journal.take([step(4)]) is None
    assert [row["step"] for row in rows(tmp_path / METRICS)] == [1, 2, 3, 4]
    journal._events.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {3, 4} <= {event.step for event in events.Scalars("train/loss")}


def test_a_journal_is_synchronised_file_by_file_and_so_is_its_directory(tmp_path, monkeypatch):
    synchronised, fsync = set(), os.fsync

    def watched(handle):
        synchronised.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    journal = Journal(tmp_path)
    journal.take([step(1), {"kind": FED, "step": 1, "samples": [1]}])
    monkeypatch.setattr(os, "fsync", watched)
    journal.sync()
    assert synchronised == {str(tmp_path), str(tmp_path / METRICS), str(tmp_path / LEDGER)}
