"""The embedded model is what its README says: small, drawn by the stock pipeline, recognised by the scorer."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image


EMOJI = ROOT / "examples" / "emoji"
sys.path.insert(0, str(EMOJI))

import glyphs  # noqa: E402
import scorer  # noqa: E402


def test_base_is_small_and_safe():
    files = [path for path in (EMOJI / "base").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_base_draws_what_it_is_asked_for_and_often_degraded():
    """Held-out captions, 20 steps, two seeds each: nearly always the right glyph, but not always a clean one."""
    pipeline = StableDiffusionPipeline.from_pretrained(EMOJI / "base")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    captions = glyphs.HELD_OUT * 2
    generators = [scorer.torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    pictures = pipeline(captions, generator=generators, num_inference_steps=20, guidance_scale=3.0).images
    result = scorer.score(pictures, captions)
    assert result["identity"] > 0.9
    assert 0.3 < result["preference"] < 0.9


def test_autoencoder_is_no_bottleneck():
    """Clean pictures are still clean and still the same behind it."""
    vae = AutoencoderKL.from_pretrained(EMOJI / "base", subfolder="vae")
    captions = glyphs.CAPTIONS
    pictures = [glyphs.render(caption, 4_000_000) for caption in captions]
    with scorer.torch.no_grad():
        decoded = vae.decode(vae.encode(scorer.to_tensor(pictures)).latent_dist.mode()).sample
    decoded = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    assert scorer.score(decoded, captions)["score"] > 0.8
    assert np.abs(decoded.astype(int) - np.stack(pictures)).mean() < 6


def test_scorer_knows_its_glyphs_and_what_is_degraded():
    tested = scorer.accuracy(scorer.load_scorer(), per_caption=5)
    assert tested["emoji"] > 0.97 and tested["clean or degraded"] > 0.97
    wrong = scorer.score([glyphs.render("banana", 1)] * 2, ["red apple", "banana"])
    assert wrong["preference"] > 0.8, "clean"
    assert 0.4 < wrong["score"] < 0.6, "but only one of them right"


def test_winners_are_clean_new_and_of_the_aligned_captions(tmp_path):
    count = glyphs.write_winners(tmp_path, per_caption=2)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == count == 2 * len(glyphs.ALIGNED)
    assert {row["text"] for row in rows} == set(glyphs.CAPTIONS) - set(glyphs.HELD_OUT)
    pictures = [Image.open(tmp_path / row["file_name"]) for row in rows]
    assert scorer.score(pictures, [row["text"] for row in rows])["score"] > 0.9
    first = glyphs.render("banana", glyphs.BASE_SEEDS)
    assert all(np.any(np.asarray(picture) != np.asarray(first)) for picture in pictures), "poses of their own"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart as `make quickstart` runs it, with three updates and few pictures."""
    output = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--output_dir", output, "--per_caption", 1]
    command += ["--winners_per_caption", 2, "--max_train_steps", 3, "--train_batch_size", 4, "--report_to", "none"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def test_quickstart_trains_scores_and_draws(quickstart):
    output, printed = quickstart
    assert "train_sspo_sd.py" in printed, "the command is shown"
    scores = json.loads((output / "scores.json").read_text())
    assert {row["model"] for row in scores} == {"base", "aligned"}
    for row in scores:
        assert all(0 <= row[name] <= 1 for name in ("preference", "identity", "score"))
        assert f"{row['score']:.3f}" in printed
    assert len((output / "aligned" / "metrics.jsonl").read_text().splitlines()) == 3
    picture = Image.open(output / "before_after.png")
    assert picture.width > 600 and len(picture.getcolors(10**6)) > 1000
