"""What the tests share: tiny pipelines on disk, a folder of winners, and a way to run a script in this process."""

import json
import os
import re
import signal
import sys
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two shared cores spin on models this small
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell's background job ignores SIGINT, and so would every run that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import train_sspo_sd


torch.set_num_threads(1)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # it waits five seconds whenever a parquet stream is closed


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """A tiny Stable Diffusion pipeline that predicts the noise."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sd_v(tmp_path_factory):
    """A tiny Stable Diffusion pipeline that predicts the velocity."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd-v"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def winners(tmp_path_factory):
    """An imagefolder of eight winners."""
    return tiny.folder_of_winners(tmp_path_factory.mktemp("data") / "winners")


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
    """A command line of a short run; options override its flags, None leaves one out, True is a bare flag."""
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


def notices(stderr):
    """The lines that a program left on stderr beside its progress bars and the scripts' log."""
    lines = [line.replace("\x1b[A", "").strip() for line in re.split(r"[\r\n]", stderr)]
    wanted = r".*\[\d+:\d\d[<,].*\]|\d\d:\d\d:\d\d - train_sspo_\w+ - .*"
    return [line for line in lines if line and not re.fullmatch(wanted, line)]


@pytest.fixture
def train(sd, winners, tmp_path):
    """train(name, flag=value, ...) runs train_sspo_sd.py's main in this process and returns the Run."""

    def run(name="run", script=train_sspo_sd, model=sd, data=winners, **options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        script.main(script.parse_args(flags(model, data, tmp_path / name, **options)))
        return Run(tmp_path / name)

    run.directory = tmp_path
    return run
