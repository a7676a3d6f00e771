#!/usr/bin/env python
# Copyright 2026 The SSPO training authors. Licensed under the Apache License, Version 2.0.
#
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.6",
#     "diffusers>=0.42,<0.43",
#     "transformers>=5.3,<6",
#     "accelerate>=1.15,<2",
#     "datasets>=5.2,<6",
#     "peft>=0.21,<0.22",
#     "bitsandbytes>=0.50.2,<0.51",
#     "tensorboard>=2.20,<3",
#     "av>=15,<19",
# ]
# ///
"""
Self-Sampling Preference Optimization (SSPO, arXiv 2410.05255) for text-to-video with Wan 2.1 and Wan 2.2 5B.

Aligns a text-to-video model with winning clips and their captions alone: no losers, no pairs, no reward model.
The losing half of each pair, the *rival*, is sampled from the model's own past. One update, for each winner z_w:

  1. Replay.       Every --replay_steps updates the policy's weights are pushed to the replay bank and an iteration
                   ends. The next one draws its reference uniformly from the bank (theta_0 is the untouched base).
  2. Self-sample.  The rival z_r = sample(reference, caption). It stays a latent.
  3. Errors.       One (t, noise) for both halves. e_w, e_r: mean squared velocity errors of winner and rival under
                   the policy and under the reference, and gap = e(policy) - e(reference).
  4. Switch.       x = e_w(reference) - e_w(policy). If x < 0 the reference predicts the winner better than the policy
                   does, and its sample is taken for a winner, not a loser: s = -1 (--ssr sign) or 0 (indicator).
                   Otherwise, and always with --ssr none, s = +1.
  5. Loss.         L = -log sigmoid( -beta/2 * [ gap_w - s * gap_r ] ), averaged over the examples.

The same numbers mark the functions below and the loop in `main`, at the end. At the first update policy and reference
are the same, so L = ln 2 exactly. It often stays near ln 2, and no curve tells good runs from bad ones reliably: look
at the samples. Loss and replay default to the paper's first version (docs/method.md). In our studies (examples/study)
--ssr none --rival_weight 0.3 --draws_per_pair 4, as below, did better, and nothing was shown to beat --loss_type sft.

What differs from train_sspo_sd.py: the model is a transformer that predicts a flow's velocity, noise - latents, at
(1 - sigma) * latents + sigma * noise, with t = 1000 sigma. --help says what this means for --beta_dpo and
--rollout_strength. The VAE turns 4k + 1 frames into k + 1; latents are (c, k + 1, h, w), normalised to mean 0 and
variance 1 per channel by the VAE's own statistics, and the VAE runs in fp32. Winners are decoded by PyAV in the data
loader, at the model's frame rate. A prompt is at most 512 tokens of 4096 numbers: --cache_latents stores only the
tokens that a caption has, and the text encoder (10.6 GiB in bf16) leaves the accelerator before the transformer is
moved there. Image-to-video models and Wan 2.2 A14B, which has two transformers, are refused.

If winners are real clips, watch implicit_accuracy: in arXiv 2506.03517 (appendix C.4) DPO of real videos against
samples brought it near 1 within 500 steps, and no better model. --rollout_strength makes rivals more like winners;
whether that helps is not known.

    accelerate launch train_sspo_wan.py \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --train_data_dir path/to/clips --ssr none --rival_weight 0.3 --draws_per_pair 4 \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing \
        --train_batch_size 1 --gradient_accumulation_steps 16 --rollout_batch_size 1 \
        --learning_rate 1e-4 --validation_prompts "a rose opens, time-lapse" --output_dir sspo-wan
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path


# Set before the imports, to silence notices about image processors and 4-bit kernels, which are not used here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

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
    DistributedType,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from datasets.utils.file_utils import xopen
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import (
    convert_state_dict_to_kohya,
    make_image_grid,
)
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import T5TokenizerFast, UMT5EncoderModel


logger = get_logger(Path(__file__).stem)

# The LoRA adapter's name. It has to be "default": diffusers looks up rank and alpha under that name when saving.
POLICY = "default"


# Copied from train_sspo_sd.UserError
class UserError(Exception):
    """Something the user can fix. Its message is one line: what is wrong, and what to do about it."""


# Copied from train_sspo_sd.BadExample
class BadExample(UserError):
    """A winner that cannot be used: a picture that cannot be read, a caption that is no text."""


# Copied from train_sspo_sd.one_line
def one_line(error):
    return " ".join(str(error).split())[:300]


# Copied from train_sspo_sd.keyed_generator
def keyed_generator(*key):
    """
    A CPU generator whose seed is a hash of `key` (strings and integers).

    Every random draw of a run comes from such a generator, keyed by what it belongs to. So a run depends neither on
    the order of work nor on how a batch is split over processes, and a resumed run needs no saved random state.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


# Copied from train_sspo_sd.keyed_noise
def keyed_noise(purpose, seed, keys, shape):
    """Standard normal noise, (len(keys), *shape) in fp32: row i depends on purpose, seed and keys[i] only."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(purpose, seed, *key)) for key in keys])


# ------------------------------------------------------------------------------------------------------------------
# The method: replay, self-sampling, errors, switch, loss
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.ReplayBank
class ReplayBank:
    """
    1. Replay (random checkpoint replay). The policy's past, on disk.

    `iteration-0` is the base, `iteration-k` the policy at the end of iteration k. An iteration draws from at most
    `size` of them: the base and the newest. Which one follows from its number and the seed, on every process alike.

    Args:
        directory: where the entries are, as safetensors.
        size: entries to draw from, the base included.
        reference: random (uniform over the entries: SSPO), latest (as SPIN-Diffusion) or initial (DITTO-like).
        seed: of the draws.
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
        """The entry that is the reference of `iteration`."""
        live = self.live(iteration)
        uniform = torch.randint(len(live), (), generator=keyed_generator("reference", self.seed, iteration)).item()
        return live[{"random": uniform, "latest": -1, "initial": 0}[self.reference]]

    def push(self, index, weights):
        shutil.rmtree(self.path(index).with_suffix(""), ignore_errors=True)  # rivals of an entry that this replaces
        write_tensors(self.path(index), weights)

    def load(self, index):
        """Entry `index`, a dict of CPU tensors. Raises UserError if it is missing or damaged."""
        try:
            return load_file(self.path(index))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path(index)} is missing or damaged: {one_line(error)}") from error

    def evict(self, iterations):
        """Deletes what none of `iterations` (the next one, and those that checkpoints resume in) can draw from."""
        needed = {self.path(index) for iteration in iterations for index in self.live(iteration)}
        for path in set(self.directory.glob("iteration-*.safetensors")) - needed:
            path.unlink()
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # its rivals, where they were kept


# Copied from train_sspo_sd.as_reference
@contextmanager
def as_reference(models):
    """
    Yields the denoiser with the reference's weights, without gradients.

    There is only one denoiser. Inside this context it holds the reference's weights: policy and reference swap
    pointers, nothing is copied. Where the reference is the base of a LoRA run, the adapter is switched off instead:
    same bits, and faster. Never enter it between the policy's forward and backward: the reference always goes first.
    """

    def swap(adapter_on):
        if models.reference:
            for parameter, weight in models.reference.items():
                parameter.data, models.reference[parameter] = weight, parameter.data
        else:
            for layer in models.adapted_layers:  # denoiser.disable_adapters would look for them in all of the model
                layer.enable_adapters(adapter_on)

    swap(adapter_on=False)
    try:
        with torch.no_grad():
            yield models.denoiser
    finally:
        swap(adapter_on=True)


# Copied from train_sspo_sd.self_sample
@torch.no_grad()
def self_sample(
    denoiser, scheduler, noise, condition, unconditional, steps, guidance_scale, winners=None, strength=1.0
):
    """
    2. Self-sample. Samples as the stock pipeline does, but returns latents in training space: nothing is decoded.

    Args:
        denoiser: with the weights to sample from (the reference's; for validation, the policy's).
        scheduler: a diffusers scheduler of the model's noise schedule.
        noise: (b, ...) standard normal, in the precision that latents have between two steps.
        condition, unconditional: batches of conditions of length b; the second is for guidance.
        steps, guidance_scale: as in the pipeline; a guidance of 1 or less means none.
        winners, strength: with strength < 1, start from the winners' latents noised to that strength, as
            image-to-image does, and take only the steps from there on.
    Returns:
        (b, ...) latents, fp32.
    """
    guided = guidance_scale > 1
    both = join(unconditional, condition) if guided else condition
    scheduler.set_timesteps(steps)  # these stay on the CPU: reading one from the GPU would be a CPU-GPU sync
    timesteps, latents = scheduler.timesteps, noise * scheduler.init_noise_sigma
    if strength < 1:
        timesteps = timesteps[-int(steps * strength) * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))  # else step() would search for it
    if strength < 1:
        latents = scheduler.add_noise(winners.to(noise.dtype), noise, timesteps[:1].expand(len(noise)))
    for timestep, on_device in zip(timesteps, timesteps.to(noise.device)):
        noisy = torch.cat([latents, latents]) if guided else latents
        noisy = scheduler.scale_model_input(noisy, timestep)
        prediction = predict(denoiser, noisy, on_device.expand(len(noisy)), both)
        if guided:
            without, with_caption = prediction.chunk(2)
            prediction = without + guidance_scale * (with_caption - without)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents.float()


# Copied from train_sspo_sd.join
def join(*conditions):
    """Batches of conditions, one after the other."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


# Copied from train_sspo_sd.sample_rivals
def sample_rivals(models, batch, args, autocast):
    """2. Self-sample: the rivals of one batch of winners (see collate), (b, ...) latents, fp32."""
    winners = batch["winner"]
    noise = keyed_noise("rival", args.seed, batch["keys"], winners.shape[1:])
    noise = noise.to(winners.device, rollout_dtype(models, args))
    settings = dict(steps=args.rollout_steps, guidance_scale=args.rollout_guidance_scale)
    settings |= dict(winners=winners, strength=args.rollout_strength)
    with as_reference(models) as reference, stock_precision(models, autocast):
        scheduler = rollout_scheduler(models, args)
        return self_sample(reference, scheduler, noise, batch["condition"], batch["unconditional"], **settings)


# Copied from train_sspo_sd.denoising_errors
def denoising_errors(denoiser, models, latents, noise, timesteps, condition):
    """
    3. Errors. Mean squared error of the prediction over all but the batch dimension, in fp32.

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
    condition = {name: value.repeat_interleave(draws, dim=0) for name, value in condition.items()}
    noisy = add_noise(models, latents, noise, flat_timesteps)
    prediction = predict(denoiser, noisy, flat_timesteps, condition)
    target = denoising_target(models, latents, noise, flat_timesteps)
    return (prediction - target.float()).square().flatten(1).mean(1).view(-1, draws)


# Copied from train_sspo_sd.pair_errors
def pair_errors(denoiser, models, batch, noise, timesteps, split):
    """
    3. Errors of winners and rivals, (b, draws) each: the same (t, noise) and caption for both halves of a pair.

    With `split` winners and rivals go through the model one after the other, and the backward recomputes the winners'
    activations after it has freed the rivals': half the memory.
    """
    winner, rival, condition = batch["winner"], batch["rival"], batch["condition"]
    if not split:
        latents, noise, timesteps = torch.cat([winner, rival]), torch.cat([noise] * 2), torch.cat([timesteps] * 2)
        return denoising_errors(denoiser, models, latents, noise, timesteps, join(condition, condition)).chunk(2)
    winner_errors = torch.utils.checkpoint.checkpoint(
        denoising_errors,
        *(denoiser, models, winner, noise, timesteps, condition),
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
    unpaired=False,
):
    """
    4. Switch and 5. loss: -log sigmoid(-beta/2 * [gap_w - s * gap_r]), averaged over examples and draws.

    gap_w = policy_winner - reference_winner, gap_r = policy_rival - reference_rival. The switch s is +1 where
    x = -gap_w >= 0 (a tie, as at the first update, is no evidence that the rival is a winner) and otherwise -1 for
    `sign`, 0 for `indicator`, +1 for `none` (arXiv 2410.05255, self-sampling regularization). The factor 1/2 on beta
    is that of Diffusion-DPO (arXiv 2311.12908). With draws, x is their mean and s is one decision for the pair.

    `unpaired` gives each half a term of its own: -log sigmoid(-beta/2 * gap_w) - w * log sigmoid(s * beta/2 * gap_r)
    with w = rival_weight, the second dropped where s = 0; with s = +1 it has the form of DDO's loss (arXiv
    2503.01103). In the paired loss one sigmoid weights the gradients of both halves. It vanishes where the rival's gap
    is large, even if the winner has got worse by then. Here such a winner is still learned, and a rival that is far
    away is no longer pushed. At the first update both forms have the same gradient; this loss is (1 + w) ln 2.

    Args:
        policy_winner, policy_rival, reference_winner, reference_rival: denoising errors (see denoising_errors), fp32,
            each (batch,) or (batch, draws). Only the policy's carry gradients.
        beta: the strength of the pull to the reference.
        ssr: sign, indicator or none.
        rival_weight: factor on s * gap_r, or on the rival's term; 1 in the paper.
        sft_weight: adds sft_weight * policy_winner; 0 in the paper.
        unpaired: whether each half has its own log-sigmoid.
    Returns:
        the scalar loss, and a dict of detached scalars: dpo_fraction (share of examples with s = +1),
        implicit_accuracy (share of draws with gap_w < gap_r; a tie counts one half), the policy's errors and the gaps.
    """
    gap_winner = policy_winner - reference_winner
    gap_rival = policy_rival - reference_rival

    # 4. The switch.
    x = -gap_winner.detach()
    if x.ndim == 2:
        x = x.mean(dim=1, keepdim=True)
    s = torch.where(x >= 0, 1.0, {"sign": -1.0, "indicator": 0.0, "none": 1.0}[ssr]).to(x.dtype)

    # 5. The loss.
    if unpaired:
        loss = -F.logsigmoid(-beta / 2 * gap_winner) - rival_weight * s.abs() * F.logsigmoid(s * beta / 2 * gap_rival)
    else:
        loss = -F.logsigmoid(-beta / 2 * (gap_winner - s * rival_weight * gap_rival))
    loss = (loss + sft_weight * policy_winner).mean()

    ranking = (gap_rival - gap_winner).detach().sign()  # 1 where the winner's gap is lower, -1 where not, 0 a tie
    metrics = {
        "dpo_fraction": (s == 1).float().mean(),
        "implicit_accuracy": (ranking + 1).mean() / 2,
        "mse/policy_winner": policy_winner.detach().mean(),
        "mse/policy_rival": policy_rival.detach().mean(),
        "gap/winner": gap_winner.detach().mean(),
        "gap/rival": gap_rival.detach().mean(),
    }
    return loss, metrics


