"""The scripts stand alone, share what they share to the letter, differ in the pipeline, and put the method first."""

import ast
import functools
import itertools
import re
import subprocess
import sys

import pytest
from helpers import ROOT


sys.path.insert(0, str(ROOT / "utils"))

import fix_copies


PATHS = sorted(ROOT.glob("train_sspo_*.py"))
ORIGINAL = "train_sspo_sd"
SIBLINGS = [path for path in PATHS if path.stem != ORIGINAL]
SECTION = re.compile(r"^# -+\n# (.+)\n# -+$", re.MULTILINE)
IMPORTED = (ast.Import, ast.ImportFrom)


@functools.cache
def script_at(path):
    return Script(path)


class Script:
    """The source of a script, cut into its sections and its definitions."""

    def __init__(self, path):
        self.source = path.read_text()
        self.lines, self.body = self.source.splitlines(), ast.parse(self.source).body
        # Each section's title and the line, from 1, of it.
        self.sections = {
            found[1]: self.source[: found.start(1)].count("\n") + 1 for found in SECTION.finditer(self.source)
        }

    def section(self, node):
        """The title, up to its colon, of the section that holds `node`, or None before the first."""
        titles = [title for title, line in self.sections.items() if line < node.lineno]
        return titles[-1].split(":")[0] if titles else None

    def text(self, node):
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        return "\n".join(self.lines[first - 1 : node.end_lineno]), self.lines[first - 2]

    def comment(self, node):
        """The lines of comment right above `node`, but for the mark of a copy."""
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        above = itertools.takewhile(lambda line: line.startswith("#"), reversed(self.lines[: first - 1]))
        return [line for line in above if not line.startswith("# Copied from ")]

    @functools.cached_property
    def definitions(self):
        """Of every top-level function, class and constant: name -> node."""
        found = {}
        for node in self.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
                found.update(dict.fromkeys(names, node))
        return found

    @property
    def functions(self):
        return [node for node in ast.walk(ast.parse(self.source)) if isinstance(node, ast.FunctionDef)]


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def script(request):
    return script_at(request.param)


# Copies


