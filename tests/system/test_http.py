"""The HTTP side: /health, statuses, tokens, flags, and what the log shows of it all."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from support import DEADLINE, TOKEN, Agent, RawClient, need, need_root, run_agent

UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def split(agent: Agent) -> tuple[str, int]:
    host, _, port = agent.address.rpartition(":")
    return host, int(port)


def request(
    agent: Agent, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """A request's status, headers and body; of 101 no body."""
    connection = http.client.HTTPConnection(*split(agent), timeout=DEADLINE)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        text = b"" if response.status == 101 else response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, text
    finally:
        connection.close()


def exchange(agent: Agent, data: bytes, end: bool = False) -> bytes:
    """What comes back for these bytes until the agent closes."""
    with socket.create_connection(split(agent), timeout=DEADLINE) as sock:
        sock.sendall(data)
        if end:
            sock.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while more := sock.recv(65536):
                received += more
        except ConnectionResetError:
            pass  # it closed with bytes of ours unread
        return received


def handshake(agent: Agent, *lines: str, path: str = "/ws") -> int:
    """The status of a WebSocket handshake with these header lines."""
    head = [f"GET {path} HTTP/1.1", f"Host: {agent.address}"]
    head += [f"{name}: {value}" for name, value in UPGRADE.items()]
    with socket.create_connection(split(agent), timeout=DEADLINE) as sock:
        sock.sendall("\r\n".join([*head, *lines, "", ""]).encode())
        answer = sock.makefile("rb").readline()
    return int(answer.split()[1])


# Statuses.


def test_health_needs_no_token_and_is_json(agent: Agent) -> None:
    status, headers, body = request(agent, "GET", "/health")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"status": "ok"}
    assert request(agent, "GET", "/health?verbose=1")[0] == 200


@pytest.mark.parametrize("path", ["/", "/nothing", "/health/", "/ws/", "/healthz", "/metrics/x", "//ws"])
def test_another_path_is_404(agent: Agent, path: str) -> None:
    assert request(agent, "GET", path)[0] == 404


@pytest.mark.parametrize("path", ["/health", "/ws"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("body", [None, b"some body"], ids=["no body", "a body"])
def test_another_method_is_405(agent: Agent, path: str, method: str, body: bytes | None) -> None:
    status, headers, _ = request(agent, method, path, {"Authorization": f"Bearer {TOKEN}"}, body)
    assert status == 405
    assert headers["allow"] == "GET"


def test_a_plain_get_on_ws_is_426(agent: Agent) -> None:
    status, headers, _ = request(agent, "GET", "/ws", {"Authorization": f"Bearer {TOKEN}"})
    assert status == 426
    assert headers["upgrade"] == "websocket"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
        b"GET /ws\r\n\r\n",
        b"GET / SPDY/9\r\n\r\n",
    ],
    ids=["text", "TLS", "HTTP/0.9", "another protocol"],
)
def test_a_request_that_makes_no_sense_gets_400(agent: Agent, data: bytes) -> None:
    answer = exchange(agent, data)
    assert answer.startswith(b"HTTP/1.1 400 "), answer


def test_a_client_that_says_nothing_or_leaves_disturbs_nobody(agent: Agent, client: RawClient) -> None:
    with socket.create_connection(split(agent), timeout=DEADLINE):
        assert exchange(agent, b"", end=True) is not None
        assert exchange(agent, b"GET /ws HT", end=True) is not None
        assert request(agent, "GET", "/health")[0] == 200
        client.assert_quiet()


def test_compression_and_subprotocols_are_not_forced_on_anybody(agent: Agent, client: RawClient) -> None:
    assert client.ws.subprotocol is None
    headers = client.ws.response.headers if client.ws.response else {}
    assert "Sec-WebSocket-Extensions" not in headers
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    assert handshake(agent, f"Authorization: Bearer {TOKEN}", offer) == 101


