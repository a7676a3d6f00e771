"""Train a motion adapter for the emoji base from nothing: 1.4 M weights, on glyphs that move.

    python train_adapter.py --output_dir adapter

The image model stays frozen; noise levels are AnimateDiff's linear ones. Half of the clips flicker (see clips.py), and
no caption says so: base and adapter together make both kinds. The weights are averaged over the last steps and saved
in fp16. Killed and started again, the training resumes where it last saved.

The base's tokenizer cuts words like "moving" into pieces that no emoji's name has. Nobody trained their embeddings,
which are so faint that the image model feels no difference between "left" and "right"; and the motion modules know the
caption through it alone. So these pieces first get embeddings of length 100 (the names': 0.55), drawn at random and
written into the base's text encoder: that drowns the name in what such a word says, so that the word says much the
same behind every name. What the base draws from names alone stays as it is, to the bit.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from clips import CAPTIONS, FRAMES, mixed_set
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer


HERE = Path(__file__).resolve().parent
NOISE_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False)


def build_adapter(unet):
    return MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=unet.config.norm_num_groups,
        motion_max_seq_length=FRAMES,
    )


def draw_new_words(base, captions):
    """Gives the tokens of `captions` that no emoji's name has long embeddings, so that the image model feels them."""
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    tokens = {token for text in captions for token in tokenizer(text).input_ids}
    new = sorted(tokens - {token for name in CAPTIONS for token in tokenizer(name).input_ids})
    file = Path(base, "text_encoder", "model.safetensors")
    weights = load_file(file)
    embedding = next(weight for name, weight in weights.items() if name.endswith("token_embedding.weight"))
    drawn = torch.randn(len(new), embedding.shape[1], generator=torch.Generator().manual_seed(1))
    embedding[new] = (100 * F.normalize(drawn)).to(embedding.dtype)
    save_file(weights, file, metadata={"format": "pt"})


@torch.no_grad()
def encode(base, clips, captions):
    """Latents (n, 4, frames, h, w), an embedding for each different caption and one for "", and which is whose."""
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    latents = []
    for clip in clips:
        pixels = torch.as_tensor(clip).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(vae.encode(pixels).latent_dist.mode().transpose(0, 1) * vae.config.scaling_factor)
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    words = [*dict.fromkeys(captions), ""]
    tokens = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.stack(latents), text_encoder(tokens)[0], torch.tensor([words.index(c) for c in captions])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default=str(HERE / "base"), help="its text encoder gets the new words")
    parser.add_argument("--output_dir", default=str(HERE / "adapter"))
    parser.add_argument("--state", default="adapter_state.pt", help="where the unfinished training is kept")
    parser.add_argument("--per_caption", type=int, default=6, help="clips of each glyph with each motion")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.time()

    clips, captions = mixed_set(args.per_caption)
    draw_new_words(args.base, captions)
    latents, embeds, labels = encode(args.base, clips, captions)
    print(f"{len(clips)} clips encoded in {time.time() - started:.0f} s", flush=True)
    unet = UNet2DConditionModel.from_pretrained(args.base, subfolder="unet")
    model = UNetMotionModel.from_unet2d(unet, build_adapter(unet))
    model.freeze_unet2d_params()
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    average = EMAModel(parameters, decay=0.99)
    noising = DDPMScheduler(**NOISE_SCHEDULE)
    first, state_file, losses = 0, Path(args.state), []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        first = state["step"]
    for step in range(first, args.steps):
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 50, (args.steps - step) / (0.25 * args.steps))
        rows = torch.randint(len(latents), (args.batch_size,), generator=draw)
        dropped = torch.rand(args.batch_size, generator=draw) < 0.1
        timesteps = torch.randint(1000, (2, args.batch_size), generator=draw).amax(0)  # more often the noisy ones
        noise = torch.randn(latents[rows].shape, generator=draw)
        condition = embeds[labels[rows].masked_fill(dropped, len(embeds) - 1)].repeat_interleave(FRAMES, dim=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            noisy = noising.add_noise(latents[rows], noise, timesteps)
            predicted = model(noisy, timesteps, condition).sample
        errors = F.mse_loss(predicted.float(), noise, reduction="none").flatten(1).mean(1)
        # The noise's error over the SNR is the clip's error. Motion is decided where noise hides the clip: there plain
        # errors of the noise are too small to teach which motion the caption tells of.
        snr = compute_snr(noising, timesteps)
        loss = (errors * (snr + 1).clamp(max=5) / snr).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}: loss {sum(losses[-25:]) / 25:.4f}, {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 100 == 0:
            motion = {name: weight for name, weight in model.state_dict().items() if "motion_modules" in name}
            state = dict(model=motion, optimizer=optimizer.state_dict(), average=average.state_dict(), step=step + 1)
            torch.save(state, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").replace(state_file)
    average.copy_to(parameters)
    adapter = build_adapter(unet)
    adapter.load_state_dict({name: w for name, w in model.state_dict().items() if "motion_modules" in name})
    adapter.half().save_pretrained(args.output_dir)
    print(f"{args.output_dir} written after {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
