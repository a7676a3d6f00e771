"""Whole runs of train_sspo_sd.py: what they leave behind, and that they do not hang on the layout of the hardware."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import train_sspo_sd as script


PROMPTS = ["a red circle", "a blue square"]
KEYS = (
    "step loss dpo_fraction implicit_accuracy mse/policy_winner mse/policy_rival gap/winner gap/rival "
    "reference/index lr grad_norm time/rollout time/update"
)


def capture(monkeypatch):
    """Keeps the models that a run hands to save_result."""
    kept, save = [], script.save_result
    monkeypatch.setattr(script, "save_result", lambda models, *rest: kept.append(models) or save(models, *rest))
    return kept


def stock_pictures(pipeline, prompts=PROMPTS, seed=0):
    """What the stock pipeline draws from the noise of a run's validation."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = script.keyed_noise("validation", seed, [(i, 0) for i in range(len(prompts))], (4, 8, 8))
    return pipeline(prompts, latents=noise, num_inference_steps=3, height=64, width=64).images


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("ssr", ["sign", "indicator", "none"])
def test_first_update_is_ln_2(train, mode, ssr):
    run = train(train_mode=mode, ssr=ssr, max_train_steps=2, draws_per_pair=2)
    first, second = run.metrics
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["gap/winner"] == first["gap/rival"] == 0
    assert first["grad_norm"] > 0
    assert second["gap/winner"] != 0
    assert set(first) == set(KEYS.split())


def test_gap_is_zero_under_autocast_too(train):
    """In mixed precision policy and reference run through the same autocast, LoRA and full."""
    for mode in ("lora", "full"):
        run = train(mode, train_mode=mode, mixed_precision="bf16", max_train_steps=2)
        first, second = run.metrics
        assert first["gap/winner"] == first["gap/rival"] == 0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert second["gap/winner"] != 0, "autocast keeps no cast of weights whose place others took"


@pytest.mark.parametrize("alpha", [None, 2])
def test_lora_loads_in_the_stock_pipeline_and_draws_what_the_run_drew(train, sd, alpha):
    """The upper row of the samples is the base, the lower the stock pipeline with the LoRA, also if alpha != rank."""
    run = train(validation_prompts=PROMPTS, learning_rate=1e-2, max_train_steps=6, rank=8, lora_alpha=alpha)
    above, below = tiny.rows_of(run.path / "samples" / "step-6.png", 2, 2)
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    for ours, theirs in zip(above, stock_pictures(pipeline)):
        assert tiny.difference(ours, theirs) <= 1
    pipeline.load_lora_weights(str(run.path))
    for ours, theirs, base in zip(below, stock_pictures(pipeline), above):
        assert tiny.difference(ours, theirs) <= 1
        assert tiny.difference(ours, base) > 1


def test_full_run_is_a_pipeline_that_draws_what_the_run_drew(train, sd):
    run = train(train_mode="full", validation_prompts=PROMPTS, num_validation_images=2)
    pipeline = StableDiffusionPipeline.from_pretrained(run.path)
    rows = tiny.rows_of(run.path / "samples" / "step-4.png", 4, 2)
    for ours, theirs, base in zip(rows[1], stock_pictures(pipeline), rows[0]):
        assert tiny.difference(ours, theirs) <= 1
        assert tiny.difference(ours, base) > 1
    assert tiny.difference(rows[0][0], rows[2][0]) > 1, "the second image has another seed"
    assert not list(run.path.rglob("*.bin")), "safetensors only"


def test_lora_leaves_the_base_alone(train, sd, monkeypatch):
    kept = capture(monkeypatch)
    train(learning_rate=1e-2)
    weights = {name.replace(".base_layer", ""): weight for name, weight in kept[0].denoiser.state_dict().items()}
    base = UNet2DConditionModel.from_pretrained(sd, subfolder="unet").state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in base.items())


