"""Atomic writes and digests of files and directories."""

import hashlib
import os
import re
import resource
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.files import atomic_write, directory_sha256, file_sha256, naming_file, read_json, write_files
from gpt2core.tensors import read_tensors


@pytest.mark.parametrize(("call", "error"), [("replace", OSError("no space")), ("fsync", KeyboardInterrupt())])
def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, error):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        atomic_write(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_without_space_names_path_and_bytes_and_keeps_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match=rf"1,000,000 bytes to write, [\d,]+ bytes free.*{re.escape(str(file))}"):
            atomic_write(file, bytes(1_000_000))
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "large").write_bytes(bytes(4000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        wanted = pytest.raises(OSError, match=r"4,000 bytes to write, [\d,]+ bytes free.*target'$")
        with wanted, naming_file(tmp_path / "target", 4000):
            shutil.copytree(tmp_path / "source", tmp_path / "target", copy_function=shutil.copyfile)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "source", "target"}


def test_a_failing_save_leaves_the_previous_checkpoint(tiny_gpt2_dir, tmp_path, monkeypatch):
    directory = shutil.copytree(tiny_gpt2_dir, tmp_path / "checkpoint")
    before = directory_sha256(directory)

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(load_pretrained(tiny_gpt2_dir), directory)
    assert directory_sha256(directory) == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_a_new_file_follows_the_umask_but_every_user_may_read_the_files_of_a_model(tmp_path, umask):
    old = os.umask(umask)
    try:
        atomic_write(tmp_path / "new" / "file", b"content")
        write_files(tmp_path / "model", {"file": b"content"})
    finally:
        os.umask(old)
    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    assert mode_of(tmp_path / "new" / "file") == 0o666 & ~umask
    assert mode_of(tmp_path / "model" / "file") == 0o644


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    file = tmp_path / "file"
    file.touch(mode=0o600)
    atomic_write(file, b"content")
    assert mode_of(file) == 0o600


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@pytest.fixture
def tree(tmp_path):
    for name, content in {"b": b"1", "a.txt": b"", "sub/c d": b"2", "a/é": b"3", "Z": b"4"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_digest_of_a_directory_is_that_of_sha256sum(tree):
    if not shutil.which("sha256sum"):
        pytest.skip("sha256sum is not installed")
    command = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    output = subprocess.run(["bash", "-c", command], cwd=tree, check=True, capture_output=True, text=True).stdout
    assert directory_sha256(tree) == output.split()[0]


def test_the_digest_may_cover_some_files_in_any_order(tree):
    lines = "".join(f"{hashlib.sha256(c).hexdigest()}  {name}\n" for name, c in (("Z", b"4"), ("b", b"1")))
    assert directory_sha256(tree, ["b", "Z"]) == hashlib.sha256(lines.encode()).hexdigest()
    assert directory_sha256(tree, ["Z", "b"]) == directory_sha256(str(tree), iter(["b", "Z"]))


@pytest.mark.parametrize("edit", [lambda t: (t / "b").write_bytes(b"2"), lambda t: (t / "b").rename(t / "B")])
def test_the_digest_depends_on_contents_and_names(tree, edit):
    before = directory_sha256(tree)
    edit(tree)
    assert directory_sha256(tree) != before


def test_the_digest_of_a_file_is_its_sha256(tree):
    assert file_sha256(tree / "b") == hashlib.sha256(b"1").hexdigest()


def test_a_repeated_key_is_an_error_that_names_it(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    with pytest.raises(ValueError, match=r"x\.json .*the key 'c' is repeated"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "description"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "is a pointer of Git LFS, not the data",
        ),
        (b"<!DOCTYPE html><html>404</html>", "is a web page, not the data"),
        (b"\n<html>Sign in</html>", "is a web page, not the data"),
        (b"\x1f\x8b\x08\0\0", "is compressed by gzip"),
    ],
)
@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_file_with_other_content_than_its_name_says_is_described(tmp_path, read, content, description):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors {description}"):
        read(file)
