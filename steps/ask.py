"""Questions to the model of a finished run, without a server: `python run.py ask`."""

from collections.abc import Iterator, Mapping
from typing import Any

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.data import Record, check_records, read_records, to_jsonl
from gpt2core.evaluate import answer_text
from gpt2core.generate import check_prompt, generate, stream
from gpt2core.inference.detokenizer import IncrementalDetokenizer
from gpt2core.lora import merge_lora
from gpt2core.model import best_device
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer
from steps.adapters.base import open_base
from steps.adapters.progress import counting
from steps.config import EvaluateConfig
from steps.outputs import outputs_dir

REQUIRED = ("instruction",)


class Asker:
    """The tuned model of a run, as `evaluate` asked it."""

    def __init__(self, run: str, sampling: Mapping[str, Any]) -> None:
        """
        Args:
            run: a folder of outputs/.
            sampling: fields of `GenerationConfig`; None is the default.

        Raises:
            FileNotFoundError: there is no such run.
            ValueError: a field has a wrong value.
            HubError: the base is one of the hub and cannot be fetched.
        """
        directory = outputs_dir() / run
        if not (directory / "adapter").is_dir():
            raise FileNotFoundError(f"there is no finished run in {directory}; make run makes one")
        given = {name: value for name, value in sampling.items() if value is not None}
        base = open_base(directory / "base")
        self.tokenizer = load_tokenizer(base)
        self.config = GenerationConfig(**given, eos_id=self.tokenizer.eot_token)
        self.model = load_pretrained(base, device=best_device())
        merge_lora(load_adapter(self.model, directory / "adapter"))

    def stream(self, instruction: str, input: str = "") -> Iterator[str]:
        """The answer's text as it comes.

        Raises:
            ValueError: the instruction is empty, or too long for the context.
        """
        (question,) = check_records([{"instruction": instruction, "input": input}], "the question", REQUIRED)
        (prompt,) = self._prompts([question])
        text = IncrementalDetokenizer(self.tokenizer, (), clean=True)
        for token in stream(self.model, prompt, self.config):
            yield text.push(token)
        yield text.finish()

    def answer(self, questions: list[Record]) -> Iterator[str]:
        """Each question with its `answer`, a line of JSON.

        Raises:
            ValueError: a question is too long for the context; before any is answered.
        """
        prompts, batch_size = self._prompts(questions), EvaluateConfig().batch_size
        with counting("answers", len(questions)) as show:
            for start in range(0, len(prompts), batch_size):
                replies = generate(self.model, prompts[start : start + batch_size], self.config)
                for question, reply in zip(questions[start:], replies, strict=False):
                    answered = {name: text for name, text in question.items() if text}
                    yield to_jsonl([answered | {"answer": answer_text(reply, self.tokenizer)}]).decode().rstrip("\n")
                show(start + len(replies))

    def _prompts(self, questions: list[Record]) -> list[list[int]]:
        prompts = []
        for i, question in enumerate(questions):
            prompt = self.tokenizer.encode_ordinary(format_prompt(question["instruction"], question["input"]))
            try:
                check_prompt(prompt, self.model.config)
            except ValueError as error:
                raise ValueError(f"question {i}: {error}") from None
            prompts.append(prompt)
        return prompts


def read_questions(file: str) -> list[Record]:
    """Records that need no output.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record.
    """
    return read_records(file, REQUIRED)
