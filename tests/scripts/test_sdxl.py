"""train_sspo_sdxl.py: what Stable Diffusion XL changes in a run. What all scripts promise is tested for all."""

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers import LAYOUT, assert_same_but_for_rounding
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture
def train(trains):
    return trains["sdxl"]


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


def test_layout_does_not_matter_to_pictures_of_several_shapes(train, tmp_path):
    """Each is told of its own size and crop, whichever stand beside it."""
    data = tmp_path / "oblongs"
    tiny.folder_of_winners(data, 6)
    for i, size in enumerate([(833, 400), (90, 257), (64, 64), (128, 100), (64, 65), (411, 205)]):
        Image.open(data / f"{i}.png").resize(size).save(data / f"{i}.png")
    whole = train("whole", data=data, train_batch_size=4, **LAYOUT)
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=1)
    assert_same_but_for_rounding(whole, train("parts", data=data, **parts, **LAYOUT))


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
