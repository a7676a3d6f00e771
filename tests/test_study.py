"""The study runs what its plan says, once, and its page says what its results say."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, forget_accelerator, long


STUDY = ROOT / "examples" / "study"
sys.path.insert(0, str(STUDY))

import gradients  # noqa: E402
import report  # noqa: E402
import second_scorer  # noqa: E402
import study  # noqa: E402


RESULTS, SECOND_RESULTS, AGAIN = report.read_all()


def test_every_run_of_the_plan_has_flags_that_the_script_takes():
    jobs = [job for job in study.main_jobs() if job.row != "base"]
    assert len({job.name for job in jobs}) == len(jobs), "no two are the same run"
    for job in jobs:
        args = study.script.parse_args(study.command_line(job.settings(), "winners", "out"))
        assert args.rollout_batch_size == args.train_batch_size, "the patches judge one batch of rivals an update"
    flags = {job.row: job.settings() for job in jobs if job.regime == "few"}
    assert flags["winner only"]["rival_weight"] == 0
    assert (
        flags["sft"]["max_train_steps"] == flags["sign"]["max_train_steps"] < flags["sft matched"]["max_train_steps"]
    )


def test_the_tuning_saw_nothing_of_what_the_results_are_about():
    tuning, runs = list(study.pilots()), list(study.main_jobs())
    for name in ("captions", "noise"):
        assert not {x for job in tuning for x in getattr(job, name)} & {x for job in runs for x in getattr(job, name)}
    assert not {job.seed for job in tuning} & {job.seed for job in runs}
    trials = [(job.regime, job.row) for job in tuning]
    for regime, row in trials:
        assert trials.count((regime, row)) <= trials.count((regime, "sft")), "no method is tuned more than SFT"


def test_the_best_trial_was_taken():
    best = {}
    for trial in report.trial_records("pilots"):
        key = trial["regime"], trial["row"]
        best[key] = max(best.get(key, (0, {})), (report.samples(trial).mean(), trial["settings"]), key=lambda x: x[0])
    for (regime, row), (_, settings) in best.items():
        assert {name: settings[name] for name in study.TUNED[regime][row]} == study.TUNED[regime][row]


def test_the_plan_tells_the_settings():
    plan = (STUDY / "plan_first.md").read_text()
    for captions in (study.SELECTION, study.TEST):
        assert ", ".join(captions) in plan.replace("\n", " ")
    for regime in study.TUNED:
        settings = study.REGIMES[regime]
        assert f"| {regime} | {28 * settings.winners} | {settings.updates} | {settings.matched_updates} |" in plan
    for row in study.TUNED["plenty"]:
        cells = [", guidance ".join(f"{v:g}" for v in study.TUNED[regime][row].values()) for regime in study.TUNED]
        assert f"| {row} | {cells[0]} | {cells[1]} |" in plan


def test_every_result_is_of_a_run_of_the_plan():
    jobs = [*study.main_jobs(), *study.second_jobs(), *study.later_jobs()]
    assert len({job.name for job in jobs}) == len(jobs), "no two are the same run"
    assert not study.missing(jobs), "the page says that all of the plan has run"
    for base, results in (("first", RESULTS), ("second", SECOND_RESULTS)):
        check_results({(job.regime, job.row, job.seed): job for job in jobs if job.base == base}, results)


def settings_of(result):
    """Without --lr_warmup_steps, which did nothing to the constant rate, and which the scripts refuse by now."""
    return {name: value for name, value in result["settings"].items() if name != "lr_warmup_steps"}


def check_results(jobs, results):
    for (regime, row), runs in results.items():
        for seed, result in runs.items():
            job = jobs[regime, row, seed]
            assert row == "base" or settings_of(result) == job.settings()
            assert result["captions"] == study.TEST and result["noise"] == list(job.noise)
            assert report.samples(result).shape == (len(study.TEST), 2 * job.per_caption)


@pytest.mark.parametrize("base, results", [("first", RESULTS), ("second", SECOND_RESULTS)])
def test_committed_scores_are_those_of_the_base_that_is_shipped(base, results):
    """The first caption's pictures, drawn and judged again; another processor rounds a little otherwise."""
    (committed,) = results["plenty", "base"].values()
    job = study.Job("plenty", "base", 0, {}, captions=tuple(study.TEST[:1]), base=base)
    (by_both,) = AGAIN[base]["plenty", "base"].values()
    pipeline = study.load_pipeline(study.BASES[base], "cpu")
    for noise, before in ((job.noise[0], committed), (study.FRESH_NOISE[0], by_both)):
        again = {}
        study.judge_pictures(pipeline, job, noise, again)
        scorers = [(again, before)]
        scorers += [(again["second scorer"], before["second scorer"])] if before is by_both else []
        for told, told_before in scorers:
            for name in ("preference", "identity"):
                assert told[name] == pytest.approx(told_before[name][: job.per_caption], abs=0.02)


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(report, "DATA", tmp_path / "data")
    monkeypatch.setattr(report, "read_records", report.read_records.__wrapped__)
    jobs = [study.Job("few", row, seed, {}, "part") for row in ("sft", "sign") for seed in (0, 1)]
    jobs[0].result.parent.mkdir(parents=True)
    jobs[0].result.write_text('"kept"')

    def run(job):
        if job.row == "sign" and job.seed == 1:
            raise RuntimeError("this one is broken")
        job.result.write_text(f'"{job.row} {job.seed}"')

    monkeypatch.setattr(study, "run", run)
    assert study.run_all(study.missing(jobs), 2, tmp_path / "logs") == 1, "one failed"
    assert [study.told(job) for job in jobs[:3]] == ["kept", "sft 1", "sign 0"]
    assert not jobs[3].result.exists()
    (log,) = (tmp_path / "logs").glob("*few-sign-1.log")
    assert "this one is broken" in log.read_text()
    assert "FAILED" in capfd.readouterr().out


