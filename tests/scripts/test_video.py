"""train_sspo_video.py: what clips and motion modules change in a run. What all scripts promise is tested for all."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from PIL import Image
from safetensors.torch import load_file

import train_sspo_video as script


@pytest.fixture
def train(trains):
    return trains["video"]


# Samples


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


def test_samples_move_and_stand_still(train):
    """
    The GIF shows the clips eight frames a second, the base's above the policy's; the PNG at most eight frames of each,
    a line a clip, the lines of a prompt together. Height and width are free.
    """
    options = dict(num_frames=10, frame_stride=1, resolution=None, height=32, width=48, learning_rate=1e-2)
    run = train(validation_prompts=["a red circle", "a blue square"], max_train_steps=2, rollout_steps=2, **options)
    moving = frames_of(run.path / "samples" / "step-2.gif", 2, 2)
    still = tiny.rows_of(run.path / "samples" / "step-2.png", 4, 5)
    assert still[0][0].size == (48, 32)
    for prompt in range(2):
        for row in range(2):
            clip, strip = moving[row][prompt], still[2 * prompt + row]
            assert len(clip) == 10
            for ours, theirs in zip(clip[::2], strip, strict=True):  # every second: 10 would be more than 8
                assert np.abs(ours - np.asarray(theirs, dtype=int)).mean() < 12, "but for the palette"
    with Image.open(run.path / "samples" / "step-2.gif") as gif:
        assert 110 <= gif.info["duration"] <= 130


def test_the_gif_stands_row_above_row_and_prompt_beside_prompt(tmp_path):
    """Told by a colour of row, prompt and frame."""
    colours = np.indices((2, 3, 3)).transpose(1, 2, 3, 0) * (200, 100, 50)
    rows = [[[Image.new("RGB", (16, 16), tuple(map(int, c))) for c in clip] for clip in row] for row in colours]
    script.write_samples(rows, SimpleNamespace(output_dir=tmp_path, num_frames=3), 1, [])
    moving = np.array(frames_of(tmp_path / "samples" / "step-1.gif", 2, 3))
    assert np.abs(moving[:, :, :, 8, 8] - colours).max() < 12, "but for the palette"


def test_tensorboard_gets_the_clip_as_it_is(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(report_to="tensorboard", validation_prompts=["a red circle"], max_train_steps=1)
    events = EventAccumulator(str(run.path / "logs" / "sspo"))
    events.Reload()
    (clip,) = events.Images("samples")
    assert clip.encoded_image_string == (run.path / "samples" / "step-1.gif").read_bytes()


# The motion modules


def test_lora_is_on_the_motion_modules_alone(train):
    """A and B of four projections of two attentions in seven modules; names alone would hit the image model too."""
    run = train(max_train_steps=1)
    weights = load_file(run.path / "pytorch_lora_weights.safetensors")
    assert len(weights) == 2 * 4 * 2 * 7
    assert all(".motion_modules." in name for name in weights)


def test_deep_motion_modules_are_saved_whole(train, tmp_path):
    """With two layers in each module, which the library's own save forgets."""
    base, adapter = tiny.animate_diff(tmp_path / "deep", layers=2)
    options = dict(train_mode="full", max_train_steps=2, checkpointing_steps=2)
    run = train(model=base, motion_adapter_name_or_path=adapter, **options)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    last = load_file(run.path / "replay" / "iteration-1.safetensors")
    for folder in (run.path, run.path / "checkpoint-2" / "motion_adapter"):
        adapter = MotionAdapter.from_pretrained(folder)
        assert adapter.config.motion_transformer_layers_per_block == 2
        weights = UNetMotionModel.from_unet2d(unet, adapter).state_dict()
        assert all(torch.equal(weights[name], weight) for name, weight in last.items())
