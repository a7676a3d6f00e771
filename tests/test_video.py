"""train_sspo_video.py: what clips and motion modules change, against the stock pipelines, and whole runs."""

import json
import math
import shutil

import numpy as np
import pytest
import test_processes
import tiny
import torch
from conftest import ROOT, Run, flags
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from PIL import Image
from safetensors.torch import load_file
from test_sdxl import parts
from test_training import LAYOUT, assert_same_but_for_rounding, assert_same_result, resumed

import train_sspo_video as script


FRAMES = 4
CAPTIONS = ["a red circle", "a blue square"]
SCHEDULERS = {"dpmsolver": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}


@pytest.fixture(scope="session")
def motion(tmp_path_factory):
    """A tiny image model and a tiny motion adapter for it."""
    return tiny.animate_diff(tmp_path_factory.mktemp("motion"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A videofolder of six winners of twelve frames."""
    return tiny.folder_of_clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture
def train_video(train, motion, clips):
    """train_video(name, flag=value, ...) runs train_sspo_video.py's main in this process and returns the Run."""
    common = dict(script=script, model=motion[0], data=clips, motion_adapter_name_or_path=motion[1])
    common.update(num_frames=FRAMES, frame_stride=2)
    return lambda name="run", **options: train(name, **{**common, **options})


def load(motion, dtype=torch.float32, **options):
    options = dict(motion_adapter_name_or_path=motion[1], num_frames=FRAMES, rollout_steps=6, **options)
    args = script.parse_args(flags(motion[0], "unused", "unused", **options))
    return args, script.load_models(args, dtype)


def stock(motion, scheduler="dpmsolver", kind=AnimateDiffPipeline, adapter=None):
    """The stock pipeline with the schedule of betas that motion adapters are trained with."""
    adapter = MotionAdapter.from_pretrained(adapter or motion[1])
    pipeline = kind.from_pretrained(motion[0], motion_adapter=adapter)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    pipeline.scheduler = SCHEDULERS[scheduler](
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1
    )
    if scheduler == "ddim":
        pipeline.scheduler.register_to_config(clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# What is refused


def refused(train_video, message, **options):
    with pytest.raises(script.UserError, match=message) as error:
        train_video(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_frames=0), "--num_frames must be more than 0"),
        (dict(frame_stride=-1), "--frame_stride must not be negative"),
        (dict(height=60), "--height must be a multiple of 8, not 60"),
        (dict(width=-8), "--width must be a multiple of 8, not -8"),
        (dict(motion_adapter_name_or_path=None), "--motion_adapter_name_or_path"),
        (dict(rollout_steps=3, rollout_strength=0.2), "--rollout_strength must"),
    ],
)
def test_wrong_flag_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        script.parse_args(flags("model", "data", "out", **{"motion_adapter_name_or_path": "a", **options}))
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count("\n") == 1
    assert message in error


def test_defaults():
    args = script.parse_args(flags("m", "d", "o", motion_adapter_name_or_path="a", resolution=None))
    assert (args.num_frames, args.frame_stride, script.picture_size(args)) == (16, 4, (256, 256))
    assert args.rollout_guidance_scale == 8


def changed(folder, copy, changes):
    """A copy of a model, its configurations changed: {file: {key: value}}."""
    shutil.copytree(folder, copy)
    for name, values in changes.items():
        (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), **values}))
    return str(copy)