def test_a_record_comes_back_from_the_tables_as_the_run_wrote_it(tmp_path, monkeypatch):
    """Two captions, two noise sets of three pictures, judged half way by the first set, at the end by two scorers."""
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    monkeypatch.setattr(report, "DATA", tmp_path / "data")
    report.read_records.cache_clear()
    values = [round(value, 3) for value in np.random.default_rng(0).uniform(size=60)]
    judged = {"preference": values[:12], "identity": values[12:24]}
    record = {"regime": "few", "row": "sft, 500 updates", "seed": 3, "settings": {"rank": 16, "loss_type": "sft"}}
    record |= {"seconds": 33.1, "latents": 7680, "curves": {"step": [2, 4], "gap/winner": [0.1, -2e-05]}}
    record |= {"half way": {"preference": values[24:30], "identity": values[30:36]}, "error": 0.0627, "wall": 50.8}
    record |= {"captions": ["rocket", "banana"], "per_caption": 3, "noise": [10_000, 20_000], **judged}
    record["second scorer"] = {"preference": values[36:48], "identity": values[48:]}
    base = {"regime": "few", "row": "base", "seed": 0, "error": 0.07, "wall": 1.5, **judged}
    base |= {name: record[name] for name in ("captions", "per_caption", "noise")}
    jobs = [study.Job("few", one["row"], one["seed"], {}, "results_again/first") for one in (record, base)]
    jobs[0].result.parent.mkdir(parents=True)
    for job, one in zip(jobs, (record, base)):
        job.result.write_text(json.dumps(one))
    study.collect()
    jobs[1].result.unlink()
    study.collect()
    assert [study.told(job) for job in jobs] == [record, base], "what is no more in work/ stays in data/"
    noise = {line["noise"]: line["caption"] for line in report.read_csv(report.DATA / "pictures.csv.gz")}
    assert noise["10002"] == "rocket" and noise["20003"] == "banana", "the seed of each picture"
    assert report.read_results("results_again/first")["few", "base"] == {0: base}
    report.read_records.cache_clear()


@pytest.mark.parametrize("ssr, otherwise", [("sign", -1.0), ("indicator", 0.0)])
def test_the_oracle_switches_by_the_scorer_alone(monkeypatch, ssr, otherwise):
    """Rivals: a clean picture and a degraded one. s is what the oracle row says, whatever the errors are."""
    good = study.render("banana", 4_000_000)
    bad = sys.modules["glyphs"].degrade(good, "banana", 1, ["grey"])
    monkeypatch.setattr(study.script, "sample_rivals", lambda models, *_: torch.tensor([0, 1]))
    monkeypatch.setattr(study.script, "decode_latents", lambda models, latents: (good, bad)[latents.item()])
    loss_of = study.script.sspo_loss
    monkeypatch.setattr(study.script, "sspo_loss", loss_of)
    restored(monkeypatch, "draw_timesteps")
    notes = study.patch(study.Job("few", f"{ssr} by oracle", 0, {}))
    study.script.sample_rivals(None, None)
    errors = [torch.tensor([[a], [b]]) for a, b in ((0.3, 0.3), (0.1, 0.2), (0.5, 0.2), (0.2, 0.1))]
    loss, metrics = study.script.sspo_loss(*errors, 10.0, ssr, rival_weight=0.5)
    gap_winner, gap_rival = torch.tensor([-0.2, 0.1]), torch.tensor([-0.1, 0.1])
    s = torch.tensor([otherwise, 1.0])  # clean: it is a winner
    torch.testing.assert_close(loss, torch.nn.functional.softplus(5 * (gap_winner - 0.5 * s * gap_rival)).mean())
    assert metrics["dpo_fraction"] == 0.5 and notes["rivals/clean"] == [0.5]
    assert notes["switch/right"] == [0.0], "x would have said the opposite of both"


