"""Attempts, their ends and stalls, judged without any process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raytx.pulse import Pulse
from raytx.supervision import OVERDUE_S, SAME_STEP, SILENCE_S, SLOW_LIMITS, STALL_STEPS, End, Supervision, cause

DONE = End("done", step=9)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A supervision of two ranks, and what it told."""

    def __init__(self, *, max_failures=3, stall_s=30.0):
        self.told, self.clock = [], Clock()
        self.state = Supervision(max_failures=max_failures, stall_s=stall_s, tell=self.told.append, clock=self.clock)
        self.begin()

    def begin(self):
        return self.state.begin(2, {0: {}, 1: {}})

    def ends(self, *ends):
        for rank, end in enumerate(ends):
            self.state.ended(rank, end)
        return self.state.verdict()

    def beats(self, *pulses):
        for rank, pulse in enumerate(pulses):
            self.state.beat(rank, pulse)


def test_a_run_whose_ranks_are_all_done_is_at_its_end():
    verdict = Run().ends(DONE, DONE)
    assert not verdict.again
    assert verdict.end == DONE


def test_a_killed_rank_brings_another_attempt_and_is_named():
    run = Run()
    verdict = run.ends(
        End("failed", "RuntimeError: Connection closed by peer", 1.0), End("killed", "was ended by SIGKILL", 2.0)
    )
    assert verdict.again
    assert verdict.rank == 1
    assert run.told == ["rank 1 was ended by SIGKILL; starting anew from the last checkpoint (restart 1 of at most 3)"]


def test_the_first_error_is_told_and_not_those_that_follow_from_it():
    ends = {0: End("failed", "RuntimeError: Connection closed", 2.0), 1: End("failed", "ValueError: the cause", 1.0)}
    assert cause(ends) == (1, ends[1])


def test_what_the_user_must_mend_ends_the_run_at_once():
    verdict = Run().ends(End("failed", "Connection closed", 1.0), End("stopped", "the disk is full", 2.0))
    assert not verdict.again
    assert verdict.end.text == "the disk is full"


def test_one_rank_that_is_done_while_another_failed_is_not_the_end():
    assert Run().ends(DONE, End("killed", "was ended by SIGKILL")).again


def test_after_max_failures_no_restart_is_left():
    run = Run(max_failures=1)
    assert run.ends(DONE, End("killed", "was ended by SIGKILL")).again
    run.begin()
    assert not run.ends(DONE, End("killed", "was ended by SIGKILL")).again
    assert "no restart is left (scaling.max_failures)" in run.told[-1]


def test_errors_in_a_row_at_one_step_end_a_run_before_its_restarts_are_used_up():
    run = Run(max_failures=100)
    verdicts = []
    for _ in range(SAME_STEP):
        run.beats(Pulse(step=4), Pulse(step=4))
        verdicts.append(run.ends(DONE, End("failed", "ValueError: always")).again)
        run.begin()
    assert verdicts == [True] * (SAME_STEP - 1) + [False]
    assert "no other attempt is made" in run.told[-1]


def test_errors_between_which_the_run_gets_on_are_not_in_a_row():
    run = Run(max_failures=100)
    for step in range(SAME_STEP + 2):
        run.beats(Pulse(step=step), Pulse(step=step))
        assert run.ends(DONE, End("failed", "ValueError: now and then")).again
        run.begin()


def test_kills_at_one_step_are_no_errors_of_the_run():
    run = Run(max_failures=100)
    for _ in range(SAME_STEP + 2):
        assert run.ends(DONE, End("killed", "was ended by SIGKILL")).again
        run.begin()


def test_workers_that_ray_lost_count_as_failures():
    run = Run(max_failures=1)
    run.state.lost("the worker of rank 0 failed (its process died)", rank=0)
    assert run.told[-1].endswith("replacing the workers (restart 1 of at most 1)")
    assert run.state.attempt.over
    run.begin()
    assert not run.ends(DONE, End("killed", "was ended by SIGKILL")).again


BUSY = Pulse(beats=50, step=7, phase="backward", step_s=0.1)


def test_ranks_that_make_no_progress_for_longer_than_the_limit_have_stalled_and_the_one_behind_is_named():
    run = Run()
    run.beats(replace(BUSY, age_s=29), replace(BUSY, beats=49, phase="forward", age_s=29))
    assert run.state.judge() is None
    run.beats(replace(BUSY, age_s=31), replace(BUSY, beats=49, phase="forward", age_s=31))
    rank, told = run.state.judge()
    assert rank == 1
    assert "rank 1 is missing" in told.text
    assert "in forward after step 7" in told.text
    assert "31 s (limit 30 s)" in told.text


