#!/usr/bin/env python
# Copyright 2026 The SSPO training authors. Licensed under the Apache License, Version 2.0.
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6",
#     "diffusers>=0.41,<0.43",
#     "transformers>=5.0,<6",
#     "accelerate>=1.15,<2",
#     "datasets>=5.0,<6",
#     "peft>=0.21,<0.22",
#     "bitsandbytes>=0.50.2,<0.51",
#     "tensorboard>=2.20,<3",
#     "av>=15,<19",
# ]
# ///
"""
Self-Sampling Preference Optimization (SSPO, arXiv 2410.05255) for text-to-video with AnimateDiff.

Aligns a text-to-video model with winning clips and their captions alone: no losers, no pairs, no reward model.
The losing half of each pair, the *rival*, is sampled from the model's own past. One update, for each winner z_w:

  1. Replay.       Every --replay_steps updates the policy's weights are pushed to the replay bank and an iteration
                   ends. The next one draws its reference uniformly from the bank (theta_0 is the untouched base).
  2. Self-sample.  z_r = sample(reference, caption) with classifier-free guidance. Rivals stay latents.
  3. Errors.       One (t, noise) for both halves. e_w, e_r: mean squared denoising errors of winner and rival under
                   the policy and under the reference, and gap = e(policy) - e(reference).
  4. Switch.       x = e_w(reference) - e_w(policy). If x < 0 the reference knows the winner better than the policy
                   does, so its sample is more likely a winner than a loser: s = -1 (sign) or 0 (indicator), else +1.
  5. Loss.         L = -log sigmoid( -beta/2 * [ gap_w - s * gap_r ] ), averaged over the examples.

At the first update policy and reference are the same model, so L = ln 2 exactly; it stays near ln 2 for long, and the
two gaps are what to watch. Where the paper is silent or two of its versions differ, --help says what is chosen.

Cost of one update on one process, in forward calls of the UNet, for P = --train_batch_size x
--gradient_accumulation_steps pairs: ceil(P / --rollout_batch_size) x --rollout_steps x --rollout_strength calls on
2 x --rollout_batch_size latents (guidance doubles them), then, for each of the --gradient_accumulation_steps
micro-batches, one call of the reference and one of the policy on 2 x --train_batch_size x --draws_per_pair latents,
the latter with its backward. --split_pairs makes each of the two calls two on half as many latents, and one more of
that size in the backward.

Beside train_sspo_sd.py: the model is a Stable Diffusion 1.x image model, which stays as it is, and a motion adapter,
whose motion modules are trained (LoRA on their attention, or every weight of them). Latents are (c, f, h, w), errors
are means over all of that, and one timestep is drawn for a clip. The noise schedule is the linear one that motion
adapters are trained with, whatever the image model's says. Winners are read by PyAV, in the loader's processes.

--rollout_strength is more than a saving where winners are real clips. They may be told almost at once from rivals
sampled from pure noise; implicit_accuracy is then near 1 from the start, the loss sinks on differences that say little
about quality, and samples stop improving (arXiv 2506.03517, appendix C.4). Rivals that start from the winner itself,
noised to a strength of 0.7, share its layout, so that what is compared is how it moves. Watch that metric to know: in
the small example of examples/emoji_video it was no higher with 1.0 than with 0.7.

    accelerate launch train_sspo_video.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --motion_adapter_name_or_path guoyww/animatediff-motion-adapter-v1-5-3 \
        --train_data_dir path/to/clips --mixed_precision fp16 --cache_latents --gradient_checkpointing \
        --train_batch_size 1 --gradient_accumulation_steps 16 --rollout_batch_size 2 --rollout_strength 0.7 \
        --validation_prompts "a rose opens, time-lapse" --output_dir sspo-animatediff
"""

import argparse
import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import av
import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from datasets.utils.file_utils import xopen
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from diffusers.optimization import get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft, make_image_grid
from diffusers.utils.import_utils import (
    is_bitsandbytes_available,
    is_tensorboard_available,
    is_wandb_available,
    is_xformers_available,
)
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer


logger = get_logger(Path(__file__).stem)

# The name of the adapter in LoRA mode: diffusers looks its rank and alpha up under it when it saves them.
POLICY = "default"
SHUFFLE_BUFFER = 1000  # rows held in memory, still encoded, to shuffle a --streaming data set


# Copied from train_sspo_sd.UserError
class UserError(Exception):
    """Something the user can mend. Its message is one line: what is wrong, and what to do about it."""


# Copied from train_sspo_sd.BadExample
class BadExample(UserError):
    """A winner that cannot be used: a picture that cannot be read, a caption that is no text."""


# Copied from train_sspo_sd.writing
@contextmanager
def writing(what):
    """
    Around whatever writes to output_dir, also as a decorator: a full or read-only disk raises UserError.

    Nothing else is lost then, because files are written beside their place, or appended to.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        if isinstance(error, RuntimeError):
            if not re.search("inline_container|iostream|Parent directory", reason):
                raise  # out of memory, say
            reason = f"is the disk full? {reason}"  # torch.save does not tell what the system said
        raise UserError(
            f"{what} cannot be written ({reason}); the checkpoints before are whole: mend that, and go on with "
            "--resume_from_checkpoint latest"
        ) from error


# Copied from train_sspo_sd.check_whole
def check_whole(path):
    """Raises UserError if a safetensors file is gone or cut short. Reads no more than its header."""
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is {'damaged' if Path(path).exists() else 'gone'}") from error


# ------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.OneLineParser
class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and whose help shows no empty defaults."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            if action.default is None or action.default is False:  # 0 is a default that is shown
                return action.help
            return super()._get_help_string(action)

    def __init__(self, description):
        super().__init__(description=description, formatter_class=self.Formatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


# Copied from train_sspo_sd.add_shared_arguments
def add_shared_arguments(parser):
    """Adds the flags that every SSPO script has. Names are those of the other diffusers scripts where they exist."""
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Hub name or folder of the base model.")
    group.add_argument("--revision", help="Branch, tag or commit of the base model on the hub.")
    group.add_argument("--variant", help="Variant of the base model's files, for example fp16.")
    group.add_argument("--cache_dir", help="Where downloaded models and data sets are kept.")
    group.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        help="What the model predicts, if its scheduler's configuration says it wrongly.",
    )

    group = parser.add_argument_group("winners")
    group.add_argument("--dataset_name", help="Hub name or local path of a data set of winners.")
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--train_data_dir", help="Folder of winners, in any of the forms that the README lists.")
    group.add_argument("--caption_column", help="Default: the first that exists of text, caption, txt, prompt.")
    group.add_argument("--max_train_samples", type=int, help="Use only the first so many rows.")
    group.add_argument(
        "--streaming", action="store_true", help="Read the data set as it goes, with one loader process a rank."
    )
    group.add_argument(
        "--proportion_empty_prompts",
        type=float,
        default=0.0,
        help="Share of pairs whose caption is dropped, for the winner and the rival alike.",
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that load winners, a rank.")
    group.add_argument(
        "--on_bad_example",
        choices=["stop", "skip"],
        default="stop",
        help="What to do about a winner that cannot be read. skip: the next one that can be takes its place, the log "
        "names it, and data/skipped in the metrics counts such places.",
    )
    group.add_argument(
        "--cache_latents",
        action="store_true",
        help="Encode winners and captions once, to disk, and take the VAE and the text encoder off the accelerator. "
        "Crop and flip are then drawn once a row instead of once an epoch.",
    )

    group = parser.add_argument_group("SSPO")
    group.add_argument(
        "--train_mode",
        choices=["lora", "full"],
        default="lora",
        help="lora: adapters on the attention layers. full: every trainable weight, as in the paper.",
    )
    group.add_argument(
        "--loss_type",
        choices=["sspo", "sft"],
        default="sspo",
        help="sft is the baseline: the plain denoising loss on the winners, with no reference and no sampling.",
    )
    group.add_argument("--beta_dpo", type=float, default=2000.0, help="Strength of the pull to the reference.")
    group.add_argument(
        "--ssr",
        choices=["sign", "indicator", "none"],
        default="sign",
        help="s where the reference predicts the winner better than the policy: -1 (sign: the rival is learned too), "
        "0 (indicator: only the winner is) or +1 (none: no switch).",
    )
    group.add_argument(
        "--ssr_scope",
        choices=["example", "iteration"],
        default="example",
        help="What decides the switch: each example's own errors, as in the paper, or (iteration) for all examples "
        "of an update alike the mean over the iteration's updates before it.",
    )
    group.add_argument(
        "--reference",
        choices=["random", "latest", "initial"],
        default="random",
        help="Which checkpoint of the bank an iteration takes. random is SSPO.",
    )
    group.add_argument("--replay_steps", type=int, default=30, help="Updates in an iteration, between two pushes.")
    group.add_argument(
        "--replay_size",
        type=int,
        default=8,
        help="Checkpoints kept in the bank, the base included. Past it the oldest but the base goes.",
    )
    group.add_argument("--rollout_steps", type=int, default=20, help="Sampler steps of a rival (and of validation).")
    group.add_argument("--rollout_guidance_scale", type=float, default=7.5, help="Guidance; 1 or less means none.")
    group.add_argument("--rollout_scheduler", choices=["dpmsolver", "ddim"], default="dpmsolver", help="The sampler.")
    group.add_argument(
        "--rollout_batch_size",
        type=int,
        help="Rivals sampled at once, a multiple of --train_batch_size. Default: train_batch_size x "
        "gradient_accumulation_steps, at most 16.",
    )
    group.add_argument(
        "--rollout_strength",
        type=float,
        default=1.0,
        help="Below 1 the rival starts from the winner noised to this strength (0 to 1), not from pure noise: closer "
        "rivals, fewer sampler steps.",
    )
    group.add_argument(
        "--draws_per_pair",
        type=int,
        default=1,
        help="Draws of (timestep, noise) for a pair in an update. The switch is decided by their mean. The update "
        "needs the memory of a batch so many times as large.",
    )
    group.add_argument("--rival_weight", type=float, default=1.0, help="Factor on the rival's gap, beside s.")
    group.add_argument("--sft_weight", type=float, default=0.0, help="Adds so much of the winner's denoising error.")
    group.add_argument("--rank", type=int, default=8, help="Rank of the LoRA adapters.")
    group.add_argument("--lora_alpha", type=float, help="Scale of the adapters, times the rank. Default: the rank.")

    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--seed", type=int, default=0, help="Every random draw of the run follows from it, on any layout of hardware."
    )
    group.add_argument("--train_batch_size", type=int, default=4, help="Pairs in a micro-batch, a process.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Micro-batches in an update.")
    group.add_argument("--max_train_steps", type=int, help="Updates. Default: 210, the paper's seven iterations.")
    group.add_argument("--num_train_epochs", type=int, help="Passes over the winners, if --max_train_steps is absent.")
    group.add_argument("--gradient_checkpointing", action="store_true", help="Less memory for a slower backward.")
    group.add_argument(
        "--split_pairs",
        action="store_true",
        help="Winners and rivals go through the model one after the other: half the memory of activations, for half a "
        "forward more of the policy. Meant for LoRA: in full mode gradients of one half are held for the other.",
    )
    group.add_argument("--learning_rate", type=float, default=1e-5, help="Peak learning rate.")
    group.add_argument("--scale_lr", action="store_true", help="Multiply the learning rate by the global batch size.")
    group.add_argument(
        "--lr_scheduler",
        choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
        default="constant",
        help="Schedule of the rate.",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="Updates of warm-up.")
    group.add_argument(
        "--optimizer", choices=["adamw", "adafactor"], default="adamw", help="Adafactor needs the least memory."
    )
    group.add_argument("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes.")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="AdamW's decay of the first moment.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW's decay of the second moment.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Weight decay, Adafactor's too.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Default: as accelerate is configured. Errors and loss are fp32 in any case.",
    )
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    group.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="xformers in place of PyTorch's own attention, which saves memory too. CUDA only.",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="sspo-model", help="Where all that a run leaves is written.")
    group.add_argument("--checkpointing_steps", type=int, default=100, help="Updates between two checkpoints.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Checkpoints kept. Default: all.")
    group.add_argument("--resume_from_checkpoint", help='Folder of a checkpoint, or "latest".')
    group.add_argument("--validation_prompts", nargs="+", help="Captions of the pictures in samples/.")
    group.add_argument("--validation_steps", type=int, default=50, help="Updates between two sets of samples.")
    group.add_argument("--num_validation_images", type=int, default=1, help="Samples of each validation prompt.")
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, all or none.")
    group.add_argument("--tracker_project_name", default="sspo", help="Name of the project in the tracker.")
    group.add_argument("--logging_dir", default="logs", help="Folder of the tracker's files, inside output_dir.")
    group.add_argument("--push_to_hub", action="store_true", help="Upload the result when the run ends.")
    group.add_argument("--hub_model_id", help="Repository to push to. Default: the name of output_dir.")
    group.add_argument("--hub_token", help="Token for the push, never written down. Default: the login's.")


def add_clip_arguments(parser):
    """Adds the flags of the scripts that train on clips."""
    group = parser.add_argument_group("clips")
    group.add_argument(
        "--motion_adapter_name_or_path", required=True, help="Hub name or folder of the motion adapter."
    )
    group.add_argument("--video_column", help="Default: the first that exists of video, mp4, webm, mkv, avi.")
    group.add_argument("--num_frames", type=int, default=16, help="Frames of a clip, for training and for sampling.")
    group.add_argument(
        "--frame_stride",
        type=int,
        default=4,
        help="Of a clip, every so many-th frame is taken, from a random start. 0: as many as are needed, spread over "
        "the whole clip, as MagicTime does.",
    )
    group.add_argument("--resolution", type=int, default=256, help="Side of a square clip, in pixels.")
    group.add_argument("--height", type=int, help="Height, in pixels. Default: --resolution.")
    group.add_argument("--width", type=int, help="Width, in pixels. Default: --resolution.")
    group.add_argument("--center_crop", action="store_true", help="Crop the middle instead of a random place.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the clips.")


# Copied from train_sspo_sd.resolve_args
def resolve_args(parser, argv):
    """Parses `argv` and fills in the defaults that hang on other flags. Exits with one line if they cannot be used."""
    args = parser.parse_args(argv)
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 210
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    try:
        check_args(args)
    except UserError as error:
        parser.error(str(error))
    return args


def parse_args(argv=None):
    """Parses `argv` (default: the command line). Raises SystemExit(2) after one line on stderr for a wrong flag."""
    parser = OneLineParser("SSPO for AnimateDiff: alignment of a text-to-video model with winning clips alone.")
    add_shared_arguments(parser)
    add_clip_arguments(parser)
    parser.set_defaults(rollout_guidance_scale=8.0)
    args = resolve_args(parser, argv)
    if args.num_frames < 1:
        parser.error(f"--num_frames must be more than 0, not {args.num_frames}")
    if args.frame_stride < 0:
        parser.error(f"--frame_stride must not be negative, not {args.frame_stride}")
    for name, side in zip(("height", "width"), picture_size(args)):
        if side < 8 or side % 8:
            parser.error(f"--{name} must be a multiple of 8, not {side}")
    return args


# Copied from train_sspo_sd.check_args
def check_args(args):
    """Raises UserError for values that no run can use. Needs no model and no data."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise UserError("name the winners with either --train_data_dir or --dataset_name")
    positive = (
        "train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs max_train_samples resolution "
        "replay_steps replay_size rollout_steps rollout_batch_size draws_per_pair beta_dpo rank lora_alpha "
        "learning_rate max_grad_norm checkpointing_steps checkpoints_total_limit validation_steps "
        "num_validation_images"
    )
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be more than 0, not {value}")
    for name in ("rival_weight", "sft_weight", "lr_warmup_steps", "dataloader_num_workers"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} must not be negative, not {getattr(args, name)}")
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise UserError(f"--proportion_empty_prompts must be from 0 to 1, not {args.proportion_empty_prompts}")
    if args.resolution % 8:
        raise UserError(f"--resolution must be a multiple of 8, not {args.resolution}")
    if args.rollout_batch_size is None:
        pairs = args.train_batch_size * args.gradient_accumulation_steps
        args.rollout_batch_size = max(min(pairs, 16) // args.train_batch_size, 1) * args.train_batch_size
    if args.rollout_batch_size % args.train_batch_size:
        raise UserError(
            f"--rollout_batch_size ({args.rollout_batch_size}) must be a multiple of --train_batch_size "
            f"({args.train_batch_size})"
        )
    if not 0 < args.rollout_strength <= 1 or int(args.rollout_steps * args.rollout_strength) < 1:
        raise UserError(
            f"--rollout_strength must be above 0, at most 1, and leave one of the {args.rollout_steps} sampler steps, "
            f"not {args.rollout_strength}"
        )
    if args.streaming and args.cache_latents:
        raise UserError("--cache_latents needs the whole data set: drop it, or --streaming")
    if args.streaming and args.max_train_steps is None:
        raise UserError("--streaming does not know how long an epoch is: give --max_train_steps")
    if args.use_8bit_adam and args.optimizer != "adamw":
        raise UserError("--use_8bit_adam is a kind of adamw: drop it, or --optimizer adafactor")


# Copied from train_sspo_sd.check_environment
def check_environment(args):
    """Raises UserError where a package, a device or the output folder cannot do what a flag asks for."""
    if args.use_8bit_adam and not is_bitsandbytes_available():
        raise UserError("--use_8bit_adam needs bitsandbytes: pip install 'bitsandbytes>=0.50'")
    if args.enable_xformers_memory_efficient_attention:
        if not is_xformers_available():
            raise UserError("--enable_xformers_memory_efficient_attention needs xformers: pip install xformers")
        if not torch.cuda.is_available():
            raise UserError(
                "--enable_xformers_memory_efficient_attention needs a CUDA device: drop it, PyTorch's own attention "
                "saves memory too"
            )
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a CUDA device: use no or bf16 here")
    if args.report_to not in ("tensorboard", "wandb", "all", "none"):
        raise UserError(f"--report_to must be tensorboard, wandb, all or none, not {args.report_to}")
    if args.report_to == "tensorboard" and not is_tensorboard_available():
        raise UserError("--report_to tensorboard needs it: pip install tensorboard, or --report_to none")
    if args.report_to == "wandb" and not is_wandb_available():
        raise UserError("--report_to wandb needs it: pip install wandb, or --report_to none")
    try:
        probe = Path(args.output_dir, f".writable-{os.getpid()}")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # a process on another machine may have the same number
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} cannot be written: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------------------------
# Random draws. Each comes from a generator of its own, keyed by what it belongs to, so that a run depends neither on
# the order of things nor on how a batch is laid out over processes, and a resumed run needs no random state.
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.keyed_generator
def keyed_generator(*key):
    """A CPU generator whose seed is a hash of `key` (strings and integers)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


# Copied from train_sspo_sd.keyed_noise
def keyed_noise(purpose, seed, keys, shape):
    """Standard normal noise, (len(keys), *shape) in fp32: row i depends on purpose, seed and keys[i] only."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(purpose, seed, *key)) for key in keys])


