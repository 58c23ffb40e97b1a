"""Health checks, as Docker's HEALTHCHECK does them."""

from __future__ import annotations

import datetime
import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import DEADLINE, Agent, RawClient, children_of, eventually, run_agent, wait_gone

StartAgent = Callable[..., Agent]


def state(agent: Agent) -> dict[str, Any]:
    health = agent.health()["health"]
    assert isinstance(health, dict)
    return health


def wait_for_status(agent: Agent, status: str) -> dict[str, Any]:
    """Wait for a status; the state that was read with it."""

    def look() -> dict[str, Any] | None:
        health = state(agent)
        return health if health["status"] == status else None

    health = eventually(look, f"health {status}, now {state(agent)}")
    assert isinstance(health, dict)
    return health


def test_without_a_check_there_is_no_health(agent: Agent) -> None:
    assert "health" not in agent.health()


def test_it_is_starting_before_the_first_check(start_agent: StartAgent) -> None:
    agent = start_agent("--health-cmd", "true", "--health-interval", "1h")
    assert state(agent) == {"status": "starting", "failingStreak": 0, "log": []}


def test_it_becomes_healthy_unhealthy_and_healthy_again(start_agent: StartAgent, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    agent = start_agent(
        "--health-cmd", f"echo looking; test -e {flag}", "--health-interval", "50ms", "--health-retries", "2"
    )
    health = wait_for_status(agent, "healthy")
    assert health["failingStreak"] == 0
    assert health["log"][-1]["ExitCode"] == 0
    flag.unlink()
    health = wait_for_status(agent, "unhealthy")
    assert health["failingStreak"] >= 2
    assert [result["ExitCode"] for result in health["log"][-2:]] == [1, 1]
    assert health["log"][-1]["Output"] == "looking\n"
    flag.touch()
    assert wait_for_status(agent, "healthy")["failingStreak"] == 0


def test_it_is_unhealthy_only_after_the_retries(start_agent: StartAgent) -> None:
    agent = start_agent("--health-cmd", "exit 3", "--health-interval", "20ms", "--health-retries", "4")
    health = wait_for_status(agent, "unhealthy")
    assert health["failingStreak"] >= 4
    assert {result["ExitCode"] for result in health["log"]} == {3}


def test_the_times_are_rfc_3339_and_in_order(start_agent: StartAgent) -> None:
    agent = start_agent("--health-cmd", "true", "--health-interval", "20ms")
    wait_for_status(agent, "healthy")
    log = eventually(lambda: log if len(log := state(agent)["log"]) == 5 else None, "five results")
    times = []
    for result in log:
        assert set(result) == {"Start", "End", "ExitCode", "Output"}
        for name in ("Start", "End"):
            moment = datetime.datetime.fromisoformat(result[name])
            assert moment.tzinfo is not None
            times.append(moment)
    assert times == sorted(times)


def test_the_newest_five_results_are_kept(start_agent: StartAgent, tmp_path: Path) -> None:
    count = f"echo >>{tmp_path}/count; wc -l <{tmp_path}/count"
    agent = start_agent("--health-cmd", count, "--health-interval", "20ms")
    log = eventually(
        lambda: log if (log := state(agent)["log"]) and int(log[-1]["Output"]) >= 9 else None, "nine checks"
    )
    numbers = [int(result["Output"]) for result in log]
    assert numbers == list(range(numbers[-1] - 4, numbers[-1] + 1))


def test_a_check_that_takes_too_long_is_minus_1_and_its_whole_tree_is_killed(
    start_agent: StartAgent, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    stubborn = "trap '' HUP INT TERM"
    command = f"{stubborn}; sleep 300 & echo $! >>{pids}; setsid sleep 300 & echo $! >>{pids}; wait; sleep 300"
    agent = start_agent(
        "--health-cmd", command, "--health-interval", "50ms", "--health-timeout", "300ms", "--health-retries", "1"
    )
    health = wait_for_status(agent, "unhealthy")
    assert health["log"][0]["ExitCode"] == -1
    assert "timeout" in health["log"][0]["Output"]
    for line in pids.read_text().splitlines()[:2]:
        wait_gone(int(line))


def test_failures_in_the_start_period_do_not_count_and_a_success_ends_it(
    start_agent: StartAgent, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    flags = ("--health-interval", "20ms", "--health-retries", "1", "--health-start-period", "1h")
    agent = start_agent("--health-cmd", f"test -e {flag}", *flags)
    eventually(lambda: len(state(agent)["log"]) == 5, "five failures")
    health = state(agent)
    assert (health["status"], health["failingStreak"]) == ("starting", 0)
    flag.touch()
    wait_for_status(agent, "healthy")
    flag.unlink()
    wait_for_status(agent, "unhealthy")


def test_failures_after_the_start_period_count(start_agent: StartAgent) -> None:
    agent = start_agent(
        "--health-cmd", "false", "--health-interval", "20ms", "--health-start-period", "200ms", "--health-retries", "2"
    )
    wait_for_status(agent, "unhealthy")


def test_the_output_is_cut_at_4096_bytes(start_agent: StartAgent) -> None:
    agent = start_agent("--health-cmd", "yes | head -c 100000; echo err >&2", "--health-interval", "20ms")
    health = wait_for_status(agent, "healthy")
    assert health["log"][0]["Output"].count("y\n") in (2046, 2047, 2048)
    assert len(health["log"][0]["Output"]) <= 4096


def test_a_check_that_leaves_a_background_child_has_its_own_code(start_agent: StartAgent) -> None:
    agent = start_agent(
        "--drain-timeout", "50ms", "--health-cmd", "sleep 2 & echo fine; exit 0", "--health-interval", "20ms"
    )
    assert wait_for_status(agent, "healthy")["log"][0]["Output"] == "fine\n"


def test_checks_see_the_environment_but_not_the_token(start_agent: StartAgent) -> None:
    agent = start_agent(
        "--health-cmd", "echo $COLOUR; ! env | grep -q TOKEN", "--health-interval", "20ms", env={"COLOUR": "blue"}
    )
    assert wait_for_status(agent, "healthy")["log"][0]["Output"] == "blue\n"


def test_checks_end_with_the_main_process(start_agent: StartAgent, connect: Callable[..., RawClient]) -> None:
    agent = start_agent(
        "--health-cmd", "true", "--health-interval", "20ms", "--keep-alive", "--", "sh", "-c", "read x; exit 3"
    )
    wait_for_status(agent, "healthy")
    session = connect(agent).attach()
    session.write(b"\n")
    assert session.wait() == 3
    eventually(lambda: not children_of(agent.pid), "the end of the last check")
    before = state(agent)["log"]
    # A check would have come within these 50 execs, each of which takes longer than no time.
    client = connect(agent)
    for _ in range(50):
        client.run(["sleep", "0.01"])
    assert state(agent)["log"] == before


def test_the_agent_ends_in_the_middle_of_a_check(start_agent: StartAgent, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    agent = start_agent("--health-cmd", f"echo $$ >{pid_file}; exec sleep 300", "--health-interval", "20ms")
    pid = int(eventually(lambda: pid_file.exists() and pid_file.read_text(), "the check's start"))
    assert agent.stop() == 0
    wait_gone(pid)


def probe(address: str) -> tuple[int, str]:
    done = run_agent("--probe", "--addr", address)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_the_probe_asks_for_it(start_agent: Callable[..., Agent], tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.touch()
    agent = start_agent(
        "--health-cmd", f"test -e {good}", "--health-interval", "50ms", "--health-retries", "1",
        "--keep-alive", "--", "sh", "-c", "trap 'exit 6' USR1; echo up; while :; do sleep 0.02; done"
    )  # fmt: skip
    agent.wait_for_output(b"up")
    assert probe(agent.address) == (0, "")
    good.unlink()
    eventually(lambda: agent.health()["health"]["status"] == "unhealthy", "the verdict")
    code, words = probe(agent.address)
    assert code == 1
    assert re.fullmatch(r"the health check has failed \d+ times\n", words)
    agent.signal(signal.SIGUSR1)
    eventually(lambda: agent.health()["exited"], "the main process's end")
    assert probe(agent.address) == (1, "the main process has ended: exit code 6\n")
    agent.stop()
    code, words = probe(agent.address)
    assert (code, words) == (1, f"no answer from {agent.address}: Connection refused\n")


def test_the_probe_asks_at_a_unix_socket(start_agent: Callable[..., Agent], tmp_path: Path) -> None:
    start_agent("--addr", f"unix:{tmp_path}/socket")
    assert probe(f"unix:{tmp_path}/socket") == (0, "")
    assert probe(f"unix:{tmp_path}/none") == (1, f"no answer from unix:{tmp_path}/none: No such file or directory\n")


def test_the_probe_knows_what_is_no_agent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert probe(address) == (1, f"{address} is no healthy agent: HTTP status 200\n")
        thread.join(DEADLINE)
    assert run_agent("--probe", "--addr", "127.0.0.1:0").returncode == 2
