"""examples/evaluate: what is drawn, how it is scored and compared, and its page, in a real browser."""

import argparse
import html
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import weakref
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import tiny
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from helpers import EVERY, ROOT, WAN, flags, newcomer, notices, run_main
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
)

from train_sspo_sd import keyed_noise


HERE, QUICKSTART = ROOT / "examples" / "evaluate", ROOT / "examples" / "quickstart"
sys.path[:0] = [str(HERE), str(QUICKSTART)]

import clip_measures  # noqa: E402
import evaluate  # noqa: E402
import glyphs  # noqa: E402
import scorer as emoji_scorer  # noqa: E402
import scorers  # noqa: E402


PROMPTS = tiny.CAPTIONS[:2]
JUDGE = "def redness(pictures, prompts):\n    return [picture.getpixel((0, 0))[0] for picture in pictures]\n"


@pytest.fixture
def run(sd, tmp_path):
    """run(flag=value, ...) evaluates in tmp_path/evaluation and returns what results.json says."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "judge.py").write_text(JUDGE)

    def evaluated(**options):
        defaults = dict(
            base=sd,
            prompts=tmp_path / "prompts.txt",
            output_dir=tmp_path / "evaluation",
            scorer=[f"{tmp_path / 'judge.py'}:redness"],
            num_inference_steps=2,
            bootstrap_samples=100,
        )
        words = []
        for name, value in {**defaults, **options}.items():
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{name}", str(one)]
        args = evaluate.parse_args(words)
        evaluate.main(args)
        return json.loads(Path(args.output_dir, "results.json").read_text())

    return evaluated


def drawn(folder, model="base"):
    """{file name: picture} of one model."""
    return {
        path.name: np.asarray(Image.open(path)).astype(int) for path in Path(folder, "images", model).glob("*.png")
    }


# ---- what is drawn ----


def test_a_picture_hangs_on_its_prompt_not_on_order_batch_or_number_of_prompts(run, tmp_path):
    run(images_per_prompt=2, batch_size=4, output_dir=tmp_path / "a")
    (tmp_path / "prompts.txt").write_text("\n".join(["another", *reversed(PROMPTS)]))
    run(images_per_prompt=2, batch_size=1, output_dir=tmp_path / "b")
    a, b = drawn(tmp_path / "a"), drawn(tmp_path / "b")
    assert len(a) == 4 and set(a) < set(b)
    assert max(np.abs(a[name] - b[name]).max() for name in a) <= 1
    samples = evaluate.make_samples(["x", "y"], argparse.Namespace(images_per_prompt=2, clips=False))
    noises = [evaluate.noise_of(sample, (4, 8, 8), 0) for sample in samples]
    assert len({noise[0, 0, 0].item() for noise in noises}) == 4, "each has noise of its own"
    assert not torch.equal(noises[0], evaluate.noise_of(samples[0], (4, 8, 8), 1)), "the seed counts"


def test_seed_and_flags_of_the_page(run, tmp_path):
    """Another seed draws other pictures; the page may have fewer and smaller ones than were drawn."""

    def shown(folder):
        data = (folder / "index.html").read_text().split(evaluate.PAGE_DATA)[1].split("</script>")[0]
        samples = json.loads(data)["samples"]
        picture = b64decode(samples[0]["pictures"][0].split(",")[1])
        return len(samples), Image.open(io.BytesIO(picture)).size

    a, b = tmp_path / "a", tmp_path / "b"
    run(images_per_prompt=2, page_images=1, page_resolution=16, output_dir=a)
    run(images_per_prompt=2, seed=1, output_dir=b)
    one, other = drawn(a), drawn(b)
    assert len(one) == 4 and all(np.abs(one[name] - other[name]).max() > 10 for name in one)
    assert (shown(a), shown(b)) == ((2, (16, 16)), (4, (64, 64)))


def test_only_what_is_missing_is_drawn(run, sd_v, tmp_path, monkeypatch):
    run()
    before = drawn(tmp_path / "evaluation")
    victim = sorted(before)[0]
    (tmp_path / "evaluation" / "images" / "base" / victim).unlink()
    asked, draw = [], evaluate.draw

    def counted(pipeline, prompts, noise, args):
        asked.extend(prompts)
        return draw(pipeline, prompts, noise, args)

    monkeypatch.setattr(evaluate, "draw", counted)
    found = run(model=[f"other={sd_v}"])
    assert len(asked) == 1 + len(PROMPTS), "the one that was missing, and those of the new model"
    after = drawn(tmp_path / "evaluation")
    assert all(np.abs(before[name] - after[name]).max() <= (name == victim) for name in before)
    assert {sample["model"] for sample in found["samples"]} == {"base", "other"}
    rows = (tmp_path / "evaluation" / "images" / "other" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"] for row in rows] == PROMPTS, "an imagefolder"


def test_pictures_drawn_otherwise_are_not_mixed(run, sd, sd_v, tmp_path):
    run(model=[f"other={sd_v}"])
    before = drawn(tmp_path / "evaluation")
    with pytest.raises(evaluate.UserError, match="--seed 0, not 1"):
        run(seed=1)
    with pytest.raises(evaluate.UserError, match="--guidance_scale 7.5, not 3.0"):
        run(guidance_scale=3)
    with pytest.raises(evaluate.UserError, match="--fps 8, not 24"):  # by which the frames of a clip are told apart
        run(fps=24)
    with pytest.raises(evaluate.UserError, match="another model called other.*delete .*images/other"):
        run(model=[f"other={sd}"])
    with pytest.raises(evaluate.UserError, match="another model called base"):
        run(base=sd_v)
    assert before.keys() == drawn(tmp_path / "evaluation").keys()


def test_clips_of_another_flow_shift_or_negative_prompt_are_not_mixed(wan, tmp_path):
    words = ["--base", wan, "--prompts", "x", "--output_dir", str(tmp_path)]

    def check(*more):
        args = evaluate.parse_args([*words, *more])
        evaluate.check_settings([evaluate.find_base(args)], args)

    check("--flow_shift", "8", "--negative_prompt", "still")
    (tmp_path / "images").mkdir()
    check("--flow_shift", "8", "--negative_prompt", "still")
    with pytest.raises(evaluate.UserError, match="--flow_shift 8.0, not 3.0"):
        check("--flow_shift", "3", "--negative_prompt", "still")
    with pytest.raises(evaluate.UserError, match="--negative_prompt still, not None"):
        check("--flow_shift", "8")
    kept = json.loads((tmp_path / "pictures.json").read_text())
    del kept["settings"]["flow_shift"], kept["settings"]["negative_prompt"]  # drawn before there were such flags
    (tmp_path / "pictures.json").write_text(json.dumps(kept))
    with pytest.raises(evaluate.UserError, match="--flow_shift None, not 8.0"):
        check("--flow_shift", "8")
    check()


MADE = {
    "lora": ["", "checkpoint-4", "replay/iteration-2.safetensors", "pytorch_lora_weights.safetensors"],
    "full": ["", "checkpoint-4", "replay/iteration-2.safetensors"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sd, sdxl, motion, flux2, wan, winners):
    """trained(pipeline, mode): the base, the motion adapter or None, and the folder of a run of that script."""
    bases, runs = (
        {"sd": (sd, None), "sdxl": (sdxl, None), "video": motion, "flux2": (flux2, None), "wan": (wan, None)},
        {},
    )

    def make(kind, mode):
        base, adapter = bases[kind]
        if (kind, mode) not in runs:
            output = tmp_path_factory.mktemp("run") / f"{kind}-{mode}"
            options = dict(train_mode=mode, lora_alpha=3, rank=2, learning_rate=3e-2, validation_prompts=PROMPTS)
            options.update(checkpointing_steps=4, validation_steps=4, rollout_steps=2)
            data = winners
            if kind in ("video", "wan"):
                data = tiny.folder_of_clips(tmp_path_factory.mktemp("data") / "clips", count=2, length=5)
            if kind == "wan":
                options.update(WAN, frame_stride=1, flow_shift=8, negative_prompt="still")
            if kind == "video":
                options.update(motion_adapter_name_or_path=adapter, num_frames=4, frame_stride=1)
            if kind == "flux2":
                options.update(max_sequence_length=32)
            run_main(EVERY[kind], flags(base, data, output, **options))
            runs[kind, mode] = output
        return base, adapter, runs[kind, mode]

    return make


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind in EVERY for mode in MADE])
def test_each_kind_of_model_draws_what_the_run_itself_showed(trained, kind, mode):
    """From the noise of the run's validation, what samples/step-4.png shows: the base above, the policy below."""
    base, adapter, folder = trained(kind, mode)
    side, frames = (WAN["height"], WAN["num_frames"]) if kind == "wan" else (64, 4 if adapter else None)
    words = ["--base", base, "--prompts", "x", "--num_inference_steps", 2, "--height", side, "--width", side]
    words += ["--num_frames", frames] if frames else []
    words += ["--motion_adapter_name_or_path", adapter] if adapter else []
    words += ["--max_sequence_length", 32] if kind == "flux2" else []
    words += ["--flow_shift", 8, "--negative_prompt", "still"] if kind == "wan" else []
    args = evaluate.parse_args(list(map(str, words)))
    models = [evaluate.find_base(args)]
    paths = [path for path in MADE[mode] if path != "pytorch_lora_weights.safetensors" or kind == "sd"]
    models += [evaluate.find_model("run", str(folder / path), args) for path in paths]
    shown = tiny.rows_of(folder / "samples" / "step-4.png", 4 if frames else 2, frames or 2)
    shown = [shown[0::2], shown[1::2]] if frames else shown  # a clip is a line; a picture is a cell
    assert tiny.difference(flat(shown[0]), flat(shown[1])) > 20, "the policy has left the base"
    for model in models:
        pipeline = evaluate.load_pipeline(model, args, "cpu")
        shape = evaluate.noise_shape(pipeline, args)
        noise = keyed_noise("validation", 0, [(0, 0), (1, 0)], shape)
        pictures = evaluate.draw(pipeline, PROMPTS, noise, args)
        row = 0 if model.name == "base" else 1
        assert tiny.difference(flat(pictures), flat(shown[row])) <= 2, model.path


