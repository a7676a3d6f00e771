"""
The long part of the faults, behind `make test-faults`: all points on other data and other scripts, two processes, and
what launchers do with signals and failures. tests/README.md has the table.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny
import torch
from conftest import ROOT, Run, flags
from test_faults import (
    OPTIONS,
    POINTS,
    SIGNALS,
    assert_as_never_stopped,
    assert_result_is_whole_or_none,
    at,
    in_child,
    send,
    whole,  # noqa: F401
)
from test_processes import ENVIRONMENT, launch, start, wait_for_updates
from test_sdxl import sdxl, train_xl  # noqa: F401
from test_training import LAYOUT, assert_same_but_for_rounding, assert_same_result
from test_video import clips, motion, train_video  # noqa: F401

import train_sspo_sd
import train_sspo_sdxl
import train_sspo_video


pytestmark = pytest.mark.long
SCRIPTS = {"sd": train_sspo_sd, "sdxl": train_sspo_sdxl, "video": train_sspo_video}
CACHE_POINTS = {
    "the cache, encoded and not yet written": ("LatentCache", "write", 1, "before"),
    "the cache, written and not yet in place": (None, "save_file", 1, "after"),
}
WINDOWS = [  # one point for each window that a run has
    "self-sampling",
    "the loss",
    "the optimizer's step",
    "a push, its file written but not yet in place",
    "evicting",
    "a checkpoint, complete but for its record",
    "taking the old checkpoint away, half done",
    "the last validation",
]


@pytest.fixture
def trains(train, train_xl, train_video):  # noqa: F811
    return {"sd": train, "sdxl": train_xl, "video": train_video}


def killed_and_resumed(train, whole, what, point, module=train_sspo_sd, **options):  # noqa: F811
    code = in_child(train, lambda: at(point, send(signal.SIGKILL), module), "killed", **options)
    assert code == -signal.SIGKILL, f"the run did not come to {what}"
    again = train("killed", resume_from_checkpoint="latest", **options)
    assert_as_never_stopped(whole(train, module, **options), again)


@pytest.mark.parametrize("data", [dict(cache_latents=True), dict(streaming=True)], ids=["cached", "streaming"])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("what", [*POINTS, *CACHE_POINTS])
def test_killed_on_other_data(train, whole, mode, data, what):  # noqa: F811
    if what in CACHE_POINTS and "streaming" in data:
        pytest.skip("a stream has no cache")
    point = {**POINTS, **CACHE_POINTS}[what]
    killed_and_resumed(train, whole, what, point, train_mode=mode, **data, **OPTIONS)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("script", ["sdxl", "video"])
@pytest.mark.parametrize("what", WINDOWS)
def test_killed_in_other_scripts(trains, whole, script, mode, what):  # noqa: F811
    if mode == "full" and what not in WINDOWS[3:6]:
        pytest.skip("as in LoRA mode")
    killed_and_resumed(trains[script], whole, what, POINTS[what], SCRIPTS[script], train_mode=mode, **OPTIONS)


MOVES = {"sd": (2, 7), "sdxl": (2, 9), "video": (2, 3)}  # of the parts of a result, in LoRA and in full mode


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_result_is_whole_or_none_at_every_move(trains, whole, tmp_path, script, mode):  # noqa: F811
    options, move = dict(OPTIONS, train_mode=mode, max_train_steps=3), 1
    while assert_result_is_whole_or_none(trains[script], whole, tmp_path, move, SCRIPTS[script], **options):
        move += 1
    assert move - 1 == MOVES[script][mode == "full"]


# Two processes. They are forked from this one, which has everything imported, and talk through gloo.


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def ranks_in_children(train, name, prepare=None, patience=30, **options):
    """
    Two ranks of a run; prepare(rank) is called in each. As torchrun does, the other one gets SIGTERM when one has
    failed, and SIGKILL when it does not end then. Returns their exit codes; it is -n for one that died of signal n.
    """
    port, running, codes = free_port(), {}, [None, None]

    def join(rank):
        os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        if prepare is not None:
            prepare(rank)

    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                join(rank)
                train(name, **options)
                code = 0
            except train_sspo_sd.UserError as error:
                print(f"UserError on rank {rank}: {error}", file=sys.stderr, flush=True)
            except SystemExit as exit:
                code = exit.code
            finally:
                os._exit(code)
        running[child] = rank
        os.setpgid(child, next(iter(running)))  # one group, which can be killed at once
    deadline = time.monotonic() + 300
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            rank = running.pop(child)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] and running:
                for other in running:
                    os.kill(other, signal.SIGTERM)
                deadline = time.monotonic() + patience
        elif time.monotonic() > deadline:
            for other in running:
                os.kill(other, signal.SIGKILL)
            deadline = time.monotonic() + 30
        else:
            time.sleep(0.05)
    return codes


@pytest.fixture(scope="module")
def whole_of_two():
    return {}


def two_whole(train, whole_of_two, **options):
    key = repr(sorted(options.items(), key=str))
    if key not in whole_of_two:
        assert ranks_in_children(train, "whole", **options) == [0, 0]
        whole_of_two[key] = Run(train.directory / "whole")
    return whole_of_two[key]


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "both"])
@pytest.mark.parametrize("what", WINDOWS)
def test_killed_on_two_processes(train, whole_of_two, what, victim):
    """
    Rank 0 is killed at any point, rank 1 at those that it comes to. What ends is bit-identical to two processes that
    were never killed, though a rank outlived the other.
    """
    if victim == "rank 1" and what not in ("self-sampling", "the loss", "the optimizer's step", WINDOWS[5]):
        pytest.skip("rank 1 does not come there")
    options = dict(OPTIONS, train_batch_size=1)

    def prepare(rank):
        if rank == (victim == "rank 1"):
            act = (lambda: os.killpg(0, signal.SIGKILL)) if victim == "both" else send(signal.SIGKILL)
            at(POINTS[what], act)

    codes = ranks_in_children(train, "killed", prepare, **options)
    killed = {"rank 0": codes[:1], "rank 1": codes[1:], "both": codes}[victim]
    assert set(killed) == {-signal.SIGKILL}, codes
    assert all(codes), "no rank may end as if all was well"
    assert ranks_in_children(train, "killed", resume_from_checkpoint="latest", **options) == [0, 0]
    assert_as_never_stopped(two_whole(train, whole_of_two, **options), Run(train.directory / "killed"))


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", ["self-sampling", "the loss", "writing a checkpoint"])
def test_signal_to_one_of_two_processes(train, whole_of_two, what, who):
    """Both stop after the same update, with one checkpoint that both took part in."""
    if who == 1 and what == "writing a checkpoint":
        pytest.skip("rank 1 does not come there")
    point, step = SIGNALS[what]
    options = dict(OPTIONS, train_batch_size=1)

    def prepare(rank):
        if rank == who:
            at(point, send(signal.SIGTERM))

    codes = ranks_in_children(train, "stopped", prepare, **options)
    # The one that ends later gets SIGTERM again, when it has nothing left to do.
    assert set(codes) <= {128 + signal.SIGTERM, -signal.SIGTERM} and 128 + signal.SIGTERM in codes
    run = Run(train.directory / "stopped")
    assert len(run.metrics) == step
    assert (run.path / f"checkpoint-{step}" / "random_states_1.pkl").exists()
    assert ranks_in_children(train, "stopped", resume_from_checkpoint="latest", **options) == [0, 0]
    assert_same_result(two_whole(train, whole_of_two, **options), run)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_are_one(trains, script, mode):
    """2 x 2 against 1 x 4, for all scripts."""
    train, options = trains[script], dict(LAYOUT, train_mode=mode)
    one = train("one", train_batch_size=4, **options)
    assert ranks_in_children(train, "two", train_batch_size=2, **options) == [0, 0]
    assert_same_but_for_rounding(one, Run(one.path.parent / "two"))


@pytest.mark.parametrize("rollouts", [1, 4])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulated_batches_are_one(trains, script, mode, rollouts):
    """1 x 1 with 4 accumulated and rivals sampled 1 or 4 at once against 1 x 4, for all scripts."""
    train, options = trains[script], dict(LAYOUT, train_mode=mode)
    one = train("one", train_batch_size=4, **options)
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=rollouts)
    assert_same_but_for_rounding(one, train("parts", **parts, **options))


# What launchers do: processes as users start them.


def test_a_bad_picture_on_one_rank_ends_both_and_is_named(sd, tmp_path):
    """It is met by one of two ranks, the other waits for it in vain: one line from us, and no hang."""
    folder = tmp_path / "data"
    tiny.folder_of_winners(folder)
    (folder / "3.png").write_bytes(b"")
    process = launch(flags(sd, folder, tmp_path / "run", train_batch_size=1, max_train_steps=20), processes=2)
    output, _ = process.communicate(timeout=180)
    assert process.returncode not in (0, None)
    assert len(re.findall(r"train_sspo_sd.py: the picture .*3\.png in row 3 cannot be read", output)) == 1
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_signal_to_the_launcher_of_two_processes(train, sd, winners, tmp_path, workers):
    """torchrun passes SIGTERM on to the group of each rank, loaders and all: both save, and the run can go on."""
    options = dict(max_train_steps=400, train_batch_size=1, dataloader_num_workers=workers, checkpointing_steps=1000)
    run = Run(tmp_path / "stopped")
    process = launch(flags(sd, winners, run.path, **options), processes=2)
    wait_for_updates(run, 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    step = len(run.metrics)
    assert [path.name for path in run.path.glob("checkpoint-*")] == [f"checkpoint-{step}"], output
    options.update(max_train_steps=step + 2, checkpointing_steps=step + 2)
    assert ranks_in_children(train, "stopped", resume_from_checkpoint="latest", **options) == [0, 0]
    assert ranks_in_children(train, "whole", **options) == [0, 0]
    assert_same_result(Run(tmp_path / "whole"), run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group(sd, winners, tmp_path, number):
    """As the terminal's Ctrl-C and many schedulers send it: the loader processes, too, get it."""
    run = Run(tmp_path / "stopped")
    options = dict(max_train_steps=400, dataloader_num_workers=2, gradient_accumulation_steps=4)
    command = [sys.executable, ROOT / "train_sspo_sd.py", *flags(sd, winners, run.path, **options)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for_updates(run, 3, process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert (run.path / f"checkpoint-{len(run.metrics)}" / "run.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_the_first_update(sd, winners, tmp_path, number):
    """While it imports and loads there is nothing to save: it ends at once, without a traceback."""
    process = start(sd, winners, tmp_path / "run")
    while not (tmp_path / "run").exists():  # made by the first check of the flags
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGTERM else 130)
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("form", ["--hub_token {}", "--hub_token={}"])
def test_the_token_is_written_nowhere(sd, winners, tmp_path, form):
    """Not in a file that the run leaves, nor in what it prints: not even when the hub refuses it."""
    words = [str(word) for word in flags(sd, winners, tmp_path / "run", report_to="tensorboard", max_train_steps=2)]
    words += ["--checkpointing_steps", "1", "--push_to_hub", *form.format("hf_SECRETSECRETSECRET").split()]
    result = subprocess.run([sys.executable, ROOT / "train_sspo_sd.py", *words], env=ENVIRONMENT, capture_output=True)
    printed = (result.stdout + result.stderr).decode()
    assert result.returncode == 1 and "the hub did not take it" in printed.splitlines()[-1]
    assert "Traceback" not in printed and "SECRET" not in printed
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if b"SECRET" in path.read_bytes()]
