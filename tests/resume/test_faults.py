"""
A run is killed or stopped at named points of the code, goes on with `latest`, and must end as if nothing had happened.

These are all points for Stable Diffusion; tests/test_faults_long.py has the other data, scripts and two processes.
"""

import os
import shutil
import signal
from pathlib import Path

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

# what is killed: the owner of a function (of the script, if it is None), its name, at which of its calls, and whether
# before or after it has done its work
POINTS = {
    "the first self-sampling, with nothing to resume": (None, "sample_rivals", 1, "before"),
    "self-sampling": (None, "predict", 33, "before"),
    "the loss": (None, "training_loss", 5, "before"),
    "the optimizer's step": (torch.optim.AdamW, "step", 5, "after"),
    "the metrics": ("MetricsFile", "write", 5, "after"),
    "the base's push": ("ReplayBank", "push", 1, "before"),
    "a push, its file written but not yet in place": (None, "save_file", 3, "after"),
    "a push": ("ReplayBank", "push", 4, "after"),
    "evicting": ("ReplayBank", "evict", 3, "before"),
    "the first checkpoint, its state half written": (None, "save_denoiser", 1, "after"),
    "a checkpoint, complete but for its record": ("Accelerator", "save_state", 2, "after"),
    "taking the old checkpoint away, half done": (shutil, "rmtree", 4, "half"),
    "validation": ("Validation", "write", 2, "before"),
    "the last validation": (None, "decode_latents", 4, "before"),
    "saving the result": (None, "save_result", 1, "before"),
    "the model card": (None, "write_model_card", 1, "before"),
    "the result, written but not yet in place": (None, "write_model_card", 1, "after"),
}


def at(point, act, module=script):
    """Makes the process do `act` at a point."""
    owner, name, call, when = point
    owner = module if owner is None else getattr(module, owner) if isinstance(owner, str) else owner
    function, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) != call:
            return function(*args, **kwargs)
        if when == "half":  # of a folder
            for path in [path for path in sorted(args[0].rglob("*")) if path.is_file()][1:]:
                path.unlink()
        if when != "after":
            act()
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        act()
        return result

    setattr(owner, name, wrapped)


def send(*numbers):
    """An act: this process gets these signals."""

    def act():
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def in_child(train, prepare, *names, **options):
    """Calls prepare() and train(...) in a child process. Returns its exit code, or minus the signal it died of."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare()
            train(*names, **options)
            code = 0
        except SystemExit as exit:
            code = exit.code
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_as_never_stopped(whole, again):
    """Every update once, the same bits in weights, optimizer, bank, metrics and samples, nothing half written."""
    assert [line["step"] for line in again.metrics] == list(range(1, len(whole.metrics) + 1))
    assert_same_result(whole, again)
    for path in whole.path.glob("checkpoint-*/optimizer.bin"):
        states = [torch.load(run.path / path.relative_to(whole.path), weights_only=True) for run in (whole, again)]
        for ours, theirs in zip(*(state["state"].values() for state in states)):
            assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)
    for kind in ("checkpoint-*", "samples/*"):
        ours, theirs = ({path.name: path for path in run.path.glob(kind)} for run in (whole, again))
        assert ours.keys() == theirs.keys()
        if kind == "samples/*":
            assert all(ours[name].read_bytes() == theirs[name].read_bytes() for name in ours)
    assert not list(again.path.rglob("*.partial"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(train, flag=value, ...) is the run that is never stopped, made once for each script and set of flags."""
    runs = {}

    def make(train, module=script, **options):
        key = module.__name__ + repr(sorted(options.items(), key=str))
        if key not in runs:
            path = train("whole", **options).path
            runs[key] = Run(shutil.move(path, tmp_path_factory.mktemp("whole") / "run"))
        return runs[key]

    return make


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("what", POINTS)
def test_killed_run_ends_as_if_never_killed(train, whole, mode, what):
    options = dict(OPTIONS, train_mode=mode)
    code = in_child(train, lambda: at(POINTS[what], send(signal.SIGKILL)), "killed", **options)
    assert code == -signal.SIGKILL, "the run did not come to the point"
    again = train("killed", resume_from_checkpoint="latest", **options)
    assert_as_never_stopped(whole(train, **options), again)


