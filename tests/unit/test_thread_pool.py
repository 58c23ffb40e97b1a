"""Threads that are used again: who runs a job, how many there are, and when they end."""

import gc
import logging
import threading
import weakref

import pytest
from waiting import PATIENCE, InThread, wait_until

import agent
from agent import ThreadPool


@pytest.fixture
def pool(monkeypatch):
    """A pool whose threads have all ended when the test has."""
    monkeypatch.setattr(agent, "IDLE_THREAD_LIFE", 0.2)
    before = set(threading.enumerate())
    yield ThreadPool()

    def left():
        return [thread for thread in threading.enumerate() if thread not in before and thread.name == "pool"]

    wait_until(lambda: not left(), "every thread of the pool ends")


@pytest.fixture
def long_lived(monkeypatch, pool):
    """The pool with threads that stay parked longer than a test may take; they end with it."""
    monkeypatch.setattr(agent, "IDLE_THREAD_LIFE", 2 * PATIENCE)
    yield pool
    monkeypatch.setattr(agent, "IDLE_THREAD_LIFE", 0.01)
    for thread in pool.reserve(len(pool._idle)):
        thread.run(lambda: None)  # so that each reads the new time


def run(pool, job, *args):
    """Run a job in the pool; returns the thread that ran it, once that is parked."""
    ran = []

    def call():
        ran.append(threading.current_thread())
        job(*args)

    parked = len(pool._idle)
    pool.submit(call)
    wait_until(lambda: ran and len(pool._idle) >= max(parked, 1), "the job is done and its thread parked")
    return ran[0]


def test_a_job_gets_its_arguments(pool):
    done = []
    run(pool, lambda *args: done.append(args), 1, "two", None)
    assert done == [(1, "two", None)]


def test_a_thread_is_used_again(long_lived):
    first = run(long_lived, lambda: None)
    assert all(run(long_lived, lambda: None) is first for _ in range(10))


def test_a_job_does_not_run_in_the_thread_that_submits_it(pool):
    assert run(pool, lambda: None) is not threading.current_thread()


def test_there_are_as_many_threads_as_jobs_that_block(pool):
    # Every job may block for as long as a command runs: none waits for another to end.
    barrier = threading.Barrier(201)
    for _ in range(200):
        pool.submit(barrier.wait)
    barrier.wait(PATIENCE)


def test_a_busy_thread_is_not_given_a_second_job(long_lived):
    release, started = threading.Event(), threading.Event()

    def block():
        started.set()
        release.wait()

    long_lived.submit(block)
    assert started.wait(PATIENCE)
    try:
        run(long_lived, lambda: None)  # would never be done behind the first
    finally:
        release.set()


def test_many_jobs_each_run_once(pool):
    done, lock = [], threading.Lock()

    def job(number):
        with lock:
            done.append(number)

    for number in range(2000):
        pool.submit(job, number)
    wait_until(lambda: len(done) >= 2000, "every job is done")
    assert sorted(done) == list(range(2000))


def test_reserved_threads_are_different_and_wait_for_their_job(long_lived):
    run(long_lived, lambda: None)  # one of the three is parked already
    threads = long_lived.reserve(3)
    assert not long_lived._idle
    barrier = threading.Barrier(4)
    for thread in threads:
        thread.run(barrier.wait)
    barrier.wait(PATIENCE)


def test_reserved_threads_that_are_not_needed_are_parked(long_lived):
    threads = long_lived.reserve(3)
    long_lived.release(threads)
    wait_until(lambda: len(long_lived._idle) == 3, "the three are parked")
    assert set(long_lived.reserve(3)) == set(threads)
    long_lived.release(threads)
    wait_until(lambda: len(long_lived._idle) == 3, "the three are parked again")


def test_a_reserved_thread_does_not_end_before_its_job(monkeypatch, pool):
    monkeypatch.setattr(agent, "IDLE_THREAD_LIFE", 0.01)
    (thread,) = pool.reserve(1)
    (other,) = pool.reserve(1)
    ended = []
    other.run(lambda: ended.append(threading.current_thread()))
    wait_until(lambda: ended and not ended[0].is_alive(), "an idle thread ends")
    done = threading.Event()
    thread.run(done.set)  # reserved for longer than the idle life
    assert done.wait(PATIENCE)


def test_an_exception_in_a_job_is_logged_and_its_thread_goes_on(long_lived, caplog):
    def fail():
        raise ZeroDivisionError("on purpose")

    with caplog.at_level(logging.ERROR, logger="sockerless.agent"):
        first = run(long_lived, fail)
    assert "on purpose" in caplog.text
    assert run(long_lived, lambda: None) is first


def test_an_idle_thread_ends(pool):
    thread = run(pool, lambda: None)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not pool._idle


def test_a_job_that_comes_as_its_thread_ends_is_done_all_the_same(monkeypatch, pool):
    # The life is about as long as the pause between two jobs, so that they cross often.
    monkeypatch.setattr(agent, "IDLE_THREAD_LIFE", 0.0005)
    for _ in range(500):
        done = threading.Event()
        pool.submit(done.set)
        assert done.wait(PATIENCE)
        threading.Event().wait(0.0005)


def test_a_parked_thread_keeps_nothing_of_its_job_alive(long_lived):
    class Session:
        pass

    session = Session()
    reference = weakref.ref(session)
    run(long_lived, lambda argument: None, session)
    del session
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_when_the_system_refuses_a_thread_nothing_is_reserved(monkeypatch, long_lived, error):
    run(long_lived, lambda: None)

    def refuse(thread):
        raise error  # the system's own limit is not for a test to reach

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match=r"can't start new thread|out of memory"):
            long_lived.reserve(2)
    wait_until(lambda: len(long_lived._idle) == 1, "the one that was there is parked again")
    run(long_lived, lambda: None)


def test_threads_may_submit_at_once(pool):
    barrier = threading.Barrier(9)

    def submit_many():
        barrier.wait(PATIENCE)
        done = []
        for number in range(100):
            pool.submit(done.append, number)
        wait_until(lambda: len(done) == 100, "every job is done")
        return sorted(done)

    callers = [InThread(submit_many) for _ in range(8)]
    barrier.wait(PATIENCE)
    assert all(caller.result() == list(range(100)) for caller in callers)