def test_wrong_models_are_refused(motion, tmp_path):
    base, adapter = motion

    def refuse(message, base=base, adapter=adapter, **options):
        with pytest.raises(script.UserError, match=message) as error:
            load((base, adapter), **options)
        assert "\n" not in str(error.value)

    refuse("--motion_adapter_name_or_path .*nowhere cannot be loaded", adapter=str(tmp_path / "nowhere"))
    refuse("--pretrained_model_name_or_path .*nowhere cannot be loaded", base=str(tmp_path / "nowhere"))
    refuse("is no motion adapter", adapter=f"{base}/unet")
    wide = changed(adapter, tmp_path / "wide", {"config.json": {"block_out_channels": [8, 32]}})
    refuse(r"not made for .*\[8, 32\] channels, those of the image model \[8, 16\]", adapter=wide)
    deep = changed(adapter, tmp_path / "deep", {"config.json": {"motion_layers_per_block": 2}})
    refuse("--motion_adapter_name_or_path .*deep cannot be loaded", adapter=deep)
    pia = changed(adapter, tmp_path / "pia", {"config.json": {"conv_in_channels": 9}})
    refuse("more than latents and a caption", adapter=pia)
    unet = "unet/config.json"
    inpainting = changed(base, tmp_path / "inpainting", {unet: {"in_channels": 9}})
    refuse("more than latents and a caption", base=inpainting)
    xl = changed(base, tmp_path / "xl", {unet: {"addition_embed_type": "text_time"}})
    refuse("is no image model of Stable Diffusion 1.x", base=xl)
    sample = changed(base, tmp_path / "sample", {"scheduler/scheduler_config.json": {"prediction_type": "sample"}})
    refuse("predicts sample, and only epsilon", base=sample)
    with pytest.raises(script.UserError, match="takes 16 frames at most: lower --num_frames 17"):
        options = dict(motion_adapter_name_or_path=adapter, num_frames=17)
        script.load_models(script.parse_args(flags(base, "d", "o", **options)), torch.float32)


# Whole runs


def capture(monkeypatch):
    """Keeps the models that a run hands to save_result."""
    kept, save = [], script.save_result
    monkeypatch.setattr(script, "save_result", lambda models, *rest: kept.append(models) or save(models, *rest))
    return kept