# Copied from train_sspo_sd.training_loss
def training_loss(policy, models, batch, args, autocast):
    """
    3. to 5. for one micro-batch (see collate; `rival` holds the rivals' latents): its loss, with its metrics.

    Policy and reference run under the same autocast: where they are equal, both gaps are exactly 0. --loss_type sft is
    the plain denoising loss on the winners.
    """
    winner, keys = batch["winner"], batch["keys"]
    noise = keyed_noise("noise", args.seed, keys, (args.draws_per_pair, *winner.shape[1:])).to(winner.device)
    timesteps = torch.stack(
        [draw_timesteps(models, keyed_generator("timestep", args.seed, *key), args.draws_per_pair) for key in keys]
    ).to(winner.device)

    if args.loss_type == "sft":
        with autocast():
            loss = denoising_errors(policy, models, winner, noise, timesteps, batch["condition"]).mean()
        return loss, {"mse/policy_winner": loss.detach()}

    with as_reference(models) as reference, autocast():
        reference_errors = pair_errors(reference, models, batch, noise, timesteps, args.split_pairs)
    with autocast():
        policy_errors = pair_errors(policy, models, batch, noise, timesteps, args.split_pairs)
    return sspo_loss(
        *policy_errors, *reference_errors, args.beta_dpo, args.ssr, args.rival_weight, args.sft_weight, args.unpaired
    )


# ------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.OneLineParser
class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and whose help shows no empty defaults."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            shown = action.default is not None and action.default is not False  # 0 is a default that is shown
            return super()._get_help_string(action) if shown else action.help

    def __init__(self, description):
        super().__init__(description=description, formatter_class=self.Formatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


# Copied from train_sspo_sd.number
def number(kind, least, most=math.inf, above=False):
    """An argparse type: a number of at least `least` (or `above` it) and at most `most`."""

    def convert(text):
        value = kind(text)
        if not (value > least if above else value >= least) or not value <= most:
            upper = f" and at most {most}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"must be {'more than' if above else 'at least'} {least}{upper}, not {text}"
            )
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


