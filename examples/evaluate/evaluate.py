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
#     "av>=15,<19",
# ]
# ///
"""
Draws the same prompts with several models, from the same noise, scores the pictures, and compares each with the base.

    python examples/evaluate.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --model sspo=sspo-sd15 --model early=sspo-sd15/checkpoint-100 \
        --model sspo-sd15/replay/iteration-3.safetensors \
        --prompts partiprompts --max_prompts 200 --images_per_prompt 2 \
        --scorer pickscore --scorer hpsv2.1 --scorer mine=my_scorer.py:judge --output_dir evaluation

What is left in --output_dir:

    images/NAME/     the pictures of each model with their metadata.jsonl, so that the folder is an imagefolder
    results.json     settings, the scores of every picture, and the table
    index.html       one file that opens without a network: the pictures side by side, sorted by the difference of
                     their scores, and a blind comparison in which a person votes with the arrow keys

A picture's noise hangs on --seed, on the text of its prompt and on its number, never on the order of the prompts or on
the batch. Pictures that are there are not drawn again: a run that was stopped goes on where it was, and a model or a
prompt that is added costs its own pictures only. Scores are computed anew each time.

Models (--model [NAME=]PATH): whatever a training script leaves. An output_dir or a checkpoint-N, LoRA or full; an
entry of replay/; any pipeline or LoRA of diffusers, on disk or on the hub. With --motion_adapter_name_or_path all of
them are AnimateDiff's and draw clips.

Prompts (--prompts): a file with a prompt a line (.txt), or a column of .jsonl, .csv or .parquet; anything else that
datasets opens; or one of the sets that papers use: pickapic (Pick-a-Pic v2, validation_unique, 500), hpsv2 (the
benchmark of HPSv2, 3200) and partiprompts (1632).

Scorers (--scorer NAME[=WEIGHTS]), higher is better unless said otherwise:

    pickscore        PickScore v1 (arXiv 2305.01569), about 20 to 23
    hpsv2, hpsv2.1   Human Preference Score v2 and v2.1 (arXiv 2306.09341), times 100; the two are not comparable
    imagereward      ImageReward v1.0 (arXiv 2304.05977), about -2 to 2
    aesthetic        LAION's aesthetic predictor v2 (sac+logos+ava1), 1 to 10; does not look at the prompt
    clip             CLIP score: 100 x the cosine of prompt and picture, by CLIP ViT-L/14; below 0 it counts 0
    NAME=module:function or NAME=path.py:function
                     one of your own: function(pictures, prompts) is given two lists, PIL pictures and texts, and
                     returns a number for each picture, or a dict of such lists

Clips are scored frame by frame, and a clip's score is the mean of its frames. Against real clips (--reference_dir, a
folder of clips with metadata.jsonl or metadata.csv), for clips only:

    ssim, psnr, lpips  a clip against the real clip of the same caption (torchmetrics; lpips, lower is better, needs
                       torchvision too)
    fvd=NETWORK        Frechet distance of all clips to all real ones, lower is better, in the feature space of a
                       TorchScript file or a module:function that takes (clips, 3, frames, height, width) in 0..255 and
                       gives (clips, features). It means something only with many more clips than features

The table: mean; difference to the base; win rate against the base, where a tie is half a win. Both are means over
prompts of means over a prompt's pictures, with 95 % intervals by a paired bootstrap over the prompts.
"""

import argparse
import hashlib
import html
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import sys
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path

import av
import datasets
import diffusers
import huggingface_hub
import numpy as np
import torch
import transformers
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from PIL import Image, ImageOps, ImageSequence
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig


try:  # preprocessing by PIL, as the scorers' authors did it, whether torchvision is there or not
    from transformers import CLIPImageProcessorPil
except ImportError:  # before there were two of them
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


BASE = "base"  # what the base is called among the models
FRAMES_PER_SECOND = 8  # of clips
# Copied from train_sspo_video.NOISE_SCHEDULE
NOISE_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False)


# Copied from train_sspo_sd.UserError
class UserError(Exception):
    """Something the user can mend. Its message is one line: what is wrong, and what to do about it."""


def one_line(error):
    """What an exception says, short enough to be quoted in a UserError."""
    return " ".join(str(error).split())[:300] or type(error).__name__


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


