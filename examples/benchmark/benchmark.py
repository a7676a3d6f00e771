"""How close train_sspo_sd.py comes to the bare calls of its UNet, and how its cost grows. `make benchmark` runs it.

The model is Stable Diffusion 1.5 at a quarter of its width (UNet of 54 million random weights, text encoder and VAE to
scale), at 16 x 16 latents. The script's own main runs, in this process, on the accelerator if there is one. What is
compared takes turns, run by run, so that a machine's moods fall on both. The table has the median of the ratios of
neighbours, with the lowest and the highest. On a CPU seconds are those that this process computes, whatever else the
machine does.

What an update is: all that the script does from asking for its data to asking for the next one's, logs included. The
first update of a run warms up and is left out. Flags are the script's defaults where a line does not say otherwise.

Lines of the table:

floor         Time of an update over the time of the UNet's calls alone, at the same shapes on a UNet that nothing is
              wrapped around: each call of the update is followed by its bare twin. "bare": for LoRA without adapters,
              and a backward to the input through frozen weights; for full a backward to all weights. "with adapters":
              a UNet with the same LoRA layers in it. "cached": with --cache_latents; otherwise winners and captions
              are encoded in each update, which costs calls of VAE and text encoder that the floor does not count.
              In the first iteration the reference is the base, in the second what the policy was.
flow          The same of train_sspo_flux2.py, LoRA, cached: FLUX.2 [klein] at a twelfth of its width (a transformer of
              27 million random weights), with 64 tokens a picture and 64 a prompt.
obvious way   Time of the same update put together from stock parts, over ours: one example at a time through the stock
              pipeline, its picture to PIL and back through the VAE, a deep-copied reference, winner and rival in
              separate forwards. Once with the pipeline's own sampler, 50 guided steps, once with ours.
draws         Cost of a draw of (timestep, noise) with --draws_per_pair n, over that with 1.
rivals        What a pair costs with --rivals_per_winner, in two iterations of 30 updates of 16 pairs: forwards of the
              UNet on one latent, counted, a backward taken as two; and the time of an update over that with no limit.
              For 28, 280 and 2800 winners, on a UNet of a quarter of the width at 4 x 4 latents.
rows          Time of an update (with a rollout of 2 steps, so that data weigh more) on 100 times as many winners.
replay        Time of an update, its push and its reference's load (--replay_steps 1, full) with --replay_size 8 over
              1, and peak memory of a whole run of ten of them in a process of its own.
turnover      Time of one push and one load, in per cent of the --replay_steps updates that they come once in.
batch         Time a pair at twice the batch, over that at the batch.
processes     Time of an update of two processes over that of one, by the clock, from launches one after the other, at
              the same batch in each process. It needs two devices or idle cores.
calls         Calls of the UNet in an update, counted by a hook, and what `expected_calls` says.

    python examples/benchmark/benchmark.py                          # all lines, a quarter of an hour of one core
    python examples/benchmark/benchmark.py --lines floor obvious    # some
    python examples/benchmark/benchmark.py --quick                  # a tiny model: shows that it runs, not how fast
"""

# ruff: noqa: E402
import argparse
import contextlib
import copy
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notices of image processors concern nothing here
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import datasets
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

import train_sspo_flux2
import train_sspo_sd as script


CAPTIONS = [f"a {size} {color} {thing}" for size in ("small", "big") for color in ("red", "blue") for thing in "abcd"]


# ------------------------------------------------------------------------------------------------------------------
# The formula
# ------------------------------------------------------------------------------------------------------------------


def expected_calls(args):
    """
    The calls of the UNet in one update of one process, in order: the number of latents of each.

    This is the cost that docs/method.md tells: the sampler's steps on the rollout batch, which guidance doubles, then
    for each micro-batch reference and policy on winners and rivals, and with --split_pairs the policy once more.
    Where --rivals_per_winner finds rivals kept, it is less.
    """
    micro_batches, b = args.gradient_accumulation_steps, args.train_batch_size
    if args.loss_type == "sft":
        return micro_batches * [b * args.draws_per_pair]
    steps = args.rollout_steps if args.rollout_strength == 1 else int(args.rollout_steps * args.rollout_strength)
    guided, group, calls = 2 if args.rollout_guidance_scale > 1 else 1, args.rollout_batch_size // b, []
    pair = 5 * [b * args.draws_per_pair] if args.split_pairs else 2 * [2 * b * args.draws_per_pair]
    for first in range(0, micro_batches, group):
        sampled = min(group, micro_batches - first)
        calls += steps * [guided * sampled * b] if args.rivals == "self" else []
        calls += sampled * pair
    return calls


