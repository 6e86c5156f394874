"""`python run.py ask`: answers from the model of a finished run, without a server."""

from collections.abc import Iterator, Mapping
from typing import Any

from commands.finished_run import open_run
from gpt2core.config import GenerationConfig
from gpt2core.data import Record, check_records, location_of, read_records, to_jsonl
from gpt2core.evaluate import answer_text
from gpt2core.generate import check_prompt, generate, stream
from gpt2core.inference.detokenizer import IncrementalDetokenizer
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer
from steps.adapters.progress import counting_progress
from steps.config import EvaluateConfig

REQUIRED = ("instruction",)


class TunedModel:
    """The model of a run with its adapter merged, as `evaluate` used it."""

    def __init__(
        self, run: str, sampling: Mapping[str, Any], adapter: str | None = None, accept_other_base: bool = False
    ) -> None:
        """
        Args:
            run, adapter: see `open_run`.
            sampling: fields of `GenerationConfig`; None stands for the default.

        Raises:
            FileNotFoundError: the run or the adapter does not exist.
            ValueError: a field has a wrong value, or the adapter is not for this base.
            HubError: the base comes from the hub and cannot be downloaded.
        """
        finished = open_run(run, adapter)
        given = {name: value for name, value in sampling.items() if value is not None}
        self.tokenizer = load_tokenizer(finished.base_dir)
        self.config = GenerationConfig(**given, eos_id=self.tokenizer.eot_token)
        self.model = finished.load(merge=True, accept_other_base=accept_other_base)

    def stream(self, instruction: str, input: str = "") -> Iterator[str]:
        """Yield the answer's text incrementally.

        Raises:
            ValueError: the instruction is empty, or too long for the context.
        """
        (record,) = check_records([{"instruction": instruction, "input": input}], "the question", REQUIRED)
        (prompt,) = self._encode([record])
        text = IncrementalDetokenizer(self.tokenizer, (), clean=True)
        for token in stream(self.model, prompt, self.config):
            yield text.push(token)
        yield text.finish()

    def answer(self, records: list[Record]) -> Iterator[str]:
        """Yield each record with its `answer`, as a line of JSON.

        Raises:
            ValueError: a record is too long for the context; raised before the first answer.
        """
        prompts, batch_size = self._encode(records), EvaluateConfig().batch_size
        with counting_progress("answers", len(records)) as show:
            for start in range(0, len(prompts), batch_size):
                completions = generate(self.model, prompts[start : start + batch_size], self.config)
                for record, tokens in zip(records[start:], completions, strict=False):
                    given = {name: text for name, text in record.items() if text}
                    yield to_jsonl([given | {"answer": answer_text(tokens, self.tokenizer)}]).decode().rstrip("\n")
                show(start + len(completions))

    def _encode(self, records: list[Record]) -> list[list[int]]:
        prompts = []
        for i, record in enumerate(records):
            prompt = self.tokenizer.encode_ordinary(format_prompt(record["instruction"], record["input"]))
            try:
                check_prompt(prompt, self.model.config)
            except ValueError as error:
                raise ValueError(f"{location_of(records, i)}: {error}") from None
            prompts.append(prompt)
        return prompts


def read_questions(file: str) -> list[Record]:
    """Read records, which need no output.

    Raises:
        FileNotFoundError, ValueError: the file does not exist, or a record is not valid.
    """
    return read_records(file, REQUIRED)
