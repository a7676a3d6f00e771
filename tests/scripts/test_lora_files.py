"""LoRA files for other tools, and which layers get adapters."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers import SCRIPTS, with_every
from safetensors import safe_open
from safetensors.torch import load_file


PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def apply_kohya(unet, weights):
    """
    Adds a file in kohya's naming to a UNet as ComfyUI and A1111 do: lora_unet_ and the layer's path, dots as
    underscores; each weight grows by alpha / rank * up @ down.
    """
    layers = {name.replace(".", "_"): layer for name, layer in unet.named_modules()}
    for name in {key.split(".", 1)[0] for key in weights}:
        up, down, alpha = (weights[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        layers[name.removeprefix("lora_unet_")].weight.data += alpha / len(down) * up @ down
    return unet


def unet_inputs(unet, kind):
    torch.manual_seed(0)
    inputs = dict(sample=torch.randn(2, 4, 8, 8), timestep=torch.tensor(500))
    inputs["encoder_hidden_states"] = torch.randn(2, 24, unet.config.cross_attention_dim)
    if kind == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 20), "time_ids": torch.rand(2, 6) * 64}
    return inputs


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("alpha", [None, 3])
def test_the_kohya_file_makes_the_same_model(trains, request, kind, alpha):
    """Alpha is another number than the rank: diffusers' converter writes the rank there."""
    run = trains[kind](output_kohya_format=True, rank=4, lora_alpha=alpha, learning_rate=1e-2)
    weights = load_file(run.path / "pytorch_lora_weights_kohya.safetensors")
    with safe_open(run.path / "pytorch_lora_weights_kohya.safetensors", "pt") as file:
        assert not file.metadata(), "with any, A1111 would take it for Stable Diffusion 1.x"
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_up\.weight|lora_down\.weight|alpha)", name) for name in weights)
    assert {weight.item() for name, weight in weights.items() if name.endswith(".alpha")} == {alpha or 4}
    pipeline = PIPELINES[kind].from_pretrained(request.getfixturevalue(kind))
    base, inputs = pipeline.unet, unet_inputs(pipeline.unet, kind)
    with torch.no_grad():
        before = base(**inputs).sample
        other_tool = apply_kohya(PIPELINES[kind].from_pretrained(request.getfixturevalue(kind)).unet, weights)
        pipeline.load_lora_weights(str(run.path))
        ours = pipeline.unet(**inputs).sample
        theirs = other_tool(**inputs).sample
    assert (ours - before).abs().max() > 1e-3, "the run has moved the model"
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_no_kohya_file_without_the_flag(train):
    assert not (train().path / "pytorch_lora_weights_kohya.safetensors").exists()


@with_every
def test_adapters_have_the_rank_that_was_asked_for(each):
    run = each(rank=3, max_train_steps=1, rollout_steps=1)
    weights = load_file(run.path / "pytorch_lora_weights.safetensors")
    assert {min(weight.shape) for weight in weights.values()} == {3}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_only_the_layers_that_are_named_get_adapters(trains, kind):
    run = trains[kind](lora_layers="to_k, to_v", max_train_steps=2)
    with safe_open(run.path / "pytorch_lora_weights.safetensors", "pt") as file:
        layers = {re.search(r"\.(to_\w+)", name)[1] for name in file.keys()}
        assert layers == {"to_k", "to_v"}
        if kind == "video":
            assert all("motion_modules" in name for name in file.keys()), "the image model stays as it is"


@with_every
def test_layers_that_are_not_there_are_one_line(each):
    with pytest.raises(each.script.UserError, match="--lora_layers to_x fits no layer"):
        each(lora_layers="to_x")
    with pytest.raises(each.script.UserError, match="--lora_layers to_q,to_kk: to_kk fits no layer"):
        each(lora_layers="to_q,to_kk")
