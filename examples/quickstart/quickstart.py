"""SSPO in minutes on a CPU: align the emoji base with clean pictures, then look at it and score it.

1. Writes the winners: clean renders of 28 emoji, in poses that the base was not trained on.
2. Runs train_sspo_sd.py on them, by the command that it prints.
3. Draws the 12 emoji that were held out of alignment with base and aligned model, from the same seeds, lets a
   classifier that knows neither judge them, and saves a before/after picture.

    python examples/quickstart/quickstart.py                    # SSPO
    python examples/quickstart/quickstart.py --loss_type sft    # any flag of train_sspo_sd.py may follow and wins

The training's settings were chosen by the scores of the captions that it does see (--aligned_per_caption), from other
seeds (--sample_seed); the held-out ones are for the report.
"""

# ruff: noqa: E402
import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path


# Before torch is imported: on a machine that has other work too, threads that wait by spinning take most of its time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before the libraries are: their notices of image processors and 4-bit kernels concern nothing that runs here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from glyphs import ALIGNED, HELD_OUT, write_winners
from PIL import Image, ImageDraw, ImageFont
from scorer import accuracy, load_scorer, score
from transformers.utils import logging as transformers_logging


HERE = Path(__file__).resolve().parent
BASE = HERE / "base"
SAMPLER = {"num_inference_steps": 20, "guidance_scale": 3.0}
SHOWN = HELD_OUT[:8]


def training_command(args, extra):
    """What a user would type; `extra` comes last and so wins."""
    settings = {
        "pretrained_model_name_or_path": BASE,
        "train_data_dir": args.output_dir / "winners",
        "output_dir": args.output_dir / "aligned",
        "resolution": 64,
        "seed": args.seed,
        "train_mode": "lora",
        "rank": 16,
        "learning_rate": 3e-3,
        "train_batch_size": 16,
        "max_train_steps": 50,
        "ssr": "none",
        "rival_weight": 0.3,
        "draws_per_pair": 2,
        "replay_steps": 10,
        "rollout_steps": 10,
        "rollout_guidance_scale": 3.0,
    }
    return launch_command("train_sspo_sd.py", settings, extra)


def launch_command(script, settings, extra, threads=None):
    """How one of the scripts is launched on this machine with these settings; `extra` wins. All threads by default."""
    flags = [text for flag, value in settings.items() for text in (f"--{flag}", str(value))]
    launch = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if not torch.cuda.is_available():
        launch += ["--cpu", "--num_cpu_threads_per_process", str(threads or os.cpu_count())]
    return [*launch, str(HERE.parents[1] / script), *flags, "--cache_latents", *extra]


def train(command):
    """Run it with the accelerate that belongs to this Python, without a hub and without telemetry."""
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": folder + os.pathsep + os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    print("\n$ " + shlex.join(command) + "\n", flush=True)
    subprocess.run(command, check=True, env=environment)


def load_pipeline(folder, device):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_aligned(base, aligned, device, load=load_pipeline):
    if (aligned / "model_index.json").exists():  # --train_mode full leaves a whole pipeline
        return load(aligned, device)
    pipeline = load(base, device)
    pipeline.load_lora_weights(aligned)
    return pipeline


def draw(pipeline, captions, per_caption, first_seed, sampler=SAMPLER, batch_size=24):
    """`per_caption` pictures of every caption; a picture's noise belongs to its place, whatever the model."""
    jobs = [(caption, index) for index in range(per_caption) for caption in captions]
    pictures = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        seeds = range(first_seed + start, first_seed + start + len(batch))
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        pictures += pipeline(prompt=[caption for caption, _ in batch], generator=noise, **sampler).images
    return pictures, [caption for caption, _ in jobs]


