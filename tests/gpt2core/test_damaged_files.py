"""Any JSON value in a file of a checkpoint, tokenizer or adapter is accepted, or refused with the file's name."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

from gpt2core.checkpoint import export_peft, load_adapter, load_pretrained, save_adapter
from gpt2core.config import LoraConfig
from gpt2core.lora import add_lora
from gpt2core.tokenizer import load_tokenizer

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 3.0, 10**9, 2**40, 2**70, float("nan"), float("inf")]),
    st.text(max_size=3),
    st.sampled_from([[], [[]], {}, {"a": 1}, ["q", "q"], [1]]),
)


@pytest.fixture(scope="module")
def directories(tiny_gpt2_dir, tokenizer_dir, tmp_path_factory):
    """File name -> (directory that has it, function that loads the directory)."""
    root = tmp_path_factory.mktemp("files")
    model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=2))
    save_adapter(model, root / "adapter", base={"name": "tiny", "sha256": "a"})
    export_peft(model, root / "peft")
    GPT2TokenizerFast.from_pretrained(str(tokenizer_dir)).save_pretrained(root / "tokenizer")

    def load_into_the_model(directory):
        load_adapter(load_pretrained(tiny_gpt2_dir), directory, base_sha256="a")

    return {
        "config.json": (tiny_gpt2_dir, load_pretrained),
        "generation_config.json": (tiny_gpt2_dir, load_pretrained),
        "adapter.json": (root / "adapter", load_into_the_model),
        "adapter_config.json": (root / "peft", load_into_the_model),
        "tokenizer.json": (root / "tokenizer", load_tokenizer),
        "vocab.json": (tokenizer_dir, load_tokenizer),
    }


@settings(max_examples=150)
@given(st.data())
def test_any_value_is_accepted_or_refused_with_the_name_of_its_directory(directories, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(directories)))
    original, load = directories[name]
    directory = shutil.copytree(original, tmp_path_factory.mktemp("damaged"), dirs_exist_ok=True)
    content = json.loads((directory / name).read_text(encoding="utf-8"))
    place = content
    while isinstance(place[key := data.draw(st.sampled_from(sorted(place)))], dict) and data.draw(st.booleans()):
        if not place[key]:
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    (directory / name).write_text(json.dumps(content), encoding="utf-8")
    message = None
    try:
        load(directory)
    except ValueError as error:
        message = str(error)
    assert message is None or str(directory) in message