def parse_args(argv=None):
    """Parses `argv` (default: the command line). Raises SystemExit(2) after one line on stderr for a wrong flag."""
    parser = OneLineParser("Draws prompts with several models from the same noise, scores and compares the pictures.")
    group = parser.add_argument_group("models")
    group.add_argument("--base", required=True, help="Hub name or folder of the base, which all are compared to.")
    group.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]PATH",
        help="A model to compare; may be given several times. What it may be is told at the top of this file.",
    )
    group.add_argument("--motion_adapter_name_or_path", help="The base's motion adapter: the models draw clips.")
    group.add_argument("--pretrained_vae_model_name_or_path", help="A VAE in place of the base model's own.")
    group.add_argument("--revision", help="Branch, tag or commit of the base model on the hub.")
    group.add_argument("--variant", help="Variant of the base model's files, for example fp16.")
    group.add_argument("--cache_dir", help="Where downloaded models and scorers are kept.")
    group.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        help="What the models predict, if the base's configuration says it wrongly.",
    )
    group.add_argument(
        "--lora_alpha",
        type=float,
        help="lora_alpha of a replay entry's run. Default: read from the run's LoRA files, which lie beside replay/.",
    )

    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts", required=True, help=f"File, hub name or local path of a data set, or {', '.join(PROMPT_SETS)}."
    )
    group.add_argument("--prompt_column", help="Default: the first that exists of prompt, Prompt, text, caption, txt.")
    group.add_argument("--prompt_split", help="Split of the data set. Default: the set's own, or train.")
    group.add_argument("--max_prompts", type=int, help="Use only the first so many different prompts.")

    group = parser.add_argument_group("pictures")
    group.add_argument("--images_per_prompt", type=int, default=1, help="Pictures of each prompt, a model.")
    group.add_argument("--seed", type=int, default=0, help="Of the pictures' noise, and of the bootstrap. Default: 0.")
    group.add_argument("--num_inference_steps", type=int, default=20, help="Sampler steps.")
    group.add_argument(
        "--guidance_scale", type=float, help="Guidance; 1 or less means none. Default: 7.5; SDXL 5.0, clips 8.0."
    )
    group.add_argument("--scheduler", choices=["dpmsolver", "ddim"], default="dpmsolver", help="The sampler.")
    group.add_argument("--height", type=int, help="Height, in pixels. Default: the base's own; clips 256.")
    group.add_argument("--width", type=int, help="Width, in pixels. Default: the base's own; clips 256.")
    group.add_argument("--num_frames", type=int, default=16, help="Frames of a clip.")
    group.add_argument(
        "--dtype", choices=["fp32", "fp16", "bf16"], help="Precision of the models. Default: fp16 on CUDA, else fp32."
    )
    group.add_argument("--batch_size", type=int, default=8, help="Pictures drawn, and scored, at once.")

    group = parser.add_argument_group("scores")
    group.add_argument(
        "--scorer",
        action="append",
        metavar="NAME[=WEIGHTS]",
        help="A score; may be given several times. Which there are is told at the top of this file.",
    )
    group.add_argument("--reference_dir", help="Real clips with captions, for ssim, psnr, lpips and fvd.")
    group.add_argument(
        "--frame_stride",
        type=int,
        default=4,
        help="Of a real clip, every so many-th frame is taken. 0: as many as are needed, spread over the whole clip.",
    )
    group.add_argument("--bootstrap_samples", type=int, default=10_000, help="Resamples behind an interval.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="evaluation", help="Where all that is made is written.")
    group.add_argument(
        "--page_resolution", type=int, default=384, help="Longest side, in pixels, of the pictures in index.html."
    )
    group.add_argument(
        "--page_images", type=int, help="Pictures of each prompt in index.html, a model. Default: all of them."
    )
    args = parser.parse_args(argv)
    try:
        check_args(args)
    except UserError as error:
        parser.error(str(error))
    return args


def check_args(args):
    """Raises UserError for values that no run can use, and turns --model and --scorer into what they name."""
    positive = "max_prompts images_per_prompt num_inference_steps height width num_frames batch_size lora_alpha "
    positive += "bootstrap_samples page_resolution page_images"
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be more than 0, not {value}")
    for name in ("height", "width"):
        if (getattr(args, name) or 8) % 8:
            raise UserError(f"--{name} must be a multiple of 8, not {getattr(args, name)}")
    if args.frame_stride < 0:
        raise UserError(f"--frame_stride must not be negative, not {args.frame_stride}")
    args.models = [named_model(text) for text in args.model or []]
    names = [BASE, *(name for name, _ in args.models)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name}: tell them apart with --model NAME=PATH")
    args.scorers = [scorer_spec(text) for text in args.scorer or []]
    names = [spec.name for spec in args.scorers]
    for spec in args.scorers:
        if names.count(spec.name) > 1:
            raise UserError(f"two scorers are called {spec.name}: tell them apart with --scorer NAME=module:function")
        if spec.name in AGAINST_REFERENCE and (args.reference_dir is None or args.motion_adapter_name_or_path is None):
            raise UserError(f"--scorer {spec.name} compares clips with real ones: it needs --reference_dir and clips")


def named_model(text):
    """(name, path) of --model [NAME=]PATH. Without a name, a model is called after its folders."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name or Path(text).exists():
        path = text
        parts = [part for part in Path(path).resolve().parts if part != "replay"]
        own = Path(parts[-1]).stem if parts[-1].endswith(".safetensors") else parts[-1]
        inside = re.fullmatch(r"(checkpoint|iteration)-\d+", own)  # says nothing without the run it belongs to
        name = f"{parts[-2]}-{own}" if inside else own
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"--model {text}: a name has letters, digits and . + - _ only")
    return name, path


# ------------------------------------------------------------------------------------------------------------------
# Random draws
# ------------------------------------------------------------------------------------------------------------------


# Copied from train_sspo_sd.keyed_generator
def keyed_generator(*key):
    """A CPU generator whose seed is a hash of `key` (strings and integers)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


# ------------------------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class PromptSet:
    """A set that papers use: what datasets.load_dataset is told, the split and the column."""

    source: str
    column: str
    split: str = "train"
    files: list = field(default_factory=list)


HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPT_SETS = {
    # The authors' own repositories are gone from the hub since 2025. This is a copy of v2.
    "pickapic": PromptSet("liuhuohuo2/pick-a-pic-v2", "caption", "validation_unique"),
    "hpsv2": PromptSet(
        "json", "text", files=[f"hf://datasets/zhwang/HPDv2/benchmark/{style}.json" for style in HPS_STYLES]
    ),
    "partiprompts": PromptSet("nateraw/parti-prompts", "Prompt"),
}
FILE_BUILDERS = {
    ".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"
}  # fmt: skip
PROMPT_COLUMNS = ["prompt", "Prompt", "text", "caption", "txt"]


def open_prompts(args):
    """The rows that --prompts names, as an iterable data set, and the column that its definition names, or None."""
    name, split, column = args.prompts, args.prompt_split, None
    path, files, options = Path(name), None, {}
    if name in PROMPT_SETS and not path.exists():
        known = PROMPT_SETS[name]
        name, split, column, files = known.source, split or known.split, known.column, known.files or None
    elif path.is_file():
        if path.suffix not in FILE_BUILDERS:
            raise UserError(f"--prompts {name} is not one of {', '.join(FILE_BUILDERS)}, nor a folder")
        name, files = FILE_BUILDERS[path.suffix], [str(path)]
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # made by save_to_disk
            dataset = datasets.load_from_disk(name)
            return dataset[split or "train"] if isinstance(dataset, dict) else dataset, None
        # As a stream: of a set with pictures, only one split and one column are read.
        dataset = datasets.load_dataset(
            name, split=split or "train", data_files=files, streaming=True, cache_dir=args.cache_dir, **options
        )
        return dataset, column
    except Exception as error:  # datasets raises nearly everything
        raise UserError(f"--prompts {args.prompts} cannot be opened: {one_line(error.__cause__ or error)}") from error


def load_prompts(args):
    """The different prompts, in the order of the set. Raises UserError if there are none, naming what is missing."""
    dataset, column = open_prompts(args)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    candidates = [args.prompt_column] if args.prompt_column else [column] if column else PROMPT_COLUMNS
    column = next((name for name in candidates if name in columns), None)
    if column is None:
        raise UserError(
            f"--prompts {args.prompts} has no column {' or '.join(candidates)}: it has {', '.join(columns)}; name the "
            "one to use with --prompt_column"
        )
    prompts = {}  # as an ordered set
    for row, example in enumerate(dataset.select_columns([column])):
        if not isinstance(example[column], str):
            raise UserError(f"--prompts {args.prompts}: column {column} of row {row} is {example[column]!r}, not text")
        if example[column].strip():
            prompts[example[column].strip()] = None
        if len(prompts) == args.max_prompts:
            break
    if not prompts:
        raise UserError(f"--prompts {args.prompts} has no prompt in it")
    return list(prompts)


@dataclass(frozen=True)
class Sample:
    """One picture or clip of a prompt, to be drawn by every model. `file`: its name in each model's folder."""

    prompt: str
    image: int
    file: str


def make_samples(prompts, args):
    """The samples of all prompts, a prompt's own together."""
    suffix = ".png" if args.motion_adapter_name_or_path is None else ".webp"
    samples = []
    for prompt in prompts:
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-")
        stem = f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:10]}".lstrip("-")
        samples += [Sample(prompt, i, f"{stem}-{i}{suffix}") for i in range(args.images_per_prompt)]
    return samples


# ------------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------------

LORA = "pytorch_lora_weights.safetensors"
PARTS = (
    r"(unet|vae|text_encoder|text_encoder_2|tokenizer|tokenizer_2|scheduler|motion_adapter)/[^/]+|model_index\.json"
)
# What a folder with this file in it is, in which of its folders the weights are, and which files they are.
PICTURE_KINDS = {
    "model_index.json": ("pipeline", None, PARTS),
    LORA: ("lora", None, re.escape(LORA)),
    "unet/config.json": ("unet", "unet", r"unet/.+"),  # in a checkpoint of a full run
    "config.json": ("unet", None, r"config\.json|diffusion_pytorch_model.*"),
}
CLIP_KINDS = {
    LORA: ("lora", None, re.escape(LORA)),
    "motion_adapter/config.json": ("adapter", "motion_adapter", r"motion_adapter/.+"),  # in a checkpoint likewise
    "config.json": ("adapter", None, r"config\.json|diffusion_pytorch_model.*"),
}


@dataclass(frozen=True)
class Model:
    """What --model names: `kind` is base, weights (a file) or one of those above; `fingerprint` is of its weights."""

    name: str
    path: str
    kind: str
    fingerprint: str
    subfolder: str | None = None


def file_names(path):
    """The names of the files in a folder or in a repository of the hub, relative to it, and of a folder's folders."""
    if Path(path).is_dir():
        return {file.relative_to(path).as_posix() for pattern in ("*", "*/*") for file in Path(path).glob(pattern)}
    return set(huggingface_hub.list_repo_files(path))


def find_model(name, path, args):
    """Tells what kind of model a path or a hub name is, without loading it. Raises UserError if it is none."""
    told = f"--model {name}={path}"
    if Path(path).is_file():
        if Path(path).suffix != ".safetensors":
            raise UserError(f"{told} is not a folder, nor a .safetensors file")
        return Model(name, path, "weights", fingerprint([path]))
    try:
        names = file_names(path)
    except Exception as error:  # a name that no hub has, no network, no access
        raise UserError(f"{told} is neither a file or folder here nor on the hub: {one_line(error)}") from error
    kinds = PICTURE_KINDS if args.motion_adapter_name_or_path is None else CLIP_KINDS
    for mark, (kind, subfolder, files) in kinds.items():
        if mark in names:
            return Model(name, path, kind, fingerprint_of(path, files), subfolder)
    saved = sorted(file for file in names if re.fullmatch(r"checkpoint-\d+", file))
    hint = f"; it has {', '.join(saved)}, which may be named" if saved else ""
    raise UserError(f"{told} holds no model: it has none of {', '.join(kinds)}{hint}")


def fingerprint_of(path, pattern):
    """The fingerprint of a folder's files that match `pattern`; a hub name stands for itself."""
    if not Path(path).is_dir():
        return path
    names = sorted(name for name in file_names(path) if re.fullmatch(pattern, name))
    return fingerprint([Path(path, name) for name in names if Path(path, name).is_file()])


