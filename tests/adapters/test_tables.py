import logging

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2core.records import make_records
from steps.adapters.tables import is_table, read_rows, text_files

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


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("default/test/0000.parquet", "default/train/0000.parquet"), ["test", "train"]),  # as the hub converts them
        (("my_test.parquet", "my_train.parquet"), ["test", "train"]),
        (("train-1.parquet", "train-2.parquet", "._train-1.parquet", "_delta/x.parquet"), ["train", "train"]),
        (("a/0.parquet", "b/1.parquet", "config.json"), ["", ""]),
        (("training/test.csv", "training/train.csv"), ["test", "train"]),
        (("train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl"), ["train"]),
        (("test/a.jsonl", "train/a.jsonl", "train/b.jsonl"), ["test", "train", "train"]),
        (("main/train.parquet", "socratic/train.parquet"), "several directories or formats"),
        (("main/train.csv", "socratic/train.csv"), "several directories or formats"),
        (("train.parquet", "test.jsonl"), "several directories or formats"),
        (("train.csv", "train.jsonl"), "several directories or formats"),
        (("train.parquet", "other.parquet"), r"other\.parquet names no part of the split"),
        (("train_test.parquet", "x.parquet"), "more than one part of the split: train and test"),
        (
            ("train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001-3d4c.parquet"),
            r"for the part train: train_gen, train_sft; .*like \*_gen-\*\.parquet",
        ),
        (("data/dev_a-00000-of-00001.json", "data/dev-00000-of-00001.json"), r"dev, dev_a; .*like data/dev-\*\.json"),
        (("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"), ["train", "train"]),
        (("a.csv", "test.csv"), r"2 files of records \(a\.csv, test\.csv\)"),
    ],
)
def test_the_files_of_a_directory_name_their_parts(tmp_path, names, parts):
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(ROWS[:1]).to_parquet(file) if file.suffix == ".parquet" else file.write_text("")

    def found():
        return [part for _, part in text_files(tmp_path)] or [row.part for row in read_rows(tmp_path)]

    if isinstance(parts, list):
        assert found() == parts
    else:
        with pytest.raises(ValueError, match=parts):
            found()


def test_a_pattern_selects_files_of_a_directory(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "data").mkdir()
    for name, row in zip(("train_sft", "train_gen", "test_sft", "test_gen"), ROWS, strict=True):
        pd.DataFrame([row]).to_parquet(tmp_path / f"data/{name}-00000-of-00001.parquet")
        pd.DataFrame([row]).to_csv(tmp_path / f"data/{name}.csv", index=False)
    assert text_files(tmp_path / "data/*_sft-*") == []
    assert read(tmp_path / "data/*_sft-*") == [ROWS[2] | {"part": "test"}, ROWS[0] | {"part": "train"}]
    assert "1 files of the part train: train_sft-00000-of-00001.parquet" in caplog.text
    csv = [(tmp_path / "data/test_sft.csv", "test"), (tmp_path / "data/train_sft.csv", "train")]
    assert text_files(tmp_path / "*/*_sft.csv") == csv
    for name in ("a-1.csv", "a-2.csv"):
        (tmp_path / name).touch()
    assert text_files(tmp_path / "a-?.csv") == [(tmp_path / "a-1.csv", ""), (tmp_path / "a-2.csv", "")]
    with pytest.raises(ValueError, match=r"no files of records match .*x-\*\.csv"):
        read(tmp_path / "x-*.csv")


def test_directories_of_the_datasets_library_are_read(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Say 0."}, {"role": "assistant", "content": "0"}]}
    datasets.Dataset.from_list([chat]).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ROWS[:1]
    both = {"train": datasets.Dataset.from_list(ROWS[:3]).shuffle(seed=0), "test": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    records = read(tmp_path / "both")
    assert [record["part"] for record in records] == ["train", "train", "train", "test"]
    assert sorted(record["output"] for record in records) == ["0", "1", "2", "3"]


def test_class_labels_are_read_as_their_names(tmp_path):
    features = datasets.Features({"q": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    dataset = datasets.Dataset.from_dict({"q": ["Say 0.", "Say 1.", "x"], "label": [1, 0, -1]}, features)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "a")
    columns = {"instruction": "q", "output": "label"}
    for path in (tmp_path / "a.parquet", tmp_path / "a"):
        rows = [row.value for row in read_rows(path, columns)]
        assert [row["label"] for row in rows] == ["good", "bad", None]


def test_files_without_a_part_and_parts_of_other_names_are_refused_with_the_way_out(tmp_path):
    for i in range(2):
        pd.DataFrame(ROWS).to_json(tmp_path / f"part{i}.jsonl", orient="records", lines=True)
    with pytest.raises(
        ValueError, match=rf"name one of them in data.path, .*or all as one set by a pattern like {tmp_path}/\*.jsonl"
    ):
        text_files(tmp_path)
    assert len(text_files(tmp_path / "*.jsonl")) == 2
    datasets.DatasetDict({"train_sft": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"Name the directory of one part in data.path, like {tmp_path}/saved/train_"):
        read(tmp_path / "saved")
    assert read(tmp_path / "saved" / "train_sft") == ROWS


def test_errors_name_the_file_and_the_record(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"a\.parquet is not a valid Parquet file"):
        read(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match=r"a\.parquet is a pointer of Git LFS, not the data; fetch it by git lfs pull"):
        read(file)
    binary = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"instruction": binary}), file)
    with pytest.raises(ValueError, match=r"a\.parquet: the column 'instruction', of type string, .*'utf-8' codec"):
        read(file)
    pd.DataFrame([ROWS[0], {"instruction": "x", "output": None}]).to_parquet(file)
    with pytest.raises(ValueError, match=r"a\.parquet: record 2: 'output' is null"):
        read(file)
    with pytest.raises(ValueError, match=r"without Parquet files or .* \(found: nothing\)"):
        list(read_rows((tmp_path / "empty").mkdir() or tmp_path / "empty"))


def test_a_value_that_python_cannot_represent_is_an_error_in_a_column_of_records_only(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    file = tmp_path / "a.parquet"
    table = pa.Table.from_pylist(ROWS[:2])
    table = table.append_column("when", pa.array([2**62, None], pa.timestamp("us")))  # the year 148107
    pq.write_table(table, file)
    assert read(file) == ROWS[:2]
    assert 'keys that are not used: "when" in 1' in caplog.text
    message = (
        r"a\.parquet: the column 'when', of type timestamp\[us\], has a value that cannot be read \(date value out"
    )
    with pytest.raises(ValueError, match=message):
        list(read_rows(file, {"input": "when"}))
