"""
How much memory of an accelerator a run will need, computed without an accelerator, weights or data.

    python examples/benchmark/estimate_memory.py            # the table of docs/memory.md; some minutes
    python examples/benchmark/estimate_memory.py sdxl --mixed_precision fp16 --gradient_checkpointing

The first word names the script (sd, sdxl, video, flux2, wan); what follows are flags of that script. Its own functions
run, from prepare_denoiser to a whole update and a validation, on models of the real size made of fake tensors, which
have a shape and no contents. Every storage is counted from its allocation to its end.

Fake tensors on the CPU stand in for those on a GPU, where four things are otherwise, and are set right here: autocast
runs norms and upsampling in fp32 there, the backward of flash attention sums in fp32, cuDNN copies what it convolves,
and AdamW steps all weights at once, with temporaries of their size. On both, attention is a fused kernel. fp16 is
computed as bf16. CONTEXT and SLACK, for what CUDA's libraries and the allocator take beside tensors, are on the safe
side of what was measured (docs/gpu.md). Several GPUs need no more each: the scripts average gradients where they are.
"""

import functools
import importlib
import itertools
import os
import sys
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock


os.environ["ACCELERATE_USE_CPU"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BatchEncoding,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)


GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations")
PHASES = ("load", "encode", "sample", "update", "step", "decode")
CARDS = (8, 12, 16, 24, 48, 80)  # GB as they are sold, taken as 10**9 bytes: error correction takes the rest of some
CONTEXT = 1.0  # GiB for the CUDA context and the workspaces of cuBLAS and cuDNN
SLACK = 1.08  # what the allocator reserves, for each byte in tensors at the peak

UNETS = {
    "sd": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sdxl": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "video": dict(sample_size=64, cross_attention_dim=768, num_attention_heads=8),
}
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
)

