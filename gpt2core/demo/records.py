"""The instruction records: questions about facts, with and without an input. Outputs are the bare answers."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from random import Random

from gpt2core.demo.world import Fact

N_RECORDS = 1100
# Families that a base of a million weights can at best memorize. A few of their records show its limits in the report.
HARD = ("spelling", "addition")
HARD_SHARE = 0.04  # share of each hard family in all records

# With {s}, the subject is part of the instruction; without it, the subject is the input.
_INSTRUCTIONS = {
    "capital": (
        "Name the capital of this country.",
        "What is the capital of the country?",
        "Answer with the capital city of the given country.",
        "Which city is the capital?",
        'What is the capital of "{s}"?',
        'Name the capital city of "{s}".',
    ),
    "country": (
        "Name the country of this city.",
        "In which country is the city?",
        "Answer with the country that the given city is in.",
        "Which country does the city lie in?",
        'In which country is the city "{s}"?',
        'Name the country of the city "{s}".',
    ),
    "continent": (
        "Name the continent of this country.",
        "On which continent is the country?",
        "Answer with the continent of the given country.",
        "Which continent does the country lie on?",
        'What is the continent of "{s}"?',
        'Name the continent where "{s}" lies.',
    ),
    "nationality": (
        "Name the nationality of people from this country.",
        "What nationality does a person from the country have?",
        "Answer with the nationality that belongs to the given country.",
        "Which nationality are people from here?",
        'What is the nationality of people from "{s}"?',
        'Name the nationality of a person from "{s}".',
    ),
    "antonym": (
        "Name the opposite of this word.",
        "What is the antonym of the word?",
        "Answer with the word that has the opposite meaning.",
        "Which word is the opposite?",
        'What is the opposite of "{s}"?',
        'Name an antonym of "{s}".',
    ),
    "past tense": (
        "Put this verb in the past tense.",
        "What is the past tense of the verb?",
        "Answer with the past form of the given verb.",
        "Which word is the past tense?",
        'What is the past tense of "{s}"?',
        'Put the verb "{s}" in the past tense.',
    ),
    "plural": (
        "Put this noun in the plural.",
        "What is the plural of the noun?",
        "Answer with the plural form of the given noun.",
        "Which word is the plural?",
        'What is the plural of "{s}"?',
        'Put the noun "{s}" in the plural.',
    ),
    "comparative": (
        "Put this adjective in the comparative.",
        "What is the comparative of the adjective?",
        "Answer with the comparative form of the given adjective.",
        "Which word is the comparative?",
        'What is the comparative of "{s}"?',
        'Put the adjective "{s}" in the comparative.',
    ),
    "superlative": (
        "Put this adjective in the superlative.",
        "What is the superlative of the adjective?",
        "Answer with the superlative form of the given adjective.",
        "Which word is the superlative?",
        'What is the superlative of "{s}"?',
        'Put the adjective "{s}" in the superlative.',
    ),
    "category": (
        "Name the category of this thing.",
        "What category does the word belong to?",
        "Answer with the category of the given word.",
        "What sort of thing is this?",
        'What is the category of "{s}"?',
        'Name the category that "{s}" belongs to.',
    ),
    "part of speech": (
        "Name the part of speech of this word.",
        "What part of speech is the word?",
        "Answer with the part of speech of the given word.",
        "Which part of speech does the word have?",
        'What is the part of speech of "{s}"?',
        'Name the part of speech of the word "{s}".',
    ),
    "chemical symbol": (
        "Name the chemical symbol of this element.",
        "What is the symbol of the element?",
        "Answer with the chemical symbol of the given element.",
        "Which symbol stands for the element?",
        'What is the chemical symbol of "{s}"?',
        'Name the symbol of the element "{s}".',
    ),
    "number in words": (
        "Put this number in words.",
        "What is the number in words?",
        "Answer with the given number in words.",
        "How is the number read?",
        'What is "{s}" in words?',
        'Put the number "{s}" in words.',
    ),
    "number in digits": (
        "Put this number in digits.",
        "What is the number in digits?",
        "Answer with the digits of the given number.",
        "Which digits are written for these words?",
        'What is "{s}" in digits?',
        'Put the number "{s}" in digits.',
    ),
    "unit": (
        "Convert this measure to the smaller unit.",
        "What is the measure in the smaller unit?",
        "Answer with the same measure in the smaller unit.",
        "How much is this in the smaller unit?",
        'What is "{s}" in the smaller unit?',
        'Convert "{s}" to the smaller unit.',
    ),
    "uppercase": (
        "Put this word in capital letters.",
        "What is the word in capitals?",
        "Answer with the given word in capital letters.",
        "What is the uppercase form?",
        'What is "{s}" in capital letters?',
        'Put the word "{s}" in capitals.',
    ),
    "spelling": (
        "Spell this word letter by letter.",
        "How is the word spelled?",
        "Answer with the letters of the given word.",
        "What is the spelling?",
        'How is "{s}" spelled letter by letter?',
        'Spell the word "{s}".',
    ),
    "addition": (
        "Add these numbers.",
        "What is the sum?",
        "Answer with the result of the given sum.",
        "How much is this together?",
        'What is the sum "{s}"?',
        'Add the numbers "{s}".',
    ),
}


def write_records(world: Sequence[Fact], seed: int) -> list[dict[str, str]]:
    """Return N_RECORDS distinct records in random order; fewer for a small world, as a fact gives at most six.

    Families have equal numbers of records, except hard ones, which have fewer. Within a family, the numbers of records
    per fact differ by at most one.
    """
    random = Random(seed)
    facts: dict[str, list[Fact]] = defaultdict(list)
    for fact in world:
        facts[fact.family].append(fact)
    records = [
        record
        for family, count in _counts(list(facts)).items()
        for record in _write_family(facts[family], count, random)
    ]
    random.shuffle(records)
    return records


def _counts(families: Sequence[str]) -> dict[str, int]:
    """Return the number of records of each family, N_RECORDS in total."""
    counts = {family: round(N_RECORDS * HARD_SHARE) for family in families if family in HARD}
    others = [family for family in families if family not in HARD]
    share, remainder = divmod(N_RECORDS - sum(counts.values()), len(others))
    return counts | {family: share + (i < remainder) for i, family in enumerate(others)}


def _write_family(facts: Sequence[Fact], count: int, random: Random) -> list[dict[str, str]]:
    """Return at most `count` records, spread evenly over the facts."""
    rounds = [random.sample(_INSTRUCTIONS[fact.family], len(_INSTRUCTIONS[fact.family])) for fact in facts]
    pairs = (pair for instructions in zip(*rounds, strict=True) for pair in zip(facts, instructions, strict=True))
    return [_record(fact, instruction) for fact, instruction in islice(pairs, count)]


def _record(fact: Fact, instruction: str) -> dict[str, str]:
    return {
        "instruction": instruction.format(s=fact.subject),
        "input": "" if "{s}" in instruction else fact.subject,
        "output": fact.answer,
        "group": fact.group,
        "family": fact.family,
    }
