"""Signals that ask for the end: the first one counts, repeats do not, a late one skips the checkpoint."""

import os
import signal

import pytest

import hpdm.training.shutdown as shutdown
from hpdm.training.shutdown import SIGNALS, Interrupted, Stop


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the module sees, in a list of one number; the handlers of before are put back.

    The test begins with those of a new process: a training that ran in this one leaves its own behind.
    """
    now = [100.0]
    monkeypatch.setattr(shutdown.time, "monotonic", lambda: now[0])
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield now
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), list(zip(SIGNALS, (130, 143, 129, 138))))
def test_a_signal_is_remembered_with_its_exit_status(clock, number, status):
    before = signal.getsignal(number)
    with Stop() as stop:
        send(number)
        assert stop.requested == number
        send(signal.SIGTERM)
        assert stop.requested == number  # the first one counts
    assert Interrupted(stop.requested).status == status
    clock[0] += 60
    if callable(before):
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert signal.getsignal(number) is before


def test_repeats_are_one_signal_and_a_late_one_skips_the_checkpoint(clock, caplog):
    with Stop() as stop:
        send(signal.SIGTERM)
        for seconds in (0.02, 0.5, 4.0):
            clock[0] = 100 + seconds
            send(signal.SIGTERM)
        assert "ending without a checkpoint" not in caplog.text
        clock[0] = 106
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
    assert stop.requested == signal.SIGTERM
    assert "SIGTERM again: ending without a checkpoint" in caplog.text


def test_a_repeat_on_the_way_out_is_ignored(clock):
    with Stop():
        send(signal.SIGTERM)
    clock[0] += 1
    send(signal.SIGTERM)  # would kill this process


def test_what_is_interruptible_ends_at_once(clock):
    with Stop() as stop:
        with pytest.raises(Interrupted), stop.interruptible():
            send(signal.SIGHUP)
        with pytest.raises(Interrupted), stop.interruptible():
            pytest.fail("a signal came before")
        with stop.interruptible(False):
            pass


def test_without_a_signal_the_handlers_are_put_back(clock):
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop() as stop:
        assert [signal.getsignal(number) for number in SIGNALS] == [stop._request] * 4
    assert [signal.getsignal(number) for number in SIGNALS] == before