# ------------------------------------------------------------------------------------------------------------------
# Data: the winners
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.FILE_BUILDERS
FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


# Copied from train_sspo_sd.open_dataset
def open_dataset(args):
    """Opens the training split of --dataset_name or --train_data_dir. Raises UserError if that is not possible."""
    source = args.train_data_dir or args.dataset_name
    path = Path(source)
    if args.train_data_dir and not path.exists():
        raise UserError(f"--train_data_dir {source} does not exist")
    if path.is_file() and path.suffix not in FILE_BUILDERS:
        raise UserError(f"{source} is not a folder, nor one of {', '.join(FILE_BUILDERS)}")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # made by save_to_disk
            dataset = datasets.load_from_disk(source)
        elif path.is_file():
            builder = FILE_BUILDERS[path.suffix]
            dataset = datasets.load_dataset(
                builder, data_files=source, cache_dir=args.cache_dir, streaming=args.streaming
            )
        else:
            dataset = datasets.load_dataset(
                source, args.dataset_config_name, cache_dir=args.cache_dir, streaming=args.streaming
            )
    except Exception as error:  # datasets raises nearly everything, down to IndexError for an empty set
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"the data set {source} cannot be opened: {reason}") from error
    if isinstance(dataset, dict):
        if "train" not in dataset and len(dataset) > 1:
            raise UserError(f"the data set {source} has no split called train, only {', '.join(dataset)}")
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    if args.streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset()
    return dataset


MEDIUM, MEDIUM_COLUMNS = "video", ["video", "mp4", "webm", "mkv", "avi"]  # what the winners are, and where


def open_undecoded(args):
    """The data set, its clips still encoded: they are decoded when they are needed, so that a bad one is named."""
    table = magictime_table(args.train_data_dir) if args.train_data_dir else None
    if table is not None:
        return table.to_iterable_dataset() if args.streaming else table
    dataset = open_dataset(args)
    if args.streaming:
        return dataset.decode(False)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Video):
            dataset = dataset.cast_column(name, datasets.Video(decode=False))
    return dataset


def magictime_table(source):
    """
    The clips that MagicTime's annotations list, or None where there are none.

    They are a CSV file with the columns videoid, name (the caption) and is_transmit (not used here); `source` is that
    file or its folder. <videoid>.mp4 may lie beside it or in any folder below. A videoid is text: 007 is not 7.
    """
    source, found = Path(source), []
    for path in [source] if source.suffix == ".csv" else source.glob("*.csv"):
        if path.is_file():
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                if {"videoid", "name"} <= set(reader.fieldnames or ()):
                    found.append((path, list(reader)))
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(sorted(path.name for path, _ in found))
        raise UserError(f"{source} holds several lists of clips, {names}: give one of them as --train_data_dir")
    (path, rows), clips = found[0], {}
    for clip in sorted(path.parent.rglob("*.mp4")):
        clips.setdefault(clip.stem, []).append(str(clip))
    missing = [row["videoid"] for row in rows if row["videoid"] not in clips]
    if missing:
        raise UserError(
            f"{path} lists {len(missing)} clips that are not in its folder, first {missing[0]}.mp4: add them, or take "
            "their lines out"
        )
    for row in rows:
        if len(clips[row["videoid"]]) > 1:
            raise UserError(
                f"{path} lists {row['videoid']}, of which its folder holds several, "
                f"{', '.join(clips[row['videoid']])}: leave one of them"
            )
    columns = {"video": [clips[row["videoid"]][0] for row in rows], "text": [row["name"] for row in rows]}
    return datasets.Dataset.from_dict(columns)


def read_winner(encoded, column, row, args, key):
    """
    Decodes the frames of one winner that are needed, and crops them all in the same place.

    Args:
        encoded: what the data set holds: a path, a dict of path and bytes, or bytes.
        column, row: where that was.
        key: of the random draws.
    Returns:
        pixels (frames, 3, height, width) in -1..1 and geometry, see crop_picture; `frames` in it are those taken.
    Raises:
        BadExample: naming the clip that cannot be read, or is too short.
    """
    path, content = encoded if isinstance(encoded, str) else None, encoded if isinstance(encoded, bytes) else None
    if isinstance(encoded, dict):
        path, content = encoded["path"], encoded["bytes"]
    name = f"the clip {path or column} in row {row}"
    try:
        frames, indices = read_frames(path, content, functools.partial(choose_frames, args=args, key=key, name=name))
        cropped = [crop_picture(frame, args, keyed_generator("crop", *key)) for frame in frames]
    except BadExample:
        raise
    except Exception as error:  # PyAV's errors are OSError, ValueError, LookupError, ...
        reason = " ".join(str(error).split())[:200]
        raise BadExample(f"{name} cannot be read ({reason})") from error
    return torch.stack([pixels for pixels, _ in cropped]), {**cropped[0][1], "frames": tuple(indices)}


def choose_frames(count, args, key, name):
    """Which frames of a clip of `count` are trained on, in order. Raises BadExample if it has too few."""
    stride, frames = args.frame_stride, args.num_frames
    if count == 0:
        raise BadExample(f"{name} has no frames")
    needed = (frames - 1) * stride + 1 if stride else frames
    if count < needed:
        advice = "--frame_stride (0 spreads them over the whole clip)" if stride else "--num_frames"
        raise BadExample(
            f"{name} has {count} frames, and {frames} at --frame_stride {stride} need {needed}; lower {advice}"
        )
    if not stride:
        return [round(i * (count - 1) / max(frames - 1, 1)) for i in range(frames)]
    start = torch.randint(count - needed + 1, (), generator=keyed_generator("frames", *key)).item()
    return [start + i * stride for i in range(frames)]