# Tokens.


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Authorization: Bearer wrong"],
        [f"Authorization: Bearer {TOKEN}x"],
        [f"Authorization: Bearer {TOKEN[:-1]}"],
        ["Authorization: Bearer "],
        ["Authorization: Bearer"],
        [f"Authorization: Basic {TOKEN}"],
        [f"Authorization: {TOKEN}"],
        ["Authorization: Bearer wrong", f"Authorization: Bearer {TOKEN}"],
        [f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {TOKEN}"],
    ],
)
def test_a_missing_or_wrong_token_is_401(agent: Agent, lines: list[str]) -> None:
    assert handshake(agent, *lines) == 401


@pytest.mark.parametrize("query", ["token=wrong", "token=", "token", f"other={TOKEN}", f"token=wrong&token={TOKEN}"])
def test_a_missing_or_wrong_token_in_the_query_is_401(agent: Agent, query: str) -> None:
    assert handshake(agent, path=f"/ws?{query}") == 401


def test_a_wrong_header_is_not_mended_by_the_query(agent: Agent) -> None:
    assert handshake(agent, "Authorization: Bearer wrong", path=f"/ws?token={TOKEN}") == 401


def test_the_token_opens_the_door_in_the_header_and_in_the_query(agent: Agent) -> None:
    assert handshake(agent, f"Authorization: Bearer {TOKEN}") == 101
    assert handshake(agent, f"authorization: bearer {TOKEN}") == 101
    assert handshake(agent, path=f"/ws?token={TOKEN}") == 101
    assert handshake(agent, path=f"/ws?id=1&token={TOKEN}") == 101


def test_a_plain_get_without_the_token_is_401(agent: Agent) -> None:
    status, headers, _ = request(agent, "GET", "/ws")
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"


