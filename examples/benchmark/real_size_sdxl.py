"""
One LoRA update of train_sspo_sdxl.py on a UNet of SDXL's full size (2.6 billion random weights), and its peak memory.

Not part of the tests: it needs 12 GB in fp32 (7 GB with --mixed_precision bf16) and a minute or two of a CPU.

    python tests/scale_sdxl.py [--mixed_precision bf16]
"""

import itertools
import resource
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from estimate_memory import UNETS

import train_sspo_sdxl as script


def unet(dtype):
    torch.set_default_dtype(dtype)
    model = UNet2DConditionModel(**UNETS["sdxl"]).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def winners(args):
    """Encoded winners, as the cache gives them, one by one without end."""
    for row in itertools.count():
        yield [example(args, row)], (0, row)


def example(args, row):
    mean = torch.randn(4, args.resolution // 8, args.resolution // 8)
    prompt = {"prompt_embeds": torch.randn(77, 2048), "pooled_prompt_embeds": torch.randn(1280)}
    geometry = script.whole_picture(args)
    return dict(epoch=0, row=row, dropped=False, mean=mean, std=mean * 0, prompt=prompt, geometry=geometry)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(directory):
    words = f"--pretrained_model_name_or_path a --train_data_dir b --output_dir {directory} --report_to none "
    words += "--resolution 128 --train_batch_size 1 --rollout_steps 2 --gradient_checkpointing"
    args = script.parse_args([*words.split(), *sys.argv[1:]])
    accelerator = script.make_accelerator(args)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    imports = peak()
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    unused = dict.fromkeys("tokenizer tokenizer_2 text_encoder text_encoder_2 force_zeros vae reference".split())
    models = script.Models(denoiser=unet(dtype), noise_scheduler=schedule, **unused)
    weights = sum(weight.numel() * weight.element_size() for weight in models.denoiser.parameters()) / 2**30
    print(
        f"UNet: {models.denoiser.num_parameters() / 1e9:.2f} billion weights, {weights:.2f} GiB in {dtype}", flush=True
    )
    print(f"peak with libraries {imports:.2f} GiB, with the UNet {peak():.2f} GiB", flush=True)

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
    print(f"LoRA: {adapters / 1e6:.1f} million weights; peak after saving {peak():.2f} GiB", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(directory)
