# shellcheck shell=bash
# Sourced by scripts/run, scripts/test and .ci/run: finds a Python and makes virtual environments in the checkout.
#
# All that is said here goes to stderr, because stdout belongs to the program that is started afterwards. An
# environment has a stamp, written last: while the stamp is true, neither pip nor the lock is touched.

# The checkout, also when the script was called through a symlink or from somewhere else.
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")

note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    note "$*"
    exit 1
}

# Prints "VERSION VENV PATH", say "3.13 yes /usr/bin/python3.13"; exits with 1 where Python is too old. -I (here and
# below) keeps the caller's PYTHONPATH, and files named like a module in the caller's directory, out of it.
probe='
import sys
if sys.version_info < (3, 11):
    sys.exit(1)
from importlib.util import find_spec
venv = find_spec("venv") and find_spec("ensurepip")
print("%d.%d" % sys.version_info[:2], "yes" if venv else "no", sys.executable)'

# find_python: prints "VERSION PATH" of the first Python that will do; $PYTHON, if set, is the only one asked.
# Each is run, not only looked up: a pyenv shim is on PATH even where the version behind it is not selected.
find_python() {
    local candidates=(python3.13 python3.12 python3.11 python3) candidate answer version venv path without_venv=""
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        answer=$("$candidate" -I -c "$probe" 2>/dev/null </dev/null) || continue
        read -r version venv path <<<"$answer"
        if [[ $venv == yes ]]; then
            echo "$version $path"
            return
        fi
        without_venv=${without_venv:-"$path has no venv and ensurepip modules: on Debian, install python$version-venv"}
    done
    die "${without_venv:-"no Python 3.11 or newer here, tried: ${candidates[*]}"}"
}

# What must be unchanged for an environment to be good as it is. DIR is where it is, INTERPRETER what made it: a moved
# checkout, or another Python behind the same name, needs a new one.
origin() { echo "$1 $(readlink -f "$2")"; } # DIR INTERPRETER
stamp() {                                   # DIR INTERPRETER
    origin "$@"
    # The version is in the installed metadata, so a new one is a reason to install again.
    { cat "$root/setup.cfg" "$root/pyproject.toml" && sed -n '/^__version__/p' "$root/agent.py"; } | sha256sum
}
is_current() { # DIR INTERPRETER
    [[ -x $1/bin/python && -f $1/stamp && $(<"$1/stamp") == "$(stamp "$@")" ]]
}

# ensure_venv DIR INTERPRETER EXTRA: makes or refreshes the environment if it is not current. With an EXTRA it holds
# the project too, editable, so that "python -m agent" works in any directory and with any environment variables;
# without, it holds the run-time dependencies only. INTERPRETER may be empty: whatever DIR has, else find_python's.
ensure_venv() {
    local dir=$1 interpreter=${2:-$1/bin/python}
    is_current "$dir" "$interpreter" && return
    [[ -w $root ]] || die "cannot write to $root, where ${dir##*/} goes"
    command -v flock >/dev/null || die "flock is missing: on Debian, install util-linux"
    # A subshell, so that the lock ends with it: neither the agent nor pytest inherits the descriptor.
    (
        flock -n 9 || {
            note "waiting: another run is setting up"
            flock 9
        }
        is_current "$dir" "$interpreter" || fill_venv "$@"
    ) 9>"$root/.venv.lock" </dev/null >&2 || exit 1
}

# fill_venv: the slow part of ensure_venv, same arguments; runs under its lock.
fill_venv() {
    local dir=$1 interpreter=${2:-$1/bin/python} extra=$3 log=$1.log made_by="" maker wanted
    # Kept if only setup.cfg has changed: pip then has little to do, and what runs from it runs on.
    [[ -f $dir/stamp ]] && read -r made_by <"$dir/stamp"
    if [[ ! -x $dir/bin/python || $made_by != "$(origin "$dir" "$interpreter")" ]]; then
        maker=$2
        [[ -n $maker ]] || maker=$(find_python) || exit 1
        maker=${maker#3.* }
        note "making ${dir##*/} with $maker (once)"
        rm -rf "$dir"
        "$maker" -I -m venv "$dir" >"$log" 2>&1 || die "cannot make ${dir##*/}: $(grep . "$log" | tail -n 1), see $log"
    fi
    note "installing into ${dir##*/}"
    if [[ -n $extra ]]; then
        wanted=(--editable "${root}[$extra]")
    else
        mapfile -t wanted < <(runtime_requirements "$dir/bin/python")
    fi
    "$dir/bin/python" -I -m pip install "${wanted[@]}" >"$log" 2>&1 || die "$(pip_failure "$log")"
    stamp "$dir" "$interpreter" >"$dir/stamp"
}

runtime_requirements() {
    "$1" -I -c '
import configparser, sys
config = configparser.ConfigParser(interpolation=None)
config.read(sys.argv[1], "utf-8")
print(config["options"]["install_requires"].strip())' "$root/setup.cfg"
}

# pip_failure LOG: one line for a person. When the registry is out of reach pip retries, then says "no matching
# distribution", which sends people looking for a wrong name.
pip_failure() {
    if grep -q 'Retrying (Retry(' "$1"; then
        echo "pip cannot reach the package registry, see $1"
    else
        echo "pip failed: $(grep -i "^ *error" "$1" | tail -n 1), see $1"
    fi
}
