"""train_sspo_sdxl.py: what Stable Diffusion XL changes, against the stock pipelines, and whole runs."""

import ast
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, flags
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import LAYOUT, assert_same_but_for_rounding

import train_sspo_sdxl as script


CAPTIONS = ["a red circle", "a blue square", "a green circle"]
GEOMETRY = {"original_size": (833, 300), "crop_top_left": (57, 0), "target_size": (64, 64)}
PLACE = {"original_size": (833, 300), "crops_coords_top_left": (57, 0), "target_size": (64, 64)}
SCHEDULERS = {"dpmsolver": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """A tiny SDXL pipeline; like the real one it takes zeros where there is no caption."""
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sdxl_words(tmp_path_factory):
    """A tiny SDXL pipeline that takes the embedding of "" where there is no caption."""
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("sdxl-words"), force_zeros=False)


@pytest.fixture
def train_xl(train, sdxl):
    """train_xl(name, flag=value, ...) runs train_sspo_sdxl.py's main in this process and returns the Run."""
    return lambda name="run", **options: train(name, **{"script": script, "model": sdxl, **options})


def load(model, dtype=torch.float32, **options):
    args = script.parse_args(flags(model, "unused", "unused", rollout_steps=8, **options))
    return args, script.load_models(args, dtype)


