"""What is made of a picture, and what Stable Diffusion XL is told of it."""

import io
import json
import math

import numpy as np
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from helpers import SCRIPTS, flags
from PIL import Image


def parsed(script, **options):
    motion = dict(motion_adapter_name_or_path="unused") if script is SCRIPTS["video"] else {}
    return script.parse_args(flags("unused", "unused", "unused", **motion, **options))


def stripes(width, height):
    """A picture whose red is its column and whose green is its row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None, :], np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("size", [(160, 64), (64, 200)])
def test_crop_is_where_its_geometry_says(script, center_crop, random_flip, size):
    args = parsed(script, center_crop=center_crop, random_flip=random_flip)
    corners, flips = set(), set()
    for seed in range(12):
        pixels, geometry = script.crop_picture(stripes(*size), args, torch.Generator().manual_seed(seed))
        colors = ((pixels + 1) * 127.5).round()
        assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.float32
        flipped = bool(colors[0, 0, 0] > colors[0, 0, 1])
        top, left = geometry[2:4].tolist()
        left = size[0] - 64 - left if flipped else left
        assert colors[1, 0, 0] == top
        assert colors[0, 0].min() == left
        assert geometry[:2].tolist() == [size[1], size[0]]
        assert geometry[4:].tolist() == [64, 64]
        corners.add((top, left))
        flips.add(flipped)
    middle = ((size[1] - 64) // 2, (size[0] - 64) // 2)
    assert corners == {middle} if center_crop else len(corners) > 6
    assert flips == ({True, False} if random_flip else {False})


def test_large_pictures_are_resized_before_the_crop(script):
    picture = Image.new("RGB", (400, 200), "blue")
    picture.paste("red", (100, 0, 300, 200))  # the middle square, which is all that may be left
    pixels, geometry = script.crop_picture(picture, parsed(script, center_crop=True), torch.Generator())
    assert geometry.tolist() == [200, 400, 0, 32, 64, 64]
    assert (pixels[0, :, 4:-4] > 0.9).all() and (pixels[2, :, 4:-4] < -0.9).all()


def test_fine_patterns_are_averaged_not_picked(script):
    """Where a picture is made smaller: a chess board of pixels becomes grey."""
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    pixels, _ = script.crop_picture(board.convert("RGB"), parsed(script), torch.Generator())
    assert pixels.abs().max() < 0.1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_pictures_look_as_in_a_viewer(kind):
    """Transparency on white, rotation as the camera noted it, 16 bits scaled, palettes and CMYK converted."""
    script = SCRIPTS[kind]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert script.to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert script.to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert script.to_rgb(deep).getpixel((0, 0)) == (128, 128, 128)
    assert script.to_rgb(Image.new("CMYK", (4, 4))).mode == "RGB"
    turned = Image.new("RGB", (6, 4))
    turned.getexif()[0x0112] = 6  # the camera was held upright
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=turned.getexif())
    assert script.to_rgb(Image.open(file)).size == (4, 6)
    with pytest.raises(ValueError, match="floating point"):  # 0 to 1 would become black
        script.to_rgb(Image.fromarray(np.full((4, 4), 0.5, np.float32)))


def test_a_picture_is_read_from_bytes_or_a_path_alone(tmp_path):
    script, path = SCRIPTS["sd"], tmp_path / "red.png"
    Image.new("RGB", (6, 4), "red").save(path)
    for encoded in (str(path), path.read_bytes(), {"path": str(path), "bytes": None}):
        picture = script.open_picture(encoded)
        assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="the field is empty"):
        script.open_picture(None)


def test_epochs_crop_and_mirror_anew_but_for_cached_winners(tmp_path):
    """By seed, epoch and row; the same again for the same three."""
    script, file = SCRIPTS["sd"], io.BytesIO()
    stripes(160, 64).save(file, "PNG")

    def read(seed, epoch, row):
        args = parsed(script, center_crop=False, random_flip=True)
        return script.read_winner(file.getvalue(), args, (seed, epoch, row))["pixels"]

    first = read(0, 0, 0)
    assert torch.equal(first, read(0, 0, 0))
    assert not any(torch.equal(first, read(*key)) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


# What Stable Diffusion XL is told

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
def test_sdxl_is_told_of_the_crop_that_was_made(trains, oblongs, monkeypatch, cached):
    """Every denoiser call of a bf16 run is told its winner's size, corner and target, in fp32, uncached and cached."""
    script, crops, told, batches = SCRIPTS["sdxl"], {}, [], []
    load, project, loss = script.Winners.load, UNet2DConditionModel.get_aug_embed, script.training_loss

    def spy_load(self, epoch, row, example=None):
        loaded = load(self, epoch, row, example)
        crops[0 if cached else epoch, row] = loaded["pixels"].clone()
        return loaded

    def spy_project(self, emb, encoder_hidden_states, added_cond_kwargs):
        told.append(added_cond_kwargs["time_ids"])
        return project(self, emb, encoder_hidden_states, added_cond_kwargs)

    monkeypatch.setattr(script.Winners, "load", spy_load)
    monkeypatch.setattr(UNet2DConditionModel, "get_aug_embed", spy_project)
    monkeypatch.setattr(script, "training_loss", lambda *a: batches.append(a[2]["keys"]) or loss(*a))
    run = trains["sdxl"](
        data=oblongs,
        center_crop=False,
        random_flip=True,
        cache_latents=cached,
        max_train_steps=6,
        rollout_steps=1,
        rollout_guidance_scale=2.0,
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
