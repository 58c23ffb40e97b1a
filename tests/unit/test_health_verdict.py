"""The verdict over health checks, with Docker's semantics (moby's daemon/health.go, handleProbeResult)."""

import dataclasses
import datetime
import time

import pytest

from agent import (
    HEALTH_OUTPUT,
    Config,
    HealthChecker,
    HealthResult,
    Reaper,
    Runtime,
    Stream,
    TerminalPump,
    ThreadPool,
    _FirstBytes,
)


@pytest.fixture(scope="module")
def runtime():
    return Runtime(Config(), ThreadPool(), Reaper(), TerminalPump())


@pytest.fixture
def make_checker(runtime):
    """A checker that was started ``age`` seconds ago."""

    def make(age=0.0, **settings):
        checker = HealthChecker(dataclasses.replace(runtime, config=Config(**settings)))
        checker._started -= age
        return checker

    return make


def result(exit_code, started=0.0, took=0.0):
    """A check that began ``started`` seconds from now."""
    start = time.time() + started
    return HealthResult(start, start + took, exit_code, "")


def judge(checker, codes):
    for letter in codes:
        checker._judge(result({"+": 0, "-": 1, "t": -1}[letter]))
    state = checker.describe()
    return state["status"], state["failingStreak"]


# "+" is a success, "-" a failure, "t" a check that took too long.
@pytest.mark.parametrize(
    ("checks", "retries", "status", "streak"),
    [
        ("", 3, "starting", 0),
        ("+", 3, "healthy", 0),
        ("-", 3, "starting", 1),
        ("--", 3, "starting", 2),
        ("---", 3, "unhealthy", 3),
        ("----", 3, "unhealthy", 4),
        ("t", 1, "unhealthy", 1),
        ("ttt", 3, "unhealthy", 3),
        ("-t-", 3, "unhealthy", 3),
        ("-+", 3, "healthy", 0),
        ("--+--", 3, "healthy", 2),
        ("+--", 3, "healthy", 2),
        ("+---", 3, "unhealthy", 3),
        ("---+", 3, "healthy", 0),
        ("---+-", 3, "healthy", 1),
        ("---+---", 3, "unhealthy", 3),
        ("-", 1, "unhealthy", 1),
        ("-+-", 1, "unhealthy", 1),
    ],
)
def test_the_verdict_without_a_start_period(make_checker, checks, retries, status, streak):
    assert judge(make_checker(health_retries=retries), checks) == (status, streak)


@pytest.mark.parametrize(
    ("checks", "status", "streak"),
    [
        ("-", "starting", 0),
        ("-----", "starting", 0),
        ("ttttt", "starting", 0),
        ("----+", "healthy", 0),
        # A success ends the start period: from then on failures count.
        ("+-", "healthy", 1),
        ("+---", "unhealthy", 3),
        ("--+---", "unhealthy", 3),
        ("+---+", "healthy", 0),
    ],
)
def test_the_verdict_in_the_start_period(make_checker, checks, status, streak):
    checker = make_checker(health_retries=3, health_start_period=3600.0)
    assert judge(checker, checks) == (status, streak)


def test_failures_count_once_the_start_period_is_over(make_checker):
    checker = make_checker(age=100.0, health_retries=2, health_start_period=50.0)
    assert judge(checker, "-") == ("starting", 1)
    assert judge(checker, "-") == ("unhealthy", 2)


def test_failures_of_the_start_period_do_not_count_later(make_checker):
    checker = make_checker(health_retries=2, health_start_period=50.0)
    assert judge(checker, "-----") == ("starting", 0)
    checker._started -= 100.0
    assert judge(checker, "-") == ("starting", 1)


def test_a_check_that_began_in_the_start_period_does_not_count_when_it_fails_after_it(make_checker):
    # moby: timeSinceStart := result.Start.Sub(c.State.StartedAt)
    checker = make_checker(age=100.0, health_retries=1, health_start_period=50.0)
    checker._judge(result(1, started=-70.0, took=70.0))  # 30 s after the start
    assert (checker.describe()["status"], checker.describe()["failingStreak"]) == ("starting", 0)


def test_the_newest_five_results_are_kept_oldest_first(make_checker):
    checker = make_checker()
    for code in range(8):
        checker._judge(result(code))
    assert [entry["ExitCode"] for entry in checker.describe()["log"]] == [3, 4, 5, 6, 7]


def test_a_result_is_described_as_dockers_api_has_it():
    entry = HealthResult(0.0, 1.25, 7, "no").describe()
    assert entry == {
        "Start": "1970-01-01T00:00:00Z",
        "End": "1970-01-01T00:00:01.250000Z",
        "ExitCode": 7,
        "Output": "no",
    }


def test_the_times_of_a_result_are_rfc_3339():
    entry = result(0, took=0.5).describe()
    start, end = (datetime.datetime.fromisoformat(entry[name]) for name in ("Start", "End"))
    assert start.utcoffset() == datetime.timedelta(0)
    assert end - start == pytest.approx(datetime.timedelta(seconds=0.5), abs=datetime.timedelta(milliseconds=1))


@pytest.mark.parametrize("size", [1, HEALTH_OUTPUT - 1, HEALTH_OUTPUT, HEALTH_OUTPUT + 1, 100_000])
def test_the_first_bytes_of_the_output_are_kept(size):
    output = _FirstBytes()
    data = bytes(range(32, 127)) * (size // 95 + 1)
    for at in range(0, size, 1000):
        output.put(Stream.STDOUT, data[at : min(at + 1000, size)])
    assert output.text() == data[: min(size, HEALTH_OUTPUT)].decode()


def test_output_that_is_no_utf8_is_text_all_the_same():
    output = _FirstBytes()
    output.put(Stream.STDERR, b"\xff\0ok")
    assert output.text() == "\ufffd\0ok"