def stock(kind, model, scheduler="dpmsolver"):
    pipeline = kind.from_pretrained(model)
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_weights(model, directory, changes=None):
    """A copy of a pipeline's configurations, with changes: {file: {key: value}}."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, values in (changes or {}).items():
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return directory


# The seam against the stock pipelines


def rivals(args, models, noise, winners=None, geometry=GEOMETRY):
    """Rivals of CAPTIONS as a run samples them."""
    geometries = [geometry] * len(CAPTIONS)
    return script.self_sample(
        models.denoiser,
        script.rollout_scheduler(models, args),
        noise,
        script.collate_condition(script.encode_prompt(models, CAPTIONS), geometries, "cpu"),
        script.collate_condition(script.encode_prompt(models, [""] * len(CAPTIONS)), geometries, "cpu"),
        args.rollout_steps,
        args.rollout_guidance_scale,
        winners,
        args.rollout_strength,
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("fixture", ["sdxl", "sdxl_words"])
def test_rival_is_what_the_stock_pipeline_samples(request, fixture, scheduler):
    """With and without force_zeros_for_empty_prompt, told of a crop, at the default guidance."""
    model = request.getfixturevalue(fixture)
    args, models = load(model, rollout_scheduler=scheduler)
    noise = torch.randn(len(CAPTIONS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = rivals(args, models, noise)
    options = dict(num_inference_steps=8, guidance_scale=5.0, height=64, width=64, output_type="latent")
    theirs = stock(StableDiffusionXLPipeline, model, scheduler)(CAPTIONS, latents=noise.clone(), **PLACE, **options)
    assert (ours - theirs.images).abs().max() < 1e-4
    elsewhere = rivals(args, models, noise, geometry=script.whole_picture(args))
    assert (ours - elsewhere).abs().max() > 1e-2, "the crop must matter"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rollout_strength_is_image_to_image(sdxl, scheduler):
    args, models = load(sdxl, rollout_scheduler=scheduler, rollout_strength=0.6)
    winners = torch.randn(len(CAPTIONS), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(winners.shape, generator=torch.Generator().manual_seed(2))
    ours = rivals(args, models, noise, winners)
    theirs = stock(StableDiffusionXLImg2ImgPipeline, sdxl, scheduler)(
        CAPTIONS,
        image=winners,
        strength=0.6,
        num_inference_steps=8,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
        **PLACE,
    ).images
    assert (ours - theirs).abs().max() < 1e-4


def test_latents_with_statistics_of_their_own(sdxl, tmp_path):
    """A VAE that has latents_mean and latents_std is encoded and decoded as the stock pipelines do."""
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(sdxl)
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 2.0, 1.0, 0.8])
    pipeline.save_pretrained(tmp_path / "model")
    _, models = load(tmp_path / "model")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = script.encode_image(models, pixels)
    theirs = pipeline.prepare_latents(
        pixels, None, 1, 1, torch.float32, "cpu", torch.Generator().manual_seed(3), False
    )
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-4, atol=1e-5)
    plain = load(sdxl)[1]
    assert (script.encode_image(plain, pixels)[0] - mean).abs().max() > 0.01
    latents = script.decode_latents(models, mean)
    decoded = pipeline.vae.decode(
        mean * torch.tensor([0.5, 2.0, 1.0, 0.8]).view(1, 4, 1, 1) / 0.13025
        + torch.tensor([0.1, -0.2, 0.3, 0.4]).view(1, 4, 1, 1)
    ).sample
    assert tiny.difference(latents, pipeline.image_processor.postprocess(decoded.detach())[0]) <= 1


def test_vae_is_fp32_unless_a_mended_one_is_named(sdxl):
    """The stock VAE overflows in half precision."""
    _, models = load(sdxl, torch.bfloat16)
    assert (models.vae.dtype, models.text_encoder_2.dtype, models.denoiser.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    _, models = load(sdxl, torch.bfloat16, pretrained_vae_model_name_or_path=Path(sdxl, "vae"))
    assert models.vae.dtype == torch.bfloat16


def test_defaults_are_those_of_sdxl():
    args = script.parse_args(["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"])
    assert (args.resolution, args.rollout_guidance_scale) == (1024, 5.0)


# Captions that are dropped


@pytest.mark.parametrize("fixture", ["sdxl", "sdxl_words"])
def test_dropped_caption_is_what_guidance_runs_without(request, train_xl, monkeypatch, fixture):
    """Zeros, or the embedding of "" for a model that takes it: for the rival, the reference and the policy alike."""
    model, seen, predict = request.getfixturevalue(fixture), [], script.predict
    monkeypatch.setattr(script, "predict", lambda *a: seen.append(a[3]) or predict(*a))
    train_xl(model=model, proportion_empty_prompts=0.5, max_train_steps=6, rollout_steps=1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    words, _, pooled, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    if fixture == "sdxl":
        words, pooled = torch.zeros_like(words), torch.zeros_like(pooled)
    dropped = []
    for rollout, reference, policy in zip(seen[0::3], seen[1::3], seen[2::3]):
        for name, expected in (("prompt_embeds", words), ("pooled_prompt_embeds", pooled)):
            empty, captions = rollout[name].chunk(2)
            torch.testing.assert_close(empty, expected.expand_as(empty), rtol=0, atol=1e-5)
            assert torch.equal(reference[name], torch.cat([captions, captions]))
            assert torch.equal(policy[name], reference[name])
            dropped.append([torch.equal(caption, empty[0]) for caption in captions])
    assert dropped[0::2] == dropped[1::2], "both embeddings go, or none"
    assert 2 < sum(map(sum, dropped[0::2])) < 10


# Micro-conditioning

SIZES = [(833, 400), (90, 257), (64, 64), (128, 100), (64, 65), (411, 205)]


def ramps(width, height):
    """A picture whose red grows from left to right and whose green grows from top to bottom."""
    red = np.linspace(0, 255, width)[None].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], -1).round().astype(np.uint8))


def corner_seen_in(pixels, size):
    """(top, left) of a crop of ramps, read off its colours; left counts from the right edge if it was mirrored."""
    side = pixels.shape[-1]
    scale = side / min(size)
    red, green = ((pixels[:2] + 1) / 2).double()
    if red[:, -1].mean() < red[:, 0].mean():
        red = 1 - red
    return tuple(
        float(value.mean() * max(extent * scale, side) - side / 2)
        for value, extent in ((green, size[1]), (red, size[0]))
    )


@pytest.fixture(scope="session")
def oblongs(tmp_path_factory):
    """Winners of several shapes, whose crop can be told from their colours."""
    directory = tmp_path_factory.mktemp("oblongs")
    lines = []
    for i, size in enumerate(SIZES):
        ramps(*size).save(directory / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": tiny.CAPTIONS[i]}))
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return directory


@pytest.mark.parametrize("cached", [False, True])
def test_micro_conditioning_tells_of_the_crop_that_was_made(train_xl, oblongs, monkeypatch, cached):
    """Every denoiser call of a bf16 run is told its winner's size, corner and target, in fp32, uncached and cached."""
    crops, told, batches = {}, [], []
    load, project, loss = script.Winners.load, UNet2DConditionModel.get_aug_embed, script.training_loss

    def spy_load(self, row, example, place):
        loaded = load(self, row, example, place)
        crops[0 if cached else place[0], row] = loaded["pixels"].clone()
        return loaded

    def spy_project(self, emb, encoder_hidden_states, added_cond_kwargs):
        told.append(added_cond_kwargs["time_ids"])
        return project(self, emb, encoder_hidden_states, added_cond_kwargs)

    monkeypatch.setattr(script.Winners, "load", spy_load)
    monkeypatch.setattr(UNet2DConditionModel, "get_aug_embed", spy_project)
    monkeypatch.setattr(script, "training_loss", lambda *a: batches.append(a[2]["keys"]) or loss(*a))
    run = train_xl(
        data=oblongs,
        center_crop=False,
        random_flip=True,
        cache_latents=cached,
        max_train_steps=6,
        rollout_steps=1,
        seed=1,
        mixed_precision="bf16",
    )
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.metrics[0]["gap/winner"] == 0
    corners = set()
    for i, keys in enumerate(batches):
        rollout, reference, policy = told[3 * i : 3 * i + 3]
        assert rollout.dtype == policy.dtype == torch.float32
        assert torch.equal(rollout, reference), "guidance without a caption is told the same"
        assert torch.equal(rollout, policy)
        for (epoch, row), ids in zip(keys, rollout.tolist()):
            width, height = SIZES[row]
            assert ids[:2] == [height, width]
            assert ids[4:] == [64, 64]
            assert ids[2:4] == pytest.approx(corner_seen_in(crops[0 if cached else epoch, row], SIZES[row]), abs=0.75)
            corners.add((row, *ids[2:4]))
    assert (len(corners) == len(SIZES)) == cached, "a new crop an epoch, unless cached"
    assert max(corner[2] for corner in corners) > 30
    assert len({bool(pixels[0, 0, 0] > pixels[0, 0, -1]) for pixels in crops.values()}) == 2, "some are mirrored"