# ------------------------------------------------------------------------------------------------------------------
# Model and data
# ------------------------------------------------------------------------------------------------------------------


def write_model(directory, width=80):
    """Writes Stable Diffusion 1.5 with random weights; `width` is 320 in the original, the other parts go with it."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "examples/quickstart/base/tokenizer", model_max_length=77)
    hidden, groups = width * 12 // 5, width // 10
    text_encoder = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        norm_num_groups=groups,
        attention_head_dim=8,
        cross_attention_dim=hidden,
    )
    vae = AutoencoderKL(
        block_out_channels=[width * 2 // 5 * times for times in (1, 2, 4, 4)],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=groups,
        layers_per_block=2,
        latent_channels=4,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_encoder),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return unet.num_parameters()


def write_flow_model(directory, width=256, layers=(5, 20)):
    """Writes FLUX.2 [klein] with random weights; `width` is 3072 in the original, in heads of 128."""
    torch.manual_seed(0)
    tokenizer = Qwen2TokenizerFast.from_pretrained(ROOT / "examples/quickstart/base_flux2/tokenizer")
    text_encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width // 4,
        intermediate_size=width,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 8,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = Flux2Transformer2DModel(
        num_layers=layers[0],
        num_single_layers=layers[1],
        num_attention_heads=width // 128,
        joint_attention_dim=3 * text_encoder.hidden_size,
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=[width // 16 * times for times in (1, 2, 4, 4)], norm_num_groups=8, layers_per_block=1
    )
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(text_encoder),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(directory)
    return transformer.num_parameters()


def pictures(count, side=160):
    """Soft patches of colour, wider than high."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        patches = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        yield Image.fromarray(patches).resize((side, side * 4 // 5), Image.Resampling.BICUBIC)


def write_folder(directory, count=32):
    """An imagefolder of winners."""
    directory.mkdir()
    with (directory / "metadata.jsonl").open("w") as metadata:
        for i, picture in enumerate(pictures(count)):
            picture.save(directory / f"{i}.jpg")
            metadata.write(json.dumps({"file_name": f"{i}.jpg", "text": CAPTIONS[i % len(CAPTIONS)]}) + "\n")


def write_rows(directory, count, shard=10_000):
    """`count` winners in parquet files, as large data sets come. Their pictures repeat."""
    directory.mkdir()
    encoded = []
    for picture in pictures(100):
        file = io.BytesIO()
        picture.save(file, "jpeg")
        encoded.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for first in range(0, count, shard):
        rows = range(first, min(first + shard, count))
        columns = {"image": [encoded[i % 100] for i in rows], "text": [CAPTIONS[i % len(CAPTIONS)] for i in rows]}
        datasets.Dataset.from_dict(columns, features).to_parquet(directory / f"train-{first:06}.parquet")


# ------------------------------------------------------------------------------------------------------------------
# A run, update by update
# ------------------------------------------------------------------------------------------------------------------


def now():
    """Seconds: of the clock on an accelerator, of this process's work on a CPU, which others may share."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@contextlib.contextmanager
def silent():
    """Without progress bars and logs. Errors still come through."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


class Run:
    """
    A run of the script's main, seen at the moments at which it asks for the data of an update.

    Args:
        note: called at each of these moments, and once when the loop is over.
    Attributes:
        seconds: of each update.
        notes: one more than updates: what `note` returned before each, and at the end.
    """

    def __init__(self, bench, name, updates, data=None, note=lambda: None, **options):
        output, script = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=bench.directory)), bench.script
        self.args = script.parse_args(bench.flags(data or bench.folder, output, max_train_steps=updates, **options))
        self.seconds, self.notes, last, make_loader, save_result = [], [], None, script.make_loader, script.save_result

        def moment():
            nonlocal last
            if last is not None:
                self.seconds.append(now() - last)
            self.notes.append(note())
            last = now()

        def watched_loader(*given, **named):  # an update is one micro-batch here
            loader = make_loader(*given, **named)
            while True:
                moment()
                yield next(loader)

        def watched_result(*given, **named):
            moment()
            save_result(*given, **named)

        patched = dict(make_loader=watched_loader, save_result=watched_result)
        with mock.patch.multiple(script, **patched), silent():
            script.main(self.args)
        shutil.rmtree(output)


