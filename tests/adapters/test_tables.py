import datasets
import pandas as pd
import pytest

from gpt2core.records import make_records
from steps.adapters.tables import is_table, read_rows

ROWS = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(4)]


def read(path):
    assert is_table(path)
    return make_records(read_rows(path), str(path))


def test_a_parquet_file_and_a_directory_of_them_are_read(tmp_path):
    for i, name in enumerate(("train-00000-of-00001", "test-00000-of-00001")):
        pd.DataFrame(ROWS[2 * i : 2 * i + 2]).to_parquet(tmp_path / f"{name}.parquet")
    assert read(tmp_path / "train-00000-of-00001.parquet") == ROWS[:2]
    parts = ["test", "test", "train", "train"]
    assert read(tmp_path) == [row | {"part": part} for row, part in zip(ROWS[2:] + ROWS[:2], parts, strict=True)]


def test_directories_of_the_datasets_library_are_read(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Say 0."}, {"role": "assistant", "content": "0"}]}
    datasets.Dataset.from_list([chat]).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ROWS[:1]
    both = {"train": datasets.Dataset.from_list(ROWS[:3]).shuffle(seed=0), "test": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    records = read(tmp_path / "both")
    assert [record["part"] for record in records] == ["train", "train", "train", "test"]
    assert sorted(record["output"] for record in records) == ["0", "1", "2", "3"]


def test_errors_name_the_file_and_the_record(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"a\.parquet is not a valid Parquet file"):
        read(file)
    pd.DataFrame([ROWS[0], {"instruction": "x", "output": None}]).to_parquet(file)
    with pytest.raises(ValueError, match=r"a\.parquet, record 2: 'output' is null"):
        read(file)
    with pytest.raises(ValueError, match=r"without Parquet files or .* \(found: nothing\)"):
        list(read_rows((tmp_path / "empty").mkdir() or tmp_path / "empty"))
