"""Self-sampling, errors, prompts and training space of Wan, against the stock pipelines; 2.1 and 2.2 5B."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, WanPipeline, WanVideoToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_video2video

import train_sspo_wan as script


CAPTIONS = ["a red circle", "a blue square, moving"]


@pytest.fixture(scope="module")
def euler(tmp_path_factory):
    """A tiny Wan 2.1 whose model_index names the other scheduler, as some revisions on the hub do."""
    return tiny.wan(tmp_path_factory.mktemp("euler"), scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0))


@pytest.fixture(params=["wan", "wan_large", "euler"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def stock(model):
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def size_of(model):
    """A clip that is not square."""
    side = 64 if "large" in model else 32
    return dict(height=side, width=2 * side, num_frames=9)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditions(models, negative=""):
    return [
        script.collate_condition(script.encode_prompt(models, captions), "cpu")
        for captions in (CAPTIONS, [negative] * len(CAPTIONS))
    ]


def sample(models, args, noise, **options):
    """What a run samples of CAPTIONS."""
    scheduler = script.rollout_scheduler(models, args)
    given = (args.rollout_steps, args.rollout_guidance_scale)
    return script.self_sample(
        models.denoiser, scheduler, noise, *conditions(models, args.negative_prompt or ""), *given, **options
    )


def test_rival_is_what_the_stock_pipeline_samples(load, model, stock):
    for guidance, negative in ((1.0, ""), (5.0, ""), (5.0, "blurred, still")):
        named = dict(rollout_guidance_scale=guidance, rollout_steps=6, negative_prompt=negative)
        args, models = load(script, model=model, **named, **size_of(model))
        noise = normal(len(CAPTIONS), *script.latent_shape(models, args))
        ours = sample(models, args, noise)
        size = dict(size_of(model), num_inference_steps=6, guidance_scale=guidance, output_type="latent")
        given = dict(prompt=CAPTIONS, negative_prompt=[negative] * len(CAPTIONS) if negative else None)
        theirs = stock(**given, latents=noise.clone(), **size).frames
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours - noise).abs().max() > 0.1
        assert (ours[0] - sample(models, args, noise[:1].expand_as(noise))[1]).abs().max() > 1e-4, "captions matter"


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_in_half_precision_rivals_are_the_stock_pipelines(load, model, tmp_path, guidance):
    """Of LoRA in bf16, without autocast. Guidance and the sampler's steps are in fp32 here: to bf16's rounding."""
    named = dict(rollout_guidance_scale=guidance, rollout_steps=6)
    args, models = load(script, torch.bfloat16, model=model, **named, **size_of(model))
    script.prepare_denoiser(models, args, "cpu")
    for seed, (name, weight) in enumerate(models.denoiser.named_parameters()):
        if "lora_B" in name:
            weight.data = 0.3 * normal(*weight.shape, seed=seed)
    script.save_denoiser(models.denoiser, args, tmp_path)
    noise = normal(len(CAPTIONS), *script.latent_shape(models, args))
    with script.stock_precision(models, None):
        ours = sample(models, args, noise)
    assert ours.dtype == torch.float32
    pipeline = WanPipeline.from_pretrained(model, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    size = dict(size_of(model), num_inference_steps=6, guidance_scale=guidance, output_type="latent")
    base = pipeline(prompt=CAPTIONS, latents=noise.clone(), **size).frames
    pipeline.load_lora_weights(tmp_path)
    theirs = pipeline(prompt=CAPTIONS, latents=noise.clone(), **size).frames
    assert (ours - theirs).abs().max() < 0.1 < (base - theirs).abs().max() / 4, "latents go up to 4.5"


def test_rollout_strength_is_that_of_the_stock_video_to_video(load, model, stock, monkeypatch):
    """From the same clips: so their latents are the stock pipeline's too."""
    args, models = load(script, model=model, rollout_steps=10, rollout_guidance_scale=5, **size_of(model))
    pixels = torch.rand(2, args.num_frames, 3, args.height, args.width, generator=torch.Generator().manual_seed(1))
    winners, std = script.encode_image(models, 2 * pixels - 1)
    assert not std.any() and winners.shape[1:] == script.latent_shape(models, args)
    noise = normal(*winners.shape)
    # This pipeline calls ftfy without a look whether it is there, and draws its noise itself.
    monkeypatch.setattr(pipeline_wan_video2video, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    monkeypatch.setattr(pipeline_wan_video2video, "randn_tensor", lambda *_, **__: noise.clone())
    parts = {name: part for name, part in stock.components.items() if name != "transformer_2"}
    pipeline = WanVideoToVideoPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    size = dict(height=args.height, width=args.width, num_inference_steps=10, guidance_scale=5.0)
    for strength in (0.5, 0.8):
        ours = sample(models, args, noise, winners=winners, strength=strength)
        theirs = pipeline(video=pixels, prompt=CAPTIONS, output_type="latent", strength=strength, **size).frames
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours - winners).abs().max() > 0.1


