"""What is held in which precision: trained weights in fp32, so that no small update and no gap is lost to rounding."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter
from helpers import SCRIPTS, keep_models
from safetensors.torch import load_file


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


def test_vae_of_sdxl_is_in_fp32_unless_one_is_named(load, sdxl, tmp_path):
    """The stock one overflows in half precision; one that is named may, too, where it does not say otherwise."""
    _, models = load(SCRIPTS["sdxl"], torch.bfloat16)
    assert (models.vae.dtype, models.text_encoder_2.dtype) == (torch.float32, torch.bfloat16)
    named = dict(pretrained_vae_model_name_or_path=Path(sdxl, "vae"))
    assert load(SCRIPTS["sdxl"], torch.bfloat16, **named)[1].vae.dtype == torch.bfloat16
    assert load(SCRIPTS["sdxl"], torch.float16, **named)[1].vae.dtype == torch.float32, "its configuration says so"
    shutil.copytree(Path(sdxl, "vae"), tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    fixed = load(SCRIPTS["sdxl"], torch.float16, pretrained_vae_model_name_or_path=tmp_path / "vae")[1]
    assert fixed.vae.dtype == torch.float16


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


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_lora_samples_in_the_precision_of_its_base_and_learns_in_its_own(each, monkeypatch, mode):
    """Adapters are in half precision for the sampler's calls alone; full training has autocast in all of them."""
    script, calls = each.script, {"sampler": set(), "loss": set()}
    predict, sample, policies = script.predict, script.self_sample, keep_models(monkeypatch, script)
    names = ["loss"]

    def watched_predict(denoiser, noisy, timesteps, condition):
        def look(*_):  # inside the denoiser's forward, which accelerate may have wrapped
            trained = {p.dtype for name, p in denoiser.named_parameters() if mode == "full" or ".lora_" in name}
            calls[names[-1]].add((torch.is_autocast_enabled("cpu"), noisy.dtype, torch.float32 in trained))

        hook = denoiser.conv_in.register_forward_pre_hook(look)
        prediction = predict(denoiser, noisy, timesteps, condition)
        hook.remove()
        return prediction

    def watched_sample(*args, **kwargs):
        names.append("sampler")
        latents = sample(*args, **kwargs)
        names.pop()
        assert latents.dtype == torch.float32
        return latents

    monkeypatch.setattr(script, "predict", watched_predict)
    monkeypatch.setattr(script, "self_sample", watched_sample)
    options = dict(reference="latest", replay_steps=1, max_train_steps=2)
    options |= dict(validation_prompts=["a red circle"], validation_steps=1)
    run = each(mixed_precision="bf16", train_mode=mode, **options)
    half, autocast = (False, torch.bfloat16, False), (True, torch.float32, True)
    assert calls == {"sampler": {half if mode == "lora" else autocast}, "loss": {autocast}}
    assert {p.dtype for p in policies[0].denoiser.parameters() if p.requires_grad} == {torch.float32}
    first, last = (load_file(run.path / "replay" / f"iteration-{i}.safetensors") for i in (0, 2))
    assert any(not torch.equal(first[name], last[name]) for name in first), "the policy has learned"


def test_adapters_are_the_same_parameters_after_sampling(script, load):
    """The optimizer and data parallel hold them: their objects, and every bit. Also after an error."""
    args, models = load(script, torch.bfloat16)
    script.prepare_denoiser(models, args, "cpu")
    before = {name: (parameter, parameter.clone()) for name, parameter in models.denoiser.named_parameters()}
    with pytest.raises(MemoryError), script.stock_precision(models, None):
        assert {parameter.dtype for parameter in models.denoiser.parameters()} == {torch.bfloat16}
        raise MemoryError
    after = dict(models.denoiser.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter and torch.equal(parameter, copy) for name, (parameter, copy) in before.items())