def test_the_switch_of_an_iteration_is_decided_by_its_updates_before(monkeypatch):
    """Iterations of two updates. The first of each has no evidence yet; the second hears what the first one found."""
    monkeypatch.setitem(study.COMMON, "replay_steps", 2)
    monkeypatch.setattr(study.script, "sample_rivals", lambda *_: torch.zeros(1))
    monkeypatch.setattr(study.script, "decode_latents", lambda *_: study.render("banana", 4_000_000))
    restored(monkeypatch, "sspo_loss", "draw_timesteps")
    study.patch(study.Job("few", "indicator, scope iteration", 0, {}))
    told = []
    for gap in (0.1, -0.3, -0.1, 0.2, 0.1, 0.1):
        study.script.sample_rivals(None)
        errors = [torch.tensor([[value]]) for value in (0.5 + gap, 0.4, 0.5, 0.3)]
        loss, metrics = study.script.sspo_loss(*errors, 10.0, "indicator", 0.5)
        told.append(metrics["dpo_fraction"].item())
        expected = torch.nn.functional.softplus(torch.tensor(5 * (gap - told[-1] * 0.5 * 0.1)))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert told == [1, 0, 1, 1, 1, 0]


def restored(monkeypatch, *names):
    """What a run patches in the script, put back when the test ends."""
    for name in names:
        monkeypatch.setattr(study.script, name, getattr(study.script, name))


@pytest.fixture
def short(monkeypatch):
    """A run of two updates on 28 winners."""
    forget_accelerator()
    monkeypatch.setitem(study.ROWS, "short", study.Row(9, {"ssr": "sign", "ssr_scope": "iteration"}, updates=2))
    names = ("sample_rivals", "sspo_loss", "draw_timesteps", "make_loader", "save_result", "training_loss")
    restored(monkeypatch, *names)
    tuned = {"learning_rate": 1e-3, "rollout_guidance_scale": 1.0, "rollout_steps": 2}
    return study.Job("few", "short", 0, tuned)


def test_a_run_trains_and_tells_what_it_cost(short, tmp_path):
    told = study.train(short, tmp_path)
    assert told["curves"]["step"] == [1, 2] and told["curves"]["dpo_fraction"][0] == 1
    assert {"gap/winner", "rivals/clean", "switch/right"} <= set(told["curves"])
    assert told["latents"] == 2 * (2 * 8 + 2 * 16), "two steps for eight rivals; reference and policy on both halves"
    assert 0 < told["seconds"] < 60
    assert study.load_aligned(study.BASES["first"], tmp_path / "run", "cpu").unet.peft_config


@long
def test_gradients_are_measured_half_way(short, monkeypatch):
    """After one update, on three batches, the first of which is that of the second update."""
    for name, value in {"UPDATES": 1, "BATCHES": 3, "DRAWS": (1, 2)}.items():
        monkeypatch.setattr(gradients, name, value)
    monkeypatch.setattr(study, "best_trial", lambda *_: short.tuned)
    monkeypatch.setitem(study.ROWS, "none, rival 0.3", study.Row(1, {"ssr": "none", "rival_weight": 0.3}, updates=9))
    seen, measure = [], gradients.measure

    def seen_measure(policy, models, batches, *others):
        seen.extend(batches)
        return measure(policy, models, batches, *others)

    monkeypatch.setattr(gradients, "measure", seen_measure)
    told = gradients.half_way("few")
    ways = ("1, independent", "2, independent", "2, spread")
    assert set(told) == {f"{loss}, {way}" for loss in ("sft", "sspo") for way in ways}
    assert all(noise["fixed pairs"] != 0 for noise in told.values())
    rows = [[row for _, row in batch["keys"]] for batch in seen]
    assert len(rows) == 3 and len({row for batch in rows[:2] for row in batch}) == 16, (
        "each batch has winners of its own"
    )
    assert all(batch["rival"].shape == batch["winner"].shape for batch in seen)


