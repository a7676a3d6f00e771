"""
A run is killed or stopped at named points of the code, resumed with `latest`, and ends as if nothing had happened.

These are all points for Stable Diffusion; tests/slow/test_faults_long.py has other data, scripts and two processes.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess

import pytest
from faults import (
    FULL,
    OPTIONS,
    POINTS,
    SIGNALS,
    assert_as_never_stopped,
    assert_result_is_whole_or_none,
    at,
    in_child,
    kill,
    send,
)
from helpers import Run, assert_same_result, forget_result, long, quick_first, with_shared_code


@pytest.mark.parametrize(
    "what, mode", [*((what, "lora") for what in POINTS), *(pytest.param(what, "full", marks=long) for what in FULL)]
)
def test_killed_run_ends_as_if_never_killed(train, whole, what, mode):
    options = dict(OPTIONS, train_mode=mode)
    kill(train, "killed", POINTS[what], **options)
    again = train("killed", resume_from_checkpoint="latest", **options)
    assert_as_never_stopped(whole(train, **options), again)


@pytest.mark.parametrize("what", ["the first self-sampling, with nothing to resume", "the loss"])
def test_killed_again_while_it_cleans_up(train, whole, what):
    """Once new and once resumed. What metrics.jsonl told before is told after, each update once."""
    kill(train, "killed", POINTS[what], **OPTIONS)
    before = Run(train.directory / "killed").metrics
    options = dict(OPTIONS, resume_from_checkpoint="latest")
    kill(train, "killed", (os, "replace", "metrics.partial", "before"), **options)
    assert Run(train.directory / "killed").metrics == before
    assert_as_never_stopped(whole(train, **OPTIONS), train("killed", **options))


def test_killed_after_it_went_back_to_an_older_checkpoint(train, whole):
    """Resumed from checkpoint-3 though there is a checkpoint-6, and killed before it came there again."""
    shutil.copytree(whole(train, **{**OPTIONS, "checkpoints_total_limit": 3}).path, train.directory / "killed")
    forget_result(Run(train.directory / "killed"))
    options = dict(OPTIONS, checkpoints_total_limit=3, max_train_steps=10)
    kill(train, "killed", (None, "training_loss", 2, "before"), resume_from_checkpoint="checkpoint-3", **options)
    again = train("killed", resume_from_checkpoint="latest", **options)
    assert_as_never_stopped(whole(train, **options), again)


@pytest.mark.parametrize("call", [11, 12])
@pytest.mark.parametrize("mode", quick_first("lora", ["full"]))
def test_killed_while_it_keeps_rivals(train, whole, mode, call):
    """None of a batch or all are kept: what is sampled in a batch of another size may differ in its last bit."""
    options = dict(OPTIONS, train_mode=mode, cache_latents=True, rivals_per_winner=2)
    kill(train, "killed", (None, "write_tensors", call, "before"), **options)
    again = train("killed", resume_from_checkpoint="latest", **options)
    assert_as_never_stopped(whole(train, **options), again)


@pytest.mark.parametrize("mode, move", [("lora", 2), ("full", 4)])
def test_a_result_is_whole_or_none(train, whole, mode, move):
    """Killed while an old result is replaced; the long part has every move of every script."""
    assert assert_result_is_whole_or_none(train, whole, move, **dict(OPTIONS, train_mode=mode))


INTERRUPTS = ["self-sampling", "writing a checkpoint", "the last update", "loading the models"]


@pytest.mark.parametrize(
    "what, number",
    [
        *((what, signal.SIGTERM) for what in SIGNALS),
        *(pytest.param(what, signal.SIGINT, marks=long) for what in INTERRUPTS),
    ],
)
def test_stopped_run_saves_within_its_update_and_ends_as_if_never_stopped(train, whole, what, number):
    """One checkpoint, of the update in flight; code 128 + number. Before the first update there is nothing to save."""
    point, step = SIGNALS[what]
    options = dict(OPTIONS, cache_latents=what == "caching")
    code = in_child(train, lambda: at(train.script, point, send(number)), "stopped", **options)
    run = Run(train.directory / "stopped")
    if step == 0:
        assert code == (-signal.SIGTERM if number == signal.SIGTERM else 130), "at once"
        assert not (run.path / "metrics.jsonl").exists()
    elif step is None:
        assert code == 0, "nothing is left to stop"
        assert (run.path / "pytorch_lora_weights.safetensors").exists()
    else:
        assert code == 128 + number
        assert len(run.metrics) == step
        saved = sorted(path.name for path in run.path.glob("checkpoint-*"))
        assert saved == [f"checkpoint-{n}" for n in sorted({*range(3, step, 3), step})[-2:]]
        drawn = {int(path.stem.split("-")[1]) for path in run.path.glob("samples/*")}
        due = {*range(3, step, 3), *([step] if what == "validation" else [])}  # there it ends with the last sample
        assert drawn == due, "those of the update that was stopped come after it is resumed"
    again = train("stopped", resume_from_checkpoint="latest", **options)
    assert_same_result(whole(train, **options), again)
    assert {path.name for path in again.path.glob("samples/*")} == {f"step-{step}.png" for step in (3, 6, 9)}


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["self-sampling", "writing a checkpoint"])
def test_a_second_signal_stops_at_once_and_harms_nothing(train, whole, monkeypatch, what, second):
    monkeypatch.setattr(train.script, "SECOND_SIGNAL", -1)
    point = SIGNALS[what][0]
    code = in_child(train, lambda: at(train.script, point, send(signal.SIGTERM, second)), "stopped", **OPTIONS)
    assert code == (-signal.SIGTERM if second == signal.SIGTERM else 130)
    assert len(Run(train.directory / "stopped").metrics) == SIGNALS[what][1] - (what == "self-sampling")
    again = train("stopped", resume_from_checkpoint="latest", **OPTIONS)
    assert_as_never_stopped(whole(train, **OPTIONS), again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_every_process_is_one_signal(train, whole, number):
    """
    As Slurm and systemd send it: the run's process gets it twice, since its launcher hands on its own, and its loader
    processes get it too. A terminal that is closed sends SIGHUP.
    """
    options = dict(OPTIONS, dataloader_num_workers=2)

    def all_of_them():
        loaders = [str(process.pid) for process in multiprocessing.active_children()]
        subprocess.run(["kill", f"-{number}", *loaders], check=True)  # by another process than their parent
        send(number, number)()

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
        at(train.script, (None, "training_loss", 5, "before"), all_of_them)

    code = in_child(train, prepare, "all", **options)
    assert code == 128 + number
    assert len(Run(train.directory / "all").metrics) == 5
    again = train("all", resume_from_checkpoint="latest", **options)
    assert_as_never_stopped(whole(train, **options), again)


def test_nohup_keeps_a_run_from_hanging_up(train):
    def hung_up():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at(train.script, (None, "training_loss", 2, "before"), send(signal.SIGHUP))

    assert in_child(train, hung_up, "nohup", max_train_steps=3) == 0


@pytest.mark.parametrize("workers", quick_first(2, [0]))
@with_shared_code
def test_interrupted_caching_leaves_no_half_file_and_resumes(each, whole, monkeypatch, workers):
    """Ctrl-C, which goes to the whole group, when the second of the cache's files waits to be put in place."""
    monkeypatch.setattr(each.script, "CACHE_FILE", 4)
    options = dict(max_train_steps=3, cache_latents=True, dataloader_num_workers=workers, checkpointing_steps=3)

    def prepare():
        os.setpgrp()
        point = (os, "replace", "rows-1.partial", "before")
        at(each.script, point, lambda: os.killpg(0, signal.SIGINT))

    assert in_child(each, prepare, "stopped", **options) == 130
    (first,) = (each.directory / "stopped").rglob("rows-*.safetensors")  # the other half is called .partial
    written = first.stat().st_mtime_ns
    again = each("stopped", resume_from_checkpoint="latest", **options)
    assert_same_result(whole(each, **options), again)
    assert first.stat().st_mtime_ns == written, "what was cached is not encoded again"
    assert sorted(path.name for path in again.path.rglob("rows-*")) == ["rows-0.safetensors", "rows-1.safetensors"]


def test_half_a_line_of_metrics_is_replaced(train):
    run = train("run", **OPTIONS)
    text = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    forget_result(run)
    shutil.rmtree(run.path / "checkpoint-9")
    (run.path / "metrics.jsonl").write_text("".join(text[:7]) + text[7][:20])
    again = train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert [line["step"] for line in again.metrics] == list(range(1, 10))
