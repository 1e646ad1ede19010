"""What the scripts of kills are told."""

from __future__ import annotations

import argparse
import random


def options_parser(about: str | None) -> argparse.ArgumentParser:
    """`--kills N --seed N`; `about` is what the script does."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    return parser
