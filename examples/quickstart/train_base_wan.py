"""Train a small model in the layout of Wan 2.1 from nothing: 9 frames of 64x64, OpenMoji glyphs that move.

Three stages, the first two resumable (kill one, start it again) and leaving their files in --work_dir:

    python train_base_wan.py vae           # AutoencoderKLWan: 9 frames become 3 x 8 x 8 x 16 latents
    python train_base_wan.py transformer   # WanTransformer3DModel, on latents computed once
    python train_base_wan.py export        # the averaged weights as a WanPipeline, fp16, in --output_dir
    python train_base_wan.py measure       # what came out: real clips behind its autoencoder, its own by guidance

The text encoder is a small UMT5 of random weights that is never trained: its states tell the captions apart, and what
they mean is learned by the transformer. Half of the clips flicker and no caption says so (see clips.py), so the base
makes both kinds. The training loop is that of train_base.py.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import quickstart_wan
import torch
import torch.nn.functional as F
from clips import MOTIONS, caption, mixed_set, render
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from glyphs import ALIGNED, CAPTIONS, HELD_OUT, TEST_SEEDS
from quickstart_video import measure, sample
from scorer import load_scorer
from train_base import averaged_weights, grid, train
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel


HERE = Path(__file__).parent
FRAMES = 9  # 4k + 1
FLOW_SHIFT = 3.0
CHANNELS = 16
SAMPLER = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64, "num_frames": FRAMES}


# ---------------------------------------------------------------------------------------------------------- models


def build_tokenizer():
    """Each word of the captions is a token; other words are spelled."""
    words = sorted({word for text in [*CAPTIONS, *MOTIONS] for word in text.split()})
    pieces = [*(f"\u2581{word}" for word in words), *"abcdefghijklmnopqrstuvwxyz-,."]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab += [(piece, -1.0 if len(piece) > 1 else -9.0) for piece in pieces]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


def build_text_encoder(tokenizer, seed):
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).half().float().eval().requires_grad_(False)  # what it will be once it was saved


def build_vae(mean=(0.0,) * CHANNELS, std=(1.0,) * CHANNELS):
    """Halves the sides three times (once by patches of 2 x 2, as Wan 2.2's) and the frames but the first twice."""
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=list(mean),
        latents_std=list(std),
    )


def build_transformer(seed):
    """48 tokens a clip, in 5 blocks of width 192."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=5,
        rope_max_seq_len=32,
    )


def build_scheduler():
    """Wan's own."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)


# ------------------------------------------------------------------------------------------------------------ data


def clip_pool(args):
    """(clips (n, frames, 64, 64, 3) uint8, captions): drawn once, then kept in --work_dir."""
    file = args.work_dir / f"clips-{args.clips_per_caption}.npz"
    if not file.exists():
        clips, captions = mixed_set(args.clips_per_caption, count=FRAMES)
        np.savez(file, clips=clips, captions=captions)
    kept = np.load(file)
    return kept["clips"], list(kept["captions"])


