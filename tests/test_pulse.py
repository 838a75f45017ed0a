"""A rank's pulse, read from its file."""

from __future__ import annotations

import time

import pytest

from raytx import pulse


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(pulse, "_pen", None)
    return tmp_path / "pulse"


def test_a_process_that_has_no_pulse_yet_is_at_its_start(path):
    assert pulse.read(path) == pulse.Pulse()


def test_what_a_process_enters_is_read_from_outside(path):
    pulse.begin(path)
    before = pulse.read(path).beats
    pulse.phase("data")
    pulse.stepped(3, 0.5)
    pulse.phase("backward")
    seen = pulse.read(path)
    assert (seen.step, seen.phase, seen.step_s, seen.beats) == (3, "backward", 0.5, before + 2)
    assert 0 <= seen.age_s < 5


def test_a_process_that_goes_on_from_a_step_is_at_it_before_it_has_done_another(path):
    pulse.begin(path)
    pulse.at(200)
    pulse.phase("data")
    seen = pulse.read(path)
    assert (seen.step, seen.step_s) == (200, 0.0)


def test_the_usual_step_is_the_median_of_the_last(path):
    pulse.begin(path)
    for step, seconds in enumerate([9.0] + [1.0] * pulse.WINDOW):
        pulse.stepped(step, seconds)
    pulse.phase("data")
    assert pulse.read(path).step_s == 1.0


def test_age_is_counted_from_the_last_phase(path):
    pulse.begin(path)
    pulse.phase("collective")
    time.sleep(0.05)
    assert pulse.read(path).age_s >= 0.05


def test_a_process_that_nobody_watches_has_no_pulse(path):
    pulse.phase("data")
    pulse.stepped(1, 1.0)
    assert not path.exists()