@contextmanager
def open_clip(path, content):
    """The container of a clip, which is a file or bytes, and its picture track."""
    file = io.BytesIO(content) if content is not None else xopen(path, "rb") if "://" in path else path
    with av.open(file) as container:
        if not container.streams.video:
            raise ValueError("it has no picture track")
        container.streams.video[0].codec_context.thread_count = 1  # the loader's processes are enough
        yield container, container.streams.video[0]


def read_frames(path, content, choose):
    """
    The frames that `choose` names when it is told how many there are: a list of PIL pictures and one of indices.

    Times of all frames are read off the packets, without decoding. Then decoding starts at the last keyframe before
    the first frame that is wanted and ends with the last. Where that does not work, because packets carry no times or
    do not hold one frame each, all is decoded, once to count and once to keep what is wanted.
    """
    with open_clip(path, content) as (container, track):
        packets = [packet for packet in container.demux(track) if packet.size and not packet.is_discard]
        times = {packet.pts for packet in packets}
        if len(times) == len(packets) and None not in times:
            times = sorted(times)
            indices = choose(len(times))
            wanted, found = {times[index] for index in indices}, {}
            container.seek(times[indices[0]], stream=track)
            for frame in container.decode(track):
                if frame.pts in wanted:
                    found[frame.pts] = upright(frame)
                if len(found) == len(wanted):
                    return [found[times[index]] for index in indices], indices
    with open_clip(path, content) as (container, track):
        indices = choose(sum(1 for _ in container.decode(track)))
    with open_clip(path, content) as (container, track):
        found = {i: upright(frame) for i, frame in enumerate(container.decode(track)) if i in indices}
    return [found[index] for index in indices], indices


def upright(frame):
    """A decoded frame as a PIL picture, turned as the camera noted it."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


# Copied from train_sspo_sd.Winners
class Winners:
    """
    Winning pictures and their captions, whatever form the data set has.

    A data set in the layout of Pick-a-Pic (jpg_0, jpg_1, label_0: 1 if jpg_0 won, 0 if jpg_1 did) gives the better
    picture of each pair; ties and unlabelled pairs are dropped, and `ties` counts them.

    Raises UserError if a column is missing or the data set is empty.
    """

    PAIR_COLUMNS = ("jpg_0", "jpg_1", "label_0")

    def __init__(self, args):
        self.args, self.streaming, self.ties = args, args.streaming, 0
        self.dataset = open_undecoded(args)
        if args.max_train_samples is not None:
            self.dataset = self.dataset.take(args.max_train_samples)
        first = next((example for _, example in self.read(self.dataset)), None)
        if first is None:
            raise UserError(f"the data set {args.train_data_dir or args.dataset_name} is empty")
        columns = list(first)

        self.pairs = getattr(args, f"{MEDIUM}_column") is None and set(self.PAIR_COLUMNS) <= set(columns)
        if not self.pairs:
            self.column = self.find_column(MEDIUM, MEDIUM_COLUMNS, columns)
        self.caption_column = self.find_column("caption", ["text", "caption", "txt", "prompt"], columns)
        self.first_caption = str(first[self.caption_column])[:100]  # by which another data set is told from this one

        if self.streaming:
            self.dataset = self.dataset.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER)
        elif self.pairs:
            labels = self.dataset.select_columns([c for c in columns if c in ("label_0", "has_label")])
            kept = [i for i, example in enumerate(labels) if self.has_winner(example)]
            self.ties = len(self.dataset) - len(kept)
            self.dataset = self.dataset.select(kept)
            if not kept:
                raise UserError("the data set has no winner: no pair has a label_0 of 0 or 1")

    def find_column(self, what, candidates, columns):
        asked = getattr(self.args, f"{what}_column")
        for name in [asked] if asked else candidates:
            if name in columns:
                return name
        raise UserError(
            f"the data set has no column {asked or ' or '.join(candidates)}: it has {', '.join(columns)}; "
            f"name the one to use with --{what}_column"
        )

    def __len__(self):
        """The number of winners, ties left out. Not known of a data set that is streamed."""
        return len(self.dataset)

    def rows(self, epoch, offset=0):
        """Yields (row, reference to its example) in the order of `epoch`, from the `offset`-th on."""
        if self.streaming:
            self.dataset.set_epoch(epoch)
            yield from itertools.islice(self.read(self.dataset), offset, None)
        else:
            order = torch.randperm(len(self), generator=keyed_generator("order", self.args.seed, epoch))
            yield from ((row, row) for row in order[offset:].tolist())

    @staticmethod
    def read(dataset):
        """Yields (row, example). Raises UserError where the data set itself cannot be read on."""
        row = -1
        try:
            for row, example in enumerate(dataset):
                yield row, example
        except Exception as error:  # as in open_dataset
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(f"the data set cannot be read on behind its row {row}: {reason}") from error

    def has_winner(self, example):
        """Whether this is a picture by itself, or a pair of which one was preferred."""
        return not self.pairs or (example["label_0"] in (0, 1) and example.get("has_label", True))

    def load(self, row, example, place):
        """
        Makes one training example.

        Args:
            row, example: see rows.
            place: (epoch, row) in the order, by which its draws are keyed. The row is another one where this winner
                stands in for one that cannot be read.
        Returns:
            dict with `epoch` and `row` (the place), `caption`, `dropped` (whether the caption is), `pixels` and
            `geometry` (see read_winner).
        Raises:
            BadExample: naming the winner that cannot be read or the caption that is not text.
        """
        if not self.streaming:
            example = self.dataset[row]
        column = ("jpg_0" if example["label_0"] == 1 else "jpg_1") if self.pairs else self.column
        epoch, slot = place
        key = (self.args.seed, 0 if self.args.cache_latents else epoch, slot)
        pixels, geometry = read_winner(example[column], column, row, self.args, key)
        caption = example[self.caption_column]
        if isinstance(caption, (list, np.ndarray)) and len(caption):
            caption = caption[torch.randint(len(caption), (), generator=keyed_generator("caption", *key)).item()]
        if isinstance(caption, bytes):
            caption = caption.decode(errors="replace")
        if not isinstance(caption, str):
            raise BadExample(f"the caption in row {row}, column {self.caption_column}, is {caption!r}, not text")
        dropped = is_dropped(self.args, *place)
        return dict(epoch=epoch, row=slot, caption=caption, dropped=dropped, pixels=pixels, geometry=geometry)


# Copied from train_sspo_sd.is_dropped
def is_dropped(args, epoch, row):
    """Whether the caption of this row is left out in this epoch."""
    draw = torch.rand((), generator=keyed_generator("dropout", args.seed, epoch, row)).item()
    return draw < args.proportion_empty_prompts


# Copied from train_sspo_sd.to_rgb
def to_rgb(picture):
    """A PIL picture as a viewer shows it: upright, transparency on white, 16 bits scaled to 8."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def picture_size(args):
    """Height and width of what is trained on, in pixels."""
    return args.height or args.resolution, args.width or args.resolution


# Copied from train_sspo_sd.crop_picture
def crop_picture(picture, args, generator):
    """
    Resizes the picture until it just covers picture_size, then crops and mirrors as the flags say.

    Returns:
        pixels, (3, height, width) in -1..1, and a dict of `original_size` (height, width), `crop_top_left`
        (top, left) in the resized picture, and `target_size`: what SDXL is told about its pictures.
    """
    height, width = picture_size(args)
    original_size = (picture.height, picture.width)
    scale = max(height / picture.height, width / picture.width)
    resized = (max(round(picture.width * scale), width), max(round(picture.height * scale), height))
    if resized[0] * resized[1] > 2 * Image.MAX_IMAGE_PIXELS:  # PIL's own limit for a picture that is opened
        raise ValueError(f"{picture.width} x {picture.height} pixels is too long for a crop of {width} x {height}")
    spare = (resized[0] - width, resized[1] - height)
    place = torch.rand(2, generator=generator)  # drawn in any case: the flip must not depend on --center_crop
    left, top = (round(extent * (0.5 if args.center_crop else draw)) for extent, draw in zip(spare, place.tolist()))
    picture = picture.resize(resized, Image.Resampling.LANCZOS)
    picture = picture.crop((left, top, left + width, top + height))
    if args.random_flip and torch.rand((), generator=generator).item() < 0.5:
        picture = ImageOps.mirror(picture)
        left = spare[0] - left
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, {"original_size": original_size, "crop_top_left": (top, left), "target_size": (height, width)}


# Copied from train_sspo_sd.whole_picture
def whole_picture(args):
    """The geometry of a picture that was neither resized nor cropped."""
    size = picture_size(args)
    return {"original_size": size, "crop_top_left": (0, 0), "target_size": size}


# Copied from train_sspo_sd.WinnerStream
class WinnerStream(torch.utils.data.IterableDataset):
    """
    The endless sequence of epochs, cut into micro-batches for one process.

    The sequence is the same for every layout: `world` x `batch_size` consecutive winners make one micro-batch of all
    processes, of which this one takes every `world`-th. No row is left over at the end of an epoch, and a data set
    smaller than a batch simply comes round again. With --on_bad_example skip the place of a winner that cannot be read
    is taken by the next one of the sequence that can be; that one's own place, and every draw, stays what it is.

    Yields:
        (examples, cursor): a list of `batch_size` dicts (see Winners.load; a stand-in has `skipped`, why it stands
        there), and the (epoch, offset) from which a new stream goes on behind this micro-batch. A UserError is
        yielded, not raised: what is raised in a loader process arrives with its whole traceback.
    """

    def __init__(self, winners, load, batch_size, rank=0, world=1, cursor=(0, 0)):
        self.winners, self.load, self.cursor = winners, load, cursor
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __iter__(self):
        try:
            yield from self.micro_batches()
        except UserError as error:
            yield error, None

    def micro_batches(self):
        worker = torch.utils.data.get_worker_info()
        worker, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine, taken = [], 0
        (sequence,) = itertools.tee(self.sequence(), 1)  # a copy of it can look ahead
        for epoch, row, example, cursor in sequence:
            index, slot = divmod(taken, self.world * self.batch_size)
            taken += 1
            if index % workers != worker:
                continue
            if slot % self.world == self.rank:
                mine.append(self.serve(epoch, row, example, sequence))
            if slot == self.world * self.batch_size - 1:
                yield mine, cursor
                mine = []

    def serve(self, epoch, row, example, sequence):
        """The example for one place, or the stand-in that --on_bad_example skip puts there."""
        place = (epoch, row)
        try:
            return self.load(row, example, place)
        except BadExample as error:
            if self.winners.args.on_bad_example == "stop":
                raise stop_at(error) from error
            reason = str(error)
        for ahead, row, example, _ in copy.copy(sequence):
            if ahead > epoch + 1:
                break
            with suppress(BadExample):  # it is named when its own place comes
                return {**self.load(row, example, place), "skipped": reason}
        raise UserError(f"no winner can be read in a whole epoch, the first because {reason}")

    def sequence(self):
        epoch, offset = self.cursor
        while True:
            found, ties = offset > 0, 0
            for row, example in self.winners.rows(epoch, offset):
                offset += 1
                if self.winners.streaming and not self.winners.has_winner(example):
                    ties += 1
                    continue
                found = True
                yield epoch, row, example, (epoch, offset)
            if not found:
                raise UserError("the data set has no winner: it is empty, or all its pairs are ties")
            if ties and self.rank == 0:  # of a stream; elsewhere they are counted beforehand
                logger.logger.info(f"{ties} ties dropped in epoch {epoch}.")
            epoch, offset = epoch + 1, 0


# Copied from train_sspo_sd.stop_at
def stop_at(error):
    """What a BadExample says when it stops the run. Without the row the order, and so the run, would be another."""
    return UserError(f"{error}: mend it, or go on without it by --on_bad_example skip")


# Copied from train_sspo_sd.leave_group
def leave_group(worker):
    """For loader processes: a signal to the whole group must not take them from the update in flight."""
    if hasattr(os, "setpgrp"):  # there are no groups on Windows
        os.setpgrp()


