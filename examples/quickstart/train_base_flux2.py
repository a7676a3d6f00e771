"""Train the small flow model from nothing: a pipeline in the layout of FLUX.2 [klein] base for 64x64 emoji.

Two stages, the first resumable (kill it, start it again) and leaving its files in --work_dir:

    python train_base_flux2.py transformer   # Flux2Transformer2DModel, on latents computed once
    python train_base_flux2.py export        # the averaged weights as a Flux2KleinPipeline, fp16, in --output_dir

The autoencoder is that of the emoji base (see train_base.py), whose layers AutoencoderKLFlux2 has too; only its
statistics are measured here. The text encoder is a small Qwen3 of random weights that is never trained: its hidden
states tell the captions apart, and what they mean is learned by the transformer. Data, loop and degradations are those
of train_base.py, so no caption says what is degraded here either.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from glyphs import CAPTIONS
from quickstart_flux2 import SAMPLER, TEXT_LENGTH
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_base import BYTE_SYMBOLS, add_training_flags, averaged_weights, grid, latent_pool, train
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX


HERE = Path(__file__).parent


# ---------------------------------------------------------------------------------------------------------- models


def build_tokenizer():
    """Qwen's byte-level BPE and a chat template, with merges learned on the captions: most words are one token."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(initial_alphabet=BYTE_SYMBOLS, show_progress=False)
    learner.train_from_iterator([*CAPTIONS, "user", "assistant"] * 2, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    words = [*BYTE_SYMBOLS, *("".join(merge) for merge in merges), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def build_text_encoder(tokenizer, seed):
    """A random Qwen3 of 28 layers, of which the pipeline reads the states behind the 9th, the 18th and the 27th."""
    torch.manual_seed(seed)
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            initializer_range=0.15,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        text_encoder.model.embed_tokens.weight.normal_()
    return text_encoder.half().float().eval().requires_grad_(False)  # what it will be once it was saved


def build_vae(base, latents):
    """The emoji base's autoencoder, and the mean and variance of each channel of the 2x2 patches of `latents`."""
    source = AutoencoderKL.from_pretrained(base, subfolder="vae")
    names = "block_out_channels down_block_types up_block_types layers_per_block latent_channels norm_num_groups"
    config = {name: source.config[name] for name in (*names.split(), "mid_block_add_attention", "sample_size")}
    vae = AutoencoderKLFlux2(**config)
    vae.load_state_dict(source.state_dict() | vae.bn.state_dict(prefix="bn."))
    patches = Flux2KleinPipeline._patchify_latents(latents)
    vae.bn.running_mean.copy_(patches.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(patches.var(dim=(0, 2, 3)))
    return vae.eval().requires_grad_(False)


def build_transformer(seed):
    """One double-stream block and four single-stream ones, of width 128: 1.6 M parameters, 64 tokens a picture."""
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=96,
        timestep_guidance_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name in ("norm_out.linear.weight", "proj_out.weight"):
            torch.nn.init.zeros_(parameter)  # every block begins as the identity
    return transformer


def build_pipeline(args):
    """The pipeline with an untrained transformer. Its autoencoder's statistics are those of the training pictures."""
    tokenizer = build_tokenizer()
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),  # as FLUX.2's own
        vae=build_vae(args.vae, latent_pool(args)[0]),
        text_encoder=build_text_encoder(tokenizer, args.seed),
        tokenizer=tokenizer,
        transformer=build_transformer(args.seed),
    )


# -------------------------------------------------------------------------------------------------------- training


def training_latents(vae, latents):
    """Latents (n, 4, 16, 16) as the transformer has them: 2x2 patches, each of their 16 channels normalised."""
    mean, std = vae.bn.running_mean.view(1, -1, 1, 1), (vae.bn.running_var + vae.bn.eps).sqrt().view(1, -1, 1, 1)
    return (Flux2KleinPipeline._patchify_latents(latents) - mean) / std


def train_transformer(args):
    means, _, labels = latent_pool(args)
    pipeline = build_pipeline(args)
    pipeline.set_progress_bar_config(disable=True)
    transformer, pool = pipeline.transformer, training_latents(pipeline.vae, means)
    conditions, text_ids = pipeline.encode_prompt([*CAPTIONS, ""], max_sequence_length=TEXT_LENGTH)
    empty, image_ids = len(CAPTIONS), pipeline._prepare_latent_ids(pool[:1])
    count = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"{len(pool)} pictures, {count:,} parameters, captions of std {conditions.std():.2f}", flush=True)

    def loss_fn(chosen, rng):
        latents, noise = pool[chosen], torch.randn((len(chosen), *pool.shape[1:]), generator=rng)
        sigmas = torch.sigmoid(args.sigma_mean + torch.randn(len(chosen), generator=rng))
        dropped = torch.rand(len(chosen), generator=rng) < 0.1
        velocity = transformer(
            hidden_states=pipeline._pack_latents(torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1))),
            timestep=sigmas,
            encoder_hidden_states=conditions[torch.where(dropped, empty, labels[chosen])],
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        return {"loss": (velocity.float() - pipeline._pack_latents(noise - latents)).square().mean()}

    with sdpa_kernel(SDPBackend.MATH):  # at this size the fused attention's backward is slow on a CPU
        train("transformer", {"transformer": transformer}, loss_fn, lambda: samples(pipeline), len(pool), args)


# ---------------------------------------------------------------------------------------------------------- export


def export(args):
    """The averaged weights as a pipeline that Flux2KleinPipeline.from_pretrained loads."""
    pipeline = build_pipeline(args)
    pipeline.transformer.load_state_dict(averaged_weights("transformer", "transformer", args))
    pipeline.to(torch.float16).save_pretrained(args.output_dir, safe_serialization=True)
    # Halves on disk only: without this, transformers loads the text encoder as fp16 where diffusers loads fp32.
    config = args.output_dir / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    drawn = samples(Flux2KleinPipeline.from_pretrained(args.output_dir))  # what a user would load
    drawn.quantize(256).save(args.output_dir.parent / "samples_flux2.png", optimize=True)
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in {args.output_dir}")


def samples(pipeline):
    """One picture of every caption in captions' order, ten in a row, not chosen."""
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(CAPTIONS))]
    drawn = pipeline(prompt=CAPTIONS, generator=noise, output_type="np", **SAMPLER).images
    return grid((torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1).split(10))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["transformer", "export"])
    parser.add_argument("--work_dir", type=Path, default=Path("flux2-base-work"))
    parser.add_argument("--output_dir", type=Path, default=HERE / "base_flux2")
    parser.add_argument("--vae", type=Path, default=HERE / "base", help="the pipeline whose autoencoder is taken over")
    parser.add_argument("--sigma_mean", type=float, default=0.4, help="of the logit-normal sigmas, before the sigmoid")
    add_training_flags(parser)
    parser.set_defaults(
        steps=2800, batch_size=32, lr=1.5e-3, decay_share=0.4, ema_decay=0.999, degraded_share=0.75, save_every=250
    )
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    {"transformer": train_transformer, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
