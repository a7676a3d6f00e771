"""The scripts' headers and the files of requirements ask for the same packages."""

import re
import tomllib

import pytest
from helpers import ROOT
from packaging.requirements import Requirement


PATHS = sorted(ROOT.glob("train_sspo_*.py"))


def requirements(lines):
    """{package: its line without comment, marker and spaces}; `-r FILE` stands for the lines of FILE."""
    found = {}
    for line in lines:
        line = line.split("#")[0].split(";")[0].strip()
        if line.startswith("-r "):
            found |= requirements((ROOT / line.split()[1]).read_text().splitlines())
        elif line:
            found[re.match(r"[\w-]+", line)[0]] = line.replace(" ", "")
    return found


def header(path):
    """What the PEP 723 header of a script says, as tomllib reads it."""
    block = re.search(r"^# /// script\n(.*?)^# ///$", path.read_text(), re.MULTILINE | re.DOTALL)[1]
    return tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-xformers.txt"])
def test_headers_and_requirements_name_the_same_packages(name):
    """In the same versions; the files pin torch, of which other releases were not tried."""
    listed = requirements((ROOT / name).read_text().splitlines())
    headers = [requirements(header(path)["dependencies"]) for path in PATHS]
    needed = {package: line for packages in headers for package, line in packages.items()}
    for packages in headers:
        assert packages == {package: needed[package] for package in packages}, "the scripts agree"
    assert set(listed) - {"xformers"} == set(needed)
    for package, line in needed.items():
        if package == "torch":
            pinned = re.fullmatch(r"torch==([\d.]+)", listed["torch"])[1]
            assert Requirement(line).specifier.contains(pinned)
        else:
            assert listed[package] == line


def test_python_3_11_and_diffusers_0_42_are_asked_for_everywhere():
    """This diffusers needs that Python, and `dtype` that diffusers."""
    for path in PATHS:
        assert header(path)["requires-python"] == ">=3.11"
        (diffusers,) = (line for line in header(path)["dependencies"] if line.startswith("diffusers"))
        assert diffusers == "diffusers>=0.42,<0.43"
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["tool"]["ruff"]["target-version"] == "py311"


def test_xformers_is_pinned_beside_the_torch_that_it_was_built_with():
    """As the file says it, from the metadata of both: beside another CUDA its library does not load."""
    text = (ROOT / "requirements-xformers.txt").read_text()
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    xformers, torch, cuda = re.search(r"xformers ([\d.]+), .*? built with torch ([\d.]+)\+cu(\d+)", comment).groups()
    pins = requirements(text.splitlines())
    assert (pins["xformers"], pins["torch"]) == (f"xformers=={xformers}", f"torch=={torch}")
    assert f"torch is built for CUDA {cuda[:2]}.{cuda[2:]} in {torch.rsplit('.', 1)[0]} " in comment
