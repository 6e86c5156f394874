"""Clients as their users install them, against the served Bento (the extra `clients`)."""

import json
import os
import subprocess
import sys

import langchain_openai
import pytest
import requests
import torch

from tests.bentos.client import answer_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Say hello."},
]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OPENAI_API_KEY": "none",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


@pytest.fixture
def expected(tuned, tokenizer):
    return answer_of(tuned, tokenizer, "Say hello.")


def test_langchain_answers_and_streams_a_conversation(url, expected):
    model = langchain_openai.ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="gpt2-instruct", max_tokens=8, temperature=0
    )
    messages = [(message["role"], message["content"]) for message in CONVERSATION]
    assert model.invoke(messages).content == expected
    assert "".join(chunk.content for chunk in model.stream(messages)) == expected


def test_langchain_reads_structured_output(url):
    model = langchain_openai.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="gpt2-instruct", max_tokens=60)
    schema = {
        "title": "answer",
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = model.with_structured_output(schema, method="json_schema").invoke("How many?")
    assert 0 <= answer["n"] <= 99


def test_litellm_answers_and_streams_a_conversation(url, expected):
    code = (
        "import json, litellm, sys\n"
        "url, messages = sys.argv[1], json.loads(sys.argv[2])\n"
        "values = dict(model='openai/gpt2-instruct', api_base=url, api_key='none', messages=messages, max_tokens=8)\n"
        "whole = litellm.completion(**values).choices[0].message.content\n"
        "parts = [chunk.choices[0].delta.content or '' for chunk in litellm.completion(**values, stream=True)]\n"
        "print(json.dumps([whole, ''.join(parts)]))\n"
    )
    done = run([sys.executable, "-c", code, f"{url}/v1", json.dumps(CONVERSATION)])
    assert json.loads(done.splitlines()[-1]) == [expected, expected]


def test_the_llm_command_continues_a_conversation(url, expected, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: served\n  model_name: gpt2-instruct\n  api_base: {url}/v1\n"
    )
    llm = [sys.executable, "-m", "llm", "prompt", "-m", "served", "--key", "none", "-o", "max_tokens", "8"]
    user = {"LLM_USER_PATH": str(tmp_path)}
    run([*llm, "-s", "You are helpful.", "Hi."], **user)
    assert run([*llm, "-c", "Say hello."], **user).strip() == expected.strip()


def test_open_webui_requests_are_answered(url, expected):
    """Its model list, then the request that it sends for a chat: history, system prompt, null fields."""
    assert requests.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"] == "gpt2-instruct"
    body = {"model": "gpt2-instruct", "messages": CONVERSATION, "stream": True, "max_tokens": 8}
    body |= {"stream_options": {"include_usage": True}, "stop": None, "seed": None, "logit_bias": None, "tools": None}
    text = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events[:-1]) == expected
    assert events[-1]["usage"]["completion_tokens"] > 0


def test_lm_eval_scores_the_server_as_the_model_itself(url, tuned, tokenizer, base_dir, tmp_path):
    choices = [" town", " river and lake", " x"]
    questions = [f"Question {i}: which is it? Answer:" for i in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": q, "choices": choices, "label": 0}) for q in questions) + "\n")
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: label\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc}]\n"
    )
    arguments = {
        "base_url": f"{url}/v1/completions",
        "model": "gpt2-instruct",
        "tokenizer": base_dir,
        "tokenizer_backend": "huggingface",
        "max_length": tuned.config.n_positions,
    }
    options = [
        "--tasks",
        "tiny",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    model_args = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model_args, *options]
    run(command, HF_HOME=str(tmp_path / "hf"))
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found) == len(questions)
    for sample in found:
        scores = [float(response[0][0]) for response in sample["resps"]]
        question = tokenizer.encode_ordinary(sample["doc"]["question"])
        for choice, score in zip(choices, scores, strict=True):
            ids = question + tokenizer.encode_ordinary(choice)
            with torch.inference_mode():
                logprobs = tuned(torch.tensor([ids]))[0].log_softmax(-1)
            own = sum(float(logprobs[i - 1, ids[i]]) for i in range(len(question), len(ids)))
            assert score == pytest.approx(own, abs=1e-2)


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | OFFLINE | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