def test_the_redrawn_reference_is_another_one_for_another_update(monkeypatch):
    """Of all that the iteration's bank holds, and the same in a run that is made again."""
    monkeypatch.setattr(study.script, "sample_rivals", lambda *_: torch.zeros(1))
    monkeypatch.setattr(study.script, "decode_latents", lambda *_: study.render("banana", 4_000_000))
    restored(monkeypatch, "sspo_loss", "draw_timesteps")
    monkeypatch.setattr(study.script.ReplayBank, "draw", study.script.ReplayBank.draw)

    def drawn(row, updates=30):
        study.patch(study.Job("few", row, 0, {}))
        bank, indices = study.script.ReplayBank("", 30, seed=0), []
        for _ in range(updates):
            indices.append(bank.draw(4))
            study.script.sample_rivals(None)
        return indices

    assert len(set(drawn("none, rival 0.3"))) == 1
    each = drawn("reference drawn each update")
    assert set(each) == {0, 1, 2, 3} and each == drawn("reference drawn each update")


def test_ages_are_those_of_the_references_that_were_drawn():
    """Each point of the curve is its own number, so the means tell which points went to which age."""
    points = np.arange(20.0)
    names = ("implicit_accuracy", "gap/winner", "gap/rival", "rivals/clean", "switch/right")
    runs = {seed: {"curves": dict.fromkeys(names, points)} for seed in range(3)}
    table = report.ages_table({("few", "none"): runs})
    sums = {}
    for seed in runs:
        bank = study.script.ReplayBank("", 30, seed=seed)
        for iteration in (2, 3, 4):
            sums.setdefault(iteration - 1 - bank.draw(iteration), []).append(5 * iteration - 3)  # its middle point
    assert 0 in sums and len(sums) > 1
    for age, middles in sums.items():
        assert f"| none | {age} | {len(middles)} | {np.mean(middles):.2f} |" in table


def test_the_confirmation_is_fresh_and_tuned_alike():
    before = [*study.main_jobs(), *study.second_jobs(), *study.later_jobs(), *study.pilots(), *study.first_trials()]
    every = list(study.confirmation_jobs())
    assert not study.missing(every), "the page says that all of the plan has run"
    jobs = [job for job in every if job.row != "base"]
    assert not {job.seed for job in jobs} & {job.seed for job in before}
    assert not {noise for job in jobs for noise in job.noise} & {noise for job in before for noise in job.noise}
    assert all(job.captions == tuple(study.TEST) for job in jobs)
    for base, regime, row in study.confirmed_rows():
        first = study.trial_scores(base, regime, row)
        best = max(first, key=first.get)
        assert set(first) >= set(study.RATES) and (best not in study.BEYOND or study.BEYOND[best] in first)
    assert not study.missing(study.second_trials())
    two = [study.trial_scores("first", "plenty", "sft matched", seed) for seed in (101, 102)]
    assert max(two[0], key=two[0].get) == 6e-3 and study.best_trial("first", "plenty", "sft matched") == {
        "learning_rate": max(two[1], key=lambda rate: two[0][rate] + two[1][rate])
    }, "two trials have the word, not the first"
    for base, results in AGAIN.items():
        check_results({(job.regime, job.row, job.seed): job for job in every if job.base == base}, results)


def test_the_second_scorer_knows_a_clean_picture_of_the_right_emoji_when_it_sees_one():
    for shown, told in second_scorer.test(per_caption=3).items():
        assert told["emoji"] > 0.95 and told["clean or degraded"] > 0.95, shown


