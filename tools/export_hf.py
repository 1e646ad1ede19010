#!/usr/bin/env python3
"""Write an AfMoE directory of Hugging Face from a Megatron checkpoint."""

import argparse
from pathlib import Path

from megatron_trinity.errors import run_command

EXAMPLE = """example:
  python tools/export_hf.py --load runs/quickstart/checkpoints --hf runs/quickstart/hf
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoint, of any layout")
    parser.add_argument("--hf", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="dtype of matrices (default: as trained)"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer (default: the run's own)")
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, help="size of a weights file (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the directory")
    args = parser.parse_args()

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    from megatron_trinity.checkpoint.hf_export import export_hf

    written = export_hf(
        args.load,
        args.hf,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        shard_bytes=int(args.shard_gb * 1e9),
        overwrite=args.overwrite,
    )
    print(f"wrote {args.hf}: {written / 1e6:,.1f} MB of weights")


if __name__ == "__main__":
    run_command(main)
