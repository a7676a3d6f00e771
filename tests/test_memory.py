"""examples/estimate_memory.py against what PyTorch's allocator is asked for in a real run."""

import gc
import sys

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from helpers import ROOT, flags, long, quick_first
from torch._subclasses.fake_tensor import FakeTensorMode

import train_sspo_sd
import train_sspo_sdxl


sys.path.insert(0, str(ROOT / "examples" / "benchmark"))

import estimate_memory


FLAGS = "--resolution 128 --train_batch_size 2 --gradient_accumulation_steps 2".split()


@pytest.fixture
def middling(monkeypatch, tmp_path):
    """Models in the layout of Stable Diffusion 1.5 with narrower layers, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    width = dict(block_out_channels=(64, 128, 128), norm_num_groups=16, layers_per_block=1)
    unet = dict(
        width,
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = dict(estimate_memory.VAE, block_out_channels=(8, 8, 8, 8), norm_num_groups=8, layers_per_block=1)
    clip = dict(estimate_memory.CLIP_L, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    monkeypatch.setitem(estimate_memory.UNETS, "sd", unet)
    monkeypatch.setattr(estimate_memory, "VAE", vae)
    monkeypatch.setattr(estimate_memory, "CLIP_L", clip)


def measured(words):
    """The most bytes that were allocated at once in a real run, as PyTorch's profiler saw them."""
    script, args = estimate_memory.parse("sd", words)
    gc.collect()  # what dies in the run must have been born in it
    memory = estimate_memory.Memory()  # not entered: it counts nothing here
    with estimate_memory.replaced(script, memory), torch.profiler.profile(profile_memory=True) as profile:
        estimate_memory.run("sd", script, args, memory)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "more", quick_first("--gradient_checkpointing", ["--train_mode full --draws_per_pair 2 --split_pairs"])
)
def test_estimate_is_what_a_real_run_allocates(middling, more, monkeypatch):
    monkeypatch.setattr(estimate_memory, "flash_sums", lambda query: 0)  # of a GPU alone, as the next
    monkeypatch.setattr(estimate_memory, "copies", lambda *tensors: 0)
    words = [*FLAGS, *more.split()]
    found = estimate_memory.estimate("sd", words)
    assert found["peak"] == pytest.approx(measured(words), rel=0.02)


def test_what_a_gpu_needs_beside_a_cpu_is_counted(monkeypatch):
    """The sums of flash attention's backward, by hand, and norms and upsampling that autocast runs in fp32."""

    def peak():
        with FakeTensorMode(), estimate_memory.Memory() as memory:
            query, key, value = (torch.empty(2, 8, 130, 40, requires_grad=True) for _ in range(3))
            torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
        return max(memory.peaks.values())

    assert estimate_memory.flash_sums(torch.empty(2, 8, 130, 40)) == 4 * 2 * 8 * 256 * 64
    counted = peak()
    monkeypatch.setattr(estimate_memory, "flash_sums", lambda query: 0)
    assert counted > peak()
    script, args = estimate_memory.parse("sd", FLAGS)
    with estimate_memory.replaced(script, estimate_memory.Memory()), torch.autocast("cpu", torch.bfloat16):
        pixels = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
        assert torch.nn.functional.rms_norm(pixels, (2,)).dtype == torch.float32
        assert torch.nn.functional.interpolate(pixels, scale_factor=2.0, mode="nearest").dtype == torch.float32


def test_fake_clips_are_counted_as_real_ones(monkeypatch, tmp_path):
    """
    Wan, with fewer and narrower layers, by the same counter: PyTorch's profiler would add the buffer that the CPU's
    own kernel for convolutions of clips takes.
    """
    monkeypatch.chdir(tmp_path)
    narrow = dict(num_attention_heads=2, num_layers=2, ffn_dim=256, text_dim=64)
    text = dict(estimate_memory.UMT5_XXL, vocab_size=100, d_model=64, d_ff=64, num_layers=1, num_heads=2)
    for name, config in (("WAN_1_3B", narrow), ("WAN_VAE", dict(base_dim=4)), ("UMT5_XXL", text)):
        monkeypatch.setattr(estimate_memory, name, config)
    words = "--height 32 --width 48 --num_frames 5 --train_batch_size 2 --gradient_checkpointing".split()
    fake = estimate_memory.estimate("wan", words)
    script, args = estimate_memory.parse("wan", words)
    memory = estimate_memory.Memory()
    with estimate_memory.replaced(script, memory), memory:
        parts = estimate_memory.run("wan", script, args, memory)
    real = {**parts, **memory.peaks}
    for name in ("weights", "gradients", "optimizer", "sample", "decode", "step", "update"):
        assert fake[name] == pytest.approx(real[name], rel=0.01), name


def test_decoding_takes_what_a_gpu_was_seen_to_take():
    """5.11 GiB on an H200 for a picture of 1024² in fp32; without cuDNN's copies it would be 3.31."""
    with FakeTensorMode(), estimate_memory.Memory() as memory:
        vae = estimate_memory.build(AutoencoderKL, torch.float32, **estimate_memory.VAE)
        vae.decode(torch.randn(1, 4, 128, 128))
    assert max(memory.peaks.values()) / estimate_memory.GIB == pytest.approx(5.11, rel=0.02)


@pytest.mark.parametrize(
    "script, make", [(train_sspo_sd, tiny.stable_diffusion), (train_sspo_sdxl, tiny.stable_diffusion_xl)]
)
def test_pictures_are_encoded_one_at_a_time(tmp_path, script, make):
    """A batch of four at 1024² in the VAE took 10 GiB, more than the update."""
    args = script.parse_args(flags(make(tmp_path / "model"), "unused", "unused"))
    models, seen = script.load_models(args, torch.float32), []
    models.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    script.encode_image(models, torch.randn(3, 3, 16, 16))
    assert seen == [1, 1, 1]


@long
def test_split_pairs_halve_the_activations(middling):
    together, split = (estimate_memory.estimate("sd", [*FLAGS, *more]) for more in ([], ["--split_pairs"]))
    assert split["activations"] == pytest.approx(together["activations"] / 2, rel=0.1)
    assert split["weights"] == together["weights"]
