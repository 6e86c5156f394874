from typing import Annotated

from zenml import step

from gpt2core.data import Split, records_sha256, split_records
from steps.cache import code_of
from steps.config import DataConfig
from steps.metadata import describe

Records = list[dict[str, str]]


@step(cache_policy=code_of(__name__))
def split_data(
    records: Records, data: DataConfig, seed: int
) -> tuple[
    Annotated[Records, "train_records"],
    Annotated[Records, "val_records"],
    Annotated[Records, "test_records"],
    Annotated[dict[str, dict[str, str | int]], "split"],
]:
    """Train, validation and test records, whole groups on one side; and each part's size and sha256."""
    parts = split_records(records, seed if data.order == "seed" else None, data.val_fraction, data.test_fraction)
    split: dict[str, dict[str, str | int]] = {
        name: {"sha256": records_sha256(part), "records": len(part)}
        for name, part in zip(Split._fields, parts, strict=True)
    }
    for name, about in split.items():
        describe(f"{name}_records", about)
    return parts.train, parts.val, parts.test, split
