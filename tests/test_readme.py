"""What README and docs name exists. `tests/test_commands.py` runs the README's commands in a fresh copy."""

import re
import shlex
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```\w*\n(.*?)```|`([^`\n]+)`", re.DOTALL)


def commands(program: str, text: str) -> list[list[str]]:
    """The words behind `program` in every code block and every inline code of a page."""
    lines = [
        line for block, inline in CODE.findall(text) for line in (block or inline).replace("\\\n", "").splitlines()
    ]
    lines = [line.partition("  #")[0].strip() for line in lines]
    return [shlex.split(line)[len(program.split()) :] for line in lines if f"{line} ".startswith(f"{program} ")]


def targets_of_makefile() -> set[str]:
    rules = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {name for rule in rules for name in rule.split()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_of_a_page_exists(page):
    named = {word for words in commands("make", page.read_text()) for word in words if re.fullmatch("[a-z-]+", word)}
    assert named - targets_of_makefile() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_run_py_command_of_a_page_exists_with_its_options(page):
    for name, *rest in commands("python run.py", page.read_text()):
        command = run.main.commands[name]
        options = {option for parameter in command.params for option in parameter.opts}
        used = {word for word in rest if re.fullmatch("--[a-z-]+", word)}
        assert used <= options, f"{name} has no {used - options}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_and_config_of_a_page_exists(page):
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)]
    configs = [ROOT / name for name in re.findall(r"\bconfigs/[\w/]+\.yaml", text)]
    assert [str(path) for path in links + configs if path.stem != "NAME" and not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_anchor_that_a_page_links_to_is_a_heading(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        target = (page.parent / link) if link else page
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{link}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_that_a_page_names_exists(page):
    folders = "gpt2core|steps|pipelines|commands|deploy|bentos|stacks|benchmarks|examples|tests|k8s"
    names = re.findall(rf"`((?:{folders})/[\w./]*)`", page.read_text())
    assert [name for name in names if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_readmes_set_paths_are_keys_of_the_configuration():
    from pipelines.config import set_values
    from pipelines.finetune_pipeline import finetune_pipeline

    values = re.findall(r"--set ([\w.]+=[\w./:-]+)", README)
    assert values
    set_values({}, values, finetune_pipeline)  # raises ConfigError


def test_the_readme_stays_short_enough_to_read():
    assert len(README.splitlines()) <= 185


def test_the_readme_states_the_duration_of_a_run_once():
    assert len(re.findall(r"\d+ min \d+ s", README)) == 2  # the run, and the pretraining in it