# Copied from train_sspo_sd.Loader
class Loader:
    """
    The iterator over this process's micro-batches from `cursor` on; raises the stream's UserErrors.

    `skipped` collects why winners were skipped in the micro-batches that were served.
    """

    def __init__(self, winners, load, args, accelerator, cursor):
        self.accelerator, self.skipped, self.named = accelerator, [], set()
        stream = WinnerStream(
            winners, load, args.train_batch_size, accelerator.process_index, accelerator.num_processes, cursor
        )
        # datasets would deal a stream's shards out to several of them, and so change the order.
        workers = min(args.dataloader_num_workers, 1) if args.streaming else args.dataloader_num_workers
        rollout = args.rollout_batch_size // args.train_batch_size  # micro-batches that are asked for at once
        self.batches = iter(
            torch.utils.data.DataLoader(
                stream,
                batch_size=None,
                collate_fn=tuple,
                num_workers=workers,
                worker_init_fn=leave_group,
                prefetch_factor=max(math.ceil(rollout / workers), 2) if workers else None,
            )
        )

    def __next__(self):
        examples, cursor = next(self.batches)
        if isinstance(examples, UserError):
            raise examples
        self.skipped += [example.pop("skipped") for example in examples if "skipped" in example]
        return examples, cursor

    def name_skipped(self):
        """
        Names in the log, each once, the winners that were skipped on any process since this was called last.

        Returns:
            the number of places in the batches that stand-ins took.
        """
        count = torch.tensor(float(len(self.skipped)), device=self.accelerator.device)
        count = int(self.accelerator.reduce(count, "sum"))
        for reason in gather_object(self.skipped) if count else ():
            if reason not in self.named:
                logger.warning(f"Skipped: {reason}.")
            self.named.add(reason)
        self.skipped = []
        return count


# ------------------------------------------------------------------------------------------------------------------
# Models. From here to "Policy and reference" is the seam: all that another pipeline does differently.
# ------------------------------------------------------------------------------------------------------------------

PIPELINE = AnimateDiffPipeline
LORA_TARGETS = r".*motion_modules.*\.(to_q|to_k|to_v|to_out\.0)"  # the names alone would hit the image model too
TAGS = ["diffusers", "text-to-video", "animatediff"]
# By these save_result's work is known again.
RESULTS = ("pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors")
FRAMES_PER_SECOND = 8  # of what is written
VAE_FRAMES = 8  # frames that the VAE takes at once
# What motion adapters are trained with. The image model's own schedule is another one.
NOISE_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False)


@dataclass
class Models:
    """The parts of the pipeline. `reference`: its weight for each parameter, or none for the base in LoRA mode."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    denoiser: UNetMotionModel
    reference: dict | None
    noise_scheduler: DDPMScheduler

    @property
    def encoders(self):
        """What is not needed any more once latents and prompts are cached."""
        return [self.text_encoder, self.vae]


# Copied from train_sspo_sd.unsuitable
def unsuitable(args, unet, vae, scheduler):
    """
    Why a model with these configurations cannot be trained here, or None.

    A distilled model whose scheduler is that of its base cannot be told from it.
    """
    prediction = args.prediction_type or scheduler.get("prediction_type", "epsilon")
    if unet["in_channels"] != vae["latent_channels"]:
        return "takes more than latents and a caption (an inpainting or depth model?): give a text-to-image model"
    if unet.get("time_cond_proj_dim") is not None or scheduler["_class_name"] in ("LCMScheduler", "TCDScheduler"):
        return "is distilled to few steps (LCM or the like), which this training would undo: give the base model"
    if "beta_start" not in scheduler:
        return f"has the noise levels of {scheduler['_class_name']}, not of a schedule of betas: it cannot be used"
    if prediction not in ("epsilon", "v_prediction"):
        return f"predicts {prediction}, and only epsilon and v_prediction can be trained"
    trailing = scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
    if trailing and prediction == "epsilon":
        return (
            "is distilled to few steps (turbo or lightning, by its trailing timestep_spacing), which this training "
            "would undo: give the base model, or mend scheduler_config.json if it is none"
        )
    return None


def refuse_others(args, unet, vae, scheduler, adapter):
    """Raises UserError for models that would be trained wrongly, from their configurations, before any weights."""
    name, motion = args.pretrained_model_name_or_path, args.motion_adapter_name_or_path
    what = unsuitable(args, unet, vae, scheduler)
    if unet["_class_name"] != "UNet2DConditionModel" or unet.get("addition_embed_type") is not None:
        what = "is no image model of Stable Diffusion 1.x: give the one that the motion adapter is for"
    if what is not None:
        raise UserError(f"--pretrained_model_name_or_path {name} {what}")
    if adapter["_class_name"] != "MotionAdapter":
        what = "is no motion adapter"
    elif adapter.get("conv_in_channels"):
        what = "takes more than latents and a caption (PIA?): give one for text-to-video"
    elif list(unet["block_out_channels"]) != list(adapter["block_out_channels"]):
        what = (
            f"is not made for {name}: its blocks have {adapter['block_out_channels']} channels, those of the image "
            f"model {unet['block_out_channels']}"
        )
    elif args.num_frames > adapter.get("motion_max_seq_length", 32):
        what = f"takes {adapter.get('motion_max_seq_length', 32)} frames at most: lower --num_frames {args.num_frames}"
    if what is not None:
        raise UserError(f"--motion_adapter_name_or_path {motion} {what}")


def load_models(args, dtype):
    """
    Loads the pipeline's parts, frozen and on the CPU: in `dtype`, but for motion modules that are trained in full,
    which stay in fp32. Raises UserError if that is not possible.
    """
    name, motion = args.pretrained_model_name_or_path, args.motion_adapter_name_or_path
    source = dict(revision=args.revision, cache_dir=args.cache_dir)
    weights = dict(source, variant=args.variant)
    try:
        reading = f"--motion_adapter_name_or_path {motion}"
        adapter = MotionAdapter.load_config(motion, cache_dir=args.cache_dir)
        reading = f"--pretrained_model_name_or_path {name}"
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **source)
        vae = AutoencoderKL.load_config(name, subfolder="vae", **source)
        scheduler = DDPMScheduler.load_config(name, subfolder="scheduler", **source)
        refuse_others(args, unet, vae, scheduler, adapter)
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=dtype, **weights)
        reading = f"--motion_adapter_name_or_path {motion}"
        adapter = MotionAdapter.from_pretrained(motion, cache_dir=args.cache_dir, torch_dtype=torch.float32)
        denoiser = UNetMotionModel.from_unet2d(unet, adapter)
        reading = f"--pretrained_model_name_or_path {name}"
        models = Models(
            tokenizer=CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **source),
            text_encoder=CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=dtype, **weights),
            vae=AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=dtype, **weights),
            denoiser=denoiser,
            reference=None,
            noise_scheduler=DDPMScheduler(
                num_train_timesteps=scheduler.get("num_train_timesteps", 1000),
                prediction_type=args.prediction_type or scheduler.get("prediction_type", "epsilon"),
                **NOISE_SCHEDULE,
            ),
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights that do not fit their configuration
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{reading} cannot be loaded: {reason}") from error
    if args.train_mode == "full":  # from_unet2d has cast them to the image model's precision
        for path, module in denoiser.named_modules():
            if path.endswith(".motion_modules"):
                module.float()
        denoiser.load_motion_modules(adapter)
    for module in (*models.encoders, denoiser):
        module.requires_grad_(False)
    return models


# Copied from train_sspo_sd.encode_prompt
@torch.no_grad()
def encode_prompt(models, captions):
    """One dict for each caption, its tensors without a batch dimension: `prompt_embeds`, (tokens, width)."""
    tokens = models.tokenizer(
        captions,
        padding="max_length",
        max_length=models.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    embeds = models.text_encoder(tokens.input_ids.to(models.text_encoder.device))[0]
    return [{"prompt_embeds": row} for row in embeds]


# Copied from train_sspo_sd.collate_condition
def collate_condition(prompts, geometries, device):
    """The batch of conditions that `predict` takes, from encode_prompt's rows. Tensors have the batch first."""
    return {"prompt_embeds": torch.stack([prompt["prompt_embeds"] for prompt in prompts]).to(device)}


@torch.no_grad()
def encode_image(models, pixels):
    """
    Mean and standard deviation of the latents (b, c, f, h, w) of `pixels` (b, f, 3, h, w), in training space, fp32.
    """
    vae, means, stds = models.vae, [], []
    scale = vae.config.scaling_factor
    for frames in pixels.flatten(0, 1).split(VAE_FRAMES):
        posterior = vae.encode(frames.to(vae.device, vae.dtype)).latent_dist
        means.append(posterior.mean.float() * scale)
        stds.append(posterior.std.float() * scale)
    return tuple(torch.cat(parts).unflatten(0, pixels.shape[:2]).transpose(1, 2) for parts in (means, stds))


@torch.no_grad()
def decode_latents(models, latents):
    """The clip of one example's latents (1, c, f, h, w), a list of PIL. Not under autocast: VAEs overflow in fp16."""
    vae, pixels = models.vae, []
    for frames in latents[0].transpose(0, 1).split(VAE_FRAMES):
        pixels.append(vae.decode(frames.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample)
    return VaeImageProcessor().postprocess(torch.cat(pixels))


def latent_shape(models, args):
    """The shape of one example's latents."""
    factor = 2 ** (len(models.vae.config.block_out_channels) - 1)
    return (models.vae.config.latent_channels, args.num_frames, *(side // factor for side in picture_size(args)))


# Copied from train_sspo_sd.draw_timesteps
def draw_timesteps(models, generator, draws):
    """`draws` timesteps, uniform over 0..T-1."""
    return torch.randint(models.noise_scheduler.config.num_train_timesteps, (draws,), generator=generator)


# Copied from train_sspo_sd.add_noise
def add_noise(models, latents, noise, timesteps):
    return models.noise_scheduler.add_noise(latents, noise, timesteps)


# Copied from train_sspo_sd.denoising_target
def denoising_target(models, latents, noise, timesteps):
    """What the model should predict: the noise, or the velocity."""
    if models.noise_scheduler.config.prediction_type == "v_prediction":
        return models.noise_scheduler.get_velocity(latents, noise, timesteps)
    return noise


def predict(denoiser, noisy, timesteps, condition):
    """The denoiser's prediction in fp32, in the shape of `noisy`. Each frame is told its clip's caption."""
    embeds = condition["prompt_embeds"].repeat_interleave(noisy.shape[2], dim=0)  # clip by clip: a, a, ..., b, b, ...
    return denoiser(noisy, timesteps, encoder_hidden_states=embeds).sample.float()


# Copied from train_sspo_sd.rollout_scheduler
def rollout_scheduler(models, args):
    """A fresh sampler on the model's own noise schedule."""
    kind = {"dpmsolver": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}[args.rollout_scheduler]
    return kind.from_config(models.noise_scheduler.config)


def trained_in_full(denoiser):
    """The parameters that --train_mode full trains: those of the motion modules."""
    return [weight for name, weight in denoiser.named_parameters() if ".motion_modules." in name]


def checkpoint_gradients(denoiser):
    """
    Makes the backward recompute activations instead of keeping them.

    diffusers does so for the blocks' residual and attention layers; the motion modules, which hold most of what is
    kept, are wrapped here.
    """
    denoiser.enable_gradient_checkpointing()
    for module in denoiser.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.forward = functools.partial(forward_again, module.forward)


def forward_again(forward, *inputs, **named):
    """Calls `forward` so that the backward calls it again instead of finding its activations."""
    if torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False, **named)
    return forward(*inputs, **named)


def save_denoiser(denoiser, args, directory):
    """Writes the policy inside a checkpoint: LoRA weights in the pipeline's format, or the motion adapter's folder."""
    if args.train_mode == "lora":
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser, adapter_name=POLICY))
        metadata = _collate_lora_metadata({"unet": denoiser})  # carries lora_alpha
        PIPELINE.save_lora_weights(directory, unet_lora_layers=layers, **metadata)
    else:
        save_adapter(denoiser, args, os.path.join(directory, "motion_adapter"))


def save_adapter(denoiser, args, directory):
    """
    Writes the motion modules as a motion adapter.

    Its configuration is that of the one it came from: UNetMotionModel.save_motion_modules forgets the depth of the
    motion modules.
    """
    config = MotionAdapter.load_config(args.motion_adapter_name_or_path, cache_dir=args.cache_dir)
    adapter = MotionAdapter.from_config(config)
    adapter.load_state_dict({name: w for name, w in denoiser.state_dict().items() if ".motion_modules." in name})
    adapter.save_pretrained(directory)


