"""What a user does wrong: one line that says what and how to mend it, and nothing is overwritten."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import pytest
import tiny
import torch
from conftest import ROOT, flags

import train_sspo_sd as script


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(train_data_dir=None), "--train_data_dir or --dataset_name"),
        (dict(dataset_name="both"), "--train_data_dir or --dataset_name"),
        (dict(train_batch_size=0), "--train_batch_size must be more than 0"),
        (dict(learning_rate=-1), "--learning_rate must be more than 0"),
        (dict(learning_rate="nan"), "--learning_rate must be more than 0"),
        (dict(rollout_batch_size=3), "multiple of --train_batch_size"),
        (dict(rollout_strength=1.5), "--rollout_strength"),
        (dict(rollout_strength=0.1), "--rollout_strength"),
        (dict(proportion_empty_prompts=2), "--proportion_empty_prompts"),
        (dict(rival_weight=-1), "--rival_weight"),
        (dict(resolution=60), "--resolution must be a multiple of 8"),
        (dict(streaming=True, cache_latents=True), "--cache_latents"),
        (dict(streaming=True, max_train_steps=None, num_train_epochs=1), "--max_train_steps"),
        (dict(use_8bit_adam=True, optimizer="adafactor"), "--use_8bit_adam"),
        (dict(ssr="ipo"), "--ssr"),
        (dict(train_mode="dora"), "--train_mode"),
        (dict(no_such_flag=1), "no_such_flag"),
        (dict(seed="x"), "--seed"),
    ],
)
def test_wrong_flag_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        script.parse_args(flags("model", "data", "out", **options))
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count("\n") == 1
    assert message in error


def test_defaults_of_the_paper():
    args = script.parse_args(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"])
    assert (args.train_mode, args.loss_type, args.ssr, args.reference) == ("lora", "sspo", "sign", "random")
    assert (args.beta_dpo, args.replay_steps, args.replay_size, args.max_train_steps) == (2000, 30, 8, 210)
    assert (args.rollout_steps, args.rollout_guidance_scale, args.rollout_scheduler) == (20, 7.5, "dpmsolver")
    assert (args.rollout_strength, args.draws_per_pair, args.rival_weight, args.sft_weight) == (1, 1, 1, 0)
    for batch, accumulation, rollouts in ((4, 1, 4), (1, 256, 16), (3, 8, 15), (32, 2, 32)):
        sizes = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        words = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", *sizes]
        assert script.parse_args(words).rollout_batch_size == rollouts


def test_help_says_every_default(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("beta_dpo", "replay_steps", "rollout_guidance_scale", "learning_rate", "resolution", "rank", "seed"):
        assert "(default: " in text[text.rindex(f"--{flag} {flag.upper()}") :][:300]


def refused(train, message, **options):
    with pytest.raises(script.UserError, match=message) as error:
        train(**options)
    assert "\n" not in str(error.value)


def no_model(monkeypatch):
    """Makes a run fail loudly if it comes as far as loading the model."""
    monkeypatch.setattr(script, "load_models", lambda *a: pytest.fail("the models were loaded"))


@pytest.fixture
def early(monkeypatch):
    no_model(monkeypatch)


def test_missing_folder(train, early, tmp_path):
    refused(train, "nowhere does not exist", data=tmp_path / "nowhere")


def test_empty_data(train, early, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(train, "cannot be opened", data=tmp_path / "empty")
    (tmp_path / "empty.csv").write_text("image,text\n")
    nothing = datasets.Dataset.from_dict({"image": [], "text": []})
    nothing.save_to_disk(tmp_path / "saved")
    refused(train, "cannot be opened", data=tmp_path / "saved")
    nothing.to_parquet(tmp_path / "nothing.parquet")
    refused(train, "is empty", data=tmp_path / "nothing.parquet", streaming=True)
    refused(train, "nor one of .parquet", data=tmp_path / "empty.csv")


def test_missing_column_lists_those_there_are(train, early, tmp_path):
    folder = tmp_path / "data"
    tiny.folder_of_winners(folder, 2)
    refused(train, "no column caption: it has image, text; .*--caption_column", data=folder, caption_column="caption")
    refused(train, "no column photo: it has image, text; .*--image_column", data=folder, image_column="photo")
    (folder / "metadata.jsonl").unlink()
    refused(train, "no column text or caption or txt or prompt: it has image", data=folder)


def test_ties_only(train, early, tmp_path):
    row = {"jpg_0": b"", "jpg_1": b"", "label_0": 0.5, "caption": "a tie"}
    datasets.Dataset.from_list([row] * 3).to_parquet(tmp_path / "ties.parquet")
    refused(train, "no winner", data=tmp_path / "ties.parquet")


def test_ties_only_in_a_stream(train, tmp_path):
    row = {"jpg_0": b"", "jpg_1": b"", "label_0": 0.5, "caption": "a tie"}
    datasets.Dataset.from_list([row] * 3).to_parquet(tmp_path / "ties.parquet")
    refused(train, "no winner", data=tmp_path / "ties.parquet", streaming=True)


@pytest.mark.parametrize(
    "options", [{}, dict(cache_latents=True), dict(dataloader_num_workers=1), dict(streaming=True)]
)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_unreadable_picture_is_named(train, tmp_path, damage, options):
    folder = tmp_path / "data"
    tiny.folder_of_winners(folder, 2)
    content = (folder / "1.png").read_bytes()
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes({"truncated": content[:90], "empty": b"", "text": b"not a picture"}[damage])
    refused(train, r"the picture .*[01]\.png in row [01] cannot be read", data=folder, **options)


def test_caption_that_is_no_text_is_named(train, tmp_path):
    folder = tmp_path / "data"
    tiny.folder_of_winners(folder, 2)
    rows = [{"file_name": "0.png", "text": "a red circle"}, {"file_name": "1.png", "text": None}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(train, "the caption in row 1, column text, is None, not text: .*--on_bad_example skip", data=folder)


def test_output_dir_that_cannot_be_written(train, early, tmp_path):
    (tmp_path / "file").write_text("")
    refused(train, "--output_dir .* cannot be written", name="file/run")


def test_packages_and_devices_are_checked_first(train, early, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "is_xformers_available", lambda: False)
    refused(train, "needs xformers", enable_xformers_memory_efficient_attention=True)
    monkeypatch.setattr(script, "is_xformers_available", lambda: True)
    refused(train, "needs a CUDA device", enable_xformers_memory_efficient_attention=True)
    refused(train, "fp16 needs a CUDA device", mixed_precision="fp16")
    monkeypatch.setattr(script, "is_bitsandbytes_available", lambda: False)
    refused(train, "needs bitsandbytes", use_8bit_adam=True)
    monkeypatch.setattr(script, "is_wandb_available", lambda: False)
    refused(train, "wandb needs it", report_to="wandb")
    monkeypatch.setattr(script, "is_tensorboard_available", lambda: False)
    refused(train, "tensorboard needs it", report_to="tensorboard")
    refused(train, "--report_to must be", report_to="paper")


def test_sharded_training_is_refused(train, early, monkeypatch):
    monkeypatch.setattr(script.Accelerator, "distributed_type", property(lambda self: script.DistributedType.FSDP))
    refused(train, "configured for FSDP.*never run.*data parallel")


def test_output_dir_of_another_machine(train, early, monkeypatch):
    """Where a machine has a disk of its own, what the first process writes does not appear."""
    exists = script.Path.exists
    monkeypatch.setattr(script.Path, "exists", lambda path: not path.name.startswith(".shared") and exists(path))
    refused(train, "is not the same folder for all processes: .* on a disk that all machines share")


def test_models_that_cannot_be_loaded(train, tmp_path):
    refused(train, "nothing-here cannot be loaded", model=tmp_path / "nothing-here")


@pytest.mark.parametrize(
    "file, before, after, message",
    [
        ("scheduler/scheduler_config", '"epsilon"', '"sample"', "predicts sample"),
        ("scheduler/scheduler_config", '"leading"', '"trailing"', "distilled to few steps .turbo"),
        ("scheduler/scheduler_config", "DDPMScheduler", "LCMScheduler", "distilled to few steps .LCM"),
        ("scheduler/scheduler_config", "beta_start", "sigma_min", "not of a schedule of betas"),
        ("unet/config", '"in_channels": 4', '"in_channels": 9', "more than latents and a caption"),
        ("unet/config", '"addition_embed_type": null', '"addition_embed_type": "text_time"', "train_sspo_sdxl.py"),
    ],
)
def test_models_that_would_be_trained_wrongly(train, tmp_path, sd, monkeypatch, file, before, after, message):
    """From their configurations, before any weights are read."""
    shutil.copytree(sd, tmp_path / "other")
    config = tmp_path / "other" / f"{file}.json"
    text = config.read_text()
    if "timestep_spacing" in text:
        text = text.replace('"timestep_spacing": "linspace"', '"timestep_spacing": "leading"')
    assert before in text
    config.write_text(text.replace(before, after))
    monkeypatch.setattr(script.AutoencoderKL, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    refused(train, message, model=tmp_path / "other")


def test_results_are_not_overwritten(train):
    run = train(max_train_steps=1)
    before = (run.path / "pytorch_lora_weights.safetensors").read_bytes()
    refused(train, "holds the results of another run.*--resume_from_checkpoint latest", max_train_steps=2)
    assert (run.path / "pytorch_lora_weights.safetensors").read_bytes() == before
    assert len(run.metrics) == 1


def test_a_run_that_left_nothing_to_resume_starts_anew(train, early):
    """Stopped before its first checkpoint, it is no reason to refuse; `latest` without a checkpoint is a new run."""
    with pytest.raises(pytest.fail.Exception, match="models were loaded"):
        train(resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "options, flag",
    [
        (dict(rank=4), "--rank 8, not 4"),
        (dict(train_mode="full"), "--train_mode lora, not full"),
        (dict(seed=1), "--seed 0, not 1"),
        (dict(replay_steps=3), "--replay_steps 2, not 3"),
        (dict(beta_dpo=5000), "--beta_dpo 2000.0, not 5000.0"),
        (dict(train_batch_size=4), "global batch size 2, not 4"),
        (dict(max_train_samples=5), "--max_train_samples None, not 5"),
    ],
)
def test_checkpoint_of_another_run_is_refused(train, checkpointed, early, options, flag):
    refused(
        train, f"checkpoint-2 was made with {flag}", name="checkpointed", resume_from_checkpoint="latest", **options
    )


@pytest.fixture
def checkpointed(train):
    return train("checkpointed", max_train_steps=2, checkpointing_steps=2)


def test_checkpoint_that_is_not_there(train, checkpointed, early):
    refused(
        train, "checkpoint-9 is not a complete checkpoint", name="checkpointed", resume_from_checkpoint="checkpoint-9"
    )


def test_half_written_checkpoint_is_passed_over(train):
    """`latest` is the newest complete one; what a crash left of the next neither counts nor stands in the way."""
    run = train("run", max_train_steps=6, checkpointing_steps=2)
    shutil.rmtree(run.path / "checkpoint-6")
    (run.path / "checkpoint-4" / "run.json").unlink()
    (run.path / "checkpoint-6.partial").mkdir()
    (run.path / "checkpoint-6.partial" / "optimizer.bin").write_bytes(b"half")
    (run.path / "checkpoint-final").mkdir()
    whole = [line["loss"] for line in run.metrics]
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    again = train("run", max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert again.column("loss") == whole
    assert (run.path / "checkpoint-6" / "run.json").is_file()
    assert not (run.path / "checkpoint-6.partial").exists()


def test_non_finite_loss_stops_the_run(train):
    """Step, gaps and the last good checkpoint are named, and the checkpoint is from before."""
    refused(
        train,
        r"update \d+ is not finite \(loss .*grad_norm .*gap/winner .*gap/rival .*good checkpoint is .*checkpoint-",
        train_mode="full",
        learning_rate=1e12,
        checkpointing_steps=1,
        checkpoints_total_limit=None,
        max_train_steps=20,
    )


def test_non_finite_latents_stop_the_run(train, monkeypatch):
    monkeypatch.setattr(
        script, "encode_image", lambda models, pixels: (torch.full((len(pixels), 4, 8, 8), torch.nan),) * 2
    )
    refused(train, "latents of row .* are not finite")


def test_command_line_ends_with_one_line_and_no_traceback(tmp_path, sd, winners):
    command = [
        sys.executable,
        ROOT / "train_sspo_sd.py",
        *flags(sd, winners, tmp_path / "out", caption_column="titel"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("train_sspo_sd.py: the data set has no column titel: it has image, text")
