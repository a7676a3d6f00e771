"""train_sspo_video.py: what clips and motion modules change, against the stock pipelines, and whole runs."""

import io
import itertools
import json
import math
import shutil
import tarfile
from collections import Counter

import av
import datasets
import numpy as np
import pytest
import test_processes
import tiny
import torch
from conftest import ROOT, Run, flags
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
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


# The seam against the stock pipelines


def rivals(args, models, noise, winners=None):
    """Rivals of CAPTIONS as a run samples them."""
    return script.self_sample(
        models.denoiser,
        script.rollout_scheduler(models, args),
        noise,
        script.collate_condition(script.encode_prompt(models, CAPTIONS), None, "cpu"),
        script.collate_condition(script.encode_prompt(models, [""] * len(CAPTIONS)), None, "cpu"),
        args.rollout_steps,
        args.rollout_guidance_scale,
        winners,
        args.rollout_strength,
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rival_is_what_the_stock_pipeline_samples(motion, scheduler):
    """With the linear schedule, which is not the image model's, and each clip's own caption."""
    args, models = load(motion, rollout_scheduler=scheduler)
    assert args.rollout_guidance_scale == 8
    noise = torch.randn(len(CAPTIONS), 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = rivals(args, models, noise)
    theirs = stock(motion, scheduler)(
        CAPTIONS,
        latents=noise.clone(),
        num_frames=FRAMES,
        num_inference_steps=6,
        guidance_scale=8.0,
        height=64,
        width=64,
        output_type="latent",
    ).frames
    assert (ours - theirs).abs().max() < 1e-4
    alone = rivals(args, models, noise.flip(2)).flip(2)
    assert (ours - alone).abs().max() > 1e-3, "the order of the frames must matter"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rollout_strength_is_video_to_video(motion, scheduler):
    args, models = load(motion, rollout_scheduler=scheduler, rollout_strength=0.7)
    winners = torch.randn(len(CAPTIONS), 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(winners.shape, generator=torch.Generator().manual_seed(2))
    ours = rivals(args, models, noise, winners)
    pipeline = stock(motion, scheduler, AnimateDiffVideoToVideoPipeline)
    pipeline.scheduler.set_timesteps(6)
    timesteps, _ = pipeline.get_timesteps(6, pipeline.scheduler.timesteps, 0.7, "cpu")
    theirs = pipeline(
        prompt=CAPTIONS,
        latents=pipeline.scheduler.add_noise(winners, noise, timesteps[:1]),
        strength=0.7,
        num_inference_steps=6,
        guidance_scale=8.0,
        height=64,
        width=64,
        output_type="latent",
    ).frames
    assert (ours - theirs).abs().max() < 1e-4


def test_error_is_the_mean_over_everything_but_the_batch(motion):
    """Over c, f, h and w, of two draws for a clip, with one timestep for all frames of a draw."""
    args, models = load(motion)
    latents, noise = torch.randn(2, 4, FRAMES, 8, 8), torch.randn(2, 2, 4, FRAMES, 8, 8)
    timesteps = torch.tensor([[3, 500], [999, 40]])
    prompts = script.encode_prompt(models, CAPTIONS)
    condition = script.collate_condition(prompts, None, "cpu")
    with torch.no_grad():
        errors = script.denoising_errors(models.denoiser, models, latents, noise, timesteps, condition)
        for i, j in itertools.product(range(2), range(2)):
            keep = models.noise_scheduler.alphas_cumprod[timesteps[i, j]]
            noisy = (keep.sqrt() * latents[i] + (1 - keep).sqrt() * noise[i, j])[None]
            words = torch.cat([prompts[i]["prompt_embeds"][None]] * FRAMES)
            predicted = models.denoiser(noisy, timesteps[i, j], encoder_hidden_states=words).sample
            assert errors[i, j].item() == pytest.approx(((predicted - noise[i, j]) ** 2).mean().item(), rel=1e-5)
    assert models.noise_scheduler.alphas_cumprod[500].item() == pytest.approx(0.161, abs=2e-3), "linear, not scaled"


def test_clip_survives_the_vae(motion):
    """Latents of frames are those of pictures, in their order, however many frames the VAE takes at once."""
    _, models = load(motion)
    pixels = torch.rand(2, 11, 3, 64, 48) * 2 - 1
    mean, std = script.encode_image(models, pixels)
    assert mean.shape == std.shape == (2, 4, 11, 8, 6)
    for i, f in ((0, 0), (1, 3), (0, 10)):
        with torch.no_grad():
            alone = models.vae.encode(pixels[i, f][None]).latent_dist.mean[0] * models.vae.config.scaling_factor
        torch.testing.assert_close(mean[i, :, f], alone, rtol=1e-4, atol=1e-5)
    clip = script.decode_latents(models, mean[:1])
    with torch.no_grad():
        alone = models.vae.decode(mean[:1, :, 9] / models.vae.config.scaling_factor).sample
    assert len(clip) == 11 and clip[0].size == (48, 64)
    assert np.abs(np.asarray(clip[9]) / 127.5 - 1 - alone[0].clamp(-1, 1).permute(1, 2, 0).numpy()).max() < 0.01


# Gradient checkpointing


def saved_by_a_loss(models, latents):
    """Bytes that autograd keeps for one loss, and the gradients."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    condition = script.collate_condition(script.encode_prompt(models, CAPTIONS), None, "cpu")
    weights = {weight.untyped_storage().data_ptr() for weight in models.denoiser.parameters()}
    draws = (torch.ones(2, 1, *latents.shape[1:]), torch.tensor([[10], [600]]), condition)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = script.denoising_errors(models.denoiser, models, latents, *draws).mean()
    size = sum(size for pointer, size in kept.items() if pointer not in weights)
    loss.backward()
    return size, [weight.grad for weight in models.denoiser.parameters() if weight.requires_grad]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradient_checkpointing_covers_the_motion_modules(motion, mode):
    """The same gradients to the bit, and far fewer saved bytes than with the library's own checkpointing."""
    latents = torch.randn(2, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for kind in ("none", "library", "ours"):
        args, models = load(motion, train_mode=mode, gradient_checkpointing=kind == "ours")
        torch.manual_seed(0)
        script.prepare_denoisers(models, args, "cpu")
        if mode == "lora":  # else half of the gradients are 0
            for name, weight in models.denoiser.named_parameters():
                if "lora_B.default" in name:
                    torch.nn.init.normal_(weight, std=0.1)
        if kind == "library":
            models.denoiser.enable_gradient_checkpointing()
        results.append(saved_by_a_loss(models, latents))
    (without, plain), (library, _), (ours, gradients) = results
    assert len(plain) > 20 and all(gradient.abs().max() > 0 for gradient in plain[:4])
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients))
    assert ours < 0.4 * library < 0.9 * without


# Data

COUNT = 5


def encoded(caption, length=12):
    file = io.BytesIO()
    tiny.write_clip(file, tiny.moving_frames(caption, length))
    return file.getvalue()


def as_table():
    captions = tiny.CAPTIONS[:COUNT]
    return datasets.Dataset.from_dict(
        {"video": [{"bytes": encoded(caption), "path": None} for caption in captions], "text": captions},
        features=datasets.Features({"video": datasets.Video(decode=False), "text": datasets.Value("string")}),
    ).cast_column("video", datasets.Video())


def make(form, directory):
    """Writes COUNT winners in the given form and returns the flags that name them."""
    directory.mkdir(parents=True)
    if form in ("jsonl", "csv", "magictime"):
        return dict(train_data_dir=tiny.folder_of_clips(directory / "folder", COUNT, metadata=form))
    if form == "magictime file":
        folder = directory / "folder"
        tiny.folder_of_clips(folder, COUNT, metadata="magictime")
        (folder / "clips").mkdir()
        for clip in folder.glob("*.mp4"):
            clip.rename(folder / "clips" / clip.name)
        return dict(train_data_dir=folder / "captions.csv")
    if form == "save_to_disk":
        as_table().save_to_disk(directory / "saved")
        return dict(train_data_dir=directory / "saved")
    if form == "parquet":
        as_table().to_parquet(directory / "clips.parquet")
        return dict(train_data_dir=directory / "clips.parquet")
    if form == "bytes":
        table = datasets.Dataset.from_dict(
            {"mp4": [encoded(c) for c in tiny.CAPTIONS[:COUNT]], "prompt": tiny.CAPTIONS[:COUNT]}
        )
        table.save_to_disk(directory / "saved")
        return dict(dataset_name=directory / "saved")
    assert form == "webdataset"
    with tarfile.open(directory / "shard-000.tar", "w") as tar:
        for i, caption in enumerate(tiny.CAPTIONS[:COUNT]):
            for suffix, content in (("mp4", encoded(caption)), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{i:05}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return dict(train_data_dir=directory)


def winners_of(tmp_path, **options):
    options = {"motion_adapter_name_or_path": "unused", "num_frames": 4, "frame_stride": 2, **options}
    options = {"train_data_dir": None, "cache_dir": tmp_path / "cache", **options}
    args = script.parse_args(flags("unused", None, tmp_path / "out", **options))
    return args, script.Winners(args)


def served(winners, count):
    """The first `count` examples of the stream."""
    batches = itertools.islice(script.WinnerStream(winners, winners.load, 1).micro_batches(), count)
    return [examples[0] for examples, _ in batches]


FORMS = ["jsonl", "csv", "magictime", "magictime file", "save_to_disk", "parquet", "bytes", "webdataset"]


def place_of(pixels):
    """How far the shape in a frame of moving_frames has come, in pixels: its left edge."""
    dark = ((pixels < 0).any(0).float().mean(0) > 0.05).nonzero()
    return dark.min().item()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_every_winner_with_its_caption(tmp_path, form, streaming):
    args, winners = winners_of(tmp_path, streaming=streaming, center_crop=True, **make(form, tmp_path / "data"))
    examples = served(winners, 2 * COUNT)
    assert Counter(example["caption"] for example in examples) == dict.fromkeys(tiny.CAPTIONS[:COUNT], 2)
    for example in examples:
        frames = tiny.moving_frames(example["caption"])
        for taken, index in zip(example["pixels"], example["geometry"]["frames"]):
            drawn, _ = script.crop_picture(frames[index], args, torch.Generator())
            assert (taken - drawn).abs().mean() < 0.1, "but for the codec's blur"
    if not streaming:
        assert len(winners) == COUNT


def test_leading_zeros_of_a_videoid_are_kept(tmp_path):
    folder = make("magictime", tmp_path / "data")["train_data_dir"]
    table = script.magictime_table(folder)
    assert sorted(table["video"]) == [f"{folder}/{i:03}.mp4" for i in range(COUNT)]


def test_a_clip_inside_an_archive(tmp_path):
    """As streamed folders of the hub name their files."""
    folder = tmp_path / "folder"
    tiny.folder_of_clips(folder, 1)
    shutil.make_archive(str(tmp_path / "clips"), "zip", folder)
    args, _ = winners_of(tmp_path, train_data_dir=folder)
    pixels, _ = script.read_winner(f"zip://0.mp4::{tmp_path}/clips.zip", "video", 0, args, (0, 0, 0))
    assert pixels.shape == (4, 3, 64, 64)


def test_frames_hang_on_seed_epoch_and_row(tmp_path, clips):
    """A random start, every second frame; the same again for the same key, and fixed if latents are cached."""
    _, winners = winners_of(tmp_path, train_data_dir=clips)
    first, again = ([e["geometry"]["frames"] for e in served(winners, 30)] for _ in range(2))
    assert first == again
    starts = {frames[0] for frames in first}
    assert starts == set(range(12 - 6)), "every start comes up"
    assert all(np.diff(frames).tolist() == [2, 2, 2] for frames in first)
    other = winners_of(tmp_path, train_data_dir=clips, seed=1)[1]
    assert [e["geometry"]["frames"] for e in served(other, 30)] != first
    cached = winners_of(tmp_path, train_data_dir=clips, cache_latents=True)[1]
    assert len({(e["row"], e["geometry"]["frames"]) for e in served(cached, 30)}) == 6


def test_frames_may_be_spread_over_the_whole_clip(tmp_path, clips):
    _, winners = winners_of(tmp_path, train_data_dir=clips, frame_stride=0, num_frames=5)
    assert {e["geometry"]["frames"] for e in served(winners, 12)} == {(0, 3, 6, 8, 11)}
    _, winners = winners_of(tmp_path, train_data_dir=clips, frame_stride=0, num_frames=1)
    assert served(winners, 1)[0]["pixels"].shape == (1, 3, 64, 64)


def test_all_frames_are_cropped_and_mirrored_alike(tmp_path):
    """A clip that stands still stays so, wherever it is cropped; height and width are free."""
    folder = tmp_path / "still"
    tiny.folder_of_clips(folder, 1)
    noise = np.random.default_rng(0).integers(0, 255, (10, 16, 3)).astype(np.uint8)
    picture = Image.fromarray(noise).resize((160, 96), Image.Resampling.BICUBIC)
    tiny.write_clip(folder / "0.mp4", [picture] * 12)
    options = dict(train_data_dir=folder, random_flip=True, height=48, width=64, resolution=None, center_crop=None)
    _, winners = winners_of(tmp_path, **options)
    examples = served(winners, 12)
    clips = [example["pixels"] for example in examples]
    assert all(clip.shape == (4, 3, 48, 64) for clip in clips)
    assert all((clip - clip[:1]).abs().mean() < 0.03 for clip in clips)
    assert len({example["geometry"]["crop_top_left"] for example in examples}) > 4, "another crop an epoch"
    assert sum((clip - clips[0]).abs().mean() > 0.1 for clip in clips) > 4


CONTAINERS = [
    ("mp4", "mpeg4", dict(g="3", bf="2")),
    ("mp4", "libx264", dict(g="5")),
    ("mp4", "libx264", dict(g="100", bf="3")),
    ("matroska", "libx264", dict(g="4")),
    ("webm", "libvpx-vp9", dict(g="4", deadline="realtime")),
    ("avi", "mpeg4", dict(g="4", bf="2")),
    ("mpegts", "mpeg2video", dict(g="4", bf="2")),
]


@pytest.mark.parametrize("format, codec, options", CONTAINERS)
def test_the_frames_that_were_asked_for_are_read(tmp_path, format, codec, options):
    """Whatever the container knows of times and keyframes; each frame is known by where its shape is."""
    path = tmp_path / f"clip.{format}"
    tiny.write_clip(path, tiny.moving_frames("a black square", 14), format, codec, **options)
    for wanted in ([0, 13], [13], [5, 6, 7], [2, 9, 12]):
        counted = []
        frames, indices = script.read_frames(str(path), None, lambda n, w=wanted, c=counted: c.append(n) or w)
        assert indices == wanted and set(counted) == {14}
        pixels = [torch.from_numpy(np.array(frame)).permute(2, 0, 1) / 127.5 - 1 for frame in frames]
        assert [place_of(frame) for frame in pixels] == pytest.approx([3 * i for i in wanted], abs=1)


def test_no_more_is_decoded_than_is_needed(tmp_path, monkeypatch):
    """From the keyframe before the first frame to the last, and only those that are wanted become pictures."""
    tiny.write_clip(
        tmp_path / "clip.mp4", tiny.moving_frames("a red circle", 20) * 10, "mp4", "libx264", g="10", bf="0"
    )
    kept, decoded = [], []
    upright, decode = script.upright, av.container.InputContainer.decode
    monkeypatch.setattr(script, "upright", lambda frame: kept.append(frame.pts) or upright(frame))

    class Counting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, track):
            for frame in decode(self.container, track):
                decoded.append(frame.pts)
                yield frame

    open_clip = script.open_clip

    @script.contextmanager
    def counted(*source):
        with open_clip(*source) as (container, track):
            yield Counting(container), track

    monkeypatch.setattr(script, "open_clip", counted)
    _, indices = script.read_frames(str(tmp_path / "clip.mp4"), None, lambda count: [103, 105, 107])
    assert len(kept) == 3
    assert len(decoded) <= 12


def test_a_clip_filmed_upright_is_turned(tmp_path):
    """A telephone writes the frames lying, and a matrix into the track's header that turns them by 90 degrees."""
    picture = Image.new("RGB", (96, 64))
    picture.paste((255, 255, 255), (64, 0, 96, 32))  # the top right corner, which belongs to the bottom right
    tiny.write_clip(tmp_path / "clip.mp4", [picture] * 4)
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30]
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    frames, _ = script.read_frames(None, bytes(content), lambda count: [1])
    assert frames[0].size == (64, 96)
    assert frames[0].getpixel((56, 90))[0] > 200 > 50 > frames[0].getpixel((8, 8))[0]


# What is refused


def refused(train_video, message, **options):
    with pytest.raises(script.UserError, match=message) as error:
        train_video(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cached", [False, True])
def test_bad_clips_are_named(train_video, tmp_path, workers, cached):
    options = dict(data=tmp_path / "data", dataloader_num_workers=workers, cache_latents=cached)
    folder = tmp_path / "data"
    tiny.folder_of_clips(folder, 3)
    tiny.write_clip(folder / "1.mp4", tiny.moving_frames("a red circle", 5))
    refused(
        train_video, r"1\.mp4 in row 1 has 5 frames, and 4 at --frame_stride 2 need 7; lower --frame_stride", **options
    )
    options["frame_stride"] = 0
    tiny.write_clip(folder / "1.mp4", tiny.moving_frames("a red circle", 3))
    refused(train_video, r"1\.mp4 in row 1 has 3 frames, and 4 .* need 4; lower --num_frames", **options)
    content = (folder / "0.mp4").read_bytes()
    for bad in (b"", b"no clip", content[: len(content) // 2]):
        (folder / "1.mp4").write_bytes(bad)
        refused(train_video, r"1\.mp4 in row 1 cannot be read \(.*\): .*--on_bad_example skip", **options)


@pytest.mark.parametrize("cached", [False, True])
def test_bad_clips_are_skipped_and_counted(train_video, tmp_path, cached, caplog):
    """One that is damaged and one that is too short: three epochs of four clips are six updates."""
    folder = tmp_path / "data"
    tiny.folder_of_clips(folder, 4)
    (folder / "0.mp4").write_bytes(b"no clip")
    tiny.write_clip(folder / "1.mp4", tiny.moving_frames("a red circle", 5))
    run = train_video(data=folder, on_bad_example="skip", max_train_steps=6, cache_latents=cached)
    skipped = run.column("data/skipped")
    assert [sum(skipped[i : i + 2]) for i in (0, 2, 4)] == [2, 2, 2]
    warnings = [record.message for record in caplog.records if "Skipped: " in record.message]
    assert sorted("0.mp4 in row 0" in warning for warning in warnings) == [False, True]


def test_clips_without_frames_are_named(train_video, tmp_path):
    folder = tmp_path / "data"
    tiny.folder_of_clips(folder, 1)
    with av.open(str(folder / "0.mp4"), "w", format="mp4") as container:  # sound alone
        track = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(track.encode(frame))
        container.mux(track.encode())
    refused(train_video, r"0\.mp4 in row 0 cannot be read \(it has no picture track\)", data=folder)
    args = script.parse_args(flags("m", folder, "out", motion_adapter_name_or_path="a"))
    with pytest.raises(script.UserError, match="the clip x has no frames"):
        script.choose_frames(0, args, (0, 0, 0), "the clip x")


def test_wrong_lists_of_clips_are_refused_before_the_models_load(train_video, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_models", lambda *a: pytest.fail("the models were loaded"))
    folder = tmp_path / "data"
    tiny.folder_of_clips(folder, 3, metadata="magictime")
    (folder / "001.mp4").unlink()
    refused(train_video, r"captions.csv lists 1 clips that are not in its folder, first 001\.mp4", data=folder)
    for name in ("a", "b"):
        (folder / name).mkdir()
        shutil.copy(folder / "000.mp4", folder / name / "001.mp4")
    refused(train_video, r"lists 001, of which its folder holds several, .*a/001\.mp4, .*b/001\.mp4", data=folder)
    shutil.rmtree(folder / "b")
    shutil.copy(folder / "captions.csv", folder / "more.csv")
    refused(train_video, r"several lists of clips, captions\.csv, more\.csv", data=folder)
    (folder / "empty.csv").write_text("videoid,name,is_transmit\n")
    refused(train_video, "is empty", data=folder / "empty.csv")
    (folder / "other.csv").write_text("a,b\n")
    refused(train_video, "is not a folder, nor one of", data=folder / "other.csv")
    tiny.folder_of_clips(tmp_path / "named", 2)
    refused(
        train_video,
        "no column film: it has video, text; .*--video_column",
        data=tmp_path / "named",
        video_column="film",
    )
    (tmp_path / "named" / "metadata.jsonl").unlink()
    refused(train_video, "no column text or caption or txt or prompt: it has video", data=tmp_path / "named")
    refused(train_video, "nowhere does not exist", data=tmp_path / "nowhere")


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


def test_full_training_keeps_motion_weights_in_fp32(motion):
    """Also beside an image model in half precision, and without a detour that would round them."""
    _, models = load(motion, torch.bfloat16, train_mode="full")
    adapter = MotionAdapter.from_pretrained(motion[1]).state_dict()
    weights = models.denoiser.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in adapter.items())
    assert models.denoiser.conv_in.weight.dtype == torch.bfloat16
    assert set(adapter) == {name for name in weights if "motion_modules" in name}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_reference_is_the_saved_checkpoint(train_video, motion, monkeypatch, mode):
    """Rivals, and e(reference) = e(policy) - gap, of the second iteration, from kept weights put in by hand."""
    batches, loss = [], script.training_loss
    monkeypatch.setattr(script, "training_loss", lambda *a: batches.append(dict(a[2])) or loss(*a))
    run = train_video(train_mode=mode, reference="latest", learning_rate=1e-2, seed=3)
    logged, batch = run.metrics[3], batches[3]
    args, models = load(motion)
    entry = load_file(run.path / "replay" / "iteration-1.safetensors")
    if mode == "full":
        models.denoiser.load_state_dict({**models.denoiser.state_dict(), **entry})
    else:
        layers = {name.rsplit(".lora_", 1)[0] for name in entry}
        assert all("motion_modules" in name for name in layers) and len(layers) == 7 * 2 * 4
        with torch.no_grad():
            for layer in layers:
                up, down = entry[f"{layer}.lora_B.weight"], entry[f"{layer}.lora_A.weight"]
                models.denoiser.get_submodule(layer).weight += up @ down
    noise = script.keyed_noise("rival", 3, batch["keys"], (4, FRAMES, 8, 8))
    sampler = script.rollout_scheduler(models, args)
    conditions = batch["condition"], batch["unconditional"]
    rival = script.self_sample(models.denoiser, sampler, noise, *conditions, 3, 8.0)
    torch.testing.assert_close(rival, batch["rival"], rtol=1e-3, atol=1e-4)
    noise = script.keyed_noise("noise", 3, batch["keys"], (1, 4, FRAMES, 8, 8))
    generators = [script.keyed_generator("timestep", 3, *key) for key in batch["keys"]]
    timesteps = torch.stack([script.draw_timesteps(models, generator, 1) for generator in generators])
    for half in ("winner", "rival"):
        with torch.no_grad():
            draws = (batch[half], noise, timesteps, batch["condition"])
            error = script.denoising_errors(models.denoiser, models, *draws).mean()
        assert abs(logged[f"gap/{half}"]) > 1e-5
        assert error.item() == pytest.approx(logged[f"mse/policy_{half}"] - logged[f"gap/{half}"], abs=1e-6)


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


def test_cached_latents_change_nothing_and_save_the_decoding(train_video, monkeypatch):
    """Three epochs of six clips decode six clips, in the loader's processes if there are any."""
    read, read_frames = [], script.read_frames
    monkeypatch.setattr(script, "read_frames", lambda *a: read.append(a[0]) or read_frames(*a))
    common = dict(max_train_steps=9, proportion_empty_prompts=0.4)
    cached = train_video("cached", cache_latents=True, **common)
    assert len(read) == len(set(read)) == 6
    workers = train_video("workers", cache_latents=True, dataloader_num_workers=2, **common)
    assert len(read) == 6, "nothing was decoded in this process"
    assert workers.column("loss") == cached.column("loss")
    plain = train_video("plain", **common)
    assert len(read) == 6 + 18
    assert plain.column("loss")[:3] == pytest.approx(cached.column("loss")[:3], rel=1e-4)
    served_by_workers = train_video("served", dataloader_num_workers=2, **common)
    assert len(read) == 6 + 18
    assert served_by_workers.column("loss") == plain.column("loss")


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