def test_full_run_trains_every_weight_of_the_unet_and_nothing_else(train, sd):
    run = train(train_mode="full")
    before, after = (StableDiffusionPipeline.from_pretrained(path) for path in (sd, run.path))
    trained = after.unet.state_dict()
    assert all(not torch.equal(trained[name], weight) for name, weight in before.unet.state_dict().items())
    for part in ("vae", "text_encoder"):
        weights = getattr(after, part).state_dict()
        assert all(torch.equal(weights[name], weight) for name, weight in getattr(before, part).state_dict().items())


def test_weights_of_sd_in_half_precision_are_trained_in_fp32(train, sd, tmp_path):
    """A base that is stored in fp16 is read as fp32, so that small updates are not lost."""
    StableDiffusionPipeline.from_pretrained(sd).to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    run = train(model=tmp_path / "half", train_mode="full", learning_rate=1e-6, max_train_steps=1)
    weights = load_file(run.path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    half = UNet2DConditionModel.from_pretrained(tmp_path / "half", subfolder="unet").state_dict()
    assert not torch.equal(weights["conv_in.weight"], half["conv_in.weight"].float())
    assert len(stock_pictures(StableDiffusionPipeline.from_pretrained(run.path))) == 2, (
        "all parts are of one precision"
    )


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_sft_baseline_is_the_plain_denoising_loss(train, mode):
    """No reference, no rivals, no bank; its loss is the winners' error of the SSPO run with the same seed."""
    sft = train("sft", loss_type="sft", train_mode=mode)
    sspo = train("sspo", train_mode=mode)
    assert sft.metrics[0]["loss"] == pytest.approx(sspo.metrics[0]["mse/policy_winner"], rel=1e-6)
    assert "gap/winner" not in sft.metrics[0]
    assert not (sft.path / "replay").exists()


def test_velocity_models_train(train, sd_v):
    run = train(model=sd_v, max_train_steps=2)
    forced = train("forced", model=sd_v, prediction_type="epsilon", max_train_steps=2)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.metrics[0]["mse/policy_winner"] != pytest.approx(forced.metrics[0]["mse/policy_winner"], rel=1e-3)


def test_prediction_type_is_kept_in_the_result(train, sd):
    run = train(train_mode="full", prediction_type="v_prediction", max_train_steps=1)
    assert StableDiffusionPipeline.from_pretrained(run.path).scheduler.config.prediction_type == "v_prediction"


def test_8bit_adam_steps(train):
    """Its states really are bytes, the weights move as with 32 bits, and it resumes exactly."""
    run = train(train_mode="full", use_8bit_adam=True, checkpointing_steps=2)
    state = torch.load(run.path / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
    states = [entry["__bnb_optimizer_quant_state__"]["state1"] for entry in state.values()]
    assert any(moment.dtype == torch.uint8 for moment in states)
    plain = train("plain", train_mode="full")
    assert run.column("loss") == pytest.approx(plain.column("loss"), rel=0.05)
    script_resumed = resumed(train, run, 2, train_mode="full", use_8bit_adam=True)
    assert_same_result(run, script_resumed)


def test_adafactor(train):
    run = train(train_mode="full", optimizer="adafactor", max_train_steps=3)
    assert run.column("gap/winner")[1] < 0
    assert all(math.isfinite(loss) for loss in run.column("loss"))


def test_gradient_checkpointing_changes_nothing(train):
    plain = train("plain")
    checkpointed = train("checkpointed", gradient_checkpointing=True)
    assert checkpointed.column("loss") == plain.column("loss")
    assert checkpointed.column("grad_norm") == pytest.approx(plain.column("grad_norm"), rel=1e-6)


@pytest.mark.parametrize("options", [{}, dict(train_mode="full", gradient_checkpointing=True, draws_per_pair=2)])
def test_split_pairs_change_nothing(train, options):
    """The gradients of winner and rival, one after the other, are those of both together, but for rounding."""
    together, split = train("together", **options), train("split", split_pairs=True, **options)
    assert split.metrics[0]["gap/winner"] == split.metrics[0]["gap/rival"] == 0
    # From equal weights only rounding differs; then the optimizer's first steps, which are near to signs, enlarge it.
    assert split.metrics[0]["grad_norm"] == pytest.approx(together.metrics[0]["grad_norm"], rel=1e-5)
    assert split.column("grad_norm") == pytest.approx(together.column("grad_norm"), rel=1e-3)
    assert split.column("loss") == pytest.approx(together.column("loss"), rel=1e-3)


def test_cached_latents_change_nothing(train):
    """With crops that do not vary; captions are dropped in the same places."""
    plain = train("plain", max_train_steps=6, proportion_empty_prompts=0.5)
    cached = train("cached", max_train_steps=6, proportion_empty_prompts=0.5, cache_latents=True)
    assert cached.column("loss") == pytest.approx(plain.column("loss"), rel=1e-4)
    workers = train("workers", max_train_steps=6, proportion_empty_prompts=0.5, dataloader_num_workers=2)
    assert workers.column("loss") == plain.column("loss")


def test_caption_is_dropped_for_both_halves(train, monkeypatch):
    """Where a caption is dropped, rival, reference and policy all see the empty prompt."""
    seen = []
    predict = script.predict
    monkeypatch.setattr(script, "predict", lambda *a: seen.append(a[3]["prompt_embeds"]) or predict(*a))
    train(proportion_empty_prompts=0.5, max_train_steps=8, rollout_steps=1)
    dropped = []
    for rollout, reference, policy in zip(seen[0::3], seen[1::3], seen[2::3]):
        empty, captions = rollout.chunk(2)
        assert torch.equal(reference, policy)
        assert torch.equal(reference, torch.cat([captions, captions]))
        dropped += [torch.equal(caption, empty[0]) for caption in captions]
    assert 2 < sum(dropped) < 14


@pytest.mark.parametrize(
    "options",
    [
        dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=1),
        dict(train_batch_size=2, gradient_accumulation_steps=2),
        dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=3, dataloader_num_workers=2),
    ],
)
def test_layout_of_the_batch_does_not_matter(train, options):
    assert_same_but_for_rounding(train("whole", train_batch_size=4, **LAYOUT), train("parts", **options, **LAYOUT))