def load_denoiser(denoiser, args, directory):
    """Reads what save_denoiser wrote, into the weights that the optimizer holds."""
    if args.train_mode == "lora":
        layers = load_file(Path(directory, "pytorch_lora_weights.safetensors"))
        layers = {key.removeprefix("unet."): value for key, value in layers.items() if key.startswith("unet.")}
        set_peft_model_state_dict(denoiser, convert_unet_state_dict_to_peft(layers), adapter_name=POLICY)
    else:
        denoiser.load_motion_modules(MotionAdapter.from_pretrained(directory, subfolder="motion_adapter"))


def save_result(models, args, directory):
    """Writes what the stock pipeline loads: LoRA weights, or the motion adapter."""
    if args.train_mode == "lora":
        save_denoiser(models.denoiser, args, directory)
    else:
        save_adapter(models.denoiser, args, directory)


# ------------------------------------------------------------------------------------------------------------------
# Policy and reference
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.prepare_denoisers
def prepare_denoisers(models, args, device):
    """
    Makes the policy trainable and sets the reference beside it.

    LoRA: an adapter on the frozen denoiser. The reference is a second set of the trained weights, in fp32 like the
    policy's, because a reference in half precision would put rounding noise in the gaps. The denoiser stays in
    evaluation mode: no layer needs the other, and dropout in the policy alone would bias the switch.
    """
    denoiser = models.denoiser.to(device)
    if args.train_mode == "lora":
        config = LoraConfig(
            r=args.rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS
        )
        denoiser.add_adapter(config, adapter_name=POLICY)
        cast_training_params(denoiser, torch.float32)
        for module in denoiser.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False  # to fp32, only for autocast to cast it back
    else:
        for parameter in trained_in_full(denoiser):
            parameter.requires_grad_(True)
    if args.enable_xformers_memory_efficient_attention:
        denoiser.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        checkpoint_gradients(denoiser)
    denoiser.eval()


# Copied from train_sspo_sd.policy_weights
def policy_weights(models, args):
    """The policy's trained weights, as the replay bank keeps them: a dict of CPU tensors."""
    if args.train_mode == "lora":
        weights = get_peft_model_state_dict(models.denoiser, adapter_name=POLICY)
    else:
        weights = {name: weight for name, weight in models.denoiser.named_parameters() if weight.requires_grad}
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


# Copied from train_sspo_sd.load_reference
def load_reference(models, weights, args):
    """Makes `weights`, an entry of the replay bank, the reference. In LoRA mode the base is no weights at all."""
    if args.train_mode == "lora":
        adapted = any(weight.any() for name, weight in weights.items() if "lora_B" in name)
        weights = {f"{k.removesuffix('weight')}{POLICY}.weight": v for k, v in weights.items()} if adapted else {}
    models.reference, device = None, models.denoiser.device  # the old one makes room first
    parameters = dict(models.denoiser.named_parameters())
    models.reference = {parameters[name]: weight.to(device) for name, weight in weights.items()}


# Copied from train_sspo_sd.exchange_weights
def exchange_weights(models):
    """The reference's weights take the place of the policy's, and the other way round. Nothing is copied."""
    for parameter, weight in models.reference.items():
        parameter.data, models.reference[parameter] = weight, parameter.data


# Copied from train_sspo_sd.as_reference
@contextmanager
def as_reference(models, args):
    """
    Gives the denoiser with the reference's weights, without gradients.

    It is the policy's denoiser, whose weights are exchanged for that time. This must not happen between the policy's
    forward and its backward, which needs its own: the reference always goes first. Where the reference is LoRA's base,
    the denoiser goes without the adapter, which would only cost time: the result is the same to the last bit.
    """
    denoiser = models.denoiser
    if args.train_mode == "lora" and not models.reference:
        begin, end = denoiser.disable_adapters, denoiser.enable_adapters
    else:
        begin = end = functools.partial(exchange_weights, models)
    begin()
    try:
        with torch.no_grad():
            yield denoiser
    finally:
        end()