def frames_of(path, rows, columns):
    """The clips of a samples/step-N.gif, rows x columns lists of arrays."""
    frames = []
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB"), dtype=int))
    height, width = frames[0].shape[0] // rows, frames[0].shape[1] // columns
    return [
        [
            [frame[r * height : (r + 1) * height, c * width : (c + 1) * width] for frame in frames]
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def strips_of(path, lines, frames=FRAMES):
    """The frames of a samples/step-N.png, a list for each line."""
    grid = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    height, width = grid.shape[0] // lines, grid.shape[1] // frames
    return [
        [grid[r * height : (r + 1) * height, c * width : (c + 1) * width] for c in range(frames)] for r in range(lines)
    ]


def stock_clips(pipeline, prompts=CAPTIONS):
    """What the stock pipeline draws from the noise of a run's validation."""
    noise = script.keyed_noise("validation", 0, [(i, 0) for i in range(len(prompts))], (4, FRAMES, 8, 8))
    options = dict(num_frames=FRAMES, num_inference_steps=3, guidance_scale=8.0, height=64, width=64)
    return pipeline(prompts, latents=noise, output_type="pil", **options).frames


@pytest.mark.parametrize(
    "options",
    [
        dict(train_mode="lora"),
        dict(train_mode="lora", use_8bit_adam=True, lora_alpha=2, gradient_checkpointing=True),
        dict(train_mode="full", gradient_checkpointing=True),
        dict(train_mode="full", use_8bit_adam=True, ssr="indicator"),
        dict(train_mode="full", optimizer="adafactor", cache_latents=True, ssr="none", draws_per_pair=2),
    ],
)
def test_result_loads_in_the_stock_pipeline_and_samples_what_the_run_sampled(
    train_video, motion, monkeypatch, options
):
    """ln 2 and gaps of 0 at first; base above, result below; nothing but the motion modules' weights has moved."""
    kept = capture(monkeypatch)
    run = train_video(validation_prompts=CAPTIONS, learning_rate=1e-2, **options)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.metrics[0]["gap/winner"] == run.metrics[0]["gap/rival"] == 0
    assert run.metrics[0]["grad_norm"] > 0 and run.metrics[1]["gap/winner"] != 0

    base = UNet2DConditionModel.from_pretrained(motion[0], subfolder="unet").state_dict()
    weights = {name.replace(".base_layer", ""): w for name, w in kept[0].denoiser.state_dict().items()}
    assert all(torch.equal(weights[name], weight) for name, weight in base.items()), "the image model is untouched"
    adapter = MotionAdapter.from_pretrained(motion[1]).state_dict()
    result = stock(motion)
    if options["train_mode"] == "lora":
        assert all(torch.equal(weights[name], weight) for name, weight in adapter.items())
        assert len(load_file(run.path / "pytorch_lora_weights.safetensors")) == 2 * 4 * 2 * 7, "A and B, seven modules"
        result.load_lora_weights(str(run.path))
    else:
        trained = dict(MotionAdapter.from_pretrained(run.path).named_parameters())
        assert all(torch.equal(weights[name], weight) for name, weight in trained.items())
        assert all(not torch.equal(weight, adapter[name]) for name, weight in trained.items())
        result = stock(motion, adapter=run.path)
        bank = load_file(run.path / "replay" / "iteration-2.safetensors")
        assert set(bank) == set(trained), "motion weights, and no second UNet"
        assert all(torch.equal(bank[name], weight) for name, weight in trained.items())

    base_clips, clips = stock_clips(stock(motion)), stock_clips(result)
    strips = strips_of(run.path / "samples" / "step-4.png", 4)
    expected = [base_clips[0], clips[0], base_clips[1], clips[1]]  # the lines of a prompt together
    assert all(tiny.difference(a, b) <= 1 for ours, theirs in zip(strips, expected) for a, b in zip(ours, theirs))
    assert any(tiny.difference(a, b) > 1 for a, b in zip(*strips[:2])), "training changed it"
    moving = frames_of(run.path / "samples" / "step-4.gif", 2, 2)
    for row, expected in zip(moving, (base_clips, clips)):
        for ours, theirs in zip(row, expected):
            assert len(ours) == FRAMES
            assert all(np.abs(a - np.asarray(b, dtype=int)).mean() < 12 for a, b in zip(ours, theirs))
    assert not list(run.path.rglob("*.bin"))


def test_deep_motion_modules_are_saved_whole(train, clips, tmp_path):
    """With two layers in each module, which the library's own save forgets."""
    motion = tiny.animate_diff(tmp_path / "deep", layers=2)
    run = train(
        script=script,
        model=motion[0],
        data=clips,
        motion_adapter_name_or_path=motion[1],
        num_frames=FRAMES,
        frame_stride=2,
        train_mode="full",
        max_train_steps=2,
        checkpointing_steps=2,
    )
    adapter = MotionAdapter.from_pretrained(run.path)
    assert adapter.config.motion_transformer_layers_per_block == 2
    UNetMotionModel.from_unet2d(UNet2DConditionModel.from_pretrained(motion[0], subfolder="unet"), adapter)


def test_gap_is_zero_under_autocast_too(train_video):
    for mode in ("lora", "full"):
        run = train_video(
            mode, train_mode=mode, mixed_precision="bf16", max_train_steps=1, gradient_checkpointing=True
        )
        assert run.metrics[0]["gap/winner"] == run.metrics[0]["gap/rival"] == 0
        assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(train_mode="lora", proportion_empty_prompts=0.3, center_crop=False, random_flip=True),
        dict(train_mode="full", gradient_checkpointing=True),
        dict(train_mode="full", use_8bit_adam=True, cache_latents=True, rollout_strength=0.7),
        dict(train_mode="lora", streaming=True, dataloader_num_workers=1),
    ],
)
def test_resumed_run_ends_as_if_never_stopped(train_video, options):
    """3 of 7 updates, in the middle of an epoch and of an iteration, then the rest."""
    options = dict(replay_steps=2, replay_size=3, **options)
    run = train_video("whole", max_train_steps=7, checkpointing_steps=3, **options)

    def train_again(name, **more):
        (run.path.parent / name / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        return train_video(name, **more)

    again = resumed(train_again, run, 3, **options)
    assert [line["step"] for line in again.metrics] == list(range(1, 8))
    assert_same_result(run, again)


def test_results_are_not_overwritten(train_video):
    for mode in ("lora", "full"):
        train_video(mode, train_mode=mode, max_train_steps=1)
        refused(train_video, "holds the results of another run", name=mode, train_mode=mode)


def test_layout_of_the_batch_does_not_matter_to_clips(train_video):
    whole = train_video("whole", train_batch_size=4, **LAYOUT)
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=1)
    assert_same_but_for_rounding(whole, train_video("parts", **parts, **LAYOUT))


