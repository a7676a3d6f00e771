"""
Two LoRA updates of train_sspo_sdxl.py on a UNet of full size (2.6 billion random weights), and their peak memory.

The script's own main runs, on pictures of 128x128; only its load_models is replaced, with small text encoders and VAE.
It needs 12 GB in fp32 (7 GB with --mixed_precision bf16) and some minutes of a CPU. Flags of the script may follow.

    python examples/benchmark/real_size_sdxl.py [--mixed_precision bf16]
"""

# ruff: noqa: E402
import json
import resource
import sys
import tempfile
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from estimate_memory import CLIP_G, CLIP_L, UNETS, VAE, build
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import train_sspo_sdxl as script


def small_encoders(dtype):
    """Tokenizer, text encoder of Stable Diffusion's width, and VAE, as Models names them."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "examples/quickstart/base/tokenizer", model_max_length=77)
    encoder = build(CLIPTextModel, dtype, CLIPTextConfig(**small(CLIP_L, tokenizer)))
    vae = build(AutoencoderKL, dtype, **{**VAE, "block_out_channels": (8,) * 4, "norm_num_groups": 4})
    return dict(tokenizer=tokenizer, text_encoder=encoder, vae=vae)


def small(clip, tokenizer):
    """A text encoder's configuration of the same width, with two thin layers."""
    return {**clip, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}


def load_models(args, dtype):
    parts = small_encoders(dtype)
    second = CLIPTextConfig(**small(CLIP_G, parts["tokenizer"]))
    models = script.Models(
        tokenizer_2=parts["tokenizer"],
        text_encoder_2=build(CLIPTextModelWithProjection, dtype, second),
        force_zeros=True,
        denoiser=build(UNet2DConditionModel, dtype, **UNETS["sdxl"]),
        noise_scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        **parts,
    )
    tell_size(models.denoiser)
    return models


def tell_size(denoiser):
    weights = sum(weight.nbytes for weight in denoiser.parameters()) / 2**30
    print(f"UNet: {denoiser.num_parameters() / 1e9:.2f} billion weights, {weights:.2f} GiB in {denoiser.dtype}")
    print(f"peak with it {peak():.2f} GiB", flush=True)


def peak():
    """The most resident memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_pictures(folder, count=4):
    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(count):
        Image.effect_noise((160, 128), 60).convert("RGB").save(folder / f"{i}.png")
        lines.append(f"{i}.png,noise of kind {i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def measure(script, load_models, words):
    """Runs the script's main for two updates, and tells what they needed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        words = [*words, "--output_dir", str(output), "--max_train_steps", "2", "--report_to", "none"]
        args = script.parse_args([*words, *sys.argv[1:]])
        print(f"peak with libraries {peak():.2f} GiB", flush=True)
        save_result = script.save_result

        def told(models, args, directory):
            trained = sum(weight.numel() for weight in models.denoiser.parameters() if weight.requires_grad)
            print(f"{trained / 1e6:.1f} million weights trained; peak after two updates {peak():.2f} GiB", flush=True)
            save_result(models, args, directory)

        with mock.patch.object(script, "load_models", load_models), mock.patch.object(script, "save_result", told):
            script.main(args)
        for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
            print(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
        print(f"peak after saving {peak():.2f} GiB")


def main():
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder, "winners"))
        words = f"--pretrained_model_name_or_path - --train_data_dir {folder}/winners --resolution 128 "
        words += "--train_batch_size 1 --rollout_steps 2 --gradient_checkpointing"
        measure(script, load_models, words.split())


if __name__ == "__main__":
    main()