# ------------------------------------------------------------------------------------------------------------------
# Random Checkpoint Replay
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.ReplayBank
class ReplayBank:
    """
    The policy's past, on disk: `iteration-0` is the base, `iteration-k` what it was at the end of the k-th iteration.

    Args:
        directory: where the entries are, as safetensors.
        size: entries kept, the base included; past it the oldest but the base goes.
        reference: random (uniform over the entries), latest or initial.
        seed: of the draws.

    What an iteration may draw is a function of its number, not of the files: a run that is resumed from an older
    checkpoint finds the bank of that moment. For that, entries that a checkpoint still needs outlive `size`.
    """

    def __init__(self, directory, size, reference="random", seed=0):
        self.directory, self.size, self.reference, self.seed = Path(directory), size, reference, seed

    def path(self, index):
        return self.directory / f"iteration-{index}.safetensors"

    def live(self, iteration):
        """The entries that `iteration` (from 1) draws from: the base and the newest of 1..iteration-1."""
        newest = range(1, iteration)
        return [0, *newest[max(len(newest) - (self.size - 1), 0) :]]

    def draw(self, iteration):
        """The entry that is the reference of `iteration`; the same on every rank and after a resume."""
        live = self.live(iteration)
        if self.reference == "initial":
            return live[0]
        if self.reference == "latest":
            return live[-1]
        return live[torch.randint(len(live), (), generator=keyed_generator("reference", self.seed, iteration)).item()]

    def check(self, step, last_step, replay_steps):
        """Raises UserError if an entry that a run draws between these two steps, and does not push itself, is gone."""
        first = step // replay_steps + 1
        drawn = {self.draw(iteration) for iteration in range(first, math.ceil(last_step / replay_steps) + 1)}
        for index in sorted(drawn & set(range(first))):
            check_whole(self.path(index))

    @writing("the replay bank")
    def push(self, index, weights):
        """Writes entry `index`: beside its place first, so that a crash leaves no half entry."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.path(index).with_suffix(".partial")
        save_file(weights, partial, metadata={"format": "pt"})
        os.replace(partial, self.path(index))

    def load(self, index):
        """Entry `index`, a dict of CPU tensors. Raises UserError if it is gone."""
        check_whole(self.path(index))
        return load_file(self.path(index))

    @writing("the replay bank")
    def evict(self, iterations):
        """Deletes what none of `iterations` (the running one, and those of the checkpoints on disk) draws from."""
        needed = {self.path(index) for iteration in iterations for index in self.live(iteration)}
        for path in self.directory.glob("iteration-*"):
            if path not in needed:
                path.unlink()


# ------------------------------------------------------------------------------------------------------------------
# Self-sampling
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.self_sample
@torch.no_grad()
def self_sample(
    denoiser, scheduler, noise, condition, unconditional, steps, guidance_scale, winners=None, strength=1.0
):
    """
    Samples rivals as the stock pipeline would, but keeps them as latents in training space.

    Args:
        denoiser: with the reference's weights.
        scheduler: a diffusers scheduler of the model's noise schedule.
        noise: (b, ...) standard normal, fp32.
        condition, unconditional: batches of conditions of length b.
        steps, guidance_scale: as in the pipeline; a guidance of 1 or less means none.
        winners, strength: with strength < 1, start from the winners' latents noised to that strength, as
            image-to-image does, and take only the steps from there on.
    Returns:
        (b, ...) latents, fp32.
    """
    guided = guidance_scale > 1
    both = join_conditions(unconditional, condition) if guided else condition
    scheduler.set_timesteps(steps)  # left on the CPU: each look at one on the accelerator would wait for its work
    timesteps, latents = scheduler.timesteps, noise * scheduler.init_noise_sigma
    if strength < 1:
        timesteps = timesteps[-int(steps * strength) * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))  # it would search for it otherwise
    if strength < 1:
        latents = scheduler.add_noise(winners, noise, timesteps[:1].expand(len(noise)))
    for timestep, on_device in zip(timesteps, timesteps.to(noise.device)):
        noisy = torch.cat([latents, latents]) if guided else latents
        noisy = scheduler.scale_model_input(noisy, timestep)
        prediction = predict(denoiser, noisy, on_device.expand(len(noisy)), both)
        if guided:
            without, with_caption = prediction.chunk(2)
            prediction = without + guidance_scale * (with_caption - without)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


# Copied from train_sspo_sd.join_conditions
def join_conditions(*conditions):
    """Batches of conditions, one after the other: tensors are concatenated, lists are added."""
    first = conditions[0]
    return {
        name: torch.cat([c[name] for c in conditions])
        if torch.is_tensor(first[name])
        else list(itertools.chain(*(c[name] for c in conditions)))
        for name in first
    }


# Copied from train_sspo_sd.repeat_condition
def repeat_condition(condition, times):
    """Each row of a batch of conditions `times` times, in place: a, a, b, b, ..."""
    return {
        name: value.repeat_interleave(times, dim=0)
        if torch.is_tensor(value)
        else [item for item in value for _ in range(times)]
        for name, value in condition.items()
    }


# ------------------------------------------------------------------------------------------------------------------
# Errors, switch and loss
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.denoising_errors
def denoising_errors(denoiser, models, latents, noise, timesteps, condition):
    """
    The error e: mean squared error of the prediction, over all but the batch dimension, in fp32.

    Args:
        latents: (b, ...).
        noise: (b, draws, ...).
        timesteps: (b, draws).
        condition: a batch of conditions of length b.
    Returns:
        (b, draws) fp32.
    """
    draws = noise.shape[1]
    latents = latents.unsqueeze(1).expand_as(noise).flatten(0, 1)
    noise, flat_timesteps = noise.flatten(0, 1), timesteps.flatten()
    noisy = add_noise(models, latents, noise, flat_timesteps)
    prediction = predict(denoiser, noisy, flat_timesteps, repeat_condition(condition, draws))
    target = denoising_target(models, latents, noise, flat_timesteps)
    return (prediction - target.float()).square().flatten(1).mean(1).view(-1, draws)


# Copied from train_sspo_sd.pair_errors
def pair_errors(denoiser, models, winner, rival, noise, timesteps, condition, split):
    """
    The errors of winner and rival, (b, draws) each.

    They are those of one batch, or with `split` of two, of which the first is not kept for the backward but computed
    again there, when the second's activations are gone. Policy and reference must be split alike: another batch size
    may round otherwise, and the gaps would not be 0 where they are the same model.
    """
    if not split:
        condition = join_conditions(condition, condition)
        latents, noise, timesteps = torch.cat([winner, rival]), torch.cat([noise] * 2), torch.cat([timesteps] * 2)
        return denoising_errors(denoiser, models, latents, noise, timesteps, condition).chunk(2)
    turns = iter([denoiser, models.denoiser])  # in the backward without data parallel's wrapper: it counts forwards
    winner_errors = torch.utils.checkpoint.checkpoint(
        lambda: denoising_errors(next(turns), models, winner, noise, timesteps, condition),
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return winner_errors, denoising_errors(denoiser, models, rival, noise, timesteps, condition)


# Copied from train_sspo_sd.sspo_loss
def sspo_loss(
    policy_winner,
    policy_rival,
    reference_winner,
    reference_rival,
    beta,
    ssr="sign",
    rival_weight=1.0,
    sft_weight=0.0,
    x=None,
):
    """
    The SSPO loss, -log sigmoid(-beta/2 * [gap_w - s * gap_r]), averaged over examples and draws.

    gap_w = policy_winner - reference_winner, gap_r = policy_rival - reference_rival. The switch s is +1 where
    x = -gap_w >= 0 (a tie, as at the first update, is no evidence that the rival is a winner) and otherwise -1 for
    `sign`, 0 for `indicator`, +1 for `none` (arXiv 2410.05255, self-sampling regularization). The factor 1/2 on beta
    is that of Diffusion-DPO. With draws, x is their mean and s is one decision for the pair.

    Args:
        policy_winner, policy_rival, reference_winner, reference_rival: denoising errors (see denoising_errors), fp32,
            each (batch,) or (batch, draws). Only the policy's carry gradients.
        beta: the strength of the pull to the reference.
        ssr: sign, indicator or none.
        rival_weight: factor on s * gap_r; 1 in the paper.
        sft_weight: adds sft_weight * policy_winner; 0 in the paper.
        x: a number whose sign decides the switch of every example, in place of each one's own.
    Returns:
        the scalar loss, and a dict of detached scalars: dpo_fraction (share of examples with s = +1),
        implicit_accuracy (share of draws with gap_w < gap_r; a tie counts one half), the policy's errors and the gaps.
    Raises:
        ValueError: for another ssr.
    """
    gap_winner = policy_winner - reference_winner
    gap_rival = policy_rival - reference_rival
    if x is None:
        x = -gap_winner.detach()
        if x.ndim == 2:
            x = x.mean(dim=1, keepdim=True)
    else:
        x = torch.full_like(gap_winner.detach(), x)
    if ssr not in ("sign", "indicator", "none"):
        raise ValueError(f"ssr must be sign, indicator or none, not {ssr}")
    otherwise = {"sign": -1.0, "indicator": 0.0, "none": 1.0}[ssr]
    s = torch.where(x >= 0, 1.0, otherwise).to(x.dtype)

    loss = -F.logsigmoid(-beta / 2 * (gap_winner - s * rival_weight * gap_rival))
    loss = (loss + sft_weight * policy_winner).mean()

    told_apart = (gap_rival - gap_winner).detach().sign()  # 1 right, -1 wrong, 0 a tie
    metrics = {
        "dpo_fraction": (s == 1).float().mean(),
        "implicit_accuracy": (told_apart + 1).mean() / 2,
        "mse/policy_winner": policy_winner.detach().mean(),
        "mse/policy_rival": policy_rival.detach().mean(),
        "gap/winner": gap_winner.detach().mean(),
        "gap/rival": gap_rival.detach().mean(),
    }
    return loss, metrics


# Copied from train_sspo_sd.training_loss
def training_loss(policy, models, batch, args, autocast, x=None):
    """
    The loss of one micro-batch, with its metrics.

    Args:
        policy: the denoiser as accelerate wrapped it.
        batch: see collate; `rival` holds the rivals' latents.
        autocast: makes the context in which every forward runs, the same for policy and reference.
        x: see sspo_loss.
    """
    winner, keys, condition = batch["winner"], batch["keys"], batch["condition"]
    noise = keyed_noise("noise", args.seed, keys, (args.draws_per_pair, *winner.shape[1:])).to(winner.device)
    timesteps = torch.stack(
        [draw_timesteps(models, keyed_generator("timestep", args.seed, *key), args.draws_per_pair) for key in keys]
    ).to(winner.device)

    if args.loss_type == "sft":
        with autocast():
            errors = denoising_errors(policy, models, winner, noise, timesteps, condition)
        loss = errors.mean()
        return loss, {"mse/policy_winner": loss.detach()}

    # The same (t, noise) and the same caption for both halves of a pair.
    pairs = (winner, batch["rival"], noise, timesteps, condition)
    with as_reference(models, args) as reference, autocast():
        reference_winner, reference_rival = pair_errors(reference, models, *pairs, args.split_pairs)
    with autocast():
        policy_winner, policy_rival = pair_errors(policy, models, *pairs, args.split_pairs)
    return sspo_loss(
        policy_winner,
        policy_rival,
        reference_winner,
        reference_rival,
        args.beta_dpo,
        args.ssr,
        args.rival_weight,
        args.sft_weight,
        x,
    )


# ------------------------------------------------------------------------------------------------------------------
# Batches: encoding, and the cache of what was encoded
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.encode_examples
def encode_examples(models, examples):
    """Replaces the pixels and the caption of each example by latents (`mean`, `std`) and `prompt`, in place."""
    mean, std = encode_image(models, torch.stack([example.pop("pixels") for example in examples]))
    prompts = encode_prompt(models, [example.pop("caption") for example in examples])
    finite = (mean.isfinite() & std.isfinite()).flatten(1).all(1).tolist()
    for i, example in enumerate(examples):
        if not finite[i]:
            raise UserError(
                f"the latents of row {example['row']} are not finite: the VAE is broken, or it overflows in half "
                "precision; try --mixed_precision no or bf16"
            )
        example.update(mean=mean[i], std=std[i], prompt=prompts[i])


# Copied from train_sspo_sd.collate
def collate(examples, empty_prompt, args, device):
    """
    One batch from encoded examples.

    Returns:
        dict with `winner` (b, ...) latents sampled from the VAE's posterior, `condition` and `unconditional` for
        guidance, and `keys`, the (epoch, row) that every draw of an example is keyed by.
    """
    keys = [(example["epoch"], example["row"]) for example in examples]
    mean, std = (torch.stack([example[name] for example in examples]).to(device) for name in ("mean", "std"))
    noise = keyed_noise("posterior", args.seed, keys, mean.shape[1:]).to(device)
    prompts = [empty_prompt if example["dropped"] else example["prompt"] for example in examples]
    geometries = [example["geometry"] for example in examples]
    return {
        "winner": mean + std * noise,
        "condition": collate_condition(prompts, geometries, device),
        "unconditional": collate_condition([empty_prompt] * len(examples), geometries, device),
        "keys": keys,
    }


# Copied from train_sspo_sd.load_rows
def load_rows(winners, rows):
    """The examples of `rows` in their first epoch, and of those that are bad the reasons, by row."""
    examples, bad = [], {}
    for row in rows:
        try:
            examples.append(winners.load(row, row, place=(0, row)))
        except BadExample as error:  # returned for WinnerStream's reason
            bad[str(row)] = str(error)
    return examples, bad


# Copied from train_sspo_sd.LatentCache
class LatentCache:
    """
    Encoded winners on disk: files of CHUNK rows, written once, each process its share, and read by memory map.

    A file that is there is complete (it is renamed into its place), so an interrupted run goes on where it stopped.
    Rows that cannot be read are noted in the files' metadata, with the reason.
    """

    CHUNK = 64

    def __init__(self, directory, args):
        self.directory, self.args, self.handles = Path(directory), args, {}

    def path(self, row):
        return self.directory / f"rows-{row // self.CHUNK}.safetensors"

    def fill(self, models, winners, accelerator):
        chunks = range(accelerator.process_index, math.ceil(len(winners) / self.CHUNK), accelerator.num_processes)
        for chunk in tqdm(chunks, desc="caching latents", disable=not accelerator.is_local_main_process):
            first = chunk * self.CHUNK
            with suppress(UserError):
                check_whole(self.path(first))
                continue
            tensors, bad = {}, {}
            rows = range(first, min(first + self.CHUNK, len(winners)))
            for examples, reasons in torch.utils.data.DataLoader(
                rows,
                self.args.train_batch_size,
                collate_fn=functools.partial(load_rows, winners),
                num_workers=self.args.dataloader_num_workers,
            ):
                if reasons and self.args.on_bad_example == "stop":
                    raise stop_at(next(iter(reasons.values())))
                bad.update(reasons)
                if examples:
                    encode_examples(models, examples)
                for example in examples:
                    tensors.update(self.flatten(example))
            self.write(first, tensors, bad)
        accelerator.wait_for_everyone()

    @writing("the cache of latents")
    def write(self, row, tensors, bad):
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.path(row).with_suffix(".partial")
        save_file(tensors, partial, metadata=bad)
        os.replace(partial, self.path(row))

    @staticmethod
    def flatten(example):
        parts = {"mean": example["mean"], "std": example["std"]}
        parts.update({f"prompt/{name}": value for name, value in example["prompt"].items()})
        parts.update({f"geometry/{name}": torch.tensor(value) for name, value in example["geometry"].items()})
        return {f"{example['row']}/{name}": value.cpu().contiguous() for name, value in parts.items()}

    def load(self, row, _, place):
        """The example of Winners.load, already encoded. Raises BadExample if it could not be read."""
        path = self.path(row)
        if path not in self.handles:
            if len(self.handles) == 64:
                self.handles.clear()  # a large set has more files than a process may keep open
            file = safe_open(path, "pt")
            names = {}
            for key in file.keys():
                names.setdefault(int(key.split("/", 1)[0]), []).append(key)
            self.handles[path] = file, names, file.metadata() or {}
        file, names, bad = self.handles[path]
        if str(row) in bad:
            raise BadExample(bad[str(row)])
        example = {"epoch": place[0], "row": place[1], "dropped": is_dropped(self.args, *place)}
        for key in names[row]:
            value, (_, *name) = file.get_tensor(key), key.split("/")
            if len(name) == 1:
                example[name[0]] = value
            else:
                group, field = name
                example.setdefault(group, {})[field] = tuple(value.tolist()) if group == "geometry" else value
        return example


# Copied from train_sspo_sd.cache_directory
def cache_directory(args, winners, dtype):
    """Where the cache of this data set at these settings belongs, inside output_dir."""
    names = "pretrained_model_name_or_path revision variant image_column caption_column resolution center_crop "
    names += "random_flip seed max_train_samples pretrained_vae_model_name_or_path "
    names += "video_column num_frames frame_stride height width"
    key = [getattr(args, name, None) for name in names.split()] + [winners.dataset._fingerprint, str(dtype)]
    return Path(args.output_dir, "cache", hashlib.sha256(repr(key).encode()).hexdigest()[:16])


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------------

# What a resumed run may change. Anything else would make it another run, and is refused. The batch may be laid out
# anew as long as its global size stays.
# Copied from train_sspo_sd.FREE_TO_CHANGE
FREE_TO_CHANGE = set(
    "cache_dir dataloader_num_workers on_bad_example rollout_batch_size train_batch_size gradient_accumulation_steps "
    "max_train_steps num_train_epochs gradient_checkpointing split_pairs allow_tf32 "
    "enable_xformers_memory_efficient_attention output_dir checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint validation_prompts validation_steps num_validation_images report_to tracker_project_name "
    "logging_dir push_to_hub hub_model_id hub_token dataset_name train_data_dir pretrained_model_name_or_path "
    "pretrained_vae_model_name_or_path motion_adapter_name_or_path".split()
)


# Copied from train_sspo_sd.run_settings
def run_settings(args, accelerator, winners):
    """What makes this run what it is, as a checkpoint records it."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["mixed_precision"] = accelerator.mixed_precision
    settings["global batch size"] = (
        args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    )
    settings["number of winners"] = None if args.streaming else len(winners)
    settings["first caption"] = winners.first_caption
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["max_train_steps"] = args.max_train_steps  # by which the rate falls
    return settings


