# shellcheck shell=bash
# The Python environment of every script here. To be sourced, then called with the project's root:
#
#     source "$root/scripts/environment.sh"
#     prepare_environment "$root"
#
# Afterwards $root/.venv holds the versions of requirements/lock.txt and the package itself
# (editable), and its `python` is first on PATH. A second call only compares a stamp.
#
# Needs bash, coreutils and flock (util-linux). PYTHON names the interpreter to build .venv with;
# without it an existing .venv keeps the interpreter it has.

_environment_say() { printf 'environment: %s\n' "$*" >&2; }

# Prints "VERSION<tab>PATH" of an interpreter that can build the environment; else says why not.
# The path is the base interpreter's: a virtual environment may be the very one that is replaced.
_environment_probe() {
    local candidate=$1 answer
    if ! command -v "$candidate" >/dev/null 2>&1; then
        echo "not found"
        return 1
    fi
    # A pyenv shim is found on PATH and yet does not run: only running it tells.
    if ! answer=$("$candidate" -c '
import os, sys
executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
print("%d.%d.%d\t%s" % (sys.version_info[:3] + (executable,)))' 2>/dev/null </dev/null); then
        echo "does not run"
        return 1
    fi
    case $answer in
    3.12.* | 3.13.*) ;;
    *)
        echo "is Python ${answer%%$'\t'*}"
        return 1
        ;;
    esac
    if ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; then
        echo "has no venv module (on Debian: apt install python3-venv)"
        return 1
    fi
    printf '%s\n' "$answer"
}

