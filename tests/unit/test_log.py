"""Log lines: one a record, readable by a machine, and without a secret."""

import io
import json
import logging
import os
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE

from agent import LOG_BACKLOG, Config, LogFormatter, LogHandler, parse_callback, set_up_logging

styles = pytest.mark.parametrize("style", ["text", "json"])


def render(style, message, *args, hidden=(), level=logging.INFO, exc_info=None, **extra):
    record = logging.LogRecord("sockerless.agent", level, __file__, 1, message, args, exc_info)
    record.__dict__.update(extra)
    return LogFormatter(style, hidden).format(record)


@pytest.fixture
def read_log(monkeypatch, capsys):
    """Reads what the agent has logged since set_up_logging(); the loggers are put back afterwards."""
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    logger = logging.getLogger("sockerless")
    websockets = logging.getLogger("sockerless.websockets")
    before = (logger.handlers[:], logger.level, logger.propagate, websockets.level)

    def read():
        logger.handlers[0].flush(PATIENCE)
        return capsys.readouterr().err

    yield read
    logger.handlers[:], logger.level, logger.propagate, websockets.level = before


# ── form ──────────────────────────────────────────────────────────────────────


def test_a_line_of_text_has_time_level_and_message():
    line = render("text", "listening on %s", ":9111")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info  listening on :9111", line)


def test_a_line_of_json_has_time_level_and_message():
    entry = json.loads(render("json", "listening on %s", ":9111", level=logging.WARNING))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry == {"level": "warn", "message": "listening on :9111"}


def test_the_peer_and_the_session_are_fields_of_their_own():
    assert render("text", "refused", peer="1.2.3.4:5", session="a b").endswith(" peer='1.2.3.4:5' session='a b'")
    entry = json.loads(render("json", "refused", peer="1.2.3.4:5", session="a b"))
    assert (entry["peer"], entry["session"]) == ("1.2.3.4:5", "a b")


@styles
@pytest.mark.parametrize("level", ["debug", "info", "warn", "error"])
def test_a_level_is_called_as_its_flag_calls_it(style, level):
    number = {"warn": logging.WARNING}.get(level) or getattr(logging, level.upper())
    line = render(style, "x", level=number)
    assert (json.loads(line)["level"] if style == "json" else line.split()[1]) == level


@given(st.text(), st.text())
def test_every_line_of_json_is_one_line_that_parses_to_what_was_logged(message, session):
    line = render("json", "%s", message, session=session)
    assert line.isascii()
    assert line.isprintable()
    entry = json.loads(line)
    assert (entry["message"], entry["session"]) == (message, session)


@given(st.text(), st.text())
def test_no_control_character_reaches_a_line_of_text(message, session):
    line = render("text", "%s", message, session=session)
    assert re.sub(r"[\n\t]", "", line).isprintable()
    line.encode()  # no half surrogate either


def test_escape_codes_of_a_terminal_are_shown_and_not_obeyed():
    assert r"\x1b[2J\x07\r" in render("text", "cannot run %s", "\x1b[2J\x07\r")


@styles
@pytest.mark.parametrize("brk", ["\n", "\r", "\v", "\x85", "\u2028"])
def test_what_a_peer_sent_cannot_forge_a_line(style, brk):
    line = render(style, "cannot run %s", f"x{brk}2026-01-01T00:00:00.000Z info  all is well")
    assert len(line.splitlines()) == 1


@styles
def test_a_traceback_is_in_the_record(style):
    try:
        raise OSError("a \x1b[31m disk failed")
    except OSError:
        line = render(style, "unexpected error", exc_info=sys.exc_info())
    message = json.loads(line)["message"] if style == "json" else line.replace("\n    ", "\n")
    assert "unexpected error\nTraceback (most recent call last):\n" in message
    assert "disk failed" in message
    assert "\x1b" not in line


# ── secrets ───────────────────────────────────────────────────────────────────


@styles
def test_a_secret_is_hidden_wherever_it_stands_in_a_record(style):
    try:
        raise ValueError("token s3cret is wrong")
    except ValueError:
        line = render(style, "s3cret and %s", "xs3cretx", hidden=["s3cret", ""], exc_info=sys.exc_info(),
                      peer="ws://h/?token=s3cret", session="s3cret")  # fmt: skip
    assert "s3cret" not in line
    assert "[hidden] and x[hidden]x" in line


