"""Flags and environment: what they may be, which one wins, and how they are refused."""

import dataclasses
import math
import re
import signal
import tempfile
import threading
from pathlib import Path

import pytest
import trustme
from hypothesis import example, given
from hypothesis import strategies as st

import agent
from agent import Address, Callback, Config, ConfigError, load_config, parse_address, parse_duration, parse_size

# A certificate and its key, under two names.
_directory = tempfile.TemporaryDirectory()
PEM, PEM_TOO = (f"{_directory.name}/{name}.pem" for name in ("one", "two"))
for path in (PEM, PEM_TOO):
    trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
        path
    )

# For every option: a good text, the value that it means, another good text, and bad ones.
SAMPLES = {
    "addr": ("127.0.0.1:80", Address("127.0.0.1", 80), ":1", ["9111", "host", "host:port", "host:65536", "unix:"]),
    "callback": ("http://h/p?id=1", Callback("ws://h/p?id=1", "http://h/p?id=1"), "wss://h",
                 ["h/p", "ftp://h", "http://", "http://h/#x", "http://h:port"]),
    "probe": ("true", True, "1", ["yes"]),
    "callback-retries": ("0", 0, "3", ["-1", "x", "1.5"]),
    "callback-ca": (__file__, __file__, "/dev/null", ["/nonexistent/ca.pem"]),
    "callback-cert": (__file__, __file__, "/dev/null", ["/nonexistent/cert.pem"]),
    "callback-key": (__file__, __file__, "/dev/null", ["/nonexistent/key.pem"]),
    "tls-cert": (PEM, PEM, PEM_TOO, ["/nonexistent/cert.pem"]),
    "tls-key": (PEM, PEM, PEM_TOO, ["/nonexistent/key.pem"]),
    "tls-client-ca": (PEM, PEM, PEM_TOO, ["/nonexistent/ca.pem"]),
    "lifetime": ("15m", 900.0, "1s", ["0", "15", "-1s"]),
    "lifetime-margin": ("0", 0.0, "1s", ["x"]),
    "lifetime-signal": ("TERM", signal.SIGTERM, "INT", ["TREM", "0"]),
    "keep-alive": ("true", True, "1", ["yes", "on"]),
    "tty": ("true", True, "T", ["2", "tru"]),
    "copy-output": ("false", False, "0", ["no", "off"]),
    "exit-with-main": ("true", True, "True", ["-1", "x"]),
    "init": ("on", "on", "off", ["yes", "true"]),
    "subreaper": ("true", True, "1", ["yes"]),
    "signal-group": ("true", True, "1", ["-g"]),
    "exit-codes": ("143:0, 130:1,7", {143: 0, 130: 1, 7: 0}, "1:2",
                   ["x", "1:", ":1", "256:0", "1:256", "1:2:3", "-1"]),
    "stop-signal": ("QUIT", signal.SIGQUIT, "RTMIN+3", ["KILL", "CHLD", "0", "TREM"]),
    "stop-timeout": ("1m30s", 90.0, "5s", ["10", "s", "-1s", "ten"]),
    "drain-timeout": ("500ms", 0.5, "5s", ["1d"]),
    "kill-timeout": ("0", 0.0, "5s", ["1 s"]),
    "replay-size": ("64k", 65536, "1", ["1t", "-1", "k", "1.5m"]),
    "pid-file": ("/run/main.pid", "/run/main.pid", "/x", []),
    "log-level": ("warn", "warn", "debug", ["warning", "INFO", "0"]),
    "log-format": ("json", "json", "text", ["yaml"]),
    "audit-log": ("/var/log/audit", "/var/log/audit", "-", []),
    "token-file": (None, ("from-a-file",), None, ["/nonexistent/token", "/", "/dev/null"]),
    "allow-cmd": ("/bin/df, /bin/ls", ("/bin/df", "/bin/ls"), "/bin/true",
                  ["df", "./df", "/bin/", ",", "/bin/ls,/usr/bin/ls", "/bin/df,ls"]),
    "no-exec": ("true", True, "1", ["yes"]),
    "read-only": ("true", True, "1", ["yes"]),
    "health-cmd": ("curl -f localhost", "curl -f localhost", "true", []),
    "health-interval": ("5s", 5.0, "1s", ["0", "0s", "x"]),
    "health-timeout": ("5s", 5.0, "1s", ["0", "5"]),
    "health-retries": ("5", 5, "1", ["0", "-1", "1.5", "x", "²"]),
    "health-start-period": ("1h", 3600.0, "1s", ["h"]),
    "max-message-size": ("8MiB", 8 << 20, "1k", ["8 apples"]),
    "max-sessions": ("7", 7, "1", ["0"]),
    "max-total-sessions": ("7", 7, "1", ["0"]),
    "stdin-limit": ("1g", 1 << 30, "1k", ["lots"]),
    "resume-window": ("0", 0.0, "1m", ["x", "5"]),
    "ping-interval": ("1s", 1.0, "2s", ["0"]),
    "ping-timeout": ("1s", 1.0, "2s", ["0ms"]),
}  # fmt: skip
NEEDS = {
    "tty": ["--keep-alive"],
    "exit-with-main": ["--keep-alive"],
    "callback-key": ["--callback-cert", PEM],
    "tls-key": ["--tls-cert", PEM],
    "tls-client-ca": ["--tls-cert", PEM],
}
OPTIONS = {option.name: option for option in agent.OPTIONS}
options = pytest.mark.parametrize("name", OPTIONS)
bad_values = pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, row in SAMPLES.items() for bad in row[3]])


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("from-a-file\n")
    return str(path)


