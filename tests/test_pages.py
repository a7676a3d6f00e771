"""What the pages tell a user to type exists, and what they say of files, metrics and code is so."""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers import EVERY, ROOT, flags


sys.path.insert(0, str(ROOT / "examples" / "benchmark"))

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
SOURCES = sorted([*ROOT.glob("train_sspo_*.py"), *ROOT.glob("examples/**/*.py")])
# What a script needs beside the flags that a page is about.
REQUIRED = {name: ["--pretrained_model_name_or_path", "-", "--train_data_dir", "-"] for name in EVERY}
REQUIRED["video"] += ["--motion_adapter_name_or_path", "-"]


class Parsed(Exception):
    """A program has taken its command line."""


@contextlib.contextmanager
def only_parsing():
    """In it, a program ends with Parsed where it has taken its command line, or with argparse's SystemExit."""
    parse_args, parse_known_args = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    inside = False

    def strict(self, args=None, namespace=None):
        nonlocal inside
        inside = True
        parse_args(self, args, namespace)
        raise Parsed([])

    def lenient(self, args=None, namespace=None):
        known, others = parse_known_args(self, args, namespace)
        if not inside:
            raise Parsed(others)
        return known, others

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", strict),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", lenient),
    ):
        yield


def complaint(call):
    """What `call` says on stderr as it ends because of a wrong command line, or None; and what it left unparsed."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            call()
    except Parsed as parsed:
        return None, parsed.args[0]
    except SystemExit as end:
        if end.code not in (0, None):
            return said.getvalue().strip() or str(end.code), []
    return None, []


def program_complaint(path, words):
    """What a Python program says to a command line, or None. It goes no further than to parse it."""
    if path.stem.startswith("train_sspo_"):
        return complaint(lambda: EVERY[path.stem.removeprefix("train_sspo_")].parse_args(words))[0]
    if path.name == "estimate_memory.py":
        import estimate_memory

        return complaint(lambda: words and estimate_memory.parse(words[0], words[1:]))[0]

    def run():
        with only_parsing():
            runpy.run_path(str(path), run_name="__main__")

    environment, search = dict(os.environ), list(sys.path)
    sys.path.insert(0, str(path.parent))
    try:
        with mock.patch.object(sys, "argv", [str(path), *words]):
            said, others = complaint(run)
    finally:
        sys.path[:] = search
        os.environ.clear()
        os.environ.update(environment)
    if others:  # the quickstarts hand them on
        script = next((name for name in EVERY if path.stem.endswith(f"_{name}")), "sd")
        said = complaint(lambda: EVERY[script].parse_args([*REQUIRED[script], *others]))[0]
    return said


def find(name, folders):
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def make_targets():
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def could_select(path, expression):
    """Whether a -k expression fits a test of `path`, a file or a folder, and all of its words are in tests' names."""
    files = [path] if path.suffix == ".py" else path.glob("**/test_*.py")
    names = [name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())]
    words = re.compile(r"\b(?!(?:and|or|not)\b)\w+")

    def fits(name):
        return eval(words.sub(lambda word: str(word[0] in name), expression))

    known = all(any(word in name for name in names) for word in words.findall(expression))
    return known and any(map(fits, names))


def command_problem(words, folders):
    """What is wrong with a command, given as words, or None. Its files are looked for in `folders`."""
    words = [word for word in words if word != "..."]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # of the environment
        words = words[1:]
    program, *rest = words or [""]
    if program == "make":
        return next((f"no target {word}" for word in rest if "=" not in word and word not in make_targets()), None)
    if program == "pip":
        files = [after for before, after in zip(rest, rest[1:]) if before == "-r"]
        return next((f"no file {name}" for name in files if find(name, folders) is None), None)
    if program == "pytest":
        paths = [word for word in rest if word.startswith("tests")]
        if missing := [path for path in paths if not (ROOT / path).exists()]:
            return f"no file {missing[0]}"
        wanted = [after for before, after in zip(rest, rest[1:]) if before == "-k"]
        return next(
            (f"no test {text}" for text in wanted if not could_select(ROOT / (paths or ["tests"])[0], text)), None
        )
    if program in ("git", "cd", ".") or [program, *rest[:2]] == ["python3", "-m", "venv"]:
        return None
    if (program, rest[:1]) == ("accelerate", ["launch"]):
        with contextlib.redirect_stderr(io.StringIO()):
            known = launch_command_parser().parse_args(rest[1:])
        program, rest = known.training_script, known.training_script_args
    elif program in ("python", "python3"):
        program, *rest = rest
    elif (program, rest[:1]) == ("uv", ["run"]):
        program, *rest = rest[1:]
    path = find(program, folders)
    if path is None:
        return f"no file {program}"
    return program_complaint(path, rest) if path.suffix == ".py" else None


