"""What an update costs: calls of the models, moments at which a GPU would be waited for, and what autograd keeps."""

import contextlib

import pytest
import torch
from helpers import SCRIPTS, long
from torch.nn.modules.module import register_module_forward_pre_hook


@pytest.fixture
def calls():
    """The batch sizes of the calls of the denoiser, the text encoders and the two halves of the VAE."""
    seen = {name: [] for name in ("denoiser", "CLIPTextModel", "CLIPTextModelWithProjection", "Encoder", "Decoder")}

    def note(module, inputs):
        name = type(module).__name__
        name = "denoiser" if name in ("UNet2DConditionModel", "UNetMotionModel") else name
        if name in seen and inputs:  # a text encoder calls what it holds by keyword
            seen[name].append(len(inputs[0]))

    hook = register_module_forward_pre_hook(note)
    yield seen
    hook.remove()


# Flags, and the denoiser's calls of one update at a batch of two and three sampler steps: first the rollout, one call
# a step, then for each micro-batch reference and policy on winners and rivals together.
UPDATES = [
    ({}, 3 * [2] + 2 * [4]),
    (
        dict(gradient_accumulation_steps=3, rollout_batch_size=4, rollout_guidance_scale=4.0, train_mode="full"),
        3 * [2 * 4] + 4 * [4] + 3 * [2 * 2] + 2 * [4],
    ),
    (
        dict(gradient_accumulation_steps=2, rollout_batch_size=2, draws_per_pair=3),
        2 * (3 * [2] + 2 * [3 * 4]),
    ),
    (dict(rollout_scheduler="ddim", rollout_steps=5, rollout_strength=0.5), 2 * [2] + 2 * [4]),
    (dict(split_pairs=True, gradient_accumulation_steps=2, draws_per_pair=2), 3 * [4] + 2 * 5 * [2 * 2]),
    (dict(loss_type="sft", gradient_accumulation_steps=2, draws_per_pair=2), 2 * [2 * 2]),
    (dict(gradient_accumulation_steps=9, rollout_steps=1), [16] + 16 * [4] + [2] + 2 * [4]),  # at most 16 at once
]


@pytest.mark.parametrize(
    "kind, options, expected",
    [
        *(("sd", *update) for update in UPDATES),
        *((kind, *update) for kind in ("sdxl", "video") for update in UPDATES[:2]),
        *(pytest.param(kind, *update, marks=long) for kind in ("sdxl", "video") for update in UPDATES[2:]),
    ],
)
def test_no_call_is_needless(trains, calls, kind, options, expected):
    """The denoiser is called as written above, the VAE once a picture, the text encoders once a micro-batch."""
    run = trains[kind](max_train_steps=2, **options)
    assert len(run.metrics) == 2
    assert calls["denoiser"] == 2 * expected
    micro_batches = 2 * options.get("gradient_accumulation_steps", 1)
    assert calls["CLIPTextModel"] == [1, *micro_batches * [2]]
    assert calls["CLIPTextModelWithProjection"] == ([1, *micro_batches * [2]] if kind == "sdxl" else [])
    pictures = [8] if kind == "video" else [1, 1]  # two clips of four frames, or one by one
    assert calls["Encoder"] == micro_batches * pictures
    assert not calls["Decoder"]


@pytest.mark.parametrize(
    "scheduler, strength, mode",
    [("dpmsolver", 1.0, "lora"), ("dpmsolver", 0.5, "full"), ("ddim", 1.0, "full"), ("ddim", 0.5, "lora")],
)
def test_sampling_and_training_never_wait_for_the_accelerator(script, load, scheduler, strength, mode):
    """Tensors on the meta device have no values: looking at one, for which a GPU must be waited for, raises."""
    options = dict(rollout_scheduler=scheduler, rollout_strength=strength, rollout_steps=4, train_mode=mode)
    args, models = load(script, rollout_guidance_scale=2.0, **options)
    script.prepare_denoiser(models, args, "cpu")
    rows = [{**script.uncropped(args), **row} for row in script.encode_prompt(models, ["a red circle", ""])]
    condition = {name: value.to("meta") for name, value in script.collate_condition(rows, "cpu").items()}
    winner = torch.empty(2, *script.latent_shape(models, args), device="meta")
    models.denoiser.to("meta")
    trained = [parameter for parameter in models.denoiser.parameters() if parameter.requires_grad]
    models.reference = {parameter: torch.empty_like(parameter) for parameter in trained}
    batch = {"winner": winner, "condition": condition, "unconditional": condition, "keys": [(0, 0), (0, 1)]}
    batch["rival"] = script.sample_rivals(models, batch, args, contextlib.nullcontext)
    loss, metrics = script.training_loss(models.denoiser, models, batch, args, contextlib.nullcontext)
    loss.backward()
    assert {tensor.device.type for tensor in (batch["rival"], loss, *metrics.values())} == {"meta"}


# What autograd keeps for the backward


def saved_by_a_loss(script, models, batch, args):
    """Bytes that autograd keeps for one loss, and the gradients."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in models.denoiser.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = script.training_loss(models.denoiser, models, batch, args, contextlib.nullcontext)
    size = sum(size for pointer, size in kept.items() if pointer not in weights)
    loss.backward()
    return size, [weight.grad for weight in models.denoiser.parameters() if weight.requires_grad]


@pytest.fixture
def prepared(load):
    """prepared(script, flag=value, ...) gives args, models whose adapters do something, and a batch with rivals."""

    def prepare(script, **options):
        args, models = load(script, **options)
        torch.manual_seed(0)
        script.prepare_denoiser(models, args, "cpu")
        for name, weight in models.denoiser.named_parameters():
            if "lora_B" in name:  # else half of the gradients are 0
                torch.nn.init.normal_(weight, std=0.1)
        rows = [{**script.uncropped(args), **row} for row in script.encode_prompt(models, ["a red circle", ""])]
        winner, rival = torch.randn(2, 2, *script.latent_shape(models, args))
        condition = script.collate_condition(rows, "cpu")
        return args, models, {"winner": winner, "rival": rival, "condition": condition, "keys": [(0, 0), (0, 1)]}

    return prepare


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradient_checkpointing_covers_the_motion_modules(prepared, mode):
    """The same gradients to the bit, and far fewer saved bytes than with the library's own checkpointing."""
    results, script = [], SCRIPTS["video"]
    for kind in ("none", "library", "ours"):
        args, models, batch = prepared(script, train_mode=mode, gradient_checkpointing=kind == "ours")
        if kind == "library":
            models.denoiser.enable_gradient_checkpointing()
        results.append(saved_by_a_loss(script, models, batch, args))
    (without, plain), (library, _), (ours, gradients) = results
    assert len(plain) > 20 and all(gradient.any() for gradient in plain[:4])
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients))
    assert ours < 0.4 * library < 0.9 * without


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_split_pairs_keep_half(script, prepared, mode):
    """Half the bytes wait for the backward, and the gradients are the same but for rounding."""
    (together, plain), (split, gradients) = (
        saved_by_a_loss(script, models, batch, args)
        for args, models, batch in (prepared(script, train_mode=mode, split_pairs=split) for split in (False, True))
    )
    assert split < 0.6 * together
    scale = max(gradient.abs().max() for gradient in plain)
    assert all((a - b).abs().max() < 1e-4 * scale for a, b in zip(plain, gradients))
