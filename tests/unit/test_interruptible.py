"""What ends a program that has started servers unwinds its stack, so that they end with it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from vllm_cospec.server import interruptible


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_program_unwinds_its_stack(sent: signal.Signals) -> None:
    before = signal.getsignal(sent)
    unwound = []

    def end() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), sent)
                time.sleep(5)
            finally:
                unwound.append(sent)

    with pytest.raises(KeyboardInterrupt):
        end()
    assert unwound == [sent]
    assert signal.getsignal(sent) is before
