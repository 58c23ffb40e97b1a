"""GET /metrics: what it says agrees with what was done, and asking costs nobody anything."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import AS_PID_1, DEADLINE, TOKEN, Agent, RawClient, children_of, eventually, need, need_root
from test_version_2 import Client

from agent_client import AgentConn

OURS = "sockerless_agent_"
Labels = dict[str, str]


def get(agent: Agent, path: str = "/metrics", token: str = TOKEN) -> tuple[int, str, str]:
    """Status, content type and body."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(
            urllib.request.Request(f"http://{agent.address}{path}", headers=headers), timeout=DEADLINE
        ) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


class Scrape:
    """The values of one answer."""

    def __init__(self, agent: Agent) -> None:
        status, _, text = get(agent)
        assert status == 200, text
        self.values = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.values[OURS + name, tuple(sorted(labels.items()))]

    def process(self, name: str) -> float:
        return self.values[f"process_{name}", ()]


@contextmanager
def changes(agent: Agent) -> Iterator[Callable[..., float]]:
    """By how much a value has changed between the block's start and its end."""
    before = Scrape(agent)
    after: list[Scrape] = []
    yield lambda name, **labels: after[0](name, **labels) - before(name, **labels)
    after.append(Scrape(agent))


@contextmanager
def dial(agent: Agent) -> Iterator[AgentConn]:
    with AgentConn.dial(agent.address, token=agent.token) as conn:
        yield conn


# ── the format ────────────────────────────────────────────────────────────────


