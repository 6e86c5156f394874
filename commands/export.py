"""`python run.py export`: the model of a finished run in the formats of other programs."""

import json
import logging
from pathlib import Path
from shutil import copy2
from tempfile import TemporaryDirectory
from typing import NamedTuple

from commands.finished_run import FinishedRun, open_run
from gpt2core.checkpoint import GENERATION_CONFIG, export_peft, save_pretrained
from gpt2core.files import json_bytes, list_files, naming_file, read_json, write_files
from gpt2core.lora import lora_config
from gpt2core.model import GPT2, drop_padding_rows_
from gpt2core.prompt import chat_template
from gpt2core.tensors import DTYPES
from gpt2core.tokenizer import END_OF_TEXT, MERGES, TOKENIZER, TOKENIZER_CONFIG, VOCAB, read_padding_token
from gpt2core.types import Evaluation, Lineage, SplitSummary
from steps.adapters.gguf_file import write_gguf, write_gguf_adapter
from steps.adapters.model_card import CARD, evaluated_card

logger = logging.getLogger(__name__)
# Settings of the base's generation_config.json that its export keeps. Others, for example of sampling and penalties,
# give other answers than the greedy ones that the card's scores are about.
_KEPT_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens")


class _Format(NamedTuple):
    library: str  # the library that loads it; the hub shows it
    content: str  # for the model card
    merged_use: str = ""  # for the model card of a merged model


FORMATS = {
    "peft": _Format("peft", "The adapter in PEFT's format, for `AutoPeftModelForCausalLM.from_pretrained(DIRECTORY)`."),
    "hf": _Format(
        "transformers",
        "The base with the adapter merged into its weights, for transformers.",
        """```python
from transformers import pipeline

answer = pipeline("text-generation", "DIRECTORY")
messages = [{"role": "user", "content": "What is the antonym of hot?"}]
print(answer(messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

The tokenizer's chat template writes the prompt of the training, Alpaca's.""",
    ),
    "gguf": _Format(
        "",
        "For llama.cpp: `model.gguf` is the base with the adapter merged, `adapter.gguf` (not of a DoRA) the adapter.",
        "`llama-cli -m DIRECTORY/model.gguf`, or with a GGUF file of the base `llama-cli -m BASE.gguf --lora "
        "DIRECTORY/adapter.gguf`.\nThe chat template of `model.gguf` writes the prompt of the training, Alpaca's.",
    ),
}


def export(
    kind: str, out: Path, run: str, quantize: str = "f32", history: bool = False, dtype: str = "fp32"
) -> list[Path]:
    """Write the run's model into a new or empty directory; return the files.

    Args:
        kind: peft, hf or gguf.
        quantize: type of the matrices in a GGUF file: f32, f16 or q8_0.
        history: the chat template of hf and gguf uses earlier turns as the input.
        dtype: type of the weights of hf: fp32, fp16 or bf16.

    Raises:
        FileNotFoundError, HubError, ValueError: see `open_run`.
        ValueError: the directory is not empty, or the format cannot express the model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not an empty directory; choose a new one")
    finished = open_run(run)
    out.mkdir(parents=True, exist_ok=True)
    # within `out`, which may be a mounted disk: an export that fails leaves the directory empty
    with TemporaryDirectory(prefix=".incomplete-", dir=out) as directory:
        _write(finished, kind, Path(directory), quantize, history, dtype)
        for file in Path(directory).iterdir():
            file.rename(out / file.name)
    return [out / name for name in list_files(out)]


def _write(finished: FinishedRun, kind: str, out: Path, quantize: str, history: bool, dtype: str) -> None:
    card = _model_card(finished, kind)
    if kind == "peft":
        revision = finished.base.revision or None
        base = finished.base.name if revision else str(finished.base_dir.resolve())  # a preset is not on the hub
        export_peft(finished.load(merge=False), out, base, revision)
    elif kind == "hf":
        _write_hf(finished, out, history, dtype)
    else:
        file = out / "model.gguf"
        with naming_file(file):
            write_gguf(_load_merged(finished), finished.base_dir, file, quantize, history)
        adapter = finished.load(merge=False)
        if lora_config(adapter).dora:
            logger.warning("no adapter.gguf, because llama.cpp has no DoRA; model.gguf has the adapter merged")
        else:
            write_gguf_adapter(adapter, out / "adapter.gguf")
    write_files(out, {CARD: card.encode()})


def _write_hf(finished: FinishedRun, out: Path, history: bool, dtype: str) -> None:
    model = _load_merged(finished)
    save_pretrained(model, out, DTYPES[dtype])
    for name in (TOKENIZER, VOCAB, MERGES):
        if (finished.base_dir / name).is_file():
            copy2(finished.base_dir / name, out / name)
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model.config.n_positions,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "chat_template": chat_template(history),
    }
    padding = read_padding_token(finished.base_dir)
    if padding is not None:
        tokenizer_config["pad_token"] = padding[0]
    own = finished.base_dir / TOKENIZER_CONFIG
    if own.is_file() and (side := read_json(own).get("padding_side")) in ("left", "right"):
        tokenizer_config["padding_side"] = side
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    own_settings = json.loads(model.config.generation_config or "{}")
    kept = {key: value for key, value in own_settings.items() if key in _KEPT_SETTINGS}
    if not kept.keys() & {"max_length", "max_new_tokens"}:
        # transformers' defaults are 20 new tokens, and 256 in its pipeline, for which the context may be too short
        kept["max_length"] = model.config.n_positions
    settings = ids | kept | {"do_sample": False}
    write_files(out, {TOKENIZER_CONFIG: json_bytes(tokenizer_config), GENERATION_CONFIG: json_bytes(settings)})


def _load_merged(finished: FinishedRun) -> GPT2:
    """Load the merged model for programs that do not know the size of the tokenizer."""
    return drop_padding_rows_(finished.load(merge=True))


def _model_card(finished: FinishedRun, kind: str) -> str:
    directory = finished.directory
    lineage = Lineage.from_json_file(directory / "lineage.json")
    evaluation = Evaluation.from_json_file(directory / "metrics.json")
    split = SplitSummary.from_json_file(directory / "split.json")
    library, content, merged_use = FORMATS[kind]
    return evaluated_card(finished.adapter, lineage, evaluation, split.test, content, library, merged_use)