class Bench:
    """Script, model, data and settings that the lines share, and the table that they write to."""

    script, settings = script, {}

    def __init__(self, directory, quick):
        self.directory, self.quick = Path(directory), quick
        self.model, self.folder = self.directory / "model", self.directory / "winners"
        self.size = self.write_model()
        write_folder(self.folder)

    def write_model(self):
        return write_model(self.model, width=20 if self.quick else 80)

    def flags(self, data, output, **options):
        settings = {
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": data,
            "output_dir": output,
            "cache_dir": self.directory / "cache",
            "resolution": 128,
            "checkpointing_steps": 10**6,
            "cache_latents": True,
            **({"rollout_steps": 2} if self.quick else {}),
            **self.settings,
            **options,
        }
        words = []
        for name, value in settings.items():
            words += [] if value is False else [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words

    def rounds(self, count):
        return 1 if self.quick else count

    def row(self, line, what, ratios, goal=None):
        """Prints the median of `ratios`, with the lowest and the highest, and the goal."""
        middle = statistics.median(ratios)
        spread = f"({min(ratios):.3f} .. {max(ratios):.3f})" if len(ratios) > 1 else ""
        verdict = f"goal {goal[0]} {goal[1]}" if goal else ""
        print(f"{line:<12} {what:<58} {middle:7.3f} {spread:<18} {verdict}", flush=True)
        return middle


class FlowBench(Bench):
    """The same for FLUX.2, with prompts shorter than the pipeline's 512 tokens."""

    script, settings = train_sspo_flux2, {"max_sequence_length": 64}

    def write_model(self):
        return write_flow_model(self.model, *((128, (1, 2)) if self.quick else ()))


def take_turns(rounds, *jobs):
    """Runs the jobs in turn. Returns for each job the list of what its turns returned, lists put end to end."""
    turns = [[job() for job in jobs] for _ in range(rounds)]
    return [sum((turn[i] for turn in turns), []) for i in range(len(jobs))]


def ratios(over, under):
    return [a / b for a, b in zip(over, under)]


# ------------------------------------------------------------------------------------------------------------------
# The lines
# ------------------------------------------------------------------------------------------------------------------


def bare_denoiser(script, args, adapters):
    """A denoiser that the script's machinery does not touch, with the same adapters or without."""
    models, device = script.load_models(args, torch.float32), "cuda" if torch.cuda.is_available() else "cpu"
    if adapters:
        script.prepare_denoiser(models, args, device)
    elif args.train_mode == "full":
        models.denoiser.requires_grad_(True)
    return models.denoiser.to(device).eval()


def followed_by(script, twins, spent):
    """The script's predict, its call followed by those of the `twins`, whose seconds are added to `spent`."""
    predict = script.predict

    def followed(denoiser, noisy, timesteps, condition):
        calls, backward = [], torch.is_grad_enabled()
        hook = denoiser.register_forward_pre_hook(
            lambda _, positional, named: calls.append(([*positional], dict(named))), with_kwargs=True
        )
        result = predict(denoiser, noisy, timesteps, condition)
        hook.remove()
        ((positional, named),) = calls
        for name, twin in twins.items():
            started = now()
            where, key = (positional, 0) if positional else (named, "hidden_states")
            where[key] = where[key].detach().requires_grad_(backward)
            output = twin(*positional, **named).sample
            if backward:
                output.float().square().mean().backward()
            spent[name] += now() - started
            twin.zero_grad()
        return result

    return followed


def line_floor(bench):
    for mode in ("lora", "full"):
        for cached in (True, False):
            floor(bench, "floor", mode, cached)


def line_flow(bench):
    floor(FlowBench(Path(tempfile.mkdtemp(dir=bench.directory)), bench.quick), "flow", "lora", cached=True)


def floor(bench, line, mode, cached):
    """Rows of one train mode, with latents cached or not."""
    # The first update warms up, the second counts for the first iteration; the third has a push and a load,
    # which are no part of this line, and those behind it count for the second iteration.
    updates, script = 3 + bench.rounds(2 if cached else 1), bench.script
    options = dict(train_mode=mode, cache_latents=cached, reference="latest", replay_steps=3)
    args = script.parse_args(bench.flags(bench.folder, "unused", **options))
    twins = {"bare": bare_denoiser(script, args, adapters=False)}
    if mode == "lora":
        twins["with adapters"] = bare_denoiser(script, args, adapters=True)
    spent = dict.fromkeys(twins, 0.0)
    with mock.patch.object(script, "predict", followed_by(script, twins, spent)):
        run = Run(bench, line, updates, note=lambda: dict(spent), **options)
    of_twins = [
        {name: after[name] - before[name] for name in twins} for before, after in zip(run.notes, run.notes[1:])
    ]
    ours = [seconds - sum(twin.values()) for seconds, twin in zip(run.seconds, of_twins)]
    for iteration, chosen in {"first": slice(1, 2), "second": slice(3, None)}.items():
        if iteration == "first" and (mode == "full" or not cached):
            continue
        for name in twins:
            what = f"{mode}{', cached' if cached else ''}, {iteration} iteration, over {name}"
            under = [twin[name] for twin in of_twins[chosen]]
            bench.row(line, what, ratios(ours[chosen], under), ("<=", 1.05) if cached else None)


class ObviousWay:
    """The same update from stock parts, example by example."""

    def __init__(self, args):
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        self.models = models = script.load_models(args, torch.float32)
        script.prepare_denoiser(models, args, self.device)
        for module in models.encoders:
            module.to(self.device)
        self.reference = copy.deepcopy(models.denoiser)
        self.trained = [parameter for parameter in models.denoiser.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            self.args.pretrained_model_name_or_path,
            unet=self.reference,
            vae=models.vae,
            text_encoder=models.text_encoder,
            tokenizer=models.tokenizer,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.own_scheduler = self.pipeline.scheduler
        self.examples = datasets.load_dataset("imagefolder", data_dir=self.args.train_data_dir, split="train")

    def sample(self, caption, steps):
        """The pipeline's picture; with `steps` None it has its own sampler, guidance and number of steps."""
        self.pipeline.scheduler = script.rollout_scheduler(self.models, self.args) if steps else self.own_scheduler
        ours = dict(num_inference_steps=steps, guidance_scale=self.args.rollout_guidance_scale) if steps else {}
        return self.pipeline(caption, height=self.args.resolution, width=self.args.resolution, **ours).images[0]

    def errors(self, unet, latents, noise, timestep, embeds):
        noisy = self.models.noise_scheduler.add_noise(latents, noise, timestep)
        prediction = unet(noisy, timestep, encoder_hidden_states=embeds).sample
        return (prediction - noise).square().mean().view(1)

    def update(self, steps=None):
        started, args, side = now(), self.args, self.args.resolution
        for i in torch.randint(len(self.examples), (args.train_batch_size,)).tolist():
            example = self.examples[i]
            pictures = [example["image"].resize((side, side)), self.sample(example["text"], steps)]
            pixels = [VaeImageProcessor().preprocess(picture).to(self.device) for picture in pictures]
            winner, rival = (script.encode_image(self.models, one)[0] for one in pixels)
            embeds = script.encode_prompt(self.models, [example["text"]])[0]["prompt_embeds"][None]
            draw = (torch.randn_like(winner), torch.randint(1000, (1,), device=self.device), embeds)
            with torch.no_grad():
                reference = [self.errors(self.reference, half, *draw) for half in (winner, rival)]
            policy = [self.errors(self.models.denoiser, half, *draw) for half in (winner, rival)]
            loss, _ = script.sspo_loss(*policy, *reference, args.beta_dpo)
            (loss / args.train_batch_size).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now() - started


def line_obvious(bench):
    obvious = ObviousWay(script.parse_args(bench.flags(bench.folder, "unused", cache_latents=False)))
    steps = obvious.args.rollout_steps
    obvious.update(1)  # to warm up

    def ours():
        return Run(bench, "obvious", 2, cache_latents=False).seconds[1:]

    ours, own, equal = take_turns(bench.rounds(2), ours, lambda: [obvious.update()], lambda: [obvious.update(steps)])
    bench.row("obvious way", "the pipeline's 50 guided steps, over ours at the defaults", ratios(own, ours), (">=", 6))
    bench.row("obvious way", f"{steps} unguided steps, over ours with as many", ratios(equal, ours), (">=", 1.5))


def in_turns(bench, name, rounds, updates, variants, **options):
    """For each of `variants`, dicts of flags, the seconds of its updates but the first, from runs that take turns."""

    def job(variant):
        return lambda: Run(bench, name, 1 + bench.rounds(updates), **options, **variant).seconds[1:]

    return take_turns(bench.rounds(rounds), *map(job, variants))


def line_draws(bench):
    counts = (1, 2, 4, 8)
    times = in_turns(bench, "draws", 2, 2, [{"draws_per_pair": count} for count in counts], train_batch_size=1)
    for count, measured in list(zip(counts, times))[1:]:
        shares = [ratio / count for ratio in ratios(measured, times[0])]
        goal = ("<=", 0.5) if count == 4 else None
        bench.row("draws", f"cost a draw with {count}, over that with 1", shares, goal)


def line_rivals(bench):
    model, updates = bench.directory / "narrow", 4 if bench.quick else 60
    write_model(model, width=20)
    for winners in (28,) if bench.quick else (28, 280, 2800):
        data, unlimited = bench.directory / f"winners-{winners}", None
        write_rows(data, winners)
        for kept in (None, 4, 1):
            forwards = []

            def count(module, inputs, forwards=forwards):
                if isinstance(module, UNet2DConditionModel):
                    forwards.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))

            options = dict(pretrained_model_name_or_path=model, train_batch_size=16, resolution=32)
            options["replay_steps"] = updates // 2
            hook = register_module_forward_pre_hook(count)
            run = Run(bench, "rivals", updates, data, **options, **({"rivals_per_winner": kept} if kept else {}))
            hook.remove()
            seconds = sum(run.seconds)
            unlimited = unlimited or seconds
            what = f"{winners} winners, {kept or 'no limit of'} rivals each: forwards a pair, time"
            print(
                f"{'rivals':<12} {what:<58} {sum(forwards) / updates / 16:7.2f} {seconds / unlimited:.2f}", flush=True
            )


