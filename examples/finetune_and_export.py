"""Load a GPT-2 checkpoint, generate, finetune with LoRA on ten records, and export the result.

python examples/finetune_and_export.py CHECKPOINT OUT

CHECKPOINT is a directory in Hugging Face's format (config.json, model.safetensors) with its tokenizer (tokenizer.json,
or vocab.json and merges.txt). Needs `pip install .` only: no pipeline, no network.
"""

import sys
from pathlib import Path

import tiktoken

from gpt2core.checkpoint import export_peft, load_pretrained, save_adapter, save_pretrained
from gpt2core.config import GenerationConfig, LoraConfig, TrainConfig
from gpt2core.data import encode_records
from gpt2core.engine import Engine
from gpt2core.lora import add_lora, merge_lora
from gpt2core.model import GPT2
from gpt2core.prompt import format_prompt, parse_reply
from gpt2core.tokenizer import load_tokenizer
from gpt2core.train import finetune

WORDS = ["river", "stone", "light", "bread", "green", "house", "table", "cloud", "water", "music"]
RECORDS = [{"instruction": "Write this word in capital letters.", "input": w, "output": w.upper()} for w in WORDS]


def main(checkpoint: Path, out: Path) -> None:
    model = load_pretrained(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    print(f"before finetuning: {answer(model, tokenizer, 'river')!r}")

    add_lora(model, LoraConfig(rank=8, targets=("q", "v")), seed=0)
    examples = encode_records(RECORDS, tokenizer, model.config.n_positions)
    result = finetune(model, examples, [], TrainConfig(epochs=10, batch_size=5, learning_rate=4e-3))
    losses = [entry["train/loss"] for entry in result.history if "train/loss" in entry]
    print(f"training loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
    print(f"after finetuning: {answer(model, tokenizer, 'river')!r}")

    save_adapter(model, out / "adapter")  # a few MB; load_adapter reads it back
    export_peft(model, out / "peft")  # for peft.PeftModel.from_pretrained
    save_pretrained(merge_lora(model), out / "merged")  # for transformers.GPT2LMHeadModel.from_pretrained
    print(f"exported to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def answer(model: GPT2, tokenizer: tiktoken.Encoding, word: str) -> str:
    """The model's greedy answer to the instruction of the records."""
    prompt = tokenizer.encode_ordinary(format_prompt(RECORDS[0]["instruction"], word))
    with Engine(model, weights="fp32") as engine:  # many requests could be submitted at the same time
        request = engine.submit(prompt, GenerationConfig(max_new_tokens=16, eos_id=tokenizer.eot_token))
        return parse_reply(tokenizer.decode(request.result(timeout=300)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
