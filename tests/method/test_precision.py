"""What is held in which precision: trained weights in fp32, so that no small update and no gap is lost to rounding."""

from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter
from helpers import SCRIPTS


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_is_trained_is_in_fp32_and_the_rest_as_asked(script, load, mode):
    args, models = load(script, torch.bfloat16, train_mode=mode)
    script.prepare_denoiser(models, args, "cpu")
    precisions = {True: set(), False: set()}
    for parameter in models.denoiser.parameters():
        precisions[parameter.requires_grad].add(parameter.dtype)
    assert precisions[True] == {torch.float32}
    trains_all = mode == "full" and script is not SCRIPTS["video"]
    assert precisions[False] == (set() if trains_all else {torch.bfloat16})
    assert {weight.dtype for weight in script.policy_weights(models, args).values()} == {torch.float32}


def test_motion_weights_take_no_detour_through_half_precision(load, motion):
    """Of an adapter beside an image model in half precision, full training has every bit."""
    _, models = load(SCRIPTS["video"], torch.bfloat16, train_mode="full")
    adapter = MotionAdapter.from_pretrained(motion[1]).state_dict()
    weights = models.denoiser.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in adapter.items())
    assert set(adapter) == {name for name in weights if "motion_modules" in name}


def test_vae_of_sdxl_is_in_fp32_unless_one_is_named(load, sdxl):
    """The stock one overflows in half precision."""
    _, models = load(SCRIPTS["sdxl"], torch.bfloat16)
    assert (models.vae.dtype, models.text_encoder_2.dtype) == (torch.float32, torch.bfloat16)
    named = dict(pretrained_vae_model_name_or_path=Path(sdxl, "vae"))
    assert load(SCRIPTS["sdxl"], torch.bfloat16, **named)[1].vae.dtype == torch.bfloat16


def test_adapters_take_activations_as_they_are(script, load):
    """Under autocast the attention's output is in half precision: peft would cast it to fp32, and autocast back."""
    args, models = load(script, torch.bfloat16)
    script.prepare_denoiser(models, args, "cpu")
    taken = []
    for name, module in models.denoiser.named_modules():
        if name.endswith(f"to_out.0.lora_A.{script.POLICY}"):
            module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].dtype))
    rows = [{**script.uncropped(args), **script.encode_prompt(models, ["a red circle"])[0]}]
    latents = torch.randn(1, *script.latent_shape(models, args))
    with torch.autocast("cpu", torch.bfloat16):
        script.predict(models.denoiser, latents, torch.tensor([500]), script.collate_condition(rows, "cpu"))
    assert len(taken) >= 8 and set(taken) == {torch.bfloat16}
