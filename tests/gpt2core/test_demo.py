"""The demo data: facts are true and stated often enough in prose; records do not leak between the parts of a split."""

import re
from collections import Counter, defaultdict

import pytest

from gpt2core.data import check_records, split_records
from gpt2core.demo.prose import cloze_questions, write_prose
from gpt2core.demo.records import HARD, write_records
from gpt2core.demo.tables import (
    ADJECTIVES,
    ANTONYMS,
    CATEGORIES,
    COUNTRIES,
    ELEMENTS,
    NOUNS,
    PARTS_OF_SPEECH,
    VERBS,
    WORDS,
)
from gpt2core.demo.world import make_world

SEEDS = (0, 123)
FEW_ANSWERS = {"continent", "category", "part of speech"}  # families whose answers many facts share


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def world(seed):
    return make_world(seed)


@pytest.fixture(scope="module")
def documents(world, seed):
    return write_prose(world, seed)


@pytest.fixture(scope="module")
def sentences(documents):
    return [sentence for document in documents for sentence in re.split(r"(?<=\.) ", document)]


@pytest.fixture(scope="module")
def records(world, seed):
    return write_records(world, seed)


def test_the_same_seed_gives_the_same_world_prose_records_and_questions(world, documents, records, seed):
    again = make_world(seed)
    assert again == world
    assert write_prose(again, seed) == documents
    assert write_records(again, seed) == records
    assert cloze_questions(again, seed, 50) == cloze_questions(world, seed, 50)


def test_two_seeds_make_different_worlds():
    one, other = set(make_world(0)), set(make_world(1))
    assert len(one & other) < 0.9 * len(one)


def test_two_seeds_write_one_world_differently():
    world = make_world(0)
    assert write_prose(world, 0) != write_prose(world, 1)
    assert write_records(world, 0) != write_records(world, 1)
    assert cloze_questions(world, 0, 50) != cloze_questions(world, 1, 50)


def test_the_facts_of_a_limited_world_are_balanced_over_the_families(world, seed):
    small = make_world(seed, n_facts=100)
    counts = Counter(fact.family for fact in small)
    assert len(small) == 100
    assert counts.keys() == {fact.family for fact in world}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {(fact.family, fact.subject) for fact in small} <= {(fact.family, fact.subject) for fact in world}


@pytest.mark.parametrize("n_facts", [0, 17, 100_000])
def test_an_impossible_world_size_is_refused_with_the_limits(n_facts):
    with pytest.raises(ValueError, match=rf"n_facts={n_facts} is not between 18.* and 9\d\d"):
        make_world(0, n_facts)


def test_the_smallest_world_has_prose_and_records():
    world = make_world(0, n_facts=18)
    assert write_prose(world, 0)
    assert len(write_records(world, 0)) == 18 * 6  # six records per fact


def test_there_are_enough_families_and_facts(world):
    assert len({fact.family for fact in world}) >= 14
    assert 750 <= len(world) <= 1000


def test_no_family_has_a_subject_twice(world):
    assert max(Counter((fact.family, fact.subject) for fact in world).values()) == 1


KNOWN = [
    ("capital", "France", "Paris"),
    ("country", "Mumbai", "India"),
    ("continent", "Kenya", "Africa"),
    ("nationality", "Poland", "Polish"),
    ("antonym", "cold", "hot"),
    ("past tense", "sing", "sang"),
    ("plural", "knife", "knives"),
    ("comparative", "easy", "easier"),
    ("superlative", "thin", "thinnest"),
    ("category", "trout", "fish"),
    ("part of speech", "seldom", "adverb"),
    ("chemical symbol", "iron", "Fe"),
    ("number in words", "17", "seventeen"),
    ("number in words", "40", "forty"),
    ("number in digits", "eighty-four", "84"),
    ("unit", "3 weeks", "21 days"),
    ("unit", "5 kilometers", "5000 meters"),
    ("uppercase", "river", "RIVER"),
    ("spelling", "queen", "q-u-e-e-n"),
]