@pytest.fixture
def sample(token_file):
    """A good text for an option, what it means, and another good text."""

    def find(name):
        text, value, other, _ = SAMPLES[name]
        return text or token_file, value, other or token_file

    return find


def needed_flags(name):
    return NEEDS.get(name, [])


def test_every_option_has_a_sample_here():
    assert set(SAMPLES) == set(OPTIONS)


def test_every_option_is_in_the_readme():
    readme = (Path(agent.__file__).parent / "README.md").read_text()
    table = re.findall(r"^\| `--([a-z-]+)(?: [A-Z]+)?` \| ", readme, re.MULTILINE)
    assert table == [option.name for option in agent.OPTIONS] + ["version", "help"]


# ── spelling and precedence ───────────────────────────────────────────────────


@options
@pytest.mark.parametrize("dashes", ["-", "--"])
@pytest.mark.parametrize("joined", [True, False], ids=["equals", "word"])
def test_a_flag_may_be_spelled_in_every_way_that_go_takes(name, dashes, joined, sample):
    text, value, _ = sample(name)
    option = OPTIONS[name]
    # A boolean takes no second word, as in Go; see below.
    flag = [f"{dashes}{name}={text}"] if joined or not option.metavar else [f"{dashes}{name}", text]
    assert getattr(load_config([*needed_flags(name), *flag], {}), option.target) == value


@options
def test_an_option_may_be_set_in_the_environment(name, sample):
    text, value, _ = sample(name)
    option = OPTIONS[name]
    assert option.variable == "SOCKERLESS_AGENT_" + name.upper().replace("-", "_")
    assert getattr(load_config(needed_flags(name), {option.variable: text}), option.target) == value


@options
def test_a_flag_wins_over_the_environment(name, sample):
    text, value, other = sample(name)
    config = load_config([*needed_flags(name), f"--{name}={text}"], {OPTIONS[name].variable: other})
    assert getattr(config, OPTIONS[name].target) == value


@options
def test_the_last_of_two_equal_flags_wins(name, sample):
    text, value, other = sample(name)
    config = load_config([*needed_flags(name), f"--{name}={other}", f"-{name}={text}"], {})
    assert getattr(config, OPTIONS[name].target) == value


