"""Whole runs of every script: what an update is, and what may not change it."""

import inspect
import math
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    LAYOUT,
    assert_same_but_for_rounding,
    assert_same_result,
    flags,
    keep_models,
    quick_first,
    with_every,
    with_shared_code,
)
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_sspo_sd


SFT_METRICS = {"step", "loss", "mse/policy_winner", "lr", "grad_norm", "time/rollout", "time/update"}
SSPO_METRICS = SFT_METRICS | {
    *("dpo_fraction", "implicit_accuracy", "mse/policy_rival", "gap/winner", "gap/rival", "reference/index")
}


def count_calls(run):
    """What `run()` returns, and (class, batch size) of every call of a module in it."""
    seen = []

    def note(module, inputs):
        if inputs and torch.is_tensor(inputs[0]):
            seen.append((type(module).__name__, len(inputs[0])))

    hook = register_module_forward_pre_hook(note)
    try:
        return run(), seen
    finally:
        hook.remove()


# The first update, and those from equal weights


@pytest.mark.parametrize(
    "options",
    [
        dict(ssr="sign"),
        dict(ssr="indicator", lora_alpha=3),
        dict(ssr="none", draws_per_pair=2),
        dict(train_mode="full", draws_per_pair=2),
        dict(mixed_precision="bf16", gradient_checkpointing=True),
        dict(mixed_precision="bf16", train_mode="full"),
    ],
)
def test_first_update_is_ln_2_with_gaps_of_exactly_0(each, options):
    """
    So is the first of the second iteration, whose reference is the policy of a moment ago, and none in between. In
    mixed precision both go through the same autocast, which must not keep casts of weights whose place others took.
    """
    run = each(**options, reference="latest", max_train_steps=3)
    for line in (run.metrics[0], run.metrics[2]):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert line["gap/winner"] == line["gap/rival"] == 0
        assert line["dpo_fraction"] == 1
        assert line["implicit_accuracy"] == 0.5
        assert line["grad_norm"] > 0
        assert set(line) == SSPO_METRICS
    assert run.metrics[1]["gap/winner"] != 0
    assert run.metrics[1]["gap/rival"] != 0


@pytest.mark.parametrize("options", [{}, dict(train_mode="full"), dict(loss_type="sft"), dict(optimizer="adafactor")])
def test_an_update_lowers_the_loss_that_it_was_made_from(train, monkeypatch, options):
    """Of the same pairs, noise and timesteps: it goes down the gradient, not up."""
    given, loss_of = [], train.script.training_loss
    monkeypatch.setattr(train.script, "training_loss", lambda *a: given.append(a) or loss_of(*a))
    run = train(max_train_steps=1, learning_rate=1e-4, **options)
    with torch.no_grad():
        again, _ = loss_of(*given[0])
    assert again.item() < run.column("loss")[0] - 1e-6


def test_the_loss_is_told_the_flags(train, monkeypatch):
    """By place in the call: two that change places would train on, to something else."""
    given, loss_of = [], train.script.sspo_loss
    monkeypatch.setattr(train.script, "sspo_loss", lambda *a, **k: given.append((a, k)) or loss_of(*a, **k))
    told = dict(ssr="indicator", rival_weight=0.3, sft_weight=2.0, unpaired=True)
    train(max_train_steps=1, beta_dpo=500, **told)
    ((by_place, by_name),) = given
    bound = inspect.signature(loss_of).bind(*by_place, **by_name)
    bound.apply_defaults()
    assert {name: bound.arguments[name] for name in ("beta", *told)} == {"beta": 500, **told}


@pytest.mark.parametrize("mode", quick_first("lora", ["full"]))
@with_every
def test_sft_is_the_plain_denoising_loss(each, mode):
    """No reference, no rivals, no bank; its loss is the winners' error of the SSPO run with the same seed."""
    sft, sspo = (each(kind, loss_type=kind, train_mode=mode, max_train_steps=2) for kind in ("sft", "sspo"))
    assert sft.metrics[0]["loss"] == sft.metrics[0]["mse/policy_winner"]
    assert sft.metrics[0]["loss"] == pytest.approx(sspo.metrics[0]["mse/policy_winner"], rel=1e-6)
    assert set(sft.metrics[0]) == SFT_METRICS
    assert not (sft.path / "replay").exists()


