"""Self-sampling, errors and training space of FLUX.2 [klein], against the stock pipeline."""

import functools
import re

import pytest
import tiny
import torch
from diffusers import DDPMScheduler, Flux2KleinPipeline
from helpers import flags

import train_sspo_flux2 as script


CAPTIONS = ["a red circle", "a blue square"]


@pytest.fixture
def load(flux2):
    """load(flag=value, ...) gives args and the tiny model's parts."""

    def load(dtype=torch.float32, **options):
        args = script.parse_args(flags(flux2, "unused", "unused", **options))
        return args, script.load_models(args, dtype)

    return load


@pytest.fixture
def pipeline(flux2):
    pipeline = Flux2KleinPipeline.from_pretrained(flux2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def conditions(models):
    return [
        script.collate_condition(script.encode_prompt(models, captions), "cpu")
        for captions in (CAPTIONS, [""] * len(CAPTIONS))
    ]


def sample(models, args, noise, **options):
    """What a run samples of CAPTIONS."""
    scheduler = script.rollout_scheduler(models, args)
    steps, guidance = args.rollout_steps, args.rollout_guidance_scale
    return script.self_sample(models.denoiser, scheduler, noise, *conditions(models), steps, guidance, **options)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def velocity(pipeline, noisy, timestep, embeds):
    """The stock transformer's answer, called as the pipeline calls it."""
    embeds, text_ids = pipeline.encode_prompt(CAPTIONS) if embeds is None else (embeds, None)
    latents, ids = pipeline._pack_latents(noisy), pipeline._prepare_latent_ids(noisy)
    answer = pipeline.transformer(
        hidden_states=latents,
        timestep=timestep / 1000,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=ids,
    ).sample
    return pipeline._unpack_latents_with_ids(answer, ids, *noisy.shape[2:])


@pytest.mark.parametrize("resolution", [64, 96])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rival_is_what_the_stock_pipeline_samples(load, pipeline, guidance, resolution):
    """At two sizes: the sampler's shift depends on the number of tokens."""
    args, models = load(rollout_guidance_scale=guidance, rollout_steps=6, resolution=resolution)
    noise = normal(len(CAPTIONS), *script.latent_shape(models, args))
    ours = sample(models, args, noise)
    theirs = pipeline(
        prompt=CAPTIONS,
        latents=noise.clone(),
        num_inference_steps=6,
        guidance_scale=guidance,
        height=resolution,
        width=resolution,
        output_type="latent",
    ).images
    mean, std = script.latent_statistics(models.vae)
    assert (pipeline._unpatchify_latents(ours * std + mean) - theirs).abs().max() < 1e-5
    assert (ours - noise).abs().max() > 0.1
    assert (ours[0] - sample(models, args, noise[:1].expand_as(noise))[1]).abs().max() > 1e-3, "captions matter"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_in_half_precision_rivals_are_the_stock_pipelines_to_the_bit(trains, flux2, monkeypatch, guidance):
    """Of LoRA in bf16, from the base in update 1 and then from the policy of the update before (see test_sampling)."""
    batches, drawn, loss = [], [], script.training_loss
    monkeypatch.setattr(script, "training_loss", lambda *a: batches.append(dict(a[2])) or loss(*a))
    train = dict(replay_steps=1, checkpointing_steps=1, max_train_steps=3, reference="latest", learning_rate=1e-2)
    run = trains["flux2"](mixed_precision="bf16", rollout_guidance_scale=guidance, **train)
    for step, batch in enumerate(batches):
        pipeline = Flux2KleinPipeline.from_pretrained(flux2, dtype=torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        if step:
            pipeline.load_lora_weights(run.path / f"checkpoint-{step}")
        noise = script.keyed_noise("rival", 0, batch["keys"], batch["winner"].shape[1:]).bfloat16()
        options = dict(num_inference_steps=3, guidance_scale=guidance, height=64, width=64, output_type="latent")
        options["max_sequence_length"] = tiny.PROMPT_TOKENS
        unpack = pipeline._unpack_latents_with_ids  # the last that is in training space
        pipeline._unpack_latents_with_ids = lambda *a, unpack=unpack: drawn.append(unpack(*a)) or drawn[-1]
        pipeline(prompt=[tiny.CAPTIONS[row] for _, row in batch["keys"]], latents=noise, **options)
        assert torch.equal(batch["rival"], drawn[-1].float())


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_rollout_strength_starts_at_a_step_of_the_sampler(load, pipeline, strength):
    """The winners, noised to the sigma of that step, and the steps from there: Euler's, written out."""
    args, models = load(rollout_steps=10, rollout_strength=strength)
    shape = (len(CAPTIONS), *script.latent_shape(models, args))
    winners, noise = normal(*shape, seed=1), normal(*shape, seed=2)
    ours = sample(models, args, noise, winners=winners, strength=strength)
    sampler = script.rollout_scheduler(models, args)
    sampler.set_timesteps(10)
    sigmas = sampler.sigmas[-int(10 * strength) - 1 :]
    latents = sigmas[0] * noise + (1 - sigmas[0]) * winners
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:]):
            timestep = (1000 * sigma).expand(len(latents))
            latents = latents + (following - sigma) * velocity(pipeline, latents, timestep, None)
    assert (ours - latents).abs().max() < 1e-5


def test_help_says_at_which_sigma_a_strength_starts(load):
    """Of the shipped model at 20 steps: 32 x 32 tokens at 512 x 512, 64 x 64 at 1024 x 1024."""
    told = " ".join(help_text().split())
    args, models = load()
    for side, sentence in (
        (32, "0.7 starts at sigma 0.94, 0.5 at 0.87, 0.3 at 0.74 and 0.2 at 0.63"),
        (64, "0.95, 0.90, 0.79 and 0.69"),
    ):
        assert sentence in told
        sampler = script.rollout_scheduler(models, args)
        sampler.tokens = side * side
        sampler.set_timesteps(20)
        sigmas = [round(sampler.sigmas[-int(20 * strength) - 1].item(), 2) for strength in (0.7, 0.5, 0.3, 0.2)]
        assert all(f"{sigma:.2f}" in sentence for sigma in sigmas)


