"""From a winner to latents and conditions: the VAE, batches, and the cache on disk."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from helpers import EVERY, SCRIPTS, WAN, flags, forget_result, with_every
from safetensors.torch import load_file, save_file


def examples_of(script, args, models, keys):
    """Examples with these (epoch, row) and rivals of their own, encoded."""
    generator = torch.Generator().manual_seed(0)
    frames = [args.num_frames] if script is SCRIPTS["video"] else []

    def drawn():
        return torch.rand(*frames, 3, *script.picture_size(args), generator=generator) * 2 - 1

    examples = [
        {
            "epoch": epoch,
            "row": row,
            "caption": tiny.CAPTIONS[row],
            "pixels": drawn(),
            "rival_pixels": drawn(),
            **({"geometry": torch.tensor([200 + row, 100, row, 0, 64, 64])} if script is SCRIPTS["sdxl"] else {}),
        }
        for epoch, row in keys
    ]
    return script.encode_examples(models, examples)


def frames_of(script, latents):
    """The latents of one example's frames, (f, c, h, w); a picture is one frame."""
    return latents.transpose(0, 1) if script is SCRIPTS["video"] else latents[None]


def test_latents_are_those_of_the_vae(script, load):
    """Mean and standard deviation, scaled; of a batch as of each picture or frame by itself, in their order."""
    _, models = load(script)
    frames = [11] if script is SCRIPTS["video"] else []  # more than the VAE takes at once
    pixels = torch.rand(2, *frames, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = script.encode_image(models, pixels)
    assert mean.shape == std.shape == (2, 4, *frames, 8, 6)
    assert mean.dtype == std.dtype == torch.float32
    for i in range(2):
        ours = zip(frames_of(script, mean[i]), frames_of(script, std[i]))
        for picture, (middle, deviation) in zip(pixels[i].view(-1, 3, 64, 48), ours, strict=True):
            with torch.no_grad():
                posterior = models.vae.encode(picture[None]).latent_dist
            scale = models.vae.config.scaling_factor
            torch.testing.assert_close(middle, posterior.mean[0] * scale, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(deviation, posterior.std[0] * scale, rtol=1e-4, atol=1e-5)


def test_pictures_of_latents_are_those_of_the_vae(script, load):
    """A clip keeps the order of its frames."""
    _, models = load(script)
    frames = [11] if script is SCRIPTS["video"] else []
    latents = torch.randn(1, 4, *frames, 8, 6, generator=torch.Generator().manual_seed(0))
    decoded = script.decode_latents(models, latents)
    for picture, one in zip(decoded if frames else [decoded], frames_of(script, latents[0]), strict=True):
        with torch.no_grad():
            pixels = models.vae.decode(one[None] / models.vae.config.scaling_factor).sample[0]
        assert picture.size == (48, 64)
        expected = pixels.clamp(-1, 1).permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(picture) / 127.5 - 1 - expected).max() < 0.01


def test_latents_with_statistics_of_their_own(sdxl, load, tmp_path):
    """A VAE that has latents_mean and latents_std is encoded and decoded as the stock pipelines do."""
    script = SCRIPTS["sdxl"]
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(sdxl)
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 2.0, 1.0, 0.8])
    pipeline.save_pretrained(tmp_path / "model")
    _, models = load(script, model=tmp_path / "model")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = script.encode_image(models, pixels)
    theirs = pipeline.prepare_latents(
        pixels, None, 1, 1, torch.float32, "cpu", torch.Generator().manual_seed(3), False
    )
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-4, atol=1e-5)
    plain = load(script)[1]
    assert (script.encode_image(plain, pixels)[0] - mean).abs().max() > 0.01
    decoded = pipeline.vae.decode(
        mean * torch.tensor([0.5, 2.0, 1.0, 0.8]).view(1, 4, 1, 1) / 0.13025
        + torch.tensor([0.1, -0.2, 0.3, 0.4]).view(1, 4, 1, 1)
    ).sample
    picture = script.decode_latents(models, mean)
    assert tiny.difference(picture, pipeline.image_processor.postprocess(decoded.detach())[0]) <= 1