def fingerprint(files):
    """A hash of the contents of files: pictures must not be taken for those of weights that were replaced since."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while piece := content.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]


def find_base(args):
    """
    The base as a Model. Settles the flags that hang on it: height, width, guidance and dtype.

    Raises:
        UserError: if the configurations of the base, or of its motion adapter, cannot be read.
    """
    source, motion = dict(revision=args.revision, cache_dir=args.cache_dir), args.motion_adapter_name_or_path
    reading = f"--base {args.base}"
    try:
        index = DiffusionPipeline.load_config(args.base, **source)
        unet = UNet2DConditionModel.load_config(args.base, subfolder="unet", **source)
        vae = AutoencoderKL.load_config(args.base, subfolder="vae", **source)
        if motion is not None:
            reading = f"--motion_adapter_name_or_path {motion}"
            longest = MotionAdapter.load_config(motion, cache_dir=args.cache_dir).get("motion_max_seq_length", 32)
            if args.num_frames > longest:
                raise ValueError(f"it takes {longest} frames at most: lower --num_frames {args.num_frames}")
    except (OSError, ValueError) as error:
        raise UserError(f"{reading} cannot be used: {one_line(error)}") from error
    own = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1) if motion is None else 256
    args.height, args.width = args.height or own, args.width or own
    if args.guidance_scale is None:
        args.guidance_scale = 8.0 if motion is not None else 5.0 if "XL" in index["_class_name"] else 7.5
    args.dtype = args.dtype or ("fp16" if torch.cuda.is_available() else "fp32")
    prints = [fingerprint_of(args.base, PARTS)]
    prints += [fingerprint_of(motion, CLIP_KINDS["config.json"][2])] if motion is not None else []
    return Model(BASE, args.base, BASE, " with ".join(prints))


def load_pipeline(model, args, device):
    """
    The pipeline that draws with `model`, on `device` and with --scheduler.

    Raises:
        UserError: naming the model that cannot be loaded.
    """
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    try:
        if args.motion_adapter_name_or_path is None:
            pipeline = picture_pipeline(model, args, dtype)
        else:
            pipeline = clip_pipeline(model, args, dtype)
        if model.kind == "lora":
            pipeline.load_lora_weights(model.path, weight_name=LORA, cache_dir=args.cache_dir)
        elif model.kind == "weights":
            load_weights(pipeline, model.path, args)
    except UserError:
        raise
    except Exception as error:  # of four libraries
        raise UserError(f"model {model.name}: {model.path} cannot be loaded: {one_line(error)}") from error
    pipeline.scheduler = make_scheduler(pipeline.scheduler, args)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def picture_pipeline(model, args, dtype):
    """The base, or the whole pipeline that `model` is, or the base with its unet."""
    options = dict(cache_dir=args.cache_dir, torch_dtype=dtype)
    if model.kind == "unet":
        options["unet"] = UNet2DConditionModel.from_pretrained(model.path, subfolder=model.subfolder, **options)
    if args.pretrained_vae_model_name_or_path is not None:
        options["vae"] = AutoencoderKL.from_pretrained(
            args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir, torch_dtype=dtype
        )
    path = args.base
    if model.kind == "pipeline":
        path = model.path
    else:
        options.update(revision=args.revision, variant=args.variant)
    index = DiffusionPipeline.load_config(path, cache_dir=args.cache_dir, revision=options.get("revision"))
    if "safety_checker" in index:
        options["safety_checker"] = None  # it would put black pictures in the place of some
    if "XL" in index["_class_name"]:
        options["add_watermarker"] = False
    return DiffusionPipeline.from_pretrained(path, **options)


def clip_pipeline(model, args, dtype):
    """AnimateDiff with the base's motion adapter, or with the one that `model` is."""
    options = dict(cache_dir=args.cache_dir, torch_dtype=dtype)
    adapter = model.path if model.kind == "adapter" else args.motion_adapter_name_or_path
    adapter = MotionAdapter.from_pretrained(adapter, subfolder=model.subfolder, **options)
    options.update(revision=args.revision, variant=args.variant)
    return AnimateDiffPipeline.from_pretrained(args.base, motion_adapter=adapter, **options)


def make_scheduler(scheduler, args):
    """The sampler of --scheduler on the model's noise schedule; motion adapters have one of their own."""
    config = dict(scheduler.config)
    if args.motion_adapter_name_or_path is not None:
        config = dict(DDPMScheduler(**NOISE_SCHEDULE, prediction_type=config.get("prediction_type", "epsilon")).config)
    if args.prediction_type is not None:
        config["prediction_type"] = args.prediction_type
    kind = {"dpmsolver": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}[args.scheduler]
    return kind.from_config(config)


def load_weights(pipeline, path, args):
    """Puts a .safetensors file in the pipeline: a replay entry of either train mode, or LoRA weights for pipelines."""
    weights, unet = load_file(path), pipeline.unet
    own = {name.split(".lora_")[0] for name in weights}
    if any(".lora_" in name for name in weights) and own <= {name for name, _ in unet.named_modules()}:
        add_adapter(unet, weights, path, args)
    elif any(".lora" in name for name in weights):
        pipeline.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name)
    else:
        unknown = set(weights) - set(unet.state_dict())
        if unknown:
            raise UserError(
                f"{path} does not fit the base: it has {len(unknown)} unknown weights, {min(unknown)} first"
            )
        unet.load_state_dict(weights, strict=False)


def add_adapter(unet, weights, path, args):
    """Adds the LoRA layers of a replay entry, which are named as peft does."""
    rank = next(weight.shape[0] for name, weight in weights.items() if name.endswith(".lora_A.weight"))
    targets = sorted({name.split(".lora_")[0] for name in weights})
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=find_alpha(path, args), target_modules=targets))
    set_peft_model_state_dict(unet, weights)


def find_alpha(path, args):
    """
    The lora_alpha of a replay entry, which does not hold it: from a LoRA file of its run.

    Raises:
        UserError: if the run has left none and --lora_alpha is not given.
    """
    if args.lora_alpha is not None:
        return args.lora_alpha
    run = Path(path).resolve().parent.parent
    for file in [run / LORA, *sorted(run.glob(f"checkpoint-*/{LORA}"))]:
        if file.is_file():
            with safe_open(file, "pt") as saved:
                told = json.loads((saved.metadata() or {}).get("lora_adapter_metadata", "{}"))
            if "unet.lora_alpha" in told:
                return told["unet.lora_alpha"]
    raise UserError(f"{path} does not tell its lora_alpha, and no {LORA} of its run lies in {run}: give --lora_alpha")


# ------------------------------------------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------------------------------------------


def noise_of(sample, shape, seed):
    """The noise that a sample starts from, standard normal in fp32, the same for every model and in any batch."""
    return torch.randn(shape, generator=keyed_generator("evaluate", seed, sample.prompt, sample.image))