def test_known_facts_are_true_in_every_world_that_has_them():
    facts = {fact for seed in range(12) for fact in make_world(seed)}
    for family, subject, answer in KNOWN:
        assert {f.answer for f in facts if (f.family, f.subject) == (family, subject)} == {answer}, (family, subject)


def test_sums_are_correct(world):
    sums = [fact for fact in world if fact.family == "addition"]
    assert sums
    for fact in sums:
        assert sum(map(int, fact.subject.split(" + "))) == int(fact.answer), fact


def test_no_word_is_in_two_tables():
    tables = {
        "countries": [cell for *cells, _, nationality in COUNTRIES for cell in (*cells, nationality)],
        "verbs": [cell for row in VERBS for cell in row],
        "nouns": [cell for row in NOUNS for cell in row],
        "adjectives": [a for a, _ in {*ADJECTIVES} | {(word, "") for pair in ANTONYMS for word in pair}],
        "categories": [cell for row in CATEGORIES for cell in row],
        "parts of speech": [word for _, *words in PARTS_OF_SPEECH for word in words],
        "elements": [cell for row in ELEMENTS for cell in row],
        "words": list(WORDS),
    }
    where: dict[str, set[str]] = defaultdict(set)
    for table, words in tables.items():
        for word in words:
            where[word.lower()].add(table)
    assert {word: tables for word, tables in where.items() if len(tables) > 1} == {}


def test_every_fact_has_at_least_six_different_sentences(world, sentences):
    told: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for sentence in sentences:
        told[tuple(sorted(quoted(sentence)))].add(sentence)
    few = {fact: told[key] for fact in world if len(told[key := tuple(sorted((fact.subject, fact.answer)))]) < 6}
    assert few == {}


def test_every_sentence_states_a_fact_of_the_world(world, sentences):
    facts = {tuple(sorted((fact.subject, fact.answer))) for fact in world}
    assert [sentence for sentence in sentences if tuple(sorted(quoted(sentence))) not in facts] == []


def test_every_fact_has_sentences_with_the_answer_first_and_last(world, sentences):
    orders = {tuple(quoted(sentence)) for sentence in sentences}
    assert all({(fact.subject, fact.answer), (fact.answer, fact.subject)} <= orders for fact in world)


def test_documents_have_four_to_nine_sentences(documents):
    lengths = [len(re.split(r"(?<=\.) ", document)) for document in documents]
    assert set(lengths[:-1]) == set(range(4, 10))
    assert 1 <= lengths[-1] <= 9


def test_the_prose_has_no_questions_and_no_prompts(documents):
    text = "\n".join(documents)
    assert not re.search(r"\?|###|Instruction|Response|Answer", text)


def test_no_instruction_is_found_in_the_prose(documents, records):
    text = "\n".join(documents)
    assert [record for record in records if record["instruction"] in text] == []


def test_cloze_questions_end_where_the_answer_starts(world, sentences, seed):
    told = set(sentences)
    for prefix, answer in cloze_questions(world, seed, 300):
        assert prefix.endswith('"')
        assert f'{prefix}{answer}".' in told


def test_cloze_questions_are_about_different_facts(world, seed):
    questions = cloze_questions(world, seed, 300)
    assert len(set(questions)) == len(questions) == 300


def test_there_are_exactly_1100_well_formed_records(records):
    assert len(check_records(records)) == 1100
    assert all(record.keys() == {"instruction", "input", "output", "group", "family"} for record in records)


def test_no_two_records_have_the_same_question(records):
    assert len({(record["instruction"], record["input"]) for record in records}) == len(records)


def test_every_answer_of_a_record_is_in_the_prose(records, sentences):
    told = {tuple(sorted(quoted(sentence))) for sentence in sentences}
    untold = [record for record in records if tuple(sorted((subject_of(record), record["output"]))) not in told]
    assert untold == []