def test_copies_have_not_drifted():
    command = [sys.executable, ROOT / "utils" / "fix_copies.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}run make fix-copies"


def test_a_drifted_copy_is_found_and_fixed(tmp_path, monkeypatch):
    (tmp_path / "train_sspo_sd.py").write_text("import os\n\n\n@cache\ndef f(x):\n    return x\n")
    copy = "# Copied from train_sspo_sd.f\n{}\n\n\ndef g():\n    pass\n"
    (tmp_path / "train_sspo_other.py").write_text(copy.format("def f(x):\n    y = x\n    return y"))
    monkeypatch.setattr(fix_copies, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        fix_copies.main(["--check"])
    with pytest.raises(SystemExit, match="0"):
        fix_copies.main([])
    assert (tmp_path / "train_sspo_other.py").read_text() == copy.format("@cache\ndef f(x):\n    return x")


@pytest.mark.parametrize("path", SIBLINGS, ids=lambda path: path.stem)
def test_siblings_differ_in_the_pipeline_alone(path):
    """
    What the scripts have in common is marked as a copy, which `make fix-copies` keeps. All else, what only a sibling
    has included, stands in the section that one replaces to train another pipeline. What siblings alone share comes
    from the one that had it first.
    """
    original, sibling = script_at(ROOT / f"{ORIGINAL}.py"), script_at(path)
    assert list(sibling.sections) == list(original.sections)
    replaced = "The pipeline"
    theirs = original.definitions
    for name, node in sibling.definitions.items():
        (text, above), here = sibling.text(node), sibling.section(node)
        mark = fix_copies.MARK.match(above)
        if mark:
            source = script_at(ROOT / f"{mark[1]}.py")
            copied, marked = source.text(source.definitions[mark[2]])
            assert mark[2] == name and text == copied, f"{name} has drifted"
            assert here == source.section(source.definitions[name]), f"{name} has moved"
            assert not fix_copies.MARK.match(marked), f"{name} is a copy there too: name where it comes from"
            assert sibling.comment(node) == source.comment(source.definitions[name]), (
                f"what is said of {name} has drifted"
            )
        elif here == replaced:
            same = name in theirs and text == original.text(theirs[name])[0]
            assert not same or isinstance(node, ast.Assign), f"{name} is the same: mark it as copied"
        else:  # the logger and the like
            assert isinstance(node, ast.Assign) and text == original.text(theirs[name])[0], (
                f"{name}: mark it as copied"
            )
    assert ast.unparse(sibling.body[-1]) == ast.unparse(original.body[-1]), "how errors end the program"


def test_what_siblings_alone_share_is_marked_too():
    """Else it would drift: of two functions that are the same, one says where it comes from."""
    originals = {}
    for path in PATHS:
        script = script_at(path)
        for name, node in script.definitions.items():
            text, above = script.text(node)
            if not isinstance(node, ast.Assign) and not fix_copies.MARK.match(above):
                assert text not in originals, f"{path.stem}.{name} is {originals[text]}: mark it as copied"
                originals[text] = f"{path.stem}.{name}"


def test_a_script_holds_nothing_that_it_does_not_use(script):
    """What a name's own definition says of it, or a comment, is no use of it."""
    names = set(script.definitions)
    for node in script.body:
        if isinstance(node, IMPORTED):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    used = set()
    for node in script.body:
        read = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}
        used |= read - {name for name, definition in script.definitions.items() if definition is node}
    assert not names - used


def test_a_script_imports_nothing_of_this_repository(script):
    """A user copies one file. It names no module of the repository, and its header names every package it imports."""
    imported = set()
    for node in ast.walk(ast.parse(script.source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    packages = imported - sys.stdlib_module_names
    implied = {"PIL", "huggingface_hub", "numpy", "safetensors", "tqdm"}  # required by diffusers and datasets
    optional = {"wandb"}
    header = script.source.split("# ///")[1]
    assert packages - implied - optional == {name for name in packages if f'"{name}>' in header}
    assert not packages & {"tests", "utils", "examples", *(path.stem for path in PATHS)}


# Form


def test_the_method_comes_first(script):
    """A reader has met all of it by line 450, before any argument."""
    assert list(script.sections)[0].startswith("The method")
    method = [name for name, node in script.definitions.items() if script.section(node) == "The method"]
    assert {"ReplayBank", "as_reference", "self_sample", "denoising_errors", "sspo_loss", "training_loss"} <= set(
        method
    )
    assert max(script.definitions[name].end_lineno for name in method) <= 450


def test_a_sibling_says_at_its_top_what_differs(script):
    """And where; the original has nothing to differ from."""
    told = "\nWhat differs from train_sspo_sd.py" in ast.get_docstring(ast.parse(script.source))
    assert told == ("# Copied from train_sspo_sd." in script.source)


def numbered(text):
    """The steps that a text names, `2. Self-sample` and the like, in its order and in lower case."""
    found = re.findall(r"\b([1-5])\. (?!to\b|for\b)(?:The )?([A-Za-z-]+)", text)  # "3. to 5. for" names none
    return [(int(number), name.lower()) for number, name in found]


def test_the_five_steps_are_numbered_alike_wherever_they_are(script):
    """In the file's docstring, at the functions that make them, and in the loop."""
    steps = [(1, "replay"), (2, "self-sample"), (3, "errors"), (4, "switch"), (5, "loss")]
    assert numbered(ast.get_docstring(ast.parse(script.source))) == steps
    method = [node for node in script.body if script.section(node) == "The method"]
    told = {}  # step -> the first that tells of it
    for node in method:
        for step in numbered(ast.get_docstring(node) or ""):
            told.setdefault(step, node.name)
    names = ["ReplayBank", "self_sample", "denoising_errors", "sspo_loss", "sspo_loss"]
    assert list(told.items()) == list(zip(steps, names))
    main = script.text(script.definitions["main"])[0]
    comments = "\n".join(line.strip() for line in main.splitlines() if re.match(r" +# [1-5]\. ", line))
    assert numbered(comments) == [*steps, steps[0]], "and at its end an iteration is pushed"


def test_the_line_that_decides_the_switch_says_so(script):
    lines = script.text(script.definitions["sspo_loss"])[0].splitlines()
    decides = next(i for i, line in enumerate(lines) if line.strip().startswith("s = "))
    above = [line for line in lines[decides - 6 : decides] if line.strip().startswith("#")]
    assert "switch" in above[-1]


def test_functions_are_short(script):
    """Beside the argument list and main, which is the loop. Decorators and docstrings count."""
    long = {node.name: node.end_lineno - node.lineno + 1 for node in script.functions}
    assert {name for name, lines in long.items() if lines > 70} == {"add_shared_arguments", "main"}


def test_nothing_takes_ten_arguments(script):
    for node in script.functions:
        taken = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        assert len(taken) < 10, node.name
