#!/usr/bin/env bash
# Starts training: torchrun on this node, or with srun on each node of a Slurm job.
#
#     bash scripts/launch.sh pretrain_trinity.py --preset nano ... --save runs/nano/checkpoints
#
# What was run is kept in SAVE/launches/N: the command, the settings, the state of git, the versions
# of packages, and a log of each node. A run that has failed is started again where that can help,
# by this script or, within Slurm, by scripts/slurm.sh (which see). This script ends with the code of
# the trainer's last start (docs/faults.md), not with torchrun's 1; 75 asks the caller to start again.
# Signals are passed on.
#
#     NODES=1            nodes that train
#     GPUS_PER_NODE=8    ranks on each of them
#     NODE_RANK, MASTER_ADDR, MASTER_PORT    of several nodes without Slurm: on each, by hand
#     RESTARTS=3         starts in a row that may come to nothing: without a newer checkpoint
#     EXIT_WITHIN=110    seconds that a run has to save and leave when it is told to stop
#     CONTAINER, MOUNTS  see scripts/container.sh
#     DRY_RUN=1          print the command, and do nothing else
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
# shellcheck source=scripts/container.sh
source "$root/scripts/container.sh"
# shellcheck source=scripts/outcome.sh
source "$root/scripts/outcome.sh"

NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
RESTARTS=${RESTARTS:-3}
EXIT_WITHIN=${EXIT_WITHIN:-110}

# A slow collective is the hang alarm's to judge, which writes down what each rank waits for; NCCL
# keeps its last 2,000 collectives for it, at no cost that can be seen.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
# A collective that fails on one rank ends the others with an error, in place of a kernel that waits
# for ever. It is torch's default, and here so that no image turns it off unseen.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Lines of NCCL are about what is wrong: a link, a version, a plugin that is not found.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Sequences differ in how many tokens an expert gets, so allocations differ from step to step;
# segments that grow leave no holes.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# Ranks are numbered as nvidia-smi numbers GPUs, which is what a message about hardware names.
export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}
# A rank is one process of many on its node: threads of its own would fight with the others'.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE stays as it is: torchrun's store outlives rank 0, whose death
# the others hear of by it; in a store of rank 0 they would not.
# CUDA_DEVICE_MAX_CONNECTIONS and NCCL_ALGO are the trainer's: it knows the layout and the device.

# The last --save among the arguments, as the trainer reads it.
save_of() {
    local save="" before=""
    local word
    for word in "$@"; do
        if [[ $before == --save ]]; then save=$word; fi
        if [[ $word == --save=* ]]; then save=${word#--save=}; fi
        before=$word
    done
    printf '%s' "$save"
}

# Sets `command`: what one start runs. $1 is the prefix of the logs.
compose() {
    local logs=$1
    shift
    local torchrun=(
        torchrun --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE"
        # A restart within the job would keep a node that is bad; this script starts again.
        --max-restarts 0
        # By a signal not listed torchrun dies at once; ranks have longer than its 30 seconds.
        --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
        --shutdown-timeout "$((EXIT_WITHIN + 10))"
    )
    # The first word of the trainer is its program; the time is said ahead of the user's flags.
    local trainer=("$1" --exit-within "$EXIT_WITHIN" "${@:2}")
    command=()
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        local nodes=${TRAIN_NODES:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)}
        local head=${nodes%%,*}
        torchrun+=(
            --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
            # Jobs that share a node do not share a port.
            --rdzv-endpoint "$head:$((29400 + SLURM_JOB_ID % 10000))"
        )
        command=(
            srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 --nodelist "$nodes"
            # A node that fails is told to the others by the trainer, whose words are then known;
            # what has not ended by itself after that is ended.
            --kill-on-bad-exit=0 --wait "$((EXIT_WITHIN + 60))"
        )
        # Since Slurm 22.05 srun does not take it from the job.
        if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
            command+=(--cpus-per-task "$SLURM_CPUS_PER_TASK")
        fi
    elif ((NODES > 1)); then
        torchrun+=(
            --node-rank "${NODE_RANK:?the number of this node}"
            --master-addr "${MASTER_ADDR:?the first node}" --master-port "${MASTER_PORT:-29500}"
        )
    else
        torchrun+=(--standalone)
    fi
    container_words # sets `container`
    command+=("${container[@]}" bash "$root/scripts/node.sh" "$logs" "${torchrun[@]}" "${trainer[@]}")
}

