"""The embedded model is what its README says: small, drawn by the stock pipeline, recognised by the scorer."""

import json
import sys

import numpy as np
import pytest
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    WanPipeline,
)
from helpers import ROOT, newcomer, notices
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer


HERE = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(HERE))

import clips  # noqa: E402
import glyphs  # noqa: E402
import quickstart  # noqa: E402
import quickstart_flux2  # noqa: E402
import quickstart_video  # noqa: E402
import quickstart_wan  # noqa: E402
import scorer  # noqa: E402
import train_base_wan  # noqa: E402


@pytest.mark.parametrize("base", ["base", "base_flux2", "base_wan"])
def test_base_is_small_and_safe(base):
    files = [path for path in (HERE / base).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} - {".jinja"} == {".json", ".safetensors"}


def test_base_draws_what_it_is_asked_for_and_often_degraded():
    """Held-out captions, 20 steps, two seeds each: nearly always the right glyph, but not always a clean one."""
    pipeline = StableDiffusionPipeline.from_pretrained(HERE / "base")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    captions = glyphs.HELD_OUT * 2
    generators = [scorer.torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    pictures = pipeline(captions, generator=generators, num_inference_steps=20, guidance_scale=3.0).images
    result = scorer.score(pictures, captions)
    assert result["identity"] > 0.9
    assert 0.3 < result["preference"] < 0.9


def test_flow_model_draws_what_it_is_asked_for_and_often_degraded():
    """Held-out captions as the quickstart draws them, one seed each."""
    pipeline = quickstart_flux2.load_pipeline(quickstart_flux2.BASE, "cpu")
    pictures, captions = quickstart.draw(pipeline, glyphs.HELD_OUT, 1, 0, quickstart_flux2.SAMPLER)
    result = scorer.score(pictures, captions)
    assert result["identity"] > 0.8
    assert 0.1 < result["preference"] < 0.9


def test_flow_model_was_trained_with_whole_captions():
    """None of them is cut off at the length that it is drawn with, and its autoencoder is the emoji base's."""
    tokenizer = quickstart_flux2.load_pipeline(quickstart_flux2.BASE, "cpu").tokenizer
    for caption in glyphs.CAPTIONS:
        messages = [{"role": "user", "content": caption}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert len(tokenizer(text).input_ids) <= quickstart_flux2.SAMPLER["max_sequence_length"]
    weights = "vae/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(quickstart_flux2.BASE / weights), load_file(HERE / "base" / weights)
    assert all(ours[name].equal(weight) for name, weight in theirs.items())
    assert {name for name in ours if name not in theirs} >= {"bn.running_mean", "bn.running_var"}


def test_autoencoder_is_no_bottleneck():
    """Clean pictures are still clean and still the same behind it."""
    vae = AutoencoderKL.from_pretrained(HERE / "base", subfolder="vae")
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


def run(command):
    """What the command prints. On stderr there must be nothing but progress bars and the log."""
    result = newcomer(command)
    assert result.returncode == 0, result.stderr
    assert not notices(result.stderr)
    return result.stdout


@pytest.mark.parametrize("script, trainer", [("quickstart", "sd"), ("quickstart_flux2", "flux2")])
def test_quickstart_trains_scores_and_draws(tmp_path, script, trainer):
    """As `make quickstart` runs it, with three updates and few pictures."""
    output = tmp_path / "run"
    command = [sys.executable, HERE / f"{script}.py", "--output_dir", output, "--per_caption", 1]
    command += ["--winners_per_caption", 2, "--max_train_steps", 3, "--train_batch_size", 2]
    printed = run(command)
    assert f"train_sspo_{trainer}.py" in printed, "the command is shown"
    scores = json.loads((output / "scores.json").read_text())
    assert {row["model"] for row in scores} == {"base", "aligned"}
    for row in scores:
        assert all(0 <= row[name] <= 1 for name in ("preference", "identity", "score"))
        assert f"{row['score']:.3f}" in printed
    assert len((output / "aligned" / "metrics.jsonl").read_text().splitlines()) == 3
    picture = Image.open(output / "before_after.png")
    assert picture.width > 600 and len(picture.getcolors(10**6)) > 1000


def test_a_base_may_learn_from_other_degradations():
    """As the study's second base did: grey pictures only, and all of them."""
    pictures, _, degraded = glyphs.mixed_set(1, glyphs.BASE_SEEDS, degraded_share=1.0, kinds=["grey"])
    assert degraded.all() and (pictures == pictures[..., :1]).all()


# The video example


def middle_and_size(frame):
    """Where the glyph of a frame is, from the left, and how large: the root of the number of its pixels."""
    away = np.abs(frame.astype(int) - np.median(frame, axis=(0, 1))).max(axis=2) > 40
    return np.nonzero(away)[1].mean(), away.sum() ** 0.5


@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_clips_move_as_told_and_flicker_where_they_should(motion):
    steady = clips.render("frog", motion, 7)
    (first, before), (last, after) = middle_and_size(steady[0]), middle_and_size(steady[-1])
    way = {"moving left": -1, "moving right": 1}.get(motion)
    assert way is None or way * (last - first) > 10
    assert after / before > 1.3 if motion == "growing" else 0.85 < after / before < 1.2
    flickering = clips.flicker(steady, "frog", motion, 7)
    assert quickstart_video.motion_of(steady) == motion
    assert quickstart_video.flicker_of(steady) < 0.005
    assert quickstart_video.flicker_of(flickering) > 0.05
    outlines = [np.quantile(frame, 0.02) for frame in flickering]
    assert sum(tone > 100 for tone in outlines) == len(steady) // 2, "half of the frames"


def test_adapter_is_small_and_safe():
    files = list((HERE / "adapter").iterdir())
    assert sum(path.stat().st_size for path in files) < 4e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert MotionAdapter.from_pretrained(HERE / "adapter").config.motion_max_seq_length == clips.FRAMES


def test_words_of_motions_share_no_token_with_names():
    """Their embeddings were drawn for the clips: what the base draws from names alone must not hang on them."""
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "base", subfolder="tokenizer")

    def tokens_of(texts):
        return {token for text in texts for token in tokenizer(text).input_ids}

    assert not (tokens_of(clips.MOTIONS) & tokens_of(glyphs.CAPTIONS)) - tokens_of([""])
    captions = [clips.caption(name, motion) for name in glyphs.CAPTIONS for motion in clips.MOTIONS]
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= tokenizer.model_max_length


def test_video_flow_model_moves_as_told_and_often_flickers():
    """Two held-out emoji with each motion, as the quickstart makes them, one seed each."""
    jobs = [(name, motion) for name in glyphs.HELD_OUT[:2] for motion in clips.MOTIONS]
    made = quickstart_video.sample(quickstart_wan.load_pipeline("cpu"), jobs, 0, quickstart_wan.SAMPLER)
    assert all(clip.shape == (9, 64, 64, 3) for clip in made)
    measured = quickstart_video.measure(made, jobs, scorer.load_scorer())
    assert measured["as told"].mean() > 0.6 and measured["identity"].mean() > 0.6
    assert 0 < (measured["flicker"] > 0.02).mean() < 1, "some of them"


def test_padding_counted_once_is_all_of_it():
    """The transformer trained on shortened prompts is the one that the stock pipeline calls with 512 tokens."""
    tokenizer = train_base_wan.build_tokenizer()
    stock, ours = train_base_wan.build_transformer(0), train_base_wan.build_transformer(0)
    encoder = train_base_wan.build_text_encoder(tokenizer, 0)
    pipeline = WanPipeline(tokenizer, encoder, None, train_base_wan.build_scheduler(), stock)
    texts = ["frog moving left", "cat face turning", ""]
    embeds, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=512)
    short = train_base_wan.pad_once(ours, embeds)
    assert embeds.shape[1] == 512 and short.shape[1] < 12
    rng = scorer.torch.Generator().manual_seed(0)
    latents = scorer.torch.randn(3, 16, 3, 8, 8, generator=rng)
    timesteps = scorer.torch.tensor([100.0, 500.0, 900.0])
    with scorer.torch.no_grad():
        one, other = stock(latents, timesteps, embeds).sample, ours(latents, timesteps, short).sample
    assert one.std() > 0.1 and (one - other).abs().max() < 1e-5


