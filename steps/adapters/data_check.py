"""Data quality for the report: sizes, duplicates, and test records that also occur in training, exactly or nearly."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from gpt2core.data import Record, count_duplicates
from gpt2core.metrics import normalize
from gpt2core.types import JsonDataclass
from steps.adapters.similarity import TextIndex

NEAR = 0.9  # minimum cosine similarity (of character n-grams) of near duplicates
SHOWN = 10


@dataclass(frozen=True)
class Overlap(JsonDataclass):
    """A test record and the training record most similar to it."""

    test: str
    train: str
    similarity: float


@dataclass(frozen=True)
class PartCheck(JsonDataclass):
    """Sizes and duplicates of one part of the split."""

    name: str
    records: int
    duplicates: int  # number of records that are equal to an earlier record of the part
    median_characters: float  # median length of instruction, input and output together
    longest_characters: int  # maximum of these lengths


@dataclass(frozen=True)
class DataCheck(JsonDataclass):
    """Sizes of the parts, and the overlap of test and training records."""

    parts: list[PartCheck]
    same_record: int  # number of test records that are also in the training part
    same_question: int  # number of other test records whose instruction and input are in the training part
    near: int  # number of other test records with a similarity of at least NEAR to a training record
    examples: list[Overlap]  # the overlaps with the highest similarity

    @property
    def leaks(self) -> bool:
        """Whether test records or their questions were seen in training, so that scores may be too high."""
        return self.same_record + self.same_question > 0


def check_data(train: Sequence[Record], val: Sequence[Record], test: Sequence[Record]) -> DataCheck:
    """Check the parts of the split, and compare test with training records.

    Near duplicates are found by the similarity of the whole record (see `TextIndex`), so records that share a template
    but not their content count as different.
    """
    records, questions = ({form(record) for record in train} for form in (_text, _question))
    same = [_text(record) in records for record in test]
    asked = [_question(record) in questions for record in test]
    overlaps = _nearest(train, test)
    near = [not a and not b and o.similarity >= NEAR for a, b, o in zip(same, asked, overlaps, strict=True)]
    marked = [o for a, b, c, o in zip(same, asked, near, overlaps, strict=True) if a or b or c]
    return DataCheck(
        parts=[_part(name, part) for name, part in (("train", train), ("validation", val), ("test", test))],
        same_record=sum(same),
        same_question=sum(b and not a for a, b in zip(same, asked, strict=True)),
        near=sum(near),
        examples=sorted(marked, key=lambda overlap: -overlap.similarity)[:SHOWN],
    )


def _part(name: str, records: Sequence[Record]) -> PartCheck:
    lengths = [sum(len(record.get(key, "")) for key in ("instruction", "input", "output")) for record in records] or [0]
    return PartCheck(name, len(records), count_duplicates(records), float(median(lengths)), max(lengths))


def _text(record: Record) -> str:
    return normalize("\n".join(record.get(key, "") for key in ("instruction", "input", "output")))


def _question(record: Record) -> str:
    return normalize("\n".join(record.get(key, "") for key in ("instruction", "input")))


def _nearest(train: Sequence[Record], test: Sequence[Record]) -> list[Overlap]:
    similarities, positions = TextIndex([_text(record) for record in train]).nearest([_text(record) for record in test])
    return [
        Overlap(_text(record), _text(train[i]), round(float(similarity), 4))
        for record, similarity, i in zip(test, similarities, positions, strict=True)
    ]
