"""Signals wait for the end of a step, and then do what they would have done."""

import os
import signal
import threading

import pytest

from stages.training.interruption import uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("terminated")
def test_a_signal_is_heard_at_the_end_of_the_block(number):
    reached = []
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def work():
        with uninterrupted():
            os.kill(os.getpid(), number)
            reached.append("end of the block")
        reached.append("after the block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["end of the block"]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.usefixtures("terminated")
def test_an_error_in_the_block_is_not_lost_without_a_signal():
    with pytest.raises(ZeroDivisionError), uninterrupted():
        _ = 1 / 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)  # heard as before


def test_other_threads_hear_no_signals_anyway():
    passed = []

    def block():
        with uninterrupted():
            passed.append(True)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert passed == [True]
