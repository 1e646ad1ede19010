#!/usr/bin/env bash
# Makes a checkpoint to go on from out of the released weights. A run from nothing leaves it out.
#
#     HF=arcee-ai/Trinity-Mini-Base IMPORTED=runs/mini-base bash examples/trinity_mini/02_import.sh
#
# HF is a directory or a model of the Hub. Training goes on from it with
# `bash examples/trinity_mini/03_pretrain_node.sh --pretrained-checkpoint runs/mini-base`.
# DRY_RUN=1 prints the command and does nothing else.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/tool.sh
source scripts/tool.sh

run_tool tools/import_hf.py --hf "${HF:-arcee-ai/Trinity-Mini-Base}" --save "${IMPORTED:-runs/mini-base}" "$@"
