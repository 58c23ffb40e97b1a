"""What docker ps, inspect, logs, attach, wait, kill, stop, top, stats and events show of an agent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from docking import DEADLINE, GATEWAY, ROOT, Gateway, Terminal
from support import AGENT, TOKEN, Agent, eventually

Box = tuple[Agent, Gateway]
JSON = "{{json .}}"  # what every version of the client understands
OpenTerminal = Callable[..., Terminal]


# ── the gateway itself ────────────────────────────────────────────────────────


def test_version_and_info_are_shown(gateway: Gateway) -> None:
    version = gateway.json("version", "--format", JSON)
    assert version["Server"]["ApiVersion"] == "1.47"
    info = gateway.json("info", "--format", JSON)
    assert (info["Containers"], info["ContainersRunning"], info["OSType"]) == (1, 1, "linux")
    assert "ServerErrors" not in info or not info["ServerErrors"]


@pytest.mark.parametrize("version", ["1.24", "1.41", "1.44", "1.47"])
def test_clients_of_other_versions_are_served(gateway: Gateway, version: str) -> None:
    result = gateway.docker(
        "exec", "web", "sh", "-c", "echo out; echo err >&2; exit 4", env={"DOCKER_API_VERSION": version}
    )
    assert result == (4, b"out\n", b"err\n")


def test_clients_that_are_too_new_or_too_old_are_told(gateway: Gateway) -> None:
    for version, words in (
        ("1.99", b"Maximum supported API version is 1.47"),
        ("1.10", b"Minimum supported API version is 1.24"),
    ):
        code, _, stderr = gateway.docker("ps", env={"DOCKER_API_VERSION": version})
        assert code == 1 and words in stderr


REFUSED = {
    ("run", "alpine"): "created by the platform",
    ("images",): "no images here",
    ("pull", "alpine"): "no images here",
    ("network", "ls"): "platform's business",
    ("volume", "ls"): "platform's business",
    ("system", "df"): "does not know what takes space",
    ("restart", "web"): "the platform that runs the agents",
    ("pause", "web"): "the platform that runs the agents",
    ("unpause", "web"): "the platform that runs the agents",
    ("rename", "web", "other"): "the name of its agent",
    ("update", "--memory", "1g", "web"): "the platform that runs the agents",
    ("rm", "-f", "web"): "the platform that runs the agents",
    ("diff", "web"): "does not know its image",
    ("export", "web"): "docker cp",
    ("commit", "web"): "no images",
    ("swarm", "init"): "no swarm",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_an_agent_cannot_do_is_refused_with_a_sentence(gateway: Gateway, words: tuple[str, ...]) -> None:
    assert REFUSED[words] in gateway.refused(*words)
    assert gateway.output("ps", "-q")


@pytest.mark.timeout(600)  # it may have to install what it needs first
def test_the_script_runs_the_gateway_from_the_checkout(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts/docker-gateway"), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sockerless-agent ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--agent=web"], "--agent: not NAME=HOST:PORT: 'web'"),
        (["--agent=web=nonsense"], "not an address"),
        (["-H", "/tmp/x.sock"], "not an address such as unix:///tmp/agents.sock"),
        (["--listen=nonsense"], "not an address"),
        (["--token-file=/no/such/file"], "/no/such/file"),
        (["-H", "unix:///no/such/directory/socket"], "No such file or directory"),
    ],
)
def test_what_makes_no_sense_is_one_line(words: list[str], message: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(GATEWAY), *words], env=environ, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr and done.stderr.count("\n") == 1


# ── ps and inspect ────────────────────────────────────────────────────────────


def test_ps_shows_the_main_process(gateway: Gateway) -> None:
    line = gateway.json("ps", "--format", JSON, "--no-trunc")
    assert (line["Names"], line["State"], line["Image"]) == ("web", "running", "sockerless-agent")
    assert line["Status"].startswith("Up ") and line["Command"].startswith("\"bash -c 'trap")


@pytest.mark.parametrize(
    ("filter", "shown"),
    [
        ("name=web", True), ("name=we", True), ("name=^/?web$", True), ("name=other", False),
        ("status=running", True), ("status=exited", False),
        ("label=io.sockerless.agent", True), ("label=io.sockerless.agent=web", True), ("label=nothing", False),
        ("health=none", True), ("health=healthy", False),
        ("ancestor=sockerless-agent", True), ("ancestor=alpine", False),
        ("exited=0", False), ("volume=v", False), ("network=n", False),
    ],
)  # fmt: skip
def test_ps_filters(gateway: Gateway, filter: str, shown: bool) -> None:
    assert gateway.output("ps", "--filter", filter, "--format", "{{.Names}}") == ("web\n" if shown else "")


def test_ps_refuses_filters_that_make_no_sense(gateway: Gateway) -> None:
    assert "invalid filter 'nonsense'" in gateway.refused("ps", "--filter", "nonsense=1")
    assert "invalid filter 'status=sleepy'" in gateway.refused("ps", "--filter", "status=sleepy")


def test_inspect_shows_the_state(gateway: Gateway, web: Agent) -> None:
    shown = gateway.output("inspect", "--format", "{{.State.Status}} {{.State.Pid}} {{.Name}} {{.Config.Tty}}", "web")
    assert shown == f"running {web.health()['pid']} /web false\n"
    assert "No such object: nobody" in gateway.refused("inspect", "nobody")
    full = gateway.json("inspect", "web")[0]
    assert full["Path"] == "bash" and full["Args"][0] == "-c"
    assert re.match(r"20\d\d-\d\d-\d\dT[\d:.]+Z", full["State"]["StartedAt"])


def test_an_agent_that_comes_and_goes_is_shown_so(
    start_agent: Callable[..., Agent], start_gateway: Callable[..., Gateway]
) -> None:
    """Its address stays the same; the gateway dials it again by itself."""
    first = start_agent()
    port = first.address.rpartition(":")[2]
    gateway = start_gateway(f"--agent=there={first.address},never=127.0.0.1:1")
    gateway.wait_for_log("agent there: connected")
    assert gateway.output("ps", "--format", "{{.Names}}") == "there\n"
    assert "never: dead" in gateway.output("ps", "-a", "--format", "{{.Names}}: {{.State}}").splitlines()
    assert "is not running: its agent does not answer" in gateway.refused("exec", "never", "true")
    before = gateway.output("ps", "-q", "--no-trunc")
    first.kill()
    eventually(lambda: gateway.output("ps", "-q") == "", "no container runs")
    assert "does not answer" in gateway.output("inspect", "--format", "{{.State.Error}}", "there")
    start_agent("--addr", f"127.0.0.1:{port}")
    gateway.wait_for_log("agent there: connected", 2)
    assert gateway.output("ps", "-q", "--no-trunc") == before
    assert gateway.output("exec", "there", "echo", "again") == "again\n"


def start_reverse_agent(directory: Path, url: str, *flags: str) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SOCKERLESS_")}
    return subprocess.Popen(
        [sys.executable, str(AGENT), "--pid-file", str(directory / "main.pid"), "--callback", url, *flags],
        env={**environ, "SOCKERLESS_AGENT_TOKEN": TOKEN},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_agents_that_dial_in_appear_and_disappear(start_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = start_gateway("--listen=127.0.0.1:0")
    address = gateway.wait_for_log(r"agents may dial (\S+)")[1]
    flags = ("--keep-alive", "--", "sh", "-c", "echo up; read x; exit 5")
    agent = start_reverse_agent(tmp_path, f"http://{address}/x?id=my%2Fjob", *flags)
    try:
        gateway.wait_for_log("agent my_job: joined")
        assert gateway.output("ps", "--format", "{{.Names}} {{.State}}") == "my_job running\n"
        assert gateway.docker("exec", "-i", "my_job", "sh", "-c", "cat; exit 3", data=b"hello") == (3, b"hello", b"")
        assert gateway.output("logs", "my_job") == "up\n"
        assert gateway.output("top", "my_job").startswith("UID")
        assert gateway.json("stats", "--no-stream", "--format", JSON, "my_job")["Name"] == "my_job"
        (tmp_path / "a").write_text("text")
        gateway.output("cp", f"{tmp_path}/a", f"my_job:{tmp_path}/b")
        assert (tmp_path / "b").read_text() == "text"
        with gateway.start("wait", "my_job") as waiting:
            gateway.wait_for_log(r"stream POST \S+/wait")
            gateway.output("kill", "-s", "TERM", "my_job")
            assert waiting.communicate(timeout=DEADLINE)[0] == b"143\n"
        gateway.wait_for_log("agent my_job: left")
        assert gateway.output("ps", "-aq") == ""
    finally:
        agent.kill()
        agent.wait(DEADLINE)


def test_a_health_check_is_shown(
    start_agent: Callable[..., Agent], start_gateway: Callable[..., Gateway], tmp_path: Path
) -> None:
    flag = tmp_path / "ready"
    agent = start_agent(
        "--health-cmd", f"test -e {flag} && echo fine", "--health-interval", "100ms", "--health-retries", "1"
    )
    gateway = start_gateway(f"--agent=sick={agent.address}")
    gateway.wait_for_log("agent sick: connected")
    status = ("inspect", "--format", "{{.State.Health.Status}}", "sick")
    eventually(lambda: gateway.output(*status) == "unhealthy\n", "unhealthy")
    assert "(unhealthy)" in gateway.output("ps", "--filter", "health=unhealthy", "--format", "{{.Status}}")
    flag.touch()
    eventually(lambda: gateway.output(*status) == "healthy\n", "healthy")
    log = gateway.json("inspect", "--format", "{{json .State.Health.Log}}", "sick")
    assert (log[-1]["ExitCode"], log[-1]["Output"]) == (0, "fine\n")


# ── logs ──────────────────────────────────────────────────────────────────────


def talker(directory: Path, script: str, *flags: str) -> Agent:
    directory.mkdir()
    return Agent(directory, *flags, "--keep-alive", "--", "sh", "-c", script)


@pytest.fixture
def talk(tmp_path: Path, start_gateway: Callable[..., Gateway]) -> Iterator[Callable[..., Box]]:
    """Start agents whose main process runs a script, and their gateways."""
    agents: list[Agent] = []

    def start(script: str, *flags: str) -> Box:
        agents.append(talker(tmp_path / f"talker{len(agents)}", script, *flags))
        gateway = start_gateway(f"--agent=box={agents[-1].address}")
        gateway.wait_for_log("agent box: connected")
        return agents[-1], gateway

    yield start
    for agent in agents:
        agent.kill()


def test_logs_show_what_was_written_with_its_streams(talk: Callable[..., Box]) -> None:
    _, gateway = talk("for i in 1 2 3; do echo out $i; echo err $i >&2; done; echo last; read x; sleep 1000")
    eventually(lambda: b"last" in gateway.docker("logs", "box")[1], "the last line")
    code, stdout, stderr = gateway.docker("logs", "box")
    assert (code, stdout, stderr) == (0, b"out 1\nout 2\nout 3\nlast\n", b"err 1\nerr 2\nerr 3\n")
    _, stdout, stderr = gateway.docker("logs", "--tail", "2", "box")
    # Which two depends on which pipe the agent read last.
    assert len((stdout + stderr).splitlines()) == 2
    assert gateway.docker("logs", "--tail", "0", "box") == (0, b"", b"")


@pytest.mark.parametrize(("tail", "lines"), [(1, "c"), (2, "bc"), (3, "abc"), (99, "abc")])
@pytest.mark.parametrize("ending", ["\\n", ""])
def test_the_tail_counts_lines_even_if_the_last_is_not_complete(
    talk: Callable[..., Box], tail: int, lines: str, ending: str
) -> None:
    _, gateway = talk(f"printf 'a\\nb\\nc{ending}'; read x; sleep 1000")
    eventually(lambda: "c" in gateway.output("logs", "box"), "the last line")
    assert gateway.output("logs", "--tail", str(tail), "box").splitlines() == list(lines)


def test_logs_follow_to_the_end_of_the_main_process(talk: Callable[..., Box]) -> None:
    _, gateway = talk("echo before; read x; echo after; echo err >&2; exit 3")
    with gateway.start("logs", "-f", "box") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"before\n"
        with gateway.start("attach", "box") as typist:
            stdout, _ = typist.communicate(b"go\n", DEADLINE)
            assert b"after\n" in stdout
            assert typist.returncode == 3
        rest, errors = process.communicate(timeout=DEADLINE)
        assert (process.returncode, rest, errors) == (0, b"after\n", b"err\n")
    assert gateway.docker("logs", "box")[1] == b"before\nafter\n"


def test_new_lines_get_a_time_and_old_ones_cannot(talk: Callable[..., Box]) -> None:
    _, gateway = talk("echo old; while read -r line; do echo got $line; done")
    assert "without times" in gateway.refused("logs", "-t", "box")
    with gateway.start("logs", "-f", "-t", "--tail", "0", "box") as process:
        assert process.stdout is not None
        gateway.wait_for_log(r"stream GET \S+/logs")
        with gateway.start("attach", "box") as typist:
            assert typist.stdin is not None and typist.stdout is not None
            typist.stdin.write(b"one\n")
            typist.stdin.flush()
            assert typist.stdout.readline() == b"got one\n"
            assert re.fullmatch(rb"20\d\d-\d\d-\d\dT[\d:.]{8,}Z got one\n", process.stdout.readline())
            typist.kill()
        process.kill()


def test_since_and_until_are_honoured_as_far_as_is_honest(talk: Callable[..., Box]) -> None:
    _, gateway = talk("echo old; read x; sleep 1000")
    eventually(lambda: gateway.output("logs", "box") == "old\n", "its line")
    assert gateway.output("logs", "--since", "24h", "box") == "old\n"
    assert gateway.output("logs", "--since", "2001-01-01T00:00:00", "box") == "old\n"
    assert gateway.output("logs", "--until", "2001-01-01T00:00:00", "box") == ""
    # The client cuts its time to a second, which may be before the start.
    eventually(lambda: gateway.output("logs", "--since", "0s", "box") == "", "a second that began after the line")


def test_logs_without_a_main_process_say_so(
    start_agent: Callable[..., Agent], start_gateway: Callable[..., Gateway]
) -> None:
    agent = start_agent()
    gateway = start_gateway(f"--agent=bare={agent.address}")
    gateway.wait_for_log("agent bare: connected")
    for words in (("logs", "bare"), ("kill", "bare"), ("stop", "bare")):
        assert "has no main process" in gateway.refused(*words)
    assert "409" in gateway.refused("attach", "bare")  # of an error before the upgrade the client shows the status only


# ── attach ────────────────────────────────────────────────────────────────────


def test_attach_types_to_the_main_process_and_shows_only_what_is_new(box: Box) -> None:
    agent, gateway = box
    with gateway.start("attach", "box") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got hello\n"
        process.kill()
    # Who leaves takes neither the process nor its stdin along.
    with gateway.start("attach", "box") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"again\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got again\n"
        process.kill()
    assert agent.health()["exited"] is False


def test_attach_passes_signals_on_and_has_the_exit_status(box: Box) -> None:
    _, gateway = box
    with gateway.start("attach", "box") as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got hello\n"
        process.send_signal(signal.SIGHUP)
        assert process.stderr.readline() == b"hup\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 21


def test_attach_on_a_terminal_detaches_with_its_keys(talk: Callable[..., Box], open_terminal: OpenTerminal) -> None:
    agent, gateway = talk("stty size; while read -r line; do echo got $line; stty size; done", "--tty")
    assert gateway.output("inspect", "--format", "{{.Config.Tty}}", "box") == "true\n"
    terminal = open_terminal(gateway, "attach", "box", columns=77, rows=33)
    terminal.type("hello\r")
    terminal.wait_for(r"got hello\n33 77")
    terminal.type("\x10\x11")
    terminal.wait_for("read escape sequence")
    assert terminal.wait() == 1
    terminal.assert_as_before()
    assert agent.health()["exited"] is False


# ── wait, kill, stop ──────────────────────────────────────────────────────────


def test_wait_has_the_exit_code_of_the_main_process(box: Box) -> None:
    _, gateway = box
    with gateway.start("wait", "box") as process:
        gateway.output("kill", "--signal", "TERM", "box")
        stdout, _ = process.communicate(timeout=DEADLINE)
        assert (process.returncode, stdout) == (0, b"21\n")
    assert gateway.output("wait", "box") == "21\n"
    shown = gateway.output("ps", "-a", "--format", "{{.State}} {{.Status}}")
    assert shown.startswith("exited Exited (21) ")
    assert gateway.output("ps", "-q") == ""
    assert gateway.output("ps", "-q", "--filter", "exited=21")
    assert "is not running" in gateway.refused("kill", "box")
    assert "start it first" in gateway.refused("attach", "box")
    # The agent is still there, and so are the files.
    assert gateway.output("exec", "box", "echo", "still here") == "still here\n"


def test_kill_sends_any_signal_and_sigkill_by_default(box: Box) -> None:
    agent, gateway = box
    assert "Invalid signal: NONSENSE" in gateway.refused("kill", "-s", "NONSENSE", "box")
    gateway.output("kill", "-s", "SIGHUP", "box")
    eventually(lambda: b"hup" in gateway.docker("logs", "box")[2], "the trap for HUP")
    gateway.output("kill", "box")
    assert gateway.output("inspect", "--format", "{{.State.ExitCode}} {{.State.Running}}", "box") == "137 false\n"
    assert agent.health()["exitCode"] == 137


def test_an_agent_that_takes_no_signals_is_not_said_to_be_stopped(talk: Callable[..., Box]) -> None:
    _, gateway = talk("echo up; sleep 1000", "--read-only")
    for words in (("kill", "box"), ("stop", "box"), ("kill", "-s", "HUP", "box")):
        assert "the agent runs with --read-only: no stdin and no signals" in gateway.refused(*words)
    assert gateway.output("ps", "--format", "{{.Names}} {{.State}}") == "box running\n"


def test_stop_sends_sigterm_and_sigkill_after_its_time(talk: Callable[..., Box]) -> None:
    _, gateway = talk("trap 'exit 21' TERM; echo up; while sleep 0.05; do :; done")
    assert gateway.output("stop", "box") == "box\n"
    assert gateway.output("inspect", "--format", "{{.State.ExitCode}}", "box") == "21\n"
    assert gateway.output("stop", "box") == "box\n"
    _, gateway = talk("trap '' TERM; echo up; while sleep 0.05; do :; done")
    eventually(lambda: gateway.output("logs", "box") == "up\n", "its trap")
    assert gateway.output("stop", "-t", "1", "box") == "box\n"
    assert gateway.output("inspect", "--format", "{{.State.ExitCode}}", "box") == "137\n"


def test_an_agent_that_dies_leaves_who_waits_with_an_error(
    start_agent: Callable[..., Agent], start_gateway: Callable[..., Gateway]
) -> None:
    agent = start_agent("--keep-alive", "--", "sleep", "1000")
    gateway = start_gateway(f"--agent=box={agent.address}", "--reconnect=0")
    gateway.wait_for_log("agent box: connected")
    with (
        gateway.start("wait", "box") as process,
        gateway.start("exec", "box", "sh", "-c", "echo up; sleep 1000") as command,
    ):
        assert command.stdout is not None
        assert command.stdout.readline() == b"up\n"
        gateway.wait_for_log(r"stream POST \S+/wait")
        agent.kill()
        stdout, stderr = command.communicate(timeout=DEADLINE)
        assert (command.returncode, stderr) == (255, b"") and b"connection to the agent was lost" in stdout
        assert process.communicate(timeout=DEADLINE) == (b"255\n", b"")


def test_commands_go_on_when_the_connection_to_the_agent_was_cut(
    start_agent: Callable[..., Agent], start_gateway: Callable[..., Gateway]
) -> None:
    agent = start_agent()
    with Cuttable(agent.address) as between:
        gateway = start_gateway(f"--agent=box={between.address}")
        gateway.wait_for_log("agent box: connected")
        with gateway.start("exec", "-i", "box", "cat") as process:
            assert process.stdin is not None and process.stdout is not None
            for word in (b"one\n", b"two\n", b"three\n"):
                process.stdin.write(word)
                process.stdin.flush()
                assert process.stdout.readline() == word
                between.cut()
            process.stdin.close()
            assert process.wait(DEADLINE) == 0


def test_an_agent_that_is_started_anew_behind_a_running_command_is_seen_as_new(
    box: Box, start_agent: Callable[..., Agent]
) -> None:
    """The command has the connection made again: what it leads to then is another main process."""
    agent, gateway = box
    before = gateway.json("inspect", "box")[0]["State"]
    with gateway.start("exec", "box", "sh", "-c", "echo up; exec sleep 600") as command:
        assert command.stdout is not None and command.stdout.readline() == b"up\n"
        with gateway.start("wait", "box") as waiting:
            gateway.wait_for_log(r"stream POST \S+/wait")
            agent.kill()
            start_agent("--addr", agent.address, "--keep-alive", "--", "sh", "-c", "read x; exit 5")
            assert waiting.communicate(timeout=DEADLINE)[0] == b"255\n"
        assert command.wait(DEADLINE) == 255
    gateway.wait_for_log("agent box: started anew")
    eventually(lambda: gateway.output("ps", "--format", "{{.Names}}") == "box\n", "the container runs")
    after = gateway.json("inspect", "box")[0]
    assert (after["Path"], after["State"]["Error"]) == ("sh", "")
    assert after["State"]["Pid"] != before["Pid"] and after["State"]["StartedAt"] > before["StartedAt"]
    with gateway.start("wait", "box") as waiting:
        gateway.wait_for_log(r"stream POST \S+/wait", 2)
        gateway.output("kill", "-s", "TERM", "box")
        assert waiting.communicate(timeout=DEADLINE)[0] == b"143\n"


class Cuttable:
    """Carries bytes between the gateway and an agent, until it cuts every connection."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()  # guards _open
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                with self._lock:
                    self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # cut
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        with self._lock:
            cut, self._open = self._open, []
        for sock in cut:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def __enter__(self) -> Cuttable:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