def noise_shape(pipeline, args):
    """The shape of one sample's noise."""
    sides = (args.height // pipeline.vae_scale_factor, args.width // pipeline.vae_scale_factor)
    frames = () if args.motion_adapter_name_or_path is None else (args.num_frames,)
    return (pipeline.vae.config.latent_channels, *frames, *sides)


@torch.no_grad()
def draw(pipeline, prompts, noise, args):
    """
    Draws by the stock pipeline.

    Args:
        prompts: texts.
        noise: (len(prompts), ...) of noise_shape, standard normal.
    Returns:
        a PIL picture for each prompt, or for clips a list of them.
    """
    options = dict(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        output_type="pil",
    )
    noise = noise.to(pipeline.device, pipeline.unet.dtype)
    if args.motion_adapter_name_or_path is None:
        return pipeline(prompts, latents=noise, **options).images
    return pipeline(prompts, latents=noise, num_frames=args.num_frames, **options).frames


def draw_missing(model, samples, args, device):
    """Draws what is not yet in the model's folder."""
    folder = Path(args.output_dir, "images", model.name)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [sample for sample in samples if not (folder / sample.file).exists()]
    if missing:
        pipeline = load_pipeline(model, args, device)
        shape = noise_shape(pipeline, args)
        with tqdm(total=len(missing), desc=f"drawing {model.name}") as progress:
            for start in range(0, len(missing), args.batch_size):
                batch = missing[start : start + args.batch_size]
                noise = torch.stack([noise_of(sample, shape, args.seed) for sample in batch])
                drawn = draw(pipeline, [sample.prompt for sample in batch], noise, args)
                for sample, picture in zip(batch, drawn):
                    write_picture(picture, folder / sample.file)
                progress.update(len(batch))
    lines = [json.dumps({"file_name": sample.file, "text": sample.prompt}) for sample in samples]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_picture(picture, path):
    """Writes a picture as PNG or a clip as lossless animated WebP: beside its place, then renamed into it."""
    partial = path.with_suffix(".partial")
    if isinstance(picture, list):
        options = dict(format="webp", lossless=True, save_all=True, append_images=picture[1:], loop=0)
        picture[0].save(partial, duration=1000 // FRAMES_PER_SECOND, **options)
    else:
        picture.save(partial, format="png")
    os.replace(partial, path)


def read_picture(path):
    """What write_picture wrote: a picture, or for a clip the list of its frames."""
    with Image.open(path) as image:
        if path.suffix == ".png":
            return image.convert("RGB")
        frames = []
        for frame in ImageSequence.Iterator(image):
            picture = frame.convert("RGB")
            # The encoder writes a frame that repeats its predecessor as a longer predecessor.
            frames += [picture] * round(frame.info["duration"] * FRAMES_PER_SECOND / 1000)
        return frames


# What pictures hang on, beside the weights: those drawn otherwise must not be mixed with them.
PICTURE_SETTINGS = (
    "seed num_inference_steps guidance_scale scheduler height width num_frames dtype prediction_type lora_alpha "
    "variant revision pretrained_vae_model_name_or_path"
).split()


def check_settings(models, args):
    """
    Keeps in --output_dir how its pictures are drawn.

    Raises:
        UserError: naming the setting or the model, if pictures that are there were drawn otherwise.
    """
    folder, path = Path(args.output_dir), Path(args.output_dir, "pictures.json")
    settings = {name: getattr(args, name) for name in PICTURE_SETTINGS}
    prints = {model.name: model.fingerprint for model in models}
    if (folder / "images").is_dir():
        if not path.exists():
            raise UserError(
                f"{folder} has pictures, but no {path.name} that tells how they were drawn: use another folder"
            )
        before = json.loads(path.read_text())
        for name, value in settings.items():
            drawn = before["settings"].get(name)
            if drawn != value:
                raise UserError(
                    f"{folder} has pictures that were drawn with --{name} {drawn}, not {value}: draw these in another "
                    "--output_dir"
                )
        kept = {name: value for name, value in before["models"].items() if (folder / "images" / name).is_dir()}
        for name, value in prints.items():
            if kept.get(name, value) != value:
                mend = f"delete {folder / 'images' / name}, or give this one another name"
                raise UserError(
                    f"{folder} has pictures of another model called {name}, whose weights differ: "
                    + ("draw these in another --output_dir" if name == BASE else mend)
                )
        prints = kept | prints
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "models": prints}, indent=1))
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------------------------
# Scorers. Each is called with PIL pictures and their prompts and returns {name: one number for each picture}.
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScorerSpec:
    """What --scorer names: `where` are its weights, or module:function."""

    name: str
    where: str | None


def scorer_spec(text):
    """The ScorerSpec of --scorer NAME[=WHERE], or of module:function alone, which is called after the function."""
    name, _, where = text.partition("=")
    if name in (*SCORERS, *AGAINST_REFERENCE):
        if name == "fvd" and not where:
            raise UserError("--scorer fvd needs the network that gives its features: --scorer fvd=NETWORK")
        return ScorerSpec(name, where or None)
    name, where = (name, where) if where else (text.rpartition(":")[2], text)
    if ":" not in where:
        raise UserError(
            f"--scorer {text} is none of {', '.join([*SCORERS, *AGAINST_REFERENCE])}, and no module:function either"
        )
    return ScorerSpec(name, where)


def load_function(where):
    """The function that module:function or path.py:function names. Raises UserError if it is not there."""
    module, _, name = where.rpartition(":")
    try:
        if module.endswith(".py"):
            sys.path.insert(0, str(Path(module).resolve().parent))  # for what it imports from beside itself
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            sys.path.insert(0, os.getcwd())
            loaded = importlib.import_module(module)
        return getattr(loaded, name)
    except Exception as error:  # whatever a user's module raises
        raise UserError(f"{where} cannot be imported: {type(error).__name__}: {one_line(error)}") from error


class FunctionScorer:
    """A scorer of the user's own."""

    def __init__(self, name, function):
        self.name, self.function = name, function

    def __call__(self, pictures, prompts):
        values = self.function(pictures, prompts)
        if isinstance(values, dict):
            return {f"{self.name}/{key}": list(map(float, value)) for key, value in values.items()}
        return {self.name: list(map(float, values))}


class ClipScorer:
    """
    The cosine of prompt and picture under a CLIP model, times `scale` (None: the model's own temperature).

    letterbox: the picture is fitted in with black bars, where CLIP itself crops the middle.
    floor: the least score.
    """

    def __init__(self, name, model, source, device, scale=None, letterbox=False, floor=-math.inf, cache_dir=None):
        self.name, self.model, self.device = name, model.eval().to(device), device
        self.tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir)
        self.processor = CLIPImageProcessorPil.from_pretrained(source, cache_dir=cache_dir)
        self.scale, self.letterbox, self.floor = scale, letterbox, floor

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        if self.letterbox:
            side = self.processor.crop_size["height"]
            pictures = [ImageOps.pad(picture, (side, side), Image.Resampling.BICUBIC) for picture in pictures]
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        output = self.model(**tokens.to(self.device), pixel_values=pixels.to(self.device))
        scale = self.model.logit_scale.exp() if self.scale is None else self.scale
        scores = scale * (output.image_embeds * output.text_embeds).sum(1)
        return {self.name: scores.clamp(min=self.floor).tolist()}


HPS_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model that PickScore and HPSv2 were trained from


def beside(weights, mark, default):
    """The folder of local weights, where it also holds the file `mark`; else `default`."""
    folder = Path(weights or "") if Path(weights or "").is_dir() else Path(weights or "").parent
    return str(folder) if weights and (folder / mark).is_file() else default


def load_clip(name, weights, device, cache_dir):
    """PickScore and the CLIP score, whose weights are transformers' own."""
    default, processor, options = {
        "pickscore": ("yuvalkirstain/PickScore_v1", CLIP_H, {}),
        "clip": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", dict(scale=100, floor=0)),
    }[name]
    model = CLIPModel.from_pretrained(weights or default, cache_dir=cache_dir)
    source = beside(weights, "preprocessor_config.json", processor)
    return ClipScorer(name, model, source, device, cache_dir=cache_dir, **options)


def load_hps(name, weights, device, cache_dir):
    """
    HPSv2 or v2.1 from their authors' files, which open_clip wrote, in transformers' CLIPModel.

    `weights`: that file, or a folder with it. Where the folder also holds the model's configuration, its tokenizer and
    its preprocessing, they are taken from there.
    """
    file = HPS_FILES[name]
    if weights is None:
        path = huggingface_hub.hf_hub_download("xswu/HPSv2", file, cache_dir=cache_dir)
    else:
        path = Path(weights, file) if Path(weights).is_dir() else Path(weights)
    source = beside(weights, "config.json", CLIP_H)
    model = CLIPModel(CLIPConfig.from_pretrained(source, cache_dir=cache_dir))
    model.load_state_dict(from_open_clip(load_tensors(path)))
    return ClipScorer(name, model, source, device, scale=100, letterbox=True, cache_dir=cache_dir)


def load_tensors(path):
    """The tensors of a .safetensors file, or of a .pt file that holds nothing else."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved.get("state_dict", saved)


def rename(weights, rules):
    """A state dict whose names went through `rules`, pairs of a regular expression and what takes its place."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    return renamed


OPEN_CLIP_RULES = [
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_(1|2)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
]


