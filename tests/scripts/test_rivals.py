"""Where rivals come from: the data's own losers, or samples that are used again."""

import io
import math

import datasets
import pytest
import tiny
import torch
from faults import run_of_two
from helpers import (
    EVERY,
    assert_same_but_for_rounding,
    assert_same_result,
    flags,
    open_winners,
    resumed,
    served,
    with_every,
)
from safetensors.torch import load_file

import train_sspo_sd as script


GIVEN = dict(rivals="given", reference="initial", ssr="none", max_train_steps=3, random_flip=True, center_crop=None)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux2"])
@pytest.mark.parametrize(
    "options", [{}, dict(cache_latents=True), dict(streaming=True)], ids=["", "cached", "streamed"]
)
def test_given_rivals_are_diffusion_dpo_with_nothing_sampled(trains, monkeypatch, pairs, kind, options):
    """The loss of every update against Diffusion-DPO's, worked out from the same errors in the form of its paper."""
    train, losses, told = trains[kind], [], []
    loss_of = train.script.sspo_loss

    def watched(pw, pr, rw, rr, beta, *rest):
        inside = -0.5 * beta * ((pw - rw) - (pr - rr))  # Diffusion-DPO, eq. 14, T * omega folded into beta
        losses.append(torch.log1p(torch.exp(-inside)).mean().item())
        return loss_of(pw, pr, rw, rr, beta, *rest)

    monkeypatch.setattr(train.script, "sspo_loss", watched)
    monkeypatch.setattr(train.script, "self_sample", lambda *_, **__: pytest.fail("something was sampled"))
    training_loss = train.script.training_loss
    monkeypatch.setattr(
        train.script, "training_loss", lambda *a: told.append(a[2]["winner"] - a[2]["rival"]) or training_loss(*a)
    )
    run = train(data=pairs, **GIVEN, **options)
    assert run.column("loss") == pytest.approx(losses, rel=1e-5)
    assert run.column("loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert run.column("loss")[2] != run.column("loss")[0] and run.column("reference/index") == [0, 0, 0]
    assert min(difference.abs().max() for difference in told) > 0.01, "a rival is another picture than its winner"


def test_the_loser_is_cropped_and_mirrored_as_its_winner(tmp_path, pairs):
    words = flags("unused", pairs, "unused", rivals="given", random_flip=True, center_crop=None, resolution=48)
    winners = script.Winners(script.parse_args([*words, "--cache_dir", str(tmp_path)]))
    assert len(winners) == 7, "the tie is dropped"
    mirrored = set()
    for epoch in range(4):
        for row in range(len(winners)):
            loaded = winners.load(epoch, row)
            # Two drawings of the same shape in the same place: what is not white is so in the same pixels.
            drawn, other = (loaded[name].mean(0) < 0.95 for name in ("pixels", "rival_pixels"))
            assert (drawn ^ other).float().mean() < 0.02 and not torch.equal(loaded["pixels"], loaded["rival_pixels"])
            mirrored.add(bool(drawn[:, :24].sum() > drawn[:, 24:].sum()))
    assert mirrored == {True, False}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["video", "wan"])
def test_pairs_of_clips_give_the_better_one_and_the_other(tmp_path, kind, streaming):
    """Which one is known by its colour. Both are cut alike, and the tie is left out."""

    def clip(caption):
        file = io.BytesIO()
        tiny.write_clip(file, tiny.moving_frames(caption))
        return file.getvalue()

    red, blue = clip("a red square"), clip("a blue square")
    pairs = [(red, blue, 1.0), (blue, red, 0.0), (red, blue, 0.5)]
    rows = [{**dict(zip(("video_0", "video_1", "label_0"), pair)), "caption": "a red square"} for pair in pairs]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    data = open_winners(EVERY[kind], tmp_path, tmp_path / "pairs.parquet", rivals="given", streaming=streaming)
    assert streaming or data.ties == 1
    for example in served(data, 4):
        winner, rival = (example[name].mean((0, 2, 3)) for name in ("pixels", "rival_pixels"))
        assert winner[0] > winner[2] and rival[2] > rival[0]
        drawn = [(example[name] < 0).any(1).float().mean((1, 2)) for name in ("pixels", "rival_pixels")]
        torch.testing.assert_close(*drawn, rtol=0, atol=0.02)


@with_every
def test_given_rivals_need_pairs(each):
    with pytest.raises(each.script.UserError, match="--rivals given needs the columns .*label_0: the data set has"):
        each(rivals="given")


