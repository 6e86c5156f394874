"""`python run.py export`: each format is read by its own library, and greedy tokens are compared."""

import errno
import json
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from shutil import copytree

import gguf
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from peft import AutoPeftModelForCausalLM, PeftModel
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from deploy.bento import describe_adapter
from gpt2core.checkpoint import load_adapter, load_pretrained, save_adapter, save_pretrained
from gpt2core.config import GenerationConfig, LoraConfig
from gpt2core.files import checkpoint_files, directory_sha256
from gpt2core.generate import generate
from gpt2core.lora import add_lora, merge_lora
from gpt2core.prompt import format_prompt
from gpt2core.records import read_records
from gpt2core.tokenizer import load_tokenizer, read_padding_token
from gpt2core.types import BaseRef, Evaluation, SplitPart, SplitSummary
from run import main
from steps.adapters.base import read_base, write_base
from steps.adapters.gguf_file import write_gguf, write_gguf_adapter
from tests.helpers import make_lineage, randomize_lora

PROMPT = format_prompt("Name a river.")


@pytest.fixture(autouse=True)
def outputs(tmp_path, base_dir, adapter_dir, monkeypatch):
    """A run on a base from a directory, of which outputs/ has the reference and a link."""
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    write_run(tmp_path / "latest", base_dir, adapter_dir)
    return tmp_path


def write_run(run, base_dir, adapter_dir):
    copytree(adapter_dir, run / "adapter")
    write_base(run, BaseRef(str(base_dir), "", directory_sha256(base_dir, checkpoint_files(base_dir))), {})
    (run / "base").symlink_to(base_dir)
    lineage = make_lineage(adapter=describe_adapter(adapter_dir))
    evaluation = Evaluation(lineage.metrics.base, lineage.metrics.tuned, {}, lineage.metrics.train)
    split = SplitSummary(*(SplitPart(sha256, 10) for sha256 in lineage.data.values()))
    for name, content in (("lineage", lineage), ("metrics", evaluation), ("split", split)):
        (run / f"{name}.json").write_text(json.dumps(content.to_json()))


def export(out, *options: str):
    done = CliRunner().invoke(main, ["export", "--out", str(out), "--format", *options])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def tuned(base_dir, adapter_dir):
    return load_adapter(load_pretrained(base_dir), adapter_dir)


@pytest.fixture(scope="module")
def prompt(base_dir):
    return load_tokenizer(base_dir).encode_ordinary(PROMPT)


@pytest.fixture(scope="module")
def expected(tuned, prompt):
    return generate(tuned, [prompt], GenerationConfig(max_new_tokens=12))[0]


def greedy(model, prompt) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def test_peft_reads_the_adapter(base_dir, tmp_path, prompt, expected):
    export(tmp_path / "out", "peft")
    hf = AutoModelForCausalLM.from_pretrained(base_dir)
    assert greedy(PeftModel.from_pretrained(hf, tmp_path / "out"), prompt) == expected


@pytest.mark.parametrize("source", ["preset", "directory"])
def test_peft_finds_the_base_by_the_code_of_the_card(outputs, base_dir, prompt, expected, source):
    run = outputs / "latest"
    if source == "preset":  # pretrained by the pipeline: its name is not one of the hub
        (run / "base").unlink()
        copytree(base_dir, run / "base")
        (run / "base.json").rename(run / "base" / "base.json")
        write_base(run / "base", replace(read_base(run / "base"), name="gpt2-nano"), {})
    export(outputs / "out", "peft")
    assert "`AutoPeftModelForCausalLM.from_pretrained(DIRECTORY)`" in (outputs / "out" / "README.md").read_text()
    assert greedy(AutoPeftModelForCausalLM.from_pretrained(outputs / "out"), prompt) == expected