def before_after(rows, captions, zoom=3, margin=6, left=118, top=34):
    """Rows of pictures under their captions: {row's name: pictures}."""
    side = rows[next(iter(rows))][0].width * zoom
    font, small = ImageFont.load_default(size=22), ImageFont.load_default(size=19)
    width, height = left + len(captions) * (side + margin), top + len(rows) * (side + margin)
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, caption in enumerate(captions):
        pen.text((left + column * (side + margin) + side / 2, top / 2), caption, "black", small, anchor="mm")
    for row, (name, pictures) in enumerate(rows.items()):
        y = top + row * (side + margin)
        pen.text((left / 2, y + side / 2), name, "black", font, anchor="mm", align="center")
        for column, picture in enumerate(pictures):
            x = left + column * (side + margin)
            canvas.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
            pen.rectangle((x, y, x + side - 1, y + side - 1), outline="#d0d0d0")
    return canvas


def table(results):
    lines = [f"{'captions':<10} {'model':<8} {'preference':>15} {'identity':>15} {'score':>15}"]
    for (captions, model), result in results.items():
        numbers = [
            f"{result[name]:.3f} ± {result[name + '_error']:.3f}" for name in ("preference", "identity", "score")
        ]
        lines.append(f"{captions:<10} {model:<8} " + " ".join(f"{number:>15}" for number in numbers))
    return "\n".join(lines)


def run(description, base, training_command, load=load_pipeline, sampler=SAMPLER, output_dir="quickstart"):
    """
    A quickstart from its command line to its table.

    Args:
        description: of the program, for its --help.
        base: folder of the pipeline that is aligned.
        training_command: function of the arguments and the flags that follow them.
        load: function of a pipeline's folder and a device.
        sampler: what the pipeline is called with, beside captions and noise.
        output_dir: where all is written by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--winners_per_caption", type=int, default=20)
    parser.add_argument("--per_caption", type=int, default=10, help="scored pictures of each held-out caption")
    parser.add_argument("--aligned_per_caption", type=int, default=0, help="the same of each aligned caption")
    parser.add_argument("--sample_seed", type=int, default=1_000, help="first seed of the scored pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    args, extra = parser.parse_known_args()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    device, clock = "cuda" if torch.cuda.is_available() else "cpu", [time.time()]

    def stage(name):
        clock.append(time.time())
        print(f"[{clock[-1] - clock[-2]:.0f} s] {name}", flush=True)

    count = write_winners(args.output_dir / "winners", args.winners_per_caption)
    stage(f"{count} winners of {len(ALIGNED)} captions written to {args.output_dir / 'winners'}")
    if not any(word.startswith("--resume_from_checkpoint") for word in extra):
        shutil.rmtree(args.output_dir / "aligned", ignore_errors=True)  # what another run left may be of another kind
    train(training_command(args, extra))
    stage("trained")

    scorer, results, rows = load_scorer(), {}, {}
    captions = {"held out": (HELD_OUT, args.per_caption), "aligned": (ALIGNED, args.aligned_per_caption)}
    for model in ("base", "aligned"):
        aligned = args.output_dir / "aligned"
        pipeline = load(base, device) if model == "base" else load_aligned(base, aligned, device, load)
        for kind, (names, per_caption) in captions.items():
            if per_caption:
                pictures, texts = draw(pipeline, names, per_caption, args.sample_seed, sampler)
                results[kind, model] = score(pictures, texts, scorer)
                if kind == "held out":
                    rows[model] = pictures[: len(SHOWN)]
    stage("sampled and scored")

    before_after(rows, SHOWN).save(args.output_dir / "before_after.png")
    results = dict(sorted(results.items(), key=lambda item: item[0][0] != "held out"))
    (args.output_dir / "scores.json").write_text(
        json.dumps(
            [{"captions": captions, "model": model} | result for (captions, model), result in results.items()],
            indent=1,
        )
    )
    tested = accuracy(scorer)
    print(
        f"\nScorer, on {tested['pictures']} fresh renders: right emoji {tested['emoji']:.1%}, "
        f"clean or degraded {tested['clean or degraded']:.1%}\n"
        f"{len(HELD_OUT) * args.per_caption} pictures a model, same seeds, ± standard error\n\n{table(results)}\n\n"
        f"Total {time.time() - clock[0]:.0f} s. Look at {args.output_dir / 'before_after.png'}"
    )


if __name__ == "__main__":
    run(__doc__, BASE, training_command)