def test_either_sampler_has_the_flow_and_the_shift(load, model):
    """Whichever the model names. diffusers' from_config alone gives epsilon without flow, or a shift of 1."""
    args, models = load(script, model=model, **size_of(model))
    own = 4.0 if "euler" in model else 5.0 if "large" in model else 3.0
    for asked in ("unipc", "euler"):
        for args.flow_shift, shift in ((None, own), (7.0, 7.0)):
            args.rollout_scheduler = asked
            sampler = script.rollout_scheduler(models, args)
            sampler.set_timesteps(4)
            if asked == "unipc":
                assert (sampler.config.prediction_type, sampler.predict_x0) == ("flow_prediction", True)
                u = torch.linspace(1, 1e-3, 5)[:-1]
            else:  # as the stock class: its ends are shifted twice
                u = torch.linspace(1, shift * 1e-3 / (1 + (shift - 1) * 1e-3), 4)
            sigmas = shift * u / (1 + (shift - 1) * u)
            torch.testing.assert_close(sampler.sigmas, torch.cat([sigmas, torch.zeros(1)]), rtol=1e-5, atol=1e-5)
            rounding = 1.01 if asked == "unipc" else 1e-3  # UniPC's are whole numbers, rounded down
            assert (sampler.timesteps - 1000 * sigmas).abs().max() < rounding


@pytest.mark.parametrize(
    "scheduler, shift, told",
    [
        ("unipc", 3, "0.7 starts at sigma 0.88, 0.5 at 0.75, 0.3 at 0.56 and 0.2 at 0.43"),
        ("unipc", 5, "at 0.92, 0.83, 0.68 and 0.56 with one of 5"),
    ],
)
def test_help_says_at_which_sigma_a_strength_starts(load, scheduler, shift, told):
    args, models = load(script, rollout_scheduler=scheduler, flow_shift=shift)
    assert told in " ".join(help_text().split())
    sampler = script.rollout_scheduler(models, args)
    sampler.set_timesteps(20)
    sigmas = [f"{sampler.sigmas[-int(20 * strength) - 1].item():.2f}" for strength in (0.7, 0.5, 0.3, 0.2)]
    assert all(sigma in told for sigma in sigmas), sigmas


def help_text():
    parser = script.OneLineParser("")
    script.add_shared_arguments(parser)
    script.add_pipeline_arguments(parser)
    return parser.format_help()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_help_names_the_beta_that_fits_the_drawn_sigmas(load, shift):
    _, models = load(script, timestep_shift=shift)
    generators = (script.keyed_generator("timestep", 0, i) for i in range(5_000))
    sigmas = torch.cat([script.draw_timesteps(models, generator, 2) for generator in generators]) / 1000
    assert 2000 / (1 - sigmas).pow(-2).median().item() == pytest.approx(2000 / (1 + shift) ** 2, rel=0.05)
    told = " ".join(help_text().split())
    assert re.search(rf"\b{round(2000 / (1 + shift) ** 2)} at (s = )?{shift:g}\b", told)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's
    noise_error = scheduler.alphas_cumprod.mean()  # of an ideal model of standard normal latents
    of_means = 2000 * noise_error * ((1 - sigmas) ** 2 + sigmas**2).reciprocal().mean() ** -1
    assert re.search(rf"\b{10 * round(of_means.item() / 10)} at (s = )?{shift:g}\b", told), of_means