@pytest.mark.parametrize("cached", [False, True])
@with_every
def test_latents_that_are_not_finite_stop_the_run(each, tmp_path, cached):
    """As those of SDXL's stock VAE in fp16; the row is named and no cache of them is kept."""
    shutil.copytree(each.base(), tmp_path / "broken")
    path = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.weight"][0] = math.inf
    save_file(weights, path)
    with pytest.raises(each.script.UserError, match=r"latents of row \d+ are not finite: the VAE, run in .*32"):
        each(model=tmp_path / "broken", cache_latents=cached)
    assert not list((tmp_path / "run").rglob("rows-*.safetensors"))


# Batches


def test_a_batch_is_what_its_examples_say(script, load):
    """Latents drawn from the posteriors by each row's own key, and captions, some of them dropped, in their order."""
    args, models = load(script, proportion_empty_prompts=0.5, seed=7)
    keys = [(0, 3), (1, 2), (0, 1), (2, 0)]
    examples = examples_of(script, args, models, keys)
    empty = script.encode_prompt(models, [""])[0]
    batch = script.collate(examples, empty, args, "cpu")
    assert batch["keys"] == keys
    for i, key in enumerate(keys):
        alone = script.collate([examples[i]], empty, args, "cpu")
        for name, half, purpose in (("winner", "", "posterior"), ("rival", "rival_", "rival posterior")):
            assert torch.equal(batch[name][i], alone[name][0])
            noise = (batch[name][i] - examples[i][f"{half}mean"]) / examples[i][f"{half}std"]
            expected = script.keyed_noise(purpose, 7, [key], noise.shape)[0]
            torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-3)
        prompt = script.encode_prompt(models, [tiny.CAPTIONS[key[1]]])[0]
        draw = torch.rand((), generator=script.keyed_generator("dropout", 7, *key)).item()
        assert batch["dropped"][i] == (draw < 0.5)
        for name in prompt:
            told = empty if batch["dropped"][i] else prompt
            torch.testing.assert_close(batch["condition"][name][i], told[name])
            torch.testing.assert_close(batch["unconditional"][name][i], empty[name])
        if script is SCRIPTS["sdxl"]:
            for condition in (batch["condition"], batch["unconditional"]):
                assert condition["time_ids"][i].tolist() == [200 + key[1], 100, key[1], 0, 64, 64]
    assert 0 < sum(batch["dropped"]) < 4, "some are dropped, some are not"


def test_micro_batches_are_pieces_of_a_batch(script, load):
    args, models = load(script)
    keys = [(0, row) for row in range(5)]
    batch = script.collate(examples_of(script, args, models, keys), script.encode_prompt(models, [""])[0], args, "cpu")
    pieces = list(script.micro_batches(batch, 2))
    assert [piece["keys"] for piece in pieces] == [keys[:2], keys[2:4], keys[4:]]
    assert sum((piece["dropped"] for piece in pieces), []) == batch["dropped"]
    for half in ("winner", "rival"):
        assert torch.equal(torch.cat([piece[half] for piece in pieces]), batch[half])
    joined = script.join(*(piece["condition"] for piece in pieces))
    assert joined.keys() == batch["condition"].keys()
    assert all(torch.equal(joined[name], value) for name, value in batch["condition"].items())


# The cache

CACHED = dict(center_crop=False, random_flip=True, proportion_empty_prompts=0.4, rollout_steps=1)


def test_cached_winners_are_read_and_encoded_once_and_change_nothing(each, monkeypatch):
    """
    In the first epoch losses are those of a run without a cache, crops, flips and dropped captions included. Loader
    processes, which fill it if there are any, change nothing.
    """
    script, read, encoded = each.script, [], []
    read_winner, encode_image = script.read_winner, script.encode_image
    monkeypatch.setattr(script, "read_winner", lambda *a: read.append(a[2]) or read_winner(*a))
    monkeypatch.setattr(script, "encode_image", lambda *a: encoded.extend(a[1]) or encode_image(*a))
    count = 6 if script is SCRIPTS["video"] else 8
    cached = each("cached", cache_latents=True, max_train_steps=count, **CACHED)
    assert sorted(read) == [(0, 0, row) for row in range(count)] and len(encoded) == count
    workers = each("workers", cache_latents=True, dataloader_num_workers=2, max_train_steps=count, **CACHED)
    assert len(read) == count and len(encoded) == 2 * count, "nothing was read in this process"
    assert workers.column("loss") == cached.column("loss")
    epoch = count // 2
    plain = each("plain", max_train_steps=epoch, **CACHED)
    assert len(read) == len(encoded) - count == 2 * count
    assert cached.column("mse/policy_winner")[:epoch] == pytest.approx(plain.column("mse/policy_winner"), rel=1e-5)
    assert cached.column("loss")[:epoch] == pytest.approx(plain.column("loss"), rel=1e-3)


