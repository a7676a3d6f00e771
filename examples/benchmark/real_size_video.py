"""
One LoRA update of train_sspo_video.py at AnimateDiff's full size, and its peak memory.

Stable Diffusion 1.5's UNet with motion modules in every block: 1.3 billion random weights. Not part of the tests: it
needs 7 GB in fp32 and some minutes of a CPU. --saved_activations measures instead what autograd keeps of one loss on a
clip of 4 frames of 128x128: without gradient checkpointing, with the library's own, and with the script's.

    python tests/scale_video.py [--mixed_precision bf16] [--saved_activations]
"""

import itertools
import resource
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import DDPMScheduler, MotionAdapter, UNetMotionModel

import train_sspo_video as script


# Stable Diffusion 1.5's UNet as UNetMotionModel has it; the other defaults are those of AnimateDiff's adapters.
UNET = dict(sample_size=64, cross_attention_dim=768, num_attention_heads=8)


def denoiser(dtype):
    torch.set_default_dtype(dtype)
    model = UNetMotionModel(**UNET).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def winners(args):
    """Encoded winners, as the cache gives them, one by one without end."""
    for row in itertools.count():
        yield [example(args, row)], (0, row)


def example(args, row):
    mean = torch.randn(4, args.num_frames, *(side // 8 for side in script.picture_size(args)))
    prompt = {"prompt_embeds": torch.randn(77, 768)}
    return dict(
        epoch=0, row=row, dropped=False, mean=mean, std=mean * 0, prompt=prompt, geometry=script.whole_picture(args)
    )


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def saved_activations(args, accelerator, dtype):
    """Prints the bytes that autograd keeps of one policy forward, weights left out."""
    schedule = DDPMScheduler(**script.NOISE_SCHEDULE)
    unused = dict.fromkeys("tokenizer text_encoder vae reference".split())
    for kind in ("none", "library", "script"):
        args.gradient_checkpointing = kind == "script"
        models = script.Models(denoiser=denoiser(dtype), noise_scheduler=schedule, **unused)
        script.prepare_denoisers(models, args, accelerator.device)
        if kind == "library":
            models.denoiser.enable_gradient_checkpointing()
        weights = {weight.untyped_storage().data_ptr() for weight in models.denoiser.parameters()}
        kept, latents = {}, example(args, 0)["mean"][None]

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        condition = {"prompt_embeds": torch.randn(1, 77, 768)}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), accelerator.autocast():
            error = script.denoising_errors(
                models.denoiser, models, latents, latents[None], torch.tensor([[500]]), condition
            )
        size = sum(size for pointer, size in kept.items() if pointer not in weights)
        print(f"gradient checkpointing {kind}: {size / 2**20:.0f} MiB saved", flush=True)
        del models, error, kept


def main(directory):
    words = "--pretrained_model_name_or_path a --motion_adapter_name_or_path b --train_data_dir c --report_to none "
    words += f"--output_dir {directory} --resolution 128 --num_frames 4 --train_batch_size 1 --rollout_steps 2"
    argv = [word for word in sys.argv[1:] if word != "--saved_activations"]
    args = script.parse_args([*words.split(), "--gradient_checkpointing", *argv])
    accelerator = script.make_accelerator(args)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    if "--saved_activations" in sys.argv:
        return saved_activations(args, accelerator, dtype)
    imports = peak()
    schedule = DDPMScheduler(**script.NOISE_SCHEDULE)
    unused = dict.fromkeys("tokenizer text_encoder vae reference".split())
    models = script.Models(denoiser=denoiser(dtype), noise_scheduler=schedule, **unused)
    weights = sum(weight.numel() * weight.element_size() for weight in models.denoiser.parameters()) / 2**30
    motion = sum(weight.numel() for weight in script.trained_in_full(models.denoiser))
    with torch.device("meta"):
        assert motion == MotionAdapter().num_parameters()
    print(
        f"{models.denoiser.num_parameters() / 1e9:.2f} billion weights, {motion / 1e6:.0f} million of them of motion, "
        f"{weights:.2f} GiB in {dtype}\npeak with libraries {imports:.2f} GiB, with the UNet {peak():.2f} GiB",
        flush=True,
    )
    script.prepare_denoisers(models, args, accelerator.device)
    trained = [weight for weight in models.denoiser.parameters() if weight.requires_grad]
    optimizer, schedule = script.make_optimizer(trained, args, 1)
    policy, optimizer, schedule = accelerator.prepare(models.denoiser, optimizer, schedule)
    bank = script.ReplayBank(Path(directory, "replay"), args.replay_size)
    bank.push(0, script.policy_weights(models, args))
    script.load_reference(models, bank.load(0), args)
    empty_prompt = example(args, 0)["prompt"]
    for _ in range(2):
        metrics, _ = script.update(policy, models, optimizer, schedule, winners(args), empty_prompt, args, accelerator)
        told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"update: {told}\npeak {peak():.2f} GiB, {peak() - weights:.2f} GiB beside the weights", flush=True)
    script.save_denoiser(models.denoiser, args, directory)
    adapters = sum(weight.numel() for weight in trained)
    print(f"trained: {adapters / 1e6:.1f} million weights; peak after saving {peak():.2f} GiB", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(directory)