@options
def test_an_empty_variable_is_as_good_as_none(name):
    if name == "pid-file":
        assert load_config([], {OPTIONS[name].variable: ""}).pid_file == ""  # "nowhere" must be sayable
    else:
        assert load_config([], {OPTIONS[name].variable: ""}) == Config()


def test_nothing_given_is_the_defaults():
    assert load_config([], {"PATH": "/bin", "SOCKERLESS_AGENT_NONSENSE": "1"}) == Config()


@pytest.mark.parametrize("words", [["-keep-alive"], ["--keep-alive"]])
def test_a_boolean_alone_means_true(words):
    assert load_config(words, {}).keep_alive is True


def test_a_boolean_takes_no_second_word():
    assert load_config(["--keep-alive", "false"], {}).command == ("false",)


def test_a_value_may_start_with_a_dash():
    assert load_config(["--health-cmd", "--version"], {}).health_cmd == "--version"


# ── the main process's command ────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["-keep-alive", "--", "node", "-v"], ("node", "-v")),
        (["-keep-alive", "node", "-v", "--keep-alive=false"], ("node", "-v", "--keep-alive=false")),
        (["-keep-alive", "node", "--", "-x"], ("node", "--", "-x")),
        (["-keep-alive", "--", "--", "-x"], ("--", "-x")),
        (["-keep-alive", "-", "-x"], ("-", "-x")),
        (["-keep-alive", "-addr", ":1", "cmd"], ("cmd",)),
        (["-keep-alive", "-addr=:1", "cmd", "-addr=:2"], ("cmd", "-addr=:2")),
        (["-keep-alive", "-health-cmd", "--", "cmd"], ("cmd",)),
        (["-keep-alive", "--", ""], ("",)),
        (["-keep-alive"], ("/bin/sh",)),
        (["-keep-alive", "--"], ("/bin/sh",)),
        (["--"], ()),
    ],
)
def test_the_command_begins_where_gos_flag_package_ends_the_flags(words, command):
    assert load_config(words, {}).command == command


@given(st.lists(st.text(), min_size=1))
def test_whatever_follows_two_dashes_is_the_command_word_for_word(words):
    assert load_config(["--keep-alive", "--", *words], {}).command == tuple(words)


def test_a_command_without_keep_alive_is_refused():
    with pytest.raises(ConfigError, match=r"'node'.*--keep-alive"):
        load_config(["node"], {})


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_flag_that_needs_another_says_so(name, sample):
    with pytest.raises(ConfigError, match=f"--{name}.*{NEEDS[name][0]}"):
        load_config([f"--{name}={sample(name)[0]}"], {})


# ── refusals ──────────────────────────────────────────────────────────────────


@bad_values
def test_a_bad_flag_is_refused_by_its_name(name, bad):
    with pytest.raises(ConfigError, match=f"flag --{name}: "):
        load_config([*needed_flags(name), f"--{name}={bad}"], {})


@bad_values
def test_a_bad_variable_is_refused_by_its_name(name, bad):
    variable = OPTIONS[name].variable
    with pytest.raises(ConfigError, match=f"environment variable {variable}: "):
        load_config(needed_flags(name), {variable: bad})


@pytest.mark.parametrize("word", ["--nonsense", "-nonsense", "---addr=:1", "--add=:1", "-a", "--nonsense=1"])
def test_an_unknown_flag_is_refused_by_its_name(word):
    with pytest.raises(ConfigError, match=re.escape(word)):
        load_config([word], {})


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.metavar])
def test_a_flag_without_its_value_is_refused_by_its_name(name):
    with pytest.raises(ConfigError, match=f"--{name}"):
        load_config([f"--{name}"], {})