def from_open_clip(weights):
    """The state dict of transformers' CLIPModel from that of open_clip's CLIP."""
    converted = {}
    for name, weight in rename(weights, OPEN_CLIP_RULES).items():
        if name.endswith("_projection.weight"):
            weight = weight.T.contiguous()
        if ".in_proj_" in name:
            for letter, part in zip("qkv", weight.chunk(3)):
                converted[name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        elif name != "attn_mask":
            converted[name] = weight
    return converted


def scoring_head(width):
    """The layers that the aesthetic predictor and ImageReward end with. Dropout is inactive when scoring."""
    widths = [width, 1024, 128, 64, 16, 1]
    layers = []
    for i, (before, after) in enumerate(zip(widths, widths[1:])):
        layers += [torch.nn.Linear(before, after)] + ([torch.nn.Dropout(0.2)] if i < 3 else [])
    return torch.nn.Sequential(*layers)


class AestheticPredictor(CLIPVisionModelWithProjection):
    """CLIP's picture encoder with a head that tells how much people like a picture. In transformers' layout."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = scoring_head(config.projection_dim)
        self.post_init()


class AestheticScorer:
    """LAION's aesthetic predictor v2 (github.com/christophschuhmann/improved-aesthetic-predictor)."""

    def __init__(self, name, weights, device, cache_dir):
        source = weights or "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
        config = CLIPVisionConfig.from_pretrained(source, cache_dir=cache_dir)
        self.model = AestheticPredictor.from_pretrained(source, config=config, cache_dir=cache_dir).eval().to(device)
        self.name, self.processor = name, CLIPImageProcessorPil.from_pretrained(source, cache_dir=cache_dir)

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        embeds = self.model(pixel_values=pixels.to(self.model.device)).image_embeds
        return {self.name: self.model.layers(torch.nn.functional.normalize(embeds)).squeeze(1).tolist()}


BLIP_VISION_RULES = [
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm(1|2)\.", r".layer_norm\1."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
]


class ImageRewardScorer:
    """
    ImageReward v1.0 from its authors' file, in transformers' BLIP: the text encoder looks at the picture through its
    cross-attention, and a head on its first token gives the reward, less its mean and over its deviation.
    """

    MEAN, STD, TOKENS, HEAD_WIDTH = 0.16717362830052426, 1.0333394966054072, 35, 64

    def __init__(self, name, weights, device, cache_dir):
        if weights is None:
            path = huggingface_hub.hf_hub_download("zai-org/ImageReward", "ImageReward.pt", cache_dir=cache_dir)
        else:
            path = Path(weights, "ImageReward.pt") if Path(weights).is_dir() else Path(weights)
        tokenizer = beside(weights, "tokenizer_config.json", "google-bert/bert-base-uncased")
        self.name, self.device = name, device
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, cache_dir=cache_dir)
        tensors = load_tensors(path)
        self.vision = self.vision_model(part_of(tensors, "blip.visual_encoder.")).eval().to(device)
        self.text = self.text_model(part_of(tensors, "blip.text_encoder."), self.vision.config).eval().to(device)
        self.head = scoring_head(self.text.config.hidden_size).eval().to(device)
        self.head.load_state_dict(part_of(tensors, "mlp.layers."))
        side = self.vision.config.image_size
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def vision_model(self, weights):
        weights = rename(weights, BLIP_VISION_RULES)
        patches, width = weights["embeddings.position_embedding"].shape[1:]
        patch = weights["embeddings.patch_embedding.weight"].shape[-1]
        config = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=count_layers(weights, "encoder.layers"),
            num_attention_heads=width // self.HEAD_WIDTH,
            patch_size=patch,
            image_size=patch * math.isqrt(patches - 1),
            layer_norm_eps=1e-6,
        )
        model = BlipVisionModel(config)
        model.load_state_dict(weights)
        return model

    def text_model(self, weights, vision):
        words, width = weights["embeddings.word_embeddings.weight"].shape
        config = BlipTextConfig(
            vocab_size=words,
            hidden_size=width,
            encoder_hidden_size=vision.hidden_size,
            intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=count_layers(weights, "encoder.layer"),
            num_attention_heads=width // self.HEAD_WIDTH,
            max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
            bos_token_id=None,
            sep_token_id=None,
        )
        model = BlipTextModel(config, add_pooling_layer=False)
        weights.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: made anew
        model.load_state_dict(weights)
        return model

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.TOKENS, return_tensors="pt"
        ).to(self.device)
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        seen = self.vision(pixel_values=pixels.to(self.device)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        reward = self.head(read[:, 0]).squeeze(1)
        return {self.name: ((reward - self.MEAN) / self.STD).tolist()}


def part_of(weights, prefix):
    """Those of `weights` whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def count_layers(weights, prefix):
    """How many layers called prefix.N there are."""
    return 1 + max(int(name.split(".")[prefix.count(".") + 1]) for name in weights if name.startswith(f"{prefix}."))


SCORERS = {
    "pickscore": load_clip,
    "hpsv2": load_hps,
    "hpsv2.1": load_hps,
    "imagereward": ImageRewardScorer,
    "aesthetic": AestheticScorer,
    "clip": load_clip,
}


def load_scorer(spec, device, cache_dir=None):
    """The scorer that a ScorerSpec names. Raises UserError, saying what to do, if it cannot be loaded."""
    if spec.name not in SCORERS:
        return FunctionScorer(spec.name, load_function(spec.where))
    try:
        return SCORERS[spec.name](spec.name, spec.where, device, cache_dir)
    except Exception as error:  # of transformers, the hub and torch
        raise UserError(
            f"the weights of --scorer {spec.name} cannot be loaded from {spec.where or 'the hub'} "
            f"({one_line(error)}): give their folder with --scorer {spec.name}=FOLDER"
        ) from error


def score_samples(scorer, folder, samples, batch_size):
    """{name: (samples,) array} of the scores of the pictures in `folder`; a clip's is the mean of its frames'."""
    scores = {}
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        pictures = [read_picture(folder / sample.file) for sample in batch]
        clips = [picture if isinstance(picture, list) else [picture] for picture in pictures]
        frames = list(itertools.chain(*clips))
        prompts = [sample.prompt for sample, clip in zip(batch, clips) for _ in clip]
        values = {}
        for first in range(0, len(frames), batch_size):
            piece = slice(first, first + batch_size)
            for name, numbers in scorer(frames[piece], prompts[piece]).items():
                values.setdefault(name, []).extend(numbers)
        for name, numbers in values.items():
            if len(numbers) != len(frames):
                raise UserError(f"scorer {name} gave {len(numbers)} numbers for {len(frames)} pictures")
            parts = iter(numbers)
            means = [float(np.mean(list(itertools.islice(parts, len(clip))))) for clip in clips]
            for sample, mean in zip(batch, means):
                if not math.isfinite(mean):
                    raise UserError(f"scorer {name} gave {mean} for {folder / sample.file}")
            scores.setdefault(name, []).extend(means)
    return {name: np.array(values) for name, values in scores.items()}


# ------------------------------------------------------------------------------------------------------------------
# Clips against real clips
# ------------------------------------------------------------------------------------------------------------------

AGAINST_REFERENCE = ("ssim", "psnr", "lpips", "fvd")
LOWER_IS_BETTER = ("lpips", "fvd")


class References:
    """The real clips of --reference_dir; `paths` are those of each caption. Raises UserError if there are none."""

    def __init__(self, args):
        self.args, self.paths, folder = args, {}, Path(args.reference_dir)
        table = next((file for file in (folder / "metadata.jsonl", folder / "metadata.csv") if file.is_file()), None)
        if table is None:
            raise UserError(f"--reference_dir {folder} has no metadata.jsonl or metadata.csv (file_name, text)")
        for row in datasets.load_dataset(FILE_BUILDERS[table.suffix], data_files=str(table), streaming=True)["train"]:
            if not {"file_name", "text"} <= set(row):
                raise UserError(f"{table} has the columns {', '.join(row)}, but file_name and text are needed")
            self.paths.setdefault(row["text"].strip(), []).append(folder / row["file_name"])

    def clip(self, path):
        """The frames of a real clip as the models draw theirs, (frames, 3, height, width) in 0..1."""
        count, stride = self.args.num_frames, self.args.frame_stride
        try:
            with av.open(str(path)) as container:
                frames = [frame.to_image() for frame in container.decode(video=0)]
        except Exception as error:  # PyAV's errors are OSError, ValueError, LookupError, ...
            raise UserError(f"the real clip {path} cannot be read ({one_line(error)}): repair or remove it") from error
        if not stride and len(frames) >= count:
            frames = [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]
        frames = frames[:: stride or 1][:count]
        if len(frames) < count:
            raise UserError(
                f"the real clip {path} has too few frames for {count} at --frame_stride {stride}: lower it"
            )
        size = (self.args.width, self.args.height)
        return to_tensor([ImageOps.fit(frame, size, Image.Resampling.LANCZOS) for frame in frames])

    def first(self, prompt):
        """The first real clip of a caption. Raises UserError if there is none."""
        if prompt not in self.paths:
            raise UserError(f'--reference_dir {self.args.reference_dir} has no clip of the prompt "{prompt}"')
        return self.clip(self.paths[prompt][0])

    def everything(self):
        """Every real clip, one after the other."""
        return (self.clip(path) for path in itertools.chain(*self.paths.values()))


def to_tensor(frames):
    """(frames, 3, height, width) in 0..1 of PIL pictures."""
    pixels = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def load_metric(name, device):
    """ssim, psnr or lpips of two clips, by torchmetrics. Raises UserError if a package is missing."""
    try:
        if name == "lpips":
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            return LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        needed = "torchmetrics and torchvision" if name == "lpips" else "torchmetrics"
        raise UserError(f"--scorer {name} needs {needed}: pip install {needed.replace(' and', '')}") from error
    except Exception as error:  # its weights are downloaded
        raise UserError(f"--scorer {name} cannot be loaded: {one_line(error)}") from error
    metric = {"ssim": structural_similarity_index_measure, "psnr": peak_signal_noise_ratio}[name]
    return lambda drawn, real: metric(drawn, real, data_range=1.0)


def compare_clips(metric, references, folder, samples, device):
    """(samples,) array of what `metric` says of each clip and the real clip of its prompt."""
    values = []
    for sample in samples:
        drawn, real = to_tensor(read_picture(folder / sample.file)), references.first(sample.prompt)
        values.append(float(metric(drawn.to(device), real.to(device))))
    return np.array(values)


class FeatureNetwork(torch.nn.Module):
    """What gives the features of FVD: clips (b, 3, frames, height, width) in 0..255 to (b, features), fp32."""

    def __init__(self, where, device):
        super().__init__()
        self.network, self.options = None, {}
        if ":" in where:
            self.network = load_function(where)
            return
        try:
            self.network = torch.jit.load(where, map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"--scorer fvd={where} is no TorchScript file: {one_line(error)}") from error
        # The I3D network that video papers pass around has to be asked for its features, and for its own resizing.
        known = {argument.name for argument in self.network.forward.schema.arguments}
        self.options = {name: True for name in ("rescale", "resize", "return_features") if name in known}

    @torch.no_grad()
    def forward(self, clips):
        return self.network(clips, **self.options).float()


class FrechetVideoDistance:
    """FVD (arXiv 1812.01717): torchmetrics' Frechet distance, of the features of clips in place of pictures."""

    def __init__(self, where, references, device, batch_size):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise UserError("--scorer fvd needs torchmetrics: pip install torchmetrics") from error
        self.device, self.batch_size = device, batch_size
        network = FeatureNetwork(where, device)
        network.num_features = network(self.batch([next(references.everything())])).shape[1]
        self.metric = FrechetInceptionDistance(network, reset_real_features=False).to(device)
        self.update(references.everything(), real=True)

    def batch(self, clips):
        return torch.stack(clips).transpose(1, 2).to(self.device) * 255

    def update(self, clips, real):
        clips = iter(clips)
        while batch := list(itertools.islice(clips, self.batch_size)):
            self.metric.update(self.batch(batch), real=real)

    def __call__(self, folder, samples):
        """The distance of the clips in `folder` to the real ones."""
        self.metric.reset()
        self.update((to_tensor(read_picture(folder / sample.file)) for sample in samples), real=False)
        try:
            return float(self.metric.compute())
        except RuntimeError as error:
            raise UserError(f"--scorer fvd cannot be computed: {one_line(error)}") from error


# ------------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------------


def compare(scores, base, seed=0, resamples=10_000, lower_is_better=False):
    """
    Compares a model with the base, picture by picture.

    Args:
        scores, base: (prompts, pictures of a prompt), scores of the same samples.
        seed, resamples: of the bootstrap over prompts: a prompt's pictures are no independent draws.
    Returns:
        dict of `difference` and `win_rate` (ties count half), means over prompts, and of `difference_interval` and
        `win_rate_interval`, their 95 % percentile intervals.
    """
    gained = (base - scores) if lower_is_better else (scores - base)
    won = np.where(gained > 0, 1.0, np.where(gained < 0, 0.0, 0.5))
    values = np.stack([(scores - base).mean(1), won.mean(1)], axis=1)  # a row for each prompt
    low, high = bootstrap(values, seed, resamples)
    return {
        "difference": float(values[:, 0].mean()),
        "difference_interval": [float(low[0]), float(high[0])],
        "win_rate": float(values[:, 1].mean()),
        "win_rate_interval": [float(low[1]), float(high[1])],
    }


def bootstrap(values, seed, resamples, level=0.95):
    """Percentile intervals, low and high, of the mean over the rows of `values` (rows, columns)."""
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, 250):  # in pieces, for the memory
        rows = generator.integers(len(values), size=(min(250, resamples - start), len(values)))
        means.append(values[rows].mean(1))
    return np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)