def of_accelerate(flag):
    """Whether `accelerate launch` takes this flag."""
    lines = ([flag, "1", "script.py"], [flag, "script.py"])
    return any(complaint(lambda line=line: launch_command_parser().parse_args(line))[0] is None for line in lines)


def flag_problem(words):
    """What is wrong with a span of flags alone, or None: each has to be taken, with its values, by some program."""
    flags = [word.split() for word in re.findall(r"--\S+(?:\s+(?!--)\S+)*", " ".join(words))]
    for flag, *values in flags:
        values = [value for value in values if value != "..."]
        said = []
        for name, script in EVERY.items():

            def parse(script=script, name=name, given=(flag, *values)):
                with only_parsing():
                    script.parse_args([*REQUIRED[name], *given])

            said.append(complaint(parse)[0])
        taken = any(one is None or (not values and "expected" in one) for one in said)
        if not taken and all("unrecognized" in one for one in said):
            taken = any(f'"{flag.replace("--no-", "--")}"' in source.read_text() for source in SOURCES)
            taken = taken or of_accelerate(flag)
        if not taken:
            return said[0]
    return None


def spans(text):
    """The page's commands as (line of words, folder it is typed in or None), and its inline code."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += [re.sub(r"^    ", "", block) for block in re.findall(r"(?:^    (?:python|make) .*\n)+", text, re.M)]
    commands = []
    for block in blocks:
        folder = None
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words[:1] == ["cd"]:
                    folder = words[1]
                elif words:
                    commands.append((words, folder))
    without = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return commands, [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without)]


STARTS = re.compile(r"(make|pip|pytest|python3?|uv run|accelerate launch) \S")
FILE = re.compile(r"(examples|docs|tests|utils)/[\w./-]+|train_sspo_\w+\.py|requirements[\w-]*\.txt")


def problems(text, folder):
    """Everything on a page that a user who follows it would stumble over."""
    found, (commands, codes) = [], spans(text)
    commands += [(shlex.split(code), None) for code in codes if STARTS.match(code)]
    for words, inside in commands:
        folders = [ROOT / inside, ROOT] if inside else [ROOT, folder]
        found.append((" ".join(words), command_problem(words, folders)))
    for code in codes:
        if code.startswith("--"):
            found.append((code, flag_problem(code.split())))
        elif FILE.fullmatch(code) and find(code, [ROOT, folder]) is None:
            found.append((code, "no such file"))
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        if not (folder / link).exists():
            found.append((link, "no such file"))
    for place in re.findall(r"\]\((\S*#[^)]+)\)", text):
        page, heading = place.split("#")
        target = folder / page if page else None
        known = target.read_text() if target is not None and target.exists() else text
        slugs = [re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in headings(known)]
        if "://" not in place and heading not in slugs:
            found.append((place, "no such heading"))
    return [f"{what}: {problem}" for what, problem in found if problem is not None]


def headings(text):
    return re.findall(r"^#+ (.*)", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_tells_to_type_and_to_open_exists(page):
    found = problems(page.read_text(), page.parent)
    if page.name == "plan_first.md":  # written when the study's runs were made
        found = [problem for problem in found if not problem.startswith("--ssr_scope")]
    assert found == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_docstring_exist(source):
    text = ast.get_docstring(ast.parse(source.read_text())) or ""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    commands = [shlex.split(re.sub(r"[\[\]]", "", line), comments=True) for line in lines if STARTS.match(line)]
    said = {" ".join(words): command_problem(words, [ROOT, source.parent]) for words in commands}
    assert not {command: problem for command, problem in said.items() if problem is not None}


@pytest.mark.parametrize(
    "text, told",
    [
        ("`--rival_wait 0.3`", "unrecognized"),
        ("`--ssr sometimes`", "invalid choice"),
        ("`make quickstarts`", "no target"),
        ("`pytest tests -k never_was_such_a_test`", "no test"),
        ('`pytest tests -k "no_call_is_needless and page_that_is_right"`', "no test"),
        ('`pytest tests -k "no_call_is_needless or never_was_such_a_test"`', "no test"),
        ("`pip install -r requirement.txt`", "no file"),
        ("[a page](docs/nothing.md)", "no such file"),
        ("[a place](README.md#nowhere)", "no such heading"),
        ("see `examples/nothing.py`", "no such file"),
        ("```bash\npython examples/quickstart/quickstart.py --winers 3\n```", "unrecognized"),
        ("```bash\npython examples/study/study.py dance\n```", "invalid choice"),
        ("```bash\npython examples/benchmark/estimate_memory.py sdxl --split_pears\n```", "unrecognized"),
        ("```bash\naccelerate launch \\\n  train_sspo_sd.py --train_data_dir a\n```", "required"),
        ("```bash\ncd examples\npython nothing.py\n```", "no file"),
    ],
)
def test_a_page_that_is_wrong_is_found(text, told):
    (problem,) = problems(text, ROOT)
    assert told in problem


def test_a_page_that_is_right_passes():
    text = "`--ssr none --rival_weight 0.3 --cache_latents`, `--num_frames`, `make quickstart`, `docs/method.md`\n"
    text += "```bash\ncd examples/quickstart\npython quickstart.py --ssr sign  # a comment\n```\n"
    assert problems(text, ROOT) == []


# ------------------------------------------------------------------------------------------------------------------
# What the pages say
# ------------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_loads_what_a_run_leaves(train, sd, tmp_path, monkeypatch):
    """Its five lines of Python, with the names of a tiny model and on the CPU."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 160
    (lora,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert sum(map(bool, lora.splitlines())) == 5
    # As the paragraph below it says for a whole pipeline.
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    full = lora.replace(name, "sspo-sd15").replace('pipe.load_lora_weights("sspo-sd15")\n', "")
    monkeypatch.chdir(tmp_path)
    for mode, block in (("lora", lora), ("full", full)):
        run = train(mode, train_mode=mode, max_train_steps=1, rollout_steps=1, replay_steps=1)
        words = {name: str(sd), "sspo-sd15": str(run.path)}
        words |= {"torch.float16": "torch.float32", '.to("cuda")': ""}
        for before, after in words.items():
            block = block.replace(before, after)
        exec(block, {})
        assert (tmp_path / "fox.png").stat().st_size > 100
        (tmp_path / "fox.png").unlink()


def test_the_readme_has_the_flags_own_defaults():
    section = (ROOT / "README.md").read_text().split("## Flags of the method")[1].split("\n## ")[0]
    sd, flux2 = (vars(EVERY[kind].parse_args(REQUIRED[kind])) for kind in ("sd", "flux2"))
    words = {"off": False, "no limit": None, "an update's pairs, at most 16": sd["train_batch_size"]}
    rows, told = [line.split(" | ") for line in section.splitlines() if line.startswith("| `--")], {}
    for first, default, _ in rows:
        names = re.findall(r"`--(\w+)", first)
        plain, *flow = re.split(r" \(flow models: (\w+)\)", default)
        values = [words[plain]] if plain in words else plain.split(", ")
        told |= zip(names, values, strict=True)
        assert not flow or float(flow[0]) == flux2[names[0]]
    told = {name: type(sd[name])(value) if isinstance(value, str) else value for name, value in told.items()}
    assert told == {name: sd[name] for name in told} and len(told) > 14


@pytest.mark.parametrize("loss_type", ["sspo", "sft"])
def test_every_metric_is_explained(train, loss_type):
    run = train(loss_type, loss_type=loss_type, max_train_steps=1)
    table = (ROOT / "docs" / "metrics.md").read_text().split("\n\n##")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = set(re.findall(r"`([^`]+)`", " ".join(cells)))
    assert set(run.metrics[0]) <= explained
    assert loss_type == "sft" or set(run.metrics[0]) == explained


def test_the_lines_of_the_method_are_in_the_scripts():
    table = [line.split(" | ") for line in (ROOT / "docs" / "method.md").read_text().split("\n\n##")[0].splitlines()]
    rows = [cells for cells in table if len(cells) == 4 and cells[3].startswith("`")]
    assert len(rows) == 6
    for script in ROOT.glob("train_sspo_*.py"):
        source = script.read_text()
        for *_, functions, line in rows:
            assert f" {line.strip(' |`')}\n" in source, f"{script.name} has another line"
            for name in re.findall(r"`([\w.]+)`", functions):
                assert f"def {name.split('.')[-1]}(" in source


def test_what_is_said_of_curves_is_what_the_study_measured():
    """docs/metrics.md's numbers, from the study's results."""
    sys.path.insert(0, str(ROOT / "examples" / "study"))
    import report

    results, second, again = report.read_all()
    runs = [
        run
        for part in (results, second, *again.values())
        for of in part.values()
        for run in of.values()
        if "gap/winner" in run.get("curves", {})
    ]
    text = " ".join((ROOT / "docs" / "metrics.md").read_text().replace("−", "-").split())
    late = {name: [sum(run["curves"][name][10:]) / 10 for run in runs] for name in ("gap/winner", "gap/rival")}
    scores = [report.samples(run).mean() for run in runs]
    low = [i for i, score in enumerate(scores) if score < 0.3]
    wide = [scores[i] for i, gap in enumerate(late["gap/rival"]) if gap > 0.025 and i not in low]
    assert f"Of all {len(runs)} runs, the {dict(enumerate('no one two three four five'.split()))[len(low)]}" in text
    gaps = [late["gap/winner"][i] for i in low]
    assert f"`gap/winner` of {min(gaps):.4f} to +{max(gaps):.3f}" in text
    assert all(late["gap/rival"][i] > 0.025 for i in low) and f"as {len(wide)} others had" in text
    assert f"{sum(score > 0.75 for score in wide)} of which ended above 0.75" in text
    table = report.tables({"none": None})["signals"].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    told = [[float(row[4]) for row in cells if row[2] == "all"]]
    told += [[float(row[column]) for row in cells if row[2] != "all"] for column in (4, 5, 6, 8)]
    for values in told:
        assert f"between {min(values):.2f} and +{max(values):.2f}" in text


# ------------------------------------------------------------------------------------------------------------------
# The house
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", sorted(make_targets() - {"clean"}))
def test_what_make_would_run_exists(target):
    """`make help` names each target, and what its recipe calls is there."""
    assert f"make {target} " in (ROOT / "Makefile").read_text() or target == "help"
    recipe = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    named = re.findall(r"(?:examples|tests|utils)/[\w./-]+|requirements\.txt", recipe)
    assert target == "help" or named or "pytest" in recipe
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("hanging_up, handled", [(signal.SIG_DFL, None), (signal.SIG_IGN, "SIGTERM,SIGINT")])
@pytest.mark.parametrize("layout", [dict(GPUS=1), dict(GPUS=8), dict(GPUS=8, MACHINES=8, RANK=3, ADDRESS="10.0.0.1")])
def test_the_launcher_starts_the_papers_recipe_with_time_to_save(tmp_path, layout, hanging_up, handled):
    """
    An accelerate that tells what it was called with stands in for the real one. Where SIGHUP is ignored, as by nohup,
    torchelastic is told to leave it alone.
    """
    stub = tmp_path / "accelerate"
    stub.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "names = ('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', 'PET_SIGNALS_TO_HANDLE')\n"
        "print(json.dumps([*map(os.environ.get, names), *sys.argv[1:]]))\n"
    )
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MODEL": "-", "DATA": "-", "OUTPUT": "o"}
    environment |= {name: str(value) for name, value in layout.items()}
    launcher = str(ROOT / "examples" / "multi_gpu" / "launch.sh")
    # By a process of its own: preexec_fn may deadlock where there are threads.
    begin = f"import os, signal; signal.signal(signal.SIGHUP, signal.Handlers({int(hanging_up)}));"
    begin += f"os.execv({launcher!r}, [{launcher!r}, '--mixed_precision', 'fp16'])"
    ended = subprocess.run([sys.executable, "-c", begin], env=environment, check=True, capture_output=True, text=True)
    timeout, signals, *words = json.loads(ended.stdout)
    assert timeout == "600", "torchelastic gives 30 seconds otherwise"
    assert signals == handled
    assert words.pop(0) == "launch"
    known = launch_command_parser().parse_args(words)
    assert Path(known.training_script).resolve() == ROOT / "train_sspo_sd.py"
    assert known.config_file is None or Path(known.config_file).exists()
    args = EVERY["sd"].parse_args(known.training_script_args)
    processes = layout["GPUS"] * layout.get("MACHINES", 1)
    assert known.num_processes == processes
    assert args.train_batch_size * args.gradient_accumulation_steps * processes == 2048
    assert (args.train_mode, args.beta_dpo, args.ssr, args.replay_steps) == ("full", 2000, "sign", 30)
    assert args.max_train_steps == 210 and args.gradient_checkpointing
    assert (args.resume_from_checkpoint, args.checkpoints_total_limit) == ("latest", 2)
    assert args.mixed_precision == "fp16", "what stands behind the command is handed on"


def test_helpers_command_line_is_one(tmp_path):
    """The tests' own command line, so that the checks above do not pass because nothing is refused."""
    assert program_complaint(ROOT / "train_sspo_sd.py", flags("a", "b", "c")) is None
    assert "unrecognized" in program_complaint(ROOT / "train_sspo_sd.py", flags("a", "b", "c", rival_wait=1))
