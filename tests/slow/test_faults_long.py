"""
The long part of the faults, behind `make test-faults`: all points on other data and other scripts, two processes, and
what launchers do with signals and failures. tests/README.md has the table.
"""

import os
import re
import signal

import pytest
import tiny
from faults import (
    FILES,
    FULL,
    OPTIONS,
    POINTS,
    SIGNALS,
    WINDOWS,
    assert_as_never_stopped,
    assert_result_is_whole_or_none,
    at,
    kill,
    ranks_in_children,
    run_of_two,
    send,
)
from helpers import (
    LAYOUT,
    SCRIPTS,
    Run,
    assert_same_but_for_rounding,
    assert_same_result,
    launch,
    start,
    updates,
    wait_for,
)


pytestmark = pytest.mark.long
CACHE_POINTS = {
    "the cache, encoded and not yet written": (None, "write_tensors", 1, "before"),
    "the cache, written and not yet in place": (os, "replace", "rows-0.partial", "before"),
}


def killed_and_resumed(train, whole, point, **options):
    kill(train, "killed", point, **options)
    again = train("killed", resume_from_checkpoint="latest", **options)
    assert_as_never_stopped(whole(train, **options), again)


@pytest.mark.parametrize("what", [what for what in POINTS if what not in FULL])
def test_killed_in_full_training(train, whole, what):
    """At the points that the other part of the tests leaves to this one."""
    killed_and_resumed(train, whole, POINTS[what], train_mode="full", **OPTIONS)


@pytest.mark.parametrize(
    "data, what",
    [
        *(("cache_latents", what) for what in [*CACHE_POINTS, *POINTS]),
        *(("streaming", what) for what in POINTS),
    ],
)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_killed_on_other_data(train, whole, mode, data, what):
    point = {**POINTS, **CACHE_POINTS}[what]
    killed_and_resumed(train, whole, point, train_mode=mode, **{data: True}, **OPTIONS)


@pytest.mark.parametrize("mode, what", [*(("lora", what) for what in WINDOWS), *(("full", what) for what in FILES)])
@pytest.mark.parametrize("kind", ["sdxl", "video", "flux2", "wan"])
def test_killed_in_other_scripts(trains, whole, kind, mode, what):
    killed_and_resumed(trains[kind], whole, POINTS[what], train_mode=mode, **OPTIONS)


# Parts of a result, in LoRA and in full mode.
MOVES = {"sd": (2, 7), "sdxl": (2, 9), "video": (2, 3), "flux2": (2, 7), "wan": (2, 7)}


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", MOVES)
def test_a_result_is_whole_or_none_at_every_move(trains, whole, kind, mode):
    options, move = dict(OPTIONS, train_mode=mode, max_train_steps=3), 1
    while assert_result_is_whole_or_none(trains[kind], whole, move, **options):
        move += 1
    assert move - 1 == MOVES[kind][mode == "full"]


# Two processes


@pytest.fixture(scope="module")
def whole_of_two():
    """whole_of_two(train, flag=value, ...) is a run on two processes that nothing happened to, made once."""
    runs = {}

    def make(train, **options):
        key = repr(sorted(options.items(), key=str))
        if key not in runs:
            runs[key] = run_of_two(train, "whole", **options)
        return runs[key]

    return make


BOTH = {  # the points that rank 1 comes to as well
    "self-sampling, between two steps of the sampler": (None, "predict", 17, "before"),  # it draws no samples
    "the loss": POINTS["the loss"],
    "the optimizer's step": POINTS["the optimizer's step"],
    "a checkpoint, complete but for its record": POINTS["a checkpoint, complete but for its record"],
}


@pytest.mark.parametrize(
    "victim, what",
    [(who, what) for who in ("rank 0", "both") for what in WINDOWS] + [("rank 1", what) for what in BOTH],
)
def test_killed_on_two_processes(train, whole_of_two, what, victim):
    """What ends is bit-identical to two processes that were never killed, though a rank outlived the other."""
    options = dict(OPTIONS, train_batch_size=1)

    def prepare(rank):
        if victim == "both" and rank == 0:
            at(train.script, POINTS[what], lambda: os.killpg(0, signal.SIGKILL))
        elif victim == f"rank {rank}":
            at(train.script, (BOTH if rank else POINTS)[what], send(signal.SIGKILL))

    codes = ranks_in_children(train, "killed", prepare, **options)
    killed = {"rank 0": codes[:1], "rank 1": codes[1:], "both": codes}[victim]
    assert set(killed) == {-signal.SIGKILL}, codes
    assert all(codes), "no rank may end as if all was well"
    again = run_of_two(train, "killed", resume_from_checkpoint="latest", **options)
    assert_as_never_stopped(whole_of_two(train, **options), again)


