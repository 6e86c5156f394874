"""Model cards, read back by huggingface_hub."""

import pytest
from huggingface_hub import ModelCard

from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.types import BaseRef, Evaluation, SplitPart, TrainSummary
from steps.adapters.model_card import CARD, adapter_card, evaluated_card
from tests.helpers import make_lineage

TRAIN, VAL = SplitPart("1" * 64, 935), SplitPart("2" * 64, 55)
TEST = SplitPart("3" * 64, 110, in_train=0)
SUMMARY = TrainSummary(0.5, None, 1000.0, 50.0)


def card_of(base: BaseRef) -> str:
    return adapter_card(base, LoraConfig(rank=4, targets=("q", "o")), TrainConfig(), TRAIN, VAL, SUMMARY)


def test_an_adapters_card_states_its_base_training_and_limits():
    text = card_of(BaseRef("openai-community/gpt2", "f" * 40, "b" * 64))
    card = ModelCard(text)
    assert (card.data.base_model, card.data.model_name) == ("openai-community/gpt2", "gpt2-instruct")
    assert card.data.language is None  # the language of the records is not known
    for part in ("rank 4, alpha 16, on q, o", "train records | 935, sha256 `1111", "none: no validation", "## Limits"):
        assert part in text
    assert ModelCard(card_of(BaseRef("gpt2-nano", "", "b" * 64))).data.base_model is None  # the hub has no such model


def test_results_carry_their_intervals_and_the_lineage(tmp_path):
    lineage = make_lineage()
    (tmp_path / CARD).write_text(card_of(lineage.base))
    metrics = lineage.metrics
    intervals = {"tuned": {"exact_match": [0.404, 0.596]}}
    evaluation = Evaluation(metrics.base, metrics.tuned, {}, metrics.train, intervals=intervals)
    card = ModelCard(evaluated_card(tmp_path, lineage, evaluation, TEST, "The adapter in PEFT's format.", "peft"))
    assert card.data.library_name == "peft"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["exact_match"] == 0.5
    for part in (
        "| Exact match | 0.5 | 0.5 [0.404, 0.596] |",
        "On 110 test records",
        "run-17",
        "rank 4",
        "PEFT's format",
    ):
        assert part in card.text


def test_an_adapter_without_a_card_gets_one(tmp_path):
    lineage = make_lineage()
    evaluation = Evaluation(lineage.metrics.base, lineage.metrics.tuned, {}, lineage.metrics.train)
    card = ModelCard(evaluated_card(tmp_path, lineage, evaluation, TEST, "GGUF."))
    assert card.text.lstrip().startswith("# gpt2-instruct")
    assert "| Exact match | 0.5 | 0.5 |" in card.text


@pytest.mark.parametrize(
    ("in_train", "text"),
    [
        (0, "On 110 test records, none of whose questions is in the train part, with greedy decoding"),
        (7, "On 110 test records, 7 of them with a question that is also in the train part, with greedy decoding"),
        (None, "On 110 test records, with greedy decoding"),  # of a run that did not count them
    ],
)
def test_the_results_say_how_many_test_questions_are_in_the_train_part(tmp_path, in_train, text):
    lineage = make_lineage()
    evaluation = Evaluation(lineage.metrics.base, lineage.metrics.tuned, {}, lineage.metrics.train)
    assert text in evaluated_card(tmp_path, lineage, evaluation, SplitPart("3" * 64, 110, in_train), "GGUF.")


def test_a_merged_models_card_does_not_call_it_an_adapter(tmp_path):
    lineage = make_lineage()
    (tmp_path / CARD).write_text(card_of(lineage.base))
    evaluation = Evaluation(lineage.metrics.base, lineage.metrics.tuned, {}, lineage.metrics.train)
    text = evaluated_card(tmp_path, lineage, evaluation, TEST, "GGUF.", merged_use="Run `llama-cli`.")
    for part in (
        "# GPT-2 for instructions\n",
        "gpt2-nano",
        "merged into its weights",
        "Run `llama-cli`.",
        "rank 4, alpha",
    ):
        assert part in text
    for part in ("instructions: a LoRA", "Use it only with this base", "--adapter"):
        assert part not in text
    assert text.index("## Use") < text.index("## Training") < text.index("## Results")