def test_a_cache_is_filled_where_it_was_left_and_used_again(each, monkeypatch):
    """Files of three rows: those that are there are not encoded again, for flags that they do not depend on."""
    script, encoded = each.script, []
    encode_latents = script.encode_latents
    monkeypatch.setattr(script, "CACHE_FILE", 3)
    monkeypatch.setattr(
        script, "encode_latents", lambda m, e: encoded.extend(x["row"] for x in e) or encode_latents(m, e)
    )
    options = dict(cache_latents=True, max_train_steps=2, checkpointing_steps=1, **CACHED)
    run = each(**options)
    count, encoded[:] = len(encoded), []
    files = {path.name: path for path in run.path.rglob("rows-*.safetensors")}
    assert sorted(files) == [f"rows-{i}.safetensors" for i in range(math.ceil(count / 3))]
    files["rows-1.safetensors"].unlink()
    for name in script.RESULTS:
        Path(run.path, name).unlink(missing_ok=True)
    each(**{**options, "max_train_steps": 3}, resume_from_checkpoint="latest", learning_rate=1e-3)
    assert encoded == [3, 4, 5]
    assert len(list(run.path.rglob("rows-*.safetensors"))) == len(files)


OF_BOTH = dict(caption_column="words", center_crop=True, random_flip=True, seed=1, rivals="given")
PICTURE = dict(OF_BOTH, image_column="photo", resolution=128)
CLIP = dict(OF_BOTH, video_column="film", num_frames=9, frame_stride=3)
DEPENDS_ON = {  # what cached rows do, each flag with another value than it has
    "sd": PICTURE,
    "sdxl": PICTURE,
    "video": dict(CLIP, resolution=128, height=128, width=128),
    "flux2": dict(PICTURE, max_sequence_length=100),
    "wan": dict(CLIP, height=64, width=64, fps=24),
}


def test_another_base_does_not_train_on_the_latents_that_one_left(train, tmp_path):
    options = dict(cache_latents=True, max_train_steps=1)
    forget_result(train("run", **options))
    other = dict(options, model=tiny.stable_diffusion(tmp_path / "other", seed=1))
    assert train("run", **other).column("mse/policy_winner") == train("fresh", **other).column("mse/policy_winner")


@pytest.mark.parametrize("kind", EVERY)
def test_cached_rows_are_kept_apart_by_all_that_they_depend_on(kind, tmp_path):
    """Each flag, the data and the models' weights have a place of their own, and nothing else has."""
    script = EVERY[kind]
    given = dict(WAN if kind == "wan" else {}, center_crop=None, output_dir=tmp_path)
    given |= dict(motion_adapter_name_or_path="unused", num_frames=4) if kind == "video" else {}

    def place(data="data", weights="weights", **options):
        winners = SimpleNamespace(captions=lambda: [], dataset=SimpleNamespace(_fingerprint=data))
        args = script.parse_args(flags("unused", "unused", "unused", **{**given, **options}))
        return script.LatentCache(args, winners, weights).directory

    places = {"nothing": place(), "data": place(data="others"), "weights": place(weights="others")}
    places |= {name: place(**{name: value}) for name, value in DEPENDS_ON[kind].items()}
    assert len(set(places.values())) == len(places), places
    free = dict(learning_rate=1, train_batch_size=1, rank=2, beta_dpo=5, rollout_steps=9, proportion_empty_prompts=0.3)
    assert place(**free) == places["nothing"]
