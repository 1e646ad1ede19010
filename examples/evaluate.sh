#!/usr/bin/env bash
# Evaluates a model of Hugging Face, as tools/export_hf.py writes one, with lm-eval.
#
#     HF=runs/quickstart/hf bash examples/evaluate.sh               two local tasks, no network
#     HF=models/nano TASKS=report bash examples/evaluate.sh         the report's list, from the Hub
#     HF=models/nano TASKS=arc_easy,piqa bash examples/evaluate.sh  tasks of lm-eval by their names
#
# Flags behind the command go to lm-eval: `--limit 100`, `--device cuda`, `--batch_size 16`. The first
# run makes .venv-clients. OUT is where results and samples go.
#
#     HF       the directory; needed
#     OUT      default HF/../evaluation
#     PREFIX   the token ahead of a text (default: the tokenizer's eos, as training has it)
#     DRY_RUN=1 prints the commands of lm-eval and does nothing else
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
HF=${HF:?a directory that tools/export_hf.py has written}
OUT=${OUT:-$(dirname "$HF")/evaluation}
TASKS=${TASKS:-local}
python=$root/.venv-clients/bin/python

if [[ -z ${DRY_RUN:-} ]]; then
    # shellcheck source=scripts/environment.sh
    source "$root/scripts/environment.sh"
    prepare_clients "$root"
    PREFIX=${PREFIX:-$("$python" -c '
import sys
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained(sys.argv[1]).eos_token_id)' "$HF")}
fi

# lm_eval TASKS [FLAGS...]
lm_eval() {
    local command=(
        "$python" -m lm_eval run --model hf
        --model_args "pretrained=$HF,dtype=auto,prefix_token_id=${PREFIX:-EOS}"
        --tasks "$1" --batch_size 1 --output_path "$OUT" --log_samples "${@:2}"
    )
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}"
    fi
}

case $TASKS in
local)
    if [[ -z ${DRY_RUN:-} ]]; then
        PYTHONPATH=$root "$python" "$root/examples/evaluation/make_tasks.py" --output "$OUT/tasks"
    fi
    HF_DATASETS_OFFLINE=1 lm_eval stdlib_text,stdlib_next_line --include_path "$OUT/tasks" "$@"
    ;;
report)
    # As many examples ahead of a question as the report says; where it does not, lm-eval's own.
    lm_eval hellaswag,winogrande,mmlu,mmlu_pro,triviaqa,gpqa_diamond_n_shot --num_fewshot 5 "$@"
    lm_eval arc_challenge --num_fewshot 0 "$@"
    lm_eval bbh,minerva_math500 "$@"
    # It runs what the model writes: on a machine where that may happen.
    if [[ ${HF_ALLOW_CODE_EVAL:-} == 1 ]]; then lm_eval mbpp_plus --confirm_run_unsafe_code "$@"; fi
    ;;
*) lm_eval "$TASKS" "$@" ;;
esac
