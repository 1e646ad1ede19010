# shellcheck shell=bash
# What comes after a start of training that has ended. To be sourced.
# The codes are those of megatron_trinity/exits.py; docs/slurm.md has the table.

# What one code of a rank asks for: `again` or `stop`. A rank that a signal killed has it negative.
verdict_of_code() {
    case $1 in
    0) echo "done" ;;
    # Wrong usage, and a step whose result must not be applied: the next start would end alike.
    2 | 3) echo never ;;
    # A person (or scancel) has ended it; its output is read no longer.
    130 | 143 | 141) echo stop ;;
    # A failure, a hang, a rewind, out of time, too late, a lost rank or launcher, an early signal.
    1 | 4 | 5 | 6 | 7 | 8 | 9 | 138) echo again ;;
    # Signals: of a rank that was killed, or that crashed.
    -*) echo again ;;
    # --exit-signal's, and what is not known.
    *) echo stop ;;
    esac
}

# verdict_of TOLD CODE LOG...: one line, which begins with `done`, `again` or `stop`. TOLD is the
# signal that the launcher has passed on, CODE its command's; what ranks ended with is in the logs,
# since torchrun itself ends with 1 whatever it was.
verdict_of() {
    local told=$1 code=$2 rank verdict found="" codes
    shift 2
    if ((code == 0)); then
        echo "done"
        return
    fi
    codes=$(grep -ohE '^ *exitcode +: -?[0-9]+' "$@" 2>/dev/null | grep -oE -- '-?[0-9]+$' |
        sort -n | uniq | paste -sd' ' || true)
    for rank in $codes; do
        verdict=$(verdict_of_code "$rank")
        if [[ $verdict == never ]]; then
            echo "stop: ranks ended with ${codes}, and the next start would too"
            return
        fi
        if [[ $found != again ]]; then found=$verdict; fi
    done
    case $told in
    USR1)
        # The time limit comes; without a scheduler it is a person who said so.
        if [[ -n ${SLURM_JOB_ID:-} ]]; then echo "again: the time limit"; else echo "stop: SIGUSR1"; fi
        return
        ;;
    ?*)
        echo "stop: SIG$told"
        return
        ;;
    esac
    if [[ -z $codes ]]; then
        echo "again: the launcher ended with $code"
    else
        echo "$found: ranks ended with $codes"
    fi
}

# code_of FILE CODE: what rank 0 has ended with, as it says in FILE; CODE where it says nothing, or
# has ended well.
code_of() {
    local code=""
    if [[ -r $1 ]]; then code=$(<"$1"); fi
    if [[ $code =~ ^[1-9][0-9]*$ ]]; then printf '%s' "$code"; else printf '%s' "$2"; fi
}

# The newest iteration in the directory $1 that is saved; 0 if none is.
newest_saved() {
    local newest=0
    if [[ -r $1/latest_checkpointed_iteration.txt ]]; then
        newest=$(<"$1/latest_checkpointed_iteration.txt")
    fi
    printf '%s' "$newest"
}

# spend_restart SAVE BEFORE LIMIT: count a restart behind a start that found BEFORE as its newest
# checkpoint; false, with one line, where LIMIT in a row have come to nothing.
spend_restart() {
    local save=$1 before=$2 limit=$3 spent=0 newest
    newest=$(newest_saved "$save")
    if [[ $newest == "$before" ]]; then
        if [[ -r $save/launches/restarts ]]; then spent=$(<"$save/launches/restarts"); fi
        spent=$((spent + 1))
    fi
    if ((spent > limit)); then
        # The next one is a person's, who has looked into it, and has the whole budget.
        rm -f "$save/launches/restarts"
        echo "error: $limit restarts in a row have come to no checkpoint behind iteration $newest;" \
            "the logs are in $save/launches; set RESTARTS for more" >&2
        return 1
    fi
    printf '%s\n' "$spent" >"$save/launches/restarts"
}
