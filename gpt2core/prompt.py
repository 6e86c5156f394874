"""The Alpaca prompt, and the answer cut out of a reply: one spelling for training, evaluation and serving."""

import re

from gpt2core.tokenizer import END_OF_TEXT

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
RESPONSE = "### Response:"
# What ends an answer: headers after white space, the preamble, end of text spelt out.
MARKERS = ("### Instruction:", "### Input:", RESPONSE, PREAMBLE, END_OF_TEXT)
_ANOTHER = re.compile(rf"(?:^|\s)### (?:Instruction|Input|Response):|{re.escape(PREAMBLE)}")


def format_prompt(instruction: str, input: str = "") -> str:
    """What the model reads before it answers; the training text goes on with the output and end of text."""
    section = f"\n\n### Input:\n{input}" if input else ""
    return f"{PREAMBLE}\n\n### Instruction:\n{instruction}{section}\n\n{RESPONSE}\n"


def parse_reply(raw: str) -> str:
    """The clean answer in a raw reply: without prompt, header and end of text, and without what a model adds after it.

    `raw` is the continuation of a prompt, or prompt and continuation.
    """
    return cut_reply(raw).rstrip()


def cut_reply(raw: str) -> str:
    """`parse_reply` of a reply that may go on: white space at its end stays."""
    text = raw.split(END_OF_TEXT, 1)[0].lstrip()
    if text.startswith((PREAMBLE, RESPONSE)):
        text = text.partition(RESPONSE)[2]
    return _ANOTHER.split(text.lstrip(), maxsplit=1)[0]
