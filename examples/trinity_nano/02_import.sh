#!/usr/bin/env bash
# Makes a checkpoint to go on from out of the released weights. A run from nothing leaves it out.
#
#     HF=arcee-ai/Trinity-Nano-Base IMPORTED=runs/nano-base bash examples/trinity_nano/02_import.sh
#
# HF is a directory or a model of the Hub. Training goes on from it with
# `bash examples/trinity_nano/03_pretrain_node.sh --pretrained-checkpoint runs/nano-base`.
# DRY_RUN=1 prints the command and does nothing else.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/tool.sh
source scripts/tool.sh

run_tool tools/import_hf.py --hf "${HF:-arcee-ai/Trinity-Nano-Base}" --save "${IMPORTED:-runs/nano-base}" "$@"