@styles
def test_an_empty_secret_hides_nothing(style):
    assert "[hidden]" not in render(style, "nothing to hide", hidden=["", ""])


@styles
@pytest.mark.parametrize("token", ['quo"te', "quo'te'\"", "back\\slash", "ümläut", "\u65e5\u672c\u8a9e", "a[hidden]b"])
def test_a_secret_is_hidden_in_every_spelling_of_a_record(style, token):
    # Messages quote with !r, JSON escapes: neither may show what is left of a token.
    line = render(style, "as it is: %s, quoted: %r", token, token, hidden=[token])
    assert token not in line
    assert repr(token)[1:-1] not in line
    assert json.dumps(token)[1:-1] not in line


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_log_of_a_configuration_hides_its_token_and_callback(style, read_log):
    callback = parse_callback("https://user:passw0rd@host/path?token=whisper%2Fed&id=12")
    set_up_logging(Config(log_format=style, tokens=("to/ken",), callback=callback))
    logger = logging.getLogger("sockerless.agent")
    logger.error("%s and %s", "to/ken to%2Fken whisper%2Fed whisper/ed passw0rd", callback.url)
    logger.info("dialling %s", callback)
    text = read_log()
    assert not re.search("ken|whisper|passw0rd", text)
    assert "wss://host/path" in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", "debug info warn error"), ("info", "info warn error"), ("warn", "warn error"), ("error", "error")],
)
def test_a_log_level_hides_what_is_below_it(level, shown, read_log):
    set_up_logging(Config(log_level=level, log_format="json"))
    logger = logging.getLogger("sockerless.agent")
    for log in (logger.debug, logger.info, logger.warning, logger.error):
        log("x")
    assert " ".join(json.loads(line)["level"] for line in read_log().splitlines()) == shown


def test_the_library_does_not_log_headers_even_at_debug(read_log):
    set_up_logging(Config(log_level="debug"))
    logger = logging.getLogger("sockerless.websockets")
    logger.debug("> Authorization: Bearer x")
    logger.info("connection open")
    logger.warning("shown")
    assert read_log().count("\n") == 1


def test_a_log_that_cannot_be_written_stops_nothing(read_log, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    set_up_logging(Config())
    logging.getLogger("sockerless.agent").error("nobody reads this")


def test_a_log_that_nobody_reads_holds_up_nobody(monkeypatch):
    """A pipe that is full: whoever logs goes on, and what is missing is counted once it is read again."""
    read_end, write_end = os.pipe()
    with open(write_end, "w") as full, open(read_end, "rb") as reader:
        monkeypatch.setattr(sys, "stderr", full)
        handler = LogHandler()
        handler.setFormatter(LogFormatter("text", ()))
        count = LOG_BACKLOG + 5000
        for number in range(count):
            handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "%05d %s", (number, "." * 200), None))
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "the last", (), None))
        lines = []
        missing = 0
        while True:
            lines.append(reader.readline().decode())
            found = re.search(r"(\d+) lines are missing here", lines[-1])
            if found:
                missing += int(found[1])
                break
        seen = [int(line.split()[2]) for line in lines if re.search(r" \d{5} \.", line)]
        assert seen == list(range(len(seen)))
        assert len(seen) + missing == count + 1


def test_what_is_missing_is_not_put_down_to_a_fault_that_is_over(monkeypatch):
    """A pipe that nobody reads any more refuses lines; one that is full later lets them fall for its own reason."""
    first_read, first_write = os.pipe()
    read_end, write_end = os.pipe()
    os.close(first_read)
    with open(first_write, "w") as stderr, open(read_end, "rb") as reader:
        monkeypatch.setattr(sys, "stderr", stderr)
        handler = LogHandler()
        handler.setFormatter(LogFormatter("text", ()))

        def log(number):
            handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "%05d %s", (number, "." * 200), None))

        log(0)
        handler.flush(PATIENCE)
        os.dup2(write_end, first_write)
        os.close(write_end)
        log(1)
        assert b"00001 ." in reader.readline()
        assert re.search(rb"1 lines are missing here: stderr could not be written: Broken pipe", reader.readline())
        for number in range(LOG_BACKLOG + 5000):
            log(number)
        found = None
        while found is None:
            found = re.search(r"lines are missing here: (.*)", reader.readline().decode())
        assert found[1] == "stderr was not read"