def test_a_stopped_process_is_the_missing_one_however_far_it_got():
    run = Run()
    run.beats(replace(BUSY, age_s=40, stopped=True), replace(BUSY, beats=49, age_s=41))
    assert "rank 0 is missing" in run.state.judge()[1].text
    assert "its process is stopped" in run.state.judge()[1].text


def test_a_group_of_which_one_rank_still_gets_on_has_not_stalled():
    run = Run()
    run.beats(replace(BUSY, age_s=0.1), replace(BUSY, age_s=300))
    assert run.state.judge() is None


@pytest.mark.parametrize("phase", ["start", "restore", "checkpoint", "end"])
def test_phases_that_may_be_long_have_a_longer_limit_for_everybody_who_waits_for_them(phase):
    run = Run()
    run.beats(replace(BUSY, phase=phase, age_s=31 * (SLOW_LIMITS - 1)), replace(BUSY, age_s=31 * (SLOW_LIMITS - 1)))
    assert run.state.judge() is None
    run.beats(replace(BUSY, phase=phase, age_s=31 * SLOW_LIMITS), replace(BUSY, age_s=31 * SLOW_LIMITS))
    assert run.state.judge() is not None


def test_the_first_step_may_be_long_as_kernels_are_compiled():
    run = Run()
    run.beats(replace(BUSY, step_s=0.0, age_s=100), replace(BUSY, step_s=0.0, age_s=100))
    assert run.state.judge() is None


def test_steps_that_are_long_by_themselves_lengthen_the_limit():
    run = Run()
    slow = replace(BUSY, step_s=20.0, age_s=20.0 * STALL_STEPS - 1)
    run.beats(slow, slow)
    assert run.state.judge() is None
    run.beats(replace(slow, age_s=101), replace(slow, age_s=101))
    assert "limit 100 s" in run.state.judge()[1].text


def test_a_keeper_that_falls_silent_is_named():
    run = Run(stall_s=5.0)
    run.beats(BUSY, BUSY)
    run.clock.now += SILENCE_S + 1
    run.state.beat(0, BUSY)
    assert run.state.silent() == [1]
    rank, told = run.state.judge()
    assert rank == 1
    assert "the worker of rank 1 has not been heard of" in told.text


def test_workers_that_ray_replaces_by_another_number_are_not_missed_and_the_next_ones_are():
    run = Run()
    for _ in range(2):
        run.beats(Pulse(9, 3, "forward", 0.1, 1.0), Pulse(9, 3, "forward", 0.1, 1.0))
        run.state.resized()
        run.clock.now += 200
        assert run.state.judge() is None
        run.begin()
    run.beats(Pulse(9, 3, "forward", 0.1, 1.0), Pulse(9, 3, "forward", 0.1, 1.0))
    run.clock.now += 200
    assert run.state.judge() is not None
    assert run.state.failures == 0


def test_null_waits_for_ever():
    run = Run(stall_s=None)
    run.beats(replace(BUSY, age_s=1e6), replace(BUSY, age_s=1e6))
    assert run.state.judge() is None


def test_a_stalled_attempt_is_begun_anew():
    run = Run()
    run.state.attempt.stalled = (1, End("killed", "rank 1 is missing"))
    verdict = run.ends(End("ended"), End("ended"))
    assert verdict.again
    assert (verdict.rank, verdict.end.text) == (1, "rank 1 is missing")
    assert run.told == ["stalled; starting anew from the last checkpoint (restart 1 of at most 3)"]


def test_a_process_that_stays_stopped_in_a_long_phase_is_not_waited_for_as_if_it_were_slow():
    run = Run()
    stuck = replace(BUSY, phase="checkpoint", age_s=31.0, stopped=True)
    run.beats(replace(stuck, stopped=False), stuck)
    assert run.state.judge() is None
    for age_s in (45.0, 62.0):
        run.clock.now += 15.5
        run.beats(replace(stuck, age_s=age_s, stopped=False), replace(stuck, age_s=age_s))
    assert "rank 1 is missing" in run.state.judge()[1].text


