import json

import pytest

from gpt2core.types import RunRef
from steps import outputs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def test_files_and_directories_are_written_below_the_name_of_the_run(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir(0o700)
    (adapter / "weights").write_bytes(b"\x00\x01")

    directory = outputs.write_outputs(RunRef("1", "run-1"), {"a.txt": "é", "b.bin": b"\xff"}, {"adapter": adapter})

    assert (directory / "a.txt").read_text(encoding="utf-8") == "é"
    assert (directory / "b.bin").read_bytes() == b"\xff"
    assert (directory / "adapter" / "weights").read_bytes() == b"\x00\x01"
    assert (directory / "adapter").stat().st_mode & 0o055 == 0o055  # readable by others, like the rest of outputs


def test_latest_is_a_relative_link_to_the_newest_run(folder, tmp_path):
    for name in ("run-1", "run-2"):
        outputs.write_outputs(RunRef(name, name), {"name.txt": name}, {})
    folder.rename(tmp_path / "moved")

    assert (tmp_path / "moved" / "latest" / "name.txt").read_text() == "run-2"
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["latest", "run-1", "run-2"]


def test_a_run_that_is_written_again_replaces_its_own_directory(folder):
    for text in ("one", "two"):
        outputs.write_outputs(RunRef("1", "run"), {"file.txt": text}, {})
    assert (folder / "latest" / "file.txt").read_text() == "two"


def test_json_is_indented_and_readable():
    assert outputs.json_text({"name": "Müller"}) == '{\n  "name": "Müller"\n}\n'
    assert json.loads(outputs.json_text([1, None, "x"])) == [1, None, "x"]


def test_a_stage_keeps_pointing_at_the_promoted_run(folder):
    outputs.write_outputs(RunRef("1", "run-1"), {"name.txt": "1"}, {}, pointers=["latest", "staging"])
    outputs.write_outputs(RunRef("2", "run-2"), {"name.txt": "2"}, {})
    assert (folder / "staging" / "name.txt").read_text() == "1"
    assert (folder / "latest" / "name.txt").read_text() == "2"


def test_a_linked_directory_is_not_copied(folder, tmp_path):
    (tmp_path / "base").mkdir()
    outputs.write_outputs(RunRef("1", "run"), {}, {}, links={"base": tmp_path / "base"})
    assert (folder / "latest" / "base").readlink() == tmp_path / "base"


@pytest.mark.parametrize(
    "name", ["experiments", "Latest", "../run", "a/b", "a\\b", "/tmp/run", ".", ".run", "", "a\nb"]
)
def test_a_name_that_is_no_directory_of_a_run_is_refused_and_nothing_is_removed(folder, tmp_path, name):
    for directory in (folder / "experiments", tmp_path / "run"):
        directory.mkdir(parents=True)
        (directory / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="the run's name"):
        outputs.write_outputs(RunRef("1", name), {"file.txt": "x"}, {})
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["experiments", "outputs", "results.json", "results.json", "run"]


def test_a_directory_of_another_run_is_refused_and_stays(folder):
    outputs.write_outputs(RunRef("1", "run"), {"file.txt": "one"}, {})
    (folder / "mine").mkdir()
    for name in ("run", "mine"):
        with pytest.raises(FileExistsError, match=f"{name} exists, but is from another run than 2"):
            outputs.write_outputs(RunRef("2", name), {"file.txt": "two"}, {})
    assert (folder / "latest" / "file.txt").read_text() == "one"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "mine", "run"]