def test_errors_are_of_the_velocity_means_over_all_but_the_batch(load, model, stock):
    """The stock transformer's, called as the pipeline calls it: for 2.2 5B with a timestep a token."""
    args, models = load(script, model=model, **size_of(model))
    shape = script.latent_shape(models, args)
    embeds, _ = stock.encode_prompt(CAPTIONS, max_sequence_length=512)
    latents, noise = normal(2, *shape, seed=1), normal(2, 3, *shape, seed=2)
    timesteps = torch.tensor([[100.5, 500.0, 900.25], [3.0, 700.0, 999.0]])
    with torch.no_grad():
        ours = script.denoising_errors(models.denoiser, models, latents, noise, timesteps, conditions(models)[0])
        for draw in range(3):
            sigma = timesteps[:, draw].view(-1, 1, 1, 1, 1) / 1000
            noisy, t = (1 - sigma) * latents + sigma * noise[:, draw], timesteps[:, draw]
            if stock.config.expand_timesteps:
                t = t[:, None].expand(-1, shape[1] * shape[2] * shape[3] // 4)
            answer = stock.transformer(hidden_states=noisy, timestep=t, encoder_hidden_states=embeds).sample
            wrong = answer - (noise[:, draw] - latents)
            torch.testing.assert_close(ours[:, draw], wrong.pow(2).mean(dim=(1, 2, 3, 4)), rtol=1e-5, atol=0)
    assert ours.shape == (2, 3)


def test_prompts_are_trimmed_in_the_cache_and_the_stock_ones_in_a_batch(load, wan):
    """A caption keeps its own tokens; zeros behind them are what the pipeline makes too."""
    _, models = load(script)
    captions = [*CAPTIONS, "", "  a   red &amp; circle "]
    rows = script.encode_prompt(models, captions)
    lengths = [len(models.tokenizer(caption).input_ids) for caption in (*captions[:3], "a red & circle")]
    assert [tuple(row["prompt_embeds"].shape) for row in rows] == [(length, 16) for length in lengths]
    assert lengths[2] == 1 and all(row["prompt_embeds"].untyped_storage().nbytes() < 2000 for row in rows)
    with torch.no_grad():
        theirs, _ = WanPipeline.from_pretrained(wan).encode_prompt(captions, max_sequence_length=512)
    assert torch.equal(script.collate_condition(rows, "cpu")["prompt_embeds"], theirs)
    (long,) = script.encode_prompt(models, ["abc " * 400])
    assert len(long["prompt_embeds"]) == 512


def test_a_clip_is_decoded_as_by_the_stock_pipeline(load, model, stock):
    """A batch is encoded clip by clip."""
    args, models = load(script, model=model, **size_of(model))
    pixels, seen = normal(2, args.num_frames, 3, args.height, args.width).clamp(-1, 1), []
    models.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    latents, _ = script.encode_image(models, pixels)
    assert set(seen) == {1}
    ours = script.decode_latents(models, latents[:1])
    stock.transformer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states),)
    stock.scheduler = FlowMatchEulerDiscreteScheduler()  # a step of a velocity of 0 leaves the latents as they are
    size = dict(size_of(model), num_inference_steps=1, guidance_scale=1.0, output_type="np")
    theirs = stock(prompt=CAPTIONS[:1], latents=latents[:1].clone(), **size).frames[0]
    ours = np.stack([np.asarray(frame) for frame in ours])
    assert ours.shape == theirs.shape == (args.num_frames, args.height, args.width, 3)
    assert np.abs(ours - 255 * theirs).max() < 0.6, "but for the rounding to whole numbers"


@pytest.mark.parametrize("kind", ["wan", "wan_large"])
def test_a_large_clip_is_decoded_in_tiles(load, request, kind):
    """
    Far from a tile's edges the picture of the whole decoder, but for its attention, which here adds nothing: a tile
    does not see the others. Winners are encoded whole, and small clips decoded so.
    """
    _, models = load(script, model=request.getfixturevalue(kind))
    scale, tiles = models.vae.config.scale_factor_spatial, []
    latents = normal(1, models.vae.config.z_dim, 1, 512 // scale, 832 // scale)
    mean, std = script.latent_statistics(models.vae)
    for layer in models.vae.decoder.mid_block.attentions:
        layer.proj.weight.zero_(), layer.proj.bias.zero_()
    with torch.no_grad():
        whole = models.vae.decode(latents * std + mean).sample
    models.vae.decoder.register_forward_pre_hook(lambda _, inputs: tiles.append(inputs[0].shape[-2:]))
    (ours,) = script.decode_latents(models, latents)
    assert ours.size == (832, 512) and len(tiles) > 4
    assert max(scale * side for tile in tiles for side in tile) <= 256 and not models.vae.use_tiling
    ours = torch.from_numpy(np.array(ours)).permute(2, 0, 1) / 127.5 - 1
    off = (ours - whole[0, :, 0]).abs()[:, :48, :48].max()
    assert off < 0.01 < 0.05 < whole[..., :48, :48].std()
    tiles.clear()
    script.decode_latents(models, latents[..., :4, :4])
    assert len(tiles) == 1


def test_the_vae_stays_in_fp32_where_the_rest_is_in_half(load):
    _, models = load(script, dtype=torch.bfloat16)
    assert models.text_encoder.dtype == models.denoiser.dtype == torch.bfloat16
    assert models.vae.dtype == torch.float32
    assert load(script, dtype=torch.bfloat16, train_mode="full")[1].denoiser.dtype == torch.float32
