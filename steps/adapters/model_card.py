"""Model cards: README.md as the Hugging Face hub reads it, by huggingface_hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.metrics import METRICS
from gpt2core.types import NAME, BaseRef, Evaluation, Lineage, SplitPart, TrainSummary

CARD = "README.md"
TRAINING = "\n## Training\n"  # in model_card.md.j2, begins what is also true of the merged model
HERE = Path(__file__).parent


def adapter_card(
    base: BaseRef,
    lora: LoraConfig,
    train: TrainConfig,
    train_data: SplitPart,
    val_data: SplitPart,
    summary: TrainSummary,
) -> str:
    """Render the card of an adapter that is not evaluated yet: base, training and limits.

    It is part of the adapter's sha256, so it contains nothing that differs between identical runs.
    """
    about = ModelCardData(
        pipeline_tag="text-generation",
        tags=["gpt2", "lora"],
        base_model=base.name if base.revision else None,  # a repository of the hub
        model_name=NAME,
    )
    card = ModelCard.from_template(
        about,
        template_path=str(HERE / "model_card.md.j2"),
        base=base,
        lora=lora,
        train=train,
        train_data=train_data,
        val_data=val_data,
        summary=summary,
    )
    return str(card).rstrip() + "\n"


def evaluated_card(
    adapter: Path,
    lineage: Lineage,
    evaluation: Evaluation,
    test: SplitPart,
    content: str,
    library: str = "",
    merged_use: str = "",
) -> str:
    """Add results and lineage to the card of an adapter, for a directory with another form of the model.

    Args:
        adapter: directory of the adapter. An adapter of PEFT or of an older version may have no card or another card.
        test: the test part of the data.
        content: description of the directory's content.
        library: library that loads the model ("transformers", "peft"); the hub shows it. "": no library.
        merged_use: how to use a directory with the merged model, instead of the adapter's title and use. "": it has the
            adapter.
    """
    file = adapter / CARD
    card = ModelCard(file.read_text(encoding="utf-8") if file.is_file() else f"# {NAME}\n", ignore_metadata_errors=True)
    about = card.data
    assert isinstance(about, ModelCardData)
    about.model_name = NAME
    about.library_name = library or None
    about.eval_results = _results_of_hub(evaluation, f"{test.records} records, sha256 {lineage.data['test'][:12]}")
    if merged_use:
        _, training, rest = card.text.partition(TRAINING)
        card.text = f"{_render('model_card_merged.md.j2', base=lineage.base, use=merged_use)}\n{training}{rest}"
    rows = {
        metric.heading: [_score(evaluation, side, name) for side in ("base", "tuned")]
        for name, metric in METRICS.items()
    }
    results = _render("model_card_results.md.j2", content=content, test=test, rows=rows, lineage=lineage)
    card.text = f"{card.text.rstrip()}\n\n{results}\n"
    return str(card)


def _results_of_hub(evaluation: Evaluation, data: str) -> list[EvalResult]:
    """Return the tuned model's scores in the form that the hub shows; `data` describes the test split."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="instructions",
            dataset_name=f"test split, {data}",
            metric_type=name,
            metric_name=metric.heading,
            metric_value=round(getattr(evaluation.tuned, name), 4),
        )
        for name, metric in METRICS.items()
    ]


def _render(template: str, **values: Any) -> str:
    """Render a part of a card, without metadata."""
    return str(ModelCard.from_template(ModelCardData(), template_path=str(HERE / template), **values).text).strip()


def _score(evaluation: Evaluation, side: str, name: str) -> str:
    value = f"{getattr(getattr(evaluation, side), name):.4g}"
    interval = evaluation.intervals.get(side, {}).get(name)
    return f"{value} [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else value
