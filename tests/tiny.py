"""Pipelines small enough to train in a test, in the stock layout, with random weights, and sets of real pictures."""

import json

import av
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image, ImageDraw
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)


COLORS = ["red", "green", "blue", "orange", "purple", "black", "brown", "pink"]
SHAPES = ["circle", "square"]
CAPTIONS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]


def bytes_to_unicode():
    """The 256 printable symbols that CLIP's tokenizer writes bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    hidden = (byte for byte in range(256) if byte not in symbols)
    symbols.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    return [symbols[byte] for byte in range(256)]


def tokenizer(length=24):
    """CLIP's tokenizer without merges: one token a letter."""
    symbols = bytes_to_unicode()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=length)


def text_encoder(hidden=16, length=24):
    tokens = tokenizer(length)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=length,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def vae():
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
    )


def stable_diffusion(directory, prediction_type="epsilon", seed=0):
    """Writes a pipeline of some 100,000 random weights to `directory` and returns it as a string."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    return str(directory)


def picture(caption, size=(72, 64)):
    """A drawing of what the caption says."""
    _, color, shape = caption.split()
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)((12, 10, 54, 52), fill=color)
    return image


def folder_of_winners(directory, count=8, metadata="jsonl"):
    """An imagefolder of `count` drawings with metadata.jsonl or metadata.csv."""
    directory.mkdir(parents=True)
    rows = []
    for i in range(count):
        caption = CAPTIONS[i % len(CAPTIONS)]
        picture(caption).save(directory / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption})
    if metadata == "jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
    (directory / f"metadata.{metadata}").write_text("\n".join(lines) + "\n")
    return str(directory)


def rows_of(path, rows, columns):
    """The pictures of a samples/step-N.png."""
    grid = Image.open(path)
    width, height = grid.width // columns, grid.height // rows
    return [
        [grid.crop((c * width, r * height, (c + 1) * width, (r + 1) * height)) for c in range(columns)]
        for r in range(rows)
    ]


def difference(a, b):
    """The largest difference between two pictures, in steps of 1/255."""
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


def stable_diffusion_xl(directory, seed=0, force_zeros=True):
    """
    Writes a pipeline of some 150,000 random weights in the layout of the SDXL base model to `directory` and returns
    it as a string. No two widths are the same, and the tokenizers pad differently, so that nothing fits by chance.
    """
    torch.manual_seed(seed)
    second_tokenizer = tokenizer()
    second_tokenizer.pad_token = "!"
    first = text_encoder()
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(**{**first.config.to_dict(), "hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"})
    )
    autoencoder = vae()
    autoencoder.register_to_config(scaling_factor=0.13025)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer(),
        tokenizer_2=second_tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(directory)
    return str(directory)


def animate_diff(directory, seed=0, layers=1):
    """
    Writes a Stable Diffusion pipeline and a motion adapter for it, of random weights, to two folders in `directory`
    and returns both as strings. A stock adapter begins as no motion at all; this one's last layers are not zero.
    """
    base = stable_diffusion(directory / "base", seed=seed)
    torch.manual_seed(seed + 1)
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_transformer_layers_per_block=layers,
        motion_num_attention_heads=2,
        motion_norm_num_groups=2,
        motion_max_seq_length=16,
    )
    for name, weight in adapter.named_parameters():
        if name.endswith("proj_out.weight"):
            torch.nn.init.normal_(weight, std=0.2)
    adapter.save_pretrained(directory / "adapter")
    return base, str(directory / "adapter")


PROMPT_TOKENS = 96  # of FLUX.2 in most tests: the template and a caption of colours and shapes, a byte a token


def flux2(directory, seed=0):
    """
    Writes a pipeline of some 100,000 random weights in the layout of FLUX.2 [klein] base to `directory` and returns it
    as a string. The VAE's statistics are no zeros and ones, and its text encoder has layers behind the last in use.
    """
    torch.manual_seed(seed)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = Qwen2Tokenizer(vocab={word: i for i, word in enumerate([*bytes_to_unicode(), *marks])}, merges=[])
    tokens.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=2,
        sample_size=64,
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokens),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=30,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=4,
                max_position_embeddings=512,
                initializer_range=0.5,
                tie_word_embeddings=True,
                pad_token_id=tokens.pad_token_id,
            )
        ),
        tokenizer=tokens,
        transformer=Flux2Transformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )
    pipeline.save_pretrained(directory)
    return str(directory)


def wan(directory, large=False, scheduler=None, seed=0):
    """
    Writes a pipeline of some 30,000 random weights in the layout of Wan 2.1, or with `large` of Wan 2.2 TI2V 5B, to
    `directory` and returns it as a string. The VAE's statistics are no zeros and ones.
    """
    torch.manual_seed(seed)
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz,.-"]
    tokens = T5TokenizerFast(vocab=[(piece, -float(i > 2)) for i, piece in enumerate(pieces)], extra_ids=0)
    channels = 12 if large else 4
    statistics = torch.Generator().manual_seed(seed)
    autoencoder = AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=torch.randn(channels, generator=statistics).tolist(),
        latents_std=(torch.rand(channels, generator=statistics) + 0.5).tolist(),
        **(
            dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
            if large
            else {}
        ),
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    own = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if large else 3.0
    )
    pipeline = WanPipeline(
        tokenizer=tokens,
        text_encoder=text_encoder,
        vae=autoencoder,
        scheduler=scheduler or own,
        transformer=transformer,
        expand_timesteps=large,
    )
    pipeline.save_pretrained(directory)
    return str(directory)


def moving_frames(caption, count=12, size=(72, 64)):
    """A clip of what the caption says, crossing the picture: frame i is 3 * i pixels to the right of the first."""
    _, color, shape = caption.split()
    frames = []
    for i in range(count):
        image = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((3 * i, 10, 3 * i + 24, 34), fill=color)
        frames.append(image)
    return frames


def write_clip(file, frames, format="mp4", codec="mpeg4", **options):
    """Encodes PIL pictures; `file` is a path or a file object."""
    with av.open(file if hasattr(file, "write") else str(file), "w", format=format) as container:
        track = container.add_stream(codec, rate=8, options=options)
        track.width, track.height = frames[0].size
        track.pix_fmt = "yuv420p"
        track.bit_rate = 1_000_000
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_image(frame)))
        container.mux(track.encode())


def folder_of_clips(directory, count=6, length=12, metadata="jsonl"):
    """A videofolder of `count` clips with metadata.jsonl or metadata.csv, or with the annotations of MagicTime."""
    directory.mkdir(parents=True)
    rows = []
    for i in range(count):
        name = f"{i:03}" if metadata == "magictime" else str(i)
        write_clip(directory / f"{name}.mp4", moving_frames(CAPTIONS[i], length))
        rows.append((name, CAPTIONS[i]))
    if metadata == "jsonl":
        lines = [json.dumps({"file_name": f"{name}.mp4", "text": caption}) for name, caption in rows]
    elif metadata == "csv":
        lines = ["file_name,text", *(f"{name}.mp4,{caption}" for name, caption in rows)]
    else:
        lines = ["videoid,name,is_transmit", *(f'{name},"{caption}",0' for name, caption in rows)]
    suffix = "csv" if metadata == "magictime" else metadata
    name = "captions" if metadata == "magictime" else "metadata"
    (directory / f"{name}.{suffix}").write_text("\n".join(lines) + "\n")
    return str(directory)