def make_table(scores, models, args):
    """One row for each scorer and model: its mean and, of all but the base, what `compare` gives."""
    table = []
    for scorer, of_model in scores.items():
        lower = scorer in LOWER_IS_BETTER
        grids = {name: values.reshape(-1, args.images_per_prompt) for name, values in of_model.items()}
        for model in models:
            row = {"scorer": scorer, "model": model, "mean": float(grids[model].mean())}
            if model != BASE:
                row |= compare(grids[model], grids[BASE], args.seed, args.bootstrap_samples, lower)
            table.append(row)
    return table


def distance_rows(distances):
    """The table's rows of FVD, which is one number for all of a model's clips."""
    rows = []
    for name, value in distances.items():
        rows.append({"scorer": "fvd", "model": name, "mean": value})
        if name != BASE:
            rows[-1]["difference"] = value - distances[BASE]
    return rows


def shown(row):
    """The cells of a row of the table, as text."""
    difference = f"{row['difference']:+.4f}" if "difference" in row else ""
    if "difference_interval" in row:
        difference += " [{:+.4f}, {:+.4f}]".format(*row["difference_interval"])
    wins = ""
    if "win_rate" in row:
        wins = "{:.1%} [{:.1%}, {:.1%}]".format(row["win_rate"], *row["win_rate_interval"])
    direction = " (lower is better)" if row["scorer"] in LOWER_IS_BETTER else ""
    return [row["scorer"] + direction, row["model"], f"{row['mean']:.4f}", difference, wins]


HEADINGS = ["scorer", "model", "mean", "difference to the base [95 %]", "win rate [95 %]"]


