"""Licenses of the installed dependencies: none with conditions on this project's own code enters unnoticed.

`make licenses` prints them.
"""

import re
import sysconfig
from importlib.metadata import Distribution, distributions

import pytest

# Licenses without conditions for code that only imports the package.
PERMISSIVE = re.compile(r"\b(mit|bsd|0bsd|apache|isc|python software foundation|psf|public domain|zlib|cnri-python)\b")
# Copyleft for the package's own files or library only; each is used unchanged and not distributed from here.
ACCEPTED = {"certifi", "chardet", "hypothesis", "orjson", "pathspec", "tqdm"}
# NVIDIA's libraries, which torch's wheels with CUDA require and which are not distributed from here.
CUDA = re.compile("(nvidia|cuda)-")
COPYLEFT = re.compile(
    r"gpl|general public|mpl|mozilla|cddl|eupl|epl|sspl|server side|commons clause|busl|business source"
)


def license_of(package: Distribution) -> str:
    """The SPDX expression in the metadata of an installed package, else its classifiers, else the head of the text."""
    metadata = package.metadata
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith("License :: ")]
    named = [text.rpartition(" :: ")[2] for text in classifiers if text != "License :: OSI Approved"]
    lines = (metadata.get("License") or "").strip().splitlines()
    return metadata.get("License-Expression") or "; ".join(named) or (lines[0] if lines else "")


def needs_a_decision(name: str, license: str) -> bool:
    """Whether a license is unknown or copyleft, and the package is not in ACCEPTED."""
    text = license.lower()
    free = PERMISSIVE.search(text) and not COPYLEFT.search(text)
    return not free and name.lower() not in ACCEPTED and not CUDA.match(name)


def installed() -> dict[str, str]:
    # not all of sys.path: importing setuptools adds the packages inside of it
    found = distributions(path=[sysconfig.get_path("purelib")])
    return {package.metadata["Name"]: license_of(package) for package in found}


def test_no_dependency_has_an_unknown_or_copyleft_license_that_nobody_accepted():
    assert "torch" in installed()
    undecided = {name: license for name, license in installed().items() if needs_a_decision(name, license)}
    assert undecided == {}, "read these licenses; add the package to ACCEPTED only if it is used unchanged"


@pytest.mark.parametrize(
    "license", ["", "GPL-3.0-only", "AGPL-3.0 OR MIT", "Proprietary, limited", "MPL-2.0 AND MIT", "SSPL-1.0"]
)
def test_an_unknown_or_copyleft_license_needs_a_decision(license):
    assert needs_a_decision("new-package", license)


if __name__ == "__main__":
    for name, text in sorted(installed().items(), key=lambda item: item[0].lower()):
        print(f"{name}: {text}")
