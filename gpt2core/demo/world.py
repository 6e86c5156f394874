"""A small world of true facts: facts from the tables, and sums, quantities and numbers generated from the seed."""

from dataclasses import dataclass, replace
from random import Random

from gpt2core.data import connected_components
from gpt2core.demo.tables import (
    ADJECTIVES,
    ANTONYMS,
    CATEGORIES,
    COUNTRIES,
    ELEMENTS,
    NOUNS,
    ONES,
    PARTS_OF_SPEECH,
    TENS,
    UNITS,
    VERBS,
    WORDS,
)

# Families with a small, closed set of answers, such as the continents. Facts with the same answer of such a family
# reveal nothing about each other, so they need not be in the same group.
CLOSED = ("continent", "category", "part of speech")


@dataclass(frozen=True)
class Fact:
    """A fact, such as the family "capital", the subject "France" and the answer "Paris".

    Facts of one `group` can reveal each other's answers.
    """

    family: str
    group: str
    subject: str
    answer: str


def make_world(seed: int, n_facts: int | None = None) -> list[Fact]:
    """Return the facts of this seed, family by family: all, or `n_facts` of them, spread evenly over the families.

    Raises:
        ValueError: the world has fewer facts than `n_facts`, or more families.
    """
    families = _pick_facts(Random(seed))
    total = sum(map(len, families.values()))
    if n_facts is not None and not len(families) <= n_facts <= total:
        raise ValueError(
            f"n_facts={n_facts} is not between {len(families)}, one for each family, and {total}, the whole world; "
            "null is the whole world"
        )
    by_rank = sorted((rank, family) for family, pairs in families.items() for rank in range(len(pairs)))
    chosen = sorted(by_rank[:n_facts], key=lambda place: (list(families).index(place[1]), place[0]))
    return _with_groups([Fact(family, "", *families[family][rank]) for rank, family in chosen])


def _pick_facts(random: Random) -> dict[str, list[tuple[str, str]]]:
    """Return family -> [(subject, answer)] of all facts."""
    countries = random.sample(COUNTRIES, 56)
    antonyms = random.sample(ANTONYMS, 29)
    adjectives = random.sample(ADJECTIVES, 54)
    members = [(member, category) for category, *names in CATEGORIES for member in names]
    parts_of_speech = [(word, part) for part, *words in PARTS_OF_SPEECH for word in words]
    words = random.sample(WORDS, 94)
    quantities = [
        (f"{n} {unit}", f"{n * int(factor)} {smaller}") for unit, factor, smaller in UNITS for n in range(2, 10)
    ]
    quantities = random.sample(quantities, 54)
    # A number of "number in words" must not occur in a sum or quantity, which would reveal its other form.
    measured = {answer.split()[0] for _, answer in quantities}
    numbers = random.sample([n for n in range(11, 100) if str(n) not in measured], 50)
    return {
        "capital": [(country, capital) for country, capital, *_ in countries],
        "country": [(city, country) for country, _, city, *_ in countries],
        "continent": [(country, continent) for country, _, _, continent, _ in countries],
        "nationality": [(country, nationality) for country, *_, nationality in countries],
        "antonym": [(a, b) for a, b in antonyms] + [(b, a) for a, b in antonyms],
        "past tense": [(verb, past) for verb, past in random.sample(VERBS, 56)],
        "plural": [(noun, plural) for noun, plural in random.sample(NOUNS, 56)],
        "comparative": [(adjective, stem + "er") for adjective, stem in adjectives],
        "superlative": [(adjective, stem + "est") for adjective, stem in adjectives],
        "category": random.sample(members, 60),
        "part of speech": random.sample(parts_of_speech, 58),
        "chemical symbol": [(element, symbol) for element, symbol in random.sample(ELEMENTS, 56)],
        "number in words": [(str(n), _in_words(n)) for n in numbers],
        "number in digits": [(_in_words(n), str(n)) for n in numbers],
        "unit": quantities,
        "uppercase": [(word, word.upper()) for word in words[:54]],
        "spelling": [(word, "-".join(word)) for word in words[54:]],
        "addition": _pick_sums(random, [n for n in range(11, 100) if n not in numbers], 40),
    }


def _pick_sums(random: Random, numbers: list[int], n: int) -> list[tuple[str, str]]:
    """Return `n` sums of two of the numbers, with distinct results. A result is one of the numbers or above 99."""
    pairs = [(a, b) for a in numbers for b in numbers if a < b and (a + b in numbers or a + b > 99)]
    sums: dict[int, str] = {}
    for a, b in random.sample(pairs, len(pairs)):
        sums.setdefault(a + b, f"{a} + {b}")
    return [(sum_, str(result)) for result, sum_ in sums.items()][:n]


def _in_words(n: int) -> str:
    """Spell a number from 0 to 99: "zero" to "ninety-nine"."""
    if n < 20:
        return ONES[n]
    tens, ones = divmod(n, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def _with_groups(facts: list[Fact]) -> list[Fact]:
    """Set the `group` of the facts: groups are the connected components of facts that share an entity."""
    entities = [_entities(fact) for fact in facts]
    names = dict[int, str]()
    for component in connected_components(entities):
        names |= dict.fromkeys(component, min(entity for i in component for entity in entities[i]))
    return [replace(fact, group=names[i]) for i, fact in enumerate(facts)]


def _entities(fact: Fact) -> tuple[str, ...]:
    """Return the entities of a fact in lower case: its subject and, unless the family is in CLOSED, its answer."""
    return (fact.subject.lower(),) if fact.family in CLOSED else (fact.subject.lower(), fact.answer.lower())
