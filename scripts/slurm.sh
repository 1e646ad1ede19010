#!/usr/bin/env bash
# What the sbatch files of examples/ run: a step of training as a job that comes back by itself.
#
#     bash scripts/slurm.sh examples/trinity_nano/03_pretrain_node.sh [flags of the trainer]
#
# Nodes are checked first (tools/check_node.py), NODES of those that pass train, and the others
# are spare. The early signal, `#SBATCH --signal=B:USR1@300`, comes to this script, which passes it
# on: training saves and leaves, and the job is requeued. So it is where a start has failed, as
# often as scripts/launch.sh allows. In an array, the task's number is the seed, and each has a run
# of its own: RUN/seed-N.
#
#     CHECK="..."   flags of tools/check_node.py; CHECK=no leaves the check out
#     and those of scripts/launch.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
# shellcheck source=scripts/container.sh
source "$root/scripts/container.sh"
# shellcheck source=scripts/outcome.sh
source "$root/scripts/outcome.sh"

export NODES=${NODES:-1} RUN=${RUN:?the directory of the run}
CHECK=${CHECK---require-gpu}
step=$1
shift
flags=("$@")

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    RUN=$RUN/seed-$SLURM_ARRAY_TASK_ID
    flags+=(--seed "$SLURM_ARRAY_TASK_ID")
fi
if [[ -n ${DRY_RUN:-} ]]; then
    # As on nodes of these names, where there is no job.
    export SLURM_JOB_ID=${SLURM_JOB_ID:-0}
    if [[ -z ${SLURM_JOB_NODELIST:-} ]]; then
        TRAIN_NODES=$(seq -s, -f 'node%g' "$NODES")
        export TRAIN_NODES
    fi
    exec bash "$step" "${flags[@]}"
fi

told="" child=""
# shellcheck disable=SC2329 # called by traps
on_signal() {
    told=$1
    if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

# Runs the arguments in the background, where a signal is heard at once; sets `code`.
run() {
    "$@" &
    child=$!
    while true; do
        code=0
        wait "$child" || code=$?
        if ! kill -0 "$child" 2>/dev/null; then break; fi
    done
    child=""
}

requeue() {
    echo "slurm: requeued, $1"
    scontrol requeue "$SLURM_JOB_ID" # of an array, this task alone
    # Slurm ends this script; it does not run on into whatever follows.
    exit 0
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [[ $CHECK != no ]]; then
    checks=$RUN/health/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    mkdir -p "$checks"
    container_words
    read -ra check_flags <<<"$CHECK"
    # A node that does not answer has no file, and has not passed.
    run srun --nodes "${#nodes[@]}" --ntasks "${#nodes[@]}" --ntasks-per-node 1 --kill-on-bad-exit=0 \
        "${container[@]}" bash "$root/scripts/check.sh" "$checks" "${check_flags[@]}"
    if [[ $told == TERM ]]; then exit 143; fi
    good=() bad=()
    for node in "${nodes[@]}"; do
        if [[ $(cat "$checks/$node.code" 2>/dev/null) == 0 ]]; then
            good+=("$node")
        else
            bad+=("$node")
            sed -n 's/^bad/'"$node"'/p; s/^error/'"$node"'/p' "$checks/$node.txt" 2>/dev/null || true
        fi
    done
    if ((${#bad[@]})); then echo "slurm: left out: ${bad[*]}; see $checks"; fi
    nodes=("${good[@]}")
fi
if [[ -n $told ]]; then requeue "the time limit came before training"; fi
if ((${#nodes[@]} < NODES)); then
    # On other nodes it may go: Slurm gives a requeued job what is free then.
    mkdir -p "$RUN/checkpoints/launches"
    newest=$(newest_saved "$RUN/checkpoints")
    echo "error: ${#nodes[@]} nodes pass the check, and $NODES are needed" >&2
    spend_restart "$RUN/checkpoints" "$newest" "${RESTARTS:-3}" || exit 1
    requeue "too few nodes"
fi
nodes=("${nodes[@]:0:NODES}")
TRAIN_NODES=$(IFS=, && echo "${nodes[*]}")
export TRAIN_NODES

run bash "$step" "${flags[@]}"
if ((code == 75)); then requeue "to go on from iteration $(newest_saved "$RUN/checkpoints")"; fi
exit "$code"