def test_cached_latents_change_nothing(train_xl, oblongs, monkeypatch):
    """One epoch of crops, flips and dropped captions gives the same losses, and each winner is encoded once."""
    common = dict(data=oblongs, center_crop=False, random_flip=True, proportion_empty_prompts=0.3)
    plain = train_xl("plain", max_train_steps=3, **common)
    encoded, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    cached = train_xl("cached", max_train_steps=6, cache_latents=True, **common)
    assert cached.column("loss")[:3] == pytest.approx(plain.column("loss"), rel=1e-4)
    assert sum(encoded) == len(SIZES)


# Whole runs

PROMPTS = ["a red circle", "a blue square"]


def stock_pictures(pipeline):
    """What the stock pipeline draws from the noise of a run's validation."""
    noise = script.keyed_noise("validation", 0, [(i, 0) for i in range(len(PROMPTS))], (4, 8, 8))
    return pipeline(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=5.0, height=64, width=64).images


@pytest.mark.parametrize(
    "options",
    [
        dict(train_mode="lora"),
        dict(train_mode="lora", use_8bit_adam=True, lora_alpha=2),
        dict(train_mode="full"),
        dict(train_mode="full", use_8bit_adam=True),
        dict(train_mode="full", optimizer="adafactor", cache_latents=True),
    ],
)
def test_result_loads_in_the_stock_pipeline_and_draws_what_the_run_drew(train_xl, sdxl, monkeypatch, options):
    """Base above, result below; the first loss is ln 2; nothing but the policy's weights has moved."""
    kept, save = [], script.save_result
    monkeypatch.setattr(script, "save_result", lambda models, *rest: kept.append(models) or save(models, *rest))
    run = train_xl(validation_prompts=PROMPTS, learning_rate=5e-3, reference="latest", **options)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.metrics[0]["gap/winner"] == run.metrics[0]["gap/rival"] == 0
    assert run.metrics[1]["gap/winner"] != 0
    assert run.metrics[2]["gap/winner"] == 0, "the second iteration's reference is the policy at the end of the first"

    base = stock(StableDiffusionXLPipeline, sdxl)
    above, below = tiny.rows_of(run.path / "samples" / "step-4.png", 2, 2)
    base_pictures = stock_pictures(base)
    if options["train_mode"] == "lora":
        weights = {name.replace(".base_layer", ""): w for name, w in kept[0].denoiser.state_dict().items()}
        assert all(torch.equal(weights[name], weight) for name, weight in base.unet.state_dict().items())
        result = stock(StableDiffusionXLPipeline, sdxl)
        result.load_lora_weights(str(run.path))
    else:
        result = stock(StableDiffusionXLPipeline, run.path)
        trained = result.unet.state_dict()
        assert all(not torch.equal(trained[name], weight) for name, weight in base.unet.state_dict().items())
        for part in ("vae", "text_encoder", "text_encoder_2"):
            weights = getattr(result, part).state_dict()
            assert all(torch.equal(weights[name], w) for name, w in getattr(base, part).state_dict().items())
    for ours, theirs, base_drawn, base_theirs in zip(below, stock_pictures(result), above, base_pictures):
        assert tiny.difference(ours, theirs) <= 1
        assert tiny.difference(base_drawn, base_theirs) <= 1
        assert tiny.difference(ours, base_drawn) > 1