def test_velocity_models_train(train, sd_v):
    """What the model predicts is read off its scheduler."""
    run = train(model=sd_v, max_train_steps=2)
    forced = train("forced", model=sd_v, prediction_type="epsilon", max_train_steps=2)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.metrics[0]["mse/policy_winner"] != pytest.approx(forced.metrics[0]["mse/policy_winner"], rel=1e-3)


def test_prediction_type_is_what_is_trained(each):
    """The flag turns the target of the same winners and the same noise into a velocity."""
    one, other = (
        each(kind, prediction_type=kind, max_train_steps=1, loss_type="sft") for kind in ("epsilon", "v_prediction")
    )
    assert one.metrics[0]["loss"] != pytest.approx(other.metrics[0]["loss"], rel=1e-3)


@with_every
def test_nothing_is_in_training_mode(each, monkeypatch):
    """Dropout in the policy alone would bias the switch."""
    kept = keep_models(monkeypatch, each.script)
    each(max_train_steps=1)
    assert not any(module.training for module in kept[0].denoiser.modules())


# Guidance


def test_rivals_are_unguided_unless_asked(each):
    """By default each sampler step is one call for a pair; with guidance two, and only the rivals change."""
    plain, guided = (
        count_calls(lambda name=name, options=options: each(name, max_train_steps=1, **options))
        for name, options in (("plain", {}), ("guided", dict(rollout_guidance_scale=4)))
    )
    unets = ("UNet2DConditionModel", "UNetMotionModel")
    sizes = [[size for kind, size in calls if kind in unets] for _, calls in (plain, guided)]
    assert sizes == [3 * [2] + 2 * [4], 3 * [4] + 2 * [4]], "three sampler steps, the reference, the policy"
    (plain, _), (guided, _) = plain, guided
    assert plain.column("mse/policy_winner") == guided.column("mse/policy_winner")
    assert plain.column("mse/policy_rival") != guided.column("mse/policy_rival")


@pytest.mark.parametrize("kind, default", [("sd", 7.5), ("sdxl", 5), ("video", 8)])
def test_validation_has_a_guidance_of_its_own(trains, kind, default):
    """Pictures change with --validation_guidance_scale and not with the rivals'; the training does not care."""
    flags = dict(plain={}, named=dict(validation_guidance_scale=default), rivals=dict(rollout_guidance_scale=4))
    flags["other"] = dict(validation_guidance_scale=1)
    options = dict(validation_prompts=["a red circle"], max_train_steps=1)
    runs = {name: trains[kind](name, **options, **more) for name, more in flags.items()}
    # The base's picture alone: what one update makes of it hangs on the rivals.
    base = {}
    for name, run in runs.items():
        drawn = Image.open(run.path / "samples" / "step-1.png")
        base[name] = drawn.crop((0, 0, drawn.width, drawn.height // 2)).tobytes()
    assert base["plain"] == base["named"] == base["rivals"] != base["other"]
    assert runs["other"].column("loss") == runs["plain"].column("loss")


# What may not change a run


@pytest.mark.parametrize("mode", quick_first("lora", ["full"]))
@with_every
def test_gradient_checkpointing_changes_nothing(each, mode):
    """But that layers are called again for the backward."""
    options = dict(train_mode=mode, max_train_steps=3)
    plain, calls = count_calls(lambda: each("plain", **options))
    again, more_calls = count_calls(lambda: each("again", gradient_checkpointing=True, **options))
    assert len(more_calls) > 1.03 * len(calls)
    assert again.column("loss") == plain.column("loss")
    assert again.column("grad_norm") == pytest.approx(plain.column("grad_norm"), rel=1e-6)


@pytest.mark.parametrize(
    "options", quick_first(dict(train_mode="full", gradient_checkpointing=True, draws_per_pair=2), [{}])
)
@with_every
def test_split_pairs_change_nothing(each, options):
    """The gradients of winner and rival, one after the other, are those of both together, but for rounding."""
    together, split = each("together", **options), each("split", split_pairs=True, **options)
    assert split.metrics[0]["gap/winner"] == split.metrics[0]["gap/rival"] == 0
    # From equal weights only rounding differs; then the optimizer's first steps, which are near to signs, enlarge it.
    assert split.metrics[0]["grad_norm"] == pytest.approx(together.metrics[0]["grad_norm"], rel=1e-5)
    assert split.column("grad_norm") == pytest.approx(together.column("grad_norm"), rel=1e-3)
    assert split.column("loss") == pytest.approx(together.column("loss"), rel=1e-3)


@with_every
def test_loader_processes_change_nothing(each):
    options = dict(center_crop=False, random_flip=True, proportion_empty_prompts=0.4)
    alone, helped = (each(f"{workers}", dataloader_num_workers=workers, **options) for workers in (0, 2))
    assert helped.column("loss") == alone.column("loss")


PARTS = [
    dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=1),
    dict(train_batch_size=2, gradient_accumulation_steps=2),
    dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=3, dataloader_num_workers=2),
]