def clip_tensor(clips):
    """uint8 (n, f, h, w, 3) to float (n, 3, f, h, w) in -1..1."""
    return torch.as_tensor(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def strips(clips):
    """Clips (n, 3, f, h, w) in -1..1 as one picture, a line a clip."""
    return grid(list(clips.clamp(-1, 1).transpose(1, 2)))


# --------------------------------------------------------------------------------------------------------- the VAE


def differences(clips):
    """Between neighbours in a row, in a column and in time: edges, and how a clip goes on."""
    return [torch.diff(clips, dim=dimension) for dimension in (2, 3, 4)]


def decode(vae, latents):
    """AutoencoderKLWan.decode without its clamp to -1..1: where white has gone past 1 there would be no gradient."""
    vae.clear_cache()
    latents, frames = vae.post_quant_conv(latents), []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        one = latents[:, :, i : i + 1]
        frames.append(vae.decoder(one, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)


def vae_loss(vae, clips, rng):
    """
    L1 on pixels, on their differences and on 4x4 means (colours), and a small penalty on large latents.

    Wan takes the posterior's mode, so none is drawn; noise of one size makes the latents smooth.
    """
    mean = vae.encode(clips).latent_dist.mode().float()
    decoded = decode(vae, mean + 0.1 * torch.randn(mean.shape, generator=rng)).float()
    pixel = F.l1_loss(decoded, clips)
    edge = sum(F.l1_loss(ours, theirs) for ours, theirs in zip(differences(decoded), differences(clips)))
    colour = F.l1_loss(F.avg_pool3d(decoded, (1, 4, 4)), F.avg_pool3d(clips, (1, 4, 4)))
    size = mean.square().mean()
    parts = {"pixel": pixel, "edge": edge, "colour": colour, "size": size}
    return {"loss": pixel + 0.3 * edge + 3 * colour + 1e-4 * size, **parts}


def train_vae(args):
    clips, _ = clip_pool(args)
    torch.manual_seed(args.seed)
    vae = build_vae()
    shown = clip_tensor(clips[:640:83])

    def loss_fn(chosen, rng):
        return vae_loss(vae, clip_tensor(clips[chosen.numpy()]), rng)

    def preview():
        decoded = vae.decode(vae.encode(shown).latent_dist.mode()).sample
        return strips(torch.stack([shown, decoded], dim=1).flatten(0, 1))

    train("vae", {"vae": vae}, loss_fn, preview, len(clips), args)


def load_vae(args):
    """The trained one, with the mean and the deviation of each of its channels over the training clips."""
    vae = build_vae()
    vae.load_state_dict(averaged_weights("vae", "vae", args))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def latent_pool(args):
    """The training clips' latents in training space, their captions, and the mean and deviation of each channel."""
    file = args.work_dir / f"latents-{args.clips_per_caption}.pt"
    clips, captions = clip_pool(args)
    if not file.exists():
        vae = load_vae(args)
        latents = torch.cat([vae.encode(clip_tensor(part)).latent_dist.mode() for part in np.array_split(clips, 100)])
        mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
        torch.save(((latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1), mean, std), file)
    latents, mean, std = torch.load(file, weights_only=True)
    return latents, captions, mean, std


# ------------------------------------------------------------------------------------------------- the transformer


def build_pipeline(args):
    """The pipeline with an untrained transformer."""
    _, _, mean, std = latent_pool(args)
    vae = build_vae(mean.tolist(), std.tolist())
    vae.load_state_dict(averaged_weights("vae", "vae", args))
    tokenizer = build_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer, args.seed),
        vae=vae.eval().requires_grad_(False),
        scheduler=build_scheduler(),
        transformer=build_transformer(args.seed),
    )


class PaddingOnce:
    """
    Attention to a prompt whose last token stands for `copies` of itself.

    Wan pads prompts to 512 tokens and masks nothing. All padding is the same, so that here, where prompts are short,
    it need be computed but once: the numbers are the same, in a third of the time.
    """

    def __init__(self, copies):
        self.copies = copies

    def __call__(self, attention, hidden_states, encoder_hidden_states, *_):
        query = attention.norm_q(attention.to_q(hidden_states))
        key = attention.norm_k(attention.to_k(encoder_hidden_states))
        value = attention.to_v(encoder_hidden_states)
        query, key, value = (some.unflatten(2, (attention.heads, -1)).transpose(1, 2) for some in (query, key, value))
        weight = torch.zeros(1, key.shape[2], dtype=query.dtype)
        weight[:, -1] = math.log(self.copies)
        attended = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype), attn_mask=weight)
        return attention.to_out[0](attended.transpose(1, 2).flatten(2))


def pad_once(transformer, embeds):
    """Prompts (n, 512, c) without their padding but one token of it; the transformer is made to take them so."""
    longest = int(embeds.any(dim=2).sum(dim=1).max())
    for block in transformer.blocks:
        block.attn2.set_processor(PaddingOnce(embeds.shape[1] - longest))
    return embeds[:, : longest + 1]