# fmt: off
# Copied from train_sspo_sd.add_shared_arguments
def add_shared_arguments(parser):
    """Adds the flags that every SSPO script has. Names are those of the other diffusers scripts where they exist."""
    natural, positive = number(int, 1), number(float, 0, above=True)
    not_negative, factor, share = number(int, 0), number(float, 0), number(float, 0, 1)

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub name or folder of the base model.")
    add("--revision", help="Branch, tag or commit of the base model on the hub.")
    add("--variant", help="Variant of the base model's files, such as fp16, where it has no others.")
    add("--cache_dir", help="Where downloaded models and data sets are kept.")

    add = parser.add_argument_group("winners").add_argument
    add("--dataset_name", help="Hub name or local path of a data set of winners.")
    add("--dataset_config_name", help="Configuration of the data set, if it has several.")
    add("--train_data_dir", help="Folder of winners, in any of the forms that the README lists.")
    add("--caption_column", help="Default: the first that exists of text, caption, txt, prompt.")
    add("--max_train_samples", type=natural, help="Use only the first N rows.")
    add("--streaming", action="store_true",
        help="Read the data set as it is needed, not all of it first. At most one loader process per rank.")
    add("--proportion_empty_prompts", type=share, default=0.0,
        help="Share of pairs whose caption is dropped, for the winner and the rival alike.")
    add("--dataloader_num_workers", type=not_negative, default=0, help="Loader processes per rank.")
    add("--on_bad_example", choices=["stop", "skip"], default="stop",
        help="What to do with a winner that cannot be read: stop, or skip it and name it in the log.")
    add("--cache_latents", action="store_true",
        help="Encode winners and captions once, to disk, and move the VAE and the text encoder off the accelerator. "
        "Each row then gets one crop, one flip and one of its captions for all epochs.")

    add = parser.add_argument_group("SSPO").add_argument
    add("--train_mode", choices=["lora", "full"], default="lora",
        help="lora: adapters on the attention layers. full: every trainable weight, as in the paper.")
    add("--loss_type", choices=["sspo", "sft"], default="sspo",
        help="sft is the baseline: the plain denoising loss on the winners, with no reference and no sampling.")
    add("--beta_dpo", type=positive, default=2000.0, help="Strength of the pull to the reference.")
    add("--ssr", choices=["sign", "indicator", "none"], default="sign",
        help="s where the reference predicts the winner better than the policy: -1 (sign: the rival is learned too), "
        "0 (indicator: only the winner is) or +1 (none: no switch).")
    add("--unpaired", action="store_true",
        help="Winner and rival each have a log-sigmoid of their own (see sspo_loss), so that the winner is still "
        "learned where the rival is far away. --beta_dpo has to be tuned with it.")
    add("--rival_weight", type=factor, default=1.0,
        help="Weight of the rival in the loss. Below 1 it is pushed away less than the winner is learned.")
    add("--sft_weight", type=factor, default=0.0,
        help="Adds this multiple of the winner's denoising error to the loss.")
    add("--draws_per_pair", type=natural, default=1,
        help="Draws of (timestep, noise) per pair and update, with timesteps spread over the schedule. The switch is "
        "decided by their mean. Activation memory grows in proportion.")
    add("--reference", choices=["random", "latest", "initial"], default="random",
        help="Which checkpoint of the bank an iteration takes. random is SSPO.")
    add("--replay_steps", type=natural, default=30, help="Updates in an iteration, between two pushes.")
    add("--replay_size", type=natural, default=8,
        help="Checkpoints in the bank, the base included. When it is full, the oldest but the base is dropped.")
    add("--rivals", choices=["self", "given"], default="self",
        help="self: sampled by the reference. given: the losers of the data's pairs, and nothing is sampled; with "
        "--reference initial --ssr none this is Diffusion-DPO.")
    add("--rivals_per_winner", type=natural,
        help="Sample at most this many rivals of a winner per reference, keep them on disk and reuse them. Saves most "
        "of the sampling when there are few winners. Needs --cache_latents. Default: no limit.")
    add("--rollout_steps", type=natural, default=20, help="Sampler steps of a rival, and of validation pictures.")
    add("--rollout_guidance_scale", type=float, default=1.0,
        help="Guidance of the rivals; 1 or less means none, which halves the cost and samples the reference's own "
        "distribution. The paper does not say how it samples.")
    add("--rollout_batch_size", type=natural,
        help="Rivals sampled at once, a multiple of --train_batch_size. Default: train_batch_size x "
        "gradient_accumulation_steps, at most 16.")
    add("--rollout_strength", type=number(float, 0, 1, above=True), default=1.0,
        help="Below 1 the rival starts from the winner noised to this strength, not from pure noise: closer rivals, "
        "fewer sampler steps.")
    add("--rank", type=natural, default=8, help="Rank of the LoRA adapters.")
    add("--lora_alpha", type=positive, help="The adapters are scaled by lora_alpha / rank. Default: the rank.")
    add("--lora_layers", help=f"Layers that get adapters, comma separated. Default: {LORA_LAYERS}.")

    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0,
        help="Every random draw follows from it, on any layout of hardware.")
    add("--train_batch_size", type=natural, default=4, help="Pairs per micro-batch and process.")
    add("--gradient_accumulation_steps", type=natural, default=1, help="Micro-batches in an update.")
    add("--max_train_steps", type=natural, help="Updates. Default: 210, the paper's seven iterations.")
    add("--num_train_epochs", type=natural, help="Passes over the winners, without --max_train_steps.")
    add("--gradient_checkpointing", action="store_true", help="Less memory for a slower backward.")
    add("--split_pairs", action="store_true",
        help="Run winners and rivals through the model one after the other: half the activation memory, for one more "
        "forward of the winners. Meant for LoRA: in full mode a second set of gradients has to be held.")
    add("--learning_rate", type=positive, default=1e-5, help="Peak learning rate.")
    add("--lr_scheduler", default="constant", help="Learning rate schedule.",
        choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
    add("--lr_warmup_steps", type=not_negative, default=0, help="Warm-up updates; not with --lr_scheduler constant.")
    add("--lr_num_cycles", type=natural, default=1, help="Cycles of cosine_with_restarts.")
    add("--optimizer", choices=["adamw", "adafactor"], default="adamw", help="Adafactor needs the least memory.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes.")
    add("--adam_beta1", type=share, default=0.9, help="AdamW's decay of the first moment.")
    add("--adam_beta2", type=share, default=0.999, help="AdamW's decay of the second moment.")
    add("--adam_weight_decay", type=factor, default=1e-2, help="Weight decay, Adafactor's too.")
    add("--adam_epsilon", type=factor, default=1e-8, help="AdamW's epsilon.")
    add("--max_grad_norm", type=positive, default=1.0, help="Gradients are clipped to this norm.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="Default: as accelerate is configured. Errors and loss are fp32 in any case.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="sspo-model", help="Where all that a run leaves is written.")
    add("--checkpointing_steps", type=natural, default=100, help="Updates between two checkpoints.")
    add("--checkpoints_total_limit", type=natural, help="Checkpoints kept. Default: all.")
    add("--resume_from_checkpoint",
        help='Folder of a checkpoint, or "latest". Later checkpoints in --output_dir are deleted: the run makes them '
        "again.")
    add("--validation_prompts", nargs="+", help="Captions of the pictures in samples/.")
    add("--validation_steps", type=natural, default=50, help="Updates between two sets of samples.")
    add("--num_validation_images", type=natural, default=1, help="Samples of each validation prompt.")
    add("--validation_guidance_scale", type=float, default=7.5, help="Guidance of the pictures in samples/.")
    add("--report_to", choices=["tensorboard", "wandb", "all", "none"], default="tensorboard", help="The tracker.")
    add("--tracker_project_name", default="sspo", help="Name of the project in the tracker.")
    add("--push_to_hub", action="store_true", help="Upload the result when the run ends.")
    add("--hub_model_id", help="Repository to push to. Default: the name of output_dir.")
# fmt: on


# Copied from train_sspo_sd.parse_args
def parse_args(argv=None):
    """Parses `argv` (default: the command line). Raises SystemExit(2) after one line on stderr for a wrong flag."""
    parser = OneLineParser(f"SSPO for {FAMILY}: alignment with winners alone.")
    add_shared_arguments(parser)
    add_pipeline_arguments(parser)
    args = parser.parse_args(argv)
    set_defaults(args)
    try:
        check_args(args)
    except UserError as error:
        parser.error(str(error))
    return args


# Copied from train_sspo_sd.set_defaults
def set_defaults(args):
    """Sets the defaults that depend on other flags."""
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 210
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.loss_type == "sft":
        args.rivals = "self"  # none are sampled, and given ones need not be read
    if args.rollout_batch_size is None:
        pairs = args.train_batch_size * args.gradient_accumulation_steps
        args.rollout_batch_size = max(min(pairs, 16) // args.train_batch_size, 1) * args.train_batch_size


# Copied from train_sspo_sd.check_args
def check_args(args):
    """Raises UserError for flags that do not go together. Needs no model and no data."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise UserError("name the winners with either --train_data_dir or --dataset_name")
    if args.rollout_batch_size % args.train_batch_size:
        raise UserError(
            f"--rollout_batch_size ({args.rollout_batch_size}) must be a multiple of --train_batch_size "
            f"({args.train_batch_size})"
        )
    if any(side % SIDE_MULTIPLE for side in picture_size(args)):
        raise UserError(f"height and width must be multiples of {SIDE_MULTIPLE}, not {picture_size(args)}")
    if int(args.rollout_steps * args.rollout_strength) < 1:
        raise UserError(
            f"--rollout_strength {args.rollout_strength} leaves none of {args.rollout_steps} sampler steps"
        )
    if args.rivals_per_winner is not None and (args.rivals != "self" or args.rollout_strength < 1):
        raise UserError(
            "--rivals_per_winner reuses rivals sampled from pure noise: drop it, or --rivals and --rollout_strength"
        )
    if args.rivals_per_winner is not None and not args.cache_latents:
        raise UserError("--rivals_per_winner needs --cache_latents: without it crops and captions change every epoch")
    if args.streaming and args.cache_latents:
        raise UserError("--cache_latents needs the whole data set: drop it, or --streaming")
    if args.streaming and args.max_train_steps is None:
        raise UserError("--streaming does not know how long an epoch is: give --max_train_steps")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise UserError("--lr_scheduler constant has no warm-up: give constant_with_warmup, or drop --lr_warmup_steps")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        raise UserError("--lr_scheduler polynomial ends at a rate of 1e-7: --learning_rate has to be higher")
    if max(args.adam_beta1, args.adam_beta2) == 1:
        raise UserError("--adam_beta1 and --adam_beta2 must be less than 1")
    if args.use_8bit_adam and args.optimizer != "adamw":
        raise UserError("--use_8bit_adam is a kind of adamw: drop it, or --optimizer adafactor")
    if args.train_mode == "full" and getattr(args, "output_kohya_format", False):  # not all pipelines have it
        raise UserError("--output_kohya_format is for LoRA weights: drop it, or --train_mode full")


# Copied from train_sspo_sd.check_environment
def check_environment(args):
    """Raises UserError where a package or a device that a flag needs is missing."""
    xformers = "--enable_xformers_memory_efficient_attention"
    for used, flag, package in (
        (args.use_8bit_adam, "--use_8bit_adam", "bitsandbytes"),
        (args.enable_xformers_memory_efficient_attention, xformers, "xformers"),
        (args.report_to in ("tensorboard", "wandb"), f"--report_to {args.report_to}", args.report_to),
    ):
        if used and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs {package}, which is missing: pip install {package}")
    if args.enable_xformers_memory_efficient_attention and not torch.cuda.is_available():
        raise UserError(f"{xformers} needs a CUDA device: drop it, PyTorch's own attention saves memory too")
    name = args.pretrained_model_name_or_path
    if Path(name).is_file():
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a file, and a folder in diffusers' layout is needed: a "
            "pipeline's from_single_file and save_pretrained make one"
        )
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a CUDA device: use no or bf16 here")
    if args.mixed_precision == "bf16" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            "--mixed_precision bf16 needs an Ampere card or a later one: use no, or fp16 if the script takes it"
        )


# ------------------------------------------------------------------------------------------------------------------
# The pipeline: all that another pipeline does differently
# ------------------------------------------------------------------------------------------------------------------

FAMILY = "Wan"
PIPELINE = WanPipeline
TAGS = ["diffusers", "text-to-video", "wan"]
MODALITY, COLUMNS = "video", ["video", "mp4", "webm", "mkv", "avi"]  # what the winners are, and where
PAIR_COLUMNS = ("video_0", "video_1")  # of a data set of pairs
SIDE_MULTIPLE = 16  # of the height and the width, in pixels: the VAE's 8, in patches of 2; Wan 2.2 5B has 16 for 8
# What a loader knows a result by.
RESULTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "model_index.json")
SAMPLES = "png"  # the kind of file in samples/ that the model card shows
# What cached rows depend on.
CACHE_KEY = "video_column caption_column rivals height width num_frames fps frame_stride center_crop random_flip seed"
CACHE_FILE = 8  # winners, or captions, in one file of the cache
LORA_LAYERS = "to_q,to_k,to_v,to_out.0"
PARTS = {"transformer": "WanTransformer3DModel", "text_encoder": "UMT5EncoderModel", "vae": "AutoencoderKLWan"}
TEXT_TOKENS = 512  # of a prompt, as WanPipeline pads it
STRIP, STRIP_SIDE = 8, 320  # frames of a clip in its strip, at most, and the longer side of each, in pixels
H264_SIDE = 16384  # of a video's frame, in pixels, at most


def add_pipeline_arguments(parser):
    """Adds the flags that scripts of other pipelines do not have, and sets defaults of this one."""
    add_clip_arguments(parser)
    add = parser.add_argument_group(
        "Wan",
        "The model predicts the velocity, noise - latents, at sigma = t / 1000 (0 is clean, 1 is noise), and errors "
        "are velocity errors: (1 - sigma)^-2 times the noise errors of Stable Diffusion at the same sigma. To which "
        "--beta_dpo its 2000 corresponds depends on what is to stay alike. To pull as hard at the median of the drawn "
        "sigmas, s / (1 + s) where s is --timestep_shift: 2000 / (1 + s)^2, so 500 at s = 1, 125 at 3, 56 at 5. To "
        "pull as hard over all that is drawn, by mean errors of an ideal model of Gaussian data: 430 at s = 1, 470 at "
        "3, 520 at 5. They part as s grows, and Flow-DPO (arXiv 2501.13918) speaks for the second: one beta for all "
        "sigmas did better than one that falls as (1 - sigma)^2. So start with the default. All this is computed; "
        "tried was only 500 at s = 1, on the small model of examples/quickstart. "
        "--rollout_strength is a share of the sampler's steps, not a sigma: with "
        "20 steps of UniPC, 0.7 starts at sigma 0.88, 0.5 at 0.75, 0.3 at 0.56 and 0.2 at 0.43 with a flow shift of "
        "3, and at 0.92, 0.83, 0.68 and 0.56 with one of 5. (Stable Diffusion's 0.7 is a sigma of 0.77.)",
    ).add_argument
    add(
        "--timestep_shift",
        type=number(float, 0, above=True),
        default=1.0,
        help="Shift s of the sigmas drawn in training: s u / (1 + (s - 1) u), u the sigmoid of a normal number. Their "
        "median is s / (1 + s); a larger s weights motion and layout over detail. What this means for --beta_dpo is "
        "said above.",
    )
    add(
        "--flow_shift",
        type=number(float, 0, above=True),
        help="Shift of the sampler's sigmas. Default: the model's own, 3 for Wan 2.1 and 5 for Wan 2.2 5B. Lower fits "
        "small clips, higher large ones.",
    )
    samplers = "The sampler of rivals and clips. Default: the model's own, with its settings."
    add("--rollout_scheduler", choices=["unipc", "euler"], help=samplers)
    negative = (
        "What guidance leads away from, of rivals and clips. A dropped caption does not become it. Default: nothing."
    )
    add("--negative_prompt", help=negative)
    kohya = "Also write the LoRA weights for ComfyUI, as pytorch_lora_weights_kohya.safetensors."
    parser.add_argument_group("other tools").add_argument("--output_kohya_format", action="store_true", help=kohya)
    for flag, reason in {
        "--prediction_type": "Wan predicts velocities",
        "--resolution": "clips have a --height and a --width",
        "--enable_xformers_memory_efficient_attention": "PyTorch's own attention saves memory too",
    }.items():
        parser.add_argument(flag, action=NotHere, nargs="*", const=reason, help=argparse.SUPPRESS)
    parser.set_defaults(beta_dpo=500.0, validation_guidance_scale=5.0)


def add_clip_arguments(parser):
    """Adds the flags that say what becomes of a file with a clip in it."""
    add = parser.add_argument_group("clips").add_argument
    add("--video_column", help="Default: the first that exists of video, mp4, webm, mkv, avi.")
    add(
        "--num_frames",
        type=clip_length,
        default=33,
        help="Frames of a clip, for training and for sampling: 4k + 1. The model's own are 81, of Wan 2.2 5B 121.",
    )
    add(
        "--fps",
        type=number(int, 1),
        help="The model's frame rate. Default: 16 for Wan 2.1, 24 for Wan 2.2 5B. Winners with another (average) rate "
        "are resampled to it by taking the nearest frames, from a random start, so that motion keeps its speed: every "
        "second frame of a 32 fps file, each frame twice of an 8 fps one. Clips in samples/ are written at this rate.",
    )
    add(
        "--frame_stride",
        type=number(int, 0),
        help="Instead of --fps: take every N-th frame, whatever the file's rate, which may speed motion up or slow it "
        "down. 0: as many frames as needed, spread over the whole clip. Default: by --fps.",
    )
    add("--height", type=number(int, 1), default=480, help="Height, in pixels: a multiple of 16, of Wan 2.2 5B 32.")
    add("--width", type=number(int, 1), default=832, help="Width, in pixels: a multiple of 16, of Wan 2.2 5B 32.")
    add("--center_crop", action="store_true", help="Crop the middle instead of a random place.")
    add("--random_flip", action="store_true", help="Mirror half of the clips.")


def clip_length(text):
    """An argparse type: a number of frames that the VAE takes, which makes one of the first and one of each 4 more."""
    frames = int(text)
    if frames < 1 or frames % 4 != 1:
        lower = max(frames - 1, 0) // 4 * 4 + 1
        raise argparse.ArgumentTypeError(f"must be 4k + 1, such as {lower} or {lower + 4}, not {text}")
    return frames


clip_length.__name__ = "int"  # argparse says "invalid int value"


# Copied from train_sspo_flux2.NotHere
class NotHere(argparse.Action):
    """A flag that the other scripts have and this one does not; `const` is the reason."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is not for {FAMILY}, {self.const}: drop it")


@dataclass
class Models:
    """
    The parts of the pipeline.

    `reference` maps each trained parameter to the reference's weight; it is empty where the reference is LoRA's base.
    `adapted_layers` are the layers that carry an adapter. `timestep_shift` is that of the drawn sigmas.
    """

    tokenizer: T5TokenizerFast
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    denoiser: WanTransformer3DModel
    noise_scheduler: UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler
    timestep_shift: float
    reference: dict = field(default_factory=dict)
    adapted_layers: list = field(default_factory=list)

    @property
    def encoders(self):
        """What is no longer needed once latents and prompts are cached."""
        return [self.text_encoder, self.vae]


def check_base(args, pipeline, source):
    """Raises UserError for a model that would be trained wrongly, from its configurations, before any weights load."""
    name, problem = args.pretrained_model_name_or_path, None
    parts = {part: (pipeline.get(part) or ["", None])[1] for part in (*PARTS, "transformer_2", "scheduler")}
    other = next((part for part in PARTS if parts[part] != PARTS[part]), None)
    if pipeline.get("boundary_ratio") is not None or parts["transformer_2"] is not None:
        problem = "has two transformers, as Wan 2.2 A14B, and one is trained here: give Wan 2.1 or Wan 2.2 TI2V 5B"
    elif "DMD" in pipeline["_class_name"]:
        problem = "is distilled to few steps, which this training would undo: give the base model"
    elif other is not None:
        problem = f"is not Wan: its {other} is {parts[other] or 'nothing'}, not {PARTS[other]}"
    elif parts["scheduler"] not in SCHEDULERS:
        problem = f"has the noise levels of {parts['scheduler']}, not of {' or '.join(SCHEDULERS)}: it cannot be used"
    else:
        transformer = WanTransformer3DModel.load_config(name, subfolder="transformer", **source)
        vae = AutoencoderKLWan.load_config(name, subfolder="vae", **source)
        multiple = vae.get("scale_factor_spatial", 8) * transformer.get("patch_size", (1, 2, 2))[1]
        if transformer.get("image_dim") is not None or transformer["in_channels"] != vae.get("z_dim", 16):
            problem = "takes a picture or the like beside a caption, as image-to-video: give a text-to-video model"
        elif "quantization_config" in transformer:
            problem = "is quantised, with which this training was never run: give the base model in bf16"
        elif any(side % multiple for side in picture_size(args)):
            problem = f"needs a --height and a --width that are multiples of {multiple}, not {picture_size(args)}"
    if problem is not None:
        raise UserError(f"--pretrained_model_name_or_path {name} {problem}")


# Copied from train_sspo_sd.check_tokenizer
def check_tokenizer(tokenizer, text_encoder):
    """Raises ValueError if the tokenizer's files are missing: transformers then makes an empty one, without a word."""
    if len(tokenizer) < text_encoder.config.vocab_size / 2:
        known = f"{len(tokenizer)} of the text encoder's {text_encoder.config.vocab_size} tokens"
        raise ValueError(f"its tokenizer knows {known}: files of it are missing")


def load_models(args, dtype):
    """
    Loads the pipeline's parts, frozen and on the CPU: in `dtype`, but for a denoiser that is trained in full and the
    VAE, which stay in fp32. Raises UserError if that is not possible. Where --fps is not given it becomes the model's.
    """
    name = args.pretrained_model_name_or_path
    source = dict(revision=args.revision, cache_dir=args.cache_dir)
    weights = dict(source, variant=args.variant)
    trained = dtype if args.train_mode == "lora" else torch.float32
    if dtype == torch.float16:
        raise UserError("--mixed_precision fp16 was never tried with Wan, which is trained in bf16: use bf16")
    try:
        pipeline = PIPELINE.load_config(name, **source)
        check_base(args, pipeline, source)
        scheduler = SCHEDULERS[pipeline["scheduler"][1]]
        models = Models(
            tokenizer=T5TokenizerFast.from_pretrained(name, subfolder="tokenizer", **source),
            text_encoder=UMT5EncoderModel.from_pretrained(name, subfolder="text_encoder", dtype=dtype, **weights),
            vae=AutoencoderKLWan.from_pretrained(name, subfolder="vae", dtype=torch.float32, **weights),
            denoiser=WanTransformer3DModel.from_pretrained(name, subfolder="transformer", dtype=trained, **weights),
            noise_scheduler=scheduler.from_pretrained(name, subfolder="scheduler", **source),
            timestep_shift=args.timestep_shift,
        )
        check_tokenizer(models.tokenizer, models.text_encoder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # the last two: damaged or unfitting weights
        raise UserError(f"--pretrained_model_name_or_path {name} cannot be loaded: {one_line(error)}") from error
    if args.fps is None:  # only now is it known which model this is
        args.fps = 24 if pipeline.get("expand_timesteps") else 16
    models.vae.enable_slicing()  # a batch of clips would need more memory than all else in a run
    for module in (*models.encoders, models.denoiser):
        module.requires_grad_(False)
    return models


# Copied from train_sspo_video.open_winners
def open_winners(args):
    """The data set of winners, its clips still encoded: one that cannot be read is named when its turn comes."""
    table = magictime_table(args.train_data_dir) if args.train_data_dir else None
    if table is not None:
        return table.to_iterable_dataset() if args.streaming else table
    return open_dataset(args, datasets.Video)


# Copied from train_sspo_video.magictime_table
def magictime_table(source):
    """
    The clips that MagicTime's annotations list, or None where there are none.

    They are a CSV file with the columns videoid, name (the caption) and is_transmit (not used here); `source` is that
    file or its folder. <videoid>.mp4 may lie beside it or in any folder below. MagicTime itself has it in caption/ and
    the clips in video/ beside that: `source` may be the folder of both. A videoid is text: 007 is not 7.
    """
    source, found = Path(source), []
    for path in [source] if source.suffix == ".csv" else [*source.glob("*.csv")] or source.glob("caption/*.csv"):
        if path.is_file():
            try:
                with path.open(newline="", encoding="utf-8-sig") as file:
                    reader = csv.DictReader(file)
                    if {"videoid", "name"} <= set(reader.fieldnames or ()):
                        found.append((path, list(reader)))
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: save it as that, or take it out of the folder") from error
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(sorted(path.name for path, _ in found))
        raise UserError(f"{source} holds several lists of clips, {names}: give one of them as --train_data_dir")
    (path, rows), clips = found[0], {}
    folder, beside = path.parent, path.resolve().parent.with_name("video")
    for clip in sorted((beside if folder.name == "caption" and beside.is_dir() else folder).rglob("*.mp4")):
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


# Copied from train_sspo_video.read_winner
def read_winner(encoded, args, key):
    """
    Decodes the frames of one winner that are needed, and crops them all in the same place.

    Args:
        encoded: what the data set holds: a path, a dict of path and bytes, or bytes.
        key: of the random draws.
    Returns:
        dict of tensors: `pixels` (frames, 3, height, width) in -1..1. Raises what PyAV raises, and ValueError for a
        clip that is too short.
    """
    path, content = encoded if isinstance(encoded, str) else None, encoded if isinstance(encoded, bytes) else None
    if isinstance(encoded, dict):
        path, content = encoded["path"], encoded["bytes"]
    frames = read_frames(path, content, functools.partial(choose_frames, args=args, key=key))
    cropped = [crop_picture(frame, args, keyed_generator("crop", *key)) for frame in frames]
    return {"pixels": torch.stack([pixels for pixels, _ in cropped])}


def choose_frames(count, rate, args, key):
    """
    Which frames of a clip of `count`, `rate` a second, are trained on, in order: the nearest to those that the model
    shows, args.fps a second, or every --frame_stride-th. Raises ValueError if it has too few, or no rate.
    """
    frames, stride = args.num_frames, args.frame_stride
    if stride is None and not rate:
        raise ValueError("it does not tell its frames a second: give --frame_stride")
    places = range(frames) if stride == 0 else [int(i * (stride or rate / args.fps) + 0.5) for i in range(frames)]
    needed = places[-1] + 1
    if count < needed:
        how = f"{args.fps} a second" if stride is None else f"--frame_stride {stride}"
        advice = "--frame_stride (0 spreads them over the whole clip)" if stride else "--num_frames"
        of = f" of {float(rate):g} a second" if stride is None else ""
        raise ValueError(f"it has {count} frames{of}, and {frames} at {how} need {needed}; lower {advice}")
    if stride == 0:
        return [round(i * (count - 1) / max(frames - 1, 1)) for i in range(frames)]
    start = torch.randint(count - needed + 1, (), generator=keyed_generator("frames", *key)).item()
    return [start + place for place in places]


# Copied from train_sspo_video.open_clip
@contextmanager
def open_clip(path, content):
    """The container of a clip, which is a file or bytes, and its picture track."""
    file = io.BytesIO(content) if content is not None else xopen(path, "rb") if "://" in path else path
    with av.open(file) as container:
        if not container.streams.video:
            raise ValueError("it has no picture track")
        container.streams.video[0].codec_context.thread_count = 1  # the loader's processes are enough
        yield container, container.streams.video[0]


# Copied from train_sspo_video.read_frames
def read_frames(path, content, choose):
    """
    The frames that `choose` names when it is told how many there are, and how many a second on average (None where the
    file does not tell), a list of PIL pictures.

    Times of all frames are read off the packets, without decoding. Then decoding starts at the last keyframe before
    the first frame that is wanted and ends with the last. Where that does not work, because packets carry no times or
    do not hold one frame each, all is decoded, once to count and once to keep what is wanted.
    """
    with open_clip(path, content) as (container, track):
        packets = [packet for packet in container.demux(track) if packet.size and not packet.is_discard]
        times = {packet.pts for packet in packets}
        if len(times) == len(packets) and None not in times:
            times = sorted(times)
            seconds = (times[-1] - times[0]) * track.time_base if times else 0
            indices = choose(len(times), (len(times) - 1) / seconds if seconds else track.average_rate)
            wanted, found = {times[index] for index in indices}, {}
            container.seek(times[indices[0]], stream=track)
            for frame in container.decode(track):
                if frame.pts in wanted:
                    found[frame.pts] = upright(frame, track)
                if len(found) == len(wanted):
                    return [found[times[index]] for index in indices]
    with open_clip(path, content) as (container, track):
        indices = choose(sum(1 for _ in container.decode(track)), track.average_rate)
    with open_clip(path, content) as (container, track):
        found = {i: upright(frame, track) for i, frame in enumerate(container.decode(track)) if i in indices}
    return [found[index] for index in indices]


# Copied from train_sspo_video.upright
def upright(frame, track):
    """A decoded frame as a PIL picture, its pixels square, and turned as the camera noted it."""
    picture = frame.to_image(width=round(frame.width * (track.sample_aspect_ratio or 1)))
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def picture_size(args):
    """Height and width of what is trained on, in pixels."""
    return args.height, args.width


@torch.no_grad()
def encode_prompt(models, captions):
    """
    One dict for each caption, its tensors without a batch dimension: `prompt_embeds`, (tokens, width).

    Only the caption's own tokens are kept. WanPipeline makes zeros of those behind its end; so does collate_condition.
    """
    tokens = models.tokenizer(
        [prompt_clean(caption) for caption in captions],
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).to(models.text_encoder.device)
    embeds = models.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return [{"prompt_embeds": row[: mask.sum()].clone()} for row, mask in zip(embeds, tokens.attention_mask)]


def encode_empty(models, args):
    """The prompt of a dropped caption, and the one that guidance leads away from."""
    return encode_prompt(models, [""])[0], encode_prompt(models, [args.negative_prompt or ""])[0]


# Copied from train_sspo_sd.uncropped
def uncropped(args):
    """What collate_condition needs besides the prompt for a validation sample, which has no crop: here nothing."""
    return {}


def collate_condition(rows, device):
    """The batch of conditions that `predict` takes, the batch first. `rows` are dicts of tensors without it."""
    prompts = [row["prompt_embeds"].to(device) for row in rows]
    padded = [F.pad(prompt, (0, 0, 0, TEXT_TOKENS - len(prompt))) for prompt in prompts]  # there is no mask for it
    return {"prompt_embeds": torch.stack(padded)}


def latent_statistics(vae):
    """Mean and standard deviation of the VAE's latents, for each channel."""
    statistics = (vae.config.latents_mean, vae.config.latents_std)
    return [torch.tensor(values, device=vae.device).view(1, -1, 1, 1, 1) for values in statistics]


@torch.no_grad()
def encode_image(models, pixels):
    """
    Mean and standard deviation of the latents (b, c, f, h, w) of `pixels` (b, frames, 3, h, w), in training space,
    fp32. frames is 4 f - 3.

    The model was trained on the posterior's mode, so the deviation is 0, (b, 1, 1, 1, 1).
    """
    vae = models.vae
    latents = vae.encode(pixels.transpose(1, 2).to(vae.device, vae.dtype)).latent_dist.mode()
    mean, std = latent_statistics(vae)
    return (latents - mean) / std, torch.zeros_like(latents[:, :1, :1, :1, :1])


@torch.no_grad()
def decode_latents(models, latents):
    """The clip of one example's latents (1, c, f, h, w), a list of PIL. Large clips are decoded tile by tile."""
    vae = models.vae
    mean, std = latent_statistics(vae)
    # Whole, 704 x 1280 would take over 21 GiB. Winners are encoded whole: that takes less, and no seam is learned.
    vae.use_tiling = latents[0, 0, 0].numel() * vae.config.scale_factor_spatial**2 > 480 * 832
    pixels = vae.decode(latents.to(vae.device, vae.dtype) * std + mean).sample
    vae.use_tiling = False
    return VaeImageProcessor().postprocess(pixels[0].transpose(0, 1))


def latent_shape(models, args):
    """The shape of one example's latents."""
    vae = models.vae.config
    frames = (args.num_frames - 1) // vae.scale_factor_temporal + 1
    return (vae.z_dim, frames, *(side // vae.scale_factor_spatial for side in picture_size(args)))


# Copied from train_sspo_flux2.draw_timesteps
def draw_timesteps(models, generator, draws):
    """
    `draws` timesteps, each 1000 sigma: sigma is the sigmoid of a normal number, shifted by --timestep_shift. Of
    several, one is drawn from each of as many equally likely parts: a pair's gradient is less noisy, for nothing.
    """
    places = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
    u, shift = torch.special.ndtri(places).sigmoid(), models.timestep_shift
    return 1000 * shift * u / (1 + (shift - 1) * u)


# Copied from train_sspo_flux2.add_noise
def add_noise(models, latents, noise, timesteps):
    sigma = timesteps.view(-1, *[1] * (latents.ndim - 1)) / 1000
    return (1 - sigma) * latents + sigma * noise


# Copied from train_sspo_flux2.denoising_target
def denoising_target(models, latents, noise, timesteps):
    """What the model should predict: the velocity."""
    return noise - latents


def predict(denoiser, noisy, timesteps, condition):
    """The denoiser's prediction, in the shape and precision of `noisy`."""
    embeds, latents = condition["prompt_embeds"], noisy
    if not torch.is_autocast_enabled(noisy.device.type):  # in a rollout, see rollout_dtype
        latents = noisy.to(embeds.dtype)
    velocity = denoiser(hidden_states=latents, timestep=timesteps, encoder_hidden_states=embeds).sample
    return velocity.to(noisy.dtype)


def rollout_dtype(models, args):
    """The precision that a rival's latents have between two steps: WanPipeline casts them for each call only."""
    return torch.float32


class EulerSampler(FlowMatchEulerDiscreteScheduler):
    """The pipeline's scheduler, with what self_sample asks of one."""

    init_noise_sigma = 1.0

    def scale_model_input(self, noisy, timestep):
        return noisy

    def add_noise(self, latents, noise, timesteps):
        return add_noise(None, latents, noise, timesteps.to(latents.device))


SCHEDULERS = {"UniPCMultistepScheduler": UniPCMultistepScheduler, "FlowMatchEulerDiscreteScheduler": EulerSampler}


def rollout_scheduler(models, args):
    """
    A fresh sampler on the model's own noise levels.

    What makes them those of a flow is said to either class by its own names: made from the other's configuration, it
    would quietly go without.
    """
    own, config = models.noise_scheduler, models.noise_scheduler.config
    kind = {"unipc": UniPCMultistepScheduler, "euler": EulerSampler}.get(args.rollout_scheduler, type(own))
    shift = args.flow_shift or (config.flow_shift if isinstance(own, UniPCMultistepScheduler) else config.shift)
    if kind is EulerSampler:
        return kind.from_config(config, shift=shift, use_dynamic_shifting=False)
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, use_dynamic_shifting=False)
    return kind.from_config(config, **flow)


# Copied from train_sspo_sd.lora_targets
def lora_targets(args):
    """The modules that get adapters, as peft takes them."""
    return [layer.strip() for layer in (args.lora_layers or LORA_LAYERS).split(",")]


# Copied from train_sspo_sd.trained_in_full
def trained_in_full(denoiser):
    """The parameters that --train_mode full trains."""
    return denoiser.parameters()


# Copied from train_sspo_sd.checkpoint_gradients
def checkpoint_gradients(denoiser):
    """Makes the backward compute activations again instead of keeping them."""
    denoiser.enable_gradient_checkpointing()


# Copied from train_sspo_flux2.save_denoiser
def save_denoiser(denoiser, args, directory):
    """Writes the policy inside a checkpoint: LoRA weights in the pipeline's format, or the transformer's folder."""
    if args.train_mode == "lora":
        # As peft names them: convert_state_dict_to_diffusers renames some, and loaders would lose those silently.
        layers = get_peft_model_state_dict(denoiser, adapter_name=POLICY)
        metadata = _collate_lora_metadata({"transformer": denoiser})  # carries lora_alpha
        PIPELINE.save_lora_weights(directory, transformer_lora_layers=layers, **metadata)
    else:
        denoiser.save_pretrained(os.path.join(directory, "transformer"))


# Copied from train_sspo_flux2.load_denoiser
def load_denoiser(denoiser, args, directory):
    """Reads what save_denoiser wrote, into the weights that the optimizer holds."""
    if args.train_mode == "lora":
        layers = load_file(Path(directory, "pytorch_lora_weights.safetensors"))
        layers = {key.removeprefix("transformer."): value for key, value in layers.items()}
        set_peft_model_state_dict(denoiser, layers, adapter_name=POLICY)
    else:
        transformer = type(denoiser).from_pretrained(directory, subfolder="transformer", dtype=torch.float32)
        denoiser.load_state_dict(transformer.state_dict())


# What Wan's own code calls the layers, and with it ComfyUI and kohya's musubi-tuner.
OWN_NAMES = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
OWN_NAMES |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_out": "head.head"}
OWN_NAMES |= {"condition_embedder.": "", "embedder.linear_1": "embedding.0", "embedder.linear_2": "embedding.2"}
OWN_NAMES |= {"time_proj": "time_projection.1"}


def save_lora(denoiser, args, directory):
    """Writes LoRA weights for the stock pipeline, and with --output_kohya_format for other tools."""
    save_denoiser(denoiser, args, directory)
    if args.output_kohya_format:
        layers = {}
        for name, weight in get_peft_model_state_dict(denoiser, adapter_name=POLICY).items():
            for ours, theirs in OWN_NAMES.items():
                name = name.replace(ours, theirs)
            layers[f"unet.{name}"] = weight.cpu()
        layers = convert_state_dict_to_kohya(layers)
        alpha = torch.tensor(float(args.lora_alpha))  # diffusers writes the rank there, whatever the alpha was
        layers = {name: alpha.clone() if name.endswith(".alpha") else weight for name, weight in layers.items()}
        save_file(layers, Path(directory, "pytorch_lora_weights_kohya.safetensors"))


def save_result(models, args, directory):
    """Writes what the stock pipeline loads: LoRA weights, or the whole pipeline around the trained transformer."""
    if args.train_mode == "lora":
        return save_lora(models.denoiser, args, directory)
    # Everything but the transformer is read again: all of the text encoder, in the precision of its files.
    source = dict(revision=args.revision, variant=args.variant, cache_dir=args.cache_dir)
    pipeline = PIPELINE.from_pretrained(args.pretrained_model_name_or_path, transformer=models.denoiser, **source)
    pipeline.save_pretrained(directory)


# Copied from train_sspo_sd.which_base
def which_base(args):
    """--revision and --variant, as further arguments of from_pretrained in the model card's lines."""
    return "".join(f', {name}="{value}"' for name in ("revision", "variant") if (value := getattr(args, name)))


def usage(args, name):
    """The lines of Python that load the result called `name`, for the model card."""
    lora = args.train_mode == "lora"
    base = f'"{args.pretrained_model_name_or_path}"{which_base(args)}' if lora else f'"{name}"'
    shift = f"flow_shift={args.flow_shift}, shift={args.flow_shift}"  # UniPC's name for it, and Euler's
    size = f"height={args.height}, width={args.width}, num_frames={args.num_frames}"
    negative = f", negative_prompt={args.negative_prompt!r}" if args.negative_prompt else ""
    lines = [
        "import torch",
        "from diffusers import AutoencoderKLWan, WanPipeline",
        "from diffusers.utils import export_to_video",
        f'vae = AutoencoderKLWan.from_pretrained({base}, subfolder="vae", dtype=torch.float32)',
        f"pipeline = WanPipeline.from_pretrained({base}, vae=vae, dtype=torch.bfloat16)",
        f'pipeline.load_lora_weights("{name}")' if lora else "",
        f"pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, {shift})"
        if args.flow_shift is not None
        else "",
        'pipeline.enable_model_cpu_offload()  # or, on a large card, pipeline.to("cuda")',
        f'frames = pipeline(prompt="a rose opens, time-lapse", {size}{negative}).frames[0]',
        f'export_to_video(frames, "clip.mp4", fps={args.fps})',
    ]
    return "\n".join(filter(None, lines))


def write_samples(rows, args, step, trackers):
    """
    Writes samples/step-N.mp4 and hands it to the trackers. `rows` are lists of what decode_latents gives.

    samples/step-N.png shows the same clips standing still: one a line, the lines of a prompt together.
    """
    path = Path(args.output_dir, "samples", f"step-{step}.mp4")
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=args.fps, options={"crf": "18"})
        sides = args.width * len(rows[0]), args.height * len(rows)
        scale = min(1, H264_SIDE / max(sides))
        track.width, track.height = (int(side * scale) // 2 * 2 for side in sides)
        track.pix_fmt = "yuv420p"
        for i in range(args.num_frames):
            grid = make_image_grid([clip[i] for row in rows for clip in row], rows=len(rows), cols=len(rows[0]))
            container.mux(track.encode(av.VideoFrame.from_image(grid.resize((track.width, track.height)))))
        container.mux(track.encode())
    clips = [row[column] for column in range(len(rows[0])) for row in rows]
    scale = min(1, STRIP_SIDE / max(args.height, args.width))
    size = (round(args.width * scale), round(args.height * scale))
    strips = [[frame.resize(size) for frame in clip[:: math.ceil(args.num_frames / STRIP)]] for clip in clips]
    strip = make_image_grid(list(itertools.chain(*strips)), rows=len(strips), cols=len(strips[0]))
    strip.save(path.with_suffix(f".{SAMPLES}"))
    for tracker in trackers:
        if tracker.name == "tensorboard":  # it shows no video
            tracker.log_images({"samples": np.asarray(strip)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"samples": wandb.Video(str(path), format="mp4")}, step=step)


# ------------------------------------------------------------------------------------------------------------------
# Data: the winners, and the batches that are made of them
# ------------------------------------------------------------------------------------------------------------------

# Copied from train_sspo_sd.FILE_BUILDERS
FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# Copied from train_sspo_sd.SHUFFLE_BUFFER
SHUFFLE_BUFFER = 1000  # rows held in memory, still encoded, to shuffle a --streaming data set


# Copied from train_sspo_sd.training_files
def training_files(folder, suffixes):
    """
    The pattern of a folder's files that are for training: those of the split called train if it has one, else all.

    `datasets` itself takes any word in a name for a split: of a folder with `a train at night.png`, that one picture.
    """
    patterns = [] if any(folder.glob("metadata.*")) else ["**/train/**/*"]
    if suffixes & {*FILE_BUILDERS}:
        patterns.append("**/train[-._0-9]*")
    return next((each for each in patterns if any(file.is_file() for file in folder.glob(each))), "**")


# Copied from train_sspo_sd.add_captions
def add_captions(dataset, folder):
    """
    A data set of files with the column `text`: what stands in the .txt file beside each, where kohya's tools want it.

    Raises UserError if some files have none, or if some that have one are of a kind that `datasets` does not read.
    """
    texts = [Path(winner["path"]).with_suffix(".txt") for winner in dataset[MODALITY]]
    missing = [text for text in texts if not text.exists()]
    if missing:
        raise UserError(f"{len(missing)} of {len(texts)} {MODALITY}s have no caption beside them, first {missing[0]}")
    known = {text.resolve() for text in texts}
    others = [file for file in sorted(folder.rglob("*")) if file.suffix not in (".txt", ".npz")]  # kohya's latents
    others = [file for file in others if not re.search(r"(^|/)(\.|__)", file.relative_to(folder).as_posix())]  # hidden
    others = [file for file in others if (text := file.with_suffix(".txt")).exists() and text.resolve() not in known]
    if others:
        raise UserError(
            f"{len(others)} files with a caption are of no kind that datasets reads, first {others[0]}: convert them"
        )
    return dataset.add_column("text", [text.read_text("utf-8-sig", errors="replace").strip() for text in texts])


# Copied from train_sspo_sd.open_dataset
def open_dataset(args, kind):
    """
    The training split of --dataset_name or --train_data_dir, features of `kind` (datasets.Image, say) left encoded.

    Raises UserError if it cannot be opened.
    """
    source = str(args.train_data_dir or args.dataset_name)
    path = Path(source)
    if args.train_data_dir and not path.exists():
        raise UserError(f"--train_data_dir {source} does not exist")
    if path.is_file() and path.suffix not in FILE_BUILDERS:
        raise UserError(f"{source} is not a folder, nor one of {', '.join(FILE_BUILDERS)}")
    options = dict(cache_dir=args.cache_dir, streaming=args.streaming)
    suffixes = {file.suffix for file in path.rglob("*")}
    captioned = ".txt" in suffixes and not suffixes & {*FILE_BUILDERS, ".csv", ".jsonl"}
    card = path / "README.md"  # of a copy from the hub, it may list configurations and their files
    listed = args.dataset_config_name or (card.is_file() and "data_files" in card.read_text("utf-8", errors="replace"))
    shards = []
    if {".tar", ".parquet"} <= suffixes:  # img2dataset's: beside each shard a table without pictures, not to be read
        shards = [str(shard) for shard in sorted(path.rglob("*.tar")) if shard.with_suffix(".parquet").exists()]
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # made by save_to_disk
            dataset = datasets.load_from_disk(source)
        elif path.is_file():
            dataset = datasets.load_dataset(FILE_BUILDERS[path.suffix], data_files=source, **options)
        elif captioned:
            files = dict(data_dir=source, data_files={"train": "**"}, drop_labels=True)
            dataset = datasets.load_dataset(f"{MODALITY}folder", **files, cache_dir=args.cache_dir)
        elif shards:
            dataset = datasets.load_dataset("webdataset", data_files=shards, **options)
        elif path.is_dir() and not listed:
            files = {"train": training_files(path, suffixes)}
            dataset = datasets.load_dataset(source, data_files=files, **options)
        else:
            dataset = datasets.load_dataset(source, args.dataset_config_name, **options)
    except Exception as error:  # datasets raises nearly everything, down to IndexError for an empty set
        raise UserError(f"the data set {source} cannot be opened: {one_line(error.__cause__ or error)}") from error
    if isinstance(dataset, dict):
        if "train" not in dataset and len(dataset) > 1:
            raise UserError(f"the data set {source} has no split called train, only {', '.join(dataset)}")
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    if isinstance(dataset, datasets.Dataset):
        for name, feature in dataset.features.items():
            if isinstance(feature, kind):
                dataset = dataset.cast_column(name, kind(decode=False))
        dataset = add_captions(dataset, path) if captioned else dataset
    if args.streaming:
        return (dataset.to_iterable_dataset() if isinstance(dataset, datasets.Dataset) else dataset).decode(False)
    return dataset


# Copied from train_sspo_sd.Winners
class Winners:
    """
    Winners and their captions, whatever form the data set has.

    A data set in the layout of Pick-a-Pic (jpg_0, jpg_1, label_0: 1 if jpg_0 won, 0 if jpg_1 did) gives the better
    picture of each pair, and with --rivals given the other one as its rival. Ties and unlabelled pairs are dropped;
    `ties` counts them (with --streaming they are counted in the log, epoch by epoch).

    Raises UserError if a column is missing or the data set is empty.
    """

    def __init__(self, args):
        self.args, self.dataset, self.ties = args, open_winners(args), 0
        if args.max_train_samples is not None:
            self.dataset = self.dataset.take(args.max_train_samples)
        first = next(self.examples(), None)
        if first is None:
            raise UserError(f"the data set {args.train_data_dir or args.dataset_name} is empty")
        self.pairs = getattr(args, f"{MODALITY}_column") is None and set(first) >= {*PAIR_COLUMNS, "label_0"}
        if args.rivals == "given" and not self.pairs:
            raise UserError(
                f"--rivals given needs the columns {', '.join(PAIR_COLUMNS)} and label_0: the data set has "
                f"{', '.join(first)}"
            )
        self.column = None if self.pairs else self.find_column(MODALITY, COLUMNS, first)
        self.caption_column = self.find_column("caption", ["text", "caption", "txt", "prompt"], first)
        self.first_caption = str(first[self.caption_column])[:100]  # by it a resumed run notices another data set
        if args.streaming:
            self.dataset = self.dataset.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER)
        elif self.pairs:
            labels = self.dataset.select_columns([name for name in first if name in ("label_0", "has_label")])
            self.dataset = self.dataset.select([i for i, pair in enumerate(labels) if self.has_winner(pair)])
            self.ties = len(labels) - len(self.dataset)
            if not len(self.dataset):
                raise UserError("the data set has no winner: no pair has a label_0 of 0 or 1")

    def find_column(self, what, candidates, columns):
        asked = getattr(self.args, f"{what}_column")
        for name in [asked] if asked else candidates:
            if name in columns:
                return name
        raise UserError(
            f"the data set has no column {asked or ' or '.join(candidates)}: it has {', '.join(columns)}; "
            f"name the one to use with --{what}_column, or give a folder a metadata.jsonl with file_name and text"
        )

    def __len__(self):
        """The number of winners, ties left out. Not known of a data set that is streamed."""
        return len(self.dataset)

    def examples(self):
        """Yields the examples in their order. Raises UserError where the data set itself cannot be read."""
        try:
            yield from self.dataset
        except Exception as error:  # as in open_dataset
            raise UserError(f"the data set cannot be read: {one_line(error.__cause__ or error)}") from error

    def has_winner(self, example):
        """Whether this is a winner by itself, or a pair of which one was preferred."""
        return not self.pairs or (example["label_0"] in (0, 1) and example.get("has_label", True))

    def rows(self, epoch, offset):
        """Yields (row, its example or None) in the order of `epoch`, from the `offset`-th on."""
        if self.args.streaming:
            self.dataset.set_epoch(epoch)
            yield from itertools.islice(enumerate(self.examples()), offset, None)
        else:
            order = torch.randperm(len(self), generator=keyed_generator("order", self.args.seed, epoch))
            yield from ((int(row), None) for row in order[offset:].numpy())  # a list would take six times the memory

    def load(self, epoch, row, example=None):
        """
        One training example: `epoch`, `row`, `caption`, what read_winner gives, keyed by (epoch, row), and with
        --rivals given `rival_pixels`, cropped and mirrored as the winner's.

        Raises BadExample, naming the winner that cannot be read or the caption that is no text.
        """
        example = self.dataset[row] if example is None else example
        key = (self.args.seed, 0 if self.args.cache_latents else epoch, row)
        loser, winner = PAIR_COLUMNS if self.pairs else (None, self.column)
        if self.pairs and example["label_0"] == 1:
            loser, winner = winner, loser
        loaded = {"epoch": epoch, "row": row, **self.read(example, winner, row, key)}
        if self.args.rivals == "given":
            loaded["rival_pixels"] = self.read(example, loser, row, key)["pixels"]
        return {**loaded, "caption": self.caption(example, row, key)}

    def read(self, example, column, row, key):
        encoded = example[column]
        try:
            return read_winner(encoded, self.args, key)
        except Exception as error:  # PIL raises nearly everything, from struct.error to SyntaxError; so does PyAV
            name = encoded.get("path") if isinstance(encoded, dict) else encoded if isinstance(encoded, str) else None
            raise BadExample(
                f"the {MODALITY} {name or column} in row {row} cannot be read: {one_line(error)}"
            ) from error

    def captions(self):
        """Yields the caption of each row in epoch 0, or None where it is no text and is to be skipped."""
        for row, example in enumerate(self.dataset.select_columns([self.caption_column])):
            try:
                yield self.caption(example, row, (self.args.seed, 0, row))
            except BadExample:
                if self.args.on_bad_example == "stop":
                    raise
                yield None

    def caption(self, example, row, key):
        caption = example[self.caption_column]
        if isinstance(caption, (list, np.ndarray)) and len(caption):
            caption = caption[torch.randint(len(caption), (), generator=keyed_generator("caption", *key)).item()]
        if isinstance(caption, bytes):
            caption = caption.decode(errors="replace")
        if not isinstance(caption, str):
            why = " (an empty field, if this is a CSV file)" if caption is None else ""
            raise BadExample(f"the caption in row {row}, column {self.caption_column}, is {caption!r}, not text{why}")
        return caption


# Copied from train_sspo_sd.crop_picture
def crop_picture(picture, args, generator):
    """
    Resizes the picture until it just covers picture_size, then crops and mirrors as the flags say.

    Returns:
        pixels (3, height, width) in -1..1, and a tensor of six, the geometry that SDXL is told: original height and
        width, top and left of the crop in the resized picture, height and width of the crop.
    """
    height, width = picture_size(args)
    original = (picture.height, picture.width)
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
    return pixels, torch.tensor([*original, top, left, height, width])


# Copied from train_sspo_sd.WinnerStream
class WinnerStream(torch.utils.data.IterableDataset):
    """
    The endless sequence of epochs, cut into micro-batches for one process.

    The sequence is the same for every layout: `world` x train_batch_size consecutive winners make one micro-batch of
    all processes, of which this one takes every `world`-th. Batches run on across the end of an epoch: no row is
    dropped, and a data set smaller than a batch is repeated. With --on_bad_example skip unreadable winners are left
    out, so every process, and each of its loader processes, has to read everything; --cache_latents reads it once.

    Args:
        load: makes an example of (epoch, row, what Winners.rows gave for it); Winners.load, or LatentCache.load.
        cursor: the (epoch, offset) to start from.
    Yields:
        (examples, cursor): a list of train_batch_size dicts, and the cursor from which to resume after them.
    """

    def __init__(self, load, winners, args, rank=0, world=1, cursor=(0, 0)):
        self.load, self.winners, self.args = load, winners, args
        self.rank, self.world, self.cursor = rank, world, cursor

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        worker, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        size, mine = self.world * self.args.train_batch_size, []
        for taken, (place, loaded, cursor) in enumerate(self.sequence(in_charge=self.rank == worker == 0)):
            turn, slot = divmod(taken, size)
            if turn % workers != worker:
                continue
            if slot % self.world == self.rank:
                mine.append(loaded or self.load(*place))
            if slot == size - 1:
                yield mine, cursor
                mine = []

    def sequence(self, in_charge):
        """Yields (place, its example if it had to be loaded, cursor after it). Logs if this process is `in_charge`."""
        epoch, offset = self.cursor
        while True:
            found, ties, loaded = offset > 0, 0, None
            for row, example in self.winners.rows(epoch, offset):
                offset += 1
                if self.args.streaming and not self.winners.has_winner(example):
                    ties += 1
                    continue
                if self.args.on_bad_example == "skip":
                    try:
                        loaded = self.load(epoch, row, example)
                    except BadExample as error:
                        if in_charge and epoch == self.cursor[0]:  # once, in the first epoch of this run
                            logger.logger.warning(f"Skipped: {error}.")
                        continue
                found = True
                yield (epoch, row, example), loaded, (epoch, offset)
            if not found:
                raise UserError("no winner can be used in a whole epoch: all are ties, or cannot be read")
            if ties and in_charge:
                logger.logger.info(f"{ties} ties dropped in epoch {epoch}.")
            epoch, offset = epoch + 1, 0


# Copied from train_sspo_sd.LINUX
LINUX = sys.platform == "linux"  # where loader processes are forked, see make_loader


# Copied from train_sspo_sd.heed_parent
def heed_parent():
    """Ends this loader process at its parent's SIGTERM, not at others: Slurm and systemd send one to each process."""
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid and parent.is_alive():
        pass
    os._exit(0)


# Copied from train_sspo_sd.ignore_signals
def ignore_signals(worker):
    """Keeps a loader process alive when a signal stops the run: the current update still needs it."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if LINUX:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=heed_parent, daemon=True).start()
    # The main process raises what fails here. The thread that passes it tensors would add a traceback when that exits.
    sys.excepthook = lambda *error: None


# Copied from train_sspo_sd.make_loader
def make_loader(stream, args):
    """The iterator over this process's micro-batches (see WinnerStream), which prefetches those of one rollout."""
    # Several workers would share a stream's shards among them, which changes the order.
    workers = min(args.dataloader_num_workers, 1) if args.streaming else args.dataloader_num_workers
    group = args.rollout_batch_size // args.train_batch_size  # micro-batches whose rivals are sampled at once
    # Forked where that is safe: a fork server (Python 3.14's default) is itself ended by a signal to every process,
    # and its children have threads before they can block one.
    return iter(
        torch.utils.data.DataLoader(
            stream,
            batch_size=None,
            collate_fn=tuple,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            prefetch_factor=max(math.ceil(group / workers), 2) if workers else None,
            multiprocessing_context="fork" if workers and LINUX else None,
        )
    )


# Copied from train_sspo_sd.encode_examples
def encode_examples(models, examples):
    """
    The examples with latents (`mean`, `std`; `rival_mean`, `rival_std` of given rivals) and encode_prompt's tensors in
    place of pixels and caption. Raises UserError for latents that are not finite.
    """
    prompts = encode_prompt(models, [example["caption"] for example in examples])
    return [{**example, **prompt} for example, prompt in zip(encode_latents(models, examples), prompts)]


# Copied from train_sspo_sd.encode_latents
def encode_latents(models, examples):
    """encode_examples without the prompts."""
    replaced = ("pixels", "rival_pixels", "caption")
    encoded = [{name: value for name, value in example.items() if name not in replaced} for example in examples]
    for half in ("", "rival_") if "rival_pixels" in examples[0] else ("",):
        mean, std = encode_image(models, torch.stack([example[f"{half}pixels"] for example in examples]))
        for i, example in enumerate(encoded):
            if not (mean[i].isfinite() & std[i].isfinite()).all():
                raise UserError(
                    f"the latents of row {example['row']} are not finite: the VAE, run in {models.vae.dtype}, is "
                    "broken or overflows; if that is float16, try --mixed_precision bf16 or no"
                )
            example.update({f"{half}mean": mean[i], f"{half}std": std[i]})
    return encoded


# Copied from train_sspo_sd.collate
def collate(examples, empty_prompt, args, device, negative_prompt=None):
    """
    One batch from encoded examples. `negative_prompt` (default: the empty prompt) is guidance's unconditional input.

    Returns:
        dict with `winner` (b, ...) latents sampled from the VAE's posterior, given rivals as `rival` likewise,
        `condition` and `unconditional` for guidance, `dropped` (whether an example goes without its caption), and
        `keys`, the (epoch, row) that every draw of an example is keyed by.
    """

    def posterior(half, purpose):
        mean, std = (torch.stack([e[half + name] for e in examples]).to(device) for name in ("mean", "std"))
        return mean + std * keyed_noise(purpose, args.seed, keys, mean.shape[1:]).to(device)

    keys = [(example["epoch"], example["row"]) for example in examples]
    draws = [torch.rand((), generator=keyed_generator("dropout", args.seed, *key)).item() for key in keys]
    dropped = [draw < args.proportion_empty_prompts for draw in draws]
    rows = [{**example, **empty_prompt} if drop else example for example, drop in zip(examples, dropped)]
    unconditional = [{**example, **(negative_prompt or empty_prompt)} for example in examples]
    batch = {
        "winner": posterior("", "posterior"),
        "condition": collate_condition(rows, device),
        "unconditional": collate_condition(unconditional, device),
        "dropped": dropped,
        "keys": keys,
    }
    if "rival_mean" in examples[0]:  # its condition is the winner's: a pair differs in its latents alone
        batch["rival"] = posterior("rival_", "rival posterior")
    return batch


# Copied from train_sspo_sd.pick
def pick(batch, rows):
    """The examples `rows`, a slice or a list, of a batch as `collate` makes it."""
    if isinstance(batch, dict):
        return {name: pick(value, rows) for name, value in batch.items()}
    return batch[rows] if torch.is_tensor(batch) or isinstance(rows, slice) else [batch[row] for row in rows]


# Copied from train_sspo_sd.micro_batches
def micro_batches(batch, size):
    """Cuts a batch, as `collate` makes it, into pieces of `size` examples."""
    return [pick(batch, slice(start, start + size)) for start in range(0, len(batch["keys"]), size)]


# Copied from train_sspo_sd.write_tensors
def write_tensors(path, tensors, metadata=None):
    """Writes a safetensors file beside its place and renames it, so that a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt", **(metadata or {})})
    os.replace(partial, path)


# Copied from train_sspo_sd.RivalCache
class RivalCache:
    """
    The rivals that --rivals_per_winner reuses, one file each. Their folder lies next to their reference's entry in the
    bank and is deleted with it. A rival takes 64 KiB for Stable Diffusion 1.5 at 512 x 512.

    Row r in epoch e uses rival number j = e mod rivals_per_winner, keyed by (reference, r, j). To resume bit for bit,
    each process keeps its own, and a batch all or none: sampled in a batch of another size, a last bit may differ.
    """

    def __init__(self, bank, args, rank):
        self.bank, self.args, self.folder = bank, args, f"rank-{rank}"

    def sample(self, reference, models, batch, autocast):
        """2. Self-sample the rivals that are not on disk yet, load the others: (b, ...) latents."""
        keys = [(reference, row, epoch % self.args.rivals_per_winner) for epoch, row in batch["keys"]]
        folder = self.bank.path(reference).with_suffix("") / self.folder
        names = [
            f"row-{row}-{j}{'-uncaptioned' if drop else ''}.safetensors"
            for (_, row, j), drop in zip(keys, batch["dropped"])
        ]
        kept = {path.name: path for path in folder.glob("*/*.safetensors")}
        missing = [i for i, name in enumerate(names) if name not in kept]
        if missing:
            partial = folder / f"{len(kept)}.partial"
            rivals = sample_rivals(models, pick({**batch, "keys": keys}, missing), self.args, autocast)
            for i, rival in zip(missing, rivals.cpu()):
                write_tensors(partial / names[i], {"rival": rival.contiguous()})
                kept[names[i]] = partial.with_suffix("") / names[i]
            os.replace(partial, partial.with_suffix(""))
        return torch.stack([load_file(kept[name])["rival"] for name in names]).to(batch["winner"].device)


# Copied from train_sspo_sd.LatentCache
class LatentCache:
    """
    Encoded winners on disk: files of CACHE_FILE latents, and of CACHE_FILE prompts, equal captions once.

    Files are written once, each process its share, and read by memory map. An interrupted run resumes where it
    stopped. Rows that cannot be read are noted in the files' metadata.

    Args:
        key: what the cached rows depend on, beside the flags in CACHE_KEY and the data set.
    """

    def __init__(self, args, winners, key):
        flags = {name: getattr(args, name) for name in CACHE_KEY.split()}
        digest = hashlib.sha256(repr((flags, CACHE_FILE, winners.dataset._fingerprint, key)).encode()).hexdigest()
        (digest,) = broadcast_object_list([digest])  # the fingerprint of a machine's own copy of the files differs
        self.winners, self.args, self.directory = winners, args, Path(args.output_dir, "cache", digest[:16])
        self.prompts = []  # of each row, the number of its caption
        numbers = {}
        for caption in winners.captions():
            self.prompts.append(None if caption is None else numbers.setdefault(caption, len(numbers)))
        self.captions = list(numbers)

    def path(self, kind, number):
        """The file of `kind` (rows or prompts) that holds this one."""
        return self.directory / f"{kind}-{number // CACHE_FILE}.safetensors"

    def read(self, rows):
        """`rows`, their examples, and the reasons of those that are bad, by row."""
        examples, bad = [], {}
        for row in rows:
            try:
                examples.append(self.winners.load(0, row))
            except BadExample as error:
                if self.args.on_bad_example == "stop":
                    raise
                bad[str(row)] = str(error)
        return rows, examples, bad

    def fill(self, models, accelerator):
        """Encodes what is missing of this process's share, after saying how much disk all of it takes."""
        prompts = self.missing("prompts", len(self.captions), accelerator)
        rows = self.missing("rows", len(self.winners), accelerator)
        if prompts or rows:
            longest = max(self.captions, key=len, default="")  # not all pipelines keep as much of each
            prompt = sum(value.nbytes for value in encode_prompt(models, [longest])[0].values())
            latents = 8 * math.prod(latent_shape(models, self.args)) * (2 if self.args.rivals == "given" else 1)
            size = (len(self.captions) * prompt + len(self.winners) * latents) / 2**30
            logger.info(
                f"Caching {len(self.winners)} winners and {len(self.captions)} captions in {self.directory}: up to "
                f"{size:.3g} GiB, {prompt / 2**20:.3g} MiB a caption."
            )
        loader = torch.utils.data.DataLoader(
            rows,
            batch_size=None,
            collate_fn=self.read,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_signals,
            multiprocessing_context="fork" if self.args.dataloader_num_workers and LINUX else None,
        )
        encoded = (encode_prompt(models, [self.captions[number] for number in batch]) for batch in prompts)
        batches = ((batch, dict(zip(batch, embeds)), {}) for batch, embeds in zip(prompts, encoded))
        self.write("prompts", len(self.captions), batches, len(prompts), accelerator)
        for module in models.encoders:
            if module is not models.vae:
                module.to("meta")  # its memory is freed: it encodes nothing any more, and a VAE of clips may need it
        batches = (
            (batch, {e["row"]: e for e in encode_latents(models, examples)} if examples else {}, bad)
            for batch, examples, bad in loader
        )
        self.write("rows", len(self.winners), batches, len(rows), accelerator)
        accelerator.wait_for_everyone()

    def missing(self, kind, total, accelerator):
        """Of 0..total-1, the batches that this process has to encode."""
        size, missing = self.args.train_batch_size, []
        for first in range(accelerator.process_index * CACHE_FILE, total, accelerator.num_processes * CACHE_FILE):
            numbers = range(first, min(first + CACHE_FILE, total))
            if not self.path(kind, first).exists():
                missing += [numbers[i : i + size] for i in range(0, len(numbers), size)]
        return missing

    def write(self, kind, total, batches, count, accelerator):
        """Writes the tensors of `batches`, each its numbers, a dict of tensors for each, and reasons of bad ones."""
        encoded, reasons = {}, {}
        hidden = not accelerator.is_local_main_process or not count
        for numbers, examples, bad in tqdm(batches, desc=f"caching {kind}", total=count, disable=hidden):
            reasons.update(bad)
            for number, example in examples.items():
                tensors = {f"{number}/{name}": value for name, value in example.items() if torch.is_tensor(value)}
                encoded.update({name: value.cpu().contiguous() for name, value in tensors.items()})
            if (numbers[-1] + 1) % CACHE_FILE == 0 or numbers[-1] + 1 == total:
                write_tensors(self.path(kind, numbers[-1]), encoded, reasons)
                encoded, reasons = {}, {}

    def tensors(self, kind, number):
        """What the file of `kind` holds for this number. Raises BadExample if it could not be read."""
        try:
            with safe_open(self.path(kind, number), "pt") as file:
                if str(number) in file.metadata():
                    raise BadExample(file.metadata()[str(number)])
                names = [name for name in file.keys() if name.startswith(f"{number}/")]
                return {name.split("/")[1]: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            path = self.path(kind, number)
            raise UserError(f"{path} is missing or damaged ({one_line(error)}): delete it and resume") from error

    def load(self, epoch, row, _=None):
        """The example of Winners.load, already encoded. Raises BadExample if it could not be read."""
        latents = self.tensors("rows", row)
        return dict(epoch=epoch, row=row, **latents, **self.tensors("prompts", self.prompts[row]))


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------------

# What a resumed run may change. Anything else would make it another run, and is refused. The batch may have another
# layout as long as its global size stays.
# Copied from train_sspo_sd.FREE_TO_CHANGE
FREE_TO_CHANGE = set(
    "cache_dir dataloader_num_workers on_bad_example rollout_batch_size train_batch_size gradient_accumulation_steps "
    "max_train_steps num_train_epochs gradient_checkpointing split_pairs allow_tf32 "
    "enable_xformers_memory_efficient_attention output_dir checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint validation_prompts validation_steps num_validation_images validation_guidance_scale "
    "report_to tracker_project_name push_to_hub hub_model_id output_kohya_format dataset_name train_data_dir "
    "pretrained_model_name_or_path pretrained_vae_model_name_or_path motion_adapter_name_or_path".split()
)


# Copied from train_sspo_sd.run_settings
def run_settings(args, accelerator, winners, global_batch):
    """What makes this run what it is, as a checkpoint records it."""
    settings = {f"--{name}": value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["--mixed_precision"] = accelerator.mixed_precision
    settings["global batch size"] = global_batch
    settings["number of winners"] = None if args.streaming else len(winners)
    settings["first caption"] = winners.first_caption
    if args.streaming:  # in a loader process datasets shuffles a stream otherwise
        settings["loader processes"] = min(args.dataloader_num_workers, 1)
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["--max_train_steps"] = args.max_train_steps  # by which the rate falls
    return settings


# Copied from train_sspo_sd.fingerprint
def fingerprint(modules):
    """A hash of about a hundred numbers of each tensor: tells another model's weights apart, and is always cheap."""
    digest = hashlib.sha256()
    for weight in itertools.chain(*((*module.parameters(), *module.buffers()) for module in modules)):
        some = weight.detach().flatten()[:: max(weight.numel() // 64, 1)]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# Copied from train_sspo_sd.list_checkpoints
def list_checkpoints(output_dir):
    """{number of updates: path} of the checkpoints in output_dir, oldest first. A folder that is there is complete."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return dict(sorted((int(path.name.split("-")[1]), path) for path in found))


# Copied from train_sspo_sd.damaged
def damaged(checkpoint, error, args):
    """The UserError for a checkpoint that cannot be read: it names the next older one."""
    names = [path.name for path in list_checkpoints(args.output_dir).values()]
    older = names[: names.index(checkpoint.name)] if checkpoint.name in names else names
    advice = f"try --resume_from_checkpoint {older[-1]}" if older else "restart in another --output_dir"
    return UserError(f"{checkpoint} is damaged ({one_line(error)}): {advice}")


# Copied from train_sspo_sd.find_checkpoint
def find_checkpoint(args):
    """
    The checkpoint to resume from and its record, or (None, None) for a new run.

    Raises UserError if it is not there or damaged, or if a new run would overwrite the results of an old one.
    """
    wanted, checkpoints = args.resume_from_checkpoint, list(list_checkpoints(args.output_dir).values())
    if wanted is None or (wanted == "latest" and not checkpoints):
        if checkpoints or any(Path(args.output_dir, name).exists() for name in RESULTS):
            advice = "resume it with --resume_from_checkpoint latest, or" if checkpoints else "it left no checkpoint:"
            raise UserError(
                f"--output_dir {args.output_dir} holds the results of another run: {advice} choose another folder"
            )
        if wanted == "latest":
            logger.info(f"{args.output_dir} has no checkpoint yet: this is a new run.")
        return None, None
    if wanted == "latest":
        checkpoint = checkpoints[-1]
    else:
        places = (Path(wanted), Path(args.output_dir, wanted))
        checkpoint = next((path for path in places if path.is_dir()), None)
        if checkpoint is None:
            raise UserError(f"--resume_from_checkpoint {wanted} does not exist, here or in --output_dir")
    try:
        return checkpoint, json.loads((checkpoint / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise damaged(checkpoint, error, args) from error


# Copied from train_sspo_sd.check_settings
def check_settings(checkpoint, record, settings):
    """Raises UserError if this checkpoint was made with others of these settings."""
    for name, value in settings.items():
        if record["settings"].get(name, value) != value:
            raise UserError(
                f"{checkpoint} was made with {name} {record['settings'][name]}, not {value}: resume with that, or "
                "restart in another --output_dir"
            )


# Copied from train_sspo_sd.load_checkpoint
def load_checkpoint(accelerator, models, checkpoint, args):
    """Reads what save_checkpoint wrote. Pickles are read for their tensors alone: code in them is refused, not run."""
    try:
        load_denoiser(models.denoiser, args, checkpoint)
        accelerator.load_state(checkpoint)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever torch, safetensors and diffusers say to damaged files
        raise damaged(checkpoint, error, args) from error
    accelerator.step = 0  # it counts micro-batches, and the accumulation may have changed


# Copied from train_sspo_sd.save_checkpoint
def save_checkpoint(accelerator, models, args, record):
    """
    Writes checkpoint-N beside its place and renames it, then deletes those past --checkpoints_total_limit.

    (accelerate's automatic naming deletes the oldest first and writes in place.) Every process takes part: each keeps
    its own random state.
    """
    final = Path(args.output_dir, f"checkpoint-{record['step']}")
    partial = final.with_suffix(".partial")
    try:
        if accelerator.is_main_process:
            save_denoiser(models.denoiser, args, partial)
        accelerator.save_state(partial)  # optimizer, schedule, scaler: accelerate was never given the model
    except RuntimeError as error:  # torch.save raises it when the disk is full
        if type(error) is not RuntimeError:  # a subclass: out of memory, or another process failed
            raise
        raise OSError(f"{partial} cannot be written, is the disk full? {one_line(error)}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "run.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        if args.checkpoints_total_limit is not None:
            for old in list(list_checkpoints(args.output_dir).values())[: -args.checkpoints_total_limit]:
                leftover = old.with_suffix(".partial")  # so that half of a checkpoint never passes for one
                os.replace(old, leftover)
                shutil.rmtree(leftover)
        logger.info(f"Saved {final}.")
    accelerator.wait_for_everyone()


# Copied from train_sspo_sd.clean_up
def clean_up(output_dir, step):
    """
    Prepares output_dir for the run: deletes half-written files, and the checkpoints and lines of metrics.jsonl that
    come after `step`; for a new run (step 0) also an old replay bank.
    """
    for made, checkpoint in list_checkpoints(output_dir).items():
        if made > step:  # `latest` would take it at the next restart
            logger.info(f"{checkpoint} came after the one that is resumed from, and is deleted.")
            os.replace(checkpoint, checkpoint.with_suffix(".partial"))
    ours = ("*.partial", "replay/**/*.partial", "cache/**/*.partial")
    for leftover in [path for pattern in ours for path in Path(output_dir).glob(pattern)]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)  # its folder may be gone
    if step == 0:
        shutil.rmtree(Path(output_dir, "replay"), ignore_errors=True)
    metrics = Path(output_dir, "metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("}\n")]  # the last one may be half written
    partial = metrics.with_suffix(".partial")
    partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
    os.replace(partial, metrics)


# Copied from train_sspo_sd.write_metrics
def write_metrics(args, metrics):
    """Appends a line. What is not finite (grad_norm when fp16 overflows) becomes null: JSON has no infinity."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with Path(args.output_dir, "metrics.jsonl").open("a") as file:
        file.write(json.dumps(finite) + "\n")


# Copied from train_sspo_sd.SECOND_SIGNAL
SECOND_SIGNAL = 3.0  # seconds


# Copied from train_sspo_sd.catch_signals
@contextmanager
def catch_signals(accelerator):
    """
    Yields a function that returns the signal received so far (SIGTERM, SIGINT or SIGHUP), or 0: a collective call,
    with the same answer on every process.

    A second signal ends the process, as signals otherwise do, but not within SECOND_SIGNAL seconds of the first: where
    a cluster signals every process, the launcher hands its own on to those that have had one.
    """
    caught, numbers = [0, 0.0], [signal.SIGTERM, signal.SIGINT]  # which, and when
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)

    def receive(number, frame):
        if caught[0] == 0:
            caught[:] = number, time.monotonic()
        elif time.monotonic() - caught[1] > SECOND_SIGNAL:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield lambda: int(accelerator.gather(torch.tensor(float(caught[0]), device=accelerator.device)).max())
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# ------------------------------------------------------------------------------------------------------------------
# Validation and result
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.draw_samples
@torch.no_grad()
def draw_samples(models, prompts, negative_prompt, args, accelerator):
    """
    Pictures of the validation prompts, by the rivals' sampler and always from the same noise.

    Returns:
        --num_validation_images rows, each a list of what decode_latents gives, one for each of `prompts`.
    """
    device, home, pictures = accelerator.device, models.vae.device, []
    models.vae.to(device)  # it may rest on the CPU, if the winners' latents are cached
    places = [(prompt, image) for image in range(args.num_validation_images) for prompt in range(len(prompts))]
    for start in range(0, len(places), args.rollout_batch_size):
        piece = places[start : start + args.rollout_batch_size]
        rows = [{**uncropped(args), **prompts[prompt]} for prompt, _ in piece]
        noise = keyed_noise("validation", args.seed, piece, latent_shape(models, args))
        with stock_precision(models, accelerator.autocast):
            latents = self_sample(
                models.denoiser,
                rollout_scheduler(models, args),
                noise.to(device, rollout_dtype(models, args)),
                collate_condition(rows, device),
                collate_condition([{**row, **negative_prompt} for row in rows], device),
                args.rollout_steps,
                args.validation_guidance_scale,
            )
        pictures += [decode_latents(models, one) for one in latents.split(1)]
    models.vae.to(home)
    return [pictures[i : i + len(prompts)] for i in range(0, len(pictures), len(prompts))]


# Copied from train_sspo_sd.licence
def licence(args):
    """The licence in the base's model card, which binds models derived from it too; {} if none can be read."""
    base = Path(args.pretrained_model_name_or_path)
    try:
        data = ModelCard.load(base / "README.md" if base.exists() else str(base)).data.to_dict()
    except Exception:  # no hub, no network, no valid card
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name)}


# Copied from train_sspo_sd.write_model_card
def write_model_card(args, step, directory):
    """README.md: what this model is, the command that made it, how to load it, and its last samples."""
    base, name = args.pretrained_model_name_or_path, args.hub_model_id or Path(args.output_dir).resolve().name
    method = "SSPO (Self-Sampling Preference Optimization, arXiv 2410.05255)"
    method = f"supervised fine-tuning, the baseline of {method}" if args.loss_type == "sft" else method
    data = ModelCardData(
        library_name="diffusers",
        base_model=None if Path(base).exists() else base,  # the hub takes names of repositories only
        tags=[*TAGS, args.loss_type, *(["lora"] if args.train_mode == "lora" else [])],
        **licence(args),
    )
    samples, picture = "No validation prompts were given.", f"samples/step-{step}.{SAMPLES}"
    if args.validation_prompts and Path(args.output_dir, picture).exists():
        captions = "; ".join(args.validation_prompts)
        samples = f"Above the base, below this model, from the same seeds: {captions}.\n\n![samples]({picture})"
    command = shlex.join(["accelerate", "launch", Path(sys.argv[0]).name, *sys.argv[1:]])
    text = f"# {name}\n\n{base}, aligned in {step} updates by {method}, train mode {args.train_mode}.\n\n"
    text += f"```python\n{usage(args, name)}\n```\n\n## Samples\n{samples}\n\n## Command\n```bash\n{command}\n```\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(Path(directory, "README.md"))


# Copied from train_sspo_sd.write_result
def write_result(models, args, step):
    """
    Puts the result and its model card into output_dir, in place of an older one.

    Both are written to a temporary folder first. The file that makes a loader recognise a result (see RESULTS) is
    deleted first and moved last, so that neither half a result nor a mixture of two ever passes for one.
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


# Copied from train_sspo_sd.open_repository
def open_repository(args):
    """
    The name of the hub's repository for --push_to_hub, made if it is missing, with the login of the machine or
    HF_TOKEN. Raises UserError if the hub refuses: now, and not when the run is over.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # from the hub, the network or the token
        raise UserError(f"--push_to_hub cannot use the repository {name}: {one_line(error)}") from error


# Copied from train_sspo_sd.push_to_hub
def push_to_hub(args):
    """Uploads the result. Raises UserError if the hub does not take it."""
    try:
        upload_folder(
            repo_id=args.hub_model_id,
            folder_path=args.output_dir,
            commit_message="SSPO training",
            ignore_patterns=["checkpoint-*", "replay/*", "cache/*", "logs/*"],
        )
    except Exception as error:  # as above
        raise UserError(
            f"the result is in {args.output_dir}, but the hub did not take it: {one_line(error)}"
        ) from error


# ------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.make_accelerator
def make_accelerator(args):
    """Accelerate and the loggers. Raises UserError where accelerate is configured for what was never tried."""
    # PyTorch's first loss scale for fp16, 2^16, suits a plain denoising error. This loss starts beta/4 times as steep:
    # its first gradients would overflow, and every skipped update wastes its sampling.
    steepness = max(args.beta_dpo / 4, 1) if args.loss_type == "sspo" else 1
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, "logs"))),
            step_scheduler_with_optimizer=False,  # else a schedule would run faster on more processes
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(hours=3)),  # the others wait for validation
                GradScalerKwargs(init_scale=2.0 ** round(16 - math.log2(steepness))),
            ],
        )
    except ValueError as error:
        raise UserError(f"accelerate cannot start: {one_line(error)}") from error
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}, with which the replay bank was never "
            "run: configure data parallel (MULTI_GPU); --use_8bit_adam and --optimizer adafactor save memory"
        )
    logging.basicConfig(format="%(asctime)s - %(name)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


# Copied from train_sspo_sd.check_output_dir
def check_output_dir(args, accelerator):
    """
    Raises UserError, on every process, unless all can write to one and the same --output_dir: bank, cache and
    checkpoints are written by some processes and read by others.
    """
    (token,) = broadcast_object_list([uuid.uuid4().hex])
    probe = Path(args.output_dir, f"{token}.partial")
    try:
        probe.mkdir(parents=True, exist_ok=True)
        Path(probe, str(accelerator.process_index)).touch()
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} cannot be written: {error.strerror}") from error
    accelerator.wait_for_everyone()
    seen = len(list(probe.iterdir()))
    accelerator.wait_for_everyone()
    shutil.rmtree(probe, ignore_errors=True)
    if seen < accelerator.num_processes:
        raise UserError(
            f"--output_dir {args.output_dir} is not the same folder for all processes: name one on a disk that all "
            "machines share"
        )


