"""Checkpoints that are damaged, of another run or hostile, and disks that are full."""

import argparse
import json
import os
import pickle
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import EVERY, WAN, Run, assert_same_result, flags, forget_result, long
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train_sspo_sd as script


OPTIONS = dict(max_train_steps=6, checkpointing_steps=2, replay_steps=2, validation_prompts=["a red circle"])


class ReachedModels(Exception):
    """The run found nothing to refuse before the models load."""


@pytest.fixture
def finish(trains, whole, tmp_path):
    """finish(kind, flag=value, ...): a copy of a finished run with checkpoints 2, 4 and 6, its result taken away."""

    def finish(kind, **options):
        path = whole(trains[kind], **OPTIONS, **options).path
        run = Run(shutil.copytree(path, tmp_path / "run"))
        forget_result(run)
        return run

    return finish


@pytest.fixture
def run(finish):
    return finish("sd")


@pytest.fixture
def resume(train, monkeypatch):
    """resume(checkpoint, flag=value, ...) resumes "run", up to the point where the models would load."""

    def resume(checkpoint="latest", **options):
        with monkeypatch.context() as patch:
            patch.setattr(script, "load_models", lambda *a: (_ for _ in ()).throw(ReachedModels))
            train("run", resume_from_checkpoint=checkpoint, **{**OPTIONS, **options})

    return resume


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    """By their names 1000 would come before 57, `latest` would be 57, and a limit would delete the newest."""
    for made in (57, 100, 1000, 200):
        (tmp_path / f"checkpoint-{made}").mkdir()
    (tmp_path / "checkpoint-2000.partial").mkdir()
    assert list(script.list_checkpoints(tmp_path)) == [57, 100, 200, 1000]
    args = SimpleNamespace(resume_from_checkpoint="latest", output_dir=tmp_path)
    (tmp_path / "checkpoint-1000" / "run.json").write_text('{"step": 1000}')
    assert script.find_checkpoint(args) == (tmp_path / "checkpoint-1000", {"step": 1000})


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = [
    ("sd", "lora", "pytorch_lora_weights.safetensors", cut),
    ("sd", "lora", "pytorch_lora_weights.safetensors", os.unlink),
    ("sd", "lora", "optimizer.bin", cut),
    ("sd", "lora", "scheduler.bin", os.unlink),
    ("sdxl", "full", "unet/diffusion_pytorch_model.safetensors", cut),
    ("video", "full", "motion_adapter/diffusion_pytorch_model.safetensors", cut),
]


