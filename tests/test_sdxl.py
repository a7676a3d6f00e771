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
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from test_training import LAYOUT, assert_same_but_for_rounding

import train_sspo_sdxl as script


SCHEDULERS = {"dpmsolver": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """A tiny SDXL pipeline; like the real one it takes zeros where there is no caption."""
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


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


def test_defaults_are_those_of_sdxl():
    args = script.parse_args(["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"])
    assert (args.resolution, args.rollout_guidance_scale) == (1024, 5.0)


SIZES = [(833, 400), (90, 257), (64, 64), (128, 100), (64, 65), (411, 205)]


def ramps(width, height):
    """A picture whose red grows from left to right and whose green grows from top to bottom."""
    red = np.linspace(0, 255, width)[None].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], -1).round().astype(np.uint8))


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
