import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.yaml_files import load_yaml

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abcon fyes0:-é", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdef", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None)
@given(VALUES)
def test_a_dumped_value_is_read_back(value):
    assert load_yaml(yaml.safe_dump(value)) == value


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "Off", "NO", "y"])
def test_only_true_and_false_are_booleans(word):
    assert load_yaml(f"a: {word}") == {"a": word}
    assert load_yaml("[true, False]") == [True, False]


@pytest.mark.parametrize("text", ["010", "1:30", "0x10", "0b1", "1_000", "2024-01-01"])
def test_other_numbers_than_decimal_ones_and_dates_are_text(text):
    assert load_yaml(f"a: {text}") == {"a": text}
    assert load_yaml("[0, -7, +8, 1.5e-3]") == [0, -7, 8, 0.0015]


BOMB = "b0: &b0 {k: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "reason"), [(BOMB, "aliases expand"), ("a: &a [*a]", "aliases expand"), ("[" * 5000, "nested too deeply")]
)
def test_a_document_that_grows_without_bound_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        load_yaml(text)
    assert len(str(error.value)) < 200


def test_a_repeated_key_is_reported_with_both_lines():
    with pytest.raises(ValueError, match=r"also in line 1[\s\S]*line 3"):
        load_yaml("a: 1\nb: 2\na: 3")


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b: {a: 1, c: 2, a: 3}", "- {a: 1, 'a': 2}"])
def test_a_repeated_key_is_an_error_with_its_place(text):
    with pytest.raises(ValueError, match=r"the key 'a' is repeated[\s\S]*line \d+, column \d+"):
        load_yaml(text)


def test_a_merged_key_may_be_overridden():
    assert load_yaml("base: &b {a: 1, c: 2}\nown: {<<: *b, a: 3}")["own"] == {"a": 3, "c": 2}


@pytest.mark.parametrize("text", ["a: [1,", "a: !!python/object/apply:os.system [ls]", "\t- x"])
def test_invalid_or_unsafe_yaml_is_an_error(text):
    with pytest.raises(ValueError, match="line 1"):
        load_yaml(text)