def test_the_answer_is_what_prometheus_reads(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--keep-alive", "--health-cmd", "true", "--", "sleep", "1000")
    status, content_type, text = get(agent)
    assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation, family
        assert family.type in ("counter", "gauge", "histogram"), family
        assert family.name.startswith((OURS, "process_")), family
        assert family.samples, family
        seen = [(sample.name, tuple(sample.labels.items())) for sample in family.samples]
        assert len(set(seen)) == len(seen), family
        # https://prometheus.io/docs/practices/naming: totals, and only they, end in _total; units are base units.
        assert all(sample.name.endswith("_total") == (family.type == "counter") for sample in family.samples), family
        assert not any(unit in family.name for unit in ("_ms", "_millis", "_kb", "_mb", "_percent")), family
    assert Scrape(agent)("build_info", version="0.1.0", python=python_of(agent)) == 1


def python_of(agent: Agent) -> str:
    with dial(agent) as conn:
        program = os.readlink(f"/proc/{agent.pid}/exe")
        script = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
        return str(conn.run([program, "-c", script], capture_output=True, text=True).stdout.strip())


def test_a_token_is_needed_if_one_is_set(agent: Agent, start_agent: Callable[..., Agent]) -> None:
    with changes(agent) as change:
        assert get(agent, token="")[0] == 401
        assert get(agent, token="wrong")[0] == 401
        assert get(agent, f"/metrics?token={TOKEN}", token="")[0] == 200
        assert get(agent, "/ws", token="wrong")[0] == 401
    assert change("auth_failures_total", reason="token") == 3
    assert get(start_agent(token=""), token="")[0] == 200


def test_an_unknown_path_is_told_what_there_is(agent: Agent) -> None:
    assert get(agent, "/metric")[::2] == (404, "not found; there are /health, /metrics and /ws\n")


# ── the values ────────────────────────────────────────────────────────────────


def test_sessions_and_their_bytes_are_counted(agent: Agent, connect: Callable[..., RawClient]) -> None:
    with changes(agent) as change:
        client = connect(agent)
        for _ in range(5):
            assert client.run(["sh", "-c", "cat; printf abc >&2"], stdin=b"x" * 1000)[:2] == (b"x" * 1000, b"abc")
        client.run(["head", "-c", "3000000", "/dev/zero"])
        client.close()
    assert change("sessions_started_total", kind="exec") == 6
    assert change("sessions_ended_total", kind="exec") == 6
    assert change("stream_bytes_total", stream="stdin") == 5000
    assert change("stream_bytes_total", stream="stdout") == 3005000
    assert change("stream_bytes_total", stream="stderr") == 15
    assert change("spawn_seconds_count") == 6
    assert change("spawn_seconds_sum") > 0
    assert change("spawn_seconds_bucket", le="+Inf") == 6
    assert change("connections_opened_total", protocol="1") == 1
    assert change("sessions_started_total", kind="attach") == 0


def test_version_2_is_counted_alike(agent: Agent) -> None:
    with changes(agent) as change, dial(agent) as conn:
        done = conn.run(["sh", "-c", "cat; cat /etc/hostname >&2"], input=b"y" * 2_000_000, capture_output=True)
        assert len(done.stdout) == 2_000_000
    assert change("sessions_started_total", kind="exec") == change("sessions_ended_total", kind="exec") == 1
    assert change("stream_bytes_total", stream="stdin") == change("stream_bytes_total", stream="stdout") == 2_000_000
    assert change("stream_bytes_total", stream="stderr") == Path("/etc/hostname").stat().st_size
    assert change("connections_opened_total", protocol="2") == 1


def test_what_a_closed_connection_moved_stays_counted(agent: Agent, connect: Callable[..., RawClient]) -> None:
    client = connect(agent)
    with changes(agent) as change:
        client.run(["head", "-c", "12345", "/dev/zero"])
    assert change("stream_bytes_total", stream="stdout") == 12345
    before = Scrape(agent)
    client.close()
    eventually(lambda: Scrape(agent)("connections") == before("connections") - 1, "the end of the connection")
    assert Scrape(agent)("stream_bytes_total", stream="stdout") == before("stream_bytes_total", stream="stdout")


def test_what_is_refused_is_counted_by_its_reason(
    agent: Agent, connect: Callable[..., RawClient], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    with changes(agent) as change:
        client = connect(agent)
        for _ in range(3):
            assert client.run(["/no/such"])[2]["reason"] == "not_found"
        for _ in range(2):
            assert client.run([str(plain)])[2]["reason"] == "not_executable"
        assert client.run(["true"], workdir=f"{tmp_path}/none")[2]["reason"] == "start_failed"
        assert client.attach().wait_last()["reason"] == "no_main_process"
        cat = client.exec(["cat"], id="one")
        client.send({"type": "exec", "id": "one", "cmd": ["true"]})
        assert "in use" in cat.wait_error()
        client.send({"type": "nonsense", "id": "one"})
        client.send({"type": "stdin", "id": "never there", "data": ""})
        client.wait_error()
        cat.close_stdin()
        while cat.exit is None:
            client.receive_one()
    expected = {
        "not_found": 3,
        "not_executable": 2,
        "start_failed": 1,
        "no_main_process": 1,
        "duplicate_session": 1,
        "bad_message": 1,
        "unknown_session": 1,
        "limit": 0,
        "stdin_overflow": 0,
    }
    assert {reason: change("errors_total", reason=reason) for reason in expected} == expected
    assert change("sessions_started_total", kind="exec") == 1
    assert change("spawn_seconds_count") == 1


def test_what_runs_is_shown_by_its_kind(start_agent: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start_agent("--keep-alive", "--", "sleep", "1000")
    kinds = ("exec", "attach", "detached", "archive")

    def running() -> dict[str, float]:
        scrape = Scrape(agent)
        return {kind: scrape("sessions", kind=kind) for kind in kinds}

    nothing = dict.fromkeys(kinds, 0.0)
    assert running() == nothing
    (tmp_path / "tree").mkdir()
    with dial(agent) as conn:
        commands = [conn.popen(["cat"]) for _ in range(3)]
        attached = conn.attach()
        detached = conn.start_detached(["sleep", "1000"])
        archive = conn.archive_put(str(tmp_path / "tree"))  # it waits for its stream
        eventually(
            lambda: running() == {"exec": 3, "attach": 1, "detached": 1, "archive": 1}, f"all run, now {running()}"
        )
        for command in commands:
            command.stdin.close()
            assert command.wait() == 0
        attached.detach()
        archive.end()
        os.kill(detached.pid, signal.SIGKILL)
        eventually(lambda: running() == nothing, "the end of all")
        conn.popen(["sleep", "1000"])
        eventually(lambda: running()["exec"] == 1, "another command")
    # A client that closes its connection gives its commands up.
    eventually(lambda: running() == nothing, "the end of all")


def test_parked_and_resumed_and_expired_sessions_are_counted(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent("--resume-window", "3s")
    with changes(agent) as change:
        first = Client(agent)
        sessions = [first.exec(["cat"], id=name) for name in ("a", "b", "c")]
        while not all(session.started for session in sessions):
            first.receive()
        first.ws.close()
        eventually(lambda: Scrape(agent)("parked_sessions") == 3, "three parked sessions")
        second = Client(agent)
        second.resume(sessions[0])
        while sessions[0].resumed is None:
            second.receive()
        assert Scrape(agent)("parked_sessions") == 2
        eventually(lambda: Scrape(agent)("parked_sessions") == 0, "nobody comes for the others")
        eventually(lambda: Scrape(agent)("sessions", kind="exec") == 1, "their end")
    assert change("sessions_parked_total") == 3
    assert change("sessions_resumed_total") == 1
    assert change("sessions_expired_total") == 2
    second.send("end", id="a")
    second.ws.close()


def test_connections_are_counted_as_they_come_and_go(agent: Agent, connect: Callable[..., RawClient]) -> None:
    eventually(lambda: Scrape(agent)("connections") == 0, "the end of other tests' connections")
    with changes(agent) as change:
        clients = [connect(agent) for _ in range(4)]
        for client in clients:
            client.assert_quiet()
        assert Scrape(agent)("connections") == 4
        for client in clients[:3]:
            client.close()
        clients[3].cut()
        eventually(lambda: Scrape(agent)("connections") == 0, "the end of all connections")
    assert change("connections_opened_total", protocol="1") == 4
    assert change("connections_closed_total", how="closed") == 3
    assert change("connections_closed_total", how="lost") == 1


@pytest.mark.root
def test_orphans_that_pid_1_reaps_are_counted(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    need("unshare", "setsid")
    need_root()
    agent = start_agent(prefix=AS_PID_1)
    client = connect(agent)
    before = Scrape(agent)("reaped_orphans_total")
    with changes(agent) as change:
        client.output("sh", "-c", "for i in 1 2 3 4 5 6 7; do setsid -f true >/dev/null 2>&1; done")
        eventually(lambda: Scrape(agent)("reaped_orphans_total") >= before + 7, "the end of all orphans")
        # Beside the spawns of others, too, where whose child it is shows only later.
        sessions = [client.exec(["sh", "-c", "setsid -f true >/dev/null 2>&1"]) for _ in range(100)]
        assert [session.wait() for session in sessions] == [0] * 100
        eventually(lambda: Scrape(agent)("reaped_orphans_total") >= before + 107, "the end of all orphans")
        eventually(lambda: not children_of(agent.pid), "no child is left")
    assert change("reaped_orphans_total") == 107


def test_bytes_that_wait_are_shown(agent: Agent, connect: Callable[..., RawClient]) -> None:
    reader, writer = connect(agent), connect(agent, max_queue=1)
    asleep = reader.exec(["sleep", "1000"])
    for _ in range(4):
        asleep.write(b"z" * 500_000)
    # The pipe takes what it holds, the rest waits.
    eventually(lambda: 0 < Scrape(agent)("stdin_queue_bytes") < 2_000_000, "queued stdin")
    scrape = Scrape(agent)
    assert scrape("stdin_queue_bytes") == scrape("stdin_queue_largest_bytes")
    writer.exec(["cat", "/dev/zero"])  # and its client reads nothing: asking does not wait for it either
    eventually(lambda: Scrape(agent)("send_queue_bytes") > 500_000, "output that waits for its client")
    assert Scrape(agent)("send_queue_largest_bytes") <= 2 << 20
    assert reader.run(["true"])[2]["code"] == 0
    asleep.signal("KILL")
    assert asleep.wait() == 137
    writer.cut()
    eventually(lambda: Scrape(agent)("stdin_queue_bytes") == 0, "nothing is queued any more")
    eventually(lambda: Scrape(agent)("send_queue_bytes") == 0, "nothing is to be sent any more")


def test_output_that_is_kept_for_a_client_is_shown(agent: Agent) -> None:
    client = Client(agent, acking=False)
    session = client.exec(["sh", "-c", "head -c 50000 /dev/zero; exec sleep 1000"], id="kept")
    while session.received < 50_000:
        client.receive()
    scrape = Scrape(agent)
    assert (scrape("unacknowledged_bytes"), scrape("unacknowledged_largest_bytes")) == (50_000, 50_000)
    client.ack(session)
    eventually(lambda: Scrape(agent)("unacknowledged_bytes") == 0, "nothing is kept any more")
    client.send("end", id="kept")
    while session.exit is None:
        client.receive()
    client.ws.close()


def test_the_main_process_and_its_health_are_shown(start_agent: Callable[..., Agent], tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    agent = start_agent(
        *("--health-cmd", f"test ! -e {sick}", "--health-interval", "50ms", "--health-retries", "2"),
        *("--keep-alive", "--", "sh", "-c", f"while [ ! -e {tmp_path}/end ]; do sleep 0.05; done; exit 7"),
    )
    scrape = eventually(lambda: (s := Scrape(agent))("health_status", status="healthy") and s, "a first success")
    assert scrape("main_process_up") == 1
    assert (OURS + "main_process_exit_code", ()) not in scrape.values
    sick.touch()
    scrape = eventually(lambda: (s := Scrape(agent))("health_status", status="unhealthy") and s, "two failures")
    assert scrape("health_status", status="healthy") == 0
    assert scrape("health_failing_streak") >= 2
    (tmp_path / "end").touch()
    scrape = eventually(lambda: not (s := Scrape(agent))("main_process_up") and s, "the main process's end")
    assert scrape("main_process_exit_code") == 7


def test_without_a_main_process_there_is_nothing_about_one(agent: Agent) -> None:
    assert not [name for name, _ in Scrape(agent).values if "main_process" in name or "health" in name]


def test_the_agents_own_figures_are_those_of_proc(agent: Agent, connect: Callable[..., RawClient]) -> None:
    clients = [connect(agent) for _ in range(20)]
    for client in clients:
        client.assert_quiet()
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{agent.pid}/status").read_text().splitlines() if ":\t" in line
    )
    scrape = Scrape(agent)
    # The scrape itself takes a thread or two, a few descriptors, and some memory.
    assert scrape.process("resident_memory_bytes") == pytest.approx(1024 * int(status["VmRSS"].split()[0]), rel=0.1)
    assert scrape.process("virtual_memory_bytes") == pytest.approx(1024 * int(status["VmSize"].split()[0]), rel=0.2)
    descriptors = len(os.listdir(f"/proc/{agent.pid}/fd"))
    assert descriptors - 1 <= scrape.process("open_fds") <= descriptors + 8
    assert int(status["Threads"]) - 4 <= scrape("threads") <= int(status["Threads"]) + 4
    assert scrape("pool_threads", state="busy") >= 2 * len(clients)
    limits = Path(f"/proc/{agent.pid}/limits").read_text()
    assert f"{scrape.process('max_fds'):.0f} " in next(line for line in limits.splitlines() if "open files" in line)
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    ticks = int(Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()[19])
    started = int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    assert scrape.process("start_time_seconds") == pytest.approx(started, abs=3)  # btime is in whole seconds
    assert 0 < scrape.process("cpu_seconds_total") <= Scrape(agent).process("cpu_seconds_total")


def test_hundreds_of_scrapes_beside_work_disturb_nobody(agent: Agent, connect: Callable[..., RawClient]) -> None:
    client = connect(agent)
    echo = client.exec(["cat"], id="echo")
    flood = client.exec(["head", "-c", "50000000", "/dev/zero"], id="flood")
    for number in range(200):
        before = bytes(echo.stdout)
        scrape = Scrape(agent)
        assert scrape("sessions_started_total", kind="exec") >= scrape("sessions_ended_total", kind="exec")
        echo.write(b"%d\n" % number)
        assert echo.wait_for(b"%d\n" % number)[len(before) :] == b"%d\n" % number
    assert flood.wait() == 0
    assert len(flood.stdout) == 50_000_000
    echo.close_stdin()
    assert echo.wait() == 0