def line_rows(bench):
    few, many = (100, 400) if bench.quick else (1_000, 100_000)
    for count in (few, many):
        write_rows(bench.directory / f"rows-{count}", count)
    variants = [{"data": bench.directory / f"rows-{count}"} for count in (few, many)]
    for streaming in (False, True):
        options = dict(streaming=streaming, cache_latents=False, rollout_steps=2, train_batch_size=2)
        short, long = in_turns(bench, "rows", 2, 5, variants, **options)
        what = f"{many} rows{', streaming' if streaming else ''}, over {few}"
        bench.row("rows", what, ratios(long, short), ("<=", 1.02))


MEASURED_RUN = """
import sys, torch, train_sspo_sd as script
script.main(script.parse_args(sys.argv[1:]))
if torch.cuda.is_available():
    print("peak", torch.cuda.max_memory_allocated())
else:
    print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_memory(bench, **options):
    """
    Peak of the accelerator's memory, or of resident memory (Linux), in a run in a process of its own.

    The run reads it itself: what the system tells a parent of its child's peak begins with the parent's own.
    """
    flags = bench.flags(bench.folder, tempfile.mkdtemp(dir=bench.directory), report_to="none", **options)
    command = [sys.executable, "-c", MEASURED_RUN, *flags]
    printed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    return int(printed.rsplit("peak", 1)[1])


def line_replay(bench):
    options = dict(train_mode="full", train_batch_size=1, rollout_steps=2, replay_steps=1)
    sizes = [{"replay_size": size} for size in (1, 8)]
    small, large = in_turns(bench, "replay", 2, 11, sizes, **options)
    full = 0 if bench.quick else 6  # updates after the first until a bank of 8 is full
    small, large = ([time for i, time in enumerate(times) if i % 11 >= full] for times in (small, large))
    bench.row("replay", "8 checkpoints over 1, time", ratios(large, small), ("<=", 1.03))
    small, large = (peak_memory(bench, **size, max_train_steps=10, **options) for size in sizes)
    bench.row("replay", "8 checkpoints over 1, peak memory", [large / small], ("<=", 1.03))


def line_turnover(bench):
    """Each update pushes the policy and loads it as the next one's reference; what that takes is told apart."""
    replay_steps = script.parse_args(bench.flags("unused", "unused")).replay_steps
    for mode in ("lora", "full"):
        spent = [0.0]

        def timed(function, spent=spent):
            def call(*given):
                started = now()
                result = function(*given)
                spent[0] += now() - started
                return result

            return call

        bank = script.ReplayBank
        with (
            mock.patch.object(script, "policy_weights", timed(script.policy_weights)),
            mock.patch.object(script, "load_reference", timed(script.load_reference)),
            mock.patch.object(bank, "push", timed(bank.push)),
            mock.patch.object(bank, "load", timed(bank.load)),
        ):
            options = dict(train_mode=mode, train_batch_size=1, replay_steps=1, reference="latest")
            run = Run(bench, "turnover", 2 + bench.rounds(3), note=lambda spent=spent: spent[0], **options)
        turns = [after - before for before, after in zip(run.notes, run.notes[1:])][1:-1]  # the last loads nothing
        updates = [seconds - turn for seconds, turn in zip(run.seconds[1:], turns)]
        share = [100 * ratio / replay_steps for ratio in ratios(turns, updates)]
        bench.row("turnover", f"{mode}, per cent of {replay_steps} updates", share)


