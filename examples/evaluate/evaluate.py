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
#     "av>=15,<19",
# ]
# ///
"""
Draws the same prompts with several models, from the same noise, scores the pictures, and compares the scores.

  1. Draw.     Each model draws every prompt with its stock pipeline. A picture's noise depends on --seed, on its
               prompt's text and on its number, never on the model, the order of the prompts or the batch.
  2. Score.    A scorer gives each picture a number; a clip's is the mean of its frames'.
  3. Compare.  Difference to the base, or to the model that --against names, and win rate against it (a tie is half a
               win), picture by picture: means over prompts of means over a prompt's pictures, with 95 % intervals by a
               paired bootstrap over the prompts. They are about these very weights: the same training from another
               seed may differ by more.

    python examples/evaluate/evaluate.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --model sspo=sspo-sd15 --model early=sspo-sd15/checkpoint-100 \
        --model sspo-sd15/replay/iteration-3.safetensors \
        --prompts partiprompts --max_prompts 200 --images_per_prompt 2 \
        --scorer pickscore --scorer hpsv2.1 --scorer mine=my_scorer.py:judge --output_dir evaluation

What is left in --output_dir:

    images/NAME/     the pictures of each model with their metadata.jsonl, so that the folder is an imagefolder
    results.json     settings, the scores of every picture, and the table
    index.html       one file that opens without a network: the pictures side by side, sorted by the difference of
                     their scores, and a blind comparison in which a person votes with the arrow keys

Pictures that are there are not drawn again: a run that was stopped resumes where it was, and a model or a prompt that
is added costs its own pictures only. Scores are computed each time.

Models (--model [NAME=]PATH): whatever a training script leaves. An output_dir or a checkpoint-N, LoRA or full; an
entry of replay/; any pipeline or LoRA of diffusers, on disk or on the hub. With --motion_adapter_name_or_path all of
them are AnimateDiff's and draw clips. Bases are Stable Diffusion's, SDXL's, FLUX.2 [klein]'s or, for clips, Wan's.

Prompts (--prompts): a file with a prompt a line (.txt), or a column of .jsonl, .csv or .parquet; anything else that
datasets opens; or one of the sets that papers use: pickapic (Pick-a-Pic v2, validation_unique, 500), hpsv2 (the
benchmark of HPSv2, 3200) and partiprompts (1632). Two of them are sorted by kind, so --max_prompts reads the whole
set and takes prompts from all over it, by a hash of their text: a larger number keeps those of a smaller one.

Scorers (--scorer NAME[=WEIGHTS], see scorers.py), higher is better unless said otherwise:

    pickscore        PickScore v1 (arXiv 2305.01569), about 20 to 23
    hpsv2, hpsv2.1   Human Preference Score v2 and v2.1 (arXiv 2306.09341), times 100; the two are not comparable
    imagereward      ImageReward v1.0 (arXiv 2304.05977), about -2 to 2
    aesthetic        LAION's aesthetic predictor v2 (sac+logos+ava1), 1 to 10; does not look at the prompt
    clip             CLIP score: 100 x the cosine of prompt and picture, by CLIP ViT-L/14; below 0 it counts 0
    NAME=module:function or NAME=path.py:function
                     one of your own: function(pictures, prompts) is given two lists, PIL pictures and texts, and
                     returns a number for each picture, or a dict of such lists

For clips also, against real ones (--reference_dir, a folder of clips with metadata.jsonl or metadata.csv; their frames
are taken as the training scripts take a winner's, from the first one on; see clip_measures.py):

    ssim, psnr, lpips  a clip against the real clip of the same caption (torchmetrics; lpips, lower is better, needs
                       torchvision too)
    fvd=NETWORK        Frechet distance of all clips to all real ones, lower is better, in the feature space of a
                       TorchScript file or a module:function that takes (clips, 3, frames, height, width) in 0..255 and
                       gives (clips, features). It means something only with many more clips than features

On a GPU, the parts of SDXL, FLUX.2 and Wan take turns and wait for theirs in the machine's memory, so that only the
largest has to fit; other pipelines are there as a whole. Where the GPU's memory does not suffice, lower --batch_size.
"""

# ruff: noqa: E402
import argparse
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path