def test_mended_vae_goes_into_the_result(train_xl, sdxl, tmp_path):
    vae = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    options = dict(train_mode="full", max_train_steps=1)
    run = train_xl(pretrained_vae_model_name_or_path=tmp_path / "vae", **options)
    saved = load_file(run.path / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["encoder.conv_in.weight"], vae.encoder.conv_in.weight)
    assert run.column("mse/policy_winner") != train_xl("own", **options).column("mse/policy_winner")


@pytest.mark.parametrize(
    "options",
    [
        dict(train_mode="lora", cache_latents=True, proportion_empty_prompts=0.3, random_flip=True, center_crop=False),
        dict(train_mode="full", use_8bit_adam=True),
    ],
)
def test_resumed_run_ends_as_if_never_stopped(train_xl, oblongs, options):
    """3 of 5 updates, in the middle of an epoch and of an iteration, then the rest: the same bits."""
    options = dict(options, data=oblongs, checkpointing_steps=3, rollout_steps=2)
    whole = train_xl("whole", max_train_steps=5, **options)
    cut = train_xl("cut", max_train_steps=4, **options)
    for name in ("pytorch_lora_weights.safetensors", "model_index.json"):
        (cut.path / name).unlink(missing_ok=True)
    train_xl("cut", max_train_steps=5, resume_from_checkpoint="latest", **options)
    results = [p for p in sorted(whole.path.rglob("*.safetensors")) if "checkpoint-" not in str(p)]
    assert len(results) >= 4
    for path in results:
        ours, theirs = load_file(path), load_file(cut.path / path.relative_to(whole.path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), path
    timeless = [[{k: v for k, v in line.items() if "time/" not in k} for line in r.metrics] for r in (whole, cut)]
    assert timeless[0] == timeless[1]


def test_layout_of_the_batch_does_not_matter_to_sdxl(train_xl, oblongs):
    whole = train_xl("whole", data=oblongs, train_batch_size=4, **LAYOUT)
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=1)
    assert_same_but_for_rounding(whole, train_xl("parts", data=oblongs, **parts, **LAYOUT))


def test_two_processes_make_the_losses_of_one(train_xl, sdxl, oblongs, tmp_path):
    options = dict(max_train_steps=3, center_crop=False, random_flip=True, proportion_empty_prompts=0.3)
    one = train_xl("one", data=oblongs, train_batch_size=4, **options)
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    subprocess.run(
        [Path(sys.executable).with_name("accelerate"), "launch", *launch, ROOT / "train_sspo_sdxl.py"]
        + flags(sdxl, oblongs, tmp_path / "two", train_batch_size=2, **options),
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"},
        check=True,
        capture_output=True,
    )
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for name, tolerance in (("loss", 1e-3), ("mse/policy_winner", 1e-5), ("mse/policy_rival", 1e-5)):
        assert [line[name] for line in two] == pytest.approx(one.column(name), rel=tolerance)


