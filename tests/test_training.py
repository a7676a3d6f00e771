"""Whole runs of train_sspo_sd.py that are resumed."""

import pytest
import torch
from helpers import assert_same_result, resumed
from safetensors.torch import load_file


@pytest.mark.parametrize(
    "options",
    [
        dict(train_mode="lora", proportion_empty_prompts=0.3, center_crop=False, random_flip=True),
        dict(train_mode="full", lr_scheduler="constant_with_warmup", lr_warmup_steps=5),
        dict(train_mode="lora", cache_latents=True, draws_per_pair=2),
        dict(train_mode="lora", streaming=True, dataloader_num_workers=1),
        dict(train_mode="lora", optimizer="adafactor", gradient_accumulation_steps=2),
    ],
)
def test_resumed_run_ends_as_if_never_stopped(train, options):
    """5 of 9 updates, in the middle of an epoch and of an iteration, then the rest; replay_size forces evictions."""
    options = dict(replay_steps=2, replay_size=3, **options)
    run = train("whole", max_train_steps=9, checkpointing_steps=5, **options)
    again = resumed(train, run, 5, **options)
    assert [line["step"] for line in again.metrics] == list(range(1, 10))
    assert_same_result(run, again)


def test_resume_may_change_the_layout_and_the_end(train):
    run = train("whole", max_train_steps=6, train_batch_size=4)
    train("other", max_train_steps=4, train_batch_size=4, checkpointing_steps=4)
    (run.path.parent / "other" / "pytorch_lora_weights.safetensors").unlink()
    more = dict(train_batch_size=1, gradient_accumulation_steps=4, max_train_steps=6)
    other = train("other", resume_from_checkpoint="checkpoint-4", **more)
    assert other.column("loss") == pytest.approx(run.column("loss"), rel=1e-3)


def test_resume_at_the_end_makes_no_update(train):
    run = train(max_train_steps=4, checkpointing_steps=4)
    before = load_file(run.path / "pytorch_lora_weights.safetensors")
    run = train(max_train_steps=4, resume_from_checkpoint="latest")
    after = load_file(run.path / "pytorch_lora_weights.safetensors")
    assert len(run.metrics) == 4
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_old_checkpoints_go_and_the_bank_stays(train):
    run = train(max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=2, replay_steps=2)
    assert sorted(path.name for path in run.path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert len(list((run.path / "replay").iterdir())) == 5