# Copied from train_sspo_sd.prepare_denoiser
def prepare_denoiser(models, args, device):
    """
    Makes the policy trainable: an adapter on the frozen denoiser, or its own weights.

    It stays in eval mode: no layer needs train mode, and dropout in the policy alone would bias the switch. The
    adapter, and so the reference, is in fp32: a reference in half precision would put rounding noise in the gaps.
    """
    denoiser = models.denoiser.to(device)
    if args.train_mode == "lora":
        config = LoraConfig(
            r=args.rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=lora_targets(args)
        )
        try:
            denoiser.add_adapter(config, adapter_name=POLICY)
        except ValueError as error:
            raise UserError(f"--lora_layers {args.lora_layers} fits no layer: {one_line(error)}") from error
        cast_training_params(denoiser, torch.float32)
        adapted = {f".{name}": part for name, part in denoiser.named_modules() if isinstance(part, BaseTunerLayer)}
        for layer in map(str.strip, args.lora_layers.split(",") if args.lora_layers else ()):
            if not any(name.endswith(f".{layer}") for name in adapted):  # a misspelt one among others
                raise UserError(f"--lora_layers {args.lora_layers}: {layer} fits no layer")
        models.adapted_layers = list(adapted.values())
        for layer in models.adapted_layers:
            layer.cast_input_dtype_enabled = False  # peft would cast inputs to fp32, and autocast cast them back
    else:
        for parameter in trained_in_full(denoiser):
            parameter.requires_grad_(True)
    if args.enable_xformers_memory_efficient_attention:
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except Exception as error:  # what its probe raises where it was built for another torch, CUDA or card
            raise UserError(
                f"xformers does not run here ({one_line(error)}): see requirements-xformers.txt, or drop "
                "--enable_xformers_memory_efficient_attention: PyTorch's own attention saves memory too"
            ) from error
    if args.gradient_checkpointing:
        checkpoint_gradients(denoiser)
    denoiser.eval()


