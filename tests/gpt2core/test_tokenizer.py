"""The byte-level BPE against the tokenizers library on the same files, for all kinds of text."""

import json
import os
import re
import shutil
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2TokenizerFast

from gpt2core.tokenizer import END_OF_TEXT, load_tokenizer, read_token_ids, read_vocabulary

PIECES = [
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "I'M", "don't", "’s", "''s", "'s's"),
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u2003", "\u3000", "\u200b", "\u0085", "\u2028"),
    *("the", " the", "moon", "Straße", "Köln", "東京", "日本語", "नमस्ते", "Привет", "مرحبا", "e\u0301", "ﬁ", "ǆ"),
    *("🙂", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "\ufe0f", "\U0001d54f", "\ufffd", "\ufeff"),
    *("1969", " 21.5", "½", "²", "Ⅷ", "٣", "1,000"),
    *("\x00", "\x07", "\x1b[0m", "\x7f", "\x1c", "\x1f"),
    *(END_OF_TEXT, "<|endoftext", "|>", "<|im_start|>", "<s>", "[CLS]", "<|endoftext|><|endoftext|>"),
    *("### Response:", "!!!", "...", "--", "_", "a_b", "(", ")", "#", "$5"),
]
# lone surrogates are not text: UTF-8 cannot encode them
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.text(" \n\t'abemnoprstv0123.", max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"]), max_size=4))).map(
        "".join
    ),
)
MANY = settings(max_examples=250)
EXAMPLES = ["", " ", "\n", "  a", "a  ", "a \n b", "we'll've", "x" * 50, " " * 30, END_OF_TEXT, "e\u0301 \u0000"]


@pytest.fixture(scope="module")
def ours(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def theirs(tokenizer_dir):
    return ByteLevelBPETokenizer(str(tokenizer_dir / "vocab.json"), str(tokenizer_dir / "merges.txt"))


@MANY
@given(TEXTS)
@example("".join(PIECES))
@example(" ".join(PIECES))
def test_ids_are_those_of_the_tokenizers_library_and_decode_to_the_text(ours, theirs, text):
    ids = ours.encode_ordinary(text)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids) == text
    assert all(0 <= token < ours.n_vocab and token != ours.eot_token for token in ids)


def test_ids_of_special_cases_are_those_of_the_tokenizers_library(ours, theirs):
    for text in [*EXAMPLES, *PIECES]:
        assert ours.encode_ordinary(text) == theirs.encode(text).ids, ascii(text)


def test_a_million_blanks_are_encoded(ours, theirs):
    assert ours.encode_ordinary(" " * 90_000 + "a") == theirs.encode(" " * 90_000 + "a").ids
    for text in (" " * 2_000_000 + "a", "\n" * 2_000_000 + "a", " " * 2_000_000):  # tiktoken#15, #400
        assert ours.decode(ours.encode_ordinary(text)) == text


def test_decoding_is_that_of_the_tokenizers_library_for_every_token(ours, theirs):
    for token in range(ours.n_vocab - 1):
        assert ours.decode([token]) == theirs.decode([token])


def test_the_tokenizer_has_tokens_longer_than_a_byte(ours):
    text = "The quick brown fox jumps over the lazy dog"
    assert len(ours.encode_ordinary(text)) < 0.7 * len(text)  # otherwise the comparisons would not exercise the merges


def test_end_of_text_has_the_last_id_of_the_vocabulary(ours, tokenizer_dir):
    vocab = json.loads((tokenizer_dir / "vocab.json").read_text(encoding="utf-8"))
    assert ours.n_vocab == len(vocab) == 400
    assert ours.eot_token == vocab[END_OF_TEXT] == 399
    assert ours.decode([ours.eot_token]) == END_OF_TEXT


def test_end_of_text_spelled_by_a_user_is_plain_text(ours):
    ids = ours.encode_ordinary(f"a{END_OF_TEXT}b")
    assert ours.eot_token not in ids
    assert ours.decode(ids) == f"a{END_OF_TEXT}b"


def test_transformers_encodes_the_same_ids_from_the_same_files(ours, tokenizer_dir):
    reference = GPT2TokenizerFast.from_pretrained(str(tokenizer_dir))
    for text in PIECES:
        if END_OF_TEXT not in text:  # transformers encodes it as a special token
            assert ours.encode_ordinary(text) == reference(text)["input_ids"]
    assert reference.eos_token_id == ours.eot_token