def test_switch_of_an_iteration_follows_its_updates_so_far(train):
    """It forgets at each push, is one decision for the global batch on any layout, and goes on where it was."""
    options = dict(ssr_scope="iteration", reference="latest", replay_steps=4, learning_rate=3e-2, adam_epsilon=1e-5)
    run = train("whole", train_batch_size=4, checkpointing_steps=6, max_train_steps=12, **options)
    switched = run.column("dpo_fraction")
    gaps = run.column("gap/winner")
    assert switched == [sum(gaps[update - update % 4 : update]) <= 0 for update in range(12)]
    assert switched[6] == 0 and sum(switched) > 6, "the rate is so high that the policy is behind for once"
    assert_same_result(run, resumed(train, run, 6, train_batch_size=4, **options))
    parts = train("parts", train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=12, **options)
    assert parts.column("dpo_fraction") == switched
    assert parts.column("loss") == pytest.approx(run.column("loss"), abs=1e-3)


# AdamW divides a gradient by its own size, so one that is but rounding moves its weight as far as any, and anywhere.
# With an epsilon above the rounding weights can be compared.
LAYOUT = dict(max_train_steps=6, center_crop=False, random_flip=True, proportion_empty_prompts=0.3, adam_epsilon=1e-5)


def assert_same_but_for_rounding(one, other):
    """
    Errors to 1e-6 of themselves, weights (the last push to the bank) to 1e-5. A gap is a difference of errors, and the
    loss has beta / 2 = 1000 of it: of fp32's rounding, 1e-7 in an error, losses carry 1e-4.
    """
    assert other.column("reference/index") == one.column("reference/index")
    for name in ("mse/policy_winner", "mse/policy_rival"):
        assert other.column(name) == pytest.approx(one.column(name), rel=1e-6)
    for name in ("gap/winner", "gap/rival"):
        assert other.column(name) == pytest.approx(one.column(name), abs=2e-7)
    assert other.column("loss") == pytest.approx(one.column("loss"), abs=2e-4)
    base, ours, theirs = (
        load_file(run.path / "replay" / f"iteration-{i}.safetensors") for run, i in ((one, 0), (one, 3), (other, 3))
    )
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5
    assert max((ours[name] - base[name]).abs().max() for name in ours) > 1e-3, "they have moved"


