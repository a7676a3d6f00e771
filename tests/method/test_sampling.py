"""Self-sampling, and the reference of a run, against the stock pipelines."""

import sys

import pytest
import tiny
import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from helpers import SCRIPTS
from safetensors.torch import load_file


CAPTIONS = ["a red circle", "a blue square", "a green circle"]
SCHEDULERS = {"dpmsolver": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}
# The schedule that motion adapters are trained with; the image model's own is another.
LINEAR = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False)
# Models, and the pipelines that sample from noise and from given latents.
STOCK = {
    "sd": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline),
    "sd_v": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline),
    "sdxl": (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
    "sdxl_words": (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
    "video": (AnimateDiffPipeline, AnimateDiffVideoToVideoPipeline),
}
# What Stable Diffusion XL is told of the pictures here: a crop, 57 pixels from the top, of a large one.
TOLD = dict(original_size=(833, 300), crops_coords_top_left=(57, 0), target_size=(64, 64))
GEOMETRY = torch.tensor([833, 300, 57, 0, 64, 64])


@pytest.fixture(params=STOCK)
def model(request):
    """(script, flags that name its model, its name in STOCK), for every tiny model in turn."""
    script = SCRIPTS[request.param.split("_")[0]]
    named = {} if request.param in SCRIPTS else dict(model=request.getfixturevalue(request.param))
    return script, named, request.param


def stock(name, args, from_winners=False, adapter=None, dtype=torch.float32):
    """The stock pipeline, with the sampler that the flags name."""
    motion = {}
    if name == "video":
        adapter = MotionAdapter.from_pretrained(adapter or args.motion_adapter_name_or_path, dtype=dtype)
        motion = dict(motion_adapter=adapter)
    pipeline = STOCK[name][from_winners].from_pretrained(args.pretrained_model_name_or_path, dtype=dtype, **motion)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    schedule = LINEAR if name == "video" else pipeline.scheduler.config
    pipeline.scheduler = SCHEDULERS[args.rollout_scheduler].from_config(schedule, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, name, args, captions=CAPTIONS, told=TOLD, **options):
    """The latents that the stock pipeline draws."""
    if name.startswith("sdxl"):
        options |= told
    options |= dict(num_inference_steps=args.rollout_steps, guidance_scale=args.rollout_guidance_scale)
    return pipeline(prompt=captions, output_type="latent", **options)[0]


def size(script, name, args):
    """The shape of the pictures or clips, as the stock pipelines take it."""
    height, width = script.picture_size(args)
    return dict(height=height, width=width, **(dict(num_frames=args.num_frames) if name == "video" else {}))


def rivals(script, models, args, noise, winners=None, geometry=GEOMETRY):
    """Rivals of CAPTIONS as a run samples them."""
    conditions = [
        script.collate_condition(
            [{"geometry": geometry, **row} for row in script.encode_prompt(models, captions)], "cpu"
        )
        for captions in (CAPTIONS, [""] * len(CAPTIONS))
    ]
    scheduler, scale = script.rollout_scheduler(models, args), args.rollout_guidance_scale
    options = (args.rollout_steps, scale, winners, args.rollout_strength)
    return script.self_sample(models.denoiser, scheduler, noise, *conditions, *options)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_rival_is_what_the_stock_pipeline_samples(model, load, scheduler, guidance):
    script, named, name = model
    options = dict(rollout_scheduler=scheduler, rollout_guidance_scale=guidance, rollout_steps=8)
    args, models = load(script, **named, **options)
    shape = script.latent_shape(models, args)
    noise = torch.randn(len(CAPTIONS), *shape, generator=torch.Generator().manual_seed(0))
    ours = rivals(script, models, args, noise)
    pipeline = stock(name, args)
    theirs = drawn(pipeline, name, args, latents=noise.clone(), **size(script, name, args))
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - noise).abs().max() > 0.1
    if name.startswith("sdxl"):
        whole = rivals(script, models, args, noise, geometry=torch.tensor([64, 64, 0, 0, 64, 64]))
        assert (ours - whole).abs().max() > 1e-2, "the crop must matter"
    if name == "video":
        assert (ours - rivals(script, models, args, noise.flip(2)).flip(2)).abs().max() > 1e-3, "and the frames' order"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rollout_strength_is_image_to_image_and_video_to_video(model, load, scheduler):
    script, named, name = model
    options = dict(rollout_scheduler=scheduler, rollout_strength=0.6, rollout_guidance_scale=7.5, rollout_steps=8)
    args, models = load(script, **named, **options)
    shape = len(CAPTIONS), *script.latent_shape(models, args)
    winners = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours = rivals(script, models, args, noise, winners)
    pipeline, options = stock(name, args, from_winners=True), dict(strength=0.6)
    if name == "video":  # it takes latents that are noised already
        pipeline.scheduler.set_timesteps(8)
        timesteps, _ = pipeline.get_timesteps(8, pipeline.scheduler.timesteps, 0.6, "cpu")
        height, width = script.picture_size(args)
        noised = pipeline.scheduler.add_noise(winners, noise, timesteps[:1])
        options |= dict(latents=noised, height=height, width=width)
    else:
        options |= dict(image=winners, generator=torch.Generator().manual_seed(2))
    assert (ours - drawn(pipeline, name, args, **options)).abs().max() < 1e-4
    assert (ours - rivals(script, models, args, noise, winners.flip(0))).abs().max() > 0.1, "the winners must matter"


