"""
Keeps the functions that the training scripts and the examples share identical to the letter.

A function, class or constant under a line `# Copied from train_sspo_sd.NAME` is a copy of NAME in train_sspo_sd.py.
What only siblings share names the one that had it first, such as train_sspo_video.NAME.
Without arguments every copy is rewritten; with --check nothing is written, and the exit status is 1 if one drifted.
"""

import argparse
import ast
import functools
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^# Copied from (\w+)\.(\w+)$")


def definitions(source):
    """
    Top-level functions, classes and constants: name -> (first line, last line), from 0, decorators included, end
    excluded.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = (first - 1, node.end_lineno)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = (node.lineno - 1, node.end_lineno)
    return found


@functools.cache
def originals(path):
    """The lines of a script, and where its definitions are."""
    source = path.read_text()
    return source.splitlines(), definitions(source)


def original(module, name):
    """The lines of `name` in module.py. Ends the program if it is not there."""
    lines, spans = originals(ROOT / f"{module}.py")
    if name not in spans:
        sys.exit(f"{module}.py has no {name}: fix the mark '# Copied from {module}.{name}', or take it away")
    first, last = spans[name]
    return lines[first:last]


def fixed(source):
    """`source` with every marked copy as its original is now."""
    lines, spans = source.splitlines(), sorted(definitions(source).values(), reverse=True)
    for first, last in spans:
        mark = MARK.match(lines[first - 1]) if first else None
        if mark:
            lines[first:last] = original(*mark.groups())
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only tell which files have copies that drifted")
    args = parser.parse_args(argv)
    drifted = []
    for path in sorted([*ROOT.glob("train_sspo_*.py"), *ROOT.glob("examples/**/*.py")]):
        source = path.read_text()
        if fixed(source) != source:
            drifted.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(fixed(source))
    if drifted:
        print(f"{'drifted' if args.check else 'rewritten'}: {', '.join(drifted)}")
    sys.exit(1 if drifted and args.check else 0)


if __name__ == "__main__":
    main()
