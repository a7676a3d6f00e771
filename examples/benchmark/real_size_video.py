"""
Two LoRA updates of train_sspo_video.py at AnimateDiff's full size, and their peak memory.

Stable Diffusion 1.5's UNet with motion modules in every block: 1.3 billion random weights. The script's own main runs,
on clips of 4 frames of 128x128; only its load_models is replaced. It needs 7 GB in fp32 and some minutes of a CPU.
Flags of the script may follow. --saved_activations measures instead what autograd keeps of one loss on such a clip:
without gradient checkpointing, with the library's own, and with the script's.

    python examples/benchmark/real_size_video.py [--mixed_precision bf16] [--saved_activations]
"""

# ruff: noqa: E402
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import av
import numpy as np
import torch
from diffusers import DDPMScheduler, MotionAdapter, UNetMotionModel
from estimate_memory import UNETS, build
from real_size_sdxl import measure, small_encoders, tell_size

import train_sspo_video as script


def make_models(dtype):
    return script.Models(
        denoiser=build(UNetMotionModel, dtype, **UNETS["video"]),
        noise_scheduler=DDPMScheduler(**script.NOISE_SCHEDULE),
        **small_encoders(dtype),
    )


def load_models(args, dtype):
    models = make_models(dtype)
    motion = sum(weight.numel() for weight in script.trained_in_full(models.denoiser))
    with torch.device("meta"):
        assert motion == MotionAdapter().num_parameters()
    print(f"{motion / 1e6:.0f} million weights of motion")
    tell_size(models.denoiser)
    return models


def saved_activations(args, dtype):
    """Prints the bytes that autograd keeps of one policy forward, weights left out."""
    for kind in ("none", "library", "script"):
        args.gradient_checkpointing = kind == "script"
        models = make_models(dtype)
        script.prepare_denoiser(models, args, "cpu")
        if kind == "library":
            models.denoiser.enable_gradient_checkpointing()
        weights = {weight.untyped_storage().data_ptr() for weight in models.denoiser.parameters()}
        kept, latents = {}, torch.randn(1, *script.latent_shape(models, args))

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        condition = {"prompt_embeds": torch.randn(1, 77, 768)}
        inputs = (latents, latents[None], torch.tensor([[500]]), condition)
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            error = script.denoising_errors(models.denoiser, models, *inputs)
        size = sum(size for pointer, size in kept.items() if pointer not in weights)
        print(f"gradient checkpointing {kind}: {size / 2**20:.0f} MiB saved", flush=True)
        del models, error, kept


def write_clips(folder, count=4, frames=8):
    folder.mkdir()
    lines, noise = ["file_name,text"], np.random.default_rng(0)
    for i in range(count):
        with av.open(str(folder / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
            for _ in range(frames):
                picture = noise.integers(0, 256, (128, 160, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{i}.mp4,noise of kind {i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def main():
    with tempfile.TemporaryDirectory() as folder:
        words = f"--pretrained_model_name_or_path - --motion_adapter_name_or_path - --train_data_dir {folder}/winners "
        words += "--resolution 128 --num_frames 4 --frame_stride 1 --train_batch_size 1 --rollout_steps 2"
        words = [*words.split(), "--gradient_checkpointing"]
        if "--saved_activations" in sys.argv:
            sys.argv.remove("--saved_activations")
            args = script.parse_args([*words, *sys.argv[1:]])
            dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
            saved_activations(args, dtype)
        else:
            write_clips(Path(folder, "winners"))
            measure(script, load_models, words)


if __name__ == "__main__":
    main()
