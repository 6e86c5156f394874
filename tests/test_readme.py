"""What README and docs name exists. `tests/test_commands.py` runs the README's commands in a fresh copy."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import run
from bentos.settings import Settings
from deploy.containers import images
from tests import config_reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```\w*\n(.*?)```|`([^`\n]+)`", re.DOTALL)


REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
PACKAGES = ("bentos", "commands", "deploy", "gpt2core", "pipelines", "stacks", "steps")
READ = re.compile(r'os\.environ(?:\.get\(|\.setdefault\(|\[)(?:"(\w+)"|([A-Z_]+)\b)|"(\w+)" in os\.environ')


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


def test_the_reference_lists_every_command_of_run_py():
    rows = re.findall(r"^\| `(\w+)[ `]", REFERENCE.partition("## Environment")[0], re.MULTILINE)
    assert rows == list(run.main.commands)


def environment_variables() -> set[str]:
    """The environment variables that the code reads: by os.environ, as a service's setting, or in a stack's file."""
    names = {*images.BUILD_ARGS, "OTEL_SDK_DISABLED"}
    names |= {f"GPT2_{field.name.upper()}" for field in fields(Settings) if field.name != "tracing"}
    for file in [ROOT / "run.py", *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]:
        text = file.read_text(encoding="utf-8")
        for name, constant, member in READ.findall(text):
            value = re.search(rf'^{constant} = "(\w+)"', text, re.MULTILINE) if constant else None
            names.add(name or member or value[1])
    for file in (ROOT / "stacks").glob("*.yaml"):
        names |= set(re.findall(r"\$([A-Z_]+)", file.read_text(encoding="utf-8")))
    return names


def test_the_reference_lists_every_environment_variable_that_the_code_reads():
    listed = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", "".join(re.findall(r"^\|([^|]+)\|", REFERENCE, re.MULTILINE))))
    assert environment_variables() - listed == set()


def test_the_reference_lists_every_configuration_key_as_the_code_defines_it():
    assert config_reference.section() in REFERENCE, "run `python -m tests.config_reference`"


def test_the_readme_lists_every_configuration():
    configs = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").iterdir()]
    assert [name for name in configs if f"]({name})" not in README] == []


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
