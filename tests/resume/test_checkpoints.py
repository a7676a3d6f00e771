"""Checkpoints that are damaged, of another run or hostile, and disks that are full."""

import json
import os
import pickle
import resource
import shutil
import signal

import pytest
import tiny
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from test_training import assert_same_result

import train_sspo_sd as script


OPTIONS = dict(max_train_steps=6, checkpointing_steps=2, replay_steps=2, validation_prompts=["a red circle"])


class ReachedModels(Exception):
    """The run found nothing to refuse before the models load."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return []


@pytest.fixture
def run(train, finished, tmp_path, tmp_path_factory):
    """A copy of a finished run with checkpoints 2, 4 and 6, at tmp_path / "run"; and the run itself at "whole"."""
    if not finished:
        path = train("first", **OPTIONS).path
        finished.append(shutil.copytree(path, tmp_path_factory.mktemp("finished") / "run"))
    for name in ("run", "whole"):
        shutil.copytree(finished[0], tmp_path / name)
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").unlink()
    return Run(tmp_path / "run")


@pytest.fixture
def resume(train, monkeypatch):
    """resume(flag=value, ...) goes on in "run", up to the point where the models would load."""

    def go_on(checkpoint="latest", **options):
        with monkeypatch.context() as patch:
            patch.setattr(script, "load_models", lambda *a: (_ for _ in ()).throw(ReachedModels))
            train("run", resume_from_checkpoint=checkpoint, **{**OPTIONS, **options})

    return go_on


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "weights cut": ("checkpoint-6/pytorch_lora_weights.safetensors", cut, "bytes, not"),
    "optimizer cut": ("checkpoint-6/optimizer.bin", cut, "bytes, not"),
    "schedule gone": ("checkpoint-6/scheduler.bin", os.unlink, "is gone"),
    "random states gone": ("checkpoint-6/random_states_0.pkl", os.unlink, "is gone"),
    "record cut": ("checkpoint-6/run.json", cut, "cannot be read"),
    "record gone": ("checkpoint-6/run.json", os.unlink, "cannot be read"),
    "replay entry gone": ("replay/iteration-3.safetensors", os.unlink, "is gone"),
    "replay entry cut": ("replay/iteration-3.safetensors", cut, "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, resume, caplog, damage):
    """Before the models load. Asked for by its own name it is refused."""
    name, break_it, message = DAMAGES[damage]
    break_it(run.path / name)
    later = dict(max_train_steps=8, reference="latest") if damage.startswith("replay") else {}
    for path in run.path.glob("checkpoint-*/run.json") if later else ():
        path.write_text(path.read_text().replace('"reference": "random"', '"reference": "latest"'))
    with pytest.raises(ReachedModels):
        resume(**later)
    assert [r.message for r in caplog.records if name in r.message and message in r.message]
    assert any("checkpoint-4 is taken instead" in r.message for r in caplog.records)
    with pytest.raises(script.UserError, match=f"checkpoint-6 is not a complete checkpoint: .*{name}") as error:
        resume("checkpoint-6", **later)
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_costs_updates_and_nothing_else(train, run, tmp_path):
    cut(run.path / "checkpoint-6" / "optimizer.bin")
    (run.path / "samples" / "step-6.png").unlink()
    again = train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert_same_result(Run(tmp_path / "whole"), again)
    assert [line["step"] for line in again.metrics] == list(range(1, 7))


def test_samples_of_the_last_step_are_not_lost(train, run, tmp_path):
    """Killed after its last checkpoint, while it drew: the resumed run makes no update, but it draws."""
    picture = run.path / "samples" / "step-6.png"
    picture.unlink()
    train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert picture.read_bytes() == (tmp_path / "whole" / "samples" / "step-6.png").read_bytes()


def test_without_a_whole_checkpoint_nothing_is_started_anew(run, resume):
    for step in (2, 4, 6):
        cut(run.path / f"checkpoint-{step}" / "optimizer.bin")
    with pytest.raises(script.UserError, match="no checkpoint in .* is whole: .*checkpoint-6/optimizer.bin has"):
        resume()
    assert len(run.metrics) == 6


def test_an_entry_that_is_not_drawn_again_may_be_gone(run, resume):
    """The last checkpoint of a run draws nothing any more."""
    for path in (run.path / "replay").iterdir():
        path.unlink()
    with pytest.raises(ReachedModels):
        resume()
    with pytest.raises(script.UserError, match="iteration-.* is gone"):
        resume(max_train_steps=30)


def test_checkpoints_of_an_older_version_are_taken(run, resume, caplog):
    """One that knew neither the sizes of its files nor some flags: it is told what they are taken to have been."""
    for path in run.path.glob("checkpoint-*/run.json"):
        record = json.loads(path.read_text())
        del record["files"], record["settings"]["first caption"], record["settings"]["rival_weight"]
        path.write_text(json.dumps(record))
    with pytest.raises(ReachedModels):
        resume()
    assert any("does not tell rival_weight: it is taken to have been 1.0" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(on_bad_example="skip"), None),
        (dict(max_train_steps=9, replay_steps=2), None),
        (dict(lr_scheduler="linear"), "--lr_scheduler constant, not linear"),
        (dict(sft_weight=0.1), "--sft_weight 0.0, not 0.1"),
        (dict(cache_latents=True), "--cache_latents False, not True"),
    ],
)
def test_what_may_change_and_what_may_not(run, resume, options, message):
    with pytest.raises(script.UserError if message else ReachedModels, match=message):
        resume(**options)


def test_the_end_of_a_falling_rate_may_not_change(train, resume):
    train("run", **{**OPTIONS, "max_train_steps": 2, "lr_scheduler": "cosine", "validation_prompts": None})
    with pytest.raises(ReachedModels):
        resume(max_train_steps=2, lr_scheduler="cosine")
    with pytest.raises(script.UserError, match="--max_train_steps 2, not 6"):
        resume(lr_scheduler="cosine")


def test_another_data_set_is_told_by_its_size_and_first_caption(run, resume, tmp_path, winners):
    shutil.copytree(winners, tmp_path / "moved")
    with pytest.raises(ReachedModels):
        resume(data=tmp_path / "moved")
    fewer = tiny.folder_of_winners(tmp_path / "fewer", 7)
    with pytest.raises(script.UserError, match="made with number of winners 8, not 7"):
        resume(data=fewer)
    text = (tmp_path / "moved" / "metadata.jsonl").read_text().replace("red", "grey")
    (tmp_path / "moved" / "metadata.jsonl").write_text(text)
    with pytest.raises(script.UserError, match="made with first caption a red circle, not a grey circle"):
        resume(data=tmp_path / "moved")


def test_another_base_of_the_same_name_is_told_by_its_weights(train, run, sd, tmp_path):
    """Moved it is the same; with one tensor that is another, be it of the VAE, it is not."""
    base = shutil.copytree(sd, tmp_path / "base")
    train("run", model=base, resume_from_checkpoint="latest", **OPTIONS)
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"] += 1e-3
    save_file(weights, file)
    with pytest.raises(script.UserError, match="made with base weights [0-9a-f]{16}, not [0-9a-f]{16}: go on with"):
        train("run", model=base, resume_from_checkpoint="latest", **OPTIONS)
    for path in run.path.glob("checkpoint-*/run.json"):  # of a version that did not record it
        record = json.loads(path.read_text())
        del record["settings"]["base weights"]
        path.write_text(json.dumps(record))
    train("run", model=base, resume_from_checkpoint="latest", **OPTIONS)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_code_in_a_checkpoint_is_not_run(train, run, tmp_path, name):
    """Neither as a bare pickle nor in torch's own format."""
    for write in (torch.save, lambda malice, path: path.write_bytes(pickle.dumps(malice))):
        path = run.path / "checkpoint-6" / name
        write(Malice(tmp_path / "hacked"), path)
        record = json.loads((run.path / "checkpoint-6" / "run.json").read_text())
        record["files"][name] = path.stat().st_size
        (run.path / "checkpoint-6" / "run.json").write_text(json.dumps(record))
        if name.startswith("random"):  # accelerate goes on without them, and so may we: every draw is keyed
            train("run", resume_from_checkpoint="latest", **OPTIONS)
        else:
            with pytest.raises(script.UserError, match="checkpoint-6 cannot be loaded") as error:
                train("run", resume_from_checkpoint="latest", **OPTIONS)
            assert "\n" not in str(error.value)
        assert not (tmp_path / "hacked").exists()