@pytest.mark.parametrize("words", [["--version"], ["-version"], ["--help"], ["-h"]])
def test_version_and_help_end_well(words, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(words, {})
    assert caught.value.code in (0, None)
    assert "sockerless-agent" in capsys.readouterr().out


def test_the_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        load_config(["--help"], {})
    text = capsys.readouterr().out
    assert [name for name in OPTIONS if f"--{name}" not in text] == []


# ── the token and the callback ────────────────────────────────────────────────


def test_the_token_comes_from_its_variable():
    assert load_config([], {"SOCKERLESS_AGENT_TOKEN": "hush"}).tokens == ("hush",)


def test_the_token_file_wins_over_the_tokens_variable(token_file):
    assert load_config(["--token-file", token_file], {"SOCKERLESS_AGENT_TOKEN": "hush"}).tokens == ("from-a-file",)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"\n\n", b"x" * 65537, b"x\n" * 32769])
def test_a_token_file_without_a_token_is_refused(content, tmp_path):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"flag --token-file: .*{re.escape(str(path))}"):
        load_config(["--token-file", str(path)], {})


@pytest.mark.parametrize("token", ["a b", "a\nb", "a\tb", "a\x7fb", "a\0b", "\u200b"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token):
    with pytest.raises(ConfigError, match="token") as caught:
        load_config([], {"SOCKERLESS_AGENT_TOKEN": token})
    assert token not in str(caught.value)


def test_a_token_file_may_hold_several_tokens(tmp_path):
    path = tmp_path / "token"
    path.write_text("\n old \r\nnew\n\n")
    config = load_config(["--token-file", str(path)], {})
    assert (config.tokens, config.token_file, config.reloadable) == (("old", "new"), str(path), True)
    path.write_text("good\nhas a-space\n")
    with pytest.raises(ConfigError, match=r"flag --token-file: .*white space") as caught:
        load_config(["--token-file", str(path)], {})
    assert "a-space" not in str(caught.value)


def test_a_config_does_not_show_its_secrets():
    variables = {"SOCKERLESS_AGENT_TOKEN": "hush-hush", "SOCKERLESS_CALLBACK_URL": "https://u:pass@h/p?token=whisper"}
    config = load_config([], variables)
    for text in (repr(config), str(config), f"{config}", str(config.callback), repr(config.callback)):
        assert not re.search("hush|whisper|pass", text)
    assert config.tokens == ("hush-hush",)
    assert "whisper" in config.callback.url


@pytest.mark.parametrize(
    "url", ["http://host:port/?token=whisper", "whisper", "http://h/?whisper#x", "wss://[::1/whisper"]
)
def test_a_bad_callback_is_refused_and_not_shown(url):
    for words, variables in (
        (["--callback", url], {}),
        ([], {"SOCKERLESS_AGENT_CALLBACK": url}),
        ([], {"SOCKERLESS_CALLBACK_URL": url}),
    ):
        with pytest.raises(ConfigError, match=r"flag --callback|SOCKERLESS_(AGENT_CALLBACK|CALLBACK_URL)") as caught:
            load_config(words, variables)
        assert "whisper" not in str(caught.value)


@pytest.mark.parametrize(
    ("given_", "dialled"),
    [
        ("http://h:8/p?a=%2F&id=1", "ws://h:8/p?a=%2F&id=1"),
        ("https://h/p?token=a+b%20c&&x", "wss://h/p?token=a+b%20c&&x"),
        ("HTTPS://h", "wss://h"),
        ("ws://h/?session_id=%41", "ws://h/?session_id=%41"),
        ("wss://h/", "wss://h/"),
    ],
)
def test_a_callbacks_query_is_kept_byte_for_byte(given_, dialled):
    assert load_config(["--callback", given_], {}).callback.url == dialled


@pytest.mark.parametrize(
    ("url", "dialled"),
    [
        ("http://h/p", "ws://h/p?session_id=c%2F1"),
        ("http://h/p?", "ws://h/p?session_id=c%2F1"),
        ("http://h/p?a=%2f", "ws://h/p?a=%2f&session_id=c%2F1"),
        ("http://h/p?session_id=me", "ws://h/p?session_id=me"),
    ],
)
def test_a_callback_without_a_session_id_gets_the_containers(url, dialled):
    variables = {"SOCKERLESS_CALLBACK_URL": url, "SOCKERLESS_CONTAINER_ID": "c/1"}
    assert load_config([], variables).callback.url == dialled


def test_the_callback_flag_wins_over_the_platforms_variable():
    config = load_config(["--callback", "ws://flag/"], {"SOCKERLESS_CALLBACK_URL": "ws://variable/"})
    assert config.callback.url == "ws://flag/"


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().tokens = ("x",)


# ── durations, sizes, addresses ───────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("0s", 0), ("1ns", 1e-9), ("1us", 1e-6), ("1µs", 1e-6), ("500ms", 0.5), ("10s", 10), ("1m30s", 90),
     ("1.5h", 5400), (".5s", 0.5), ("1.s", 1), ("1h2m3s4ms", 3723.004), ("90m", 5400)],
)  # fmt: skip
def test_a_duration_is_read_as_go_writes_it(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds, abs=1e-15)


