"""Train the emoji base from nothing: a Stable Diffusion pipeline for 64x64 pictures, small enough for two CPU cores.

Three stages, each resumable (kill it, start it again) and each leaving its files in --work_dir:

    python train_base.py vae        # AutoencoderKL, factor 4: a picture becomes 16x16x4 latents
    python train_base.py unet       # UNet2DConditionModel and CLIPTextModel together, on latents computed once
    python train_base.py export     # the averaged weights as a StableDiffusionPipeline, fp16 safetensors, --output_dir

More than half of the training pictures are degraded (see glyphs.py) and no caption says so: the base draws both kinds.
Every picture's pose, and the order of the pictures, follow from --seed; the OpenMoji glyphs are CC BY-SA 4.0.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from glyphs import BASE_SEEDS, CAPTIONS, DEGRADATIONS, SIZE, mixed_set
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


LATENT_SIZE = SIZE // 4
BYTE_SYMBOLS = sorted(pre_tokenizers.ByteLevel.alphabet())


# ---------------------------------------------------------------------------------------------------------- models


def build_vae():
    """Few GroupNorm groups over enough channels: with one or two channels a group, colours get lost."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def build_tokenizer():
    """CLIP's byte-level BPE with merges learned on the captions, so that each of their words is one token."""
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", initial_alphabet=BYTE_SYMBOLS, show_progress=False)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[a-z]+|[^\sa-z]+"), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    )
    learner.train_from_iterator(CAPTIONS * 2, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    words = BYTE_SYMBOLS + [symbol + "</w>" for symbol in BYTE_SYMBOLS] + ["".join(merge) for merge in merges]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def build_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet():
    """Three levels, the two coarser ones with attention: about 3.5 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(56, 80, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=96,
        attention_head_dim=4,  # diffusers reads this as the number of heads
    )


def build_scheduler():
    """Stable Diffusion 1.x's own schedule and default sampler."""
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def picture_tensor(pictures):
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(rows):
    """Rows of (n, 3, h, w) tensors in [-1, 1] as one picture, drawn twice as large."""
    strips = [np.concatenate(list(row.permute(0, 2, 3, 1).numpy()), axis=1) for row in rows]
    pixels = ((np.concatenate(strips) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((pixels.shape[1] * 2, pixels.shape[0] * 2), Image.Resampling.LANCZOS)


# --------------------------------------------------------------------------------------------------- training loop


def learning_rate(step, args):
    """Warm up, hold, then fall linearly to zero over the last `--decay_share` of the steps."""
    decay_start = args.steps * (1 - args.decay_share)
    return args.lr * min(1.0, (step + 1) / args.warmup, max(0.0, (args.steps - step) / (args.steps - decay_start)))


def train(name, models, loss_fn, preview, data_size, args):
    """The loop that both stages share: AdamW, averaged weights, a state file to resume from, a log line and a grid.

    loss_fn(batch indices, generator) -> dict of losses, of which "loss" is the one to minimise.
    """
    parameters = [parameter for model in models.values() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True
    )
    ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    state_file, first_step, seconds = args.work_dir / f"{name}.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for key, model in models.items():
            model.load_state_dict(state["models"][key])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        ema.decay = args.ema_decay
        first_step, seconds = state["step"], state["seconds"]
        print(f"resumed at step {first_step}")

    def save(step):
        state = {key: model.state_dict() for key, model in models.items()}
        ema.store(parameters)
        ema.copy_to(parameters)
        averaged = {key: {n: p.clone() for n, p in model.state_dict().items()} for key, model in models.items()}
        for model in models.values():
            model.eval()
        with torch.no_grad():
            preview().save(args.work_dir / f"{name}-{step:06d}.png")
        for model in models.values():
            model.train()
        ema.restore(parameters)
        state = {"models": state, "averaged": averaged, "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
        torch.save(state | {"step": step, "seconds": seconds}, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").rename(state_file)

    sums, started = {}, time.time()
    for step in range(first_step, args.steps):
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(data_size, (args.batch_size,), generator=rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses = loss_fn(chosen, rng)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        if (step + 1) % args.log_every == 0:
            seconds, started = seconds + time.time() - started, time.time()
            row = {"step": step + 1} | {key: round(value / args.log_every, 5) for key, value in sums.items()}
            row |= {"lr": round(learning_rate(step, args), 6), "minutes": round(seconds / 60, 1)}
            print(json.dumps(row), flush=True)
            with open(args.work_dir / f"{name}.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            sums = {}
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(step + 1)


def averaged_weights(name, key, args):
    return torch.load(args.work_dir / f"{name}.pt", weights_only=True)["averaged"][key]


# --------------------------------------------------------------------------------------------------------- the VAE


def edges(pictures):
    return pictures[..., :, 1:] - pictures[..., :, :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def vae_loss(vae, pictures, rng):
    """L1 on pixels, on their differences (edges) and on 4x4 means (colours), and a small KL."""
    posterior = vae.encode(pictures).latent_dist
    mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
    decoded = vae.decode(mean + std * torch.randn(mean.shape, generator=rng)).sample.float()
    pixel = F.l1_loss(decoded, pictures)
    edge = sum(F.l1_loss(ours, theirs) for ours, theirs in zip(edges(decoded), edges(pictures)))
    colour = F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(pictures, 4))
    kl = 0.5 * (mean.square() + std.square() - 1 - logvar).mean()
    return {"loss": pixel + 0.5 * edge + colour + 5e-4 * kl, "pixel": pixel, "edge": edge, "colour": colour, "kl": kl}


def train_vae(args):
    torch.manual_seed(args.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    pictures, _, _ = mixed_set(args.pictures_per_caption, BASE_SEEDS, args.degraded_share, args.degradations)
    shown = picture_tensor(pictures[: 2 * len(CAPTIONS) : 4])

    def loss_fn(chosen, rng):
        batch = picture_tensor(pictures[chosen.numpy()]).contiguous(memory_format=torch.channels_last)
        return vae_loss(vae, batch, rng)

    def preview():
        return grid([shown, vae.decode(vae.encode(shown).latent_dist.mode()).sample])

    train("vae", {"vae": vae}, loss_fn, preview, len(pictures), args)


# -------------------------------------------------------------------------------------- the UNet and the text encoder


@torch.no_grad()
def standardise_latents(vae, pictures):
    """Fold each latent channel's mean and spread into the two 1x1 convolutions, so that latents are close to N(0, 1).

    Stable Diffusion has one scaling factor for all channels and no shift; after this, both are trivial.
    """
    mean = torch.cat([vae.encode(batch).latent_dist.mean for batch in pictures.split(100)])
    shift, scale = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    to_latent, from_latent = vae.quant_conv, vae.post_quant_conv
    to_latent.weight[:4] /= scale.view(-1, 1, 1, 1)
    to_latent.bias[:4] = (to_latent.bias[:4] - shift) / scale
    to_latent.bias[4:] -= 2 * scale.log()  # the other half of the outputs is the logarithm of the variance
    from_latent.bias += from_latent.weight[:, :, 0, 0] @ shift
    from_latent.weight *= scale.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def load_vae(args):
    if args.vae is not None:
        return AutoencoderKL.from_pretrained(args.vae, subfolder="vae").eval().requires_grad_(False)
    vae = build_vae().eval().requires_grad_(False)
    vae.load_state_dict(averaged_weights("vae", "vae", args))
    pictures, _, _ = mixed_set(25, BASE_SEEDS, degraded_share=0.58)
    standardise_latents(vae, picture_tensor(pictures))
    return vae


@torch.no_grad()
def latent_pool(args):
    """Every training picture's posterior, (means, stds, labels): encoded once, then kept in --work_dir."""
    file = args.work_dir / f"latents-{args.degraded_share}-{'-'.join(args.degradations)}.pt"
    if not file.exists():
        pictures, labels, _ = mixed_set(args.pictures_per_caption, BASE_SEEDS, args.degraded_share, args.degradations)
        vae = load_vae(args)
        posteriors = [vae.encode(picture_tensor(part)).latent_dist for part in np.array_split(pictures, 100)]
        means = torch.cat([posterior.mean for posterior in posteriors])
        stds = torch.cat([posterior.std for posterior in posteriors])
        torch.save((means, stds, torch.as_tensor(labels)), file)
    return torch.load(file, weights_only=True)


def min_snr_weights(alphas_cumprod, gamma=5.0):
    """min(snr, gamma) / snr: the nearly clean timesteps, hard to predict and soon drawn, do not dominate the loss."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


def train_unet(args):
    means, stds, labels = latent_pool(args)
    vae = load_vae(args)
    print(f"{len(means)} latents, std {means.std():.3f}, mean posterior std {stds.mean():.3f}", flush=True)

    torch.manual_seed(args.seed)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    text_encoder = build_text_encoder(tokenizer)
    unet = build_unet().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # at this size the fused attention's backward is slow on a CPU
    tokens = tokenizer([*CAPTIONS, ""], padding="max_length", return_tensors="pt").input_ids
    empty = len(CAPTIONS)
    weights = min_snr_weights(scheduler.alphas_cumprod)

    def loss_fn(chosen, rng):
        noise = torch.randn((len(chosen), *means.shape[1:]), generator=rng)
        latents = means[chosen] + stds[chosen] * torch.randn(noise.shape, generator=rng)
        timesteps = torch.randint(1000, (len(chosen),), generator=rng)
        dropped = torch.rand(len(chosen), generator=rng) < 0.1
        condition = text_encoder(tokens)[0][torch.where(dropped, empty, labels[chosen])]
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        errors = (unet(noisy, timesteps, condition).sample.float() - noise).square().mean(dim=(1, 2, 3))
        return {"loss": (errors * weights[timesteps]).mean(), "mse": errors.mean()}

    def preview():
        shown = list(range(0, len(CAPTIONS), 2))
        embeddings = text_encoder(tokens)[0]
        rows = []
        for seed in range(4):
            rng = torch.Generator().manual_seed(seed)
            latents = torch.randn((len(shown), 4, LATENT_SIZE, LATENT_SIZE), generator=rng)
            sampler = DPMSolverMultistepScheduler.from_config(scheduler.config)
            sampler.set_timesteps(20)
            condition = torch.cat([embeddings[empty].expand(len(shown), -1, -1), embeddings[shown]])
            for timestep in sampler.timesteps:
                free, guided = unet(torch.cat([latents] * 2), timestep, condition).sample.chunk(2)
                latents = sampler.step(free + 5.0 * (guided - free), timestep, latents).prev_sample
            rows.append(vae.decode(latents).sample)
        return grid(rows)

    train("unet", {"unet": unet, "text_encoder": text_encoder}, loss_fn, preview, len(means), args)


# ---------------------------------------------------------------------------------------------------------- export


def export(args):
    """The averaged weights as a pipeline that StableDiffusionPipeline.from_pretrained loads."""
    tokenizer = build_tokenizer()
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    text_encoder.load_state_dict(averaged_weights("unet", "text_encoder", args))
    unet.load_state_dict(averaged_weights("unet", "unet", args))
    pipeline = StableDiffusionPipeline(
        vae=load_vae(args),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(args.output_dir, safe_serialization=True)
    # Halves on disk only: without this, transformers loads the text encoder as fp16 where diffusers loads fp32.
    config = args.output_dir / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    samples(args.output_dir).quantize(256).save(args.output_dir.parent / "samples.png", optimize=True)
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in {args.output_dir}")


def samples(folder):
    """One picture of every caption in captions' order, ten in a row, not chosen: from what a user would load."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(CAPTIONS))]
    pictures = pipeline(CAPTIONS, generator=noise, num_inference_steps=20, guidance_scale=3.0, output_type="np").images
    return grid((torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1).split(10))


def add_training_flags(parser):
    """What `train` and `latent_pool` read of the flags."""
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay_share", type=float)
    parser.add_argument("--weight_decay", type=float, default=1e-3)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--ema_decay", type=float)
    parser.add_argument("--pictures_per_caption", type=int, default=300)
    parser.add_argument("--degraded_share", type=float, default=0.58)
    parser.add_argument("--degradations", nargs="+", choices=DEGRADATIONS, default=DEGRADATIONS)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--save_every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["vae", "unet", "export"])
    parser.add_argument("--work_dir", type=Path, default=Path("emoji-base-work"))
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--vae", type=Path, help="a finished pipeline: its autoencoder instead of the first stage's")
    add_training_flags(parser)
    defaults = {
        "vae": {"steps": 3800, "batch_size": 16, "lr": 1.5e-3, "decay_share": 0.45, "ema_decay": 0.995},
        "unet": {"steps": 3800, "batch_size": 64, "lr": 1e-3, "decay_share": 0.4, "ema_decay": 0.999},
        "export": {},
    }
    args = parser.parse_args()
    for key, value in defaults[args.stage].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "unet": train_unet, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
