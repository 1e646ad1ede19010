#!/usr/bin/env bash
# What a start runs on each of its nodes:   bash scripts/node.sh DIRECTORY COMMAND [ARGUMENTS]
# The command's output goes to DIRECTORY/node-N.log; node 0 also writes versions to packages.txt.
set -euo pipefail

kept=$1
node=${SLURM_NODEID:-${NODE_RANK:-0}}
shift
# An environment that is active, or that of a container, is the user's choice.
if ! command -v torchrun >/dev/null; then
    PATH=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)/.venv/bin:$PATH
fi
mkdir -p "$kept"
if [[ $node == 0 ]]; then
    # Here and not beside the launcher, which may stand outside of the container.
    python -c '
import sys
from importlib.metadata import distributions
print("python==%d.%d.%d" % sys.version_info[:3])
for line in sorted({"%s==%s" % (d.metadata["Name"], d.version) for d in distributions()}):
    print(line)' >"$kept/packages.txt" || true
    # The driver is not a package, and results and faults depend on it.
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,vbios_version --format=csv \
            >"$kept/devices.txt" 2>&1 || true
    fi
fi
# Of this node by its name: a cluster's names for a node may differ from what it calls itself.
if [[ ${1##*/} == torchrun && -n ${SLURMD_NODENAME:-} ]]; then
    set -- "$1" --local-addr "$SLURMD_NODENAME" "${@:2}"
fi
exec "$@" >>"$kept/node-$node.log" 2>&1
