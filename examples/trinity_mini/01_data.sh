#!/usr/bin/env bash
# Makes the data of a run out of documents: DATA_train, DATA_valid and what is told about them.
#
#     SOURCE=documents TOKENIZER=data/tokenizer DATA=data/mine bash examples/trinity_mini/01_data.sh
#
# SOURCE is a directory or a file of documents, TOKENIZER a Hugging Face tokenizer's directory, as
# that of a Trinity model. Flags behind the command go to tools/prepare_data.py. DRY_RUN=1 prints
# the command and does nothing else.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/tool.sh
source scripts/tool.sh

INPUT=(--source "${SOURCE:-documents}" --tokenizer "${TOKENIZER:-data/tokenizer}")
OUTPUT=(--output "${DATA:-data/mine}")
run_tool tools/prepare_data.py "${INPUT[@]}" "${OUTPUT[@]}" "$@"
