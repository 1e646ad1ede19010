#!/usr/bin/env bash
# Environment, lint, types and tests that need no GPU and no client: bash tests/run.sh [pytest args]
# The same with every case of crosses, and long runs:                bash tests/run.sh --all
# Those with vLLM, in an environment of their own that they make:    bash tests/run.sh -m vllm
# Those with other clients, in one more:                             bash tests/run.sh -m clients
# Those with Transformer Engine's Python modules, in a small one:    bash tests/run.sh -m te
# Those with NVIDIA DALI, in one more:                               bash tests/run.sh -m dali
# The site of the guide, in one more:                                bash tests/run.sh -m docs
# Every check runs even when an earlier one failed; the exit code is the first failure's.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
prepare_environment "$root"
cd "$root"

# Ranks are processes: one thread each, or eight of them fight over a laptop's cores.
export OMP_NUM_THREADS=1

tests="not gpu and not vllm and not clients and not te and not dali and not docs and not slow"
if [[ ${1:-} == --all ]]; then
    tests="not gpu and not vllm and not clients and not te and not dali and not docs"
    shift
fi

# Half of the tests use one core alone. Each worker has ranks of its own, hence no more than four.
workers=$(env -u OMP_NUM_THREADS nproc) # which would answer with that number
if ((workers > 4)); then workers=4; fi

first_failure=0
failed=()

check() {
    local name=$1 code=0
    shift
    printf '== %s\n' "$name"
    "$@" || code=$?
    if ((code != 0)); then
        failed+=("$name")
        if ((first_failure == 0)); then first_failure=$code; fi
    fi
}

check "ruff check" python -m ruff check .
check "ruff format" python -m ruff format --check .
check "mypy" python -m mypy
check "shellcheck" shellcheck -x scripts/*.sh examples/*.sh examples/*/*.sh examples/*/*.sbatch tests/*.sh
# pytest keeps the last -m and -n, so one among the arguments replaces these (-n 0: no workers).
check "pytest" python -m pytest -m "$tests" -n "$workers" --dist loadfile --durations=10 "$@"

if ((first_failure != 0)); then
    printf 'failed: %s\n' "${failed[*]}" >&2
fi
exit "$first_failure"
