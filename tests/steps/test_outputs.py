import json

import pytest

from steps import outputs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def test_files_and_directories_are_written_below_the_name_of_the_run(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir(0o700)
    (adapter / "weights").write_bytes(b"\x00\x01")

    directory = outputs.write_outputs("run-1", {"a.txt": "é", "b.bin": b"\xff"}, {"adapter": adapter})

    assert (directory / "a.txt").read_text(encoding="utf-8") == "é"
    assert (directory / "b.bin").read_bytes() == b"\xff"
    assert (directory / "adapter" / "weights").read_bytes() == b"\x00\x01"
    assert (directory / "adapter").stat().st_mode & 0o055 == 0o055  # readable by others, like the rest of outputs


def test_latest_is_a_relative_link_to_the_newest_run(folder, tmp_path):
    for name in ("run-1", "run-2"):
        outputs.write_outputs(name, {"name.txt": name}, {})
    folder.rename(tmp_path / "moved")

    assert (tmp_path / "moved" / "latest" / "name.txt").read_text() == "run-2"
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["latest", "run-1", "run-2"]


def test_writing_a_run_twice_keeps_the_second(folder):
    for text in ("one", "two"):
        outputs.write_outputs("run", {"file.txt": text}, {})
    assert (folder / "latest" / "file.txt").read_text() == "two"


def test_json_is_indented_and_readable():
    assert outputs.json_text({"name": "Müller"}) == '{\n  "name": "Müller"\n}\n'
    assert json.loads(outputs.json_text([1, None, "x"])) == [1, None, "x"]


def test_a_stage_keeps_pointing_at_the_promoted_run(folder):
    outputs.write_outputs("run-1", {"name.txt": "1"}, {}, pointers=["latest", "staging"])
    outputs.write_outputs("run-2", {"name.txt": "2"}, {})
    assert (folder / "staging" / "name.txt").read_text() == "1"
    assert (folder / "latest" / "name.txt").read_text() == "2"


def test_a_linked_directory_is_not_copied(folder, tmp_path):
    (tmp_path / "base").mkdir()
    outputs.write_outputs("run", {}, {}, links={"base": tmp_path / "base"})
    assert (folder / "latest" / "base").readlink() == tmp_path / "base"
