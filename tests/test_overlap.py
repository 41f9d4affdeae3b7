import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from unseg_hf.overlap import WAITING, Room, in_threads


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_tasks(threads):
    reported = []

    def work(task):
        time.sleep(0.02 if task % 3 == 0 else 0)
        return task * 10

    in_threads(range(20), work, lambda task, result: reported.append((task, result)), threads)
    assert reported == [(task, task * 10) for task in range(20)]


def test_few_tasks_are_begun_before_the_oldest_is_reported():
    begun, most = [], []
    in_threads(iter(range(40)), begun.append, lambda task, _: most.append(len(begun) - task), 2)
    assert max(most) <= WAITING * 2


def test_no_more_tasks_run_than_there_are_threads():
    running, most = [], []
    lock = threading.Lock()

    def work(task):
        with lock:
            running.append(task)
            most.append(len(running))
        time.sleep(0.005)
        with lock:
            running.remove(task)

    in_threads(range(30), work, lambda *_: None, 3)
    assert max(most) == 3


def test_when_stopped_what_runs_is_finished_and_reported_and_nothing_else_begins():
    finished, reported = [], []

    def work(task):
        if task == 2:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.05)
        finished.append(task)
        return task

    with pytest.raises(KeyboardInterrupt):
        in_threads(range(100), work, lambda task, _: reported.append(task), 2)
    assert sorted(set(reported)) == sorted(finished)
    assert 2 in reported
    assert len(reported) < 8


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_being_reported_when_it_is_stopped_is_not_lost(threads):
    reported, stopped = [], []

    def report(task, result):
        if task == 3 and not stopped:
            stopped.append(task)
            raise KeyboardInterrupt
        reported.append(task)

    with pytest.raises(KeyboardInterrupt):
        in_threads(range(100), lambda task: task, report, threads)
    assert reported[:4] == [0, 1, 2, 3]
    assert len(reported) < 20


def test_who_needs_more_room_than_is_left_waits_and_what_is_too_large_is_let_in_alone():
    room, lock, inside, most = Room(10), threading.Lock(), [], []

    def hold(amount):
        with room.taken(amount):
            with lock:
                inside.append(min(amount, 10))
                most.append(sum(inside))
            time.sleep(0.01)
            with lock:
                inside.remove(min(amount, 10))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, [3, 4, 100, 2, 6, 1, 10, 5] * 3))
    assert len(most) == 24
    assert max(most) == 10
    assert max(most) > min(most)
    with pytest.raises(KeyboardInterrupt), room.taken(10):
        raise KeyboardInterrupt
    with room.taken(10):
        pass
