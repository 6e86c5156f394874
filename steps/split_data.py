"""Splits the records; the lineage has the digests of the parts."""

import logging
from typing import Annotated

from zenml import step

from gpt2core.data import Record, Split, records_sha256, same_question, split_records
from gpt2core.types import SplitPart, SplitSummary
from steps.cache import code_of
from steps.config import DataConfig, check_patience
from steps.metadata import attach_metadata

logger = logging.getLogger(__name__)


@step(cache_policy=code_of(__name__))
def split_data(
    records: list[Record], data: DataConfig, seed: int, patience: int | None = None
) -> tuple[
    Annotated[list[Record], "train_records"],
    Annotated[list[Record], "val_records"],
    Annotated[list[Record], "test_records"],
    Annotated[SplitSummary, "split"],
]:
    """Split into train, validation and test records without splitting groups; also return size and sha256 of each part.

    Args:
        patience: `train.patience`. It needs validation records, which is checked here, before pretraining.
    """
    parts = split_records(records, seed if data.order == "seed" else None, data.val_fraction, data.test_fraction)
    if dropped := len(records) - sum(map(len, parts)):
        logger.warning("%d test records whose output was truncated (data.too_long) are dropped", dropped)
    check_patience(patience, data, len(parts.val))
    trained = {same_question(record) for record in parts.train}
    summary = {
        name: SplitPart(
            records_sha256(part),
            len(part),
            None if name == "train" else sum(same_question(record) in trained for record in part),
        )
        for name, part in zip(Split._fields, parts, strict=True)
    }
    for name, about in summary.items():
        attach_metadata(f"{name}_records", about.to_json())
    return parts.train, parts.val, parts.test, SplitSummary(**summary)
