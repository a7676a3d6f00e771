"""SSPO for a video flow model in minutes on a CPU: align a small pipeline in Wan 2.1's layout with steady clips.

1. Writes the winners: steady clips of 28 emoji that move left or right, turn or grow, as MP4 files.
2. Runs train_sspo_wan.py on them, by the command that it prints.
3. Makes clips of the 12 emoji that were held out of alignment with base and aligned model, from the same noise,
   measures how much they flicker and how they move, lets a classifier that knows neither tell whether the emoji is
   right, and saves a before/after animation.

    python examples/quickstart/quickstart_wan.py                   # SSPO
    python examples/quickstart/quickstart_wan.py --loss_type sft   # any flag of train_sspo_wan.py may follow

The training's settings were chosen by clips of the captions that it does see (--captions aligned), from other seeds
(--sample_seed); the held-out ones are for the report.
"""

# ruff: noqa: E402
import logging
import os


# Before the libraries are imported, as in quickstart.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from clips import FRAMES_PER_SECOND
from diffusers import WanPipeline
from quickstart import HERE, launch_command, load_aligned
from quickstart_video import run


BASE = HERE / "base_wan"
SAMPLER = dict(num_inference_steps=20, guidance_scale=1.5, num_frames=9, height=64, width=64)


def training_command(args, extra):
    """What a user would type; `extra` comes last and so wins."""
    settings = {
        "pretrained_model_name_or_path": BASE,
        "train_data_dir": args.output_dir / "winners",
        "output_dir": args.output_dir / "aligned",
        "height": 64,
        "width": 64,
        "num_frames": SAMPLER["num_frames"],
        "fps": FRAMES_PER_SECOND,
        "seed": args.seed,
        "train_mode": "lora",
        "rank": 16,
        "learning_rate": 3e-3,
        "train_batch_size": 8,
        "max_train_steps": 40,
        "ssr": "none",
        "rival_weight": 0.3,
        "draws_per_pair": 2,
        "replay_steps": 10,
        "rollout_steps": 10,
        "rollout_guidance_scale": 1.5,
    }
    return launch_command("train_sspo_wan.py", settings, extra)


def load(folder, device):
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_pipeline(device, aligned=None):
    """The stock pipeline, as it is embedded or with what a run has left in `aligned`."""
    return load(BASE, device) if aligned is None else load_aligned(BASE, aligned, device, load)


if __name__ == "__main__":
    run(__doc__, training_command, load_pipeline, SAMPLER, output_dir="quickstart_wan")
