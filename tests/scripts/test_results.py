"""What every script leaves: a result that draws in the stock pipeline what the run drew, its card, the trackers."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from helpers import EVERY, keep_models, with_every, with_shared_code
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file

from train_sspo_sd import keyed_noise


PROMPTS = ["a red circle", "a blue square"]
FRAMES = 4


@pytest.fixture(params=["sd", "sdxl", "video"])
def kind(request):
    return request.param


@pytest.fixture
def stock(request, kind):
    """The stock pipeline of the base; for clips with the schedule that motion adapters are trained with."""
    if kind == "video":
        base, adapter = request.getfixturevalue("motion")
        pipeline = AnimateDiffPipeline.from_pretrained(base, motion_adapter=MotionAdapter.from_pretrained(adapter))
        betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
        pipeline.scheduler = DDPMScheduler(**betas, steps_offset=1, clip_sample=False)
        return pipeline
    family = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind]
    return family.from_pretrained(request.getfixturevalue(kind))


def by_the_card(run):
    """The pipeline that the lines of Python in a run's model card make."""
    code = (run.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    assert '.to("cuda")' in code
    exec(code.replace(f'"{run.path.name}"', f'"{run.path}"').replace('.to("cuda")', ""), names)
    return names["pipeline"]


def drawn_by(pipeline, kind, seed=0, image=0):
    """What a stock pipeline draws, with a run's sampler and the noise of its validation: a list of frames a prompt."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=3, guidance_scale={"sd": 7.5, "sdxl": 5.0, "video": 8.0}[kind])
    shape, size = ((4, FRAMES, 4, 4), 32) if kind == "video" else ((4, 8, 8), 64)
    noise = keyed_noise("validation", seed, [(i, image) for i in range(len(PROMPTS))], shape)
    if kind == "video":
        options["num_frames"] = FRAMES
    output = pipeline(PROMPTS, latents=noise, height=size, width=size, output_type="pil", **options)
    return output.frames if kind == "video" else [[picture] for picture in output.images]


def drawn_in(run, kind, step=4, images=1):
    """
    samples/step-N.png as rows (base, policy, base, policy, ... for each of `images`) of a list of frames a prompt. The
    rows of a clip are those of its strip, in which a prompt's rows stand together.
    """
    path = run.path / "samples" / f"step-{step}.png"
    if kind != "video":
        return [[[picture] for picture in row] for row in tiny.rows_of(path, 2 * images, len(PROMPTS))]
    strips = tiny.rows_of(path, 2 * images * len(PROMPTS), FRAMES)
    return [strips[row :: 2 * images] for row in range(2 * images)]


def same(ours, theirs):
    """Whether two lists of lists of frames are the same but for rounding to 1/255."""
    pairs = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    return all(tiny.difference(a, b) <= 1 for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [
        dict(train_mode="lora"),
        dict(train_mode="lora", lora_alpha=2, use_8bit_adam=True, gradient_checkpointing=True),
        dict(train_mode="full", use_8bit_adam=True, ssr="indicator", split_pairs=True),
        dict(train_mode="full", optimizer="adafactor", cache_latents=True, draws_per_pair=2),
    ],
)
def test_result_loads_in_the_stock_pipeline_and_draws_what_the_run_drew(trains, kind, stock, options):
    """
    By the lines of the model card. The base's samples stand above the policy's; also if alpha is not the rank, and if
    the VAE was put away because latents are cached.
    """
    run = trains[kind](validation_prompts=PROMPTS, learning_rate=5e-3, **options)
    above, below = drawn_in(run, kind)
    assert same(above, drawn_by(stock, kind))
    assert same(below, drawn_by(by_the_card(run), kind))
    assert not same(above, below), "training shows"
    assert not list(run.path.rglob("*.bin")), "safetensors only"


def test_each_validation_image_has_noise_of_its_own(trains, kind, stock):
    run = trains[kind](validation_prompts=PROMPTS, num_validation_images=2, max_train_steps=1, seed=3)
    rows = drawn_in(run, kind, step=1, images=2)
    assert same(rows[0], drawn_by(stock, kind, seed=3))
    assert same(rows[2], drawn_by(stock, kind, seed=3, image=1))
    assert not same(rows[0], rows[2])


def test_lora_leaves_the_base_alone(trains, kind, stock, monkeypatch):
    kept = keep_models(monkeypatch, trains[kind].script)
    trains[kind](learning_rate=1e-2)
    weights = {name.replace(".base_layer", ""): weight for name, weight in kept[0].denoiser.state_dict().items()}
    assert all(torch.equal(weights[name], weight) for name, weight in stock.unet.state_dict().items())


def test_full_run_trains_every_weight_of_the_denoiser_and_nothing_else(trains, kind, stock):
    """For clips every weight of the motion modules, and the result is a motion adapter and nothing more."""
    run = trains[kind](train_mode="full")
    result = by_the_card(run)
    trained = {name for name, _ in stock.unet.named_parameters() if kind != "video" or ".motion_modules." in name}
    before, after = stock.unet.state_dict(), result.unet.state_dict()
    assert {name for name, weight in before.items() if not torch.equal(after[name], weight)} == trained
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if hasattr(stock, part):
            weights = getattr(result, part).state_dict()
            assert all(torch.equal(weights[name], w) for name, w in getattr(stock, part).state_dict().items())
    last = load_file(run.path / "replay" / "iteration-2.safetensors")
    assert set(last) == trained, "no copy of what stays as it is"
    assert all(torch.equal(last[name], after[name]) for name in trained)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_prediction_type_is_kept_by_the_card(trains, kind, mode):
    """A base whose scheduler says it wrongly draws noise unless the result is told as the training was."""
    run = trains[kind](train_mode=mode, prediction_type="v_prediction", max_train_steps=1)
    scheduler = by_the_card(run).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    other = EulerDiscreteScheduler.from_config(scheduler.config)
    assert other.config.prediction_type == "v_prediction", "another sampler takes it over"


def test_the_prediction_of_a_base_is_kept_by_the_card(trains, request, tmp_path):
    """AnimateDiff's has a schedule of its own, which knows nothing of the base's."""
    base, _ = request.getfixturevalue("motion")
    shutil.copytree(base, tmp_path / "base")
    config = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    run = trains["video"](model=tmp_path / "base", max_train_steps=1)
    assert by_the_card(run).scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_weights_in_half_precision_are_trained_in_fp32(request, trains, tmp_path, family):
    """A base that is stored in fp16 is read as fp32, so that small updates are not lost."""
    kind = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
    pipeline = kind.from_pretrained(request.getfixturevalue(family))
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    run = trains[family](model=tmp_path / "half", train_mode="full", learning_rate=1e-6, max_train_steps=1)
    weights = load_file(run.path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    half = UNet2DConditionModel.from_pretrained(tmp_path / "half", subfolder="unet").state_dict()
    assert not torch.equal(weights["conv_in.weight"], half["conv_in.weight"].float())
    assert len(drawn_by(by_the_card(run), family)) == 2, "all parts are of one precision"


# Card, trackers, hub


def test_card_tells_what_was_made_and_how(trains, kind, monkeypatch):
    monkeypatch.setattr("sys.argv", ["somewhere/train.py", "--seed", "0", "--validation_prompts", "a red circle"])
    run = trains[kind](validation_prompts=PROMPTS, max_train_steps=1, train_mode="full")
    card = (run.path / "README.md").read_text()
    assert "accelerate launch train.py --seed 0 --validation_prompts 'a red circle'" in card
    suffix, tag = ("gif", "text-to-video") if kind == "video" else ("png", "text-to-image")
    assert f"(samples/step-1.{suffix})" in card
    assert (run.path / "samples" / f"step-1.{suffix}").is_file()
    assert f"- {tag}\n" in card
    assert "- sspo\n" in card
    assert "- lora\n" not in card
    baseline = (trains[kind]("sft", loss_type="sft", max_train_steps=1).path / "README.md").read_text()
    assert "supervised fine-tuning, the baseline" in baseline
    assert "- lora\n" in baseline
    assert "samples/" not in baseline


def test_tensorboard_gets_metrics_and_samples(trains, kind):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trains[kind](report_to="tensorboard", validation_prompts=PROMPTS, validation_steps=3)
    events = EventAccumulator(str(run.path / "logs" / "sspo"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(run.column("loss"))
    assert [event.step for event in events.Scalars("gap/winner")] == [1, 2, 3, 4]
    samples = events.Images("samples")
    assert [event.step for event in samples] == [3, 4]
    suffix = "gif" if kind == "video" else "png"
    with Image.open(run.path / "samples" / f"step-4.{suffix}") as drawn:
        assert (samples[1].width, samples[1].height) == drawn.size


@with_shared_code
def test_the_trackers_project_has_the_name_that_was_asked_for(each):
    run = each(report_to="tensorboard", tracker_project_name="mine", max_train_steps=1, rollout_steps=1)
    assert [path.name for path in (run.path / "logs").iterdir()] == ["mine"]


def write_one(script, folder, tracker):
    """One white sample of update 7, of 16 x 16 pixels and two frames, is written and handed to the tracker."""
    args = SimpleNamespace(output_dir=folder, num_frames=2, height=16, width=16, fps=8)
    picture = Image.new("RGB", (16, 16), "white")
    script.write_samples([[[picture] * 2 if script.MODALITY == "video" else picture]], args, 7, [tracker])


@pytest.mark.parametrize("kind", EVERY)
def test_a_tracker_without_pictures_gets_none(kind, tmp_path):
    """Of what --report_to all may find installed, MLflow and others log numbers alone."""
    write_one(EVERY[kind], tmp_path, SimpleNamespace(name="mlflow"))
    assert list((tmp_path / "samples").glob("step-7.*"))


@pytest.mark.parametrize("kind", EVERY)
def test_wandb_gets_samples_in_its_own_form(kind, tmp_path, monkeypatch):
    """A picture as an array, a clip as its own class made of a file."""
    video, given = SimpleNamespace(Video=lambda path, format: (Path(path).name, format)), []
    monkeypatch.setitem(sys.modules, "wandb", video)

    def log(values, step):
        given.append((values["samples"], step))

    write_one(EVERY[kind], tmp_path, SimpleNamespace(name="wandb", log=log, log_images=log))
    ((sample, step),) = given
    assert step == 7
    if EVERY[kind].MODALITY == "video":
        form = {"video": "gif", "wan": "mp4"}[kind]
        assert sample == (f"step-7.{form}", form)
    else:
        assert sample.shape == (1, 16, 16, 3) and sample.min() == 255


@with_shared_code
def test_cached_prompts_leave_no_text_encoder_behind(each, monkeypatch):
    """Eight processes with Wan's would hold 85 GiB of memory that nobody reads again."""
    kept = keep_models(monkeypatch, each.script)
    each(cache_latents=True, max_train_steps=1, validation_prompts=PROMPTS[:1])
    others = [module for module in kept[0].encoders if module is not kept[0].vae]
    assert others and all(weight.device.type == "meta" for module in others for weight in module.parameters())
    assert all(weight.device.type == "cpu" for weight in kept[0].vae.parameters())


@with_every
def test_push_to_hub_goes_to_the_named_repository_and_takes_the_result_alone(each, monkeypatch):
    """Of all that a run may leave, by the hub's own filter: no checkpoint, bank, cache or log."""
    calls = []
    made = SimpleNamespace(repo_id="me/other")
    monkeypatch.setattr(each.script, "create_repo", lambda *a, **k: calls.append((a, k)) or made)
    monkeypatch.setattr(each.script, "upload_folder", lambda **k: calls.append(k))
    options = dict(cache_latents=True, checkpointing_steps=1, report_to="tensorboard", max_train_steps=1)
    options |= dict(rollout_steps=1, validation_prompts=["a red circle"])
    run = each(push_to_hub=True, hub_model_id="other", **options)
    (created, upload) = calls
    assert created == (("other",), dict(exist_ok=True))
    assert (upload["repo_id"], upload["folder_path"]) == ("me/other", str(run.path))
    there = [path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()]
    samples = {name for name in there if name.startswith("samples/")}
    assert samples and {name.split("/")[0] for name in there} > {"checkpoint-1", "replay", "cache", "logs"}
    taken = set(filter_repo_objects(there, ignore_patterns=upload["ignore_patterns"]))
    assert taken == {"pytorch_lora_weights.safetensors", "README.md", "metrics.jsonl", *samples}
    assert 'load_lora_weights("me/other")' in (run.path / "README.md").read_text()


def refuse(*args, **kwargs):
    raise OSError("403 Forbidden:\nno token")


def test_hub_without_a_login_is_known_before_the_models_load(each, monkeypatch):
    monkeypatch.setattr(each.script, "create_repo", refuse)
    monkeypatch.setattr(each.script, "load_models", None)
    with pytest.raises(each.script.UserError, match="--push_to_hub cannot use the repository run: 403") as error:
        each(push_to_hub=True, max_train_steps=1)
    assert "\n" not in str(error.value)


@with_every
def test_hub_that_refuses_costs_nothing(each, monkeypatch):
    """The result is written before, and the line says where."""
    monkeypatch.setattr(each.script, "create_repo", lambda *a, **k: SimpleNamespace(repo_id="me/run"))
    monkeypatch.setattr(each.script, "upload_folder", refuse)
    with pytest.raises(
        each.script.UserError, match="the result is in .*run, but the hub did not take it: 403"
    ) as error:
        each(push_to_hub=True, max_train_steps=1)
    assert "\n" not in str(error.value)
    assert (each.directory / "run" / "README.md").is_file()
    assert (each.directory / "run" / "pytorch_lora_weights.safetensors").is_file()
