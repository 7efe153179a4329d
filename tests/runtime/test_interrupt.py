"""Signals while a run is under way, in this process."""

import os
import signal

import pytest

from rayft.cluster.interrupt import SIGNALS, handling
from rayft.core.errors import InterruptedRun


@pytest.fixture(autouse=True)
def asked_before():
    """Whoever has the signals outside of a run; ours are put back."""
    heard = []
    former = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda number, _: heard.append(number))
    yield heard
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_save_then_stop_then_whoever_was_asked_before(number, asked_before):
    with handling() as interrupt:
        for asked, forced in ((True, False), (True, True)):
            os.kill(os.getpid(), number)
            assert (interrupt.asked, interrupt.forced) == (asked, forced)
            with pytest.raises(InterruptedRun):
                interrupt.check()
            interrupt.arm()  # again, as after ray.init
        assert asked_before == []
        os.kill(os.getpid(), number)
        assert asked_before == [number]
    os.kill(os.getpid(), number)
    assert asked_before == [number, number] and interrupt.count == 3


def test_a_library_that_takes_a_signal_is_not_given_it_back(asked_before):
    with handling() as interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init does
        interrupt.arm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked_before == [signal.SIGTERM]


def test_a_closed_terminal_under_nohup_is_nothing(asked_before):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handling() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.asked
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
