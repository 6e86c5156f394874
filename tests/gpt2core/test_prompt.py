"""The prompt template, and answers parsed out of all kinds of completions."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2core.data import encode_records
from gpt2core.prompt import PREAMBLE, PROMPT_TEMPLATE, RESPONSE, PromptTemplate, format_prompt, parse_reply
from gpt2core.tokenizer import END_OF_TEXT

MANY = settings(max_examples=300)
HEADERS = ("### Instruction:", "### Input:", RESPONSE)
CHARACTERS = st.characters(exclude_categories=["Cs"])  # a lone surrogate is not text
PLAIN = st.text(CHARACTERS, max_size=40).filter(lambda text: "#" not in text and "<|" not in text)
MESSY = st.lists(
    st.one_of(
        st.sampled_from([*HEADERS, PREAMBLE, END_OF_TEXT, "\n", "\n\n", " ", "#", "###", "### ", "Response:", "a"]),
        st.sampled_from(["Paris.", format_prompt("a"), format_prompt("a", "b"), "x### Response:", "<|endof", "text|>"]),
        st.text(CHARACTERS, max_size=8),
    ),
    max_size=8,
).map("".join)


def test_the_prompt_without_input_is_that_of_alpaca():
    assert format_prompt("Name a city.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a city.\n\n### Response:\n"
    )


def test_the_prompt_with_input_has_a_section_for_it():
    assert format_prompt("Translate.", "Guten Tag") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:\n"
    )


def test_an_empty_input_has_no_section():
    assert format_prompt("a", "") == format_prompt("a")


def test_braces_in_a_record_are_plain_text():
    assert "### Instruction:\nPrint {input} and {x!r}.\n\n###" in format_prompt("Print {input} and {x!r}.", "{0}")


def test_a_template_is_identified_by_its_text():
    with_input, without_input = PROMPT_TEMPLATE.with_input, PROMPT_TEMPLATE.without_input
    assert PROMPT_TEMPLATE.sha256 == PromptTemplate("other name", with_input, without_input).sha256
    assert PROMPT_TEMPLATE.sha256 != PromptTemplate("alpaca", with_input, without_input + "\n").sha256
    assert format_prompt("{instruction}", "{input}") == with_input


@MANY
@given(PLAIN, PLAIN)
def test_instruction_and_input_are_in_the_prompt_verbatim(instruction, input):
    prompt = format_prompt(instruction, input)
    assert f"### Instruction:\n{instruction}\n\n###" in prompt
    assert (f"### Input:\n{input}\n\n###" in prompt) == bool(input)
    assert prompt.startswith(PREAMBLE)
    assert prompt.endswith(f"{RESPONSE}\n")


COMPLETIONS = {
    "a plain answer": ("Paris.", "Paris."),
    "whitespace around it": (" \n Paris.\n\n", "Paris."),
    "several lines": ("One.\n\nTwo.\n- three", "One.\n\nTwo.\n- three"),
    "end of text": (f"Paris.{END_OF_TEXT}", "Paris."),
    "text after the end of text": (f"Paris.{END_OF_TEXT}Rome.{END_OF_TEXT}", "Paris."),
    "nothing": ("", ""),
    "whitespace alone": ("  \n", ""),
    "end of text alone": (END_OF_TEXT, ""),
    "its own header": ("### Response:\nParis.", "Paris."),
    "its own header without a line": ("### Response: Paris.", "Paris."),
    "its own header alone": ("### Response:", ""),
    "whitespace before its own header": ("\n\n### Response:\nParis.", "Paris."),
    "the prompt": (format_prompt("Name a city."), ""),
    "the prompt and an answer": (format_prompt("Name a city.") + "Paris.", "Paris."),
    "the prompt with input and an answer": (format_prompt("Name a city.", "in France") + "Paris.", "Paris."),
    "the prompt, an answer and its end": (format_prompt("a") + f"Paris.{END_OF_TEXT}x", "Paris."),
    "the prompt, an answer, another section": (format_prompt("a") + "Paris.\n\n### Instruction:\nb", "Paris."),
    "another instruction": ("Paris.\n\n### Instruction:\nName another.", "Paris."),
    "another input": ("Paris.\n\n### Input:\nItaly", "Paris."),
    "another response": ("Paris.\n\n### Response:\nRome.", "Paris."),
    "another instruction on the same line": ("Paris. ### Instruction: Name another.", "Paris."),
    "an instruction at once": ("### Instruction:\nName another.", ""),
    "another headline": ("### Cities:\nParis", "### Cities:\nParis"),
    "a header's word in the text": ("The Response: fine.", "The Response: fine."),
    "hashes in the text": ("C# and ### are signs", "C# and ### are signs"),
    "the end of text cut off": ("Paris.<|endof", "Paris.<|endof"),
    "a prompt after the answer": ("Paris.\n\n" + format_prompt("Name another.") + "Rome.", "Paris."),
    "a header before the prompt": ("### Response:\n" + format_prompt("a") + "Paris.", ""),
}


@pytest.mark.parametrize(("raw", "answer"), COMPLETIONS.values(), ids=COMPLETIONS)
def test_the_answer_is_parsed_out_of_the_completion(raw, answer):
    assert parse_reply(raw) == answer


@MANY
@given(MESSY)
@example(RESPONSE + PREAMBLE)
def test_an_answer_has_no_header_and_no_end_of_text_and_parsing_is_idempotent(raw):
    answer = parse_reply(raw)
    assert END_OF_TEXT not in answer
    assert answer == answer.strip()
    for header in HEADERS:
        assert not answer.startswith(header)
        assert f"\n{header}" not in answer
        assert f" {header}" not in answer
    assert parse_reply(answer) == answer


@MANY
@given(PLAIN, PLAIN, PLAIN)
def test_nothing_of_the_prompt_is_left_in_an_answer(instruction, input, answer):
    prompt = format_prompt(instruction, input)
    assert parse_reply(prompt + answer) == answer.strip()
    assert parse_reply(answer) == answer.strip()
    assert parse_reply(prompt + answer + END_OF_TEXT + prompt) == answer.strip()


@settings(max_examples=150)
@given(st.text(CHARACTERS, max_size=40), st.text(CHARACTERS, max_size=40), st.text(CHARACTERS, max_size=40))
@example("a", "", "\n\n")
@example("a", "b", " b")
@example(END_OF_TEXT, END_OF_TEXT, END_OF_TEXT)
def test_the_inference_prompt_is_a_strict_prefix_of_the_training_example(tokenizer, instruction, input, output):
    record = {"instruction": instruction, "input": input, "output": output}
    [encoded] = encode_records([record], tokenizer, 10_000)
    prompt = tokenizer.encode_ordinary(format_prompt(instruction, input))
    assert encoded.prompt_length == len(prompt) < len(encoded.input_ids)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.input_ids[-1] == tokenizer.eot_token
    assert encoded.input_ids.count(tokenizer.eot_token) == 1
    assert tokenizer.decode(encoded.input_ids[len(prompt) : -1]) == output