@pytest.mark.parametrize(
    "what, who",
    [("self-sampling", 0), ("self-sampling", 1), ("the loss", 0), ("the loss", 1), ("writing a checkpoint", 0)],
)
def test_signal_to_one_of_two_processes(train, whole_of_two, what, who):
    """Both stop after the same update, with one checkpoint that both took part in."""
    point, step = SIGNALS[what]
    options = dict(OPTIONS, train_batch_size=1)

    def prepare(rank):
        if rank == who:
            at(train.script, point, send(signal.SIGTERM))

    codes = ranks_in_children(train, "stopped", prepare, **options)
    # The one that ends later gets SIGTERM again, when it has nothing left to do.
    assert set(codes) <= {128 + signal.SIGTERM, -signal.SIGTERM} and 128 + signal.SIGTERM in codes
    run = Run(train.directory / "stopped")
    assert len(run.metrics) == step
    assert (run.path / f"checkpoint-{step}" / "random_states_1.pkl").exists()
    again = run_of_two(train, "stopped", resume_from_checkpoint="latest", **options)
    assert_same_result(whole_of_two(train, **options), again)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_two_processes_are_one(trains, kind, mode):
    """2 x 2 against 1 x 4, for all scripts."""
    train, options = trains[kind], dict(LAYOUT, train_mode=mode)
    one = train("one", train_batch_size=4, **options)
    assert_same_but_for_rounding(one, run_of_two(train, "two", train_batch_size=2, **options))


@pytest.mark.parametrize("rollouts", [1, 4])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_accumulated_batches_are_one(trains, kind, mode, rollouts):
    """1 x 1 with 4 accumulated and rivals sampled 1 or 4 at once against 1 x 4, for all scripts."""
    train, options = trains[kind], dict(LAYOUT, train_mode=mode)
    one = train("one", train_batch_size=4, **options)
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=rollouts)
    assert_same_but_for_rounding(one, train("parts", **parts, **options))


# What launchers do: processes as users start them


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_on_one_rank_ends_both_and_is_named(train, tmp_path, workers):
    """It is met by one of two ranks, the other waits for it in vain: one line from us, and no hang."""
    folder = tmp_path / "data"
    tiny.folder_of_winners(folder)
    (folder / "3.png").write_bytes(b"")
    options = dict(data=folder, train_batch_size=1, max_train_steps=20, dataloader_num_workers=workers)
    process = launch(train.words("run", **options), processes=2)
    output, _ = process.communicate(timeout=180)
    assert process.returncode not in (0, None)
    line = r"train_sspo_sd.py: the image .*3\.png in row 3 cannot be read: .*: fix it, or .*--on_bad_example skip"
    assert len(re.findall(line, output)) == 1
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_signal_to_the_launcher_of_two_processes(train, workers):
    """torchrun passes SIGTERM on to the group of each rank, loaders and all: both save, and the run can be resumed."""
    options = dict(max_train_steps=400, train_batch_size=1, dataloader_num_workers=workers, checkpointing_steps=1000)
    run = Run(train.directory / "stopped")
    process = launch(train.words("stopped", **options), processes=2)
    wait_for(lambda: updates(run) >= 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    step = updates(run)
    assert [path.name for path in run.path.glob("checkpoint-*")] == [f"checkpoint-{step}"], output
    options.update(max_train_steps=step + 2, checkpointing_steps=step + 2)
    again = run_of_two(train, "stopped", resume_from_checkpoint="latest", **options)
    assert_same_result(run_of_two(train, "whole", **options), again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group(train, number):
    """As the terminal's Ctrl-C and many schedulers send it: the loader processes, too, get it."""
    run = Run(train.directory / "stopped")
    options = dict(max_train_steps=400, dataloader_num_workers=2, gradient_accumulation_steps=4)
    process = start(train, "stopped", **options)
    wait_for(lambda: updates(run) >= 3, process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert (run.path / f"checkpoint-{updates(run)}" / "run.json").exists()


def test_interrupt_of_the_whole_group_while_it_caches(train, tmp_path):
    """Quiet, and what was cached is kept; the run that is resumed is the one that was never stopped."""
    data = tiny.folder_of_winners(tmp_path / "data", 64 * 20)
    options = dict(data=data, cache_latents=True, dataloader_num_workers=2, max_train_steps=2, checkpointing_steps=2)
    run = Run(train.directory / "stopped")
    process = start(train, "stopped", **options)
    wait_for(lambda: list(run.path.rglob("rows-*.safetensors")), process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    cached = {path: path.stat().st_mtime_ns for path in run.path.rglob("rows-*.safetensors")}
    assert 0 < len(cached) < 20
    again = train("stopped", resume_from_checkpoint="latest", **options)
    assert cached == {path: path.stat().st_mtime_ns for path in cached}
    assert_same_result(train("whole", **options), again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_the_first_update(train, number):
    """While it loads there is nothing to save: it ends at once, without a traceback."""
    run = Run(train.directory / "run")
    process = start(train, "run")
    wait_for(run.path.exists, process)  # made by the first check of the flags
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGTERM else 130)
    assert "Traceback" not in output
    assert not (run.path / "metrics.jsonl").exists()