# Before the libraries are imported: their notices of image processors and 4-bit kernels concern nothing here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import datasets
import diffusers
import huggingface_hub
import numpy as np
import torch
import transformers
from clip_measures import AGAINST_REFERENCE, FeatureNetwork, FrechetVideoDistance, References, load_metric, to_tensor
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    WanPipeline,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from PIL import Image, ImageSequence
from safetensors import safe_open
from safetensors.torch import load_file
from scorers import SCORERS, UserError, load_scorer, one_line
from tqdm.auto import tqdm


BASE = "base"  # what the base is called among the models
LOWER_IS_BETTER = ("lpips", "fvd")
FEW = 30  # prompts, of which a percentile bootstrap tells too little
TOO_FEW = f"With fewer than {FEW} prompts the intervals are too narrow."
# The noise schedule of AnimateDiff's motion adapters, whatever their image model was trained with.
NOISE_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False)


# ------------------------------------------------------------------------------------------------------------------
# The method: draw from the same noise, score, compare
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One picture or clip of a prompt, to be drawn by every model. `file`: its name in each model's folder."""

    prompt: str
    image: int
    file: str


def noise_of(sample, shape, seed):
    """1. The noise that a sample starts from, standard normal in fp32: the same for every model and in any batch."""
    digest = hashlib.sha256(repr(("evaluate", seed, sample.prompt, sample.image)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def draw(pipeline, prompts, noise, args):
    """
    1. Draws by the stock pipeline.

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
    for name in ("max_sequence_length", "negative_prompt"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    wan = isinstance(pipeline, WanPipeline)  # which keeps fp32 between two steps
    noise = noise.to(torch.float32 if wan else denoiser_of(pipeline).dtype)
    if not args.clips:
        return pipeline(prompt=prompts, latents=noise, **options).images
    return pipeline(prompt=prompts, latents=noise, num_frames=args.num_frames, **options).frames


def score_samples(scorer, folder, samples, args):
    """2. {name: (samples,) array} of the scores of the pictures in `folder`; a clip's is the mean of its frames'."""
    scores, batch_size = {}, args.batch_size
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        pictures = [read_picture(folder / sample.file, args) for sample in batch]
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


def compare(scores, base, seed=0, resamples=10_000, lower_is_better=False):
    """
    3. Compares a model with another, the base say, picture by picture.

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
    """One row for each scorer and model: its mean and, of all but --against itself, what `compare` gives."""
    table = []
    for scorer, of_model in scores.items():
        lower = scorer in LOWER_IS_BETTER
        grids = {name: values.reshape(-1, args.images_per_prompt) for name, values in of_model.items()}
        for model in models:
            row = {"scorer": scorer, "model": model, "mean": float(grids[model].mean())}
            if model != args.against:
                row |= compare(grids[model], grids[args.against], args.seed, args.bootstrap_samples, lower)
            table.append(row)
    return table


# ------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows no empty defaults."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def positive(kind):
    """An argparse type: a number above 0."""

    def convert(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


count = positive(int)


def natural(text):
    """An argparse type: an integer of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return int(text)


def side(text):
    """An argparse type: a side of a picture in pixels."""
    value = count(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8, not {text}")
    return value


def parse_args(argv=None):
    """Parses `argv` (default: the command line). Raises SystemExit(2) after one line on stderr for a wrong flag."""
    parser = OneLineParser(
        description="Draws prompts with several models from the same noise, scores and compares the pictures.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("models")
    group.add_argument("--base", required=True, help="Hub name or folder of the models' base, which draws too.")
    group.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]PATH",
        help="A model to compare; may be given several times. The top of this file tells what it may be.",
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
        type=positive(float),
        help="lora_alpha of a replay entry's run. Default: read from the run's LoRA files, which lie beside replay/.",
    )

    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts", required=True, help=f"File, hub name or local path of a data set, or {', '.join(PROMPT_SETS)}."
    )
    group.add_argument("--prompt_column", help="Default: the first that exists of prompt, Prompt, text, caption, txt.")
    group.add_argument("--prompt_split", help="Split of the data set. Default: the set's own, or train.")
    group.add_argument("--max_prompts", type=count, help="Use only so many different prompts, from all over the set.")

    group = parser.add_argument_group("pictures")
    group.add_argument("--images_per_prompt", type=count, default=1, help="Pictures per prompt and model.")
    group.add_argument("--seed", type=natural, default=0, help="Seed of the pictures' noise and of the bootstrap.")
    group.add_argument("--num_inference_steps", type=count, default=20, help="Sampler steps.")
    group.add_argument(
        "--guidance_scale",
        type=float,
        help="Guidance; 1 or less means none. Default: 7.5; SDXL 5.0, FLUX.2 4.0, clips 8.0, Wan 5.0.",
    )
    group.add_argument(
        "--scheduler",
        choices=["dpmsolver", "ddim"],
        help="The sampler. Default: dpmsolver; FLUX.2 and Wan have their own only.",
    )
    group.add_argument(
        "--flow_shift",
        type=positive(float),
        help="Shift of the sampler's sigmas, of Wan only. Default: the model's own, Wan 2.1 3, Wan 2.2 5B 5.",
    )
    group.add_argument("--negative_prompt", help="What guidance leads away from, of Wan only. Default: nothing.")
    sides = "in pixels. Default: the base's own; clips 256; Wan 480 x 832."
    group.add_argument("--height", type=side, help=f"Height, {sides}")
    group.add_argument("--width", type=side, help=f"Width, {sides}")
    group.add_argument(
        "--max_sequence_length", type=count, help="Tokens of a prompt, of FLUX.2 only. Default: the pipeline's 512."
    )
    group.add_argument("--num_frames", type=count, help="Frames of a clip. Default: 16; Wan 33, and 4k + 1 always.")
    group.add_argument("--fps", type=count, help="Frames a second of a clip. Default: 8; Wan 2.1 16, Wan 2.2 5B 24.")
    group.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        help="Precision of the models. Default: fp16 on CUDA, of FLUX.2 and Wan bf16; else fp32.",
    )
    group.add_argument(
        "--batch_size", type=count, help="Pictures or clips drawn, and scored, at once. Default: 8; Wan 1."
    )

    group = parser.add_argument_group("scores")
    group.add_argument(
        "--scorer",
        action="append",
        metavar="NAME[=WEIGHTS]",
        help="A score; may be given several times. The top of this file tells which there are.",
    )
    group.add_argument("--reference_dir", help="Real clips with captions, for ssim, psnr, lpips and fvd.")
    group.add_argument(
        "--frame_stride",
        type=int,
        help="Of a real clip, every so many-th frame is taken. 0: as many as are needed, spread over the whole clip. "
        "Default: 4; of Wan those that it would show at --fps, by the file's own rate.",
    )
    group.add_argument("--against", default=BASE, metavar="NAME", help="The model that all others are compared with.")
    group.add_argument("--bootstrap_samples", type=count, default=10_000, help="Resamples behind an interval.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="evaluation", help="Where all that is made is written.")
    group.add_argument(
        "--page_resolution", type=count, default=384, help="Longest side, in pixels, of the pictures in index.html."
    )
    group.add_argument(
        "--page_images", type=count, help="Pictures of each prompt in index.html, a model. Default: all of them."
    )
    args = parser.parse_args(argv)
    try:
        args.models = [named_model(text) for text in args.model or []]
        args.scorers = [scorer_spec(text) for text in args.scorer or []]
        check_args(args)
    except UserError as error:
        parser.error(str(error))
    return args


def check_args(args):
    """Raises UserError for flags that no run can use together."""
    names = [BASE, *(name for name, _ in args.models)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name}: tell them apart with --model NAME=PATH")
    if args.against not in names:
        raise UserError(f"--against {args.against} is none of the models, which are called {', '.join(names)}")
    names = [spec.name for spec in args.scorers]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two scorers are called {name}: tell them apart with --scorer NAME=module:function")
        if name in AGAINST_REFERENCE and args.reference_dir is None:
            raise UserError(f"--scorer {name} compares clips with real ones: it needs --reference_dir and clips")
    if args.frame_stride is not None and args.frame_stride < 0:
        raise UserError(f"--frame_stride must not be negative, not {args.frame_stride}")


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
    # The authors' own repositories are missing from the hub since 2025. This is a copy of v2.
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
    prompts = {}  # each with a hash, by which --max_prompts chooses
    for row, example in enumerate(dataset.select_columns([column])):
        if not isinstance(example[column], str):
            raise UserError(f"--prompts {args.prompts}: column {column} of row {row} is {example[column]!r}, not text")
        if prompt := example[column].strip():
            prompts[prompt] = hashlib.sha256(prompt.encode()).digest()
    if not prompts:
        raise UserError(f"--prompts {args.prompts} has no prompt in it")
    wanted = set(sorted(prompts, key=prompts.get)[: args.max_prompts])
    return [prompt for prompt in prompts if prompt in wanted]


def make_samples(prompts, args):
    """The samples of all prompts, a prompt's own together."""
    suffix = ".webp" if args.clips else ".png"
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
    r"(unet|transformer|vae|text_encoder|text_encoder_2|tokenizer|tokenizer_2|scheduler|motion_adapter)/[^/]+"
    r"|model_index\.json"
)
# What a folder with this file in it is, in which of its folders the weights are, and which files they are.
PICTURE_KINDS = {
    "model_index.json": ("pipeline", None, PARTS),
    LORA: ("lora", None, re.escape(LORA)),
    "unet/config.json": ("denoiser", "unet", r"unet/.+"),  # in a checkpoint of a full run
    "transformer/config.json": ("denoiser", "transformer", r"transformer/.+"),  # of FLUX.2 and Wan
    "config.json": ("denoiser", None, r"config\.json|diffusion_pytorch_model.*"),
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
        names, here = file_names(path), Path(path).is_dir()
        commit = None if here else huggingface_hub.HfApi().repo_info(path).sha  # it may be pushed to again
    except Exception as error:  # a name that no hub has, no network, no access
        raise UserError(f"{told} is neither a file or folder here nor on the hub: {one_line(error)}") from error
    kinds = PICTURE_KINDS if args.motion_adapter_name_or_path is None else CLIP_KINDS
    for mark, (kind, subfolder, files) in kinds.items():
        if mark in names:
            return Model(name, path, kind, fingerprint_of(path, files) if here else f"{path}@{commit}", subfolder)
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


# Of pipelines; any other is Stable Diffusion's.
FAMILIES = {"StableDiffusionXLPipeline": "SDXL", "Flux2KleinPipeline": "FLUX.2", "WanPipeline": "Wan"}


def find_base(args):
    """
    The base as a Model. Settles the flags that depend on it: size, guidance, sampler, dtype, and `clips`, whether the
    models draw clips.

    Raises:
        UserError: if the configurations of the base, or of its motion adapter, cannot be read; for a flag that it has
            no use for.
    """
    source, motion = dict(revision=args.revision, cache_dir=args.cache_dir), args.motion_adapter_name_or_path
    reading = f"--base {args.base}"
    try:
        index = DiffusionPipeline.load_config(args.base, **source)
        family = FAMILIES.get(index["_class_name"], "Stable Diffusion")
        if index.get("boundary_ratio") is not None:
            raise ValueError("it has two transformers, as Wan 2.2 A14B, of which one would be compared")
        vae = AutoencoderKL.load_config(args.base, subfolder="vae", **source)
        if family == "Wan":
            scale = vae.get("scale_factor_spatial", 8)  # Wan 2.1's configuration is older than that
        else:
            scale = 2 ** (len(vae["block_out_channels"]) - 1)
        size = {"Wan": (480, 832), "FLUX.2": (128 * scale, 128 * scale)}.get(family, (256, 256))
        if family not in ("Wan", "FLUX.2") and motion is None:
            size = [scale * UNet2DConditionModel.load_config(args.base, subfolder="unet", **source)["sample_size"]] * 2
            scheduler = DDPMScheduler.load_config(args.base, subfolder="scheduler", **source)
            if "beta_start" not in scheduler:  # neither of --scheduler could draw with it
                raise ValueError(f"it has the noise levels of {scheduler['_class_name']}, not a schedule of betas")
        if motion is not None:
            reading = f"--motion_adapter_name_or_path {motion}"
            longest = MotionAdapter.load_config(motion, cache_dir=args.cache_dir).get("motion_max_seq_length", 32)
            if (args.num_frames or 16) > longest:
                raise ValueError(f"it takes {longest} frames at most: lower --num_frames {args.num_frames or 16}")
    except KeyError as error:
        raise UserError(f"{reading} cannot be used: a configuration of it has no {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{reading} cannot be used: {one_line(error)}") from error
    flow, args.clips = family in ("Wan", "FLUX.2"), family == "Wan" or motion is not None
    args.height, args.width = args.height or size[0], args.width or size[1]
    args.num_frames = args.num_frames or (33 if family == "Wan" else 16)
    args.fps = args.fps or (8 if family != "Wan" else 24 if index.get("expand_timesteps") else 16)
    if args.frame_stride is None and family != "Wan":
        args.frame_stride = 4
    args.batch_size = args.batch_size or (1 if family == "Wan" else 8)
    if args.guidance_scale is None:
        args.guidance_scale = 8.0 if motion is not None else {"SDXL": 5.0, "FLUX.2": 4.0, "Wan": 5.0}.get(family, 7.5)
    args.scheduler = args.scheduler or (None if flow else "dpmsolver")
    check_family(args, scale, family)
    args.dtype = args.dtype or (("bf16" if flow else "fp16") if torch.cuda.is_available() else "fp32")
    prints = [fingerprint_of(args.base, PARTS)]
    prints += [fingerprint_of(motion, CLIP_KINDS["config.json"][2])] if motion is not None else []
    return Model(BASE, args.base, BASE, " with ".join(prints))


def check_family(args, scale, family):
    """Raises UserError for flags that the base has no use for. `scale`: pixels of a latent, along one side."""
    flow = family in ("FLUX.2", "Wan")
    if flow and args.scheduler is not None:
        raise UserError(f"--scheduler {args.scheduler} cannot sample {family}, a flow model: drop it")
    if flow and args.prediction_type is not None:
        raise UserError(f"--prediction_type is not for {family}, which predicts velocities: drop it")
    if flow and args.motion_adapter_name_or_path is not None:
        raise UserError(f"--motion_adapter_name_or_path is not for {family}: drop it")
    if flow and (args.height % (2 * scale) or args.width % (2 * scale)):
        raise UserError(
            f"--height and --width must be multiples of {2 * scale} here, not {args.height} and {args.width}"
        )
    if family == "Wan" and args.num_frames % 4 != 1:
        raise UserError(f"--num_frames must be 4k + 1 for Wan, such as 33 or 81, not {args.num_frames}")
    for name, only in {"max_sequence_length": "FLUX.2", "flow_shift": "Wan", "negative_prompt": "Wan"}.items():
        if family != only and getattr(args, name) is not None:
            raise UserError(f"--{name} is for {only} only: drop it")
    for spec in args.scorers:
        if spec.name in AGAINST_REFERENCE and not args.clips:
            raise UserError(f"--scorer {spec.name} compares clips with real ones, and these models draw pictures")


def denoiser_of(pipeline):
    """The part that is trained: a UNet, or the transformer of FLUX.2 and Wan."""
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def load_pipeline(model, args, device):
    """
    The pipeline that draws with `model`, on `device` and with --scheduler or --flow_shift.

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
    if args.scheduler is not None:
        pipeline.scheduler = make_scheduler(pipeline.scheduler, args)
    if args.flow_shift is not None:
        shift = dict(flow_shift=args.flow_shift, shift=args.flow_shift)  # UniPC's name for it, and Euler's
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **shift)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline.vae, "use_slicing"):
        pipeline.vae.enable_slicing()  # a batch would need more memory than all else
    if isinstance(pipeline, WanPipeline) and args.height * args.width > 480 * 832:
        pipeline.vae.enable_tiling()  # likewise, and as train_sspo_wan.py does with its samples
    if isinstance(pipeline, WanPipeline):  # parts of it stay in fp32, but not what an adapter adds
        for module in pipeline.transformer.modules():
            if isinstance(module, BaseTunerLayer):
                module.to(dtype)
    else:
        pipeline.to(dtype)
    large = hasattr(pipeline, "transformer") or hasattr(pipeline, "text_encoder_2")  # FLUX.2, Wan, SDXL
    if torch.device(device).type == "cuda" and large:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def picture_pipeline(model, args, dtype):
    """The base, or the whole pipeline that `model` is, or the base with its denoiser."""
    options = dict(cache_dir=args.cache_dir, dtype=dtype)
    if model.kind == "denoiser":
        denoiser = AutoModel.from_pretrained(model.path, subfolder=model.subfolder, **options)
        options["unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer"] = denoiser
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
    if index["_class_name"] == "WanPipeline":
        options |= given_vae(args, torch.float32)
        options["dtype"] = {"vae": torch.float32, "default": dtype}  # its VAE was trained in fp32
        return WanPipeline.from_pretrained(path, **options)  # DiffusionPipeline would drop a transformer that is given
    return DiffusionPipeline.from_pretrained(path, **options, **given_vae(args, dtype))


def clip_pipeline(model, args, dtype):
    """AnimateDiff with the base's motion adapter, or with the one that `model` is."""
    options = dict(cache_dir=args.cache_dir, dtype=dtype)
    adapter = model.path if model.kind == "adapter" else args.motion_adapter_name_or_path
    adapter = MotionAdapter.from_pretrained(adapter, subfolder=model.subfolder, **options)
    options.update(revision=args.revision, variant=args.variant)
    return AnimateDiffPipeline.from_pretrained(args.base, motion_adapter=adapter, **options, **given_vae(args, dtype))


def given_vae(args, dtype):
    """The VAE of --pretrained_vae_model_name_or_path, as an option of from_pretrained; {} if there is none."""
    path = args.pretrained_vae_model_name_or_path
    return {} if path is None else {"vae": AutoModel.from_pretrained(path, cache_dir=args.cache_dir, dtype=dtype)}


def make_scheduler(scheduler, args):
    """The sampler of --scheduler on the model's noise schedule; motion adapters have one of their own."""
    config = dict(scheduler.config)
    if args.motion_adapter_name_or_path is not None:
        config = dict(DDPMScheduler(**NOISE_SCHEDULE, prediction_type=config.get("prediction_type", "epsilon")).config)
    # By name: in `config` it would be lost where the base's own configuration does not tell it.
    told = {} if args.prediction_type is None else dict(prediction_type=args.prediction_type)
    if args.scheduler == "ddim":
        return DDIMScheduler.from_config(config, clip_sample=False, **told)  # its default is for pixels
    # A base that came with a solver has the solver's kind in its configuration, and some draw noise of their own.
    return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", **told)


def load_weights(pipeline, path, args):
    """Puts a .safetensors file in the pipeline: a replay entry of either train mode, or LoRA weights for pipelines."""
    weights, denoiser = load_file(path), denoiser_of(pipeline)
    own = {name.split(".lora_")[0] for name in weights}
    if any(".lora_" in name for name in weights) and own <= {name for name, _ in denoiser.named_modules()}:
        add_adapter(denoiser, weights, path, args)
    elif any(".lora" in name for name in weights):
        pipeline.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name)
    else:
        unknown = set(weights) - set(denoiser.state_dict())
        if unknown:
            raise UserError(
                f"{path} does not fit the base: it has {len(unknown)} unknown weights, {min(unknown)} first"
            )
        denoiser.load_state_dict(weights, strict=False)


def add_adapter(denoiser, weights, path, args):
    """Adds the LoRA layers of a replay entry, which are named as peft does."""
    rank = next(weight.shape[0] for name, weight in weights.items() if name.endswith(".lora_A.weight"))
    targets = sorted({name.split(".lora_")[0] for name in weights})
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=find_alpha(path, args), target_modules=targets))
    set_peft_model_state_dict(denoiser, weights)


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
            for part in ("unet", "transformer"):
                if f"{part}.lora_alpha" in told:
                    return told[f"{part}.lora_alpha"]
    raise UserError(f"{path} does not tell its lora_alpha, and no {LORA} of its run lies in {run}: give --lora_alpha")


