"""
How a run is killed or stopped at a named point of the code, alone or as one of two processes, and when it has ended as
if nothing had happened. Runs are forked from the tests' process, which has everything imported.
"""

import functools
import os
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from helpers import ENVIRONMENT, Run, assert_same_result, run_main


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

# A point of the code: the owner of a function (of the script, if it is None), its name, which of its calls (the so
# many-th, or the first one that is given a path of that name), and whether before or after it has done its work.
POINTS = {
    "the first self-sampling, with nothing to resume": (None, "sample_rivals", 1, "before"),
    "self-sampling, between two steps of the sampler": (None, "predict", 33, "before"),
    "the loss": (None, "training_loss", 5, "before"),
    "the optimizer's step": (torch.optim.AdamW, "step", 5, "after"),
    "the metrics": (None, "write_metrics", 5, "after"),
    "the base's push": ("ReplayBank", "push", 1, "before"),
    "a push, its file written but not yet in place": (os, "replace", "iteration-2.partial", "before"),
    "a push, in an update whose checkpoint is not there yet": ("ReplayBank", "push", 4, "after"),
    "evicting": ("ReplayBank", "evict", 3, "before"),
    "the first checkpoint, its state half written": (None, "save_denoiser", 1, "after"),
    "a checkpoint, complete but for its record": ("Accelerator", "save_state", 2, "after"),
    "a checkpoint, complete but not yet in place": (os, "replace", "checkpoint-6.partial", "before"),
    "an old checkpoint, not yet deleted": (os, "replace", "checkpoint-3", "before"),
    "an old checkpoint, half deleted": (shutil, "rmtree", "checkpoint-3.partial", "half"),
    "validation": (None, "write_samples", 2, "before"),
    "the last validation": (None, "decode_latents", 4, "before"),
    "saving the result": (None, "save_result", 1, "before"),
    "the model card": (None, "write_model_card", 1, "before"),
    "the result, written but not yet in place": (None, "write_model_card", 1, "after"),
    "the result, in place": (None, "write_result", 1, "after"),
}
WINDOWS = [  # one point for each window that a run has
    "self-sampling, between two steps of the sampler",
    "the loss",
    "the optimizer's step",
    "a push, its file written but not yet in place",
    "evicting",
    "a checkpoint, complete but for its record",
    "an old checkpoint, half deleted",
    "the last validation",
]
FILES = WINDOWS[3:7]  # those that depend on what is written, and so on --train_mode
FULL = [*FILES, "the first checkpoint, its state half written", "saving the result", "the model card"]

# at which point the signal comes, and after which update the run stops then
SIGNALS = {
    "self-sampling": ((None, "sample_rivals", 5, "before"), 5),
    "the loss": ((None, "training_loss", 5, "before"), 5),
    "a push": (("ReplayBank", "push", 3, "before"), 4),
    "an update that is due for validation": ((None, "training_loss", 3, "before"), 3),
    "writing a checkpoint": ((None, "save_denoiser", 2, "before"), 6),
    "validation": ((None, "draw_samples", 3, "before"), 6),
    "the last update": ((None, "training_loss", 9, "before"), 9),
    "the last validation": ((None, "draw_samples", 4, "before"), None),
    "reading the checkpoint": ((None, "make_accelerator", 1, "before"), 0),
    "loading the models": ((None, "load_models", 1, "after"), 0),
    "caching": ((None, "write_tensors", 1, "before"), 0),
}


def at(script, point, act):
    """Makes the process do `act` at a point of a script."""
    owner, name, which, when = point
    owner = script if owner is None else getattr(script, owner) if isinstance(owner, str) else owner
    function, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1 if isinstance(which, int) else which in [getattr(word, "name", None) for word in args])
        if sum(calls) != (which if isinstance(which, int) else 1) or not calls[-1]:
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


