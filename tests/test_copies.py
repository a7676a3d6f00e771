"""The scripts' shared functions are the same to the letter, and each script stands alone."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT


SCRIPTS = sorted(ROOT.glob("train_sspo_*.py"))


def test_copies_have_not_drifted():
    result = subprocess.run(
        [sys.executable, ROOT / "utils" / "fix_copies.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, f"{result.stdout}run make fix-copies"


def test_a_drifted_copy_is_found_and_mended(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "utils"))
    import fix_copies

    (tmp_path / "train_sspo_sd.py").write_text("import os\n\n\n@cache\ndef f(x):\n    return x\n")
    copy = "# Copied from train_sspo_sd.f\n{}\n\n\ndef g():\n    pass\n"
    (tmp_path / "train_sspo_other.py").write_text(copy.format("def f(x):\n    y = x\n    return y"))
    monkeypatch.setattr(fix_copies, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        fix_copies.main(["--check"])
    with pytest.raises(SystemExit, match="0"):
        fix_copies.main([])
    assert (tmp_path / "train_sspo_other.py").read_text() == copy.format("@cache\ndef f(x):\n    return x")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_imports_nothing_of_this_repository(script):
    """A user copies one file. It names no module of the repository, and its header names every package it imports."""
    source = script.read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    packages = imported - sys.stdlib_module_names
    header = source.split("# ///")[1]
    implied = {"PIL", "huggingface_hub", "numpy", "safetensors", "tqdm"}  # required by diffusers and datasets
    optional = {"wandb"}
    assert packages - implied - optional <= {name for name in packages if f'"{name}' in header}
    assert not packages & {"tests", "utils", "examples", *(path.stem for path in SCRIPTS)}