WRITERS = {
    "the base": (script.ReplayBank, "push", 1, "the replay bank"),
    "a push": (script.ReplayBank, "push", 3, "the replay bank"),
    "metrics": (script.MetricsFile, "write", 3, "metrics.jsonl"),
    "a checkpoint": (script, "save_checkpoint", 2, "a checkpoint"),
    "samples": (script, "write_samples", 1, "samples"),
    "the result": (script, "save_result", 1, "the result"),
    "the model card": (script, "write_model_card", 1, "the model card"),
    "the cache": (script.LatentCache, "write", 1, "the cache of latents"),
}


def fill_disk(monkeypatch, owner, name, call):
    """From the `call`-th call of this function on no file may grow beyond ten bytes: the system refuses it."""
    function, calls = getattr(owner, name), []
    bar = script.tqdm
    monkeypatch.setattr(script, "tqdm", lambda *a, **k: bar(*a, **{**k, "disable": True}))  # pytest keeps it in a file

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("what", WRITERS)
def test_full_disk_is_one_line_and_costs_nothing(train, tmp_path, monkeypatch, what, mode):
    """What cannot be written is named; when there is room again, `latest` ends as a run that always had it."""
    owner, name, call, message = WRITERS[what]
    if mode == "full" and what not in ("a push", "a checkpoint", "the result"):
        pytest.skip("the same as in LoRA mode")
    options = dict(OPTIONS, train_mode=mode, cache_latents=what == "the cache")
    before = signal.getsignal(signal.SIGXFSZ)
    with monkeypatch.context() as patch:
        fill_disk(patch, owner, name, call)
        try:
            with pytest.raises(
                script.UserError, match=f"^{message} cannot be written .*--resume_from_checkpoint"
            ) as e:
                train("run", **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert before == signal.SIG_IGN, "else the system would end the process, and the test with it"
    assert "\n" not in str(e.value)
    again = train("run", resume_from_checkpoint="latest", **options)
    assert_same_result(train("whole", **options), again)
    assert not list(again.path.glob("*.partial"))


def test_a_folder_that_vanishes_costs_nothing(train, tmp_path, monkeypatch):
    """A mount is lost in the middle of a run: one line, no new folder in its place, and `latest` goes on."""
    write, calls = script.MetricsFile.write, []

    def vanish(self, metrics):
        calls.append(1)
        if len(calls) == 4:
            (tmp_path / "run").rename(tmp_path / "away")
        write(self, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(script.MetricsFile, "write", vanish)
        with pytest.raises(script.UserError, match=r"^metrics.jsonl cannot be written \(No such file.*latest$"):
            train("run", **OPTIONS)
    assert not (tmp_path / "run").exists()
    (tmp_path / "away").rename(tmp_path / "run")
    again = train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert_same_result(train("whole", **OPTIONS), again)


def test_out_of_memory_stays_what_it_is():
    """A full disk is a RuntimeError of torch, too."""
    with pytest.raises(RuntimeError, match="allocate memory"), script.writing("a checkpoint"):
        torch.empty(10**15)


def test_metrics_are_strict_json(tmp_path):
    """What a skipped fp16 update leaves as its gradient's norm is no number."""
    file = script.MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1, "loss": 0.5, "grad_norm": float("inf"), "gap/winner": float("nan")})

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": 0.5, "grad_norm": None, "gap/winner": None}


def test_a_passing_fault_costs_the_updates_since_the_last_checkpoint(train, run, tmp_path, monkeypatch):
    """A loss is not finite because the machine failed: gone on with from the good checkpoint, nothing is different."""
    shutil.rmtree(run.path / "checkpoint-6")
    loss, calls = script.training_loss, []

    def failing(*args):
        calls.append(1)
        value, metrics = loss(*args)
        return (value * float("nan") if len(calls) == 2 else value), metrics

    with monkeypatch.context() as patch:
        patch.setattr(script, "training_loss", failing)
        with pytest.raises(script.UserError, match="update 6 is not finite .*good checkpoint is .*checkpoint-4"):
            train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert_same_result(Run(tmp_path / "whole"), train("run", resume_from_checkpoint="latest", **OPTIONS))