KLEIN_4B = dict(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)
QWEN3_4B = dict(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
WAN_1_3B = dict(num_attention_heads=12, num_layers=30, ffn_dim=8960)
WAN_VAE = {}  # as diffusers' defaults are
WAN_5B = dict(num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48)
WAN_5B_VAE = dict(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=[0.0] * 48,
    latents_std=[1.0] * 48,
)
UMT5_XXL = dict(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
WAN_2_2 = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"  # told by its name: else it is Wan 2.1 1.3B
FAMILIES = (*UNETS, "flux2", "wan")

BASE = "--mixed_precision fp16 --train_batch_size 1 --gradient_accumulation_steps 16"
# The runs of the table: a heading, the script and the flags that they share, and the flags of each.
TABLE = [
    (
        "Stable Diffusion 1.5, 512²",
        "sd --cache_latents --rollout_batch_size 4",
        [
            "",
            "--gradient_checkpointing",
            "--gradient_checkpointing --rollout_batch_size 16",
            "--gradient_checkpointing --train_batch_size 4",
            "--train_mode full --gradient_checkpointing",
            "--train_mode full --gradient_checkpointing --use_8bit_adam",
        ],
    ),
    (
        "Stable Diffusion XL, 1024²",
        "sdxl --cache_latents --rollout_batch_size 4",
        [
            "",
            "--gradient_checkpointing",
            "--gradient_checkpointing --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix",
            "--gradient_checkpointing --rollout_batch_size 16",
            "--train_mode full --gradient_checkpointing",
            "--train_mode full --gradient_checkpointing --use_8bit_adam",
            "--train_mode full --gradient_checkpointing --optimizer adafactor",
        ],
    ),
    (
        "AnimateDiff, 16 frames of 256²",
        "video --cache_latents --rollout_batch_size 1",
        [
            "",
            "--gradient_checkpointing",
            "--gradient_checkpointing --split_pairs",
            "--train_mode full --gradient_checkpointing",
            "--train_mode full --gradient_checkpointing --use_8bit_adam",
        ],
    ),
    (
        "AnimateDiff, 16 frames of 512²",
        "video --cache_latents --rollout_batch_size 1 --resolution 512",
        [
            "",
            "--gradient_checkpointing",
            "--gradient_checkpointing --split_pairs",
            "--train_mode full --gradient_checkpointing",
            "--train_mode full --gradient_checkpointing --split_pairs",
            "--train_mode full --gradient_checkpointing --split_pairs --use_8bit_adam",
        ],
    ),
    (
        "FLUX.2 [klein] base 4B, 512²",
        "flux2 --mixed_precision bf16 --cache_latents --rollout_batch_size 4",
        [
            "",
            "--gradient_checkpointing",
            "--gradient_checkpointing --rollout_batch_size 16",
            "--train_mode full --gradient_checkpointing",
            "--train_mode full --gradient_checkpointing --use_8bit_adam",
        ],
    ),
    (
        "FLUX.2 [klein] base 4B, 1024²",
        "flux2 --mixed_precision bf16 --cache_latents --rollout_batch_size 4 --resolution 1024",
        [
            "--gradient_checkpointing",
            "--gradient_checkpointing --rollout_batch_size 1",
            "--gradient_checkpointing --rollout_batch_size 1 --split_pairs",
            "--train_mode full --gradient_checkpointing",
            "--train_mode full --gradient_checkpointing --use_8bit_adam",
        ],
    ),
    (
        "Wan 2.1 1.3B, 33 frames of 480 × 832",
        "wan --mixed_precision bf16 --cache_latents --rollout_batch_size 1",
        [
            "",
            "--gradient_checkpointing",
            "--gradient_checkpointing --split_pairs",
            "--train_mode full --gradient_checkpointing",
            "--train_mode full --gradient_checkpointing --use_8bit_adam",
        ],
    ),
    (
        "Wan 2.1 1.3B, 81 frames of 480 × 832",
        "wan --mixed_precision bf16 --cache_latents --rollout_batch_size 1 --num_frames 81",
        [
            "--gradient_checkpointing",
            "--gradient_checkpointing --split_pairs",
            "--train_mode full --gradient_checkpointing --split_pairs",
            "--train_mode full --gradient_checkpointing --split_pairs --use_8bit_adam",
        ],
    ),
    (
        "Wan 2.2 TI2V 5B, 33 frames of 704 × 1280",
        f"wan --pretrained_model_name_or_path {WAN_2_2} --mixed_precision bf16 --cache_latents --rollout_batch_size 1 "
        "--height 704 --width 1280",
        [
            "--gradient_checkpointing",
            "--gradient_checkpointing --split_pairs",
            "--gradient_checkpointing --split_pairs --num_frames 121",
            "--train_mode full --gradient_checkpointing --optimizer adafactor",
            "--train_mode full --gradient_checkpointing --optimizer adafactor --num_frames 17",
        ],
    ),
]


ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
CONVOLUTION = torch.ops.aten.convolution.default


def flash_sums(query):
    """Bytes that a GPU's flash attention takes in its backward for the query's gradient, (b, heads, length, width)."""
    batch, heads, length, width = query.shape
    return 4 * batch * heads * (-(-length // 128) * 128) * (-(-width // 32) * 32)


def copies(*tensors):
    """Bytes that cuDNN takes for a convolution: its input and output once more, with their channels last."""
    return sum(tensor.nbytes for tensor in tensors)


class Memory(TorchDispatchMode):
    """
    Counts the bytes of the storages that live. `peaks` has the most that there were in each phase of a run.

    Fake tensors have no contents: what the host would read off one is answered with 1, or True.
    """

    def __init__(self):
        super().__init__()
        self.living, self.now, self.parked, self.phase, self.peaks = {}, 0, 0, "load", {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        if function is ATTENTION_BACKWARD:
            self.note(flash_sums(args[1]))
        if function is CONVOLUTION:
            self.note(copies(args[0], result))
        return result

    def note(self, more=0):
        """Keeps the most that there was in this phase; with `more` bytes that are there for a moment."""
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now - self.parked + more)

    def count(self, storage):
        if storage._cdata not in self.living:
            self.living[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.note()
            weakref.finalize(storage, self.release, storage._cdata)

    def release(self, storage):
        self.now -= self.living.pop(storage)

    def during(self, phase, function):
        """`function`, with what it needs counted under the name of `phase`."""

        @functools.wraps(function)
        def call(*inputs, **named):
            outer, self.phase = self.phase, phase
            try:
                return function(*inputs, **named)
            finally:
                self.phase = outer

        return call


# ------------------------------------------------------------------------------------------------------------------
# Models of the real size
# ------------------------------------------------------------------------------------------------------------------


def build(kind, dtype, *inputs, **named):
    """A frozen model of `kind` with random weights in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return kind(*inputs, **named).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def build_models(family, script, args, dtype):
    """The Models of a script, in the precisions that its load_models gives them."""
    full = args.train_mode == "full"
    if family == "flux2":
        text_encoder = Qwen3Config(**QWEN3_4B, num_hidden_layers=script.TEXT_LAYERS)
        vae = build(AutoencoderKLFlux2, torch.float32)
        vae.enable_slicing()
        return script.Models(
            tokenizer=ChatTokenizer(),
            text_encoder=build(Qwen3Model, dtype, text_encoder),
            vae=vae,
            denoiser=build(Flux2Transformer2DModel, torch.float32 if full else dtype, **KLEIN_4B),
            noise_scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            timestep_shift=args.timestep_shift,
            max_sequence_length=args.max_sequence_length,
        )
    if family == "wan":
        large = args.pretrained_model_name_or_path == WAN_2_2
        transformer, vae = (WAN_5B, WAN_5B_VAE) if large else (WAN_1_3B, WAN_VAE)
        vae = build(AutoencoderKLWan, torch.float32, **vae)
        vae.enable_slicing()
        return script.Models(
            tokenizer=tokenize_padded,
            text_encoder=build(UMT5EncoderModel, dtype, UMT5Config(**UMT5_XXL)),
            vae=vae,
            denoiser=build_wan(torch.float32 if full else dtype, transformer),
            noise_scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0 if large else 3.0),
            timestep_shift=args.timestep_shift,
        )
    parts = dict(tokenizer=tokenize, text_encoder=build(CLIPTextModel, dtype, CLIPTextConfig(**CLIP_L)))
    if family == "sdxl":
        second = build(CLIPTextModelWithProjection, dtype, CLIPTextConfig(**CLIP_G))
        parts.update(tokenizer_2=tokenize, text_encoder_2=second, force_zeros=True)
    own_vae = family == "sdxl" and args.pretrained_vae_model_name_or_path is None
    parts["vae"] = build(AutoencoderKL, torch.float32 if own_vae else dtype, **VAE)
    if family == "video":
        parts["denoiser"] = build(UNetMotionModel, dtype, **UNETS[family])
        for weight in script.trained_in_full(parts["denoiser"]) if full else ():
            weight.data = weight.data.float()
    else:
        parts["vae"].enable_slicing()
        parts["denoiser"] = build(UNet2DConditionModel, torch.float32 if full else dtype, **UNETS[family])
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    return script.Models(noise_scheduler=schedule, **parts)


def tokenize(captions, **_):
    return SimpleNamespace(input_ids=torch.zeros(len(captions), tokenize.model_max_length, dtype=torch.long))


tokenize.model_max_length = 77


def tokenize_padded(captions, max_length, **_):
    """What stands in for UMT5's: a mask that keeps every token, which the longest caption has."""
    tokens = torch.zeros(len(captions), max_length, dtype=torch.long)
    return BatchEncoding(dict(input_ids=tokens, attention_mask=torch.ones_like(tokens)))


def build_wan(dtype, config):
    """Wan's transformer, of which from_pretrained keeps some layers in fp32."""
    model = build(WanTransformer3DModel, dtype, **config)
    for name, weight in model.named_parameters():
        if any(part in name for part in model._keep_in_fp32_modules):
            weight.data = weight.data.float()
    return model


class ChatTokenizer:
    """What stands in for Qwen3's: 512 tokens, whatever the caption."""

    def apply_chat_template(self, messages, **_):
        return ""

    def __call__(self, text, max_length, **_):
        tokens = torch.zeros(1, max_length, dtype=torch.long)
        return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def make_examples(script, args):
    """The examples of one micro-batch as the data set gives them."""
    frames = (args.num_frames,) if hasattr(args, "num_frames") else ()
    pixels = (*frames, 3, *script.picture_size(args))
    return [
        dict(epoch=0, row=row, caption="", pixels=torch.zeros(pixels), **script.uncropped(args))
        for row in range(args.train_batch_size)
    ]


# ------------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------------


def parse(family, words):
    """The script and its arguments, with no more micro-batches in an update than the memory needs."""
    script = importlib.import_module(f"train_sspo_{family}")
    needed = ["--pretrained_model_name_or_path", "-", "--train_data_dir", "-", "--validation_prompts", ""]
    needed += ["--motion_adapter_name_or_path", "-"] if family == "video" else []
    args = script.parse_args([*needed, *words, "--report_to", "none"])
    args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)
    args.enable_xformers_memory_efficient_attention = False  # it needs what PyTorch's own does, and a GPU
    args.mixed_precision = {"fp16": "bf16"}.get(args.mixed_precision, args.mixed_precision)
    return script, args


@contextmanager
def replaced(script, memory):
    """The script with what cannot run on fake tensors replaced, and with its phases watched by `memory`."""
    changes = [
        # There is one device: nothing moves. What main takes off the accelerator is `parked`.
        (torch.nn.Module, "to", lambda module, *_, **__: module),
        (script, "VaeImageProcessor", lambda: SimpleNamespace(postprocess=lambda pixels: [None])),
        (script, "rollout_scheduler", short_schedule(script.rollout_scheduler)),
        (script, "encode_prompt", memory.during("encode", script.encode_prompt)),
        (script, "encode_latents", memory.during("encode", script.encode_latents)),
        (script, "self_sample", memory.during("sample", script.self_sample)),
        (script, "decode_latents", memory.during("decode", script.decode_latents)),
    ]
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name in ("layer_norm", "group_norm", "rms_norm", "upsample_nearest2d.vec"):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, functools.partial(in_fp32, operator), "AutocastCPU")
        yield


def in_fp32(operator, *inputs):
    """An operator as CUDA's autocast runs it, and keeps its input."""
    with torch.autocast("cpu", enabled=False):
        return operator(*(value.float() if torch.is_tensor(value) else value for value in inputs))


def short_schedule(rollout_scheduler):
    """A rollout_scheduler with two steps, which need the memory of twenty, made where numbers can be read."""

    def make(models, args):
        with unset_fake_temporarily():
            scheduler = rollout_scheduler(models, args)
            scheduler.set_timesteps(2)
        scheduler.set_begin_index(0)
        scheduler.set_timesteps = lambda *_, **__: None
        return scheduler

    return make


def run(family, script, args, memory):
    """
    What the script's main does, in its order, up to the first update at which the optimizer has its state.

    Returns:
        dict of bytes on the accelerator during training: weights (the reference's too), gradients, optimizer.
    """
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = script.make_accelerator(args)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    models = build_models(family, script, args, dtype)
    script.prepare_denoiser(models, args, "cpu")
    memory.peaks.clear()  # nothing is on the accelerator yet, and the encoders are the first
    memory.parked = size(models.denoiser)
    empty_prompt = script.encode_prompt(models, [""])[0]
    prompts = script.encode_prompt(models, args.validation_prompts)
    encoders = sum(map(size, models.encoders))
    cached = None
    if args.cache_latents:  # prompts first, as LatentCache.fill, and then the VAE alone
        examples = make_examples(script, args)
        texts = script.encode_prompt(models, [example["caption"] for example in examples])
        memory.parked += encoders - size(models.vae)
        cached = [{**one, **text} for one, text in zip(script.encode_latents(models, examples), texts)]
        del examples, texts
    memory.parked = encoders if cached else 0
    policy = models.denoiser
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer, schedule = script.make_optimizer(trained, args)
    for group in optimizer.param_groups:
        group["foreach"] = True  # as on a GPU
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    optimizer.step = memory.during("step", optimizer.step)

    def validate():
        memory.parked -= size(models.vae) if cached else 0  # it comes back for that time
        script.draw_samples(models, prompts, empty_prompt, args, accelerator)
        memory.parked = encoders if cached else 0

    validate()  # of the base
    if args.loss_type == "sspo":
        weights = script.policy_weights(models, args)
        script.load_reference(models, {name: weight.clone() for name, weight in weights.items()}, args)
        del weights

    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes its state
    rivals, rollout = None, args.rollout_batch_size // args.train_batch_size
    if args.loss_type == "sspo":  # as of an update's second rollout: gradients of the first are there
        examples = cached or script.encode_examples(models, make_examples(script, args))
        batch = script.collate(examples * rollout, empty_prompt, args, accelerator.device)
        rivals = script.sample_rivals(models, batch, args, accelerator.autocast)[: args.train_batch_size].clone()
        del batch, examples
    optimizer.zero_grad()
    for _ in range(args.gradient_accumulation_steps):
        examples = cached or script.encode_examples(models, make_examples(script, args))
        batch = script.collate(examples, empty_prompt, args, accelerator.device)
        batch["rival"] = rivals
        memory.during("update", learn)(script, policy, models, optimizer, trained, batch, args, accelerator)
    weights = size(models.denoiser) + encoders - memory.parked
    del batch, examples
    validate()
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return {
        "weights": weights + sum(weight.nbytes for weight in models.reference.values()),
        "gradients": sum(weight.nbytes for weight in trained),
        "optimizer": sum(tensor.nbytes for tensor in state),
    }


def learn(script, policy, models, optimizer, trained, batch, args, accelerator):
    """What main does with a micro-batch that has its rivals."""
    with accelerator.accumulate(policy):
        loss, _ = script.training_loss(policy, models, batch, args, accelerator.autocast)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def size(module):
    return sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))


def estimate(family, words):
    """
    The memory that a run needs.

    Args:
        family: sd, sdxl, video, flux2 or wan.
        words: a list of that script's flags; the names of models and data may be left out.
    Returns:
        dict of bytes: the lasting parts weights, gradients and optimizer; the peaks encode, sample, update, step and
        decode, each with all that is there; activations, which is what update needs beside the lasting parts; and
        peak, the largest.
    """
    script, args = parse(family, words)
    memory = Memory()
    with replaced(script, memory), FakeTensorMode(allow_non_fake_inputs=True), memory:
        parts = run(family, script, args, memory)
    activations = memory.peaks["update"] - sum(parts.values())
    return {**parts, "activations": activations, **memory.peaks, "peak": max(memory.peaks.values())}


# ------------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------------


def needed(found):
    """The GiB that a card must have for what `estimate` found."""
    return found["peak"] / GIB * SLACK + CONTEXT


def smallest_card(found):
    """The smallest of CARDS that the run fits."""
    return next((f"{card} GB" for card in CARDS if needed(found) * GIB <= card * 10**9), "none")


def print_run(family, words):
    found = estimate(family, words)
    for name, value in found.items():
        print(f"{name:12}{value / GIB:6.1f} GiB")
    print(f"a card needs{needed(found):6.1f} GiB ({SLACK} x peak + {CONTEXT} GiB); smallest: {smallest_card(found)}")


def print_table():
    print(f"All with `{BASE}`. In GiB; a card needs {SLACK} x peak + {CONTEXT} GiB.")
    for heading, shared, rows in TABLE:
        family, *shared = shared.split()
        print(f"\n**{heading}**, `{' '.join(shared)}`\n")
        print("| and flags | weights | gradients | optimizer | activations | peak | phase | a card needs | smallest |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in rows:
            found = estimate(family, [*BASE.split(), *shared, *row.split()])
            numbers = " | ".join(f"{found[name] / GIB:.1f}" for name in (*PARTS, "peak"))
            phase = max(PHASES, key=lambda name: found.get(name, 0))
            told = f"`{row}`" if row else "nothing else"
            print(f"| {told} | {numbers} | {phase} | {needed(found):.1f} | {smallest_card(found)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print_table()
    elif sys.argv[1] in FAMILIES:
        print_run(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(f"the first word must be one of {', '.join(FAMILIES)}, not {sys.argv[1]}; then that script's flags")