def run_and_exit(script, words, prepare):
    """Calls prepare() and the script's main, then ends this process, a child of the tests', as Python would end."""
    code = 1
    try:
        prepare()
        run_main(script, words)
        code = 0
    except SystemExit as exit:
        code = exit.code
    except KeyboardInterrupt:
        code = 130
    except script.UserError as error:
        print(f"UserError: {error}", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def in_child(train, prepare, name, **options):
    """Calls prepare() and train(...) in a child process. Returns its exit code, or minus the signal it died of."""
    words = train.words(name, **options)  # makes models and data, if they are not there yet, before the process forks
    child = os.fork()
    if child == 0:
        run_and_exit(train.script, words, prepare)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_script(train, prepare=lambda: None, name="run", **options):
    """
    Runs a script as __main__ in a child process, down to its last line. Returns its exit code and its lines on stderr.

    prepare() cannot take hold of the script's own functions, which are not there before.
    """
    words = train.words(name, **options)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(theirs, 2)
            os.close(ours)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            os.environ.update(ENVIRONMENT)
            sys.argv = [train.script.__file__, *map(str, words)]
            prepare()
            runpy.run_path(train.script.__file__, run_name="__main__")
            code = 0
        except SystemExit as exit:  # as Python does
            code = exit.code if isinstance(exit.code, int) else 1
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(theirs)
    with open(ours) as said:
        lines = said.read().strip().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines


def kill(train, name, point, **options):
    """A run that kills itself at a point."""
    code = in_child(train, lambda: at(train.script, point, send(signal.SIGKILL)), name, **options)
    assert code == -signal.SIGKILL, "the run did not come to the point"


def assert_as_never_stopped(whole, again):
    """Every update once, the same bits in weights, optimizer, bank, metrics and samples, nothing half written."""
    assert [line["step"] for line in again.metrics] == list(range(1, len(whole.metrics) + 1))
    assert_same_result(whole, again)
    optimizers = list(whole.path.glob("checkpoint-*/optimizer.bin"))
    assert optimizers
    for path in optimizers:
        states = [torch.load(run.path / path.relative_to(whole.path), weights_only=True) for run in (whole, again)]
        assert states[0]["state"]
        for ours, theirs in zip(*(state["state"].values() for state in states), strict=True):
            assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)
    for kind in ("checkpoint-*", "replay/*", "samples/*"):
        ours, theirs = ({path.name: path for path in run.path.glob(kind)} for run in (whole, again))
        assert ours and ours.keys() == theirs.keys()
        if kind == "samples/*":
            assert all(ours[name].read_bytes() == theirs[name].read_bytes() for name in ours)
    assert not list(again.path.rglob("*.partial"))


def kill_while_moving(move):
    """Makes the process kill itself before it moves the `move`-th part of the result into place."""
    replace, moved = os.replace, []

    def counting(source, place):
        moved.append("result.partial" in Path(source).parts)
        if moved[-1] and sum(moved) == move:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, place)

    os.replace = counting


def assert_result_is_whole_or_none(train, whole, move, **options):
    """
    A finished run is resumed for one more update and killed before its `move`-th move. Returns False if it has fewer.

    Where the old result was there is then none, and the run that is resumed puts the whole new one there.
    """
    longer = dict(options, max_train_steps=options["max_train_steps"] + 1)
    path = train.directory / "moved"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole(train, **options).path, path)
    resumed = dict(resume_from_checkpoint="latest", **longer)
    if in_child(train, lambda: kill_while_moving(move), "moved", **resumed) == 0:
        return False
    assert (path / "result.partial").exists()
    assert not [name for name in train.script.RESULTS if (path / name).exists()]
    assert_as_never_stopped(whole(train, **longer), train("moved", **resumed))
    return True


# Two processes, which talk through gloo.


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def ranks_in_children(train, name, prepare=None, patience=30, grace=0, **options):
    """
    Two ranks of a run; prepare(rank) is called in each. As torchrun does, the other one gets SIGTERM (`grace` seconds)
    after one has failed, and SIGKILL when it has not ended `patience` seconds later. Returns their exit codes; it is
    -n for one that died of signal n.
    """
    words, port, running, codes = train.words(name, **options), free_port(), {}, [None, None]

    def join(rank):
        os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        if prepare is not None:
            prepare(rank)

    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            run_and_exit(train.script, words, functools.partial(join, rank))
        running[child] = rank
        os.setpgid(child, next(iter(running)))  # one group, which can be killed at once
    deadline, signals = time.monotonic() + 300, [signal.SIGKILL]
    while running:
        polled = [os.waitpid(child, os.WNOHANG) for child in running]  # no others: they are waited for elsewhere
        ended = [(child, status) for child, status in polled if child]
        for child, status in ended:
            rank = running.pop(child)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] and running:
                deadline, signals = time.monotonic() + grace, [signal.SIGTERM, signal.SIGKILL]
        if ended:
            continue
        if time.monotonic() > deadline:
            for other in running:
                os.kill(other, signals[0])
            deadline, signals = time.monotonic() + patience, signals[1:] or signals
        else:
            time.sleep(0.05)
    return codes


def run_of_two(train, name, **options):
    """A run on two processes that nothing happens to."""
    assert ranks_in_children(train, name, **options) == [0, 0]
    return Run(train.directory / name)