# ------------------------------------------------------------------------------------------------------------------
# Pictures on disk
# ------------------------------------------------------------------------------------------------------------------


def noise_shape(pipeline, args):
    """The shape of one sample's noise."""
    if isinstance(pipeline, WanPipeline):
        scale, config = pipeline.vae_scale_factor_spatial, pipeline.transformer.config
        frames = (args.num_frames - 1) // pipeline.vae_scale_factor_temporal + 1
        return (config.in_channels, frames, args.height // scale, args.width // scale)
    sides = (args.height // pipeline.vae_scale_factor, args.width // pipeline.vae_scale_factor)
    if hasattr(pipeline, "transformer"):  # FLUX.2's latents are patches of 2 x 2
        return (pipeline.transformer.config.in_channels, sides[0] // 2, sides[1] // 2)
    frames = (args.num_frames,) if args.clips else ()
    return (pipeline.vae.config.latent_channels, *frames, *sides)


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
                    write_picture(picture, folder / sample.file, args.fps)
                progress.update(len(batch))
        del pipeline  # and its memory, before the next is loaded: hooks and modules hold each other
        gc.collect()
        torch.cuda.empty_cache()
    lines = [json.dumps({"file_name": sample.file, "text": sample.prompt}) for sample in samples]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_picture(picture, path, fps):
    """Writes a picture as PNG or a clip as lossless animated WebP: beside its place, then renamed into it."""
    partial = path.with_suffix(".partial")
    if isinstance(picture, list):
        options = dict(format="webp", lossless=True, save_all=True, append_images=picture[1:], loop=0)
        picture[0].save(partial, duration=1000 // fps, **options)
    else:
        picture.save(partial, format="png")
    os.replace(partial, path)


def read_picture(path, args):
    """What write_picture wrote: a picture, or for a clip the list of its frames."""
    with Image.open(path) as image:
        if path.suffix == ".png":
            return image.convert("RGB")
        if not image.is_animated:  # its frames are all the same, and the encoder made a still of them
            return [image.convert("RGB")] * args.num_frames
        frames = []
        for frame in ImageSequence.Iterator(image):
            picture = frame.convert("RGB")
            # The encoder writes a frame that repeats its predecessor as a longer predecessor.
            frames += [picture] * round(frame.info["duration"] / (1000 // args.fps))
        return frames


# What pictures depend on, beside the weights: those drawn otherwise must not be mixed with them.
PICTURE_SETTINGS = (
    "seed num_inference_steps guidance_scale scheduler flow_shift negative_prompt height width num_frames dtype "
    "prediction_type lora_alpha variant revision pretrained_vae_model_name_or_path max_sequence_length fps"
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
            # An older evaluation may have had no such flag, or had --fps without keeping it.
            drawn = before["settings"].get(name, value if name == "fps" else None)
            if drawn != value:
                raise UserError(
                    f"{folder} has pictures that were drawn with --{name} {drawn}, not {value}: draw these in another "
                    "--output_dir"
                )
        kept = {name: value for name, value in before["models"].items() if (folder / "images" / name).is_dir()}
        for name, value in prints.items():
            if kept.get(name, value) != value:
                fix = f"delete {folder / 'images' / name}, or give this one another name"
                raise UserError(
                    f"{folder} has pictures of another model called {name}, whose weights differ: "
                    + ("draw these in another --output_dir" if name == BASE else fix)
                )
        prints = kept | prints
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "models": prints}, indent=1))
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------------------------
# The table and the page
# ------------------------------------------------------------------------------------------------------------------


def distance_rows(distances, args):
    """The table's rows of FVD, which is one number for all of a model's clips."""
    rows = []
    for name, value in distances.items():
        rows.append({"scorer": "fvd", "model": name, "mean": value})
        if name != args.against:
            rows[-1]["difference"] = value - distances[args.against]
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


def text_rows(table, args):
    """The table as text, its headings first."""
    other = "the base" if args.against == BASE else args.against
    return [["scorer", "model", "mean", f"difference to {other} [95 %]", "win rate [95 %]"], *map(shown, table)]


def table_text(rows):
    """The table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


PAGE_DATA = '<script type="application/json" id="data">'


def data_uri(path, args):
    """A picture as JPEG or a clip as WebP, no larger than --page_resolution, inside a URI."""
    picture, buffer, resolution = read_picture(path, args), io.BytesIO(), args.page_resolution
    frames = picture if isinstance(picture, list) else [picture]
    for frame in frames:
        frame.thumbnail((resolution, resolution), Image.Resampling.LANCZOS)
    if isinstance(picture, list):
        options = dict(save_all=True, append_images=frames[1:], duration=1000 // args.fps, loop=0)
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
                "pictures": [data_uri(Path(args.output_dir, "images", name, sample.file), args) for name in models],
                "scores": [[round(float(of_model[name][i]), 5) for name in models] for of_model in scores.values()],
            }
        )
    return rows


def write_page(samples, models, scores, table, args):
    """Writes index.html: a copy of page.html in which the run's data takes the place of the sample."""
    shape = f"{args.width} × {args.height}" + (f" × {args.num_frames} frames" if args.clips else "")
    sampler = args.scheduler or "its own sampler"
    about = (
        f"{len(models)} models, {len(samples) // args.images_per_prompt} prompts, {args.images_per_prompt} "
        f"{'clip' if args.clips else 'picture'}{'s' if args.images_per_prompt > 1 else ''} of each, {shape}, "
        f"{args.num_inference_steps} steps of {sampler}, guidance {args.guidance_scale:g}, seed {args.seed}. "
        f"Base: {args.base}."
    )
    if table and len(samples) // args.images_per_prompt < FEW:
        about += f" {TOO_FEW}"
    data = {
        "about": about,
        "table": text_rows(table, args) if table else [],
        "seed": args.seed,
        "models": models,
        "against": models.index(args.against),
        "scorers": list(scores),
        "lower": [name in LOWER_IS_BETTER for name in scores],
        "samples": page_samples(samples, models, scores, args),
    }
    drawn = "".join(picture for sample in data["samples"] for picture in sample["pictures"])
    data["drawn"] = hashlib.sha256(drawn.encode()).hexdigest()[:16]  # by it the page tells whether votes are of these
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    start = page.index(PAGE_DATA) + len(PAGE_DATA)
    end = page.index("</script>", start)
    page = page[:start] + json.dumps(data).replace("<", "\\u003c") + page[end:]  # no prompt can end the script
    partial = Path(args.output_dir, "index.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, Path(args.output_dir, "index.html"))


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
    references = load_references(args) if args.reference_dir else None
    for spec in args.scorers:
        if spec.name == "fvd":
            distance = FrechetVideoDistance(spec.where, references, device, args.batch_size)
            distances = {name: distance(read_clips(folder, samples, args)) for name, folder in folders.items()}
            continue
        against = spec.name in AGAINST_REFERENCE
        metric = load_metric(spec.name, device) if against else None
        scorer = None if against else load_scorer(spec.name, spec.where, device, args.cache_dir)
        for name, folder in tqdm(folders.items(), desc=f"scoring by {spec.name}"):
            if against:
                pairs = zip(read_clips(folder, samples, args), (references.first(sample.prompt) for sample in samples))
                values = {spec.name: np.array([metric(drawn, real) for drawn, real in pairs])}
                if not np.isfinite(values[spec.name]).all():
                    raise UserError(
                        f"--scorer {spec.name} is not finite: a clip in {folder} is its real one, bit for bit"
                    )
            else:
                values = score_samples(scorer, folder, samples, args)
            for scorer_name, numbers in values.items():
                scores.setdefault(scorer_name, {})[name] = numbers
    return scores, distances


def load_references(args):
    """The real clips of --reference_dir, to be read as the models draw theirs."""
    return References(args.reference_dir, args.num_frames, args.fps, args.frame_stride, args.height, args.width)


def read_clips(folder, samples, args):
    """The clips of `samples` as tensors, one after the other."""
    return (to_tensor(read_picture(folder / sample.file, args)) for sample in samples)


def check_scorers(args, prompts, device):
    """Loads every scorer once, so that what is missing is told before hours of drawing, and not after."""
    for spec in args.scorers:
        if spec.name == "fvd":
            FeatureNetwork(spec.where, device)
        elif spec.name in AGAINST_REFERENCE:
            load_metric(spec.name, "cpu")
        else:
            load_scorer(spec.name, spec.where, "cpu", args.cache_dir)
    if {"ssim", "psnr", "lpips"} & {spec.name for spec in args.scorers}:
        references = load_references(args)
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
    huggingface_hub.utils.enable_progress_bars()  # of downloads, which transformers has taken away with its own
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [find_base(args), *(find_model(name, path, args) for name, path in args.models)]
    prompts = load_prompts(args)
    samples = make_samples(prompts, args)
    check_settings(models, args)
    check_scorers(args, prompts, device)

    # 1. Draw.
    for model in models:
        draw_missing(model, samples, args, device)

    # 2. Score.
    scores, distances = score_models(models, samples, args, device)

    # 3. Compare.
    names = [model.name for model in models]
    table = make_table(scores, names, args) + distance_rows(distances, args)

    content = json.dumps(results(models, samples, scores, distances, table, args), indent=1)
    Path(args.output_dir, "results.json").write_text(content)
    write_page(samples, names, scores, table, args)
    if table:
        print(f"\n{table_text(text_rows(table, args))}")
        if scores and len(prompts) < FEW:
            print(TOO_FEW)
    medium = "clips" if args.clips else "pictures"
    print(f"\n{len(samples)} {medium} a model. Look at {Path(args.output_dir, 'index.html')}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{Path(__file__).name}: out of memory: lower --batch_size or the size ({one_line(error)})")
