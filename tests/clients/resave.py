"""In the environment of the clients: load a directory with transformers, and save it again.

python resave.py SOURCE TARGET
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: str, target: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(target, max_shard_size="300KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
