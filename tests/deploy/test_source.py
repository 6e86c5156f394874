"""The commit of a checkout, by real git repositories."""

import subprocess

import pytest

from deploy import source
from deploy.source import describe_commit


def git(directory, *arguments: str) -> str:
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    command = ["git", "-C", str(directory), *author, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def repository(directory) -> str:
    """Make a repository that tracks run.py; return its commit."""
    directory.mkdir(parents=True)
    git(directory, "init", "-q")
    (directory / "run.py").write_text("print('run')\n")
    git(directory, "add", "run.py")
    git(directory, "commit", "-q", "-m", "Add run.py")
    return git(directory, "rev-parse", "HEAD")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The directory of a clean checkout, which describe_commit uses, and its commit."""
    monkeypatch.setattr(source, "ROOT", tmp_path / "checkout")
    return tmp_path / "checkout", repository(tmp_path / "checkout")


def test_a_clean_checkout_a_change_and_a_new_file(checkout):
    directory, sha = checkout
    assert (describe_commit().sha, describe_commit().dirty) == (sha, False)
    git(directory, "config", "status.showUntrackedFiles", "no")
    (directory / "new.py").touch()
    assert describe_commit().dirty
    (directory / "new.py").unlink()
    (directory / "run.py").write_text("print('changed')\n")
    assert (describe_commit().sha, describe_commit().dirty) == (sha, True)


def test_the_variables_of_a_git_hook_select_no_other_repository(checkout, tmp_path, monkeypatch):
    _, sha = checkout
    repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert describe_commit().sha == sha


def test_a_copy_below_another_repository_has_no_commit(tmp_path, monkeypatch):
    repository(tmp_path / "home")
    copy = tmp_path / "home" / "copy"
    copy.mkdir()
    (copy / "run.py").touch()
    monkeypatch.setattr(source, "ROOT", copy)
    assert (describe_commit().sha, describe_commit().dirty) == ("unknown", False)


def test_a_checkout_whose_state_git_cannot_say_is_dirty(checkout, monkeypatch):
    _, sha = checkout
    run = source._git
    monkeypatch.setattr(source, "_git", lambda *words: None if words[0] == "status" else run(*words))
    assert (describe_commit().sha, describe_commit().dirty) == (sha, True)