def line_batch(bench):
    sizes = (1, 2, 4)
    times = in_turns(bench, "batch", 2, 2, [{"train_batch_size": size} for size in sizes])
    for i in range(1, len(sizes)):
        what = f"time a pair at batch {sizes[i]}, over batch {sizes[i - 1]}"
        bench.row("batch", what, [ratio / 2 for ratio in ratios(times[i], times[i - 1])], ("<=", 1))


def line_processes(bench):
    """Real launches, one after the other: the first update warms up. On GPUs it takes two of them."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return print("processes: not run, there is one GPU")
    updates, times, environment = 1 + bench.rounds(4), {}, dict(os.environ)
    if not torch.cuda.is_available():
        environment.update(ACCELERATE_USE_CPU="1", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    for processes in (1, 2):
        output = bench.directory / f"processes-{processes}"
        options = dict(train_batch_size=2, max_train_steps=updates, report_to="none")
        launch = ["accelerate.commands.launch", "--num_machines", 1, "--num_processes", processes]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
        script_and_flags = [ROOT / "train_sspo_sd.py", *bench.flags(bench.folder, output, **options)]
        command = list(map(str, [sys.executable, "-m", *launch, *script_and_flags]))
        log = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stderr
        if f"of {2 * processes} pairs" not in log:
            sys.exit(f"accelerate did not start {processes} processes: {log}")
        lines = (output / "metrics.jsonl").read_text().splitlines()
        times[processes] = [json.loads(line)["time/update"] for line in lines][1:]
    bench.row("processes", "2 over 1, each with the same batch", ratios(times[2], times[1]))


def line_calls(bench):
    for options in (
        {},
        {"rollout_guidance_scale": 7.5},
        {"rollout_strength": 0.5},
        {"loss_type": "sft"},
        {"train_mode": "full", "draws_per_pair": 2},
    ):
        calls = []

        def count(module, inputs, calls=calls):
            if isinstance(module, UNet2DConditionModel):
                calls.append(len(inputs[0]))

        hook = register_module_forward_pre_hook(count)
        run = Run(bench, "calls", 1, train_batch_size=1, **options)
        hook.remove()
        expected = expected_calls(run.args)
        what = " ".join(f"--{name} {value}" for name, value in options.items()) or "defaults"
        verdict = "as expected" if calls == expected else f"expected {len(expected)}"
        print(f"{'calls':<12} {what:<58} {len(calls):7}                    {verdict}", flush=True)


LINES = {name.removeprefix("line_"): line for name, line in list(globals().items()) if name.startswith("line_")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES), help="lines of the table to measure")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round")
    args = parser.parse_args(argv)
    started = time.time()
    datasets.disable_progress_bars()
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(directory, args.quick)
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        print(f"{device}, load {os.getloadavg()[0]:.1f}; UNet of {bench.size / 1e6:.1f} million weights")
        for line in args.lines:
            LINES[line](bench)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
