#!/usr/bin/env bash
# The check of one node of a job:   bash scripts/check.sh DIRECTORY [flags of tools/check_node.py]
# Leaves NODE.txt, what it found, and NODE.code in DIRECTORY.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
out=$1/${SLURMD_NODENAME:-$(hostname)}
shift
if ! command -v torchrun >/dev/null; then PATH=$root/.venv/bin:$PATH; fi
# A GPU that hangs must not hold the job: what takes longer has failed.
timeout --kill-after 10 "${CHECK_SECONDS:-180}" python "$root/tools/check_node.py" "$@" >"$out.txt" 2>&1
code=$?
printf '%s\n' "$code" >"$out.code"
exit "$code"