def test_two_processes_make_the_same_run(train_video, motion, clips, tmp_path, monkeypatch):
    """2 x 1 pairs equal 1 x 2, with full training, whose reference is put in place of the wrapped policy's weights."""
    options = dict(motion_adapter_name_or_path=motion[1], num_frames=FRAMES, frame_stride=2, center_crop=False)
    options.update(max_train_steps=5, train_mode="full", gradient_checkpointing=True)
    two = tmp_path / "two"
    monkeypatch.setattr(test_processes, "SCRIPT", ROOT / "train_sspo_video.py")
    process = test_processes.launch(flags(motion[0], clips, two, **options, train_batch_size=1), processes=2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    one, two = train_video("one", **options), Run(two)
    assert two.column("reference/index") == one.column("reference/index")
    assert two.column("mse/policy_rival") == pytest.approx(one.column("mse/policy_rival"), rel=1e-4)
    assert two.column("loss") == pytest.approx(one.column("loss"), rel=1e-3)


def test_trackers_get_the_clip_and_the_card_shows_it(train_video, motion):
    run = train_video(report_to="tensorboard", validation_prompts=CAPTIONS, train_mode="full", validation_steps=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "logs" / "sspo"))
    events.Reload()
    clips = events.Images("samples")
    assert [clip.step for clip in clips] == [2, 4]
    assert clips[1].encoded_image_string == (run.path / "samples" / "step-4.gif").read_bytes()
    with Image.open(run.path / "samples" / "step-4.gif") as gif:
        assert gif.n_frames == FRAMES and 110 <= gif.info["duration"] <= 130, "eight a second"
    card = (run.path / "README.md").read_text()
    assert "samples/step-4.gif" in card and "text-to-video" in card
    code = card.split("```python\n")[1].split("```")[0].replace(f'"{run.path.name}"', f'"{run.path}"')
    names = {}
    exec(code, names)
    names["pipeline"].set_progress_bar_config(disable=True)
    options = dict(num_frames=FRAMES, num_inference_steps=2, height=64, width=64, output_type="latent")
    assert names["pipeline"]("a red circle", **options).frames.shape == (1, 4, FRAMES, 8, 8)


def test_sft_baseline(train_video):
    run = train_video(loss_type="sft", max_train_steps=2)
    assert "gap/winner" not in run.metrics[0] and not (run.path / "replay").exists()


# The copies

SEAM = set(
    "parse_args open_undecoded read_winner picture_size load_models encode_image decode_latents latent_shape predict "
    "Models refuse_others trained_in_full checkpoint_gradients save_denoiser load_denoiser save_result write_samples "
    "usage".split()
)
CONSTANTS = {"PIPELINE", "LORA_TARGETS", "TAGS", "RESULTS", "SAMPLES", "(MEDIUM, MEDIUM_COLUMNS)"}


def test_what_the_scripts_share_is_marked_and_has_not_drifted():
    """Everything in train_sspo_sd.py is here as a marked copy or belongs to the seam; only pictures' flags are not."""
    original, ours = parts("train_sspo_sd.py"), parts("train_sspo_video.py")
    assert set(original) - set(ours) == {"add_picture_arguments"}
    for name in set(original) & set(ours):
        source, above = original[name]
        if name in SEAM | CONSTANTS:
            assert ours[name][0] != source, f"{name} is the same: mark it as copied"
        elif above is None:
            assert ours[name][0] == source, name
        else:
            assert ours[name] == (source, f"# Copied from train_sspo_sd.{name}")


def test_image_model_alone_is_what_stable_diffusion_is(motion):
    """The base that the tests animate is a stock image pipeline."""
    assert StableDiffusionPipeline.from_pretrained(motion[0]).unet.config.in_channels == 4