def train_transformer(args):
    latents, captions, _, _ = latent_pool(args)
    pipeline, transformer = build_pipeline(args), build_transformer(args.seed)
    pipeline.set_progress_bar_config(disable=True)
    words = [*dict.fromkeys(captions), ""]
    embeds, _ = pipeline.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=512)
    embeds = pad_once(transformer, embeds)
    labels = torch.tensor([words.index(text) for text in captions])

    def loss_fn(chosen, rng):
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=rng)
        u = torch.randn(len(chosen), generator=rng).sigmoid()
        sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)  # more often where motion is decided
        dropped = torch.rand(len(chosen), generator=rng) < 0.1
        condition = embeds[labels[chosen].masked_fill(dropped, len(words) - 1)]
        share = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - share) * clean + share * noise
        velocity = transformer(hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=condition).sample
        return {"loss": F.mse_loss(velocity.float(), noise - clean)}

    def preview():
        pipeline.transformer.load_state_dict(transformer.state_dict())
        texts = [caption(CAPTIONS[5 * i], motion) for i in range(4) for motion in list(MOTIONS)[:2]]
        rng = torch.Generator().manual_seed(0)
        clips = pipeline(texts, generator=rng, output_type="pt", **SAMPLER).frames
        return strips(2 * clips.transpose(1, 2) - 1)

    train("transformer", {"transformer": transformer}, loss_fn, preview, len(latents), args)


def export(args):
    """The averaged weights as a pipeline that WanPipeline.from_pretrained loads."""
    pipeline = build_pipeline(args)
    pipeline.transformer.load_state_dict(averaged_weights("transformer", "transformer", args))
    pipeline.to(torch.float16).save_pretrained(args.output_dir, safe_serialization=True)
    # Halves on disk only: without this, transformers loads the text encoder as fp16 where diffusers loads fp32.
    config = args.output_dir / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in {args.output_dir}")


def measure_base(args):
    """Prints what quickstart_wan.py measures, of held-out emoji's real clips and of the base's of aligned ones."""
    pipeline, scorer = quickstart_wan.load(args.output_dir, "cpu"), load_scorer()
    vae, sampler = pipeline.vae, quickstart_wan.SAMPLER

    def behind(clip):
        decoded = vae.decode(vae.encode(clip_tensor(clip[None])).latent_dist.mode()).sample[0]
        return ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()

    def tell(what, clips, jobs):
        measured = measure(clips, jobs, scorer)
        share = (measured["flicker"] > 0.02).mean()
        means = ", ".join(f"{name} {values.mean():.4f}" for name, values in measured.items())
        print(f"{what}: {means}, flickering {share:.0%}", flush=True)

    jobs = [(HELD_OUT[i % 12], list(MOTIONS)[(i + i // 12) % 4]) for i in range(48)]
    real = [render(*job, TEST_SEEDS, FRAMES) for job in jobs]
    tell("real, steady", real, jobs)
    with torch.no_grad():
        tell("the same behind the autoencoder", [behind(clip) for clip in real], jobs)
    jobs = [(ALIGNED[i % 28], list(MOTIONS)[(i + i // 28) % 4]) for i in range(56)]
    for guidance in (1.0, 1.5, 3.0):
        made = sample(pipeline, jobs, 50_000, sampler | {"guidance_scale": guidance})
        tell(f"the base's at guidance {guidance:g}", made, jobs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["vae", "transformer", "export", "measure"])
    parser.add_argument("--work_dir", type=Path, default=Path("wan-base-work"))
    parser.add_argument("--output_dir", type=Path, default=HERE / "base_wan")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--ema_decay", type=float)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay_share", type=float, default=0.4)
    parser.add_argument("--weight_decay", type=float, default=1e-3)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--clips_per_caption", type=int, default=12, help="clips of each glyph with each motion")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log_every", type=int, default=25)
    parser.add_argument("--save_every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    defaults = {
        "vae": {"steps": 5000, "batch_size": 4, "lr": 1.5e-3, "ema_decay": 0.995},
        "transformer": {"steps": 5500, "batch_size": 32, "lr": 1e-3, "ema_decay": 0.999},
        "export": {},
        "measure": {},
    }
    args = parser.parse_args()
    for key, value in defaults[args.stage].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    stages = {"vae": train_vae, "transformer": train_transformer, "export": export, "measure": measure_base}
    stages[args.stage](args)


if __name__ == "__main__":
    main()
