"""What the tests share: how a script is run, in this process and as users do, and when two runs are the same."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

import train_sspo_flux2
import train_sspo_sd
import train_sspo_sdxl
import train_sspo_video
import train_sspo_wan


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sd": train_sspo_sd, "sdxl": train_sspo_sdxl, "video": train_sspo_video}  # of models with a UNet
EVERY = {**SCRIPTS, "flux2": train_sspo_flux2, "wan": train_sspo_wan}
WAN = dict(height=32, width=32, num_frames=5, resolution=None)  # the smallest clips of train_sspo_wan.py
long = pytest.mark.long  # what `make test` leaves out and `make test-faults` runs


def quick_first(first, others):
    """Parameters: the first one, and in the long part the others."""
    return [first, *(pytest.param(other, marks=long) for other in others if other != first)]


# For the fixture `each`, which is of the UNets' scripts without them. Shared code is so to the letter: test_copies.py.
with_every = pytest.mark.parametrize("each", EVERY, indirect=True)
with_shared_code = pytest.mark.parametrize("each", quick_first("sd", EVERY), indirect=True)
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
ENVIRONMENT = {**os.environ, "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}


class Run:
    """What a training run left in its output_dir."""

    def __init__(self, path):
        self.path = Path(path)

    @property
    def metrics(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def column(self, name):
        return [line[name] for line in self.metrics]


def flags(model, data, output, **options):
    """A command line of a short run; options override its flags, None or False leaves one out, True is a bare flag."""
    defaults = dict(
        pretrained_model_name_or_path=model,
        train_data_dir=data,
        output_dir=output,
        resolution=64,
        center_crop=True,
        train_batch_size=2,
        max_train_steps=4,
        replay_steps=2,
        rollout_steps=3,
        learning_rate=1e-3,
        checkpointing_steps=100,
        report_to="none",
    )
    words = []
    for name, value in {**defaults, **options}.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def forget_accelerator():
    """The next Accelerator of this process is made as its first."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run_main(script, words):
    """Runs a script's main in this process."""
    forget_accelerator()
    script.main(script.parse_args(words))


def open_winners(script, directory, data=None, **options):
    """A script's Winners, as flags and options name them; what they write lies in `directory`."""
    if script is train_sspo_video:
        options = {"motion_adapter_name_or_path": "unused", "num_frames": 4, "frame_stride": 2, **options}
    if script is train_sspo_wan:
        options = {**WAN, "fps": 16, **options}
    words = flags("unused", data, directory / "out", cache_dir=directory / "cache", **options)
    return script.Winners(script.parse_args(words))


def served(winners, count, **options):
    """The first `count` examples that the stream of one process gives; options: rank, world, cursor."""
    script = sys.modules[type(winners).__module__]
    micro_batches = script.WinnerStream(winners.load, winners, winners.args, **options)
    return list(itertools.islice((example for examples, _ in micro_batches for example in examples), count))


def launch(words, processes=1):
    """Starts train_sspo_sd.py by `accelerate launch`; two processes talk through gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        command += ["--multi_gpu", "--main_process_port", "0"]  # a free one: tests run side by side
    command = [str(word) for word in [*command, ROOT / "train_sspo_sd.py", *words]]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start(train, name, **options):
    """Starts a script by itself, in a group of its own."""
    command = [sys.executable, train.script.__file__, *train.words(name, **options)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)


def wait_for(what, process):
    """Waits until what() is true of a running process."""
    for _ in range(2400):
        if what():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    pytest.fail("the run does not move")


def updates(run):
    """How many lines metrics.jsonl has."""
    path = run.path / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def keep_models(monkeypatch, script):
    """A list of the models that runs of `script` hand to save_result."""
    kept, save = [], script.save_result
    monkeypatch.setattr(script, "save_result", lambda models, *rest: kept.append(models) or save(models, *rest))
    return kept


def forget_result(run):
    """Takes away what a finished run left, so that it can be resumed without being told that it is there."""
    for script in EVERY.values():
        for name in script.RESULTS:
            (run.path / name).unlink(missing_ok=True)


def resumed(train, run, step, **options):
    """As many updates as `run` made, stopped one update after checkpoint `step` and resumed from there."""
    total = len(run.metrics)
    forget_result(train("resumed", **{**options, "max_train_steps": step + 1, "checkpointing_steps": step}))
    return train("resumed", **{**options, "max_train_steps": total, "resume_from_checkpoint": "latest"})


# With an epsilon above the rounding weights can be compared.
LAYOUT = dict(max_train_steps=6, center_crop=False, random_flip=True, proportion_empty_prompts=0.3, adam_epsilon=1e-5)


def assert_same_but_for_rounding(one, other):
    """
    Errors to 1e-6 of themselves, weights (the last push to the bank) to 1e-5. A gap is a difference of errors, and the
    loss has beta / 2 = 1000 of it: of fp32's rounding, 1e-7 in an error, losses carry 1e-4, and gradients as much.
    """
    assert other.column("reference/index") == one.column("reference/index")
    for name in ("mse/policy_winner", "mse/policy_rival"):
        assert other.column(name) == pytest.approx(one.column(name), rel=1e-6)
    for name in ("gap/winner", "gap/rival"):
        assert other.column(name) == pytest.approx(one.column(name), abs=5e-7)
    assert other.column("loss") == pytest.approx(one.column("loss"), abs=2e-4)
    assert other.column("grad_norm") == pytest.approx(one.column("grad_norm"), rel=1e-3)
    base, ours, theirs = (
        load_file(run.path / "replay" / f"iteration-{i}.safetensors") for run, i in ((one, 0), (one, 3), (other, 3))
    )
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5
    assert max((ours[name] - base[name]).abs().max() for name in ours) > 1e-3, "they have moved"


def assert_same_result(one, other):
    """Weights, metrics but for the times, and the part of the bank that is drawn from, bit by bit."""
    records = sorted(one.path.glob("checkpoint-*/run.json"))
    assert records, "it tells what it is in a checkpoint"
    record = json.loads(records[0].read_text())["settings"]
    bank = train_sspo_sd.ReplayBank(one.path / "replay", record["--replay_size"])
    live = [bank.path(index) for index in bank.live(len(one.metrics) // record["--replay_steps"] + 1)]
    live = live if record["--loss_type"] == "sspo" else []
    results = [path for path in one.path.rglob("*.safetensors") if not {"replay", "cache"} & set(path.parts[:-1])]
    results = [path for path in results if "checkpoint-" not in str(path)]
    assert results, "it is over"
    for path in [*live, *results]:
        ours, theirs = load_file(path), load_file(other.path / path.relative_to(one.path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), path
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in run.metrics] for run in (one, other)
    ]
    assert timeless[0] == timeless[1]


def newcomer(command, **options):
    """Runs a command as a newcomer does: with nothing set that keeps libraries quiet. Gives what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)


def notices(stderr):
    """The lines that a program left on stderr beside its progress bars and the scripts' log."""
    lines = [line.replace("\x1b[A", "").strip() for line in re.split(r"[\r\n]", stderr)]
    wanted = r".*\[\d+:\d\d[<,].*\]|\d\d:\d\d:\d\d - train_sspo_\w+ - .*"
    return [line for line in lines if line and not re.fullmatch(wanted, line)]