# What this start runs, and on what, into the directory $1.
keep() {
    local words
    printf -v words '%q ' "${command[@]}"
    printf '#!/usr/bin/env bash\ncd %q\n%s\n' "$root" "$words" >"$1/command.sh"
    # A list of what may be told: names that hold secrets are not known beforehand.
    env -0 | grep -zE '^(NCCL|CUDA|NVIDIA|SLURM|TORCH|TORCHELASTIC|PYTORCH|OMP|NVTE|GLOO|UCX|MASTER)_' |
        grep -zviE '^[^=]*(TOKEN|SECRET|PASSW|KEY|JWT|CREDENTIAL)' | sort -z |
        tr '\0' '\n' >"$1/environment.txt" || true
    if git rev-parse HEAD >"$1/git.txt" 2>/dev/null; then
        git status --short >>"$1/git.txt"
        git diff HEAD >"$1/git.diff"
    else
        echo "no git checkout" >"$1/git.txt"
    fi
}

told="" child=""
pass_on() {
    told=$1
    if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}

# Runs `command` with its logs in the directory $1; sets `code`.
run_once() {
    # In a session of its own, so that a Ctrl-C comes to it once, from this script.
    setsid "${command[@]}" </dev/null &
    child=$!
    # What the first node says is for who reads this; the files are of all.
    touch "$1/node-0.log"
    (trap '' INT TERM USR1 HUP && exec tail -n +1 -f --pid "$child" "$1/node-${NODE_RANK:-0}.log") &
    local tail=$!
    if [[ -n $told ]]; then pass_on "$told"; fi
    while true; do
        code=0
        wait "$child" || code=$?
        if ! kill -0 "$child" 2>/dev/null; then break; fi # else a signal has ended the wait
    done
    while kill -0 "$tail" 2>/dev/null; do wait "$tail" || true; done
    child=""
}

save=$(save_of "$@")
if [[ -n ${DRY_RUN:-} ]]; then
    compose "${save:-.}/launches/0" "$@"
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
if [[ -z $save ]]; then
    echo "error: scripts/launch.sh: give --save DIR, where what is run is kept beside it" >&2
    exit 2
fi
for name in INT TERM USR1 HUP; do
    # shellcheck disable=SC2064 # the name of now
    trap "pass_on $name" "$name"
done

while true; do
    mkdir -p "$save/launches"
    number=$(find "$save/launches" -maxdepth 1 -name '[0-9]*' | wc -l)
    kept=$save/launches/$number
    mkdir -p "$kept"
    compose "$kept" "$@"
    keep "$kept"
    newest_before=$(newest_saved "$save")
    # torchrun ends with 1 whatever it was, and names no codes where it was told to stop.
    export MEGATRON_TRINITY_CODE_FILE=$kept/exit-code
    run_once "$kept"
    verdict=$(verdict_of "$told" "$code" "$kept"/node-*.log)
    printf '%s\n' "$verdict" >"$kept/outcome.txt"
    printf 'launch %s: %s\n' "$number" "$verdict" >&2
    case $verdict in
    done*) exit 0 ;;
    stop*) exit "$(code_of "$kept/exit-code" "$code")" ;;
    esac
    # Of nodes that were started by hand, each would count, and none would wait for the others.
    if [[ -z ${SLURM_JOB_ID:-} ]] && ((NODES > 1)); then
        exit "$(code_of "$kept/exit-code" "$code")"
    fi
    spend_restart "$save" "$newest_before" "$RESTARTS" || exit 1
    if [[ -n ${SLURM_JOB_ID:-} ]]; then exit 75; fi
done