# Copied from train_sspo_sd.stock_precision
@contextmanager
def stock_precision(models, autocast):
    """
    In this context the denoiser runs as in the stock pipeline: without autocast, with the LoRA adapters cast to the
    base's precision, once for all steps of a sample. The parameters that the optimizer holds are not touched.

    In full mode it runs under autocast instead: its weights are fp32.
    """
    places = [(layer, part[POLICY]) for layer in models.adapted_layers for part in (layer.lora_A, layer.lora_B)]
    trained = [part.weight for _, part in places]
    try:
        for layer, part in places:
            part.weight = torch.nn.Parameter(part.weight.to(layer.weight.dtype), requires_grad=False)
        with nullcontext() if places else autocast():
            yield
    finally:
        for (_, part), weight in zip(places, trained):
            part.weight = weight


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
    """Makes `weights`, an entry of the replay bank, the reference. If they are LoRA's base, models.reference is {}."""
    if args.train_mode == "lora":
        adapted = any(weight.any() for name, weight in weights.items() if "lora_B" in name)
        weights = {f"{k.removesuffix('weight')}{POLICY}.weight": v for k, v in weights.items()} if adapted else {}
    models.reference, device = None, models.denoiser.device  # frees the old reference's memory first
    parameters = dict(models.denoiser.named_parameters())
    models.reference = {parameters[name]: weight.to(device) for name, weight in weights.items()}