# Rivals that are used again


KEPT = dict(rivals_per_winner=2, cache_latents=True, replay_steps=4, proportion_empty_prompts=0.3)


@pytest.mark.parametrize("kind", EVERY)
def test_kept_rivals_are_sampled_once(trains, monkeypatch, kind):
    """8 or 6 winners, 2 rivals each: what is in the bank's folder is what the pairs had, and no more is sampled."""
    train, sampled, used = trains[kind], [], []
    self_sample, training_loss = train.script.self_sample, train.script.training_loss
    monkeypatch.setattr(
        train.script, "self_sample", lambda *a, **k: (sampled.append(len(a[2])), self_sample(*a, **k))[1]
    )
    monkeypatch.setattr(train.script, "training_loss", lambda *a: (used.append(a[2]), training_loss(*a))[1])
    run = train(max_train_steps=12, replay_steps=100, **{k: v for k, v in KEPT.items() if k != "replay_steps"})
    files = sorted((run.path / "replay" / "iteration-0" / "rank-0").glob("*/*.safetensors"))
    assert len(files) == sum(sampled) < sum(len(batch["keys"]) for batch in used)
    rivals = {}
    for batch in used:
        for (epoch, row), dropped, rival in zip(batch["keys"], batch["dropped"], batch["rival"]):
            rivals.setdefault((row, epoch % 2, dropped), []).append(rival)
    assert len(rivals) == len(files)
    for (row, j, dropped), same in rivals.items():
        name = f"row-{row}-{j}{'-uncaptioned' if dropped else ''}.safetensors"
        (file,) = (path for path in files if path.name == name)
        assert all(torch.equal(rival, load_file(file)["rival"]) for rival in same)
    first = next(iter(rivals.values()))[0]
    assert all(not torch.equal(first, other[0]) for other in list(rivals.values())[1:]), "each is another one"


def test_kept_rivals_go_with_their_reference(train):
    run = train(max_train_steps=7, replay_size=2, reference="latest", **{**KEPT, "replay_steps": 2})
    assert {path.name for path in (run.path / "replay").iterdir() if path.is_dir()} == {"iteration-0", "iteration-3"}


@pytest.mark.parametrize("options", [{}, dict(train_mode="full", gradient_accumulation_steps=2, rollout_batch_size=4)])
def test_a_run_with_kept_rivals_resumes_exactly(train, options):
    options = dict(KEPT, **options)
    run = train("whole", max_train_steps=9, checkpointing_steps=5, **options)
    again = resumed(train, run, 5, **options)
    assert_same_result(run, again)


def test_kept_rivals_do_not_depend_on_the_layout(train):
    options = dict(KEPT, max_train_steps=6, replay_steps=2, adam_epsilon=1e-5)
    one = train("one", train_batch_size=4, **options)
    parts = dict(train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_but_for_rounding(one, train("parts", rollout_batch_size=2, **parts, **options))


def test_processes_keep_rivals_of_their_own(train):
    """To resume bit for bit: one of another's was sampled in another batch."""
    options = dict(KEPT, max_train_steps=6, replay_steps=2, adam_epsilon=1e-5)
    one, two = train("one", train_batch_size=4, **options), run_of_two(train, "two", train_batch_size=2, **options)
    assert_same_but_for_rounding(one, two)
    assert {path.name for path in two.path.glob("replay/iteration-*/rank-*")} == {"rank-0", "rank-1"}


def test_a_new_run_does_not_take_rivals_that_another_left(train):
    """A run that was killed before its first checkpoint leaves its bank; another seed in its folder has its own."""
    train("run", max_train_steps=3, **KEPT)
    (train.directory / "run" / "pytorch_lora_weights.safetensors").unlink()
    again = train("run", max_train_steps=3, seed=1, **KEPT)
    fresh = train("fresh", max_train_steps=3, seed=1, **KEPT)
    assert again.column("loss") == fresh.column("loss")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rivals_per_winner=2), "--rivals_per_winner needs --cache_latents"),
        (dict(KEPT, rollout_strength=0.7), "--rivals_per_winner reuses rivals sampled from pure noise"),
        (dict(KEPT, rivals="given"), "--rivals_per_winner reuses rivals sampled from pure noise"),
        (dict(rivals_per_winner=0), "must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(capsys, options, message):
    with pytest.raises(SystemExit):
        script.parse_args(flags("unused", "unused", "unused", **options))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
