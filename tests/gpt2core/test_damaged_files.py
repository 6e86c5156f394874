"""Any JSON value in a file of a checkpoint, tokenizer or adapter is accepted, or refused with the file's name."""

import hashlib
import json
import random
import resource
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

from gpt2core.adapter_files import read_adapter
from gpt2core.checkpoint import export_peft, load_pretrained, save_adapter
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

    def load_adapter(directory):
        read_adapter(directory, model.config, base_sha256="a")

    return {
        "config.json": (tiny_gpt2_dir, load_pretrained),
        "generation_config.json": (tiny_gpt2_dir, load_pretrained),
        "adapter.json": (root / "adapter", load_adapter),
        "adapter_config.json": (root / "peft", load_adapter),
        "tokenizer.json": (root / "tokenizer", load_tokenizer),
        "vocab.json": (tokenizer_dir, load_tokenizer),
        "merges.txt": (tokenizer_dir, load_tokenizer),
        "model.safetensors": (tiny_gpt2_dir, load_pretrained),
        "adapter.safetensors": (root / "adapter", load_adapter),
        "adapter_model.safetensors": (root / "peft", load_adapter),
    }


@settings(max_examples=150)
@given(st.data())
def test_any_value_is_accepted_or_refused_with_the_name_of_its_directory(directories, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(name for name in directories if name.endswith(".json"))))
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


@pytest.mark.parametrize(
    ("name", "count"),
    [("model.safetensors", 600), ("adapter.safetensors", 200), ("adapter_model.safetensors", 200)]
    + [(name, 100) for name in ("config.json", "adapter.json", "adapter_config.json", "tokenizer.json", "merges.txt")],
)
def test_damaged_bytes_are_accepted_or_refused_with_the_name_of_their_directory(directories, tmp_path, name, count):
    original, load = directories[name]
    directory, rng, refused = shutil.copytree(original, tmp_path / "damaged"), random.Random(0), 0
    content = (directory / name).read_bytes()
    # the header of a safetensors file: its length in 8 bytes, then that many bytes of JSON
    damageable = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else len(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        damaged = _damage(content, damageable, rng)
        (directory / name).write_bytes(damaged)
        if name == "adapter.safetensors":  # otherwise the digest beside it refuses every change
            description = json.loads((original / "adapter.json").read_text())
            description["sha256"] = hashlib.sha256(damaged).hexdigest()
            (directory / "adapter.json").write_text(json.dumps(description))
        message = None
        try:
            load(directory)
        except (ValueError, OSError) as error:
            refused, message = refused + 1, str(error)
        assert message is None or str(directory) in message
    assert refused > count / 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB; the files have less than 1 MB


def _damage(content: bytes, end: int, rng: random.Random) -> bytes:
    """The content with one to four changes in its first `end` bytes, or cut."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, kind = rng.randrange(end), rng.randrange(6)
        if kind == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[place] = rng.choice(b'0123456789-"{}[],:\x00\xff')
        elif kind == 2:
            del damaged[place : place + rng.randint(1, 20)]
        elif kind == 3:
            damaged[place:place] = damaged[max(0, place - 20) : place] or b"9"
        elif kind == 4:
            damaged[place:place] = rng.choice([b"9" * 30, b"1e400", b"NaN", b"-1", b"[" * 2000, b'"F64"', b"null"])
        else:
            del damaged[rng.randrange(len(damaged)) :]
        end = max(1, min(end, len(damaged)))
        if not damaged:
            break
    return bytes(damaged)
