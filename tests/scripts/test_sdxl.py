"""train_sspo_sdxl.py: what Stable Diffusion XL changes in a run. What all scripts promise is tested for all."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from helpers import LAYOUT, assert_same_but_for_rounding, flags
from PIL import Image
from safetensors.torch import load_file, save_file

import train_sspo_sdxl as script


SIZES = [(833, 400), (90, 257), (64, 64), (128, 100), (64, 65), (411, 205)]


@pytest.fixture
def train(trains):
    return trains["sdxl"]


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


# Micro-conditioning


@pytest.mark.parametrize("cached", [False, True])
def test_micro_conditioning_tells_of_the_crop_that_was_made(train, oblongs, monkeypatch, cached):
    """Every denoiser call of a bf16 run is told its winner's size, corner and target, in fp32, uncached and cached."""
    crops, told, batches = {}, [], []
    load, project, loss = script.Winners.load, UNet2DConditionModel.get_aug_embed, script.training_loss

    def spy_load(winners, epoch, row, example=None):
        loaded = load(winners, epoch, row, example)
        crops[epoch, row] = loaded["pixels"].clone()
        return loaded

    def spy_project(self, emb, encoder_hidden_states, added_cond_kwargs):
        told.append(added_cond_kwargs["time_ids"])
        return project(self, emb, encoder_hidden_states, added_cond_kwargs)

    monkeypatch.setattr(script.Winners, "load", spy_load)
    monkeypatch.setattr(UNet2DConditionModel, "get_aug_embed", spy_project)
    monkeypatch.setattr(script, "training_loss", lambda *a: batches.append(a[2]["keys"]) or loss(*a))
    options = dict(center_crop=False, random_flip=True, cache_latents=cached, mixed_precision="bf16", seed=1)
    run = train(data=oblongs, max_train_steps=6, rollout_steps=1, rollout_guidance_scale=2, **options)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.metrics[0]["gap/winner"] == 0
    assert len(told) == 3 * 6
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


def test_samples_are_told_that_they_are_whole(train, monkeypatch):
    """Of the size they have, with nothing cut off: models draw cut things if told of a crop."""
    told, project = [], UNet2DConditionModel.get_aug_embed

    def spy(self, emb, encoder_hidden_states, added_cond_kwargs):
        told.append(added_cond_kwargs["time_ids"])
        return project(self, emb, encoder_hidden_states, added_cond_kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "get_aug_embed", spy)
    train(loss_type="sft", max_train_steps=1, rollout_steps=2, validation_prompts=["a red circle"])
    base, training, policy = told[:2], told[2], told[3:]
    assert len(policy) == 2
    assert all(ids.tolist() == 2 * [[64, 64, 0, 0, 64, 64]] for ids in (*base, *policy))
    assert training.tolist() == 2 * [[64, 72, 0, 4, 64, 64]], "winners are 72 pixels wide"


def test_layout_does_not_matter_to_pictures_of_several_shapes(train, oblongs):
    whole = train("whole", data=oblongs, train_batch_size=4, **LAYOUT)
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=1)
    assert_same_but_for_rounding(whole, train("parts", data=oblongs, **parts, **LAYOUT))


# The VAE


def test_latents_with_statistics_of_their_own(sdxl, tmp_path):
    """A VAE that has latents_mean and latents_std is encoded and decoded as the stock pipelines do."""
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(sdxl)
    mean_of, std_of = [0.1, -0.2, 0.3, 0.4], [0.5, 2.0, 1.0, 0.8]
    pipeline.vae.register_to_config(latents_mean=mean_of, latents_std=std_of)
    pipeline.save_pretrained(tmp_path / "model")
    models, plain = (
        script.load_models(script.parse_args(flags(model, "unused", "unused")), torch.float32)
        for model in (tmp_path / "model", sdxl)
    )
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = script.encode_image(models, pixels)
    draw = torch.Generator().manual_seed(3)
    theirs = pipeline.prepare_latents(pixels, None, 1, 1, torch.float32, "cpu", draw, False)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-4, atol=1e-5)
    assert (script.encode_image(plain, pixels)[0] - mean).abs().max() > 0.01
    mean_of, std_of = (torch.tensor(value).view(1, 4, 1, 1) for value in (mean_of, std_of))
    with torch.no_grad():
        decoded = pipeline.vae.decode(mean * std_of / 0.13025 + mean_of).sample
    ours = script.decode_latents(models, mean)
    assert tiny.difference(ours, pipeline.image_processor.postprocess(decoded)[0]) <= 1


def test_another_vae_encodes_the_winners_and_goes_into_the_result(train, sdxl, tmp_path):
    vae = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    options = dict(train_mode="full", max_train_steps=1)
    run = train(pretrained_vae_model_name_or_path=tmp_path / "vae", **options)
    saved = load_file(run.path / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["encoder.conv_in.weight"], vae.encoder.conv_in.weight)
    assert run.column("mse/policy_winner") != train("own", **options).column("mse/policy_winner")


@pytest.mark.parametrize("cached", [False, True])
def test_latents_that_are_not_finite_stop_the_run(train, sdxl, tmp_path, cached):
    """As the stock VAE's in fp16; the row is named and no cache of them is kept."""
    shutil.copytree(sdxl, tmp_path / "broken")
    path = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.weight"][0] = math.inf
    save_file(weights, path)
    with pytest.raises(script.UserError, match=r"latents of row \d+ are not finite.*VAE"):
        train(model=tmp_path / "broken", cache_latents=cached)
    assert not list((tmp_path / "run").rglob("rows-*.safetensors"))
