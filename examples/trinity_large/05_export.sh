#!/usr/bin/env bash
# Writes the newest checkpoint of a run as a model of Hugging Face.
#
#     RUN=runs/large HF=models/large bash examples/trinity_large/05_export.sh
#
# Flags behind the command go to tools/export_hf.py: `--verify` compares the logits of both.
# DRY_RUN=1 prints the command and does nothing else.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/tool.sh
source scripts/tool.sh

run_tool tools/export_hf.py --load "${RUN:-runs/large}/checkpoints" --hf "${HF:-models/large}" "$@"