# Sets environment_python (path) and environment_version.
_environment_find_python() {
    local candidate found tried=()
    local candidates=(python3.13 python3.12 python3)
    if [[ -n ${PYTHON:-} ]]; then
        if ! found=$(_environment_probe "$PYTHON"); then
            _environment_say "error: PYTHON=$PYTHON $found; Python 3.12 or 3.13 is needed." \
                "Point PYTHON at one, or unset it to let this script look."
            return 1
        fi
    else
        while IFS= read -r candidate; do
            candidates+=("$candidate")
        done < <(printf '%s\n' "${HOME:-}"/.pyenv/versions/3.1[23]*/bin/python | sort -rV)
        found=""
        for candidate in "${candidates[@]}"; do
            [[ $candidate != *"*"* ]] || continue # no pyenv: the pattern itself
            if found=$(_environment_probe "$candidate"); then break; fi
            tried+=("    $candidate $found")
            found=""
        done
        if [[ -z $found ]]; then
            _environment_say "error: no Python 3.12 or 3.13 here. Tried:"
            printf '%s\n' "${tried[@]}" "    ~/.pyenv/versions: none that fits" >&2
            _environment_say "install one of them, or set PYTHON to its path, and run this again."
            return 1
        fi
    fi
    environment_version=${found%%$'\t'*}
    environment_python=${found#*$'\t'}
}

# What .venv must have been made from to be right: where it is, its Python, and these files.
_environment_stamp() {
    local root=$1 version=$2
    printf 'root %s\npython %s\nfiles %s\n' "$root" "$version" \
        "$(cat "$root/requirements/lock.txt" "$root/pyproject.toml" "$root/setup.py" | sha256sum)"
}

_environment_version_of_venv() {
    [[ -x $1/.venv/bin/python ]] || return 1
    "$1/.venv/bin/python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' \
        2>/dev/null </dev/null
}

_environment_is_current() {
    local root=$1 version wanted
    version=$(_environment_version_of_venv "$root") || return 1
    if [[ -n ${PYTHON:-} ]]; then
        wanted=$(_environment_probe "$PYTHON") || return 1
        [[ $version == "${wanted%%$'\t'*}" ]] || return 1
    fi
    [[ ! -e $root/.venv/.installing && -f $root/.venv/.stamp ]] || return 1
    [[ $(_environment_stamp "$root" "$version") == "$(<"$root/.venv/.stamp")" ]]
}

# True when .venv cannot be updated in place.
_environment_must_rebuild() {
    local root=$1 version
    version=$(_environment_version_of_venv "$root") || return 0
    # An interrupted pip can leave a package that looks installed and is not whole.
    [[ ! -e $root/.venv/.installing ]] || return 0
    [[ $version == "$environment_version" ]] || return 0
    # Moved or copied here: its scripts and its link to the package point to the old place.
    [[ ! -f $root/.venv/.stamp ]] || ! grep -qxF "root $root" "$root/.venv/.stamp"
}

# pip with one plain line for each package; its whole output is kept for when it fails.
_environment_pip() {
    local root=$1 total=$2
    shift 2
    "$root/.venv/bin/python" -m pip install --no-input --disable-pip-version-check \
        --progress-bar off "$@" </dev/null 2>&1 | tee -a "$root/.venv/install.log" |
        awk -v total="$total" '
            /^(Collecting|Processing) / {
                sub(/.*\//, "", $2)
                printf "environment:   %d of %d  %s\n", ++n, total, $2
                fflush()
            }
            /^Installing collected/ && total > 1 { print "environment:   unpacking"; fflush() }' >&2
    return "${PIPESTATUS[0]}"
}

_environment_install() {
    local root=$1 count
    if _environment_is_current "$root"; then return 0; fi # another process was quicker
    if [[ -n ${PYTHON:-} ]] || ! environment_version=$(_environment_version_of_venv "$root") ||
        [[ $environment_version != 3.12.* && $environment_version != 3.13.* ]]; then
        _environment_find_python || return 1
    else
        environment_python=$root/.venv/bin/python
        # Rebuilding removes that one, so the base interpreter has to be known beforehand.
        environment_python=$("$environment_python" -c \
            'import os, sys; print(os.path.realpath(sys._base_executable))') || return 1
    fi

    if _environment_must_rebuild "$root"; then
        if [[ -e $root/.venv ]]; then _environment_say "replacing $root/.venv"; fi
        rm -rf "$root/.venv" || return 1
        _environment_say "making $root/.venv with Python $environment_version ($environment_python)"
        mkdir "$root/.venv" && : >"$root/.venv/.installing" || return 1
        "$environment_python" -m venv "$root/.venv" || return 1
        _environment_say "torch with its libraries is about 3 GB to download: a few minutes"
    else
        _environment_say "updating $root/.venv (Python $environment_version)"
        : >"$root/.venv/.installing" || return 1
    fi

    count=$(grep -c == "$root/requirements/lock.txt")
    _environment_say "installing the $count packages of requirements/lock.txt"
    : >"$root/.venv/install.log"
    # The lock is complete, so nothing is left to resolve. It has setuptools, so the build of the
    # package itself needs nothing more.
    if ! _environment_pip "$root" "$count" --no-deps -r "$root/requirements/lock.txt" ||
        ! _environment_pip "$root" 1 --no-deps --no-build-isolation -e "$root"; then
        _environment_say "error: the installation failed; the end of $root/.venv/install.log:"
        tail -n 15 "$root/.venv/install.log" >&2
        _environment_say "check the network and the free disk space (8 GB), and run this again."
        return 1
    fi
    _environment_stamp "$root" "$environment_version" >"$root/.venv/.stamp" || return 1
    rm "$root/.venv/.installing" || return 1
    _environment_say "ready"
}

prepare_environment() {
    local root
    root=$(cd "$1" && pwd -P) || return 1
    if ! _environment_is_current "$root"; then
        # pip inherits the lock: if this shell is killed, the next one waits for what it started.
        (
            flock --nonblock 9 || {
                _environment_say "waiting for another process to finish with $root/.venv"
                flock 9
            }
            _environment_install "$root"
        ) 9>"$root/.venv.lock" || return 1
    fi
    export VIRTUAL_ENV=$root/.venv
    export PATH=$VIRTUAL_ENV/bin:$PATH
    unset PYTHONHOME
}
