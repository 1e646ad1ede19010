# shellcheck shell=bash
# The Python environments of every script here. To be sourced, then called with the project's root:
#
#     source "$root/scripts/environment.sh"
#     prepare_environment "$root"
#
# Afterwards $root/.venv holds the versions of requirements/lock.txt and the package itself
# (editable), and its `python` is first on PATH. A second call only compares a stamp.
# `prepare_vllm "$root"` makes $root/.venv-vllm from requirements/vllm.txt, `prepare_clients "$root"`
# $root/.venv-clients from requirements/clients.txt, `prepare_te "$root"` $root/.venv-te from
# requirements/te.txt, `prepare_dali "$root"` $root/.venv-dali from requirements/dali.txt,
# `prepare_docs "$root"` $root/.venv-docs from requirements/docs.txt; they leave PATH alone.
#
# Needs bash, coreutils and flock (util-linux). PYTHON names the interpreter to build with; without
# it an existing environment keeps the interpreter it has.
#
# The functions below read what _environment_make was called with: environment_root,
# environment_dir (what to make), environment_lock (from which versions), and environment_files
# (whose change makes it out of date).

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

# What it must have been made from to be right: where the project is, its Python, and these files.
_environment_stamp() {
    printf 'root %s\npython %s\nfiles %s\n' "$environment_root" "$1" \
        "$(cat "${environment_files[@]}" | sha256sum)"
}

_environment_version_of_venv() {
    [[ -x $environment_dir/bin/python ]] || return 1
    "$environment_dir/bin/python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' \
        2>/dev/null </dev/null
}

_environment_is_current() {
    local version wanted
    version=$(_environment_version_of_venv) || return 1
    if [[ -n ${PYTHON:-} ]]; then
        wanted=$(_environment_probe "$PYTHON") || return 1
        [[ $version == "${wanted%%$'\t'*}" ]] || return 1
    fi
    [[ ! -e $environment_dir/.installing && -f $environment_dir/.stamp ]] || return 1
    [[ $(_environment_stamp "$version") == "$(<"$environment_dir/.stamp")" ]]
}

# True when it cannot be updated in place.
_environment_must_rebuild() {
    local version
    version=$(_environment_version_of_venv) || return 0
    # An interrupted pip can leave a package that looks installed and is not whole.
    [[ ! -e $environment_dir/.installing ]] || return 0
    [[ $version == "$environment_version" ]] || return 0
    # Moved or copied here: its scripts and its link to the package point to the old place.
    [[ ! -f $environment_dir/.stamp ]] ||
        ! grep -qxF "root $environment_root" "$environment_dir/.stamp"
}

# pip with one plain line for each package; its whole output is kept for when it fails.
_environment_pip() {
    local total=$1
    shift
    "$environment_dir/bin/python" -m pip install --no-input --disable-pip-version-check \
        --progress-bar off "$@" </dev/null 2>&1 | tee -a "$environment_dir/install.log" |
        awk -v total="$total" '
            /^(Collecting|Processing) / {
                sub(/.*\//, "", $2)
                printf "environment:   %d of %d  %s\n", ++n, total, $2
                fflush()
            }
            /^Installing collected/ && total > 1 { print "environment:   unpacking"; fflush() }' >&2
    return "${PIPESTATUS[0]}"
}

# The package itself, where it is part of the environment.
_environment_install_package() {
    [[ $environment_dir == "$environment_root/.venv" ]] || return 0
    # The lock has setuptools, so building needs nothing more.
    _environment_pip 1 --no-deps --no-build-isolation -e "$environment_root"
}

_environment_install() {
    local count
    if _environment_is_current; then return 0; fi # another process was quicker
    if [[ -n ${PYTHON:-} ]] || ! environment_version=$(_environment_version_of_venv) ||
        [[ $environment_version != 3.12.* && $environment_version != 3.13.* ]]; then
        _environment_find_python || return 1
    else
        environment_python=$environment_dir/bin/python
        # Rebuilding removes that one, so the base interpreter has to be known beforehand.
        environment_python=$("$environment_python" -c \
            'import os, sys; print(os.path.realpath(sys._base_executable))') || return 1
    fi

    if _environment_must_rebuild; then
        if [[ -e $environment_dir ]]; then _environment_say "replacing $environment_dir"; fi
        rm -rf "$environment_dir" || return 1
        _environment_say "making $environment_dir with Python $environment_version ($environment_python)"
        mkdir "$environment_dir" && : >"$environment_dir/.installing" || return 1
        "$environment_python" -m venv "$environment_dir" || return 1
        if grep -q '^torch==' "$environment_lock"; then
            _environment_say "torch with its libraries is about 3 GB to download: a few minutes"
        fi
    else
        _environment_say "updating $environment_dir (Python $environment_version)"
        : >"$environment_dir/.installing" || return 1
    fi

    count=$(grep -c '^[^#]*==' "$environment_lock")
    _environment_say "installing the $count packages of $environment_lock"
    : >"$environment_dir/install.log"
    # The lock is complete, so nothing is left to resolve.
    if ! _environment_pip "$count" --no-deps -r "$environment_lock" ||
        ! _environment_install_package; then
        _environment_say "error: the installation failed; the end of $environment_dir/install.log:"
        tail -n 15 "$environment_dir/install.log" >&2
        _environment_say "check the network and the free disk space (8 GB), and run this again."
        return 1
    fi
    _environment_stamp "$environment_version" >"$environment_dir/.stamp" || return 1
    rm "$environment_dir/.installing" || return 1
    _environment_say "ready"
}

# _environment_make ROOT DIRECTORY LOCK [FILE...]: names are relative to ROOT.
_environment_make() {
    local environment_root environment_dir environment_lock environment_files
    environment_root=$(cd "$1" && pwd -P) || return 1
    environment_dir=$environment_root/$2
    environment_lock=$environment_root/$3
    environment_files=("${@:3}")
    environment_files=("${environment_files[@]/#/$environment_root/}")
    if _environment_is_current; then return 0; fi
    # pip inherits the lock: if this shell is killed, the next one waits for what it started.
    (
        flock --nonblock 9 || {
            _environment_say "waiting for another process to finish with $environment_dir"
            flock 9
        }
        _environment_install
    ) 9>"$environment_dir.lock"
}

prepare_environment() {
    _environment_make "$1" .venv requirements/lock.txt pyproject.toml setup.py || return 1
    VIRTUAL_ENV=$(cd "$1" && pwd -P)/.venv
    export VIRTUAL_ENV
    export PATH=$VIRTUAL_ENV/bin:$PATH
    unset PYTHONHOME
}

# For the tests of tests/clients alone: vLLM pins other versions of what the project uses.
prepare_vllm() {
    _environment_make "$1" .venv-vllm requirements/vllm.txt
}

# For those too: training and evaluation with libraries that the project does not use itself.
prepare_clients() {
    _environment_make "$1" .venv-clients requirements/clients.txt
}

# For tests/transformer_engine: a few packages on top of .venv, for the interpreter that it has.
prepare_te() {
    PYTHON=$1/.venv/bin/python _environment_make "$1" .venv-te requirements/te.txt
}

# For tests/dali, in the same way.
prepare_dali() {
    PYTHON=$1/.venv/bin/python _environment_make "$1" .venv-dali requirements/dali.txt
}

# For the site of docs/, which needs nothing of the project.
prepare_docs() {
    _environment_make "$1" .venv-docs requirements/docs.txt
}