# ── top, stats, events ────────────────────────────────────────────────────────


def test_top_lists_processes_as_ps_does(box: Box) -> None:
    agent, gateway = box
    lines = gateway.output("top", "box").splitlines()
    assert lines[0].split() == ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
    pid = str(agent.health()["pid"])
    (line,) = [line.split(maxsplit=7) for line in lines if line.split()[1] == pid]
    assert (line[0], line[2]) == ("root", str(agent.pid))
    assert line[7].startswith("bash -c trap")
    lines = gateway.output("top", "box", "-eo", "pid,comm").splitlines()
    assert lines[0].split() == ["PID", "COMMAND"]
    assert [pid, "bash"] in [line.split() for line in lines]
    assert gateway.output("top", "box", "aux").split()[:4] == ["USER", "PID", "%CPU", "%MEM"]
    assert "no ps runs in the container" in gateway.refused("top", "box", "--forest")


def test_stats_draw_real_numbers(box: Box) -> None:
    _, gateway = box
    with gateway.start("exec", "box", "sh", "-c", "while :; do :; done") as spinner:
        line = eventually(
            lambda: [
                found
                for found in [gateway.json("stats", "--no-stream", "--format", JSON, "box")]
                if found["CPUPerc"] != "0.00%"
            ],
            "CPU that is used",
        )[0]
        spinner.kill()
    assert line["Name"] == "box"
    assert float(line["CPUPerc"].rstrip("%")) > 0
    used, limit = line["MemUsage"].split(" / ")
    assert re.fullmatch(r"[\d.]+[KMG]iB", used) and re.fullmatch(r"[\d.]+[MGT]iB", limit)
    assert int(line["PIDs"]) > 1