@pytest.mark.parametrize("kind, mode, name, break_it", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(trains, finish, whole, kind, mode, name, break_it):
    """Nothing is lost but the updates since then, and nothing of what there is until they are made again."""
    options = dict(OPTIONS, train_mode=mode)
    run = finish(kind, train_mode=mode)
    break_it(run.path / "checkpoint-6" / name)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    message = r"checkpoint-6 is damaged \(.+\): try --resume_from_checkpoint checkpoint-4$"
    with pytest.raises(trains[kind].script.UserError, match=message) as error:
        trains[kind]("run", resume_from_checkpoint="latest", **options)
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    again = trains[kind]("run", resume_from_checkpoint="checkpoint-4", **options)
    assert_same_result(whole(trains[kind], **OPTIONS, train_mode=mode), again)
    assert [line["step"] for line in again.metrics] == list(range(1, 7))


@pytest.mark.parametrize("break_it", [cut, os.unlink])
def test_one_damaged_checkpoint_after_another_leads_back_to_the_first(run, resume, break_it):
    """Known before the models load, however the checkpoint is named; no run is started in its place."""
    for step in (2, 4, 6):
        break_it(run.path / f"checkpoint-{step}" / "run.json")
    advice = {6: "try --resume_from_checkpoint checkpoint-4", 4: "try --resume_from_checkpoint checkpoint-2"}
    for step, names in {
        6: ["latest", "checkpoint-6", run.path / "checkpoint-6", f"{os.path.relpath(run.path)}/checkpoint-6/"],
        4: ["checkpoint-4", run.path / "checkpoint-4"],
        2: ["checkpoint-2"],
    }.items():
        for name in names:
            expected = rf"checkpoint-{step} is damaged \(.+\): {advice.get(step, 'restart in another --output_dir')}$"
            with pytest.raises(script.UserError, match=expected):
                resume(name)
    assert len(run.metrics) == 6


def test_what_a_crash_left_is_no_checkpoint(train, run, whole):
    """`latest` is the newest that has its place; neither half of the next nor another folder counts or disturbs."""
    shutil.rmtree(run.path / "checkpoint-6")
    for name in ("checkpoint-6.partial", "checkpoint-final", "result.partial"):
        (run.path / name).mkdir()
        (run.path / name / "optimizer.bin").write_bytes(b"half")
    foreign = run.path / "downloads" / "model.partial"
    foreign.parent.mkdir()
    foreign.touch()
    again = train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert_same_result(whole(train, **OPTIONS), again)
    assert (run.path / "checkpoint-6" / "run.json").is_file()
    assert not list(run.path.glob("*.partial")) and foreign.exists()


def test_half_written_files_inside_half_written_folders_go_with_them(tmp_path):
    """Killed while a rival was kept: its file is in a folder that has no place yet either."""
    rival = tmp_path / "replay" / "rivals" / "rank-0" / "5.partial" / "row-3-0.partial"
    rival.parent.mkdir(parents=True)
    rival.touch()
    script.clean_up(tmp_path, 150)
    assert not list(tmp_path.rglob("*.partial"))


def test_metrics_are_kept_by_their_update(tmp_path):
    """Those of a run that went on in another folder begin where it did; the last line may be half written."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.6}) + "\n" for step in range(101, 301)]
    path.write_text("".join(lines) + '{"step": 1')
    script.clean_up(tmp_path, 150)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(101, 151)]


def test_a_checkpoint_that_is_not_there(run, resume):
    with pytest.raises(
        script.UserError, match="--resume_from_checkpoint checkpoint-9 does not exist, here or in --output_dir"
    ):
        resume("checkpoint-9")


def test_samples_of_the_last_step_are_not_lost(train, run, whole):
    """Killed after its last checkpoint, while it drew: the resumed run makes no update, but it draws."""
    picture = run.path / "samples" / "step-6.png"
    picture.unlink()
    train("run", resume_from_checkpoint="latest", **OPTIONS)
    assert picture.read_bytes() == (whole(train, **OPTIONS).path / "samples" / "step-6.png").read_bytes()


def test_a_missing_entry_of_the_bank_is_named_before_the_models_load(run, resume):
    """If it may be drawn from; checkpoint-4 is of before there was an iteration-3."""
    (run.path / "replay" / "iteration-3.safetensors").unlink()
    with pytest.raises(script.UserError, match=r"iteration-3\.safetensors is missing: .*checkpoint-6 needs it"):
        resume()
    with pytest.raises(ReachedModels):
        resume("checkpoint-4")


def test_a_damaged_entry_of_the_bank_is_named_when_it_is_drawn(train, run):
    bank = script.ReplayBank(run.path / "replay", 8)
    cut(bank.path(bank.draw(4)))
    with pytest.raises(
        script.UserError, match=rf"iteration-{bank.draw(4)}\.safetensors is missing or damaged"
    ) as error:
        train("run", resume_from_checkpoint="latest", **{**OPTIONS, "max_train_steps": 7})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_of_the_cache_is_named(train, workers):
    """It is written once and read in every epoch; without it the cache is filled again."""
    options = dict(cache_latents=True, checkpointing_steps=2, dataloader_num_workers=workers)
    run = train("run", max_train_steps=2, **options)
    forget_result(run)
    (file,) = run.path.rglob("rows-0.safetensors")
    cut(file)
    with pytest.raises(script.UserError, match=r"rows-0\.safetensors is missing or damaged"):
        train("run", max_train_steps=4, resume_from_checkpoint="latest", **options)
    file.unlink()
    assert_same_result(
        train("whole", max_train_steps=4, **options),
        train("run", max_train_steps=4, resume_from_checkpoint="latest", **options),
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(on_bad_example="skip"), None),
        (dict(max_train_steps=9, dataloader_num_workers=1, validation_guidance_scale=2, split_pairs=True), None),
        (dict(lr_scheduler="linear"), "--lr_scheduler constant, not linear"),
        (dict(sft_weight=0.1), r"--sft_weight 0\.0, not 0\.1"),
        (dict(cache_latents=True), "--cache_latents False, not True"),
        (dict(rank=4), "--rank 8, not 4"),
        (dict(train_mode="full"), "--train_mode lora, not full"),
        (dict(seed=1), "--seed 0, not 1"),
        (dict(replay_steps=3), "--replay_steps 2, not 3"),
        (dict(beta_dpo=5000), r"--beta_dpo 2000\.0, not 5000\.0"),
        (dict(rollout_guidance_scale=7.5), r"--rollout_guidance_scale 1\.0, not 7\.5"),
        (dict(train_batch_size=4), "global batch size 2, not 4"),
        (dict(max_train_samples=5), "--max_train_samples None, not 5"),
    ],
)
def test_what_may_change_and_what_may_not(run, resume, options, message):
    with pytest.raises(script.UserError if message else ReachedModels, match=message):
        resume(**options)


FREE = """
    cache_dir dataset_name train_data_dir pretrained_model_name_or_path pretrained_vae_model_name_or_path
    motion_adapter_name_or_path on_bad_example dataloader_num_workers
    train_batch_size gradient_accumulation_steps rollout_batch_size gradient_checkpointing split_pairs allow_tf32
    enable_xformers_memory_efficient_attention max_train_steps num_train_epochs
    output_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_prompts validation_steps
    num_validation_images validation_guidance_scale report_to tracker_project_name push_to_hub hub_model_id
    output_kohya_format
""".split()


def test_a_checkpoint_keeps_to_all_flags_but_these():
    """Of all scripts: a new flag has to be in the list, or to make another run."""
    known = {}
    for kind, module in EVERY.items():
        own = {"wan": WAN, "video": dict(motion_adapter_name_or_path="unused")}.get(kind, {})
        known |= vars(module.parse_args(flags("unused", "unused", "unused", **own)))
    assert set(FREE) <= set(known), "none of them is gone"

    class Winners(list):
        first_caption = "a red circle"

    accelerator = SimpleNamespace(mixed_precision="no")
    settings = script.run_settings(argparse.Namespace(**known), accelerator, Winners(), 4)
    assert {name[2:] for name in settings if name.startswith("--")} == set(known) - set(FREE)


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


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model", "text_encoder/model"])
def test_another_base_of_the_same_name_is_told_by_its_weights(train, run, sd, tmp_path, part):
    """Moved it is the same; with one tensor that is another, whichever it is of, it is not."""
    base = shutil.copytree(sd, tmp_path / "base")
    train("run", model=base, resume_from_checkpoint="latest", **OPTIONS)
    file = base / f"{part}.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if name.endswith("bias"))] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(script.UserError, match="made with base weights [0-9a-f]{16}, not [0-9a-f]{16}: resume with"):
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
        write(Malice(tmp_path / "hacked"), run.path / "checkpoint-6" / name)
        if name.startswith("random"):  # accelerate does without them, and so may we: every draw is keyed
            train("run", resume_from_checkpoint="latest", **OPTIONS)
        else:
            with pytest.raises(script.UserError, match="checkpoint-6 is damaged"):
                train("run", resume_from_checkpoint="latest", **OPTIONS)
        assert not (tmp_path / "hacked").exists()


WRITERS = {
    "the base": ("ReplayBank", "push", 1),
    "a push": ("ReplayBank", "push", 3),
    "metrics": (None, "write_metrics", 3),
    "a checkpoint": (None, "save_checkpoint", 2),
    "samples": (None, "write_samples", 1),
    "the result": (None, "save_result", 1),
    "the model card": (None, "write_model_card", 1),
    "the cache": (None, "write_tensors", 1),
}


def fill_disk(monkeypatch, module, owner, name, call):
    """From the `call`-th call of this function on no file may grow beyond ten bytes: the system refuses it."""
    owner = getattr(module, owner) if owner else module
    function, calls, bar = getattr(owner, name), [], module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda *a, **k: bar(*a, **{**k, "disable": True}))  # pytest keeps it in a file

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    "kind, mode, what",
    [
        *(("sd", "lora", what) for what in WRITERS),
        *(("sd", "full", what) for what in ("a push", "a checkpoint", "the result")),
        *(pytest.param("sdxl", "full", what, marks=long) for what in ("a checkpoint", "the result")),
        *(pytest.param("video", "full", what, marks=long) for what in ("a checkpoint", "samples", "the result")),
    ],
)
def test_full_disk_costs_nothing(trains, whole, monkeypatch, kind, mode, what):
    """What the script makes one line of; when there is room again, `latest` ends as a run that always had it."""
    train, options = trains[kind], dict(OPTIONS, train_mode=mode, cache_latents=what == "the cache")
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "else the system would end the process, and the test"
    expected = whole(train, **options)
    with monkeypatch.context() as patch:
        fill_disk(patch, train.script, *WRITERS[what])
        try:
            with pytest.raises((OSError, SafetensorError)):
                train("run", **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = train("run", resume_from_checkpoint="latest", **options)
    assert_same_result(expected, again)
    assert not list(again.path.rglob("*.partial"))


def test_a_folder_that_vanishes_costs_nothing(train, whole, tmp_path, monkeypatch):
    """A mount is lost in the middle of a run: no new folder comes in its place; when it is back, `latest` resumes."""
    write, calls = script.write_metrics, []

    def vanish(args, metrics):
        calls.append(1)
        if len(calls) == 4:
            (tmp_path / "run").rename(tmp_path / "away")
        write(args, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_metrics", vanish)
        with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
            train("run", **OPTIONS)
    assert not (tmp_path / "run").exists()
    (tmp_path / "away").rename(tmp_path / "run")
    assert_same_result(whole(train, **OPTIONS), train("run", resume_from_checkpoint="latest", **OPTIONS))


def test_a_passing_fault_costs_the_updates_since_the_last_checkpoint(train, run, whole, monkeypatch):
    """A loss is not finite because the machine failed: resumed from the good checkpoint, nothing is different."""
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
    assert_same_result(whole(train, **OPTIONS), train("run", resume_from_checkpoint="latest", **OPTIONS))


def test_metrics_are_strict_json(tmp_path):
    """What a skipped fp16 update leaves as its gradient's norm is no number."""
    args = script.parse_args(["--pretrained_model_name_or_path=m", "--train_data_dir=d", f"--output_dir={tmp_path}"])
    script.write_metrics(args, {"step": 1, "loss": 0.5, "grad_norm": float("inf"), "gap/winner": float("nan")})

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": 0.5, "grad_norm": None, "gap/winner": None}
