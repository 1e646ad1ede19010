#!/usr/bin/env bash
# What only a GPU can show, in one table:      bash tests/run_gpu.sh [--json FILE] [SUBJECT...]
# Where pip reaches nothing but a folder:      bash tests/run_gpu.sh --wheels DIR [...]
# The same at toy size on a CPU, with stand-ins: bash tests/run_gpu.sh --toy [...]
#
# The first of these interpreters that imports what the project needs is taken: .venv's, $PYTHON,
# python3; if none does, .venv is made. With --wheels, .venv-gpu is laid over $PYTHON or python3,
# whose torch it keeps: what is missing on top comes from the folder, and nothing from a network.
# Exit code 0: every claim of correctness holds. 1: one does not. 2: usage, or no GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

wheels=""
arguments=()
while (($#)); do
    case $1 in
    --wheels)
        wheels=${2:-}
        if [[ ! -d $wheels ]]; then
            printf 'error: --wheels %s: no such folder\n' "${wheels:-DIR}" >&2
            exit 2
        fi
        if ! compgen -G "$wheels/*.whl" >/dev/null; then
            printf 'error: --wheels %s: it holds no wheels\n' "$wheels" >&2
            exit 2
        fi
        wheels=$(cd "$wheels" && pwd -P)
        shift 2
        ;;
    *)
        arguments+=("$1")
        shift
        ;;
    esac
done

# megatron.core itself would import torch and more: where its files are is enough.
needs='
from importlib.util import find_spec
import sys
names = ["torch", "megatron", "emerging_optimizers", "transformers", "omegaconf", "einops", "rich"]
sys.exit(not (all(map(find_spec, names)) and sys.version_info >= (3, 12)))'

has_all() { "$1" -c "$needs" >/dev/null 2>&1 </dev/null; }

over_wheels() {
    local base
    base=$(command -v "${PYTHON:-python3}") || {
        printf 'error: --wheels needs an interpreter: set PYTHON to one\n' >&2
        exit 2
    }
    if ! [[ -x .venv-gpu/bin/python ]]; then
        "$base" -m venv --system-site-packages .venv-gpu
    fi
    python=$root/.venv-gpu/bin/python
    # An interpreter that is of an environment itself would be passed over for what is under it.
    local where='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$base" -c "$where" >"$("$python" -c "$where")/base.pth"
    if has_all "$python"; then return 0; fi
    # What pyproject.toml names, and Transformer Engine where the folder has its part for torch.
    local packages
    mapfile -t packages < <("$python" -c '
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], sep="\n")
if any(pathlib.Path(sys.argv[1]).glob("transformer_engine_torch-*")):
    print("transformer-engine[pytorch]")' "$wheels")
    "$python" -m pip install --quiet --disable-pip-version-check --no-index \
        --find-links "$wheels" "${packages[@]}" >&2 || {
        printf 'error: --wheels %s: pip cannot install what pyproject.toml names from it\n' \
            "$wheels" >&2
        exit 2
    }
}

python=""
if [[ -n $wheels ]]; then
    over_wheels
else
    for candidate in .venv/bin/python "${PYTHON:-}" python3; do
        if [[ -n $candidate ]] && has_all "$candidate"; then
            python=$(command -v "$candidate")
            break
        fi
    done
    if [[ -z $python ]]; then
        # shellcheck source=scripts/environment.sh
        source "$root/scripts/environment.sh"
        prepare_environment "$root"
        python=python
    fi
fi

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m tests.gpu "${arguments[@]+"${arguments[@]}"}"
