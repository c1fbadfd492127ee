import signal

import pytest


@pytest.fixture
def terminated():
    """SIGTERM raises as it does under `pipeline run`."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)
