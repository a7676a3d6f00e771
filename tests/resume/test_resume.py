"""A run that is resumed from a checkpoint ends with the bits of the run that never stopped."""

import pytest
from faults import kill
from helpers import assert_same_result, forget_result, resumed, with_every, with_shared_code
from safetensors.torch import load_file


CROPS = dict(proportion_empty_prompts=0.3, center_crop=False, random_flip=True)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("sd", dict(**CROPS)),
        ("sd", dict(train_mode="full", lr_scheduler="constant_with_warmup", lr_warmup_steps=5, use_8bit_adam=True)),
        ("sd", dict(cache_latents=True, draws_per_pair=2)),
        ("sd", dict(streaming=True, dataloader_num_workers=1)),
        ("sd", dict(optimizer="adafactor", gradient_accumulation_steps=2, dataloader_num_workers=2)),
        ("sd", dict(loss_type="sft")),
        ("sdxl", dict(cache_latents=True, **CROPS)),
        ("sdxl", dict(train_mode="full", use_8bit_adam=True)),
        ("sdxl", dict(streaming=True, dataloader_num_workers=1)),
        ("video", dict(**CROPS)),
        ("video", dict(train_mode="full", gradient_checkpointing=True)),
        ("video", dict(train_mode="full", use_8bit_adam=True, cache_latents=True, rollout_strength=0.7)),
        ("video", dict(streaming=True, dataloader_num_workers=1)),
    ],
)
def test_resumed_run_ends_as_if_never_stopped(trains, kind, options):
    """5 of 9 updates, in the middle of an epoch and of an iteration, then the rest; replay_size forces evictions."""
    train, options = trains[kind], dict(dict(replay_steps=2, replay_size=3, rollout_steps=2), **options)
    run = train("whole", max_train_steps=9, checkpointing_steps=5, **options)
    again = resumed(train, run, 5, **options)
    assert [line["step"] for line in again.metrics] == list(range(1, 10))
    assert_same_result(run, again)


def test_a_falling_rate_falls_on(train, whole):
    options = dict(max_train_steps=5, checkpointing_steps=2, lr_scheduler="cosine")
    kill(train, "killed", (None, "training_loss", 4, "before"), **options)
    again = train("killed", resume_from_checkpoint="latest", **options)
    assert_same_result(whole(train, **options), again)
    assert again.column("lr") == sorted(set(again.column("lr")), reverse=True)


@with_every
def test_resume_may_change_the_layout_and_the_end(each):
    run = each("whole", max_train_steps=6, train_batch_size=4)
    forget_result(each("other", max_train_steps=4, train_batch_size=4, checkpointing_steps=4))
    more = dict(train_batch_size=1, gradient_accumulation_steps=4, max_train_steps=6, split_pairs=True)
    other = each("other", resume_from_checkpoint="checkpoint-4", **more)
    assert other.column("loss")[:4] == run.column("loss")[:4]
    assert other.column("loss") == pytest.approx(run.column("loss"), rel=1e-3)


@with_shared_code
def test_resume_at_the_end_makes_no_update(each):
    run = each(max_train_steps=4, checkpointing_steps=4)
    before = load_file(run.path / "pytorch_lora_weights.safetensors")
    forget_result(run)
    run = each(max_train_steps=4, resume_from_checkpoint="latest")
    after = load_file(run.path / "pytorch_lora_weights.safetensors")
    assert len(run.metrics) == 4
    assert all(before[name].equal(after[name]) for name in before)


@with_shared_code
def test_old_checkpoints_go_and_the_bank_stays(each):
    run = each(max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=2, replay_steps=2)
    assert sorted(path.name for path in run.path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert len(list((run.path / "replay").iterdir())) == 5


def test_what_a_checkpoint_on_disk_draws_from_is_not_evicted(train, whole):
    """Resumed from one of the middle, though the bank keeps no more than the base and one entry."""
    options = dict(max_train_steps=8, checkpointing_steps=3, replay_steps=2, replay_size=2)
    expected = whole(train, **options)
    run = train("run", **options)
    assert sorted(path.name for path in (run.path / "replay").iterdir()) == [
        f"iteration-{index}.safetensors" for index in (0, 1, 3, 4)
    ]
    forget_result(run)
    assert_same_result(expected, train("run", resume_from_checkpoint="checkpoint-3", **options))
