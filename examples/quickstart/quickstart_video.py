"""SSPO for video in minutes on a CPU: align a small motion adapter over the emoji base with steady clips.

1. Writes the winners: steady clips of 28 emoji that move left or right, turn or grow, as MP4 files.
2. Runs train_sspo_video.py on them, by the command that it prints.
3. Makes clips of the 12 emoji that were held out of alignment with base and aligned adapter, from the same seeds,
   measures how much they flicker and how they move, lets a classifier that knows neither tell whether the emoji is
   right, and saves a before/after animation.

    python examples/quickstart/quickstart_video.py                   # SSPO
    python examples/quickstart/quickstart_video.py --loss_type sft   # any flag of train_sspo_video.py may follow

The training's settings were chosen by clips of the captions that it does see (--captions aligned), from other seeds
(--sample_seed); the held-out ones are for the report.
"""

# ruff: noqa: E402
import argparse
import json
import logging
import os
import shutil
import time
from pathlib import Path


# Before the libraries are imported, as in quickstart.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
from clips import FRAMES, FRAMES_PER_SECOND, MOTIONS, caption, flicker, render, write_winners
from diffusers import AnimateDiffPipeline, DPMSolverMultistepScheduler, MotionAdapter
from diffusers.utils import logging as diffusers_logging
from glyphs import ALIGNED, HELD_OUT, TEST_SEEDS
from PIL import Image
from quickstart import BASE, HERE, before_after, launch_command, train
from scorer import load_scorer, score
from transformers.utils import logging as transformers_logging


ADAPTER = HERE / "adapter"
NOISE_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1)
SHOWN = 8  # clips in the animation
SAMPLER = dict(num_inference_steps=12, guidance_scale=3.0, num_frames=FRAMES, height=64, width=64)


def training_command(args, extra):
    settings = {
        "pretrained_model_name_or_path": BASE,
        "motion_adapter_name_or_path": ADAPTER,
        "train_data_dir": args.output_dir / "winners",
        "output_dir": args.output_dir / "aligned",
        "resolution": 64,
        "num_frames": FRAMES,
        "frame_stride": 1,
        "seed": args.seed,
        "train_mode": "full",
        "learning_rate": 1e-3,
        "train_batch_size": 4,
        "max_train_steps": 40,
        "ssr": "none",
        "rival_weight": 0.3,
        "draws_per_pair": 2,
        "replay_steps": 10,
        "rollout_steps": 10,
        "rollout_strength": 0.7,
        "rollout_guidance_scale": 3.0,
    }
    return launch_command("train_sspo_video.py", settings, extra, threads=1)  # two are slower on a model this small


def load_pipeline(device, aligned=None):
    """The stock pipeline with the base's adapter, or with what a run has left in `aligned`."""
    full = aligned is not None and (aligned / "config.json").exists()
    adapter = MotionAdapter.from_pretrained(aligned if full else ADAPTER)
    pipeline = AnimateDiffPipeline.from_pretrained(BASE, motion_adapter=adapter)
    pipeline.scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE)
    pipeline.set_progress_bar_config(disable=True)
    if aligned is not None and not full:
        pipeline.load_lora_weights(aligned)
    return pipeline.to(device)


def sample(pipeline, jobs, first_seed, sampler=SAMPLER, batch_size=12):
    """A clip (frames, 64, 64, 3) uint8 for each (name, motion); its noise belongs to its place, whatever the model."""
    clips = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        noise = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(batch))]
        frames = pipeline([caption(*job) for job in batch], generator=noise, output_type="pil", **sampler).frames
        clips += [np.stack([np.asarray(frame) for frame in clip]) for clip in frames]
    return clips


def flicker_of(clip):
    """
    How unsteady a clip's tone is: mean squared difference, from frame to frame, of each channel's median and 2 %
    quantile, on a scale from 0 to 1. These are the ground and the outlines, which neither moving nor turning changes;
    a plain difference of frames, even after motion compensation, would mostly measure the turning and the growing.
    """
    tones = np.quantile(clip.reshape(len(clip), -1, 3) / 255, [0.02, 0.5], axis=1)
    return np.square(np.diff(tones, axis=1)).mean()


def glyph_of(frame):
    """Where a frame is unlike its ground, (64, 64) bool."""
    return np.abs(frame.astype(int) - np.median(frame, axis=(0, 1))).max(axis=2) > 40


def motion_of(clip):
    """The motion that a clip shows, by where its glyph is and how large in the first and in the last frame."""
    first, last = glyph_of(clip[0]), glyph_of(clip[-1])
    if not first.any() or not last.any():
        return None
    moved = np.nonzero(last)[1].mean() - np.nonzero(first)[1].mean()
    if abs(moved) > 13:  # turning moves the middle of a glyph too, by up to 12
        return "moving left" if moved < 0 else "moving right"
    return "growing" if last.sum() > 1.6 * first.sum() else "turning"