# What is refused


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("model_index.json", dict(requires_aesthetics_score=True), "refiner"),
        ("model_index.json", dict(text_encoder=[None, None]), "refiner"),
        (
            "scheduler/scheduler_config.json",
            dict(_class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
            "turbo",
        ),
        ("scheduler/scheduler_config.json", dict(timestep_spacing="trailing"), "lightning"),
        ("scheduler/scheduler_config.json", dict(_class_name="LCMScheduler"), "LCM"),
        ("unet/config.json", dict(time_cond_proj_dim=256), "LCM"),
        ("unet/config.json", dict(in_channels=9), "inpainting"),
        ("unet/config.json", dict(addition_embed_type=None), "not a Stable Diffusion XL pipeline"),
    ],
)
def test_other_models_are_refused_before_their_weights_load(sdxl, tmp_path, file, changes, message):
    """The folders have no weights: what is refused is known without them."""
    with pytest.raises(script.UserError, match=message) as refusal:
        load(without_weights(sdxl, tmp_path / "model", {file: changes}))
    assert "\n" not in str(refusal.value)


def test_models_with_trailing_steps_of_their_own_are_not_refused(sdxl, tmp_path):
    """v-prediction models on a schedule that ends in pure noise have trailing steps, and are no distilled ones."""
    changes = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = without_weights(sdxl, tmp_path / "model", {"scheduler/scheduler_config.json": changes})
    with pytest.raises(script.UserError, match="cannot be loaded"):  # it gets as far as the weights that are not there
        load(model)


def test_schedules_without_betas_are_refused(sdxl, tmp_path):
    model = without_weights(sdxl, tmp_path / "model")
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(script.UserError, match="EDMEulerScheduler"):
        load(model)


def test_refusal_on_the_command_line_is_one_line(sdxl, winners, tmp_path):
    model = without_weights(sdxl, tmp_path / "model", {"model_index.json": {"requires_aesthetics_score": True}})
    process = subprocess.run(
        [sys.executable, ROOT / "train_sspo_sdxl.py", *flags(model, winners, tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if line.startswith("train_sspo_sdxl.py: ")]
    assert len(lines) == 1
    assert "refiner" in lines[0]
    assert "Traceback" not in process.stderr


def test_missing_vae_is_named(sdxl, tmp_path):
    with pytest.raises(script.UserError, match="--pretrained_vae_model_name_or_path .*no-such-vae"):
        load(sdxl, pretrained_vae_model_name_or_path=tmp_path / "no-such-vae")


@pytest.mark.parametrize("cached", [False, True])
def test_latents_that_are_not_finite_stop_the_run(train_xl, sdxl, winners, tmp_path, cached):
    """As the stock VAE's in fp16; the row is named and no cache of them is kept."""
    shutil.copytree(sdxl, tmp_path / "broken")
    path = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.weight"][0] = math.inf
    save_file(weights, path)
    with pytest.raises(script.UserError, match=r"latents of row \d+ are not finite.*VAE"):
        train_xl(model=tmp_path / "broken", cache_latents=cached)
    assert not list((tmp_path / "run").rglob("rows-*.safetensors"))


# The copies

SEAM = {"parse_args", "Models", "load_models", "encode_prompt", "collate_condition", "predict", "save_result"}
SEAM |= {"encode_image", "decode_latents", "refuse_others"}
CONSTANTS = {"PIPELINE", "TAGS"}


def parts(name):
    """Top-level definitions and constants of a script: name -> (source, line above)."""
    source = (ROOT / name).read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = (lines[first - 1 : node.end_lineno], lines[first - 2])
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = (lines[node.lineno - 1 : node.end_lineno], None)
    return found


def test_what_the_scripts_share_is_marked_and_the_same():
    """Everything in both scripts is a marked copy, which `make fix-copies` keeps, or belongs to the seam."""
    original, ours = parts("train_sspo_sd.py"), parts("train_sspo_sdxl.py")
    assert set(original) <= set(ours)
    for name, (source, above) in original.items():
        if name in SEAM | CONSTANTS:
            assert ours[name][0] != source, f"{name} is the same: mark it as copied"
        else:
            assert ours[name][0] == source, f"{name} has drifted"
            assert above is None or ours[name][1] == f"# Copied from train_sspo_sd.{name}"
    assert not [name for name, (_, above) in ours.items() if above and "Copied" in above and name not in original]
