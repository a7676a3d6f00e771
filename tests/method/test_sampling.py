"""Self-sampling against the stock pipelines."""

import pytest
import tiny
import torch
from conftest import flags
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file

import train_sspo_sd as script


CAPTIONS = ["a red circle", "a blue square", "a green circle"]
SCHEDULERS = {"dpmsolver": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}


def load(model, *more):
    args = script.parse_args([*flags(model, "unused", "unused", rollout_steps=8), *more])
    models = script.load_models(args, torch.float32)
    return args, models


def rivals(args, models, noise, winners=None):
    """Rivals of CAPTIONS as a run samples them."""
    geometries = [script.whole_picture(args)] * len(CAPTIONS)
    condition = script.collate_condition(script.encode_prompt(models, CAPTIONS), geometries, "cpu")
    empty = script.collate_condition(script.encode_prompt(models, [""] * len(CAPTIONS)), geometries, "cpu")
    return script.self_sample(
        models.denoiser,
        script.rollout_scheduler(models, args),
        noise,
        condition,
        empty,
        args.rollout_steps,
        args.rollout_guidance_scale,
        winners,
        args.rollout_strength,
    )


def stock(kind, model, scheduler):
    pipeline = kind.from_pretrained(model)
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("fixture", ["sd", "sd_v"])
def test_rival_is_what_the_stock_pipeline_samples(request, fixture, scheduler, guidance):
    model = request.getfixturevalue(fixture)
    args, models = load(model, "--rollout_scheduler", scheduler, "--rollout_guidance_scale", str(guidance))
    noise = torch.randn(len(CAPTIONS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = rivals(args, models, noise)
    theirs = stock(StableDiffusionPipeline, model, scheduler)(
        CAPTIONS,
        latents=noise.clone(),
        num_inference_steps=8,
        guidance_scale=guidance,
        height=64,
        width=64,
        output_type="latent",
    ).images
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - noise).abs().max() > 0.1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rollout_strength_is_image_to_image(sd, scheduler):
    args, models = load(sd, "--rollout_scheduler", scheduler, "--rollout_strength", "0.6")
    generator = torch.Generator().manual_seed(1)
    winners = torch.randn(len(CAPTIONS), 4, 8, 8, generator=generator)
    noise = torch.randn(winners.shape, generator=torch.Generator().manual_seed(2))
    ours = rivals(args, models, noise, winners)
    theirs = stock(StableDiffusionImg2ImgPipeline, sd, scheduler)(
        CAPTIONS,
        image=winners,
        strength=0.6,
        num_inference_steps=8,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images
    assert (ours - theirs).abs().max() < 1e-4


def test_rivals_of_a_run_come_from_the_old_checkpoint(train, sd, monkeypatch):
    """The rivals of the second iteration are what the stock pipeline draws with the LoRA that was kept before it."""
    seen = []
    sample = script.sample_rivals

    def spy(models, batch, args, autocast):
        seen.append((batch["keys"], sample(models, batch, args, autocast)))
        return seen[-1][1]

    monkeypatch.setattr(script, "sample_rivals", spy)
    run = train(max_train_steps=4, replay_steps=2, reference="latest", seed=3, learning_rate=1e-2)
    keys, latents = seen[3]

    merged = merged_pipeline(sd, run.path / "replay" / "iteration-1.safetensors")
    merged.scheduler = DPMSolverMultistepScheduler.from_config(merged.scheduler.config)
    base = stock(StableDiffusionPipeline, sd, "dpmsolver")
    captions = [tiny.CAPTIONS[row] for _, row in keys]
    noise = script.keyed_noise("rival", 3, keys, (4, 8, 8))
    options = dict(num_inference_steps=3, height=64, width=64, output_type="latent")
    theirs = merged(captions, latents=noise.clone(), **options).images
    assert (latents - theirs).abs().max() < 1e-4
    assert (base(captions, latents=noise.clone(), **options).images - theirs).abs().max() > 1e-3


def merged_pipeline(model, entry):
    """The stock pipeline with a replay entry's adapters multiplied out into its weights by hand (alpha = rank)."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    adapters = load_file(entry)
    layers = {name.rsplit(".lora_", 1)[0] for name in adapters}
    assert len(layers) == 4 * 2 * 4, "four projections of two attentions in four transformer blocks"
    with torch.no_grad():
        for layer in layers:
            down, up = adapters[f"{layer}.lora_A.weight"], adapters[f"{layer}.lora_B.weight"]
            pipeline.unet.get_submodule(layer).weight += up @ down
    return pipeline


def test_reference_error_is_that_of_the_saved_weights(train, sd, monkeypatch):
    """e_w(ref) = e_w(policy) - gap_w of a logged update, computed again with the kept weights and no adapters."""
    batches = []
    loss = script.training_loss
    monkeypatch.setattr(script, "training_loss", lambda *a: batches.append(dict(a[2])) or loss(*a))
    run = train(max_train_steps=4, replay_steps=2, reference="latest", learning_rate=1e-2)
    logged, batch = run.metrics[3], batches[3]
    args, models = load(sd)
    models.denoiser = merged_pipeline(sd, run.path / "replay" / "iteration-1.safetensors").unet
    noise = script.keyed_noise("noise", 0, batch["keys"], (1, 4, 8, 8))
    generators = [script.keyed_generator("timestep", 0, *key) for key in batch["keys"]]
    timesteps = torch.stack([script.draw_timesteps(models, generator, 1) for generator in generators])
    for half in ("winner", "rival"):
        with torch.no_grad():
            draws = (batch[half], noise, timesteps, batch["condition"])
            error = script.denoising_errors(models.denoiser, models, *draws).mean()
        assert abs(logged[f"gap/{half}"]) > 1e-4
        assert error.item() == pytest.approx(logged[f"mse/policy_{half}"] - logged[f"gap/{half}"], abs=1e-6)
