"""The prompt template and the parsing of answers, for training, evaluation and serving."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2core.tokenizer import END_OF_TEXT

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
RESPONSE = "### Response:"


@dataclass(frozen=True)
class PromptTemplate:
    """The text around instruction and input. Its name and digest are stored with each adapter trained on it."""

    name: str
    with_input: str  # {instruction} and {input} are replaced by the texts of the record
    without_input: str  # {instruction} is replaced

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.with_input}\0{self.without_input}".encode()).hexdigest()


PROMPT_TEMPLATE = PromptTemplate(
    name="alpaca",
    with_input=f"{PREAMBLE}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n{RESPONSE}\n",
    without_input=f"{PREAMBLE}\n\n### Instruction:\n{{instruction}}\n\n{RESPONSE}\n",
)
# Text that ends an answer: a header after whitespace, the preamble, the end-of-text marker.
MARKERS = ("### Instruction:", "### Input:", RESPONSE, PREAMBLE, END_OF_TEXT)
_NEXT_SECTION = re.compile(rf"(?:^|\s)### (?:Instruction|Input|Response):|{re.escape(PREAMBLE)}")


def format_prompt(instruction: str, input: str = "") -> str:
    """Return the text that the model completes. A training example continues it with the output and end of text."""
    template = PROMPT_TEMPLATE.with_input if input else PROMPT_TEMPLATE.without_input
    return template.format(instruction=instruction, input=input)


def split_prompt(prompt: str) -> tuple[str, str] | None:
    """Return instruction and input of a prompt made by `format_prompt`; None for any other text.

    An instruction that contains the input's header is split at it: `format_prompt` makes the same prompt of both.
    """
    head, tail = PROMPT_TEMPLATE.without_input.split("{instruction}")
    between = PROMPT_TEMPLATE.with_input.removeprefix(head).partition("{instruction}")[2].partition("{input}")[0]
    if len(prompt) < len(head) + len(tail) or not (prompt.startswith(head) and prompt.endswith(tail)):
        return None
    inner = prompt[len(head) : -len(tail)]
    instruction, _, input = inner.partition(between)
    return (instruction, input) if input else (inner, "")


def chat_template(history: bool = False) -> str:
    """Return the template in Jinja for tokenizer_config.json and GGUF files.

    As in the service, the last user turn is the instruction, and system messages are not used. A final assistant turn
    is formatted as in a training example. The content of a turn is text, or a list of parts of type text.

    Args:
        history: earlier turns are the input, as in training on conversations. False: they are not used.
    """
    before, after = PROMPT_TEMPLATE.without_input.split("{instruction}")
    between = PROMPT_TEMPLATE.with_input.removeprefix(before + "{instruction}").removesuffix("{input}" + after)
    texts = (before, between, after, format_turns([("user", "")]), format_turns([("assistant", "")]))
    before, between, after, user, assistant = map(json.dumps, texts)
    text = (  # the content of a turn as text; a turn that calls a tool has none
        "{%- macro text(content) -%}{%- if content is string -%}{{- content -}}{%- elif content -%}"
        "{%- for part in content -%}{%- if part['type'] != 'text' -%}"
        "{{- raise_exception('only content parts of type text are supported') -}}{%- endif -%}"
        "{{- part['text'] -}}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    )
    turns = (
        "{%- for message in messages[:last.index] -%}"
        "{%- if message['role'] in ['user', 'assistant'] and text(message['content']) | trim -%}"
        f"{{%- set separator = '\\n' if last.turns else {between} -%}}"
        f"{{%- set role = {user} if message['role'] == 'user' else {assistant} -%}}"
        "{%- set last.turns = last.turns + separator + role + text(message['content']) -%}"
        "{%- endif -%}{%- endfor -%}"
    )
    return (
        f"{text}"
        "{%- set last = namespace(user='', index=0, turns='') -%}"
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
        "{%- set last.user = text(message['content']) -%}{%- set last.index = loop.index0 -%}"
        "{%- endif -%}{%- endfor -%}"
        f"{turns if history else ''}"
        f"{{{{- {before} + last.user + last.turns + {after} -}}}}"
        "{%- if messages[-1]['role'] == 'assistant' -%}{{- text(messages[-1]['content']) + eos_token -}}{%- endif -%}"
    )


def format_turns(turns: Sequence[tuple[str, str]]) -> str:
    """Format earlier turns of a conversation, (role, text) each, as the input of the next instruction; "" if none."""
    return "\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def parse_reply(raw: str) -> str:
    """Return the answer in a raw completion, without prompt, header, end of text, and any text after the answer.

    Args:
        raw: the completion, with or without the prompt before it.
    """
    return cut_reply(raw).rstrip()


def cut_reply(raw: str) -> str:
    """Return the answer as `parse_reply`, but keep trailing whitespace, since the completion may continue."""
    text = without_prompt(raw)
    return text[: next_section(text)]


def without_prompt(raw: str) -> str:
    """Return the answer in a raw completion, with any sections after it."""
    text = raw.split(END_OF_TEXT, 1)[0].lstrip()
    if text.startswith((PREAMBLE, RESPONSE)):
        text = text.partition(RESPONSE)[2]
    return text.lstrip()


def next_section(text: str, first: int = 0) -> int | None:
    """Return the index, from `first` on, at which the next section begins; None if there is no further section."""
    found = _NEXT_SECTION.search(text, first)
    return None if found is None else found.start()