# Copied from train_sspo_sd.make_optimizer
def make_optimizer(parameters, args):
    """The optimizer and its schedule, which is stepped once an update."""
    if args.optimizer == "adafactor":
        options = dict(weight_decay=args.adam_weight_decay, scale_parameter=False, relative_step=False)
        optimizer = transformers.Adafactor(parameters, lr=args.learning_rate, **options)
    else:
        adamw = torch.optim.AdamW
        if args.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit as adamw
        optimizer = adamw(
            parameters,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
    steps = dict(num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps)
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, **steps, num_cycles=args.lr_num_cycles)


# Copied from train_sspo_sd.check_finite
def check_finite(step, metrics, args, accelerator):
    """Raises UserError before a bad step is taken. In fp16 an overflow is normal: the scaler skips it."""
    rescued = accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1
    if math.isfinite(metrics["loss"]) and (math.isfinite(metrics["grad_norm"]) or rescued):
        return
    names = ("loss", "grad_norm", "gap/winner", "gap/rival")
    told = ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    good = [str(path) for path in list_checkpoints(args.output_dir).values()]
    raise UserError(
        f"update {step} is not finite ({told}); the last good checkpoint is {good[-1] if good else 'none'}: resume "
        "from it if the hardware may be at fault, otherwise restart in another --output_dir with a lower "
        f"--learning_rate or --beta_dpo{', or in bf16' if accelerator.mixed_precision == 'fp16' else ''}"
    )