def test_an_error_is_that_of_the_mean():
    told = quickstart_video.mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
    assert told == {"mean": 2.5, "error": pytest.approx((5 / 3) ** 0.5 / 2)}


@pytest.mark.parametrize("script, trainer", [("quickstart_video", "video"), ("quickstart_wan", "wan")])
def test_quickstart_of_clips_trains_measures_and_animates(tmp_path, script, trainer):
    """As `make quickstart-video` runs it, with two updates and few clips."""
    output = tmp_path / "run"
    command = [sys.executable, HERE / f"{script}.py", "--output_dir", output, "--clips", 4, "--winners_per_caption", 1]
    command += ["--max_train_samples", 4, "--max_train_steps", 2, "--train_batch_size", 1, "--rollout_steps", 2]
    printed = run(command)
    assert f"train_sspo_{trainer}.py" in printed, "the command is shown"
    scores = json.loads((output / "scores.json").read_text())
    assert set(scores) == {"base", "aligned", "real, steady", "real, flickering", "base - aligned"}
    difference = scores["base"]["flicker"]["mean"] - scores["aligned"]["flicker"]["mean"]
    assert scores["base - aligned"]["flicker"]["mean"] == pytest.approx(difference, abs=1e-9)
    assert scores["real, flickering"]["flicker"]["mean"] > 10 * scores["real, steady"]["flicker"]["mean"]
    assert f"{scores['aligned']['identity']['mean']:.3f}" in printed
    assert scores["real, steady"]["as told"]["mean"] == 1
    assert len((output / "aligned" / "metrics.jsonl").read_text().splitlines()) == 2
    frames = {"video": 8, "wan": 9}[trainer]
    with Image.open(output / "before_after.gif") as animation:
        assert animation.n_frames == frames
    assert Image.open(output / "before_after.png").size == (frames * 64, 2 * 4 * 64)