def assert_same_result(one, other):
    """Weights, metrics but for the times, and the part of the bank that is drawn from, bit by bit."""
    record = json.loads(next(iter(sorted(one.path.glob("checkpoint-*/run.json")))).read_text())["settings"]
    bank = script.ReplayBank(one.path / "replay", record["replay_size"])
    live = [bank.path(index) for index in bank.live(len(one.metrics) // record["replay_steps"] + 1)]
    results = [path for path in one.path.rglob("*.safetensors") if not {"replay", "cache"} & set(path.parts[:-1])]
    for path in [*live, *(path for path in results if "checkpoint-" not in str(path))]:
        ours, theirs = load_file(path), load_file(other.path / path.relative_to(one.path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), path
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in run.metrics] for run in (one, other)
    ]
    assert timeless[0] == timeless[1]


def resumed(train, run, step, **options):
    """As many updates as `run` made, stopped one update after checkpoint `step` and gone on with from there."""
    total = len(run.metrics)
    train("resumed", max_train_steps=step + 1, checkpointing_steps=step, **options)
    for name in ("pytorch_lora_weights.safetensors", "model_index.json"):
        (run.path.parent / "resumed" / name).unlink(missing_ok=True)
    return train("resumed", max_train_steps=total, resume_from_checkpoint="latest", **options)


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


def test_seed_0_is_a_seed(train):
    """--seed 0 is kept to, and another seed is another run."""
    one, two, other = (train(name, seed=seed, checkpointing_steps=4) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert_same_result(one, two)
    assert one.column("mse/policy_winner") != other.column("mse/policy_winner")


def test_epochs_set_the_number_of_updates(train):
    assert len(train(max_train_steps=None, num_train_epochs=3).metrics) == 12


def test_learning_rate_follows_the_schedule(train):
    run = train(max_train_steps=4, lr_scheduler="linear", lr_warmup_steps=2, gradient_accumulation_steps=2)
    assert run.column("lr") == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    run = train("scaled", max_train_steps=1, scale_lr=True, gradient_accumulation_steps=3)
    assert run.column("lr") == pytest.approx([6e-3])


def test_trackers_and_model_card(train, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["train_sspo_sd.py", "--hub_token", "secret-1", "--hub_token=secret-2", "--seed", "0"]
    )
    run = train(report_to="tensorboard", validation_prompts=PROMPTS, hub_token="secret-3", checkpointing_steps=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "logs" / "sspo"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(run.column("loss"))
    assert "samples" in events.Tags()["images"]
    card = (run.path / "README.md").read_text()
    assert "samples/step-4.png" in card
    assert "--seed 0" in card
    for path in filter(lambda path: path.is_file(), run.path.rglob("*")):
        assert b"secret" not in path.read_bytes(), path


def test_nothing_is_in_training_mode(train, monkeypatch):
    """Dropout in the policy alone would bias the switch."""
    kept = capture(monkeypatch)
    train(max_train_steps=1)
    assert not any(module.training for module in kept[0].denoiser.modules())
    assert np.isfinite([weight.float().mean().item() for weight in kept[0].denoiser.parameters()]).all()


def test_push_to_hub_uploads_the_result_only(train, monkeypatch):
    calls = {}

    class Repository:
        repo_id = "me/run"

    monkeypatch.setattr(script, "create_repo", lambda *a, **k: calls.update(create=(a, k)) or Repository)
    monkeypatch.setattr(script, "upload_folder", lambda **k: calls.update(upload=k))
    train(push_to_hub=True, hub_token="token", max_train_steps=1)
    assert calls["create"][0] == ("run",)
    assert calls["upload"]["repo_id"] == "me/run"
    assert {"checkpoint-*", "replay/*", "cache/*"} <= set(calls["upload"]["ignore_patterns"])