# Copied from train_sspo_sd.main
def main(args):
    check_environment(args)
    accelerator = make_accelerator(args)
    check_output_dir(args, accelerator)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = open_repository(args)
    device, autocast, sspo = accelerator.device, accelerator.autocast, args.loss_type == "sspo"
    winners = Winners(args)
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(winners) / global_batch)

    checkpoint, record = broadcast_object_list([*find_checkpoint(args)])  # another machine's disk may lag behind
    settings = run_settings(args, accelerator, winners, global_batch)
    bank = ReplayBank(Path(args.output_dir, "replay"), args.replay_size, args.reference, args.seed)
    if checkpoint is None:
        record = {"step": 0, "cursor": (0, 0)}
    else:
        check_settings(checkpoint, record, settings)
        for index in bank.live(record["step"] // args.replay_steps + 1) if sspo else ():
            if not bank.path(index).exists():
                raise UserError(f"{bank.path(index)} is missing: {checkpoint} needs it to resume")
    accelerator.wait_for_everyone()  # all have looked at the folder before anything is written into it

    set_seed(args.seed)  # for the adapters' first weights; every other draw is keyed
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    models = load_models(args, dtype)
    settings["base weights"] = fingerprint([*models.encoders, models.denoiser])
    if checkpoint is not None:
        check_settings(checkpoint, record, settings)
    record["settings"] = settings
    prepare_denoiser(models, args, "cpu")  # not on the accelerator yet: with --cache_latents the encoders leave first
    for module in models.encoders:
        module.to(device)
    empty_prompt, negative_prompt = encode_empty(models, args)
    validating = bool(args.validation_prompts) and accelerator.is_main_process
    if validating:
        prompts = encode_prompt(models, args.validation_prompts)
    load, encode = winners.load, functools.partial(encode_examples, models)
    if args.cache_latents:
        cache = LatentCache(args, winners, key=(str(dtype), settings["base weights"]))
        cache.fill(models, accelerator)
        load, encode = cache.load, list  # cached examples are already encoded
        models.vae.to("cpu")
    # The model skips accelerator.prepare: autocast is entered explicitly, and the loop below averages the gradients.
    policy = models.denoiser.to(device)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer, schedule = accelerator.prepare(*make_optimizer(trained, args))
    if validating:  # before a checkpoint is loaded: the policy is still the base
        base_samples = draw_samples(models, prompts, negative_prompt, args, accelerator)
    stream = WinnerStream(
        load, winners, args, accelerator.process_index, accelerator.num_processes, tuple(record["cursor"])
    )
    loader = make_loader(stream, args)
    kept_rivals = RivalCache(bank, args, accelerator.process_index)
    if checkpoint is not None:
        load_checkpoint(accelerator, models, checkpoint, args)
    if accelerator.is_main_process:
        clean_up(args.output_dir, record["step"])
        if sspo and checkpoint is None:
            bank.push(0, policy_weights(models, args))
    if args.report_to != "none":
        config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers(args.tracker_project_name, config=config)
    known = "a stream of" if args.streaming else len(winners)
    ties = f" ({winners.ties} ties dropped)" if winners.ties else ""
    begins = "a new run" if checkpoint is None else f"resumed from {checkpoint}"
    logger.info(f"{known} winners{ties}; {args.max_train_steps} updates of {global_batch} pairs; {begins}.")

    step = saved = record["step"]
    reference_index = None
    group = args.rollout_batch_size // args.train_batch_size  # micro-batches whose rivals are sampled at once
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="updates", disable=not accelerator.is_local_main_process
    )
    accelerator.wait_for_everyone()  # for the samples of the base: a signal still ends at once who waits here
    with catch_signals(accelerator) as signalled, progress:
        while not (stopped := signalled()):  # all processes meet here, so all can read what the main one has written
            due = step > 0 and (step % args.validation_steps == 0 or step == args.max_train_steps)
            if args.validation_prompts and due:  # first in the loop: a run that is killed here repeats it when resumed
                if validating:
                    policy_samples = draw_samples(models, prompts, negative_prompt, args, accelerator)
                    rows = [row for pair in zip(base_samples, policy_samples) for row in pair]
                    write_samples(rows, args, step, accelerator.trackers)
                if step < args.max_train_steps and (stopped := signalled()):  # drawing may have taken minutes
                    break
            if step >= args.max_train_steps:
                break
            started, rollout_time, totals = time.perf_counter(), 0.0, {}

            # 1. Replay: an iteration takes its reference from the policy's past.
            iteration = step // args.replay_steps + 1
            if sspo and bank.draw(iteration) != reference_index:
                reference_index = bank.draw(iteration)
                load_reference(models, bank.load(reference_index), args)

            for first in range(0, args.gradient_accumulation_steps, group):
                examples = []
                for _ in range(min(group, args.gradient_accumulation_steps - first)):
                    loaded, record["cursor"] = next(loader)
                    examples += encode(loaded)
                batch = collate(examples, empty_prompt, args, device, negative_prompt)

                # 2. Self-sample: the reference draws the rivals.
                if sspo and args.rivals == "self":
                    rollout_started = time.perf_counter()
                    if args.rivals_per_winner is None:
                        batch["rival"] = sample_rivals(models, batch, args, autocast)
                    else:
                        batch["rival"] = kept_rivals.sample(reference_index, models, batch, autocast)
                    if device.type == "cuda":
                        torch.cuda.synchronize()  # a sync per rollout, else its time would count as the update's
                    rollout_time += time.perf_counter() - rollout_started

                for micro_batch in micro_batches(batch, args.train_batch_size):
                    with accelerator.accumulate(policy):
                        # 3. Errors, 4. switch, 5. loss.
                        loss, parts = training_loss(policy, models, micro_batch, args, autocast)
                        accelerator.backward(loss)  # which divides it by gradient_accumulation_steps
                        for name, value in {"loss": loss.detach(), **parts}.items():
                            totals[name] = totals.get(name, 0) + value / args.gradient_accumulation_steps
                        if accelerator.sync_gradients:
                            if accelerator.num_processes > 1:  # DistributedDataParallel would keep each gradient twice
                                for gradient in [weight.grad for weight in trained if weight.grad is not None]:
                                    torch.distributed.all_reduce(gradient.div_(accelerator.num_processes))
                            norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                            means = accelerator.reduce(torch.stack([*totals.values()]), "mean").tolist()
                            metrics = dict(zip(totals, means))
                            metrics |= {"lr": schedule.get_last_lr()[0], "grad_norm": float(norm)}
                            check_finite(step + 1, metrics, args, accelerator)
                        optimizer.step()
                        optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()

            step += 1
            record["step"] = step
            if sspo:
                metrics["reference/index"] = reference_index
            metrics |= {"time/rollout": rollout_time, "time/update": time.perf_counter() - started}
            if accelerator.is_main_process:
                write_metrics(args, {"step": step, **metrics})
            accelerator.log(metrics, step=step)
            shown = {"loss": "loss", "dpo": "dpo_fraction", "gap_w": "gap/winner", "gap_r": "gap/rival"}
            progress.set_postfix({k: f"{metrics[v]:.3g}" for k, v in shown.items() if v in metrics})
            progress.update()

            # 1. Replay: at the end of an iteration the policy joins its past.
            pushing = sspo and step % args.replay_steps == 0 and accelerator.is_main_process
            if pushing:
                bank.push(iteration, policy_weights(models, args))
            if step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, models, args, record)
                saved = step
            if pushing:  # after saving, which may have deleted the last checkpoint that needed an entry
                bank.evict([made // args.replay_steps + 1 for made in (step, *list_checkpoints(args.output_dir))])
        if stopped and saved != step:
            save_checkpoint(accelerator, models, args, record)

    if stopped:
        logger.info(f"Stopped by a signal; --resume_from_checkpoint latest resumes after update {step}.")
    elif accelerator.is_main_process:
        write_result(models, args, step)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if stopped:
        sys.exit(128 + stopped)
    if args.push_to_hub and accelerator.is_main_process:  # which may take hours: nobody waits for it
        push_to_hub(args)


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        # From a loader process the message arrives inside a traceback, after the last occurrence of its class's name.
        message = re.split(r"(?:UserError|BadExample): ", str(error).strip())[-1]
        advice = ": fix it, or leave it out with --on_bad_example skip" if isinstance(error, BadExample) else ""
        sys.exit(f"{Path(__file__).name}: {message}{advice}")
    except RuntimeError as error:  # torch.OutOfMemoryError is one; cuDNN and cuBLAS raise it itself for full memory
        if not re.search("out of memory|unable to find an engine|_ALLOC_FAILED", str(error)):
            raise
        sys.exit(
            f"{Path(__file__).name}: out of memory: lower --rollout_batch_size, --draws_per_pair or, with more "
            "--gradient_accumulation_steps, --train_batch_size; or add --gradient_checkpointing, --cache_latents or "
            f"--split_pairs ({one_line(error)})"
        )
    except (OSError, SafetensorError) as error:  # a full or read-only disk: files are written beside their place
        sys.exit(f"{Path(__file__).name}: {one_line(error)}; fix it and add --resume_from_checkpoint latest")
    except KeyboardInterrupt:  # before there is anything to save, or the second one
        sys.exit(128 + signal.SIGINT)