@pytest.mark.parametrize("kind, parts", [("sd", 0), ("sd", 1), ("sd", 2), ("video", 0)])
def test_layout_of_the_batch_does_not_matter(trains, kind, parts):
    """Nor to SDXL, with pictures of several shapes: see there."""
    train = trains[kind]
    assert_same_but_for_rounding(
        train("whole", train_batch_size=4, **LAYOUT), train("parts", **PARTS[parts], **LAYOUT)
    )


@with_shared_code
def test_seed_0_is_a_seed(each):
    """--seed 0 is kept to, and another seed is another run."""
    one, two, other = (each(name, seed=seed, checkpointing_steps=4) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert_same_result(one, two)
    assert one.column("mse/policy_winner") != other.column("mse/policy_winner")


# Optimizers and schedules


def by_adamw(w, gradients, rate, beta1, beta2, decay, epsilon):
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w * (1 - rate * decay) - rate * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + epsilon)
    return w


def by_adafactor(w, gradients, rate, beta1, beta2, decay, epsilon):
    """With one gradient all over a matrix: its second moment, kept as row and column, is that gradient's square."""
    v = 0.0
    for t, g in enumerate(gradients, start=1):
        share = 1 - t**-0.8
        v = share * v + (1 - share) * g**2
        update = g / math.sqrt(v)
        w = w * (1 - rate * decay) - rate * update / max(1, abs(update))
    return w


ADAM = dict(learning_rate=0.1, adam_beta1=0.6, adam_beta2=0.8, adam_weight_decay=0.3, adam_epsilon=0.05)


@pytest.mark.parametrize("optimizer, by_hand", [("adamw", by_adamw), ("adafactor", by_adafactor)])
def test_the_optimizer_steps_by_the_numbers_of_the_flags(optimizer, by_hand):
    args = train_sspo_sd.parse_args(flags("unused", "unused", "unused", optimizer=optimizer, **ADAM))
    weight = torch.nn.Parameter(torch.full((3, 2), 5.0))
    made, _ = train_sspo_sd.make_optimizer([weight], args)
    gradients = (0.2, -0.5)
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        made.step()
    expected = torch.full((3, 2), by_hand(5.0, gradients, *ADAM.values()))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_8bit_adam_is_told_the_same_numbers():
    args = train_sspo_sd.parse_args(flags("unused", "unused", "unused", use_8bit_adam=True, **ADAM))
    made, _ = train_sspo_sd.make_optimizer([torch.nn.Parameter(torch.ones(2))], args)
    (group,) = made.param_groups
    assert [group[name] for name in ("lr", "betas", "weight_decay", "eps")] == [0.1, (0.6, 0.8), 0.3, 0.05]