def test_the_safeguard_keeps_the_winners_part_from_rising():
    """Two weights, errors linear in them: the gradients of both parts are known."""

    def held_back(winner_slope, rival_slope):
        weights = torch.tensor([0.5, -0.2], requires_grad=True)
        policy_winner, policy_rival = (slope * weights for slope in (winner_slope, rival_slope))
        policy_winner, policy_rival = policy_winner.sum(-1, keepdim=True), policy_rival.sum(-1, keepdim=True)
        zero = torch.zeros_like(policy_winner)
        loss, _ = study.script.sspo_loss(policy_winner, policy_rival, zero, zero, 1.0, "none")
        new, factor = study.safeguarded(loss, policy_winner, policy_rival, [weights])
        assert new.item() == pytest.approx(loss.item())
        (plain,), (gradient,) = (
            torch.autograd.grad(loss, weights, retain_graph=True),
            torch.autograd.grad(new, weights),
        )
        pull = torch.sigmoid((policy_winner - policy_rival) / 2).detach() / 2 / len(winner_slope)
        winner, rival = (pull * winner_slope).sum(0), -(pull * rival_slope).sum(0)
        torch.testing.assert_close(plain, winner + rival)
        torch.testing.assert_close(gradient, winner + factor * rival)
        return factor, winner @ gradient

    opposed = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[4.0, 1.0], [3.0, 0.0]])
    factor, lowered = held_back(*opposed)
    assert 0 < factor < 1 and lowered.item() == pytest.approx(0, abs=1e-6)
    factor, lowered = held_back(opposed[0], -opposed[1])
    assert factor == 1 and lowered > 0
    factor, lowered = held_back(opposed[0], 0.1 * opposed[1])
    assert factor == 1 and lowered > 0, "opposed, but too weak to raise it"


def test_noise_of_a_gradient_is_that_of_its_pairs_and_of_its_draws():
    rng = torch.Generator().manual_seed(0)
    signal = torch.full((50,), 0.3)  # squared norm 4.5; the noise of pairs has 50 * 0.25, that of draws 50 * 0.64
    of_pairs = 0.5 * torch.randn((4000, 1, 50), generator=rng)
    of_draws = 0.8 * torch.randn((4000, 2, 50), generator=rng)
    noise = gradients.noise_to_signal(signal + of_pairs + of_draws)
    assert noise["fixed pairs"] == pytest.approx(32 / 4.5, rel=0.03)
    assert noise["all"] == pytest.approx((32 + 12.5) / 4.5, rel=0.03)


def result(preference, seed=0):
    """A result of three captions, two noise sets and two pictures of each."""
    preference = np.asarray(preference, float).ravel().tolist()
    return {"captions": ["a", "b", "c"], "noise": [1, 2], "preference": preference, "identity": [0.5] * 12}


def test_comparison_pairs_pictures_seeds_and_captions():
    values = np.arange(24.0).reshape(2, 2, 3, 2)  # seed, noise set, caption, picture
    others = np.full((3, 2, 3, 2), 5.0)
    compared = report.compare(
        {0: result(values[0]), 1: result(values[1])}, {seed: result(others[seed]) for seed in range(3)}
    )
    assert compared["seeds"] == 2
    assert compared["difference"][0] == pytest.approx((np.arange(24).mean() - 5) / 2)
    assert compared["win_rate"][0] == pytest.approx((18 + 0.5) / 24)
    assert report.compare({7: result(values[0])}, {8: result(values[0])}) is None
    of_caption = report.samples(result(values[0]), "preference")
    assert of_caption[1].tolist() == values[0, :, 1].ravel().tolist(), "a row is a caption"


def test_interval_has_the_variance_of_seeds_and_of_captions():
    generator = np.random.default_rng(0)
    seeds, captions = generator.normal(size=(40, 1)), 2 * generator.normal(size=(1, 50))
    low, high = report.crossed_bootstrap(seeds + captions, resamples=4000)
    error = np.sqrt(seeds.var() / 40 + captions.var() / 50)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_ranks_share_a_place():
    assert report.ranks([0.3, 0.1, 0.3, 0.2]).tolist() == [2.5, 0, 2.5, 1]


def test_the_pages_say_what_the_results_say():
    pages = {name: (STUDY / name).read_text() for name in report.PAGES}
    tables = report.tables({name: row.like for name, row in study.ROWS.items()})
    assert pages == report.fill_in(pages, tables)
    with pytest.raises(ValueError, match="summary"):
        report.fill_in({"README.md": ""}, {"summary": ""})
    assert len((STUDY / "README.md").read_text().splitlines()) < 60, "one screen"


def test_differences_told_in_words_stand_in_the_tables():
    """But for one that two more seeds have changed since, which the page tells."""
    pages = {name: (STUDY / name).read_text() for name in ("README.md", "appendix.md", "appendix_first.md")}
    marked = re.compile(r"<!-- [^>]+ -->\n(.*?)<!-- end -->", re.DOTALL)
    tables = "".join(table for page in pages.values() for table in marked.findall(page))
    prose = " ".join(marked.sub("", page) for page in pages.values()).replace("−", "-")
    told = {" ".join(words.split()) for words in re.findall(r"[+-]\d\.\d+\s\[[^\]]+\]", prose)}
    assert len(told) > 10
    assert {words for words in told if words not in tables} == {"-0.057 [-0.132, +0.005]"}