def framed(frame):
    """The glyph of a frame as large as the classifier is used to, on white, with a rim."""
    away = glyph_of(frame)
    if not away.any():
        return Image.fromarray(frame)
    rows, columns = np.nonzero(away.any(axis=1))[0], np.nonzero(away.any(axis=0))[0]
    glyph = Image.fromarray(frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = 54 / max(glyph.size)
    glyph = glyph.resize([max(round(side * scale), 1) for side in glyph.size], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (64, 64), "white")
    canvas.paste(glyph, ((64 - glyph.width) // 2, (64 - glyph.height) // 2))
    return canvas


def measure(clips, jobs, scorer):
    """
    Each clip's flicker, whether it moves as its caption says, and its identity if that does not turn it: the scorer
    knows upright glyphs only.
    """
    identities = [
        score([framed(frame) for frame in clip], [name] * len(clip), scorer)["identity"]
        for clip, (name, motion) in zip(clips, jobs)
        if motion != "turning"
    ]
    return {
        "flicker": np.array([flicker_of(clip) for clip in clips]),
        "as told": np.array([float(motion_of(clip) == motion) for clip, (_, motion) in zip(clips, jobs)]),
        "identity": np.array(identities),
    }


def summary(measured):
    """Means with their standard errors; last the difference of base and aligned, clip by clip from the same seed."""
    pairs = {name: values - measured["aligned"][name] for name, values in measured["base"].items()}
    measured = measured | {"base - aligned": pairs}
    return {row: {name: mean_and_error(some) for name, some in values.items()} for row, values in measured.items()}


def mean_and_error(values):
    return {"mean": float(values.mean()), "error": float(values.std(ddof=1) / len(values) ** 0.5)}


def table(results):
    lines = [f"{'clips':<18} {'flicker':>18} {'moves as told':>16} {'identity':>16}"]
    for row, result in results.items():
        numbers = [
            f"{result[name]['mean']:.{digits}f} ± {result[name]['error']:.{digits}f}"
            for name, digits in (("flicker", 4), ("as told", 3), ("identity", 3))
        ]
        lines.append(f"{row:<18} {numbers[0]:>18} {numbers[1]:>16} {numbers[2]:>16}")
    return "\n".join(lines)


def animation(rows, jobs, path):
    """Rows of clips under their captions, as a GIF that plays as fast as the clips, and its frames side by side."""
    names = [name for name, _ in jobs]
    frames = [
        before_after({row: [Image.fromarray(clip[i]) for clip in clips] for row, clips in rows.items()}, names, zoom=2)
        for i in range(len(rows["base"][0]))
    ]
    frames = [frame.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)
    lines = [np.concatenate(list(clip), axis=1) for i in range(len(jobs)) for clip in (c[i] for c in rows.values())]
    Image.fromarray(np.concatenate(lines)).save(path.with_suffix(".png"))


def run(description, training_command, load=load_pipeline, sampler=SAMPLER, output_dir="quickstart_video"):
    """
    A quickstart of clips from its command line to its table.

    Args:
        description: of the program, for its --help.
        training_command: function of the arguments and the flags that follow them.
        load: function of a device and, for the aligned model, the folder that a run has left.
        sampler: what the pipeline is called with, beside captions and noise.
        output_dir: where all is written by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--winners_per_caption", type=int, default=2)
    parser.add_argument("--captions", choices=["held out", "aligned"], default="held out", help="emoji of the clips")
    parser.add_argument("--clips", type=int, default=48, help="measured clips of a model, emoji and motions in turn")
    parser.add_argument("--sample_seed", type=int, default=1_000, help="first seed of the measured clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    args, extra = parser.parse_known_args()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    device, clock = "cuda" if torch.cuda.is_available() else "cpu", [time.time()]

    def stage(name):
        clock.append(time.time())
        print(f"[{clock[-1] - clock[-2]:.0f} s] {name}", flush=True)

    frames = sampler["num_frames"]
    count = write_winners(args.output_dir / "winners", args.winners_per_caption, count=frames)
    stage(f"{count} winners written to {args.output_dir / 'winners'}")
    if not any(word.startswith("--resume_from_checkpoint") for word in extra):
        shutil.rmtree(args.output_dir / "aligned", ignore_errors=True)  # what another run left may be of another kind
    train(training_command(args, extra))
    stage("trained")

    names, motions = HELD_OUT if args.captions == "held out" else ALIGNED, list(MOTIONS)
    jobs = [(names[i % len(names)], motions[(i + i // len(names)) % len(motions)]) for i in range(args.clips)]
    aligned = args.output_dir / "aligned"
    rows = {
        "base": sample(load(device), jobs, args.sample_seed, sampler),
        "aligned": sample(load(device, aligned), jobs, args.sample_seed, sampler),
    }
    steady = [render(*job, TEST_SEEDS, frames) for job in jobs]
    flickering = [flicker(clip, *job, TEST_SEEDS) for clip, job in zip(steady, jobs)]
    clips, scorer = rows | {"real, steady": steady, "real, flickering": flickering}, load_scorer()
    results = summary({row: measure(some, jobs, scorer) for row, some in clips.items()})
    stage("sampled and measured")

    animation(
        {model: some[:SHOWN] for model, some in rows.items()}, jobs[:SHOWN], args.output_dir / "before_after.gif"
    )
    (args.output_dir / "scores.json").write_text(json.dumps(results, indent=1))
    print(f"\n{len(jobs)} clips of {args.captions} emoji a model, same seeds, ± standard error\n\n{table(results)}\n")
    print(f"Total {time.time() - clock[0]:.0f} s. Look at {args.output_dir / 'before_after.gif'}")


if __name__ == "__main__":
    run(__doc__, training_command)