def kill_while_moving(move):
    """Makes the process kill itself before it moves the `move`-th part of the result into place."""
    replace, moved = os.replace, []

    def counting(source, place):
        moved.append("result.partial" in Path(source).parts)
        if moved[-1] and sum(moved) == move:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, place)

    os.replace = counting


def assert_result_is_whole_or_none(train, whole, directory, move, module=script, **options):
    """
    A finished run goes on for an update and is killed before its `move`-th move. Returns False if it has fewer.

    Where the old result was there is then none, and the run that goes on puts the whole new one there.
    """
    longer = dict(options, max_train_steps=options["max_train_steps"] + 1)
    path = directory / "moved"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole(train, module, **options).path, path)
    resumed = dict(resume_from_checkpoint="latest", **longer)
    if in_child(train, lambda: kill_while_moving(move), "moved", **resumed) == 0:
        return False
    assert (path / "result.partial").exists()
    assert not [name for name in module.RESULTS if (path / name).exists()]
    assert_as_never_stopped(whole(train, module, **longer), train("moved", **resumed))
    return True


@pytest.mark.parametrize("mode, move", [("lora", 2), ("full", 4)])
def test_a_result_is_whole_or_none(train, whole, mode, move):
    """Killed while an old result is replaced; the long part has every move of every script."""
    assert assert_result_is_whole_or_none(train, whole, train.directory, move, **dict(OPTIONS, train_mode=mode))


# at which point the signal comes, and after which update the run stops then
SIGNALS = {
    "self-sampling": ((None, "sample_rivals", 5, "before"), 5),
    "the loss": ((None, "training_loss", 5, "before"), 5),
    "a push": (("ReplayBank", "push", 3, "before"), 4),
    "writing a checkpoint": ((None, "save_denoiser", 2, "before"), 6),
    "validation": (("Validation", "sample", 3, "before"), 6),
    "the last update": ((None, "training_loss", 9, "before"), 9),
    "reading the checkpoint": ((None, "make_accelerator", 1, "before"), None),
    "loading the models": ((None, "load_models", 1, "after"), None),
    "caching": (("LatentCache", "write", 1, "before"), None),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", SIGNALS)
def test_stopped_run_saves_within_its_update_and_ends_as_if_never_stopped(train, whole, what, number):
    """One checkpoint, of the update in flight; code 128 + number. Before the first update there is nothing to save."""
    if number == signal.SIGINT and what in ("a push", "the loss"):
        pytest.skip("the same as for SIGTERM")
    point, step = SIGNALS[what]
    options = dict(OPTIONS, cache_latents=what == "caching")
    code = in_child(train, lambda: at(point, send(number)), "stopped", **options)
    run = Run(train.directory / "stopped")
    if step is None:
        assert code == (-signal.SIGTERM if number == signal.SIGTERM else 130), "at once"
        assert not (run.path / "metrics.jsonl").exists()
    else:
        assert code == 128 + number
        assert len(run.metrics) == step
        saved = sorted(path.name for path in run.path.glob("checkpoint-*"))
        assert saved == [f"checkpoint-{n}" for n in sorted({*range(3, step, 3), step})[-2:]]
    again = train("stopped", resume_from_checkpoint="latest", **options)
    assert_same_result(whole(train, **options), again)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["self-sampling", "writing a checkpoint"])
def test_a_second_signal_stops_at_once_and_harms_nothing(train, whole, what, second):
    code = in_child(train, lambda: at(SIGNALS[what][0], send(signal.SIGTERM, second)), "stopped", **OPTIONS)
    assert code == (-signal.SIGTERM if second == signal.SIGTERM else 130)
    assert len(Run(train.directory / "stopped").metrics) == SIGNALS[what][1] - (what == "self-sampling")
    again = train("stopped", resume_from_checkpoint="latest", **OPTIONS)
    assert_as_never_stopped(whole(train, **OPTIONS), again)


def test_half_a_line_of_metrics_is_mended(train):
    run = train("run", **OPTIONS)
    text = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "pytorch_lora_weights.safetensors").unlink()
    shutil.rmtree(run.path / "checkpoint-9")
    (run.path / "metrics.jsonl").write_text("".join(text[:7]) + text[7][:20])
    again = train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert [line["step"] for line in again.metrics] == list(range(1, 10))
