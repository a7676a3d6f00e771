"""A run is killed at named points of the code, goes on with `latest`, and must end as if it had never been killed."""

import os
import shutil
import signal

import pytest
import torch
from conftest import Run
from test_training import assert_same_result

import train_sspo_sd as script


OPTIONS = dict(
    max_train_steps=9,
    replay_steps=2,
    replay_size=3,
    checkpointing_steps=3,
    checkpoints_total_limit=2,
    validation_prompts=["a red circle"],
    validation_steps=3,
    proportion_empty_prompts=0.3,
)

# (what is killed, the function, at which of its calls, before or after it has done its work)
POINTS = [
    ("the first self-sampling, with nothing to resume", (script, "sample_rivals"), 1, "before"),
    ("self-sampling", (script, "predict"), 33, "before"),
    ("the loss", (script, "training_loss"), 5, "before"),
    ("the optimizer's step", (torch.optim.AdamW, "step"), 5, "after"),
    ("the metrics", (script.MetricsFile, "write"), 5, "after"),
    ("the base's push", (script.ReplayBank, "push"), 1, "before"),
    ("a push, its file written but not yet in place", (script, "save_file"), 3, "after"),
    ("a push", (script.ReplayBank, "push"), 4, "after"),
    ("evicting", (script.ReplayBank, "evict"), 3, "before"),
    ("the first checkpoint, its state half written", (script, "save_denoiser"), 1, "after"),
    ("a checkpoint, complete but for its record", (script.Accelerator, "save_state"), 2, "after"),
    ("taking the old checkpoint away, half done", (script.shutil, "rmtree"), 4, "half"),
    ("validation", (script.Validation, "write"), 2, "before"),
    ("the last validation", (script, "decode_latents"), 4, "before"),
    ("saving the result", (script, "save_result"), 1, "before"),
    ("the model card", (script, "write_model_card"), 1, "before"),
]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def patch(target, call, when):
    """Makes the `call`-th call of a function the process's last."""
    owner, name = target
    function, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) != call:
            return function(*args, **kwargs)
        if when == "half":  # of a folder
            for path in [path for path in sorted(args[0].rglob("*")) if path.is_file()][1:]:
                path.unlink()
        elif when == "after":
            function(*args, **kwargs)
        die()

    setattr(owner, name, wrapped)


def killed_run(train, name, target, call, when, **options):
    """Runs in a child process that dies at the given point."""
    child = os.fork()
    if child == 0:
        try:
            patch(target, call, when)
            train(name, **options)
        finally:
            os._exit(0)  # the point was never reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the run did not come to the point"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is never killed, made once for each mode."""
    return {}, tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("what, target, call, when", POINTS, ids=[point[0].replace(" ", "-") for point in POINTS])
def test_killed_run_ends_as_if_never_killed(train, whole, mode, what, target, call, when):
    runs, directory = whole
    if mode not in runs:
        path = train("whole", train_mode=mode, **OPTIONS).path
        runs[mode] = Run(shutil.copytree(path, directory / mode))
    killed_run(train, "killed", target, call, when, train_mode=mode, **OPTIONS)
    again = train("killed", train_mode=mode, resume_from_checkpoint="latest", **OPTIONS)
    assert [line["step"] for line in again.metrics] == list(range(1, 10))
    assert_same_result(runs[mode], again)
    states = [
        torch.load(run.path / "checkpoint-9" / "optimizer.bin", weights_only=True) for run in (runs[mode], again)
    ]
    for ours, theirs in zip(*(state["state"].values() for state in states)):
        assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)
    assert not list(again.path.glob("*.partial")), "nothing half written is left"
    assert sorted(path.name for path in again.path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


def test_half_a_line_of_metrics_is_mended(train):
    run = train("run", **OPTIONS)
    text = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "pytorch_lora_weights.safetensors").unlink()
    shutil.rmtree(run.path / "checkpoint-9")
    (run.path / "metrics.jsonl").write_text("".join(text[:7]) + text[7][:20])
    again = train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert [line["step"] for line in again.metrics] == list(range(1, 10))
