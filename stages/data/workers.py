"""How many processes should load images? Measured on the training itself, whose batches are the same with any number.

the first steps with 0 workers -> with 1 -> 2 -> 4 ... as long as steps get shorter -> all others with the best
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from statistics import median
from typing import TypeVar

from pipeline.log import logger

MEASURED = 10  # steps
WORTH = 0.05  # less than this share of a step is not worth another process
Item = TypeVar("Item")


def measured_batches(
    begin: Callable[[int, int], Generator[Item, None, None]], first_step: int, most: int
) -> Generator[Item, None, None]:
    """Yield what `begin(first_step, workers)` yields. The number of workers is that with which a step, with all that the
    caller does between two batches, took the shortest: the median of ten steps after some that fill the queue.

    With 0 workers it is known what loading costs: where that is less than 5 % of a step, no other number is tried. At most
    `most` are tried.
    """
    step, tried = first_step, dict[int, float]()
    for workers in _candidates(most):
        source = begin(step, workers)
        waits, steps = [], []
        for number in range(-(2 * workers + 2), MEASURED):  # before 0: two batches a worker are queued, and sent for
            begun = time.perf_counter()
            batch = next(source)
            waited = time.perf_counter() - begun
            yield batch
            step += 1
            if number >= 0:
                waits.append(waited)
                steps.append(time.perf_counter() - begun)
        source.close()
        best = min(tried.values(), default=float("inf"))
        tried[workers] = median(steps)
        if tried[workers] > (1 - WORTH) * best or sum(waits) < WORTH * sum(steps):
            break
    chosen = min(tried, key=lambda workers: tried[workers])
    told = ", ".join(f"{1e3 * seconds:.1f} ms with {workers}" for workers, seconds in tried.items())
    logger.info("workers: %d, by the time of a step: %s", chosen, told)
    yield from begin(step, chosen)


def _candidates(most: int) -> Iterator[int]:
    yield 0
    workers = 1
    while workers <= most:
        yield workers
        workers *= 2