def test_stats_are_drawn_again_and_again(gateway: Gateway, open_terminal: OpenTerminal) -> None:
    terminal = open_terminal(gateway, "stats", columns=160)
    terminal.wait_for(r"web\s+\d+\.\d\d%\s+[\d.]+\w+ / [\d.]+\w+")
    terminal.type("\x03")
    terminal.wait()


def test_events_tell_what_happens(box: Box) -> None:
    _, gateway = box
    with gateway.start("events", "--format", JSON, "--filter", "container=box") as process:
        assert process.stdout is not None
        gateway.wait_for_log("stream GET .*/events")
        gateway.docker("exec", "box", "sh", "-c", "exit 3")
        gateway.output("kill", "-s", "TERM", "box")
        seen: list[dict[str, object]] = []
        while not seen or seen[-1]["Action"] != "die":
            seen.append(json.loads(process.stdout.readline()))
        process.kill()
    actions = [str(event["Action"]) for event in seen]
    assert actions == ["exec_create: sh -c exit 3", "exec_start: sh -c exit 3", "exec_die", "kill", "die"]
    attributes = [event["Actor"]["Attributes"] for event in seen]  # type: ignore[index]
    assert (attributes[2]["exitCode"], attributes[4]["exitCode"]) == ("3", "21")
    assert attributes[0]["execID"] == attributes[2]["execID"]


def test_events_of_the_past_are_told_and_filtered(box: Box) -> None:
    _, gateway = box
    gateway.docker("exec", "box", "true")
    shown = ("events", "--since", "1h", "--until", "0s", "--format", "{{.Action}}")
    actions = ["create", "start", "exec_create: true", "exec_start: true", "exec_die"]
    # The client cuts the time of "until" to a second.
    eventually(lambda: gateway.output(*shown).splitlines() == actions, f"{actions}")
    assert gateway.output(*shown, "--filter", "event=exec_start").splitlines() == ["exec_start: true"]
    assert gateway.output(*shown, "--filter", "container=nobody") == ""
    assert gateway.output(*shown, "--filter", "type=network") == ""


def test_a_client_that_leaves_a_stream_is_noticed(box: Box) -> None:
    """Nothing is written to it that could fail."""
    _, gateway = box
    for words in (("events",), ("logs", "-f", "--tail", "0", "box"), ("wait", "box")):
        with gateway.start(*words) as process:
            gateway.wait_for_log(rf"stream \w+ \S*/{words[0]}\b")
            process.kill()
        gateway.wait_for_log(rf"end \w+ \S*/{words[0]}\b")