@with_shared_code
def test_gradients_are_clipped_and_their_norm_is_told_before(each):
    """Once an update, of all micro-batches together."""
    norms = []

    def look(optimizer, *_):
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().item())

    hook = register_optimizer_step_pre_hook(look)
    try:
        options = dict(max_train_steps=2, gradient_accumulation_steps=2)
        clipped, free = each("clipped", max_grad_norm=0.01, **options), each("free", max_grad_norm=1e9, **options)
    finally:
        hook.remove()
    assert min(clipped.column("grad_norm")) > 0.02
    assert norms == pytest.approx([0.01, 0.01, *free.column("grad_norm")], rel=1e-3)


def test_8bit_adam_steps(train):
    """Its states really are bytes, and the weights move as with 32 bits."""
    run = train(checkpointing_steps=2, train_mode="full", use_8bit_adam=True)
    state = torch.load(run.path / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
    states = [entry["__bnb_optimizer_quant_state__"]["state1"] for entry in state.values()]
    assert any(moment.dtype == torch.uint8 for moment in states)
    plain = train("plain", train_mode="full")
    assert run.column("loss") == pytest.approx(plain.column("loss"), rel=0.05)


@with_shared_code
def test_adafactor_steps(each):
    """Its second moments are kept as rows and columns, which is why it needs the least memory."""
    run = each(train_mode="full", optimizer="adafactor", max_train_steps=2, checkpointing_steps=2)
    state = torch.load(run.path / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
    assert any("exp_avg_sq_row" in entry for entry in state.values())
    assert not any("exp_avg" in entry for entry in state.values())
    assert run.column("gap/winner")[1] != 0
    assert math.isfinite(run.column("loss")[1])


def test_epochs_set_the_number_of_updates(each):
    """Two passes in updates of twice three, the last of them filled up from a third pass."""
    run = each(max_train_steps=None, num_train_epochs=2, train_batch_size=3, gradient_accumulation_steps=2)
    assert len(run.metrics) == {"image": math.ceil(2 * 8 / 6), "video": math.ceil(2 * 6 / 6)}[each.script.MODALITY]


@with_shared_code
def test_learning_rate_follows_the_schedule(each):
    """It is stepped once an update, not once a micro-batch."""
    run = each(lr_scheduler="linear", lr_warmup_steps=2, gradient_accumulation_steps=2)
    assert run.column("lr") == pytest.approx([0, 5e-4, 1e-3, 5e-4])


@with_shared_code
def test_cosine_with_restarts_restarts(each):
    run = each(lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert run.column("lr") == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4])


@with_shared_code
def test_times_are_seconds_of_an_update_and_of_its_rollouts(each, monkeypatch):
    """By a clock that moves on in sampling and in the loss alone: two rollouts of 5 s, two micro-batches of 2 s."""
    script, now = each.script, [0.0]

    def takes(seconds, function):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic))
    monkeypatch.setattr(script, "self_sample", takes(5, script.self_sample))
    monkeypatch.setattr(script, "training_loss", takes(2, script.training_loss))
    options = dict(max_train_steps=2, gradient_accumulation_steps=2, rollout_batch_size=2, rollout_steps=1)
    for loss_type, rollout, update in (("sspo", 10, 14), ("sft", 0, 4)):
        run = each(loss_type, loss_type=loss_type, **options)
        assert (run.column("time/rollout"), run.column("time/update")) == ([rollout] * 2, [update] * 2)


# Quiet


@pytest.mark.parametrize(
    "options", quick_first(dict(train_mode="full", cache_latents=True), [dict(train_mode="lora")])
)
@with_every
def test_no_run_is_told_that_something_is_deprecated(each, options):
    """Of `torch_dtype`, for one, diffusers warns when it loads a pipeline, and is silent when it loads a part."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = each(checkpointing_steps=1, max_train_steps=1, validation_prompts=["a red circle"], **options)
        each(max_train_steps=2, resume_from_checkpoint="latest", validation_prompts=["a red circle"], **options)
    assert (run.path / "README.md").is_file()
    shown = [warning for warning in caught if issubclass(warning.category, FutureWarning)]
    ours = [warning for warning in caught if warning.filename == each.script.__file__]
    assert not [str(warning.message) for warning in shown + ours]
    assert "torch_dtype" not in Path(each.script.__file__).read_text()