def table_text(table):
    """The table for a terminal."""
    rows = [HEADINGS, *map(shown, table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


# ------------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------------


def data_uri(path, resolution):
    """A picture as JPEG or a clip as WebP, no larger than `resolution`, inside a URI."""
    picture, buffer = read_picture(path), io.BytesIO()
    frames = picture if isinstance(picture, list) else [picture]
    for frame in frames:
        frame.thumbnail((resolution, resolution), Image.Resampling.LANCZOS)
    if isinstance(picture, list):
        options = dict(save_all=True, append_images=frames[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)
        frames[0].save(buffer, "webp", quality=80, **options)
    else:
        picture.save(buffer, "jpeg", quality=85)
    kind = "webp" if isinstance(picture, list) else "jpeg"
    return f"data:image/{kind};base64," + b64encode(buffer.getvalue()).decode()


def page_samples(samples, models, scores, args):
    """What index.html shows of each sample: its prompt, and every model's picture and scores."""
    rows = []
    for i, sample in enumerate(tqdm(samples, desc="index.html")):
        if sample.image >= (args.page_images or math.inf):
            continue
        rows.append(
            {
                "prompt": sample.prompt,
                "key": Path(sample.file).stem,
                "pictures": [
                    data_uri(Path(args.output_dir, "images", name, sample.file), args.page_resolution)
                    for name in models
                ],
                "scores": [[round(float(of_model[name][i]), 5) for name in models] for of_model in scores.values()],
            }
        )
    return rows


def write_page(samples, models, scores, table, args):
    """Writes index.html."""
    clips = args.motion_adapter_name_or_path is not None
    data = {
        "seed": args.seed,
        "models": models,
        "scorers": list(scores),
        "lower": [name in LOWER_IS_BETTER for name in scores],
        "samples": page_samples(samples, models, scores, args),
    }
    shape = f"{args.width} × {args.height}" + (f" × {args.num_frames} frames" if clips else "")
    about = (
        f"{len(models)} models, {len(samples) // args.images_per_prompt} prompts, {args.images_per_prompt} "
        f"{'clip' if clips else 'picture'}{'s' if args.images_per_prompt > 1 else ''} of each, {shape}, "
        f"{args.num_inference_steps} steps of {args.scheduler}, guidance {args.guidance_scale:g}, seed {args.seed}. "
        f"Base: {args.base}."
    )
    body = ""
    for row in table:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in shown(row))
        body += f"<tr{' class=first' if row['model'] == BASE else ''}>{cells}</tr>"
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
    page = PAGE.replace("{{about}}", html.escape(about))
    page = page.replace("{{table}}", f"<table><tr>{head}</tr>{body}</table>" if table else "")
    page = page.replace("{{data}}", json.dumps(data).replace("</", "<\\/"))
    partial = Path(args.output_dir, "index.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, Path(args.output_dir, "index.html"))


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation</title>
<style>
:root {
  color-scheme: light dark;
  --ground: light-dark(#f6f6f4, #17181a); --card: light-dark(#ffffff, #202225); --ink: light-dark(#1c1d1f, #e8e8e6);
  --faint: light-dark(#6b6e73, #9a9da3); --line: light-dark(#dededa, #34373c); --accent: light-dark(#1f5fbf, #7fb0ff);
  --better: light-dark(#15753a, #6fd397); --worse: light-dark(#b3261e, #ff9d94);
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 1; background: var(--card); border-bottom: 1px solid var(--line); }
header > div, main { max-width: 1500px; margin: auto; padding: 0 20px; }
header > div { display: flex; gap: 24px; align-items: baseline; }
h1 { font-size: 18px; margin: 10px 0; }
nav a { display: inline-block; padding: 10px 12px; color: var(--faint); text-decoration: none; }
nav a.here { color: var(--ink); box-shadow: inset 0 -2px var(--accent); }
.about { color: var(--faint); max-width: 75em; }
table { border-collapse: collapse; background: var(--card); font-variant-numeric: tabular-nums; margin: 0 0 20px; }
th, td { border: 1px solid var(--line); padding: 4px 12px; text-align: left; white-space: nowrap; }
td:nth-child(n+3) { text-align: right; }
th { font-weight: 600; }
tr.first td { border-top: 2px solid var(--faint); }
.scroll { overflow-x: auto; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin: 16px 0; }
.controls label { color: var(--faint); }
select, input, button {
  font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 5px 10px;
}
button { cursor: pointer; }
button:hover, select:hover { border-color: var(--accent); }
input { width: 18em; }
.sample {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px 14px;
  margin: 0 0 14px;
}
.sample h2 { font-size: 15px; font-weight: 600; margin: 0 0 10px; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 290px)); gap: 12px 16px; }
figure { margin: 0; }
figure img { width: 100%; border-radius: 6px; display: block; background: var(--ground); }
figcaption { font-size: 13px; margin-top: 4px; }
figcaption b { font-weight: 600; }
figcaption div { color: var(--faint); font-variant-numeric: tabular-nums; display: flex; gap: 8px; }
figcaption div :first-child { flex: 1; overflow-wrap: anywhere; }
figcaption div :nth-child(3) { min-width: 4em; text-align: right; }
figcaption .sorted { color: var(--ink); }
.better { color: var(--better); } .worse { color: var(--worse); }
#blind { text-align: center; }
#blind .controls { justify-content: center; }
#prompt { font-size: 19px; margin: 8px auto 14px; max-width: 50em; overflow-wrap: anywhere; }
#pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; max-width: 1060px; margin: auto; }
#pair img { width: 100%; border-radius: 10px; display: block; background: var(--card); cursor: pointer; }
#pair img:hover { outline: 3px solid var(--accent); }
.keys { margin: 16px 0; display: flex; gap: 10px; justify-content: center; }
kbd {
  font: 12px ui-monospace, monospace; border: 1px solid var(--line); border-radius: 4px; padding: 1px 5px;
  margin-left: 6px; color: var(--faint);
}
#result { font-size: 17px; min-height: 3.2em; }
#result small { color: var(--faint); display: block; }
[hidden] { display: none !important; }
</style>
</head>
<body>
<header><div>
<h1>Evaluation</h1>
<nav><a href="#pictures">Pictures</a><a href="#blind">Blind comparison</a></nav>
</div></header>
<main>
<section id="pictures">
<p class="about">{{about}}</p>
<div class="scroll">{{table}}</div>
<div class="controls">
<label>Sort by <select id="sort"></select></label>
<label>of <select id="model"></select></label>
<select id="order">
<option value="1">largest gain first</option><option value="-1">largest loss first</option>
</select>
<label>Prompt has <input id="filter" type="search" placeholder="words"></label>
<span id="count" class="about"></span>
</div>
<div id="rows"></div>
<div id="more"></div>
</section>
<section id="blind" hidden>
<div class="controls">
<label>Compare <select id="first"></select></label>
<label>with <select id="second"></select></label>
<span id="progress" class="about"></span>
</div>
<p id="prompt"></p>
<div id="pair"><img id="left" alt="left"><img id="right" alt="right"></div>
<div class="keys">
<button id="vote-left">Left is better<kbd>&larr;</kbd></button>
<button id="vote-tie">Tie<kbd>&darr;</kbd></button>
<button id="vote-right">Right is better<kbd>&rarr;</kbd></button>
<button id="undo">Undo<kbd>Backspace</kbd></button>
</div>
<p id="result"></p>
<button id="download">Download the votes</button>
</section>
</main>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const BASE = 0, PAGE_OF_ROWS = 30;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function fill(select, names, chosen) {
  names.forEach((name, i) => select.add(new Option(name, i)));
  select.value = chosen;
}

// ---- pictures ----

let rows = [], shownRows = 0;

// How much a model gained over the base on a sample, so that more is better whatever the scorer's direction.
function gain(sample, scorer, model) {
  const difference = sample.scores[scorer][model] - sample.scores[scorer][BASE];
  return data.lower[scorer] ? -difference : difference;
}

function figureOf(sample, model, sorted) {
  const figure = element("figure"), image = element("img"), caption = element("figcaption");
  image.src = sample.pictures[model];
  image.alt = data.models[model];
  caption.append(element("b", data.models[model]));
  data.scorers.forEach((name, scorer) => {
    const line = element("div", undefined, scorer === sorted ? "sorted" : "");
    line.append(element("span", name), element("span", sample.scores[scorer][model].toFixed(3)));
    if (model !== BASE) {
      const gained = gain(sample, scorer, model), difference = data.lower[scorer] ? -gained : gained;
      const kind = Math.abs(gained) < 0.0005 ? "" : gained > 0 ? "better" : "worse";
      line.append(element("span", (difference < 0 ? "−" : "+") + Math.abs(difference).toFixed(3), kind));
    } else {
      line.append(element("span"));
    }
    caption.append(line);
  });
  figure.append(image, caption);
  return figure;
}

function showMore() {
  const sorted = Number(at("sort").value);
  for (const sample of rows.slice(shownRows, shownRows + PAGE_OF_ROWS)) {
    const article = element("article", undefined, "sample"), pictures = element("div", undefined, "pictures");
    data.models.forEach((_, model) => pictures.append(figureOf(sample, model, sorted)));
    article.append(element("h2", sample.prompt), pictures);
    at("rows").append(article);
  }
  shownRows = Math.min(shownRows + PAGE_OF_ROWS, rows.length);
}

function showRows() {
  const scorer = Number(at("sort").value), model = Number(at("model").value), order = Number(at("order").value);
  at("model").parentElement.hidden = at("order").hidden = scorer < 0;
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  rows = data.samples.filter(sample => words.every(word => sample.prompt.toLowerCase().includes(word)));
  if (scorer >= 0) rows.sort((a, b) => order * (gain(b, scorer, model) - gain(a, scorer, model)));
  at("count").textContent = `${rows.length} of ${data.samples.length}`;
  at("rows").replaceChildren();
  shownRows = 0;
  showMore();
}

// Rows are made as one scrolls to them: thousands of pictures at once would make the page slow.
new IntersectionObserver(seen => {
  if (seen[0].isIntersecting && shownRows < rows.length) showMore();
}, {rootMargin: "1500px"}).observe(at("more"));

at("sort").add(new Option("order of the prompts", -1));
if (data.models.length > 1) data.scorers.forEach((name, i) => at("sort").add(new Option(`difference in ${name}`, i)));
data.models.forEach((name, i) => { if (i !== BASE) at("model").add(new Option(name, i)); });
for (const id of ["sort", "model", "order"]) at(id).addEventListener("change", showRows);
at("filter").addEventListener("input", showRows);

// ---- blind comparison ----

// A keyed draw, 32 bits: which side a model is on and when its turn comes hang on the seed and the sample only.
function draw(...key) {
  let hash = 2166136261;
  for (const letter of key.join("\n")) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619);
  hash = Math.imul(hash ^ (hash >>> 16), 2246822507);
  hash = Math.imul(hash ^ (hash >>> 13), 3266489909);
  return (hash ^ (hash >>> 16)) >>> 0;
}

const STORE = "sspo-evaluate-" + draw(data.seed, ...data.models, ...data.samples.map(sample => sample.key));
let votes = [], turns = [];
try { votes = JSON.parse(localStorage.getItem(STORE)) || []; } catch { /* a browser that keeps nothing */ }

function keep() {
  try { localStorage.setItem(STORE, JSON.stringify(votes)); } catch { /* the votes last until the page is closed */ }
}

const contestants = () => [Number(at("first").value), Number(at("second").value)].sort((a, b) => a - b);
const contest = () => contestants().map(model => data.models[model]).join(" / ");
const cast = () => votes.filter(vote => vote.contest === contest());

// The models of a sample, the left one first.
function sides(sample) {
  const [a, b] = contestants();
  return draw(data.seed, "side", contest(), sample.key) & 1 ? [b, a] : [a, b];
}

function openTurn() {
  const done = new Set(cast().map(vote => vote.sample));
  return turns.find(sample => !done.has(sample.key));
}

// Wilson's score interval of a share, 95 %.
function wilson(share, count) {
  const z = 1.959963984540054, z2 = z * z / count;
  const middle = (share + z2 / 2) / (1 + z2);
  const half = z / (1 + z2) * Math.sqrt((share * (1 - share) + z2 / 4) / count);
  return [middle - half, middle + half];
}

function summary() {
  const [, challenger] = contestants(), name = data.models[challenger], counted = cast();
  const ties = counted.filter(vote => vote.winner === null).length;
  const wins = counted.filter(vote => vote.winner === name).length;
  const rate = counted.length ? (wins + ties / 2) / counted.length : null;
  const interval = counted.length ? wilson(rate, counted.length) : null;
  return {contest: contest(), model: name, votes: counted.length, wins, ties, win_rate: rate, interval};
}

function percent(share) { return (100 * share).toFixed(1) + " %"; }

function showTurn() {
  const same = at("first").value === at("second").value, sample = same ? undefined : openTurn();
  at("pair").hidden = at("vote-left").parentElement.hidden = same;
  at("pair").hidden ||= !sample;
  at("progress").textContent = same ? "" : `${cast().length} of ${data.samples.length} judged`;
  at("prompt").textContent = same ? "Choose two models." : sample ? sample.prompt : "All are judged. Thank you.";
  if (sample) {
    const [left, right] = sides(sample);
    at("left").src = sample.pictures[left];
    at("right").src = sample.pictures[right];
  }
  at("result").replaceChildren();
  const told = same ? {votes: 0} : summary();
  if (told.votes) {
    const [low, high] = told.interval.map(percent);
    const count = `Votes: ${told.votes}, of them ties, counted half: ${told.ties}. Interval: 95 %, Wilson.`;
    const rate = `${told.model} wins ${percent(told.win_rate)} (${low} to ${high})`;
    at("result").append(rate, element("small", count));
  }
}

function vote(side) {
  const sample = openTurn();
  if (!sample || at("first").value === at("second").value) return;
  const names = sides(sample).map(model => data.models[model]);
  const winner = side === "tie" ? null : names[side === "left" ? 0 : 1];
  votes.push({contest: contest(), sample: sample.key, prompt: sample.prompt, left: names[0], right: names[1], winner});
  keep();
  showTurn();
}

function undo() {
  const last = cast().at(-1);
  if (!last) return;
  votes.splice(votes.indexOf(last), 1);
  keep();
  showTurn();
}

function download() {
  const contests = [...new Set(votes.map(vote => vote.contest))];
  const content = JSON.stringify({seed: data.seed, models: data.models, contests, summary: summary(), votes}, null, 1);
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([content], {type: "application/json"}));
  link.download = "votes.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function startContest() {
  turns = [...data.samples].sort((a, b) => draw(data.seed, "turn", a.key) - draw(data.seed, "turn", b.key));
  showTurn();
}

const KEYS = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie"};
document.addEventListener("keydown", event => {
  if (at("blind").hidden || event.repeat || ["SELECT", "INPUT"].includes(event.target.tagName)) return;
  if (KEYS[event.key]) vote(KEYS[event.key]);
  else if (event.key === "Backspace") undo();
  else return;
  event.preventDefault();
});
for (const side of ["left", "right", "tie"]) at("vote-" + side).addEventListener("click", () => vote(side));
for (const side of ["left", "right"]) at(side).addEventListener("click", () => vote(side));
at("undo").addEventListener("click", undo);
at("download").addEventListener("click", download);
fill(at("first"), data.models, BASE);
fill(at("second"), data.models, Math.min(1, data.models.length - 1));
for (const id of ["first", "second"]) {
  at(id).addEventListener("change", event => { event.target.blur(); startContest(); });
}

// ---- the two views ----

function showView() {
  const blind = location.hash === "#blind";
  at("blind").hidden = !blind;
  at("pictures").hidden = blind;
  for (const link of document.querySelectorAll("nav a")) {
    link.classList.toggle("here", (link.hash === "#blind") === blind);
  }
  scrollTo(0, 0);
}
addEventListener("hashchange", showView);
showRows();
startContest();
showView();
</script>
</body>
</html>
"""


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


def score_models(models, samples, args, device):
    """
    Scores every model's pictures.

    Returns:
        scores, {scorer: {model: (samples,) array}}, and distances, {model: FVD} or {}.
    """
    scores, distances = {}, {}
    folders = {model.name: Path(args.output_dir, "images", model.name) for model in models}
    references = References(args) if args.reference_dir else None
    for spec in args.scorers:
        if spec.name == "fvd":
            distance = FrechetVideoDistance(spec.where, references, device, args.batch_size)
            distances = {name: distance(folder, samples) for name, folder in folders.items()}
            continue
        metric = load_metric(spec.name, device) if spec.name in AGAINST_REFERENCE else None
        scorer = load_scorer(spec, device, args.cache_dir) if metric is None else None
        for name, folder in tqdm(folders.items(), desc=f"scoring by {spec.name}"):
            if metric is None:
                values = score_samples(scorer, folder, samples, args.batch_size)
            else:
                values = {spec.name: compare_clips(metric, references, folder, samples, device)}
            for scorer_name, numbers in values.items():
                scores.setdefault(scorer_name, {})[name] = numbers
    return scores, distances


def check_scorers(args, prompts, device):
    """Loads every scorer once, so that what is missing is told before hours of drawing, and not after."""
    names = [spec.name for spec in args.scorers]
    for spec in args.scorers:
        if spec.name == "fvd":
            FeatureNetwork(spec.where, device)
        elif spec.name in AGAINST_REFERENCE:
            load_metric(spec.name, "cpu")
        else:
            load_scorer(spec, "cpu", args.cache_dir)
    if {"ssim", "psnr", "lpips"} & set(names):
        references = References(args)
        for prompt in prompts:
            references.first(prompt)


def results(models, samples, scores, distances, table, args):
    """What results.json holds: all that the table is made of."""
    settings = {name: value for name, value in vars(args).items() if name not in ("models", "scorers")}
    libraries = (torch, diffusers, transformers)
    return {
        "settings": settings,
        "versions": {library.__name__: library.__version__ for library in libraries},
        "models": [{"name": model.name, "path": model.path, "fingerprint": model.fingerprint} for model in models],
        "samples": [
            {
                "model": model.name,
                "prompt": sample.prompt,
                "image": sample.image,
                "file": f"images/{model.name}/{sample.file}",
                "scores": {scorer: float(of_model[model.name][i]) for scorer, of_model in scores.items()},
            }
            for model in models
            for i, sample in enumerate(samples)
        ],
        "fvd": distances,
        "table": table,
    }


def main(args):
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [find_base(args), *(find_model(name, path, args) for name, path in args.models)]
    prompts = load_prompts(args)
    samples = make_samples(prompts, args)
    check_settings(models, args)
    check_scorers(args, prompts, device)

    for model in models:
        draw_missing(model, samples, args, device)
    scores, distances = score_models(models, samples, args, device)
    names = [model.name for model in models]
    table = make_table(scores, names, args) + distance_rows(distances)
    content = json.dumps(results(models, samples, scores, distances, table, args), indent=1)
    Path(args.output_dir, "results.json").write_text(content)
    write_page(samples, names, scores, table, args)
    if table:
        print(f"\n{table_text(table)}")
    print(f"\n{len(samples)} pictures a model. Look at {Path(args.output_dir, 'index.html')}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