def test_a_process_that_a_debugger_stops_now_and_then_may_be_slow():
    run = Run()
    saving = replace(BUSY, phase="checkpoint", age_s=31.0)
    for moment in range(100):
        run.beats(saving, replace(saving, stopped=moment % 2 == 1, age_s=31.0 + moment))
        run.clock.now += 1
        assert run.state.judge() is None


def test_the_first_batch_of_an_evaluation_may_be_long_and_the_others_as_long_as_five_of_the_longest():
    run = Run()
    first = replace(BUSY, phase="evaluation", age_s=31.0 * (SLOW_LIMITS - 1))
    run.beats(first, first)
    assert run.state.judge() is None
    later = replace(first, longest_s=20.0, age_s=20.0 * STALL_STEPS - 1)
    run.beats(later, later)
    assert run.state.judge() is None
    run.beats(replace(later, age_s=101.0), replace(later, age_s=101.0))
    assert "limit 100 s" in run.state.judge()[1].text


def test_what_ends_after_a_run_was_told_to_end_is_no_failure():
    run = Run(max_failures=0)
    run.state.told_to_end = True
    assert run.ends(End("ended"), End("ended")).again
    assert run.state.failures == 0
    assert run.told == []
    run.begin()
    assert run.ends(DONE, End("ended", "had not saved within scaling.grace_s=30 s")).again
    assert run.told == [
        "rank 1 had not saved within scaling.grace_s=30 s; the run was told to end, so it is not started anew"
    ]


def test_workers_lost_beyond_max_failures_are_the_end_of_the_run():
    run = Run(max_failures=1)
    run.state.lost("the worker of rank 0 failed (its process died)", rank=0)
    assert run.state.exhausted() is None
    run.state.lost("the worker of rank 1 failed (its process died)", rank=1)
    end = run.state.exhausted()
    assert (end.again, end.rank, end.end.text) == (False, 1, "the worker of rank 1 failed (its process died)")


def test_workers_lost_after_a_run_was_told_to_end_are_no_failure():
    run = Run(max_failures=0)
    run.state.told_to_end = True
    run.state.lost("the worker of rank 0 failed (its process died)", rank=0)
    assert run.state.attempt.over
    assert run.state.exhausted() is None
    assert run.told == [
        "the worker of rank 0 failed (its process died); the run was told to end, so it is not started anew"
    ]


def test_keepers_that_do_not_end_their_ranks_are_named_once_after_a_minute():
    run = Run()
    run.state.ended(0, End("killed", "was ended by SIGKILL"))
    assert run.state.overdue() == []
    run.clock.now += OVERDUE_S - 1
    assert run.state.overdue() == []
    run.clock.now += 2
    assert run.state.overdue() == [1]
    assert run.state.overdue() == []


def test_an_attempt_in_which_all_have_ended_is_not_overdue():
    run = Run()
    run.state.ended(0, End("killed", "was ended by SIGKILL"))
    run.state.ended(1, End("ended"))
    run.state.overdue()
    run.clock.now += 2 * OVERDUE_S
    assert run.state.overdue() == []


def test_keepers_that_do_not_come_to_the_next_attempt_are_named_once_after_a_minute():
    run = Run()
    run.ends(End("killed", "was ended by SIGKILL"), End("ended"))
    assert run.state.absent([]) == []
    run.clock.now += 2 * OVERDUE_S
    assert run.state.absent([0]) == [], "it has not waited for long"
    run.clock.now += OVERDUE_S + 1
    assert run.state.overdue() == []
    assert run.state.absent([0]) == [1]
    assert run.state.absent([0]) == []


def test_a_keeper_that_never_reports_is_silent_after_the_time_that_a_start_may_take():
    run = Run(stall_s=30.0)
    run.state.beat(0, BUSY)
    run.clock.now += 30.0 * SLOW_LIMITS - 1
    assert 1 not in run.state.silent()
    run.clock.now += 2
    assert 1 in run.state.silent()


def test_an_evaluation_is_granted_when_every_rank_has_it_and_none_after_the_first_end():
    run = Run()
    run.state.reported(0, 2)
    assert run.state.attempt.granted == 0
    run.state.reported(1, 1)
    assert run.state.attempt.granted == 1
    run.state.ended(1, DONE)
    run.state.reported(1, 2)
    assert run.state.attempt.granted == 1, "its keeper may be waiting for the others' end"
    assert run.state.reportable() == 2