def help_text():
    parser = script.OneLineParser("")
    script.add_shared_arguments(parser)
    script.add_pipeline_arguments(parser)
    return parser.format_help()


def noise_error_of_stable_diffusion():
    """The mean noise error of an ideal model of standard normal latents: alpha bar, over the schedule."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return scheduler.alphas_cumprod.mean()


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.8])
@pytest.mark.parametrize("draws", [1, 4])
def test_drawn_sigmas_and_the_beta_that_fits_them(load, shift, draws):
    """
    Their median is s / (1 + s), so that of (1 - sigma)^-2 is (1 + s)^2, by which --help divides 2000. Its other beta
    is 2000 times the mean noise error of an ideal model of Gaussian data on Stable Diffusion's schedule over the mean
    velocity error on these sigmas. Of several, one comes from each of as many equally likely parts, and all together
    are distributed as one is.
    """
    _, models = load(timestep_shift=shift)
    generators = (script.keyed_generator("timestep", 0, i) for i in range(20_000 // draws))
    sigmas = torch.stack([script.draw_timesteps(models, generator, draws) for generator in generators]) / 1000
    assert 0 < sigmas.min() and sigmas.max() < 1
    assert sigmas.median().item() == pytest.approx(shift / (1 + shift), abs=0.02)
    beta = 2000 / (1 - sigmas).pow(-2).median().item()
    assert beta == pytest.approx(2000 / (1 + shift) ** 2, rel=0.05)
    told = " ".join(help_text().split())
    assert re.search(rf"\b{round(2000 / (1 + shift) ** 2)} at (s = )?{shift:g}\b", told)
    of_means = 2000 * noise_error_of_stable_diffusion() * ((1 - sigmas) ** 2 + sigmas**2).reciprocal().mean() ** -1
    assert re.search(rf"\b{10 * round(of_means.item() / 10)} at (s = )?{shift:g}\b", told), of_means
    odds = (sigmas / (1 - sigmas) / shift).log()
    assert odds.std().item() == pytest.approx(1, abs=0.02), "the sigmoid of a normal number, shifted"
    if draws == 4:
        lower, upper = torch.tensor([-9.0, -0.6745, 0, 0.6745]), torch.tensor([-0.6745, 0, 0.6745, 9])
        assert ((odds > lower - 1e-3) & (odds < upper + 1e-3)).all(), "the normal distribution's quarters"


def test_errors_are_of_the_velocity_means_over_all_but_the_batch(load, pipeline):
    args, models = load()
    shape = script.latent_shape(models, args)
    latents, noise = normal(2, *shape, seed=1), normal(2, 3, *shape, seed=2)
    timesteps = torch.tensor([[100.5, 500.0, 900.25], [3.0, 700.0, 999.0]])
    condition = conditions(models)[0]
    with torch.no_grad():
        ours = script.denoising_errors(models.denoiser, models, latents, noise, timesteps, condition)
        for draw in range(3):
            sigma = timesteps[:, draw].view(-1, 1, 1, 1) / 1000
            noisy = (1 - sigma) * latents + sigma * noise[:, draw]
            wrong = velocity(pipeline, noisy, timesteps[:, draw], None) - (noise[:, draw] - latents)
            torch.testing.assert_close(ours[:, draw], wrong.pow(2).mean(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    assert ours.shape == (2, 3)


def test_training_space_is_the_stock_pipelines(load, pipeline):
    """The posterior's mode in patches, by the VAE's own statistics; decoding leads back to the stock pictures."""
    args, models = load()
    pixels = normal(2, 3, 64, 64).clamp(-1, 1)
    mean, std = script.encode_image(models, pixels)
    with torch.no_grad():
        theirs = [pipeline._encode_vae_image(one, None) for one in pixels.split(1)]  # as the VAE's slices are
    assert torch.equal(mean, torch.cat(theirs))
    assert not std.any() and mean.shape[1:] == script.latent_shape(models, args)
    # The stock pipeline without a single step of denoising: noise, decoded.
    draw = functools.partial(pipeline, prompt=CAPTIONS[:1], height=64, width=64, guidance_scale=1.0)
    pipeline.transformer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states),)
    theirs = draw(latents=mean[:1].clone(), num_inference_steps=1).images[0]
    assert list(script.decode_latents(models, mean[:1]).get_flattened_data()) == list(theirs.get_flattened_data())


def test_statistics_stay_in_fp32_where_the_rest_is_in_half(load):
    _, models = load(dtype=torch.bfloat16)
    _, exact = load()
    assert models.text_encoder.dtype == models.denoiser.dtype == torch.bfloat16
    assert load(dtype=torch.bfloat16, train_mode="full")[1].denoiser.dtype == torch.float32, (
        "or small updates are lost"
    )
    for ours, theirs in zip(script.latent_statistics(models.vae), script.latent_statistics(exact.vae)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options, tokens", [({}, 512), (dict(max_sequence_length=100), 100)])
def test_prompts_are_the_stock_ones_without_the_last_layers(load, pipeline, options, tokens):
    _, models = load(**options)
    assert len(pipeline.text_encoder.model.layers) == 30 and len(models.text_encoder.layers) == 28
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt([*CAPTIONS, ""], max_sequence_length=tokens)
    ours = torch.stack([row["prompt_embeds"] for row in script.encode_prompt(models, [*CAPTIONS, ""])])
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == tokens