def flat(pictures):
    """Pictures, or clips, as one array."""
    return np.concatenate([flat(p) if isinstance(p, list) else np.asarray(p)[None] for p in pictures])


@pytest.mark.parametrize(
    "words, told",
    [
        (["--scheduler", "ddim"], "--scheduler ddim cannot sample FLUX.2"),
        (["--prediction_type", "epsilon"], "predicts velocities"),
        (["--height", "72"], "must be multiples of 16 here, not 72 and 1024"),
    ],
)
def test_what_flux2_has_no_use_for_is_refused(flux2, words, told):
    with pytest.raises(evaluate.UserError, match=told) as error:
        evaluate.find_base(evaluate.parse_args(["--base", flux2, "--prompts", "x", *words]))
    assert "\n" not in str(error.value)


def test_what_wan_has_no_use_for_is_refused(wan, sd):
    for words, told in {
        ("--scheduler", "ddim"): "--scheduler ddim cannot sample Wan",
        ("--num_frames", "16"): "must be 4k \\+ 1 for Wan, such as 33 or 81, not 16",
        ("--motion_adapter_name_or_path", "x"): "--motion_adapter_name_or_path x cannot be used",
        ("--max_sequence_length", "77"): "for FLUX.2 only",
        ("--width", "40"): "must be multiples of 16 here",
    }.items():
        with pytest.raises(evaluate.UserError, match=told):
            evaluate.find_base(evaluate.parse_args(["--base", wan, "--prompts", "x", *words]))
    words = ["--base", sd, "--prompts", "x", "--scorer", "psnr", "--reference_dir", "real"]
    with pytest.raises(evaluate.UserError, match="psnr compares clips with real ones, and these models draw pictures"):
        evaluate.find_base(evaluate.parse_args(words))


def test_defaults_are_those_of_the_base(flux2, sd, wan, wan_large):
    """
    FLUX.2 and Wan in their own size, at their own guidance and by their own sampler; Wan's clips at its own frames a
    second; FLUX.2's prompts have a length, no others do.
    """
    for base, fps in ((wan, 16), (wan_large, 24)):
        args = evaluate.parse_args(["--base", base, "--prompts", "x"])
        evaluate.find_base(args)
        assert (args.height, args.width, args.num_frames, args.fps, args.clips) == (480, 832, 33, fps, True)
        assert (args.guidance_scale, args.scheduler, args.frame_stride, args.batch_size) == (5.0, None, None, 1)
    args = evaluate.parse_args(["--base", flux2, "--prompts", "x"])
    evaluate.find_base(args)
    assert (args.height, args.width, args.guidance_scale, args.scheduler) == (1024, 1024, 4.0, None)
    args = evaluate.parse_args(["--base", sd, "--prompts", "x"])
    evaluate.find_base(args)
    assert (args.guidance_scale, args.scheduler, args.batch_size) == (7.5, "dpmsolver", 8)
    for flag, family in {"max_sequence_length": "FLUX.2", "flow_shift": "Wan", "negative_prompt": "Wan"}.items():
        with pytest.raises(evaluate.UserError, match=f"--{flag} is for {family} only"):
            evaluate.find_base(evaluate.parse_args(["--base", sd, "--prompts", "x", f"--{flag}", "8"]))


