"""Work on several things at the same time, with the results in their order."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

WAITING = 4
"""Tasks a thread that are begun, or finished and not reported, before the oldest has to be."""


class Room:
    """Room for what several threads hold at a time; who asks for more than is left waits.

    Args:
        size: of all of it; more than that is let in alone.
    """

    def __init__(self, size: int):
        self._size = self._left = size
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        amount = min(amount, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


def in_threads(
    tasks: Iterable[Task], work: Callable[[Task], Result], report: Callable[[Task, Result], None], threads: int
) -> None:
    """Do every task in one of several threads, and report the results in the order of the tasks.

    When it is stopped, by Ctrl-C say, the tasks that run are finished and reported, and the others are not begun.

    Args:
        tasks: in order.
        work: what is done to each; runs in a thread, and raises nothing.
        report: gets each task and its result, in this thread; twice where it was stopped while it had them.
        threads: at most so many tasks run at a time; one is this thread.
    """
    if threads == 1:
        for task in tasks:
            result = work(task)
            try:
                report(task, result)
            except KeyboardInterrupt:
                report(task, result)
                raise
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[Task, Future[Result]]] = deque()

    def report_oldest() -> None:
        task, future = waiting[0]
        report(task, future.result())
        waiting.popleft()

    try:
        for task in tasks:
            waiting.append((task, pool.submit(work, task)))
            while len(waiting) == WAITING * threads or (waiting and waiting[0][1].done()):
                report_oldest()
        while waiting:
            report_oldest()
    finally:
        pool.shutdown(cancel_futures=True)
        while waiting and not waiting[0][1].cancelled():
            report_oldest()