def test_the_card_of_a_merged_model_says_how_to_use_it(tmp_path):
    export(tmp_path / "peft", "peft")
    export(tmp_path / "hf", "hf")
    export(tmp_path / "gguf", "gguf")
    cards = {kind: (tmp_path / kind / "README.md").read_text() for kind in ("peft", "hf", "gguf")}
    assert "merged into its weights" not in cards["peft"]
    for kind, use in (("hf", 'pipeline("text-generation"'), ("gguf", "llama-cli -m DIRECTORY/model.gguf")):
        assert "merged into its weights" in cards[kind]
        assert use in cards[kind]
    [snippet] = re.findall(r"```python\n(.*?)```", cards["hf"], re.DOTALL)
    code = snippet.replace("DIRECTORY", str(tmp_path / "hf"))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_transformers_reads_the_merged_model_its_tokenizer_and_its_chat_template(tmp_path, prompt, expected):
    out = tmp_path / "out"
    export(out, "hf")
    assert greedy(AutoModelForCausalLM.from_pretrained(out), prompt) == expected
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name a river."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == PROMPT
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a river."}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True) == PROMPT
    with pytest.raises(TemplateError, match="only content parts of type text are supported"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": "a"}]}])
    assert tokenizer(PROMPT)["input_ids"] == prompt
    assert tokenizer.eos_token == "<|endoftext|>"
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert "| Exact match | 0.5 | 0.5 |" in card.text
    assert load_pretrained(out).config.token_count == len(tokenizer)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_merged_model_may_have_16_bits(tmp_path, tuned, name, dtype):
    export(tmp_path / "out", "hf", "--dtype", name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == dtype
    merged = merge_lora(deepcopy(tuned)).state_dict()["h.0.mlp.c_fc.weight"]
    assert torch.equal(theirs.state_dict()["transformer.h.0.mlp.c_fc.weight"], merged.T.to(dtype))


def test_weights_beyond_the_range_of_fp16_are_refused(outputs, base_dir, adapter_dir):
    base = copytree(base_dir, outputs / "large")
    model = load_pretrained(base)
    model.wte.weight.data[0, 0] = 1e5
    save_pretrained(model, base)
    write_run(outputs / "run", base, adapter_dir)
    done = CliRunner().invoke(
        main, ["export", "--format", "hf", "--dtype", "fp16", "--run", "run", "--out", str(outputs / "new")]
    )
    assert done.exit_code == 1
    assert "'wte.weight' has values beyond the range of torch.float16; use another dtype" in done.output


def test_a_chat_template_with_history_writes_earlier_turns_as_in_training(outputs, tmp_path):
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "My name is {Bob}."},
        {"role": "assistant", "content": "Hi\n'Bob'."},
        {"role": "user", "content": "What is my name?"},
        {"role": "assistant", "content": "Bob"},
        {"role": "user", "content": "And mine?"},
    ]
    export(tmp_path / "hf", "hf", "--multi-turn", "history")
    export(tmp_path / "gguf", "gguf", "--multi-turn", "history")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    field = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields["tokenizer.chat_template"]
    assert field.contents() == tokenizer.chat_template
    for n in (2, 4, 6):
        (file := tmp_path / "chat.json").write_text(json.dumps([{"messages": [*chat[:n], chat[2]]}]))
        [*_, record] = read_records(file)
        prompt = format_prompt(record["instruction"], record["input"])
        assert tokenizer.apply_chat_template(chat[:n], tokenize=False, add_generation_prompt=True) == prompt
        in_parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in chat[:n]]
        assert tokenizer.apply_chat_template(in_parts, tokenize=False, add_generation_prompt=True) == prompt
    text = tokenizer.apply_chat_template(chat[:5], tokenize=False)  # a training example
    assert (
        text == format_prompt("What is my name?", "User: My name is {Bob}.\nAssistant: Hi\n'Bob'.") + "Bob<|endoftext|>"
    )
    without = [{"role": "assistant", "content": "Hi"}]
    assert tokenizer.apply_chat_template(without, tokenize=False) == format_prompt("") + "Hi<|endoftext|>"


def test_the_pipeline_of_transformers_generates_greedily_whatever_the_settings_of_the_base(
    outputs, base_dir, adapter_dir, tuned, prompt, tmp_path_factory
):
    base = copytree(base_dir, tmp_path_factory.mktemp("saved") / "base")
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 0, "repetition_penalty": 5.0, "max_length": 90}
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base)
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    write_run(outputs / "saved", base, adapter_dir)
    export(outputs / "hf", "hf", "--run", "saved")
    answer = pipeline("text-generation", str(outputs / "hf"))
    chat = [{"role": "user", "content": "Name a river."}]
    [generated] = answer(chat, max_new_tokens=12, return_full_text=False)
    tokenizer = load_tokenizer(base)
    [expected] = generate(tuned, [prompt], GenerationConfig(max_new_tokens=12, eos_id=tokenizer.eot_token))
    assert generated["generated_text"] == tokenizer.decode(expected)
    assert answer.model.generation_config.max_length == 90


def test_transformers_generates_up_to_the_context_of_a_base_without_limits_of_the_length(tmp_path, tuned):
    export(tmp_path / "out", "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.generation_config.eos_token_id = None
    answer = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "out"))
    # without max_length, the pipeline generates 256 tokens, for which this model has no positions, and generate 20
    assert answer("Name a river.", return_full_text=False)[0]["generated_text"]
    assert model.generate(torch.tensor([[5]])).shape[1] == tuned.config.n_positions