def test_a_base_without_a_schedule_of_betas_is_refused(sd, tmp_path):
    """As Playground v2.5: dpmsolver would take betas of its own, and draw noise."""
    shutil.copytree(sd, tmp_path / "edm")
    config = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}
    (tmp_path / "edm" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(evaluate.UserError, match="noise levels of EDMDPMSolverMultistepScheduler, not a schedule of"):
        evaluate.find_base(evaluate.parse_args(["--base", str(tmp_path / "edm"), "--prompts", "x"]))


def changed(base, part, folder, **values):
    """A copy of a base, in `folder`, whose configuration of a part has other values; None takes one out."""
    shutil.copytree(base, folder)
    file = Path(folder, part)
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return str(folder)


def test_configurations_that_lack_something(wan, sd, tmp_path):
    """Those of Wan 2.1 on the hub are older than scale_factor_spatial. Without what is needed it ends in one line."""
    old = dict(scale_factor_spatial=None, scale_factor_temporal=None, temperal_downsample=None)
    base = changed(wan, "vae/config.json", tmp_path / "wan", **old)
    args = evaluate.parse_args(["--base", base, "--prompts", "x", "--height", "48", "--width", "32"])
    model = evaluate.find_base(args)
    pipeline = evaluate.load_pipeline(model, args, "cpu")
    assert evaluate.noise_shape(pipeline, args) == (4, 9, 6, 4)
    for part, name in {"vae/config.json": "block_out_channels", "model_index.json": "_class_name"}.items():
        base = changed(sd, part, tmp_path / name, **{name: None})
        with pytest.raises(evaluate.UserError, match=f"--base .* cannot be used: .*{name}"):
            evaluate.find_base(evaluate.parse_args(["--base", base, "--prompts", "x"]))


def test_the_sampler_is_the_one_that_the_flags_name():
    """Whatever the base's own sampler is, and whether or not its configuration tells what the model predicts."""
    own = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    for motion in ([], ["--motion_adapter_name_or_path", "x"]):
        for kind in ("dpmsolver", "ddim"):
            words = ["--base", "x", "--prompts", "x", "--scheduler", kind, *motion]
            args = evaluate.parse_args([*words, "--prediction_type", "v_prediction"])
            assert evaluate.make_scheduler(DDPMScheduler(), args).config.prediction_type == "v_prediction"
            args = evaluate.parse_args(words)
            assert evaluate.make_scheduler(DDPMScheduler(), args).config.prediction_type == "epsilon"
            told = DDPMScheduler(prediction_type="v_prediction")
            assert evaluate.make_scheduler(told, args).config.prediction_type == "v_prediction"
            if kind == "dpmsolver":
                assert evaluate.make_scheduler(own, args).config.algorithm_type == "dpmsolver++"


@pytest.mark.parametrize("kind", ["video", "wan"])
def test_a_vae_that_is_given_draws_the_clips(motion, wan, kind, tmp_path):
    """Wan's in fp32, as its own."""
    base, adapter = motion if kind == "video" else (wan, None)
    vae = evaluate.AutoModel.from_pretrained(base, subfolder="vae")
    with torch.no_grad():
        next(vae.decoder.parameters()).add_(1)
    vae.save_pretrained(tmp_path / "vae")
    words = ["--base", base, "--prompts", "x", "--pretrained_vae_model_name_or_path", tmp_path / "vae"]
    words += ["--motion_adapter_name_or_path", adapter] if adapter else ["--dtype", "bf16"]
    args = evaluate.parse_args(list(map(str, words)))
    pipeline = evaluate.load_pipeline(evaluate.find_base(args), args, "cpu")
    loaded = dict(pipeline.vae.state_dict())
    assert all(torch.equal(weight, loaded[name]) for name, weight in vae.state_dict().items())
    assert loaded[next(iter(loaded))].dtype == torch.float32


# ---- memory ----


@pytest.fixture
def offloaded(monkeypatch):
    """
    A list of references to the denoisers of pipelines whose parts are told to take turns on the GPU. The CPU takes
    its place: load_pipeline may be told "cuda" here.
    """
    told, offload = [], DiffusionPipeline.enable_model_cpu_offload

    def on_the_cpu(pipeline, device=None):
        told.append(weakref.ref(evaluate.denoiser_of(pipeline)))
        offload(pipeline, device="cpu")

    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", on_the_cpu)
    return told


@pytest.mark.parametrize("kind", ["sdxl", "flux2", "wan"])
def test_on_a_gpu_the_parts_of_large_models_take_turns(request, offloaded, kind, tmp_path):
    """They draw the same pictures, the VAE takes them one by one, and nothing is left for the next model to find."""
    base = request.getfixturevalue(kind)
    words = ["--base", base, "--prompts", "x", "--height", "32", "--width", "32", "--num_inference_steps", "2"]
    words += {"wan": ["--num_frames", "5"], "flux2": ["--max_sequence_length", "8"]}.get(kind, [])
    args = evaluate.parse_args([*words, "--dtype", "fp32"])
    model = evaluate.find_base(args)
    samples, folders = evaluate.make_samples(PROMPTS, args), []
    for device in ("cpu", "cuda"):
        args.output_dir = str(tmp_path / device)
        evaluate.draw_missing(model, samples, args, torch.device(device))
        folders.append(tmp_path / device / "images" / "base")
        assert len(offloaded) >= (device == "cuda")
        assert all(denoiser() is None for denoiser in offloaded), "freed"
    for sample in samples:
        one, other = (flat([evaluate.read_picture(folder / sample.file, args)]) for folder in folders)
        assert tiny.difference(one, other) == 0
    vae = evaluate.load_pipeline(model, args, "cpu").vae
    assert vae.use_slicing and not vae.use_tiling
    args.height, args.width = 704, 1280
    assert evaluate.load_pipeline(model, args, "cpu").vae.use_tiling == (kind == "wan"), "as the script's samples"


def test_full_memory_ends_in_one_line(sd, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", full)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--base", sd, "--prompts", tmp_path / "prompts.txt", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    with pytest.raises(SystemExit, match="evaluate.py: out of memory: lower --batch_size") as error:
        runpy.run_path(str(HERE / "evaluate.py"), run_name="__main__")
    assert "\n" not in str(error.value)


def test_a_replay_entry_tells_its_alpha_or_asks_for_it(trained, tmp_path):
    base, _, folder = trained("sd", "lora")
    args = evaluate.parse_args(["--base", base, "--prompts", "x"])
    entry = folder / "replay" / "iteration-2.safetensors"
    assert evaluate.find_alpha(entry, args) == 3, "not the rank, which is 2"
    (tmp_path / "replay").mkdir()
    alone = shutil.copy(entry, tmp_path / "replay")
    evaluate.find_base(args)
    with pytest.raises(evaluate.UserError, match="give --lora_alpha"):
        evaluate.load_pipeline(evaluate.find_model("x", alone, args), args, "cpu")
    assert evaluate.find_alpha(alone, argparse.Namespace(lora_alpha=5.0)) == 5


def test_what_is_no_model_is_refused_in_one_line_before_anything_is_drawn(run, trained, tmp_path):
    full = trained("sd", "full")[2]
    (tmp_path / "killed" / "checkpoint-4").mkdir(parents=True)
    for path, told in {
        tmp_path / "nowhere": "neither a file or folder here nor on the hub",
        tmp_path / "prompts.txt": "nor a .safetensors file",
        tmp_path / "killed": "holds no model.*it has checkpoint-4",
    }.items():
        with pytest.raises(evaluate.UserError, match=told) as error:
            run(model=[f"m={path}"])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "evaluation").exists()
    weights = load_file(full / "replay" / "iteration-0.safetensors")
    save_file({f"x.{name}": weight for name, weight in weights.items()}, tmp_path / "other.safetensors")
    with pytest.raises(evaluate.UserError, match="other.safetensors does not fit the base"):
        run(model=[str(tmp_path / "other.safetensors")])


@pytest.mark.parametrize(
    "words, told",
    [
        (["--model", "a/x", "--model", "b/x"], "two models are called x"),
        (["--scorer", "nonesuch"], "none of pickscore, hpsv2"),
        (["--scorer", "fvd"], "fvd=NETWORK"),
        (["--scorer", "psnr"], "needs --reference_dir"),
        (["--images_per_prompt", "0"], "--images_per_prompt: must be more than 0"),
        (["--lora_alpha", "-1"], "--lora_alpha: must be more than 0"),
        (["--height", "60"], "--height: must be a multiple of 8"),
        (["--seed", "-1"], "--seed: must be at least 0"),
    ],
)
def test_wrong_flags_end_in_one_line(words, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["--base", "b", "--prompts", "p", *words])
    printed = capsys.readouterr().err
    assert told in printed and printed.count("\n") == 1


def test_a_newcomer_sees_the_table_and_nothing_that_frightens(sd, sd_v, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "judge.py").write_text(JUDGE)
    command = [sys.executable, HERE / "evaluate.py", "--base", sd, "--model", f"other={sd_v}"]
    command += ["--prompts", "prompts.txt", "--num_inference_steps", 2, "--scorer", "judge.py:redness"]
    result = newcomer(command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not notices(result.stderr)
    assert "redness" in result.stdout and "index.html" in result.stdout
    result = newcomer([*command, "--scorer", "judge.py:absent"], cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("evaluate.py: judge.py:absent cannot be imported")
    assert result.stderr.count("\n") == 1


def test_models_are_named_after_their_run():
    named = {
        "runs/mine": "mine",
        "name=runs/mine": "name",
        "runs/mine/checkpoint-30": "mine-checkpoint-30",
        "runs/mine/replay/iteration-2.safetensors": "mine-iteration-2",
        "lora.safetensors": "lora",
    }
    assert {text: evaluate.named_model(text)[0] for text in named} == named


# ---- prompts ----


def test_prompts_are_read_from_every_form(tmp_path):
    rows = [{"Prompt": "a cat", "n": 1}, {"Prompt": " a dog ", "n": 2}, {"Prompt": "a cat", "n": 3}]
    table = datasets.Dataset.from_list(rows)
    table.to_json(tmp_path / "a.jsonl")
    table.to_csv(tmp_path / "a.csv")
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "list.json").write_text('["a cat", "a dog"]')  # the form of HPSv2's benchmark

    def load(name, *words):
        words = ["--base", "b", "--prompts", str(tmp_path / name), "--cache_dir", str(tmp_path / "cache"), *words]
        return evaluate.load_prompts(evaluate.parse_args(words))

    for name in ("a.jsonl", "a.csv", "set", "saved", "a.txt", "list.json"):
        assert load(name) == ["a cat", "a dog"], name
    (tmp_path / "many.txt").write_text("\n".join(f"prompt {i}" for i in range(400)))
    some, fewer, all_of_them = (load("many.txt", "--max_prompts", n) for n in ("100", "40", "1000"))
    assert len(some) == 100 and set(fewer) < set(some) and len(fewer) == 40 and len(all_of_them) == 400
    assert [prompt for prompt in all_of_them if prompt in some] == some, "in the set's order"
    assert 30 < sum(int(prompt.split()[1]) < 200 for prompt in some) < 70, "from all over the set"
    with pytest.raises(evaluate.UserError, match="no column caption: it has Prompt, n; name .* --prompt_column"):
        load("a.jsonl", "--prompt_column", "caption")
    with pytest.raises(evaluate.UserError, match="column n of row 0 is 1, not text"):
        load("a.jsonl", "--prompt_column", "n")
    with pytest.raises(evaluate.UserError, match="partiprompts cannot be opened"):
        evaluate.load_prompts(evaluate.parse_args(["--base", "b", "--prompts", "partiprompts"]))  # no hub here


# ---- scores ----


@pytest.fixture(scope="module")
def pictures():
    return [tiny.picture(caption) for caption in PROMPTS]


def tiny_clip(folder, width=64):
    """A random CLIP model in `folder`, as transformers saves one."""
    torch.manual_seed(0)
    size = dict(hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2)
    text = dict(size, vocab_size=600, max_position_embeddings=24, bos_token_id=512, eos_token_id=513, pad_token_id=513)
    vision = dict(size, image_size=32, patch_size=8, hidden_size=width + 2)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)  # no two layers alike, no bias zero
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    scorers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return model


def cosine(model, folder, pictures, prompts):
    """The cosine of each picture, or pixels, and its prompt, one by one."""
    tokenizer, processor = tiny.tokenizer(), scorers.CLIPImageProcessorPil.from_pretrained(folder)
    values = []
    for picture, prompt in zip(pictures, prompts):
        pixels = picture
        if not torch.is_tensor(picture):
            pixels = processor(images=picture, return_tensors="pt").pixel_values
        with torch.no_grad():
            output = model(input_ids=tokenizer([prompt], return_tensors="pt").input_ids, pixel_values=pixels)
        values.append(torch.cosine_similarity(output.image_embeds, output.text_embeds).item())
    return np.array(values)


def score(name, where, pictures):
    return scorers.load_scorer(name, str(where), "cpu")(pictures, PROMPTS)[name]


def test_pickscore_and_clip_score(pictures, tmp_path):
    model = tiny_clip(tmp_path)
    expected = cosine(model, tmp_path, pictures, PROMPTS)
    np.testing.assert_allclose(score("clip", tmp_path, pictures), 100 * expected.clip(min=0), atol=1e-4)
    scale = model.logit_scale.exp().item()
    np.testing.assert_allclose(score("pickscore", tmp_path, pictures), scale * expected, atol=1e-4)


def as_open_clip(model):
    """The weights of a CLIPModel as open_clip names and lays them out."""
    weights, out = {k: v.clone() for k, v in model.state_dict().items()}, {}
    for side, mine, layers in (("vision_model", "visual.", 2), ("text_model", "", 2)):
        for i in range(layers):
            old, new = f"{side}.encoder.layers.{i}", f"{mine}transformer.resblocks.{i}"
            for part in ("weight", "bias"):
                take = [weights.pop(f"{old}.self_attn.{letter}_proj.{part}") for letter in "qkv"]
                out[f"{new}.attn.in_proj_{part}"] = torch.cat(take)
                names = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
                names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
                for a, b in names.items():
                    out[f"{new}.{b}.{part}"] = weights.pop(f"{old}.{a}.{part}")
    for a, b in {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}.items():
        for part in ("weight", "bias"):
            out[f"visual.{b}.{part}"] = weights.pop(f"vision_model.{a}.{part}")
    for part in ("weight", "bias"):
        out[f"ln_final.{part}"] = weights.pop(f"text_model.final_layer_norm.{part}")
    for side, mine in (("vision_model", "visual."), ("text_model", "")):
        out[f"{mine}positional_embedding"] = weights.pop(f"{side}.embeddings.position_embedding.weight")
    out["visual.class_embedding"] = weights.pop("vision_model.embeddings.class_embedding")
    out["visual.conv1.weight"] = weights.pop("vision_model.embeddings.patch_embedding.weight")
    out["token_embedding.weight"] = weights.pop("text_model.embeddings.token_embedding.weight")
    out["visual.proj"] = weights.pop("visual_projection.weight").T.contiguous()
    out["text_projection"] = weights.pop("text_projection.weight").T.contiguous()
    out["logit_scale"] = weights.pop("logit_scale")
    assert not weights
    return out


@pytest.mark.parametrize("name, file", [("hpsv2", "HPS_v2_compressed.pt"), ("hpsv2.1", "HPS_v2.1_compressed.pt")])
def test_hps_reads_its_authors_file(pictures, tmp_path, name, file):
    """Each version its own file. The whole picture counts: it is fitted in with black bars, not cropped."""
    model = tiny_clip(tmp_path)
    torch.save({"state_dict": as_open_clip(model)}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    mean, std = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[..., None, None]
    boxed = []
    for picture in pictures:  # 72 x 64 in 32 x 32, each channel in floating point and without rounding
        channels = [Image.fromarray(np.asarray(channel, np.float32) / 255) for channel in picture.split()]
        box = np.zeros((3, 32, 32))
        box[:, 2:30] = [np.asarray(channel.resize((32, 28), Image.Resampling.BICUBIC)) for channel in channels]
        boxed.append(torch.from_numpy((box - mean) / std).float()[None])
    expected = 100 * cosine(model, tmp_path, boxed, PROMPTS)
    np.testing.assert_allclose(score(name, tmp_path, pictures), expected, atol=1e-4)
    with pytest.raises(evaluate.UserError, match="cannot be loaded from"):
        score({"hpsv2": "hpsv2.1", "hpsv2.1": "hpsv2"}[name], tmp_path, pictures)


@pytest.mark.parametrize("name", ["pickscore", "aesthetic"])
def test_weights_that_lack_some_are_refused(tmp_path, name):
    """transformers would fill them with random numbers."""
    tiny_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if name == "aesthetic":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config["vision_config"] | {"projection_dim": 40}))
    with pytest.raises(evaluate.UserError, match="weights are missing"):
        score(name, tmp_path, [])


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_weights_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_clip(tmp_path)
    torch.save({"state_dict": Trap()}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(evaluate.UserError, match="hpsv2=FOLDER") as error:
        score("hpsv2", tmp_path, [])
    assert "\n" not in str(error.value) and not (tmp_path / "trapped").exists()


def test_aesthetic_predictor(pictures, tmp_path):
    """In the layout of its repository: CLIP's picture encoder and the head in one file, under a type of its own."""
    torch.manual_seed(0)
    size = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=40)
    model = scorers.AestheticPredictor(CLIPVisionConfig(image_size=32, patch_size=8, **size)).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(model_type="aesthetics_predictor", architectures=["AestheticsPredictorV2Linear"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    crop = {"height": 32, "width": 32}
    processor = scorers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        embeds = model(pixel_values=processor(images=pictures, return_tensors="pt").pixel_values).image_embeds
        x = embeds / embeds.norm(dim=1, keepdim=True)
        for i in (0, 2, 4, 6, 7):
            x = x @ model.layers[i].weight.T + model.layers[i].bias
    np.testing.assert_allclose(score("aesthetic", tmp_path, pictures), x[:, 0], atol=1e-5)


def test_image_reward_reads_its_authors_file(pictures, tmp_path):
    """BLIP by its authors' names, an MLP, and the mean and deviation of the reward."""
    torch.manual_seed(0)
    size = dict(intermediate_size=96, num_hidden_layers=2)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=128, num_attention_heads=2, image_size=32, patch_size=8, layer_norm_eps=1e-6, **size
        )
    ).eval()
    ids = dict(vocab_size=600, bos_token_id=None, sep_token_id=None, pad_token_id=513, eos_token_id=513)
    config = BlipTextConfig(hidden_size=64, encoder_hidden_size=128, num_attention_heads=1, **ids, **size)
    text = BlipTextModel(config, add_pooling_layer=False).eval()
    head = scorers.scoring_head(64).eval()
    names = {"encoder.layers.": "blocks.", ".self_attn.projection.": ".attn.proj.", ".self_attn.": ".attn."}
    names |= {".layer_norm1.": ".norm1.", ".layer_norm2.": ".norm2.", "post_layernorm.": "norm."}
    names |= {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed"}
    names |= {"embeddings.patch_embedding.": "patch_embed.proj."}
    with torch.no_grad():
        for weight in vision.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    saved = {f"mlp.layers.{name}": weight for name, weight in head.state_dict().items()}
    saved |= {f"blip.text_encoder.{name}": weight for name, weight in text.state_dict().items()}
    saved["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    saved["blip.vision_proj.weight"] = torch.zeros(3)  # not used
    for name, weight in vision.state_dict().items():
        for mine, authors in names.items():
            name = name.replace(mine, authors)
        saved[f"blip.visual_encoder.{name}"] = weight
    torch.save(saved, tmp_path / "ImageReward.pt")
    tiny.tokenizer(35).save_pretrained(tmp_path)

    crop = {"height": 32, "width": 32}
    processor = scorers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    expected = []
    for picture, prompt in zip(pictures, PROMPTS):
        with torch.no_grad():
            seen = vision(pixel_values=processor(images=picture, return_tensors="pt").pixel_values).last_hidden_state
            tokens = tiny.tokenizer(35)([prompt], return_tensors="pt").input_ids
            read = text(input_ids=tokens, encoder_hidden_states=seen).last_hidden_state[:, 0]
            expected.append(((head(read) - 0.16717362830052426) / 1.0333394966054072).item())
    np.testing.assert_allclose(score("imagereward", tmp_path, pictures), expected, atol=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-4


def test_scorers_of_ones_own(run, tmp_path):
    """By path.py:function, with a name or without; what it gets wrong is told in one line."""
    (tmp_path / "judge.py").write_text(
        JUDGE
        + "def two(pictures, prompts):\n    return {'n': [len(p) for p in prompts], 'one': [1] * len(prompts)}\n"
        + "def short(pictures, prompts):\n    return [1]\n"
        + "def unknown(pictures, prompts):\n    return [float('nan')] * len(prompts)\n"
    )
    where = str(tmp_path / "judge.py")
    found = run(scorer=[f"{where}:redness", f"mine={where}:two"])
    for sample in found["samples"]:
        pixel = Image.open(tmp_path / "evaluation" / sample["file"]).getpixel((0, 0))[0]
        assert sample["scores"] == {"redness": pixel, "mine/n": len(sample["prompt"]), "mine/one": 1}
    for name, told in {
        "short": "gave 1 numbers for 2",
        "unknown": "gave nan for",
        "absent": "cannot be imported",
    }.items():
        with pytest.raises(evaluate.UserError, match=told):
            run(scorer=[f"{where}:{name}"])


def test_a_scorer_that_is_missing_is_told_before_anything_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "draw_missing", lambda *_: pytest.fail("something was drawn"))
    absent = f"{tmp_path / 'judge.py'}:absent"
    for spec, told in {absent: "cannot be imported", "pickscore": "cannot be loaded"}.items():  # no hub here
        with pytest.raises(evaluate.UserError, match=told):
            run(scorer=[spec])


def test_a_scorer_may_be_called_as_a_module_of_ours(tmp_path, monkeypatch):
    (tmp_path / "scorers.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    assert scorers.load_scorer("mine", "scorers:redness", "cpu")([red], ["x"]) == {"mine": [200]}


def test_a_scorer_may_have_a_dataclass_with_names_for_types(tmp_path):
    """For these dataclasses look into the module where it is registered."""
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", "@dataclass", "class Judge:"]
    lines += ["    bias: float = 1.0", "def biased(pictures, prompts):", "    return [Judge().bias for _ in pictures]"]
    (tmp_path / "judge.py").write_text("\n".join(lines))
    found = scorers.load_scorer("mine", f"{tmp_path / 'judge.py'}:biased", "cpu")([Image.new("RGB", (8, 8))], ["x"])
    assert found == {"mine": [1.0]}


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch):
    """Pictures of what was pushed before must not be taken for those of what is there now."""
    commits = iter(["0123", "0123", "4567"])
    monkeypatch.setattr(evaluate.huggingface_hub, "list_repo_files", lambda path: ["pytorch_lora_weights.safetensors"])
    info = lambda self, path: SimpleNamespace(sha=next(commits))  # noqa: E731
    monkeypatch.setattr(evaluate.huggingface_hub.HfApi, "repo_info", info)
    args = SimpleNamespace(motion_adapter_name_or_path=None)
    first, same, pushed = (evaluate.find_model("run", "me/lora", args) for _ in range(3))
    assert first == same and first != pushed


def test_the_emoji_scorer_serves(tmp_path):
    captions = glyphs.HELD_OUT[:3]
    renders = [Image.fromarray(np.asarray(glyphs.render(caption, 4_000_000))) for caption in captions]
    spec = evaluate.scorer_spec(f"emoji={QUICKSTART / 'scorer.py'}:scores")
    values = scorers.load_scorer(spec.name, spec.where, "cpu")(renders, captions)
    whole = emoji_scorer.score(renders, captions)
    assert set(values) == {"emoji/preference", "emoji/identity", "emoji/score"}
    assert np.mean(values["emoji/score"]) == pytest.approx(whole["score"], abs=1e-6) and whole["score"] > 0.8


# ---- clips ----


def test_a_clip_is_read_as_it_was_written(tmp_path):
    frames = tiny.moving_frames(PROMPTS[0], count=5)
    frames[2] = frames[3] = frames[1]  # encoders make one long frame of these
    args = argparse.Namespace(fps=24, num_frames=5)
    evaluate.write_picture(frames, tmp_path / "clip.webp", fps=24)
    read = evaluate.read_picture(tmp_path / "clip.webp", args)
    assert len(read) == 5 and tiny.difference(flat(read), flat(frames)) == 0


@pytest.mark.parametrize("count", [1, 5])
def test_a_clip_that_does_not_move_is_read_as_it_was_written(tmp_path, count):
    """Encoders make a still of it, which says nothing of time."""
    frames = [tiny.picture(PROMPTS[0])] * count
    args = argparse.Namespace(fps=24, num_frames=count)
    evaluate.write_picture(frames, tmp_path / "clip.webp", fps=24)
    read = evaluate.read_picture(tmp_path / "clip.webp", args)
    assert len(read) == count and tiny.difference(flat(read), flat(frames)) == 0


def references(base, folder, *words):
    """The real clips in `folder`, as clips of `base` are held against them."""
    args = ["--base", base, "--prompts", "x", "--reference_dir", str(folder), "--height", "32", "--width", "32"]
    args = evaluate.parse_args([*args, *words])
    evaluate.find_base(args)
    return evaluate.load_references(args)


@pytest.fixture
def real(tmp_path):
    """real(frames) is a folder with a real clip of them, 8 a second, of the first prompt."""

    def write(frames):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.mp4", "text": PROMPTS[0]}))
        tiny.write_clip(tmp_path / "0.mp4", frames)
        return tmp_path

    return write


def test_real_clips_are_read_at_the_rate_of_the_model(real, wan):
    """As train_sspo_wan.py reads winners, but from the first frame on."""
    folder = real([Image.new("RGB", (64, 64), (5 + 8 * i,) * 3) for i in range(12)])

    def taken(*words):
        clip = references(wan, folder, "--num_frames", "5", *words).first(PROMPTS[0])
        return [round((grey - 5) / 8) for grey in (clip.mean((1, 2, 3)) * 255).tolist()]

    assert taken("--fps", "16") == [0, 1, 1, 2, 2]
    assert taken("--fps", "4") == [0, 2, 4, 6, 8]
    assert taken("--fps", "4", "--frame_stride", "1") == [0, 1, 2, 3, 4]
    assert taken("--frame_stride", "0") == [0, 3, 6, 8, 11]
    with pytest.raises(
        evaluate.UserError, match="12 frames of 8 a second, and 5 at --fps 2 need 17; lower --num_frames"
    ):
        taken("--fps", "2")
    with pytest.raises(evaluate.UserError, match="12 frames, and 5 at --frame_stride 4 need 17; lower --frame_stride"):
        taken("--frame_stride", "4")


def test_a_real_clip_filmed_upright_is_turned(real, wan):
    """A telephone writes the frames lying, and a matrix into the track's header that turns them by 90 degrees."""
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (32, 0, 64, 32))  # the top right corner, which belongs to the bottom right
    folder = real([picture] * 5)
    content = bytearray((folder / "0.mp4").read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30]
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    (folder / "0.mp4").write_bytes(content)
    clip = references(wan, folder, "--num_frames", "5", "--frame_stride", "1").first(PROMPTS[0])
    assert clip[0, 0, 28, 28] > 0.8 > 0.2 > clip[0, 0, 4, 28]


@pytest.fixture(scope="module")
def evaluated_clips(trained, tmp_path_factory):
    """Base and aligned clips against real ones: output_dir and results."""
    base, adapter, folder = trained("video", "lora")
    real = tiny.folder_of_clips(tmp_path_factory.mktemp("real") / "clips", count=4, length=4)
    output = tmp_path_factory.mktemp("clips")
    (output / "judge.py").write_text(JUDGE)
    (output / "net.py").write_text("def features(clips):\n    return clips.mean((3, 4)).flatten(1)[:, ::6]\n")
    words = ["--base", base, "--motion_adapter_name_or_path", adapter, "--model", f"run={folder}"]
    words += ["--prompts", Path(real) / "metadata.jsonl", "--num_frames", 4, "--height", 32, "--width", 32]
    words += ["--num_inference_steps", 2, "--reference_dir", real, "--frame_stride", 1, "--output_dir", output / "out"]
    words += ["--scorer", "ssim", "--scorer", "psnr", "--scorer", f"fvd={output / 'net.py'}:features"]
    words += ["--scorer", f"{output / 'judge.py'}:redness"]
    args = evaluate.parse_args(list(map(str, words)))
    evaluate.main(args)
    return args, json.loads((output / "out" / "results.json").read_text())


def test_clips_are_scored_frame_by_frame_and_against_real_ones(evaluated_clips):
    args, found = evaluated_clips
    references = evaluate.load_references(args)
    for sample in found["samples"]:
        frames = evaluate.read_picture(Path(args.output_dir, sample["file"]), args)
        assert len(frames) == 4
        assert sample["scores"]["redness"] == np.mean([frame.getpixel((0, 0))[0] for frame in frames])
        error = np.mean((flat(frames) / 255 - references.first(sample["prompt"]).permute(0, 2, 3, 1).numpy()) ** 2)
        assert sample["scores"]["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
        assert -1 <= sample["scores"]["ssim"] < 1


def test_fvd_is_the_frechet_distance_of_the_features(evaluated_clips):
    args, found = evaluated_clips

    def moments(clips):
        features = np.stack([clip.transpose(0, 1).mean((2, 3)).flatten()[::6].numpy() * 255 for clip in clips])
        return features.mean(0), np.cov(features.T)

    mean, covariance = moments(evaluate.load_references(args).everything())
    for name, value in found["fvd"].items():
        files = [Path(args.output_dir, s["file"]) for s in found["samples"] if s["model"] == name]
        mean_2, covariance_2 = moments([clip_measures.to_tensor(evaluate.read_picture(file, args)) for file in files])
        root = scipy.linalg.sqrtm(covariance @ covariance_2).real
        expected = np.sum((mean - mean_2) ** 2) + np.trace(covariance + covariance_2 - 2 * root)
        assert value == pytest.approx(expected, rel=1e-3)


def test_a_torchscript_network_gives_the_features(tmp_path):
    class Network(torch.nn.Module):
        def forward(self, clips, return_features: bool = False):
            return clips.flatten(1)[:, :3] if return_features else clips.flatten(1)[:, :9]

    torch.jit.script(Network()).save(tmp_path / "net.pt")
    network = clip_measures.FeatureNetwork(str(tmp_path / "net.pt"), "cpu")
    assert network(torch.rand(2, 3, 4, 8, 8)).shape == (2, 3), "it is asked for features, not for classes"
    (tmp_path / "bad.pt").write_text("nothing")
    with pytest.raises(evaluate.UserError, match="is no TorchScript file"):
        clip_measures.FeatureNetwork(str(tmp_path / "bad.pt"), "cpu")


def test_lpips_says_what_it_needs():
    pytest.importorskip("torchmetrics")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(evaluate.UserError, match="pip install torchmetrics torchvision"):
            clip_measures.load_metric("lpips", "cpu")
    else:
        pytest.skip("torchvision is installed: nothing is missing")


# ---- statistics ----


def test_intervals_and_win_rates_are_what_scipy_says():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 3))
    scores = base + rng.normal(0.2, 1, size=(40, 3)) + rng.normal(0, 0.5, size=(40, 1))
    scores[:5] = base[:5]  # ties
    told = evaluate.compare(scores, base, seed=1, resamples=20_000)
    for key, values in {
        "difference": (scores - base).mean(1),
        "win_rate": ((scores > base) + 0.5 * (scores == base)).mean(1),
    }.items():
        theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=7)
        assert told[key] == pytest.approx(values.mean())
        np.testing.assert_allclose(told[f"{key}_interval"], theirs.confidence_interval, atol=0.01)
    again = evaluate.compare(scores, base, seed=1, resamples=20_000)
    assert again == told and evaluate.compare(scores, base, seed=2) != told, "keyed by the seed"
    lower = evaluate.compare(scores, base, seed=1, resamples=20_000, lower_is_better=True)
    assert lower["win_rate"] == pytest.approx(1 - told["win_rate"])
    assert lower["difference"] == told["difference"]


