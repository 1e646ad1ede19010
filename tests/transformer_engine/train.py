"""The trainer over the emulation, as a program: `python -m tests.transformer_engine.train FLAGS`.

One rank; `TRINITY_TEST_TE_PACKAGES` names the folder of Transformer Engine's packages.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    from tests.transformer_engine.worker import load_emulated

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    load_emulated()
    from megatron_trinity.training.pretrain import pretrain

    pretrain(sys.argv[1:])


if __name__ == "__main__":
    main()