# Copied from train_sspo_sd.fingerprint
def fingerprint(modules):
    """Tells the weights of one model from another's, by some hundred numbers of each tensor: cheap at any size."""
    digest = hashlib.sha256()
    for weight in itertools.chain(*(module.parameters() for module in modules)):
        digest.update(weight.detach().flatten()[:: max(weight.numel() // 64, 1)].float().numpy().tobytes())
    return digest.hexdigest()[:16]


# Copied from train_sspo_sd.replay_directory
def replay_directory(args):
    """Where the bank is: beside the checkpoints, which may be deleted while it is needed."""
    return Path(args.output_dir, "replay")


# Copied from train_sspo_sd.list_checkpoints
def list_checkpoints(output_dir):
    """The checkpoints in output_dir, the oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


# Copied from train_sspo_sd.checkpoint_step
def checkpoint_step(path):
    """The number of updates behind a checkpoint."""
    return int(path.name.split("-")[1])


# Copied from train_sspo_sd.read_checkpoint
def read_checkpoint(path, args):
    """
    The record of a checkpoint.

    Raises:
        UserError: if a file of it, or an entry of the replay bank that the run will draw, is gone or cut short.
    """
    try:
        record = json.loads((path / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'run.json'} cannot be read") from error
    for name, size in record.get("files", {}).items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is gone")
        if file.stat().st_size != size:
            raise UserError(f"{file} has {file.stat().st_size} bytes, not {size}")
    settings = record["settings"]
    if settings["loss_type"] == "sspo":
        bank = ReplayBank(replay_directory(args), settings["replay_size"], settings["reference"], settings["seed"])
        bank.check(record["step"], args.max_train_steps, settings["replay_steps"])
    return record


# Copied from train_sspo_sd.newest_checkpoint
def newest_checkpoint(checkpoints, args):
    """The newest of `checkpoints` that is whole, and its record. Raises UserError if none is."""
    reasons = []
    for path in reversed(checkpoints):
        try:
            record = read_checkpoint(path, args)
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            logger.warning(f"{reason}: {path.name} is taken instead.")
        return path, record
    raise UserError(f"no checkpoint in {args.output_dir} is whole: {reasons[0]}; start anew in another --output_dir")


# Copied from train_sspo_sd.find_checkpoint
def find_checkpoint(args, settings):
    """
    The checkpoint to go on from and its record, or (None, None) for a new run.

    Raises:
        UserError: if the one that is asked for is not whole or belongs to a run with other settings, or if a new run
            would overwrite the results of an old one.
    """
    checkpoints = list_checkpoints(args.output_dir)
    if args.resume_from_checkpoint is None:
        if checkpoints or any(Path(args.output_dir, name).exists() for name in RESULTS):
            raise UserError(
                f"--output_dir {args.output_dir} holds the results of another run: go on with "
                "--resume_from_checkpoint latest, or choose another folder"
            )
        return None, None
    if args.resume_from_checkpoint == "latest":
        if not checkpoints:
            logger.info(f"{args.output_dir} has no checkpoint yet: this is a new run.")
            return None, None
        checkpoint, record = newest_checkpoint(checkpoints, args)
    else:
        checkpoint = Path(args.resume_from_checkpoint)
        if not checkpoint.is_dir():
            checkpoint = Path(args.output_dir, args.resume_from_checkpoint)
        try:
            record = read_checkpoint(checkpoint, args)
        except UserError as error:
            raise UserError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint} is not a complete checkpoint: {error}"
            ) from error
    check_settings(checkpoint, record, settings, args)
    return checkpoint, record


# Copied from train_sspo_sd.check_settings
def check_settings(checkpoint, record, settings, args):
    """Raises UserError if this checkpoint was made with others of these settings."""
    for name, value in settings.items():
        if name not in record["settings"]:  # of a version that did not have it
            logger.warning(f"{checkpoint} does not tell {name}: it is taken to have been {value}.")
        elif record["settings"][name] != value:
            flag = f"--{name}" if hasattr(args, name) else name
            raise UserError(
                f"{checkpoint} was made with {flag} {record['settings'][name]}, not {value}: go on with that, or "
                "start anew in another --output_dir"
            )


# Copied from train_sspo_sd.register_checkpoint_hooks
def register_checkpoint_hooks(accelerator, models, args):
    """Makes accelerate's save_state and load_state keep the policy only, in the format that diffusers reads."""

    def save(wrapped, weights, directory):
        weights.clear()  # so that accelerate does not write the frozen weights too
        if accelerator.is_main_process:
            save_denoiser(models.denoiser, args, directory)

    def load(wrapped, directory):
        wrapped.clear()
        load_denoiser(models.denoiser, args, directory)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


# Copied from train_sspo_sd.load_checkpoint
def load_checkpoint(accelerator, checkpoint):
    """
    Reads what save_checkpoint wrote. Pickles are read for their tensors alone: code in them is refused, not run.

    Raises:
        UserError: if that is not possible.
    """
    try:
        accelerator.load_state(checkpoint)
    except Exception as error:  # whatever torch, safetensors and diffusers say to damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint} cannot be loaded: {reason}; go on from another checkpoint") from error
    accelerator.step = 0  # it counts micro-batches, and the accumulation may have changed


# Copied from train_sspo_sd.save_checkpoint
@writing("a checkpoint")
def save_checkpoint(accelerator, args, record):
    """
    Writes checkpoint-N beside its place and renames it, then deletes those past --checkpoints_total_limit.

    Every process takes part: each keeps its own random state.
    """
    final = Path(args.output_dir, f"checkpoint-{record['step']}")
    partial = final.with_suffix(".partial")
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        (partial / "run.json").write_text(json.dumps({**record, "files": files}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        if args.checkpoints_total_limit is not None:
            for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                leftover = old.with_suffix(".partial")  # so that half of a checkpoint never passes for one
                os.replace(old, leftover)
                shutil.rmtree(leftover)
        logger.info(f"Saved {final}.")
    accelerator.wait_for_everyone()


# Copied from train_sspo_sd.StopSignal
class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save and stop; a second one stops at once."""

    def __init__(self, accelerator):
        self.number, self.accelerator = 0, accelerator

    def __enter__(self):
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        self.number = number
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """The number of the signal, or 0: the same on every process, also if only one of them got it."""
        number = torch.tensor(float(self.number), device=self.accelerator.device)
        return int(self.accelerator.gather(number).max())


# Copied from train_sspo_sd.MetricsFile
class MetricsFile:
    """metrics.jsonl: one object an update. On resume, what came after the checkpoint is taken out."""

    @writing("metrics.jsonl")
    def __init__(self, path, first_step):
        lines = []
        if first_step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= first_step:
                        lines.append(line)
                except ValueError:  # cut short by a crash
                    break
        self.path = path
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in lines))
        os.replace(partial, path)

    @writing("metrics.jsonl")
    def write(self, metrics):
        """Adds a line. What is not finite, as grad_norm where fp16 overflows, becomes null: JSON knows no infinity."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


# ------------------------------------------------------------------------------------------------------------------
# Validation and result
# ------------------------------------------------------------------------------------------------------------------


SAMPLES = "gif"  # the kind of file in samples/ that the model card shows
STRIP = 8  # frames of a clip in its strip, at most


@writing("samples")
def write_samples(rows, args, step, trackers):
    """
    Writes samples/step-N.gif and hands it to the trackers. `rows` are lists of what decode_latents gives.

    samples/step-N.png shows the same clips standing still: one a line, the lines of a prompt together.
    """
    grids = [
        make_image_grid([clip[i] for row in rows for clip in row], rows=len(rows), cols=len(rows[0]))
        for i in range(args.num_frames)
    ]
    path = Path(args.output_dir, "samples", f"step-{step}.gif")
    path.parent.mkdir(exist_ok=True)
    grids[0].save(path, save_all=True, append_images=grids[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)
    clips = [row[column] for column in range(len(rows[0])) for row in rows]
    every = math.ceil(args.num_frames / STRIP)
    strips = [clip[::every] for clip in clips]
    strip = make_image_grid(list(itertools.chain(*strips)), rows=len(strips), cols=len(strips[0]))
    strip.save(path.with_suffix(".png"))
    for tracker in trackers:
        if tracker.name == "tensorboard":  # its writer's add_video makes a GIF as well, but needs moviepy for it
            from tensorboard.compat.proto.summary_pb2 import Summary

            width, height = grids[0].size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
            summary = Summary(value=[Summary.Value(tag="samples", image=image)])
            tracker.tracker._get_file_writer().add_summary(summary, step)
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"samples": wandb.Video(str(path), format="gif")}, step=step)


# Copied from train_sspo_sd.Validation
class Validation:
    """
    samples/step-N: a column for each validation prompt, the untouched base's picture above the policy's.

    Made with the sampler, the steps and the guidance of the rivals and always from the same noise. To be built before
    a checkpoint is loaded: for that moment the policy is the base.
    """

    def __init__(self, models, empty_prompt, args, accelerator):
        self.models, self.args, self.accelerator = models, args, accelerator
        count = len(args.validation_prompts)
        self.keys = [(prompt, image) for image in range(args.num_validation_images) for prompt in range(count)]
        if accelerator.is_main_process:
            prompts, shape = encode_prompt(models, args.validation_prompts), latent_shape(models, args)
            self.noise = keyed_noise("validation", args.seed, self.keys, shape)
            self.prompts = [prompts[prompt] for prompt, _ in self.keys]
            self.empty_prompt = empty_prompt
            self.base = self.sample()

    @torch.no_grad()
    def sample(self):
        """One picture for each of `keys`, all prompts in order, then all again for the next image."""
        models, args, device = self.models, self.args, self.accelerator.device
        pictures, home = [], models.vae.device
        models.vae.to(device)  # it may rest on the CPU, if the winners' latents are cached
        for start in range(0, len(self.keys), args.rollout_batch_size):
            piece = slice(start, start + args.rollout_batch_size)
            prompts = self.prompts[piece]
            geometries = [whole_picture(args)] * len(prompts)
            with self.accelerator.autocast():
                latents = self_sample(
                    models.denoiser,
                    rollout_scheduler(models, args),
                    self.noise[piece].to(device),
                    collate_condition(prompts, geometries, device),
                    collate_condition([self.empty_prompt] * len(prompts), geometries, device),
                    args.rollout_steps,
                    args.rollout_guidance_scale,
                )
            pictures += [decode_latents(models, latents[i : i + 1]) for i in range(len(prompts))]
        models.vae.to(home)
        return pictures

    def due(self, step):
        """Whether samples are to be made after update `step`."""
        return step % self.args.validation_steps == 0 or step == self.args.max_train_steps

    def write(self, step):
        if self.accelerator.is_main_process:
            columns, current = len(self.args.validation_prompts), self.sample()
            rows = [p[i : i + columns] for i in range(0, len(current), columns) for p in (self.base, current)]
            write_samples(rows, self.args, step, self.accelerator.trackers)
        self.accelerator.wait_for_everyone()


def usage(args):
    """The lines of Python that load the result, for the model card."""
    name = args.hub_model_id or Path(args.output_dir).name
    lora = args.train_mode == "lora"
    adapter = args.motion_adapter_name_or_path if lora else name
    schedule = NOISE_SCHEDULE | ({"prediction_type": args.prediction_type} if args.prediction_type else {})
    schedule = ", ".join(f"{key}={value!r}" for key, value in schedule.items())
    lines = [
        "from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter",
        f'adapter = MotionAdapter.from_pretrained("{adapter}")',
        "pipeline = AnimateDiffPipeline.from_pretrained(",
        f'    "{args.pretrained_model_name_or_path}", motion_adapter=adapter',
        ")",
        f"pipeline.scheduler = DDIMScheduler({schedule})",
    ]
    return "\n".join([*lines, f'pipeline.load_lora_weights("{name}")'] if lora else lines)


# Copied from train_sspo_sd.write_model_card
@writing("the model card")
def write_model_card(args, step, directory):
    """README.md: what this model is, the command that made it, and its last samples."""
    lora = args.train_mode == "lora"
    local = Path(args.pretrained_model_name_or_path).exists()  # the hub takes names of repositories only
    data = ModelCardData(
        library_name="diffusers",
        base_model=None if local else args.pretrained_model_name_or_path,
        tags=[*TAGS, args.loss_type, *(["lora"] if lora else [])],
    )
    name = "SSPO (Self-Sampling Preference Optimization, arXiv 2410.05255)"
    method = name if args.loss_type == "sspo" else "supervised fine-tuning, the baseline of " + name
    picture = f"samples/step-{step}.{SAMPLES}"
    samples = (
        f"Above the base, below this model, from the same seeds: {'; '.join(args.validation_prompts)}.\n\n"
        f"![samples]({picture})"
        if args.validation_prompts and Path(args.output_dir, picture).exists()
        else "No validation prompts were given."
    )
    text = f"""---
{data.to_yaml()}
---
# {Path(args.output_dir).resolve().name}

{args.pretrained_model_name_or_path}, aligned in {step} updates by {method}, train mode {args.train_mode}.

```python
{usage(args)}
```

## Samples
{samples}

## Command
```bash
{shlex.join(["accelerate", "launch", Path(sys.argv[0]).name, *sys.argv[1:]])}
```
"""
    ModelCard(text).save(Path(directory, "README.md"))


# Copied from train_sspo_sd.write_result
@writing("the result")
def write_result(models, args, step):
    """
    Puts the result and its model card into output_dir, in place of those that are there.

    They are written beside their place and then moved, last of all what a loader knows the result by (RESULTS): so
    neither half of it nor a mixture of two ever passes for one.
    """
    partial = Path(args.output_dir, "result.partial")
    save_result(models, args, partial)
    write_model_card(args, step, partial)
    for name in RESULTS:
        Path(args.output_dir, name).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name in RESULTS):
        place = Path(args.output_dir, path.name)
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(path, place)
    partial.rmdir()


# Copied from train_sspo_sd.hide_token
def hide_token(argv):
    """Takes the hub's token out of a command line, in place: model card and trackers write sys.argv down."""
    for i, word in enumerate(argv):
        if word.startswith("--hub_token"):
            argv[i : i + 1 if "=" in word else i + 2] = ["--hub_token=..."]


# Copied from train_sspo_sd.push_to_hub
def push_to_hub(args):
    """Uploads the result. Raises UserError if the hub does not take it."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        repository = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        upload_folder(
            repo_id=repository,
            folder_path=args.output_dir,
            commit_message="SSPO training",
            ignore_patterns=["checkpoint-*", "replay/*", "cache/*", f"{args.logging_dir}/*"],
            token=args.hub_token,
        )
    except Exception as error:  # of the hub, of the network below it, of the token
        reason = " ".join(str(error).split())[:300]
        if args.hub_token:
            reason = reason.replace(args.hub_token, "...")
        raise UserError(f"the result is in {args.output_dir}, but the hub did not take it: {reason}") from None


# ------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.make_accelerator
def make_accelerator(args):
    """Accelerate and the loggers. Raises UserError where the machine is not what accelerate was configured for."""
    logs = str(Path(args.output_dir, args.logging_dir))
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, logging_dir=logs),
            step_scheduler_with_optimizer=False,  # else a schedule would run faster on more processes
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(hours=3)),  # the others wait for validation
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else gradients are kept twice
            ],
        )
    except ValueError as error:
        raise UserError(f"accelerate cannot start: {' '.join(str(error).split())}") from error
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}, with which the replay bank was never "
            "run: configure data parallel (MULTI_GPU); --use_8bit_adam and --optimizer adafactor save memory"
        )
    logging.basicConfig(format="%(asctime)s - %(name)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    for library in (datasets, transformers, diffusers):
        if accelerator.is_local_main_process:
            library.utils.logging.set_verbosity_warning()
        else:
            library.utils.logging.set_verbosity_error()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


# Copied from train_sspo_sd.check_shared
def check_shared(args, accelerator):
    """
    Raises UserError, on every process, unless all see the same --output_dir: the bank, the latent cache and the
    checkpoints are written by some processes and read by others.
    """
    (token,) = broadcast_object_list([uuid.uuid4().hex])
    probe = Path(args.output_dir, f".shared-{token}")
    if accelerator.is_main_process:
        probe.touch()
    accelerator.wait_for_everyone()
    seen = accelerator.reduce(torch.tensor(float(probe.exists()), device=accelerator.device), "sum").item()
    if accelerator.is_main_process:
        probe.unlink()
    if seen < accelerator.num_processes:
        raise UserError(
            f"--output_dir {args.output_dir} is not the same folder for all processes: name one on a disk that all "
            "machines share"
        )


# Copied from train_sspo_sd.make_optimizer
def make_optimizer(parameters, args, global_batch):
    """The optimizer and its schedule, which is stepped once an update."""
    rate = args.learning_rate * (global_batch if args.scale_lr else 1)
    if args.optimizer == "adafactor":
        optimizer = transformers.Adafactor(
            parameters, lr=rate, weight_decay=args.adam_weight_decay, scale_parameter=False, relative_step=False
        )
    else:
        if args.use_8bit_adam:
            import bitsandbytes

            adamw = bitsandbytes.optim.AdamW8bit
        else:
            adamw = torch.optim.AdamW
        optimizer = adamw(
            parameters,
            lr=rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    return optimizer, schedule


# Copied from train_sspo_sd.sample_rivals
def sample_rivals(models, batch, args, autocast):
    """The rivals of one batch of winners, (b, ...) latents, from the reference."""
    noise = keyed_noise("rival", args.seed, batch["keys"], batch["winner"].shape[1:]).to(batch["winner"].device)
    with as_reference(models, args) as reference, autocast():
        return self_sample(
            reference,
            rollout_scheduler(models, args),
            noise,
            batch["condition"],
            batch["unconditional"],
            args.rollout_steps,
            args.rollout_guidance_scale,
            batch["winner"],
            args.rollout_strength,
        )


# Copied from train_sspo_sd.micro_batches
def micro_batches(batch, size):
    """Cuts a batch, as `collate` makes it, into pieces of `size` examples."""
    for start in range(0, len(batch["keys"]), size):
        piece = slice(start, start + size)
        yield {
            name: {k: v[piece] for k, v in value.items()} if isinstance(value, dict) else value[piece]
            for name, value in batch.items()
        }


# Copied from train_sspo_sd.update
def update(policy, models, optimizer, schedule, loader, empty_prompt, args, accelerator, x=None):
    """
    One update of the policy: self-sample, errors, switch, loss, step.

    Args:
        x: what decides the switch for all examples, if not each one's own errors (see sspo_loss).
    Returns:
        metrics, a dict of means over the global batch, and the data cursor behind it.
    Raises:
        FloatingPointError: if the loss or the gradient is not finite; the policy is left as it was.
    """
    device, autocast = accelerator.device, accelerator.autocast
    totals, rollout_time, started = {}, 0.0, time.perf_counter()
    group = args.rollout_batch_size // args.train_batch_size  # micro-batches whose rivals are sampled at once
    for first in range(0, args.gradient_accumulation_steps, group):
        examples = []
        for _ in range(min(group, args.gradient_accumulation_steps - first)):
            loaded, cursor = next(loader)
            if "pixels" in loaded[0]:
                encode_examples(models, loaded)
            examples += loaded
        batch = collate(examples, empty_prompt, args, device)
        if args.loss_type == "sspo":
            rollout_started = time.perf_counter()
            batch["rival"] = sample_rivals(models, batch, args, autocast)
            if device.type == "cuda":
                torch.cuda.synchronize()  # once a rollout, or its time would be booked on the update
            rollout_time += time.perf_counter() - rollout_started
        for micro_batch in micro_batches(batch, args.train_batch_size):
            with accelerator.accumulate(policy):
                loss, metrics = training_loss(policy, models, micro_batch, args, autocast, x)
                accelerator.backward(loss)
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    totals[name] = totals.get(name, 0) + value / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
                    metrics = dict(zip(totals, accelerator.reduce(torch.stack([*totals.values()]), "mean").tolist()))
                    metrics["lr"], metrics["grad_norm"] = schedule.get_last_lr()[0], float(grad_norm)
                    check_finite(metrics, accelerator)
                optimizer.step()
                optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:
        schedule.step()
    metrics["time/rollout"], metrics["time/update"] = rollout_time, time.perf_counter() - started
    return metrics, cursor


# Copied from train_sspo_sd.check_finite
def check_finite(metrics, accelerator):
    """Raises FloatingPointError before a bad step is taken. In fp16 an overflow is normal: the scaler skips it."""
    rescued = accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1
    if math.isfinite(metrics["loss"]) and (math.isfinite(metrics["grad_norm"]) or rescued):
        return
    told = ("loss", "grad_norm", "gap/winner", "gap/rival")
    raise FloatingPointError(", ".join(f"{name} {metrics[name]:.4g}" for name in told if name in metrics))


# Copied from train_sspo_sd.not_finite
def not_finite(step, error, args):
    """What check_finite's error says when it stops the run."""
    good = list_checkpoints(args.output_dir)
    return UserError(
        f"update {step} is not finite ({error}); the last good checkpoint is {good[-1] if good else 'none'}, to go on "
        "from if a fault of the machine was the cause; if not, start anew in another --output_dir with a lower "
        "--learning_rate or --beta_dpo"
    )


# Copied from train_sspo_sd.train
def train(policy, models, optimizer, schedule, loader, bank, validation, empty_prompt, record, args, accelerator):
    """The loop over updates, from record["step"] on. Returns the number of the signal that stopped it, or 0."""
    step, loaded_reference, sspo = record["step"], None, args.loss_type == "sspo"
    saved = step
    if accelerator.is_main_process:
        for leftover in Path(args.output_dir).glob("*.partial"):  # of a run that was killed
            if leftover.is_dir():
                shutil.rmtree(leftover)
        metrics_file = MetricsFile(Path(args.output_dir, "metrics.jsonl"), step)
        if sspo and step == 0:
            bank.push(0, policy_weights(models, args))
    accelerator.wait_for_everyone()
    if validation is not None and step > 0 and validation.due(step):
        validation.write(step)  # again: the run may have been killed while it made these samples

    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="updates", disable=not accelerator.is_local_main_process
    )
    with StopSignal(accelerator) as stop, progress:
        while step < args.max_train_steps and not stop.agreed():
            iteration = step // args.replay_steps + 1
            if sspo and bank.draw(iteration) != loaded_reference:
                loaded_reference = bank.draw(iteration)
                load_reference(models, bank.load(loaded_reference), args)

            # Only its sign counts: the sum tells what the mean would. 0 as an iteration starts: no evidence yet.
            x = record["x"] if args.ssr_scope == "iteration" else None
            try:
                metrics, cursor = update(
                    policy, models, optimizer, schedule, loader, empty_prompt, args, accelerator, x
                )
            except FloatingPointError as error:
                raise not_finite(step + 1, error, args) from error
            step += 1
            record.update(step=step, cursor=cursor)
            if sspo:
                record["x"] = 0.0 if step % args.replay_steps == 0 else record["x"] - metrics["gap/winner"]
                metrics["reference/index"] = loaded_reference
            if args.on_bad_example == "skip":
                metrics["data/skipped"] = loader.name_skipped()
            if accelerator.is_main_process:
                metrics_file.write({"step": step, **metrics})
            with writing("the tracker's log"):
                accelerator.log(metrics, step=step)
            progress.update()
            shown = {"loss": "loss", "dpo": "dpo_fraction", "gap_w": "gap/winner", "gap_r": "gap/rival"}
            progress.set_postfix({k: f"{metrics[v]:.3g}" for k, v in shown.items() if v in metrics})

            pushing = sspo and step % args.replay_steps == 0
            if pushing:
                if accelerator.is_main_process:
                    bank.push(iteration, policy_weights(models, args))
                accelerator.wait_for_everyone()
            if step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, args, record)
                saved = step
            if pushing and accelerator.is_main_process:
                steps = (step, *map(checkpoint_step, list_checkpoints(args.output_dir)))
                bank.evict([made // args.replay_steps + 1 for made in steps])
            if validation is not None and validation.due(step) and not stop.agreed():
                validation.write(step)
        signalled = stop.agreed()
        if signalled and saved != step:
            save_checkpoint(accelerator, args, record)
        return signalled


# Copied from train_sspo_sd.main
def main(args):
    hide_token(sys.argv)
    check_environment(args)
    accelerator = make_accelerator(args)
    check_shared(args, accelerator)
    winners = Winners(args)
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(winners) / global_batch)
    settings = run_settings(args, accelerator, winners)
    checkpoint, record = find_checkpoint(args, settings)
    accelerator.wait_for_everyone()

    set_seed(args.seed)  # for the adapters' first weights; every other draw is keyed
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    models = load_models(args, dtype)
    base = {"base weights": fingerprint([*models.encoders, models.denoiser])}
    if checkpoint is not None:
        check_settings(checkpoint, record, base, args)
    record = {"step": 0, "cursor": (0, 0), "x": 0.0, **(record or {}), "settings": {**settings, **base}}
    for module in models.encoders:
        module.to(accelerator.device)
    prepare_denoisers(models, args, accelerator.device)
    trained = [parameter for parameter in models.denoiser.parameters() if parameter.requires_grad]
    optimizer, schedule = make_optimizer(trained, args, global_batch)
    policy, optimizer, schedule = accelerator.prepare(models.denoiser, optimizer, schedule)
    register_checkpoint_hooks(accelerator, models, args)

    empty_prompt = encode_prompt(models, [""])[0]
    validation = Validation(models, empty_prompt, args, accelerator) if args.validation_prompts else None
    load = winners.load
    if args.cache_latents:
        cache = LatentCache(cache_directory(args, winners, dtype), args)
        cache.fill(models, winners, accelerator)
        load = cache.load
        for module in models.encoders:
            module.to("cpu")
    bank = ReplayBank(replay_directory(args), args.replay_size, args.reference, args.seed)
    loader = Loader(winners, load, args, accelerator, tuple(record["cursor"]))
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
    if accelerator.is_main_process and args.report_to != "none":
        config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
        config.pop("hub_token")
        with writing("the tracker's log"):
            accelerator.init_trackers(args.tracker_project_name, config=config)

    count = "a stream of" if args.streaming else len(winners)
    ties = f" ({winners.ties} ties dropped)" if winners.ties else ""
    logger.info(f"{count} winners{ties}; {args.max_train_steps} updates of {global_batch} pairs.")
    if checkpoint is not None:
        logger.info(f"Going on from {checkpoint}.")
    stopped = train(
        policy, models, optimizer, schedule, loader, bank, validation, empty_prompt, record, args, accelerator
    )
    if stopped:
        logger.info(f"Stopped by a signal; --resume_from_checkpoint latest goes on from update {record['step']}.")
    elif accelerator.is_main_process:
        write_result(models, args, record["step"])
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.wait_for_everyone()
    # The wrapped policy must not outlive the process group: gloo's threads and Python would wait for each other.
    policy, optimizer, schedule = accelerator.free_memory(policy, optimizer, schedule)
    with writing("the tracker's log"):
        accelerator.end_training()
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    except KeyboardInterrupt:  # before there is anything to save, or the second one
        sys.exit(128 + signal.SIGINT)