def test_a_token_may_hold_any_printable_character(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    token = "a+b/c=d&e%f?g#h"
    agent = start_agent(token=token)
    connect(agent).assert_quiet()
    assert handshake(agent, path="/ws?token=a%2Bb%2Fc%3Dd%26e%25f%3Fg%23h") == 101


def test_without_a_token_a_page_of_another_host_is_refused(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(token="")
    port = split(agent)[1]
    assert handshake(agent) == 101
    assert handshake(agent, f"Origin: http://{agent.address}") == 101
    for origin in ("http://evil.example", "null", f"http://evil.example:{port}", "http://127.0.0.1:1", "file://"):
        assert handshake(agent, f"Origin: {origin}") == 403, origin
    assert handshake(agent, f"Origin: http://{agent.address}", "Origin: http://evil.example") == 403


def test_with_a_token_the_origin_does_not_matter(agent: Agent) -> None:
    assert handshake(agent, "Origin: http://page.example", f"Authorization: Bearer {TOKEN}") == 101


# The log.


def test_the_token_is_never_in_the_log(start_agent: Callable[..., Agent], connect: Callable[..., RawClient]) -> None:
    agent = start_agent("--log-level", "debug")
    client = connect(agent)
    handshake(agent, f"Authorization: Bearer {TOKEN}")
    handshake(agent, path=f"/ws?token={TOKEN}")
    handshake(agent, "Authorization: Bearer wrong", path=f"/ws?token={TOKEN}")
    exchange(agent, f"GET /ws?token={TOKEN} SPDY/1\r\n\r\n".encode())
    client.run([TOKEN, TOKEN])
    client.run(["echo", TOKEN], workdir=f"/{TOKEN}", env=[f"A={TOKEN}"])
    client.send({"type": TOKEN, "id": TOKEN})
    client.wait_error()
    agent.stop()
    assert "connected" in agent.log
    assert TOKEN not in agent.log


def test_what_a_peer_sends_cannot_forge_a_line_of_the_log(agent: Agent, client: RawClient) -> None:
    client.run(["no-such\n2026-01-01T00:00:00.000Z info  forged\x1b[31m"])
    client.assert_quiet()
    assert not any(line.startswith("2026-01-01") for line in agent.log.splitlines())
    assert "\x1b" not in agent.log


def test_the_log_can_be_json(start_agent: Callable[..., Agent], connect: Callable[..., RawClient]) -> None:
    agent = start_agent("--log-format", "json")
    connect(agent).run(["true"])
    agent.stop()
    records = [json.loads(line) for line in agent.log.splitlines()]
    assert len(records) > 3
    assert all({"time", "level", "message"} <= set(record) for record in records)


def test_listening_beyond_loopback_without_a_token_is_one_loud_warning(start_agent: Callable[..., Agent]) -> None:
    need("unshare")
    need_root()
    # In a network namespace of its own, where nobody can reach it.
    agent = start_agent("--addr", ":0", token="", prefix=("unshare", "--net", "--fork"))
    agent.wait_for_log("NO TOKEN")
    agent.stop()
    assert agent.log.count("NO TOKEN") == 1


def test_listening_on_loopback_or_with_a_token_is_no_warning(start_agent: Callable[..., Agent]) -> None:
    for agent in (start_agent(token=""), start_agent()):
        agent.stop()
        assert "warn" not in agent.log


# Flags.


def test_a_port_in_use_is_one_line_and_exit_code_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run_agent("--addr", address)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert address in line
    assert "in use" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--addr", "nonsense"], "--addr"),
        (["--addr", "::1:9111"], "brackets"),
        (["--addr", "127.0.0.1:70000"], "--addr"),
        (["--drain-timeout", "5"], "did you mean 5s?"),
        (["--drain-timeout", "-1s"], "--drain-timeout"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--log-level", "loud"], "loud"),
        (["--log-format", "xml"], "xml"),
        (["--replay-size", "much"], "much"),
        (["--max-sessions", "0"], "--max-sessions"),
        (["--health-retries", "x"], "--health-retries"),
        (["--token-file", "/no/such/file"], "/no/such/file"),
        (["--tty"], "--keep-alive"),
        (["--exit-with-main"], "--keep-alive"),
        (["ls"], "'ls'"),
        (["--addr"], "addr"),
        (["-keep-alive=perhaps"], "perhaps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag_is_one_line_and_exit_code_2(flags: list[str], words: str) -> None:
    result = run_agent(*flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert words in line
    assert result.stdout == ""


def test_a_bad_variable_is_one_line_and_exit_code_2() -> None:
    result = run_agent(env={"SOCKERLESS_AGENT_STOP_TIMEOUT": "soon"})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "SOCKERLESS_AGENT_STOP_TIMEOUT" in line
    assert "soon" in line


def test_a_bad_token_is_not_shown(tmp_path: Path) -> None:
    result = run_agent(env={"SOCKERLESS_AGENT_TOKEN": "has a space"})
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "has a space" not in result.stderr
    (tmp_path / "empty").write_text("\n")
    assert run_agent("--token-file", f"{tmp_path}/empty").returncode == 2


def test_version_and_help() -> None:
    for flag in ("-version", "--version"):
        result = run_agent(flag)
        assert (result.returncode, result.stderr) == (0, "")
        assert re.fullmatch(r"sockerless-agent \d+\.\d+\.\d+\n", result.stdout)
    help_text = run_agent("--help").stdout
    for name in ("-addr", "--keep-alive", "--health-start-period", "SOCKERLESS_AGENT_TOKEN"):
        assert name in help_text


def test_flags_have_both_spellings_and_variables(
    start_agent: Callable[..., Agent], connect: Callable[..., RawClient]
) -> None:
    agents = [
        start_agent("-max-sessions", "1"),
        start_agent("--max-sessions=1"),
        start_agent(env={"SOCKERLESS_AGENT_MAX_SESSIONS": "1"}),
        start_agent("-max-sessions=1", env={"SOCKERLESS_AGENT_MAX_SESSIONS": "5"}),
    ]
    for agent in agents:
        client = connect(agent)
        client.exec(["cat"])
        assert "limit is 1" in client.exec(["cat"]).wait_error()


def test_ipv6_addresses_have_brackets(start_agent: Callable[..., Agent], connect: Callable[..., RawClient]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    agent = start_agent("-addr", "[::1]:0")
    assert agent.address.startswith("[::1]:")
    connect(agent).assert_quiet()