def put_in(unet, entry, mode, kind):
    """Puts a replay entry's weights into a stock denoiser; adapters are multiplied out by hand (alpha = rank)."""
    ours = [name for name in dict(unet.named_parameters()) if kind != "video" or "motion_modules" in name]
    if mode == "full":
        assert set(entry) == set(ours), "what is trained, and nothing else"
        unet.load_state_dict({**unet.state_dict(), **entry})
        return
    projections = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
    layers = {name.removesuffix(".weight") for name in ours if name.endswith(projections)}
    assert {name.rsplit(".lora_", 1)[0] for name in entry} == layers, "every attention layer"
    with torch.no_grad():
        for layer in layers:
            unet.get_submodule(layer).weight += entry[f"{layer}.lora_B.weight"] @ entry[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_reference_of_a_run_is_the_kept_checkpoint(trains, load, monkeypatch, kind, mode):
    """
    The rivals of the second iteration, and the reference's errors, e(policy) - gap, are those of the stock pipeline
    with the weights that the bank kept at the end of the first.
    """
    script, batches = SCRIPTS[kind], []
    loss = script.training_loss
    monkeypatch.setattr(script, "training_loss", lambda *a: batches.append(dict(a[2])) or loss(*a))
    options = dict(train_mode=mode, reference="latest", learning_rate=1e-2, seed=4, rollout_guidance_scale=3.0)
    run = trains[kind](replay_steps=2, max_train_steps=4, **options)
    logged, batch = run.metrics[3], batches[3]
    args, models = load(script, rollout_steps=3, **options)
    pipeline = stock(kind, args)
    put_in(pipeline.unet, load_file(run.path / "replay" / "iteration-1.safetensors"), mode, kind)
    models.denoiser = pipeline.unet

    captions = [tiny.CAPTIONS[row] for _, row in batch["keys"]]
    shape = batch["winner"].shape[1:]
    noise = script.keyed_noise("rival", 4, batch["keys"], shape)
    told = dict(original_size=(64, 72), crops_coords_top_left=(0, 4), target_size=(64, 64))
    options = dict(captions=captions, told=told, **size(script, kind, args))
    theirs = drawn(pipeline, kind, args, latents=noise.clone(), **options)
    torch.testing.assert_close(batch["rival"], theirs, rtol=1e-3, atol=1e-4)
    base = drawn(stock(kind, args), kind, args, latents=noise.clone(), **options)
    assert (base - theirs).abs().max() > 1e-3

    noise = script.keyed_noise("noise", 4, batch["keys"], (1, *shape))
    generators = [script.keyed_generator("timestep", 4, *key) for key in batch["keys"]]
    timesteps = torch.stack([script.draw_timesteps(models, generator, 1) for generator in generators])
    for half in ("winner", "rival"):
        with torch.no_grad():
            draws = (batch[half], noise, timesteps, batch["condition"])
            error = script.denoising_errors(models.denoiser, models, *draws).mean()
        assert abs(logged[f"gap/{half}"]) > 1e-5
        assert error.item() == pytest.approx(logged[f"mse/policy_{half}"] - logged[f"gap/{half}"], abs=1e-6)


def test_ddim_never_clips_latents(model, load):
    """DDIM's own default does, and configurations that another class has saved say nothing of it."""
    script, named, _ = model
    _, models = load(script)
    models.noise_scheduler.register_to_config(clip_sample=True)
    sampler = script.rollout_scheduler(models, load(script, rollout_scheduler="ddim")[0])
    assert isinstance(sampler, DDIMScheduler) and not sampler.config.clip_sample


# AnimateDiff's video-to-video pipeline adds no noise to the latents that it takes.
@pytest.mark.parametrize("kind, strength", [("sd", 1.0), ("sd", 0.7), ("sdxl", 1.0), ("sdxl", 0.7), ("video", 1.0)])
def test_in_half_precision_rivals_are_the_stock_pipelines_to_the_bit(trains, load, monkeypatch, kind, strength):
    """
    Of LoRA in bf16: the stock pipeline in bf16, without autocast, that has loaded the weights which the iteration's
    reference was saved with. Update 1 samples from the base, each later one from the policy of the update before.
    """
    script, batches = SCRIPTS[kind], []
    loss = script.training_loss
    monkeypatch.setattr(script, "training_loss", lambda *a: batches.append(dict(a[2])) or loss(*a))
    options = dict(rollout_guidance_scale=3.0, rollout_steps=4, rollout_strength=strength)
    train = dict(replay_steps=1, checkpointing_steps=1, max_train_steps=3, reference="latest", learning_rate=1e-2)
    run = trains[kind](mixed_precision="bf16", **train, **options)
    args, models = load(script, **options)
    told = dict(original_size=(64, 72), crops_coords_top_left=(0, 4), target_size=(64, 64))  # bf16 has these numbers
    for step, batch in enumerate(batches):
        pipeline = stock(kind, args, from_winners=strength < 1, dtype=torch.bfloat16)
        if step:
            pipeline.load_lora_weights(run.path / f"checkpoint-{step}")
        captions = [tiny.CAPTIONS[row] for _, row in batch["keys"]]
        noise = script.keyed_noise("rival", 0, batch["keys"], batch["winner"].shape[1:]).bfloat16()
        if strength == 1:
            given = dict(latents=noise.clone(), **size(script, kind, args))
        else:
            given = dict(image=batch["winner"].bfloat16(), strength=strength)
            module = sys.modules[type(pipeline).__module__]
            monkeypatch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise)
        theirs = drawn(pipeline, kind, args, captions, told, **given)
        assert theirs.dtype == torch.bfloat16 and batch["rival"].dtype == torch.float32
        assert torch.equal(batch["rival"], theirs.float())
    assert run.column("reference/index") == [0, 1, 2]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_long_caption_is_cut_as_in_the_stock_pipeline(load, kind):
    args, models = load(SCRIPTS[kind])
    (row,) = SCRIPTS[kind].encode_prompt(models, ["a red circle " * 40])
    theirs = stock(kind, args).encode_prompt(
        "a red circle " * 40, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(row["prompt_embeds"][None], theirs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, name", [("sd", "sd"), ("sdxl", "sdxl"), ("sdxl", "sdxl_words"), ("video", "video")])
def test_dropped_caption_is_what_guidance_runs_without(request, trains, load, monkeypatch, kind, name):
    """
    For the rival, the reference and the policy alike. Stable Diffusion XL takes zeros, or the embedding of "" where
    its configuration says so.
    """
    script, seen = SCRIPTS[kind], []
    named = {} if name == kind else dict(model=request.getfixturevalue(name))
    predict = script.predict
    monkeypatch.setattr(script, "predict", lambda *a: seen.append(a[3]) or predict(*a))
    options = dict(proportion_empty_prompts=0.5, rollout_guidance_scale=2.0, rollout_steps=1)
    trains[kind](max_train_steps=8, **named, **options)
    args, _ = load(script, **named)
    embeds = stock(name, args).encode_prompt(
        "", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    words, pooled = embeds[0], embeds[2] if kind == "sdxl" else None
    if name == "sdxl":
        words, pooled = torch.zeros_like(words), torch.zeros_like(pooled)
    expected = {"prompt_embeds": words} if pooled is None else {"prompt_embeds": words, "pooled_prompt_embeds": pooled}
    dropped = []
    for rollout, reference, policy in zip(seen[0::3], seen[1::3], seen[2::3]):
        for key, nothing in expected.items():
            empty, captions = rollout[key].chunk(2)
            torch.testing.assert_close(empty, nothing.expand_as(empty), rtol=0, atol=1e-5)
            assert torch.equal(reference[key], torch.cat([captions, captions]))
            assert torch.equal(policy[key], reference[key])
            dropped.append([torch.equal(caption, empty[0]) for caption in captions])
    if kind == "sdxl":
        assert dropped[0::2] == dropped[1::2], "both embeddings go, or none"
    assert 2 * len(expected) < sum(map(sum, dropped)) < 14 * len(expected)