# --------------------------------------------------------------------------------------------------------- broken files


@pytest.fixture
def broken(tokenizer_dir, tmp_path):
    return shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")


def test_windows_line_ends_and_a_missing_version_line_are_accepted(broken, ours):
    file = broken / "merges.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_bytes("\r\n".join(lines[1:]).encode())
    text = "The quick brown fox, we'll see"
    assert load_tokenizer(broken).encode_ordinary(text) == ours.encode_ordinary(text)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_file_that_is_not_utf8_is_named(broken, name):
    (broken / name).write_bytes((broken / name).read_bytes()[:50] + b"\xff")
    with pytest.raises(ValueError, match=f"{broken / name} is not UTF-8 text"):
        load_tokenizer(broken)


def test_byte_order_marks_are_ignored(broken, ours):
    for name in ("vocab.json", "merges.txt"):
        (broken / name).write_bytes(b"\xef\xbb\xbf" + (broken / name).read_bytes())
    text = "The quick brown fox, we'll see"
    assert load_tokenizer(broken).encode_ordinary(text) == ours.encode_ordinary(text)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(broken, name):
    (broken / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{broken / name} does not exist"):
        load_tokenizer(broken)


def edit_vocab(directory, edit):
    file = directory / "vocab.json"
    vocab = json.loads(file.read_text(encoding="utf-8"))
    edit(vocab)
    file.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")


def edit_merges(directory, edit):
    file = directory / "merges.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    edit(lines)
    file.write_text("\n".join(lines), encoding="utf-8")


def swap(lines):
    lines[5], lines[60] = lines[60], lines[5]


MISMATCHES = {
    "no end of text": lambda d: edit_vocab(d, lambda v: v.pop(END_OF_TEXT)),
    "a byte missing": lambda d: edit_vocab(d, lambda v: v.pop("Ġ")),
    "a token missing": lambda d: edit_vocab(d, lambda v: v.pop(list(v)[300])),
    "an id that is not a number": lambda d: edit_vocab(d, lambda v: v.update({"Ġ": "5"})),
    "a hole in the ids": lambda d: edit_vocab(d, lambda v: v.update({END_OF_TEXT: 777})),
    "a token too many": lambda d: edit_vocab(d, lambda v: v.update({"qzqz": 400})),
    "a merge missing": lambda d: edit_merges(d, lambda lines: lines.pop(10)),
    "a foreign merge": lambda d: edit_merges(d, lambda lines: lines.append("q zq")),
    "merges in another order": lambda d: edit_merges(d, swap),
    "merges without their tokens": lambda d: edit_merges(d, list.clear),
}


@pytest.mark.parametrize("damage", MISMATCHES.values(), ids=MISMATCHES)
def test_files_that_do_not_match_are_refused(broken, damage):
    damage(broken)
    with pytest.raises(ValueError, match=str(broken)):
        load_tokenizer(broken)


def test_another_end_of_text_is_refused_with_the_reason(broken):
    edit_vocab(broken, lambda vocab: vocab.update({"</s>": vocab.pop(END_OF_TEXT)}))
    with pytest.raises(
        ValueError, match=r"vocab.json has no '<\|endoftext\|>', .* other ends of text, such as </s>, are"
    ):
        load_tokenizer(broken)


def test_a_special_token_in_vocab_json_is_refused_with_the_way_out(broken):
    edit_vocab(broken, lambda vocab: vocab.update({"<pad>": len(vocab)}))
    with pytest.raises(ValueError, match=r"no merge makes the token '<pad>'.*add_special_tokens"):
        load_tokenizer(broken)
    tokenizer = GPT2TokenizerFast.from_pretrained(broken)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(broken)
    text = "The quick <pad> fox"
    expected = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert load_tokenizer(broken).encode_ordinary(text) == expected


def test_a_tokenizer_trained_without_all_bytes_is_refused_with_the_way_out(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for alphabet in ([], pre_tokenizers.ByteLevel.alphabet()):
        trainer = trainers.BpeTrainer(special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(["abab cd"], trainer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        if alphabet:
            assert load_tokenizer(tmp_path).n_vocab > 256
        else:
            with pytest.raises(ValueError, match=r"lacks 251 of the 256 bytes.*ByteLevel.alphabet\(\)"):
                load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_vocabulary_that_is_not_a_json_object_is_refused_with_its_name(broken, content):
    (broken / "vocab.json").write_text(content)
    with pytest.raises(ValueError, match=r"vocab.json"):
        load_tokenizer(broken)


@pytest.mark.parametrize("name", ["gpt5", "no/such/directory"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"no tokenizer '{name}': neither a directory nor known to tiktoken"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["gpt2-medium", "openai-community/gpt2-xl"])
def test_the_name_of_another_size_is_refused_with_the_name_of_their_tokenizer(name):
    with pytest.raises(ValueError, match=r"; the tokenizer of every published size is 'gpt2'$"):
        load_tokenizer(name)


def test_a_tokenizer_that_cannot_be_downloaded_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(OSError, match=r"'gpt2' cannot be downloaded; set TIKTOKEN_CACHE_DIR .* \(ProxyError\)"):
        load_tokenizer("gpt2")


# ------------------------------------------------------------------------------------------------------- tokenizer.json


@pytest.fixture
def one_file(tokenizer_dir, tmp_path):
    """A directory with tokenizer.json alone, as transformers 5 saves it, and a padding token."""
    reference = GPT2TokenizerFast.from_pretrained(str(tokenizer_dir))
    reference.add_special_tokens({"pad_token": "<pad>"})
    reference.save_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / "vocab.json").exists()
    return tmp_path / "one"


def test_tokenizer_json_alone_gives_the_same_ids(one_file, ours):
    alone = load_tokenizer(one_file)
    for text in [*EXAMPLES, *PIECES, "<pad>"]:
        assert alone.encode_ordinary(text) == ours.encode_ordinary(text), ascii(text)
    assert (alone.eot_token, alone.n_vocab, len(read_token_ids(one_file))) == (ours.eot_token, 401, 401)
    assert alone.decode([400]) == "<pad>"


def test_words_added_to_the_vocabulary_are_tokens_in_any_text_as_in_transformers(one_file):
    theirs = GPT2TokenizerFast.from_pretrained(str(one_file))
    theirs.add_tokens(["<user>", "gene", "générale"])
    theirs.save_pretrained(one_file)
    ours = load_tokenizer(one_file)
    for text in ("<user> a gene", "genes<user><user>", "la générale", "x\n<user>\n", "<use", ""):
        assert ours.encode_ordinary(text) == theirs(text)["input_ids"], ascii(text)
    assert 400 not in ours.encode_ordinary("<pad>")  # special tokens stay plain text
    edit_tokenizer(one_file, lambda content: [token.update(special=False) for token in content["added_tokens"]])
    assert ours.eot_token not in load_tokenizer(one_file).encode_ordinary(END_OF_TEXT)  # and this one always


def save_with(reference, directory, words):
    reference.add_tokens(words)
    reference.save_pretrained(directory)
    return load_tokenizer(directory), reference


WORDS = {
    "prefixes": (["TP53", "TP53BP1", "TP", "w1", "w10"], ["TP53BP1", "TP53BP", "w1 w10 w100", "TPTP53"]),
    "lstrip": ([AddedToken("<a>", lstrip=True)], ["x <a> y", "x\u2003\n <a><a>", "<a>", " <a>", "x\x1f<a>"]),
    "rstrip": ([AddedToken("<a>", rstrip=True), " b"], ["x <a> \n y", "<a>  <a>", "<a> b", "<a>\x1c", "x<a>"]),
    "both": ([AddedToken("<a>", lstrip=True, rstrip=True)], ["x <a> <a> y", " <a>\u3000", "<a>"]),
    "single word": (
        [AddedToken("gene", single_word=True), "<a>"],
        [
            "genes",
            "a gene.",
            "gene_",
            "xgene gene gene",
            "gene<a>gene",
            "gene\u0301",
            "gene²",
            "geneⓐ",
            "gene\u200d",
            "é gene",
        ],
    ),
    "not normalized": ([AddedToken("ab", normalized=False), AddedToken("cab", normalized=True)], ["cab", "cabcab ab"]),
    "made by merges": (["the", "T", "é"], ["other the then", "TheT", "café"]),
    "whitespace": (["\n\n", "    ", " foo"], ["a\n\n\nb     c", "a foo foo"]),
}


@pytest.mark.parametrize(("words", "texts"), WORDS.values(), ids=WORDS)
def test_added_words_are_found_as_transformers_finds_them(tokenizer_dir, tmp_path, words, texts):
    ours, theirs = save_with(GPT2TokenizerFast.from_pretrained(str(tokenizer_dir)), tmp_path / "words", words)
    for text in texts:
        assert ours.encode_ordinary(text) == theirs(text)["input_ids"], ascii(text)


def test_any_text_with_added_words_has_the_ids_of_transformers(tokenizer_dir, tmp_path):
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    words = [
        AddedToken(word, **{flag: bool(i >> bit & 1) for bit, flag in enumerate(flags)})
        for i, word in enumerate(["a", "ab", "abc", "b", "bca", " a", "c ", "cc", "é", "\n", "ba", "cab", "b b", "ca"])
    ]
    ours, theirs = save_with(GPT2TokenizerFast.from_pretrained(str(tokenizer_dir)), tmp_path / "words", words)

    @MANY
    @given(st.text("abc é\n\u3000.", max_size=20))
    def compare(text):
        assert ours.encode_ordinary(text) == theirs(text)["input_ids"]

    compare()


def test_every_character_beside_a_single_word_counts_as_in_the_tokenizers_library(tokenizer_dir, tmp_path):
    word = AddedToken("Q#", single_word=True)
    ours, theirs = save_with(GPT2TokenizerFast.from_pretrained(str(tokenizer_dir)), tmp_path / "words", [word])
    id, known = read_vocabulary(tmp_path / "words").added["Q#"].id, [*range(0xD800), *range(0xE000, 0x20000)]
    texts = [f"Q#{chr(code)}" for code in known if unicodedata.category(chr(code)) != "Cn"]  # of Python's Unicode
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert (id in ours.encode_ordinary(text)) == (id in ids), ascii(text)


def test_text_with_ten_thousand_added_words_is_encoded_at_once(tokenizer_dir, tmp_path):
    words = [f"{prefix}{i}" for prefix in ("gene", "GENE") for i in range(5_000)]
    ours, theirs = save_with(GPT2TokenizerFast.from_pretrained(str(tokenizer_dir)), tmp_path / "words", words)
    text = "gene1 gene12 GENE4999 genes GENE5000 gene04" * 1000  # plain alternatives would take seconds
    assert ours.encode_ordinary(text) == theirs(text)["input_ids"]


def test_hundreds_of_words_that_begin_each_other_are_found(tokenizer_dir, tmp_path):
    words = [" " * n for n in range(2, 600)]
    ours, theirs = save_with(GPT2TokenizerFast.from_pretrained(str(tokenizer_dir)), tmp_path / "words", words)
    for text in (" " * 70 + "a  b", " " * 599 + "a", " " * 1000):
        assert ours.encode_ordinary(text) == theirs(text)["input_ids"]


def test_a_special_token_that_merges_make_stays_an_ordinary_one(tokenizer_dir, tmp_path, ours):
    reference = GPT2TokenizerFast.from_pretrained(str(tokenizer_dir))
    reference.add_special_tokens({"pad_token": "!"})  # common for GPT-2, which has no padding token
    reference.save_pretrained(tmp_path / "padded")
    padded = load_tokenizer(tmp_path / "padded")
    for text in ("Stop!", "!", "a!b !!!"):
        assert padded.encode_ordinary(text) == ours.encode_ordinary(text)
    assert padded.n_vocab == ours.n_vocab == 400


def test_an_id_of_an_added_token_that_differs_from_the_vocabulary_is_refused(one_file):
    edit_tokenizer(one_file, lambda content: content["added_tokens"][1].update(content="!"))
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged: '!' is 400 in added_tokens and \d+ in the"):
        load_tokenizer(one_file)


def test_the_files_of_transformers_4_are_read_with_the_added_words(one_file, tokenizer_dir):
    ours, _ = save_with(GPT2TokenizerFast.from_pretrained(str(one_file)), one_file, ["<user>"])
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_dir / name, one_file)
    (one_file / "added_tokens.json").write_text('{"<pad>": 400, "<user>": 401}')
    both = load_tokenizer(one_file)
    text = "a <user> b"
    assert (
        both.encode_ordinary(text)
        == ours.encode_ordinary(text)
        == AutoTokenizer.from_pretrained(one_file)(text)["input_ids"]
    )
    assert (both.n_vocab, len(read_token_ids(one_file)), both.decode([401])) == (402, 402, "<user>")


def test_added_tokens_without_tokenizer_json_are_refused_with_the_way_out(broken):
    (broken / "added_tokens.json").write_text('{"<user>": 400}')
    for read in (load_tokenizer, read_token_ids):
        with pytest.raises(ValueError, match=r"added_tokens.json adds '<user>' to vocab.json.*save_pretrained"):
            read(broken)
    (broken / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    AutoTokenizer.from_pretrained(broken).save_pretrained(broken)
    assert 400 in load_tokenizer(broken).encode_ordinary("a <user> b")


def test_a_post_processor_that_adds_tokens_is_refused(one_file, ours):
    GPT2TokenizerFast.from_pretrained(str(one_file), add_bos_token=True).save_pretrained(one_file)
    with pytest.raises(ValueError, match=r'post_processor is a TemplateProcessing.*Set "post_processor" to null'):
        load_tokenizer(one_file)
    for harmless in (None, {"type": "ByteLevel", "trim_offsets": True}):
        edit_tokenizer(one_file, lambda content, value=harmless: content.update(post_processor=value))
        assert load_tokenizer(one_file).encode_ordinary("A fox") == ours.encode_ordinary("A fox")


def test_merges_of_tokenizer_json_may_be_strings(one_file, ours):
    edit_tokenizer(
        one_file, lambda content: content["model"].update(merges=list(map(" ".join, content["model"]["merges"])))
    )
    assert load_tokenizer(one_file).encode_ordinary("The quick brown fox") == ours.encode_ordinary(
        "The quick brown fox"
    )


def edit_tokenizer(directory, edit):
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "is not a GPT-2 tokenizer"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "is not a GPT-2 tokenizer"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "is not a GPT-2 tokenizer"),
        (lambda c: c.update(added_tokens=[]) or c["model"]["vocab"].pop(END_OF_TEXT), "has no '<|endoftext|>'"),
        (lambda c: c["model"].pop("vocab"), "is damaged: KeyError: 'vocab'"),
        (lambda c: c["model"]["vocab"].update({"Ġ": -1}), "is damaged"),
        (lambda c: c["added_tokens"][1].update(id=999), "do not have the ids 0 to 400, each once"),
    ],
)
def test_another_tokenizer_json_is_refused_with_its_name(one_file, change, message):
    edit_tokenizer(one_file, change)
    with pytest.raises(ValueError, match=f"tokenizer.json.*{re.escape(message)}"):
        load_tokenizer(one_file)


def test_ids_are_read_without_loading_the_tokenizer(tokenizer_dir, tmp_path):
    assert sorted(read_token_ids(tokenizer_dir).values()) == list(range(400))
    assert read_token_ids(tmp_path) is None


# ------------------------------------------------------------------------------------------------------ GPT-2's own BPE


@pytest.fixture(scope="module")
def gpt2():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and a test does not download GPT-2's vocabulary")
    return load_tokenizer("gpt2")


def test_gpt2_is_known_by_name(gpt2):
    assert gpt2.n_vocab == 50257
    assert gpt2.eot_token == 50256
    assert gpt2.encode_ordinary("Hello world, it's me") == [15496, 995, 11, 340, 338, 502]
    assert gpt2.eot_token not in gpt2.encode_ordinary(END_OF_TEXT)


@pytest.fixture(scope="module")
def gpt2_files(gpt2, tmp_path_factory):
    """vocab.json and merges.txt of GPT-2, derived from tiktoken's ranks: the two tokens that each token merges."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) for byte in visible}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letter)}
    ranks = gpt2._mergeable_ranks

    def spell(token):
        return "".join(letter[byte] for byte in token)

    def halves(token, rank):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            below = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
            _, i = min(below)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    directory = tmp_path_factory.mktemp("gpt2-files")
    vocab = {spell(token): rank for token, rank in ranks.items()} | {END_OF_TEXT: 50256}
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [
        " ".join(map(spell, halves(token, rank)))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
    ]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return directory


def test_files_of_gpt2_give_the_ids_of_gpt2_and_of_the_tokenizers_library(gpt2, gpt2_files):
    ours = load_tokenizer(gpt2_files)
    theirs = ByteLevelBPETokenizer(str(gpt2_files / "vocab.json"), str(gpt2_files / "merges.txt"))
    assert (ours.n_vocab, ours.eot_token) == (50257, 50256)

    @MANY
    @given(TEXTS)
    @example("".join(PIECES))
    def compare(text):
        ids = gpt2.encode_ordinary(text)
        assert ours.encode_ordinary(text) == ids
        assert theirs.encode(text).ids == ids
        assert ours.decode(ids) == text

    compare()