@pytest.mark.parametrize("own", ['{"eos_token_id": 5, "temperature": 0.5}', None])
def test_exports_of_a_base_with_another_end_token_end_where_training_ends_an_answer(
    outputs, base_dir, adapter_dir, tmp_path_factory, own
):
    base = copytree(base_dir, tmp_path_factory.mktemp("other") / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"bos_token_id": 5, "eos_token_id": 5}))
    if own:
        (base / "generation_config.json").write_text(own)
    write_run(outputs / "other", base, adapter_dir)
    export(outputs / "hf", "hf", "--run", "other")
    export(outputs / "gguf", "gguf", "--run", "other")
    model, end = AutoModelForCausalLM.from_pretrained(outputs / "hf"), load_tokenizer(base).eot_token
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [end, 5]
    assert AutoTokenizer.from_pretrained(outputs / "hf").eos_token_id == end
    field = gguf.GGUFReader(outputs / "gguf" / "model.gguf").fields["tokenizer.ggml.eos_token_id"]
    assert field.contents() == end


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_transformers_reads_the_gguf_file(tmp_path, prompt, expected, tuned, kind):
    options = [] if kind == "f32" else ["--quantize", kind]
    files = export(tmp_path / "out", "gguf", *options)
    assert [file.rpartition("/")[2] for file in files] == ["README.md", "adapter.gguf", "model.gguf"]
    # transformers takes n_positions of a GGUF file to be GPT-2's 1024
    values = {"gguf_file": "model.gguf", "n_positions": len(tuned.wpe.weight), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **values).eval()
    with torch.no_grad():
        logits, own = model(torch.tensor([prompt])).logits, tuned(torch.tensor([prompt]))
    # f16 has 11 bits of precision, q8_0 about 8
    torch.testing.assert_close(logits, own, rtol=0, atol={"f32": 1e-4, "f16": 1e-2, "q8_0": 0.2}[kind])
    if kind == "f32":
        assert greedy(model, prompt) == expected


