"""SSPO for a flow model in minutes on a CPU: align a small pipeline in FLUX.2 [klein]'s layout with clean pictures.

1. Writes the winners: clean renders of 28 emoji, in poses that the base was not trained on.
2. Runs train_sspo_flux2.py on them, by the command that it prints.
3. Draws the 12 emoji that were held out of alignment with base and aligned model, from the same noise, lets a
   classifier that knows neither judge them, and saves a before/after picture.

    python examples/quickstart/quickstart_flux2.py                    # SSPO
    python examples/quickstart/quickstart_flux2.py --loss_type sft    # any flag of train_sspo_flux2.py may follow

The training's settings were chosen by the scores of the captions that it does see (--aligned_per_caption), from other
seeds (--sample_seed); the held-out ones are for the report.
"""

# ruff: noqa: E402
import logging
import os


# Before the libraries are imported, as in quickstart.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from diffusers import Flux2KleinPipeline
from quickstart import HERE, launch_command, run


BASE = HERE / "base_flux2"
TEXT_LENGTH = 12  # tokens of a prompt, template included: as the base was trained
SAMPLER = dict(num_inference_steps=20, guidance_scale=3.0, height=64, width=64, max_sequence_length=TEXT_LENGTH)


def training_command(args, extra):
    """What a user would type; `extra` comes last and so wins."""
    settings = {
        "pretrained_model_name_or_path": BASE,
        "train_data_dir": args.output_dir / "winners",
        "output_dir": args.output_dir / "aligned",
        "resolution": 64,
        "max_sequence_length": TEXT_LENGTH,
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
    return launch_command("train_sspo_flux2.py", settings, extra)


def load_pipeline(folder, device):
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


if __name__ == "__main__":
    run(__doc__, BASE, training_command, load_pipeline, SAMPLER, output_dir="quickstart_flux2")