@pytest.mark.parametrize(
    "text",
    ["", " ", "s", "5", "1.5", "-1s", "1 s", "1s ", "1d", "1S", "1,5s", "1s2", "1.2.3s", "1e3s", "inf", "\u0663s"],
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_a_duration_without_a_unit_gets_a_hint():
    with pytest.raises(ValueError, match="did you mean 30s"):
        parse_duration("30")


@pytest.mark.parametrize("text", ["9" * 400 + "h", "2562048h"])
def test_a_duration_that_no_clock_can_wait_for_is_refused(text):
    # Go's own limit, and what threading can wait for: 2**63 nanoseconds.
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)
    assert parse_duration("2562047h") <= threading.TIMEOUT_MAX


@given(st.text(max_size=12) | st.from_regex(r"([\d.]{1,4}(ns|us|µs|ms|s|m|h)){1,3}", fullmatch=True))
@example("1\u0663s")
def test_no_text_breaks_parse_duration(text):
    try:
        seconds = parse_duration(text)
    except ValueError:
        return
    assert math.isfinite(seconds)
    assert seconds >= 0


@given(st.lists(st.tuples(st.integers(0, 9999), st.sampled_from(list(agent._UNITS))), min_size=1, max_size=4))
def test_the_parts_of_a_duration_add_up(parts):
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert parse_duration(text) == pytest.approx(sum(number * agent._UNITS[unit] for number, unit in parts))


@given(st.integers(0, 10**6), st.sampled_from(["", "k", "m", "g"]), st.sampled_from(["", "b", "ib"]), st.booleans())
def test_a_sizes_units_are_powers_of_1024(number, unit, suffix, upper):
    text = f"{number}{unit}{suffix if unit else ''}"
    assert parse_size(text.upper() if upper else text) == number * 1024 ** " kmg".index(unit or " ")


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5m", "1t", "1kk", "1 k", "0x10", "9" * 16, "1e3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "address", "local"),
    [
        (":9111", Address("", 9111), False),
        ("0.0.0.0:1", Address("0.0.0.0", 1), False),
        ("127.0.0.1:0", Address("127.0.0.1", 0), True),
        ("localhost:65535", Address("localhost", 65535), True),
        ("[::1]:80", Address("::1", 80), True),
        ("[::]:80", Address("::", 80), False),
        ("unix:/run/a:b.sock", Address(path="/run/a:b.sock"), True),
    ],
)
def test_an_address_is_read_and_written_alike(text, address, local):
    assert parse_address(text) == address
    assert str(address) == text
    assert address.is_local is local


@pytest.mark.parametrize(
    "text", ["", ":", "9111", "host", "host:", "host:-1", "host:65536", "host:x", "host:²", "::1:80", "[::1]", "unix:"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match=r"not an address|needs brackets|needs a path"):
        parse_address(text)


@given(st.text(max_size=12), st.sampled_from([parse_address, parse_size, agent.parse_callback, agent._parse_boolean]))
def test_no_text_breaks_a_parser(text, parser):
    try:
        parser(text)
    except ValueError:
        pass