def test_exports_have_no_rows_of_the_embedding_without_a_token(
    outputs, base_dir, adapter_dir, tmp_path_factory, prompt, expected
):
    base = copytree(base_dir, tmp_path_factory.mktemp("padded") / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    n = model.config.vocab_size
    model.resize_token_embeddings(n + 5, mean_resizing=False)
    rows = model.transformer.wte.weight.data
    rows[n:] = 9 * rows[expected[0]] * torch.tensor([[1], [-1], [1], [-1], [1]])  # one of them is the most likely token
    model.save_pretrained(base)
    assert greedy(model, prompt)[0] >= n
    write_run(outputs / "padded", base, adapter_dir)
    for kind, values in (("hf", {}), ("gguf", {"gguf_file": "model.gguf", "n_positions": model.config.n_positions})):
        export(outputs / kind, kind, "--run", "padded")
        exported = AutoModelForCausalLM.from_pretrained(outputs / kind, **values)
        assert exported.config.vocab_size == n
        assert greedy(exported, prompt) == expected


@pytest.fixture
def words_dir(base_dir, tmp_path):
    """A base whose tokenizer has added words and a padding token, and the tokenizer of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.add_tokens(["<user>", "TP53", "TP53BP1"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    return tmp_path / "words", tokenizer


def test_added_words_are_user_defined_tokens_of_a_gguf_file(words_dir, tmp_path):
    directory, tokenizer = words_dir
    write_gguf(load_pretrained(directory), directory, tmp_path / "model.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    n = len(tokenizer)
    assert tokens[n - 4 :] == ["<user>", "TP53", "TP53BP1", "<pad>"]
    assert types[n - 4 :] == [gguf.TokenType.USER_DEFINED] * 3 + [gguf.TokenType.CONTROL]
    assert types[tokenizer.eos_token_id] == gguf.TokenType.CONTROL


def test_llama_cpp_finds_and_prints_added_words(words_dir, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    directory, tokenizer = words_dir
    write_gguf(load_pretrained(directory), directory, tmp_path / "model.gguf", "f32")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    text = "x <user> y TP53BP1, TP53"
    ids = llama.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == tokenizer(text)["input_ids"] == load_tokenizer(directory).encode_ordinary(text)
    assert llama.detokenize(ids).decode() == text
    pad = tokenizer.pad_token_id
    assert pad not in llama.tokenize(b"<pad>", add_bos=False, special=False)
    llama.close()


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_flag_that_llama_cpp_does_not_have_is_refused(words_dir, tmp_path, flag):
    directory, tokenizer = words_dir
    tokenizer.add_tokens([AddedToken("<user>", **{flag: True})])
    tokenizer.save_pretrained(directory)
    with pytest.raises(
        ValueError, match=f"tokenizer.json: the added token '<user>' has {flag}, which llama.cpp does not"
    ):
        write_gguf(load_pretrained(directory), directory, tmp_path / "model.gguf", "f32")


@pytest.mark.parametrize("source", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_exports_keep_the_padding_token_of_the_base(outputs, words_dir, adapter_dir, source):
    directory, tokenizer = words_dir
    config = {"pad_token": "<pad>", "padding_side": "left"}
    (directory / "tokenizer_config.json").unlink()
    content = {"pad_token_id": tokenizer.pad_token_id} if source == "generation_config.json" else config
    (directory / source).write_text(json.dumps(content))
    write_run(outputs / "words", directory, adapter_dir)
    export(outputs / "hf", "hf", "--run", "words")
    export(outputs / "gguf", "gguf", "--run", "words")
    exported = AutoTokenizer.from_pretrained(outputs / "hf")
    assert exported.pad_token == "<pad>"
    assert exported.padding_side == ("left" if source == "tokenizer_config.json" else "right")
    assert exported(["a", "a b c d"], padding=True)["attention_mask"] != [[1], [1]]
    field = gguf.GGUFReader(outputs / "gguf" / "model.gguf").fields["tokenizer.ggml.padding_token_id"]
    assert field.contents() == tokenizer.pad_token_id


def test_a_padding_token_that_is_not_special_is_not_exported(base_dir, tmp_path):
    (directory := tmp_path / "base").mkdir()
    copytree(base_dir, directory, dirs_exist_ok=True)
    (directory / "tokenizer_config.json").write_text('{"pad_token": "!"}')  # would no longer be found in text
    assert read_padding_token(directory) is None
    write_gguf(load_pretrained(directory), directory, tmp_path / "model.gguf", "f32")
    assert "tokenizer.ggml.padding_token_id" not in gguf.GGUFReader(tmp_path / "model.gguf").fields


def test_a_dora_is_exported_to_gguf_merged_alone(outputs, base_dir, tmp_path, prompt):
    model = randomize_lora(add_lora(load_pretrained(base_dir), LoraConfig(rank=4, dora=True)))
    with pytest.raises(ValueError, match=r"DoRA's magnitudes .lora.dora is true.*merged model"):
        write_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
    write_run(outputs / "dora", base_dir, save_adapter(model, tmp_path / "adapter"))
    files = export(tmp_path / "out", "gguf", "--run", "dora")
    assert [file.rpartition("/")[2] for file in files] == ["README.md", "model.gguf"]
    values = {"gguf_file": "model.gguf", "n_positions": len(model.wpe.weight), "dtype": torch.float32}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **values).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(torch.tensor([prompt])).logits, model(torch.tensor([prompt])), rtol=0, atol=1e-4
        )


@pytest.mark.slow
def test_llama_cpp_generates_the_same_tokens_merged_and_with_the_adapter(base_dir, tmp_path, prompt, expected):
    llama_cpp = pytest.importorskip("llama_cpp")
    out = tmp_path / "out"
    export(out, "gguf")
    write_gguf(load_pretrained(base_dir), base_dir, out / "base.gguf", "f32")
    for file, adapter in ((out / "model.gguf", None), (out / "base.gguf", str(out / "adapter.gguf"))):
        llama = llama_cpp.Llama(str(file), lora_path=adapter, n_ctx=128, verbose=False, n_threads=1)
        assert llama.tokenize(PROMPT.encode(), add_bos=False) == prompt
        tokens = llama.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        assert [next(tokens) for _ in expected] == expected, file.name
        llama.close()


def test_an_export_that_fails_leaves_the_directory_empty(tmp_path, monkeypatch):
    def fill_disk(model, base, file, *options):
        file.write_bytes(b"GGUF")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("commands.export.write_gguf", fill_disk)
        done = CliRunner().invoke(main, ["export", "--out", str(tmp_path / "out"), "--format", "gguf"])
    assert done.exit_code == 1
    assert re.search(r"No space left on device \([\d,]+ bytes free\): '\S+/out/\S+/model.gguf'", done.output)
    assert list((tmp_path / "out").iterdir()) == []
    files = export(tmp_path / "out", "gguf")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "adapter.gguf", "model.gguf"]
    assert files


def test_errors_are_one_line(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for options, message in (
        (["--out", str(tmp_path / "full"), "--format", "hf"], "is not an empty directory; choose a new one"),
        (["--out", str(tmp_path / "new"), "--format", "hf", "--run", "no"], "is not the directory of a finished run"),
        (["--out", str(tmp_path / "new"), "--format", "hf", "--quantize", "f16"], "goes with --format gguf"),
        (["--out", str(tmp_path / "new"), "--format", "peft", "--multi-turn", "history"], "--format hf or gguf"),
        (["--out", str(tmp_path / "new"), "--format", "gguf", "--dtype", "fp16"], "goes with --format hf"),
    ):
        done = CliRunner().invoke(main, ["export", *options])
        assert done.exit_code in (1, 2)
        assert message in done.output