def test_the_table_is_made_of_what_results_hold(run, sd_v, tmp_path, capsys):
    found = run(model=[f"other={sd_v}"], images_per_prompt=2)
    of = {m: [s["scores"]["redness"] for s in found["samples"] if s["model"] == m] for m in ("base", "other")}
    row = next(row for row in found["table"] if row["model"] == "other")
    assert row["mean"] == pytest.approx(np.mean(of["other"]))
    assert row["difference"] == pytest.approx(np.mean(of["other"]) - np.mean(of["base"]))
    printed = capsys.readouterr().out
    assert f"{row['win_rate']:.1%}" in printed and f"{row['mean']:.4f}" in printed
    assert "difference to the base" in printed and "intervals are too narrow" in printed, "for two prompts"


def page_data(page):
    """What a run's page is made of."""
    return json.loads(page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_models_may_be_compared_with_another_than_the_base(run, sd_v, tmp_path, capsys):
    plain = run(model=[f"other={sd_v}"])
    capsys.readouterr()
    found = run(model=[f"other={sd_v}"], against="other")
    rows = [{row["model"]: row for row in result["table"]} for result in (plain, found)]
    assert rows[1]["base"]["difference"] == pytest.approx(-rows[0]["other"]["difference"])
    assert rows[1]["base"]["win_rate"] == pytest.approx(1 - rows[0]["other"]["win_rate"])
    assert "difference" not in rows[1]["other"]
    assert "difference to other" in capsys.readouterr().out
    shown = page_data(tmp_path / "evaluation" / "index.html")
    assert shown["models"][shown["against"]] == "other" and "intervals are too narrow" in shown["about"]
    with pytest.raises(SystemExit):
        run(against="another")
    assert "--against another is none of the models, which are called base" in capsys.readouterr().err


# ---- the page ----

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
CHROMIUM_FLAGS += "--disable-component-update --disable-sync --run-all-compositor-stages-before-draw "
CHROMIUM_FLAGS += "--virtual-time-budget=60000"  # milliseconds, which pass at once where nothing happens


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """index.html of three models, 40 prompts and two scorers, of which the second is better when lower; its scores."""
    folder, models = tmp_path_factory.mktemp("page"), ["base", "one", "two"]
    args = evaluate.parse_args(["--base", "b", "--prompts", "p", "--output_dir", str(folder)])
    args.height = args.width = 16
    args.guidance_scale, args.clips, args.fps = 7.5, False, 8
    samples = evaluate.make_samples([f"prompt {i} <b>&amp;</script><!--<script>" for i in range(40)], args)
    rng = np.random.default_rng(0)
    for name in models:
        (folder / "images" / name).mkdir(parents=True)
        for sample in samples:
            color = tuple(map(int, rng.integers(256, size=3)))
            evaluate.write_picture(Image.new("RGB", (16, 16), color), folder / "images" / name / sample.file, 8)
    scores = {scorer: {name: rng.normal(size=40).round(3) for name in models} for scorer in ("mine", "lpips")}
    evaluate.write_page(samples, models, scores, evaluate.make_table(scores, models, args), args)
    return folder / "index.html", scores


@pytest.fixture
def browse(page, tmp_path):
    """browse(script, view, file) opens the page in Chromium, runs the script in it and returns what that returns."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    copy = tmp_path / "index.html"

    def told(script, view="pictures", file=page[0]):
        driver = f"<script>(async () => {{ {script} }})().catch(String).then(told => {{"
        driver += "const pre = document.createElement('pre'); pre.id = 'told'; pre.textContent = JSON.stringify(told);"
        driver += "document.body.append(pre); });</script>"
        copy.write_text(file.read_text().replace("</body>", driver + "</body>"))
        command = [CHROMIUM, *CHROMIUM_FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        result = subprocess.run([*command, f"{copy.as_uri()}#{view}"], capture_output=True, text=True, timeout=60)
        found = re.search(r'<pre id="told">(.*?)</pre>', result.stdout, re.DOTALL)
        assert found, result.stderr[-2000:]
        return json.loads(html.unescape(found.group(1)))

    return told


def test_votes_are_of_these_pictures(tmp_path):
    """A page made anew of other weights begins without the votes on the old ones; of the same pictures it has them."""
    args = evaluate.parse_args(["--base", "b", "--prompts", "p", "--output_dir", str(tmp_path)])
    args.height = args.width = 16
    args.guidance_scale, args.clips = 7.5, False
    samples, drawn = evaluate.make_samples(["a prompt"], args), []
    (tmp_path / "images" / "base").mkdir(parents=True)
    for colour in ("red", "red", "blue"):
        evaluate.write_picture(Image.new("RGB", (16, 16), colour), tmp_path / "images" / "base" / samples[0].file, 8)
        evaluate.write_page(samples, ["base"], {}, [], args)
        drawn.append(page_data(tmp_path / "index.html")["drawn"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_page_needs_no_network_and_shows_every_picture(page, browse):
    source = page[0].read_text()
    assert not re.search(r"https?://|src=|<link", source.split("<script")[0]), "everything is inside"
    told = browse("""
        const images = [...document.querySelectorAll("#rows img")];
        await Promise.all(images.map(image => image.decode()));
        const first = document.querySelectorAll("#rows .sample").length;
        while (document.querySelectorAll("#rows .sample").length < 40) {
            scrollTo(0, document.body.scrollHeight);
            await new Promise(done => setTimeout(done, 50));
        }
        return {first, widths: images.map(image => image.naturalWidth), blind: document.getElementById("blind").hidden,
                title: document.querySelector("h2").textContent, cells: document.querySelectorAll("td").length};
    """)
    assert told["first"] < 40, "rows are made as one scrolls"
    assert set(told["widths"]) == {16} and len(told["widths"]) == 3 * told["first"]
    assert told["title"] == "prompt 0 <b>&amp;</script><!--<script>"
    assert told["blind"] and told["cells"] == 6 * 5


def test_the_page_opens_by_itself_with_a_sample_that_no_run_shows(page, browse):
    script = """
        const images = [...document.querySelectorAll("#rows img")];
        await Promise.all(images.map(image => image.decode()));
        return {widths: images.map(image => image.naturalWidth), cells: document.querySelectorAll("td").length,
                about: document.getElementById("about").textContent, prompts: data.samples.map(({prompt}) => prompt),
                numbers: data.samples.every(sample => sample.scores.flat().every(Number.isFinite))};
    """
    sample, told = browse(script, file=HERE / "page.html"), browse(script)
    assert len(sample["widths"]) == 9 and min(sample["widths"]) > 0 and sample["numbers"]
    assert sample["cells"] == 6 * 5 and "sample" in sample["about"]
    assert "3 models, 40 prompts" in told["about"] and not set(sample["prompts"]) & set(told["prompts"])
    assert sample["about"] not in page[0].read_text()


def test_rows_are_sorted_by_the_difference_and_filtered_by_words(page, browse):
    _, scores = page
    told = browse("""
        const set = (id, value) => { const it = document.getElementById(id); it.value = value;
            it.dispatchEvent(new Event(id === "filter" ? "input" : "change")); };
        const titles = () => rows.map(row => Number(row.prompt.split(" ")[1]));
        const told = {};
        set("sort", 0); set("model", 2); told.gain = titles();
        set("order", -1); told.loss = titles();
        set("sort", 1); set("order", 1); told.lower = titles();
        set("filter", "PROMPT 3"); told.filtered = [titles(), document.getElementById("count").textContent];
        return told;
    """)
    gained = scores["mine"]["two"] - scores["mine"]["base"]
    assert told["gain"] == list(np.argsort(-gained)) and told["loss"] == list(np.argsort(gained))
    lower = scores["lpips"]["two"] - scores["lpips"]["base"]
    assert told["lower"] == list(np.argsort(lower)), "the largest gain is the largest fall of lpips"
    found, count = told["filtered"]
    assert set(found) == {i for i in range(40) if "3" in str(i)} and count == f"{len(found)} of 40"


VOTING = """
    const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    const text = id => document.getElementById(id).textContent;
"""


def test_a_person_votes_blindly_with_the_keyboard(page, browse):
    script = """
        const shown = () => ["left", "right"].map(id => document.getElementById(id).src);
        const places = [];
        const keys = ["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowLeft", "Backspace", "ArrowDown", "ArrowLeft"];
        for (const key of keys) {
            const sample = openTurn();
            places.push(...sides(sample).map((model, side) => sample.pictures[model] === shown()[side]));
            press(key);
        }
        let saved;
        URL.createObjectURL = blob => { saved = blob.text(); return "#blind"; };
        download();
        const before = text("result");
        document.getElementById("tell").click();
        return {before, placed: places.every(Boolean), kept: JSON.parse(localStorage.getItem(STORE)),
                result: text("result"), progress: text("progress"), saved: JSON.parse(await saved)};
    """
    told = browse(VOTING + script, "blind")
    votes = told["kept"]
    assert told["before"] == "", "the rate so far would tell which side was which"
    assert told["placed"] and told["progress"] == "5 of 40 judged"
    assert [vote["winner"] and (vote["winner"] == vote["left"]) for vote in votes] == [True, False, None, None, True]
    assert all({vote["left"], vote["right"]} == {"base", "one"} for vote in votes)
    wins = sum(vote["winner"] == "one" for vote in votes) + 1  # two ties are a win
    low, high = scipy.stats.binomtest(wins, 5).proportion_ci(method="wilson")
    assert f"one wins {wins / 5:.1%}".replace("%", " %") in told["result"]
    assert f"{100 * low:.1f} % to {100 * high:.1f} %" in told["result"]
    assert told["saved"]["votes"] == votes and told["saved"]["summary"]["win_rate"] == wins / 5

    again = browse(VOTING + 'press("Backspace"); return [votes, text("progress")];', "blind")
    assert again == [votes[:-1], "4 of 40 judged"], "the votes outlive the page, and can still be undone"


def test_sides_are_shuffled_by_a_keyed_draw(browse):
    script = "return data.samples.map(sample => [sides(sample)[0], turns.indexOf(sample)]);"
    first, again = browse(script, "blind"), browse(script, "blind")
    assert first == again
    assert 8 < sum(left for left, _ in first) < 32, "each is on either side about as often"
    assert [turn for _, turn in first] != list(range(40)), "the order tells nothing"
