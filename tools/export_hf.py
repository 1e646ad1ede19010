#!/usr/bin/env python3
"""Write an AfMoE directory of Hugging Face from a Megatron checkpoint."""

from argparse import Namespace
from pathlib import Path

from megatron_trinity.command_line.conversion import (
    add_nonfinite_argument,
    add_resource_arguments,
    memory_and_workers,
    print_written,
    start_conversion,
)
from megatron_trinity.command_line.parser import command_parser, require_parent
from megatron_trinity.errors import TrinityError, UsageError, run_command

EXAMPLE = """example:
  python tools/export_hf.py --load runs/quickstart/checkpoints --hf runs/quickstart/hf --verify
"""


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint, of any layout")
    parser.add_argument("--hf", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="dtype of matrices (default: as trained)"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer (default: the run's own)")
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, help="size of a weights file (default: %(default)s)"
    )
    parser.add_argument(
        "--experts",
        choices=["per-expert", "fused"],
        default="per-expert",
        help="three matrices an expert, or stacks of all (default: %(default)s)",
    )
    add_resource_arguments(parser)
    add_nonfinite_argument(parser, "write")
    parser.add_argument(
        "--fp8",
        choices=["block", "compressed-tensors"],
        help="matrices of attention, MLPs and experts in e4m3, with a scale for each block of "
        "128 x 128, or for each row in the form of the compressed-tensors library",
    )
    parser.add_argument(
        "--fp8-report",
        type=Path,
        metavar="FILE",
        help="write the relative error of each matrix in FP8, as JSON",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the directory")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare logits of the directory, with transformers, and of the checkpoint, in fp32; "
        "a directory that is there already is compared and not written",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="to compare with, repeatable"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest difference of two logits that passes (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.prompt and not args.verify:
        raise UsageError("--prompt goes with --verify")
    if args.fp8 and args.verify:
        raise UsageError("--verify compares weights as they are, not in FP8: leave one out")
    if args.fp8_report and not args.fp8:
        raise UsageError("--fp8-report goes with --fp8")
    require_parent("--fp8-report", args.fp8_report)
    start_conversion()

    if args.verify and args.hf.exists() and not args.overwrite:
        print(f"{args.hf} is there already and is not written")
    else:
        export(args)
    if args.verify:
        verify(args)


def export(args: Namespace) -> None:
    from transformers import AfmoeConfig

    from megatron_trinity.checkpoint.hf.export_hf import export_hf
    from megatron_trinity.checkpoint.hf.files import write_json
    from megatron_trinity.checkpoint.hf.readers import not_expressed
    from megatron_trinity.progress import progress_for_terminal

    memory, workers = memory_and_workers(args.memory_gb, args.workers)
    done = export_hf(
        args.load,
        args.hf,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        experts=args.experts,
        shard_bytes=int(args.shard_gb * 1e9),
        memory_bytes=memory,
        workers=workers,
        allow_nonfinite=args.allow_nonfinite,
        overwrite=args.overwrite,
        fp8=args.fp8,
        show=progress_for_terminal,
    )
    print_written(args.hf, done.written, done.nonfinite)
    for line in not_expressed(AfmoeConfig.from_pretrained(args.hf), args.experts):
        print(f"note: {line}")
    errors = done.fp8_errors
    if errors:
        worst = max(errors, key=errors.__getitem__)
        print(
            f"relative error of {len(errors)} matrices in FP8: mean "
            f"{sum(errors.values()) / len(errors):.2%}, largest {errors[worst]:.2%} ({worst})"
        )
    if args.fp8_report:
        write_json(args.fp8_report, errors)


def verify(args: Namespace) -> None:
    from megatron_trinity.checkpoint.hf.verify import verify_export

    found = verify_export(args.load, args.hf, args.prompt)
    print(
        f"{found.tokens} tokens: the largest difference of two logits is {found.difference:.2e}, "
        f"the likeliest token is the same for {found.same_top:.1%}"
    )
    if not found.difference <= args.tolerance:
        raise TrinityError(
            f"{args.hf} and {args.load} differ by {found.difference:.2e}, more than --tolerance "
            f"{args.tolerance:g}"
        )


if __name__ == "__main__":
    run_command(main)