def test_the_subject_is_bare_in_the_input_or_quoted_in_the_instruction(records, world):
    subjects = {fact.subject for fact in world}
    for record in records:
        assert record["input"] in subjects if record["input"] else quoted(record["instruction"])[0] in subjects, record
        assert not (record["input"] and quoted(record["instruction"])), record


def test_records_of_a_family_use_four_instructions_with_an_input_and_two_without(records):
    forms: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for record in records:
        forms[record["family"]].add((re.sub('"[^"]+"', "{}", record["instruction"]), bool(record["input"])))
    for family, used in forms.items():
        assert Counter(has_input for _, has_input in used) == {True: 4, False: 2}, family


def test_hard_families_are_at_most_8_percent_of_the_records(records):
    assert 0 < sum(record["family"] in HARD for record in records) <= 0.08 * len(records)


def test_records_of_two_groups_share_no_entity(records):
    groups: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for entity in entities_of(record):
            groups[entity].add(record["group"])
    assert {entity: names for entity, names in groups.items() if len(names) > 1} == {}


def test_no_subject_occurs_as_words_in_a_record_of_another_group(records):
    """In any role: as part of an answer, or in the wording of an instruction."""
    group = {subject_of(record).lower(): record["group"] for record in records}
    longest_first = sorted(group, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])(?=({'|'.join(map(re.escape, longest_first))})(?![\w-]))")
    leaks = [
        (subject, record)
        for record in records
        for subject in pattern.findall(" | ".join((record["instruction"], record["input"], record["output"])).lower())
        if group[subject] != record["group"]
    ]
    assert leaks == []


def test_no_number_is_in_records_of_two_groups_unless_it_is_in_sums_or_quantities(records):
    groups: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for number in re.findall(r"\d+", " ".join((record["instruction"], record["input"], record["output"]))):
            groups[number].add(record["group"])
    for record in records:
        if record["family"] in ("number in words", "number in digits"):
            [number] = re.findall(r"\d+", " ".join((record["instruction"], record["input"], record["output"])))
            assert groups[number] == {record["group"]}, record


def test_answers_from_a_closed_set_do_not_join_groups(records):
    groups: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record["family"] in FEW_ANSWERS:
            groups[record["output"]].add(record["group"])
    assert min(len(groups[answer]) for answer in ("Europe", "Africa", "noun", "verb", "adjective", "adverb")) > 5


def test_groups_are_small(records):
    sizes = Counter(record["group"] for record in records)
    assert max(sizes.values()) <= 12
    assert sum(size <= 8 for size in sizes.values()) > 0.97 * len(sizes)


def test_the_facts_of_a_country_are_one_group(world):
    groups: dict[str, list[str]] = defaultdict(list)
    for fact in world:
        groups[fact.group].append(fact.family)
    of_country = [families for families in groups.values() if "capital" in families]
    assert all(sorted(families) == ["capital", "continent", "country", "nationality"] for families in of_country)


def test_an_adjective_its_opposite_and_their_forms_are_one_group():
    for seed in SEEDS:
        group = {(fact.family, fact.subject): fact.group for fact in make_world(seed)}
        pairs = [key for key in group if key[0] == "antonym" and ("comparative", key[1]) in group]
        assert pairs
        for key in pairs:
            assert group[key] == group["comparative", key[1]] == group["superlative", key[1]]


def test_a_split_by_groups_has_the_requested_sizes_and_every_family_in_the_test_part(records, seed):
    split = split_records(records, seed)
    assert [len(part) for part in split] == [935, 55, 110]
    families = Counter(record["family"] for record in split.test)
    assert families.keys() == {record["family"] for record in records}
    assert all(4 <= families[family] <= 9 for family in families if family not in HARD), families


def quoted(text: str) -> list[str]:
    return re.findall('"([^"]+)"', text)


def subject_of(record: dict[str, str]) -> str:
    return record["input"] or quoted(record["instruction"])[0]


def entities_of(record: dict[str, str]) -> set[str]:
    answer = set() if record["family"] in FEW_ANSWERS else {record["output"].lower()}
    return {subject_of(record).lower()} | answer
