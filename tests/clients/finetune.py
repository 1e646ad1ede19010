"""In the environment of the clients: some steps of transformers' `Trainer`, with LoRA if asked.

    python finetune.py SOURCE TARGET full|lora

Saves the model, with LoRA merged into it, and prints the loss of each step as a JSON list.
"""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

TEXT = "the sky over the harbour was grey, and def mean(values): return sum(values)"
STEPS = 8
RANK = 2


def main(source: str, target: str, mode: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if mode == "lora":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=targets))
    ids = tokenizer(TEXT).input_ids
    arguments = TrainingArguments(
        output_dir=f"{target}-work",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2 if mode == "lora" else 1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 16)
    trainer.train()
    whole = model.merge_and_unload() if mode == "lora" else model
    whole.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))


if __name__ == "__main__":
    main(*sys.argv[1:])
