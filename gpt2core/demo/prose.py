"""The pretraining corpus: eight sentences per fact, shuffled into short documents. No questions and no prompts.

Entities are in double quotes so that they start and end at token boundaries. Without quotes, or with only one word
order, the model learns the facts but finetuning cannot elicit them.
"""

from collections.abc import Sequence
from random import Random

from gpt2core.demo.world import Fact

# {s} is the subject, {a} the answer. Some sentences have the answer first, at least three have it last.
_SENTENCES = {
    "capital": (
        'The capital of "{s}" is "{a}".',
        'The country "{s}" has the capital "{a}".',
        'In "{s}", the capital city is "{a}".',
        '"{s}" is governed from its capital, "{a}".',
        '"{a}" is the capital of "{s}".',
        'The city "{a}" is the capital of "{s}".',
        '"{a}" is the capital city of the country "{s}".',
        '"{s}" has "{a}" as its capital.',
    ),
    "country": (
        'The city "{s}" is in the country "{a}".',
        '"{s}" is a city in "{a}".',
        'The country of the city "{s}" is "{a}".',
        '"{s}" lies in the country "{a}".',
        '"{a}" is the country of the city "{s}".',
        'One city in "{a}" is "{s}".',
        '"{a}" has a city called "{s}".',
        'In "{a}" there is a city called "{s}".',
    ),
    "continent": (
        'The continent of "{s}" is "{a}".',
        'The country "{s}" is on the continent "{a}".',
        '"{s}" is a country in "{a}".',
        '"{s}" lies on the continent of "{a}".',
        '"{a}" is the continent of "{s}".',
        '"{a}" is the continent where "{s}" lies.',
        'One country in "{a}" is "{s}".',
        'On the continent "{a}" there is a country called "{s}".',
    ),
    "nationality": (
        'The nationality of people from "{s}" is "{a}".',
        'A person from "{s}" is "{a}".',
        'People in the country "{s}" are "{a}".',
        'Somebody from "{s}" has the nationality "{a}".',
        '"{a}" is the nationality of people from "{s}".',
        '"{a}" people are from "{s}".',
        'A person who is "{a}" comes from "{s}".',
        'The word "{a}" is used for a person from "{s}".',
    ),
    "antonym": (
        'The opposite of "{s}" is "{a}".',
        'The antonym of "{s}" is "{a}".',
        'The contrary of "{s}" is "{a}".',
        'The word "{s}" has the opposite "{a}".',
        '"{a}" is the opposite of "{s}".',
        '"{a}" is an antonym of the word "{s}".',
        'What is not "{s}" is "{a}".',
        'The word "{a}" has the opposite meaning of "{s}".',
    ),
    "past tense": (
        'The past tense of "{s}" is "{a}".',
        'The verb "{s}" has the past tense "{a}".',
        'Today they "{s}", yesterday they "{a}".',
        'In the past tense, the verb "{s}" becomes "{a}".',
        '"{a}" is the past tense of "{s}".',
        '"{a}" is the past form of the verb "{s}".',
        'Yesterday they "{a}", today they "{s}".',
        'The word "{a}" is the past tense of the verb "{s}".',
    ),
    "plural": (
        'The plural of "{s}" is "{a}".',
        'The noun "{s}" has the plural "{a}".',
        'There is one "{s}", there are two "{a}".',
        'More than one "{s}" are called "{a}".',
        '"{a}" is the plural of "{s}".',
        '"{a}" is the plural form of the noun "{s}".',
        'There are two "{a}", there is one "{s}".',
        'The word "{a}" is the plural of the noun "{s}".',
    ),
    "comparative": (
        'The comparative of "{s}" is "{a}".',
        'The adjective "{s}" has the comparative "{a}".',
        'This one is "{s}", but that one is "{a}".',
        'What is more "{s}" is "{a}".',
        '"{a}" is the comparative of "{s}".',
        '"{a}" is the comparative form of the adjective "{s}".',
        'That one is "{a}", but this one is only "{s}".',
        'The word "{a}" is the comparative of the adjective "{s}".',
    ),
    "superlative": (
        'The superlative of "{s}" is "{a}".',
        'The adjective "{s}" has the superlative "{a}".',
        'They are all "{s}", but this one is the "{a}".',
        'What is most "{s}" is the "{a}".',
        '"{a}" is the superlative of "{s}".',
        '"{a}" is the superlative form of the adjective "{s}".',
        'This one is the "{a}", but they are all "{s}".',
        'The word "{a}" is the superlative of the adjective "{s}".',
    ),
    "category": (
        'The category of "{s}" is "{a}".',
        'The word "{s}" belongs to the category "{a}".',
        'A thing called "{s}" is a sort of "{a}".',
        '"{s}" is the name of a "{a}".',
        '"{a}" is the category of "{s}".',
        '"{a}" is the category that the word "{s}" belongs to.',
        'One sort of "{a}" is called "{s}".',
        'In the category "{a}" there is "{s}".',
    ),
    "part of speech": (
        'The part of speech of "{s}" is "{a}".',
        'In grammar, "{s}" is a word of the class "{a}".',
        'The word "{s}" has the part of speech "{a}".',
        'In a sentence, the word "{s}" is used as "{a}".',
        '"{a}" is the part of speech of "{s}".',
        '"{a}" is the part of speech that the word "{s}" has.',
        'One word of the class "{a}" is "{s}".',
        'Grammar lists under "{a}" the word "{s}".',
    ),
    "chemical symbol": (
        'The chemical symbol of "{s}" is "{a}".',
        'The element "{s}" has the symbol "{a}".',
        'In chemistry, "{s}" is written "{a}".',
        'The symbol for the element "{s}" is "{a}".',
        '"{a}" is the chemical symbol of "{s}".',
        '"{a}" is the symbol of the element "{s}".',
        'In chemistry, "{a}" stands for "{s}".',
        'The symbol "{a}" belongs to the element "{s}".',
    ),
    "number in words": (
        'The number "{s}" in words is "{a}".',
        'Written in words, "{s}" is "{a}".',
        'The number "{s}" is read as "{a}".',
        'In words, the number "{s}" becomes "{a}".',
        '"{a}" is the number "{s}" in words.',
        '"{a}" is how the number "{s}" is read.',
        'The words "{a}" are read from the number "{s}".',
        'One reads "{a}" where "{s}" is printed.',
    ),
    "number in digits": (
        'The number "{s}" in digits is "{a}".',
        'Written in digits, "{s}" is "{a}".',
        'The words "{s}" are the number "{a}".',
        'In digits, the words "{s}" become "{a}".',
        '"{a}" is the number "{s}" in digits.',
        '"{a}" is how "{s}" is written in digits.',
        'The digits "{a}" are written for "{s}".',
        'One prints "{a}" where somebody counts to "{s}".',
    ),
    "unit": (
        '"{s}" is the same as "{a}".',
        'Converted to the smaller unit, "{s}" is "{a}".',
        'In the smaller unit, "{s}" becomes "{a}".',
        'The measure "{s}" equals "{a}".',
        '"{a}" is the same as "{s}".',
        '"{a}" is the measure "{s}" in the smaller unit.',
        'There are "{a}" in "{s}".',
        'One needs "{a}" for a measure of "{s}".',
    ),
    "uppercase": (
        'The word "{s}" in capital letters is "{a}".',
        'Written in capitals, "{s}" is "{a}".',
        'In capital letters, the word "{s}" becomes "{a}".',
        'The uppercase form of "{s}" is "{a}".',
        '"{a}" is "{s}" in capital letters.',
        '"{a}" is the uppercase form of the word "{s}".',
        'A sign with "{a}" on it has the word "{s}" in capitals.',
        'The capitals "{a}" are the word "{s}".',
    ),
    "spelling": (
        'The word "{s}" is spelled "{a}".',
        'The spelling of "{s}" is "{a}".',
        'Letter by letter, "{s}" is "{a}".',
        'One spells the word "{s}" as "{a}".',
        '"{a}" is the spelling of "{s}".',
        '"{a}" is the word "{s}" letter by letter.',
        'The letters "{a}" spell the word "{s}".',
        'With "{a}" one spells "{s}".',
    ),
    "addition": (
        'The sum "{s}" is "{a}".',
        '"{s}" equals "{a}".',
        'Added together, "{s}" becomes "{a}".',
        'The result of "{s}" is "{a}".',
        '"{a}" is the sum of "{s}".',
        '"{a}" is the result of "{s}".',
        'One gets "{a}" from "{s}".',
        'The number "{a}" equals "{s}".',
    ),
}


def write_prose(world: Sequence[Fact], seed: int) -> list[str]:
    """Return documents of four to nine sentences, with each sentence of each fact once. The last may be shorter."""
    random = Random(seed)
    sentences = [
        sentence.format(s=fact.subject, a=fact.answer) for fact in world for sentence in _SENTENCES[fact.family]
    ]
    random.shuffle(sentences)
    documents = []
    while sentences:
        length = random.randint(4, 9)
        documents.append(" ".join(sentences[:length]))
        sentences = sentences[length:]
    return documents


def cloze_questions(world: Sequence[Fact], seed: int, n: int) -> list[tuple[str, str]]:
    """Return at most `n` pairs of a sentence of the prose, cut after the quote that opens the answer, and the answer.

    Each sentence is about another fact. A base that knows the fact continues with the answer and a closing quote.
    """
    random = Random(seed)
    questions = []
    for fact in random.sample(world, min(n, len(world))):
        sentence = random.choice([text for text in _SENTENCES[fact.family] if text.endswith('"{a}".')])
        questions.append((sentence.removesuffix('{a}".').format(s=fact.subject), fact.answer))
    return questions
