"""The second study: its measures and statistics against direct formulas, its runs against its plan."""

import copy
import functools
import json
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from scipy import stats


STUDY = ROOT / "examples" / "study"
sys.path.insert(0, str(STUDY))

import measures  # noqa: E402
import power  # noqa: E402
import second  # noqa: E402
import second_report  # noqa: E402
import study  # noqa: E402


RNG = np.random.default_rng


def test_mmd_is_that_of_its_formula_and_0_for_one_distribution():
    x, y = RNG(0).normal(size=(5, 3)), RNG(1).normal(1.0, size=(7, 3))

    def kernel(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * 1.5**2))

    within = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert measures.mmd(x, y, 1.5) == pytest.approx(sum(within) - 2 * across)
    same = [measures.mmd(*RNG(seed).normal(size=(2, 20, 3)), 1.5) for seed in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5, "without bias"


def test_precision_and_recall_of_sets_with_a_known_answer():
    line = np.arange(10.0)[:, None]
    assert measures.precision_recall(line, line) == (1, 1)
    assert measures.precision_recall(line + 100, line) == (0, 0)
    half = np.concatenate([line[:5], line[:5] + 100])  # one half of what is made is right
    assert measures.precision_recall(half, line, k=1) == (0.5, 0.6), "the sixth is at the fifth's reach"
    collapsed = np.full((10, 1), 4.0) + 1e-3 * line
    assert measures.precision_recall(collapsed, line) == (1, 0.1), "always right, always the same"


def test_memorisation_is_0_for_winners_and_1_for_fresh_draws():
    winners, unseen, fresh = RNG(0).normal(size=(3, 300, 2, 2))
    assert measures.memorisation(winners[:20], winners, unseen) == pytest.approx(0, abs=1e-6)
    assert measures.memorisation(fresh, winners, unseen) == pytest.approx(1, abs=0.1)


def test_the_kernel_is_as_wide_as_two_renders_are_apart():
    made = [measures.real_features(caption, 12) for caption in second.CAPTIONS[::8]]
    apart = [np.median(np.sqrt(measures.squared_distances(one, one))[np.triu_indices(12, 1)]) for one in made]
    assert measures.WIDTH == pytest.approx(np.median(apart), rel=0.15)


def test_mmd_knows_clean_pictures_from_degraded_ones_others_and_copies():
    """On renders that nothing else uses: what is right is near 0, and each fault is seen."""
    real = measures.real_features("umbrella")

    def far(pictures):
        decoded = measures.through_autoencoder(measures.to_tensor(pictures)).clamp(-1, 1)
        return measures.mmd(measures.features(decoded), real, measures.WIDTH)

    clean = [second.render("umbrella", 5_000_000 + index) for index in range(24)]
    degraded = [second.degrade(picture, "umbrella", index) for index, picture in enumerate(clean)]
    assert abs(far(clean)) < 0.03 < far(clean[:12] + degraded[12:]) < far(degraded)
    assert far([second.render("rocket", index) for index in range(24)]) > 1
    assert far(clean[:1] * 24) > 0.2, "collapsed"


def test_holm():
    """Worked by hand: 4 x 0.01, 3 x 0.015, then 2 x 0.02 is less than that, and the last is not above 1."""
    assert measures.holm([0.02, 0.01, 0.9, 0.015]) == pytest.approx([0.045, 0.04, 0.9, 0.045])
    assert measures.holm([0.6, 0.7]) == pytest.approx([1, 1])


def crossed(a, b, of_seed, of_caption, of_rest, seed=0):
    rng = RNG(seed)
    values = 0.3 + rng.normal(0, of_seed, (a, 1)) + rng.normal(0, of_caption, b) + rng.normal(0, of_rest, (a, b))
    seeds, captions = np.indices((a, b)).reshape(2, -1)
    return values, seeds, captions


def test_mixed_model_of_a_balanced_design_is_that_of_its_mean_squares():
    """There restricted maximum likelihood has a closed form, as long as no variance is 0."""
    values, seeds, captions = crossed(6, 9, 0.5, 0.7, 0.4)
    fitted = measures.mixed_model(values.ravel(), seeds, captions)
    of_seeds, of_captions = values.mean(1, keepdims=True), values.mean(0)
    rest = ((values - of_seeds - of_captions + values.mean()) ** 2).sum() / (5 * 8)
    expected = of_seeds.var(ddof=1) - rest / 9, of_captions.var(ddof=1) - rest / 6, rest
    assert fitted["components"] == pytest.approx(expected, rel=0.01)
    error = np.sqrt(expected[0] / 6 + expected[1] / 9 + rest / 54)
    assert fitted["mean"] == pytest.approx(values.mean()) and fitted["error"] == pytest.approx(error, rel=0.01)
    assert fitted["p"] == pytest.approx(2 * stats.t.sf(values.mean() / error, 5), rel=0.02)


def test_mixed_model_without_captions_is_the_t_test_of_the_seeds():
    values, seeds, _ = crossed(8, 1, 0.5, 0, 0)
    fitted = measures.mixed_model(values.ravel(), seeds, np.arange(8))
    tested = stats.ttest_1samp(values.ravel(), 0)
    assert fitted["p"] == pytest.approx(tested.pvalue, rel=0.01)
    assert (fitted["low"], fitted["high"]) == pytest.approx(tuple(tested.confidence_interval()), rel=0.01)


def test_mixed_model_of_the_rotating_design_holds_its_level():
    """Of the study's own design, with no effect: 95 % intervals miss it in about 5 of 100 cases, and not in more."""
    captions = np.array([second.CAPTIONS.index(c) for seed in second.SEEDS for c in second.held_out(seed)[0]])
    seeds, missed = np.repeat(np.arange(10), 12), 0
    for trial in range(60):
        rng = RNG(trial)
        values = rng.normal(0, 0.3, 10)[seeds] + rng.normal(0, 0.5, 40)[captions] + rng.normal(0, 0.5, 120)
        fitted = measures.mixed_model(values, seeds, captions)
        missed += not fitted["low"] < 0 < fitted["high"]
    assert missed <= 8


def test_variance_components_of_known_data():
    rng = RNG(0)
    parts = [rng.normal(0, spread, shape) for spread, shape in ((1, (60, 1, 1)), (2, (1, 60, 1)), (0.5, (60, 60, 1)))]
    gains = sum(parts) + rng.normal(0, 3, (60, 60, 4))
    assert power.components(gains) == pytest.approx([1, 4, 0.25, 9], rel=0.25)


def test_power_is_what_simulation_says():
    """Eight seeds: the difference that `seen` names is found in 80 % of the cases, equality as often as it says."""
    values = RNG(0).normal(0, 8**0.5, (20_000, 8))  # a standard error of 1
    difference, margin = power.seen(1.0, 8, 0.05), power.equivalent(1.0, 8)
    assert (stats.ttest_1samp(values + difference, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.02)
    low, high = stats.ttest_1samp(values, 0, axis=1).confidence_interval(0.9)
    assert ((low > -margin) & (high < margin)).mean() == pytest.approx(0.8, abs=0.06)


def test_the_plan_quotes_the_power_calculation():
    plan = (STUDY / "plan.md").read_text()
    variances = power.first_study()
    assert power.table(variances, 12, power.DESIGNS) in plan
    assert all(f"{value:.5f}" in plan for value in variances)


def test_the_plan_quotes_the_power_by_the_tuning():
    """Of the committed runs; the choices are made anew, whatever other tests made up."""
    second.chosen.cache_clear()
    plan = (STUDY / "plan.md").read_text()
    for base in study.BASES:
        lines = second_report.tuning_power(base).splitlines()[2:]
        assert len(lines) == len(second.FAMILY)
        assert all(f"| {base} {line}" in plan for line in lines)


def test_the_plan_tells_what_is_run():
    plan = " ".join((STUDY / "plan.md").read_text().split())
    for row in second.FAMILY + second.SFT_ROWS:
        assert row in plan.replace("sign, indicator", "sign indicator"), row
    assert "seeds 0 to 9" in plan and second.SEEDS == tuple(range(10))
    assert "rows beside the family get seeds 3, 4, 6 and 7" in plan and second.LATER == (3, 4, 6, 7)
    assert "T2 gets 1 to 3" in plan and second.DEGRADED == (1, 2, 3)
    banks = {seed: second.script.ReplayBank("", 8, seed=1000 + seed) for seed in (0, *second.LATER)}
    references = {seed: [bank.draw(iteration) for iteration in (1, 2, 3, 4)] for seed, bank in banks.items()}
    assert references == {0: [0] * 4, 3: [0, 0, 2, 2], 4: [0, 0, 2, 1], 6: [0, 0, 2, 2], 7: [0, 1, 0, 2]}
    assert "0 0 2 2 for seeds 3 and 6, 0 0 2 1 for 4 and 0 1 0 2 for 7" in plan
    for grid in (second.RATES, second.SSPO_GRID, second.HINGE_GRID):
        assert len(grid) == 4, "every row that is trained has as many settings as SFT"
    sft, sspo = (
        second.script.parse_args(second.Run("T1", "first", row, 0).command_line("a", "b", "c"))
        for row in ("sft constant", "unpaired")
    )
    latents = sum(study.expected_calls(sspo)) * sspo.max_train_steps
    with_gradient = 2 * 16 * sspo.draws_per_pair * sspo.max_train_steps
    assert 3 * 16 * sft.max_train_steps == latents + 2 * with_gradient == 40_320 and "40 320" in plan


def test_all_captions_are_held_out_in_turn():
    counts = np.zeros(40, int)
    for seed in second.SEEDS:
        mine, others = second.held_out(seed)
        assert len(mine) == 12 and sorted(mine + others) == sorted(second.CAPTIONS)
        counts[[second.CAPTIONS.index(caption) for caption in mine]] += 1
    assert set(counts) == {3}
    aligned = [second.measured(seed)[1] for seed in second.SEEDS]
    assert all(len(shown) == 12 and not {*shown} & {*second.held_out(seed)[0]} for seed, shown in enumerate(aligned))
    assert len({caption for shown in aligned for caption in shown}) == 40


def record(run, mmd, error=0.1):
    """What a run leaves, as far as the choices need it; `mmd(model, guidance)`."""
    lines = [
        {"model": model, "guidance": guidance, "part": "held out", "caption": caption, "mmd": mmd(model, guidance)}
        for model in run.models
        for guidance in run.guidances
        for caption in second.held_out(run.seed)[0]
    ]
    return {"error": error, "captions": lines}


@pytest.fixture
def told(monkeypatch):
    """
    Made-up results of any run: starts are best at a rate of 1e-3 and 3000 updates, rows at a rate of 1e-4 and a
    guidance of 2, the last weights but for the average of 0.99, and every row with β 200 or a margin of 0.01.
    """

    def made_up(run):
        settings = dict(run.settings)
        rate = abs(np.log(settings.get("learning_rate", 1e-4) / 1e-4))
        other = settings.get("beta_dpo", 200) / 200 + 0.01 / settings.get("margin", 0.01)
        models = {"average 0.98": 0.2, "average 0.99": -0.1, "average 0.995": 0.3, "k 1.2": -0.1}

        def mmd(model, guidance):
            return 1 + rate + 0.1 * other + models.get(model, 0) + (guidance - 2) ** 2

        worse = (settings.get("learning_rate") != 1e-3) + (settings.get("max_train_steps") != 3000)
        return record(run, mmd, error=0.1 + worse)

    monkeypatch.setattr(second, "told", functools.cache(made_up))
    second.chosen.cache_clear()
    yield
    second.chosen.cache_clear()


def test_the_tuning_takes_the_best(told):
    assert dict(second.start_of("first", 3).settings) == {"learning_rate": 1e-3, "max_train_steps": 3000}
    assert second.chosen("first", "sft averaged") == ((("learning_rate", 1e-4),), "average 0.99", 2.0)
    assert second.chosen("second", "extrapolated") == ((), "k 1.2", 2.0)
    assert dict(second.chosen("first", "unpaired, latest")[0]) == {"learning_rate": 1e-4, "beta_dpo": 200.0}
    assert second.best_sft("first") == "sft averaged"


def test_every_planned_run_has_flags_that_the_script_takes(told):
    stages = [list(dict.fromkeys(stage())) for stage in second.stages()]
    runs = [run for stage in stages for run in stage]
    assert len({run.name for run in runs}) == len(set(runs)), "no two write the same file"
    for run in runs:
        assert run.guidances[0] == 1
        if not second.ROWS[run.row].trained:
            continue
        fresh = run.task != "start" and run.stage == "main"
        assert run.flags()["seed"] == run.seed + 1000 * fresh, "SFT goes on with noise that its start has not seen"
        args = second.script.parse_args(run.command_line("start", "winners", "out"))
        assert args.train_mode == "full" and args.rollout_guidance_scale == 1 and args.rivals_per_winner is None
        assert "half" not in run.models or 2 * args.checkpointing_steps == args.max_train_steps
        assert args.unpaired == run.row.startswith("unpaired")
    main = [run for run in runs if run.task == "T1" and run.stage == "main"]
    for row in second.FAMILY + ("sft constant", "sft decaying", "start"):
        assert sum(run.row == row for run in main) == 20, row
    assert all({"end", "average 0.99"} <= set(run.models) for run in main if run.row == "sft constant")
    assert {run.seed for run in main if run.row in second.T1_THEN} == {3, 4, 6, 7}
    for seed in second.LATER:
        places = [place for place, run in enumerate(main) if run.seed == seed]
        assert places == [*range(places[0], places[-1] + 1)], "all of a start's runs follow each other"
        assert {main[place].row for place in places[-6 * 2 :]} == {*second.T1_THEN}
    tuned = {}
    for run in runs:
        if run.task == "T1" and run.stage == "tuning" and second.ROWS[run.row].trained:
            tuned.setdefault((run.base, run.row), []).append(run.seed)
    # The best rate that `told` makes up is the highest of SSPO's grid and within that of SFT.
    alike = {row: (100,) * (4 + (second.ROWS[row].grid is not second.RATES)) for _, row in tuned}
    assert all(tuple(seeds) == alike[row] + (101,) * 2 + (102,) * 2 for (_, row), seeds in tuned.items())


def test_the_neighbour_beyond_an_edge_is_tried_too(monkeypatch):
    """Where the least rate or margin is best, the next one; where a rate within the grid is, none."""
    monkeypatch.setattr(second, "told", lambda run: record(run, lambda *_: wanted[run.row](dict(run.settings))))
    rate, margin = "learning_rate", "margin"
    wanted = {"sft constant": lambda trial: abs(trial[rate] - 1e-4), "unpaired": lambda trial: trial[rate]}
    wanted["hinge"] = lambda trial: trial[rate] + trial[margin]
    assert second.beyond("first", "sft constant") == []
    assert second.beyond("first", "unpaired") == [{rate: 1e-5, "beta_dpo": 200.0}]
    assert second.beyond("first", "hinge") == [{rate: 1e-5, margin: 0.001}, {rate: 3e-5, margin: 1e-4}]
    assert second.best_two("first", "unpaired")[0][rate] == 1e-5
    assert {second.best_two("first", "hinge")[0][margin]} == {1e-4}


def test_the_neighbour_of_the_best_of_all_seeds_gets_all_seeds(monkeypatch):
    """With the first seed alone a rate within the grid is best, with all three the least one."""

    def made_up(run):
        best = 9e-5 if run.seed == second.TUNING[0] else 2e-5
        return record(run, lambda *_: abs(np.log(dict(run.settings).get("learning_rate", best) / best)))

    monkeypatch.setattr(second, "told", functools.cache(made_up))
    second.chosen.cache_clear()
    row, rates = "sft decaying", [{"learning_rate": rate} for rate in (1e-5, 3e-5, 1e-4)]
    assert second.beyond("first", row) == [] and second.best_two("first", row) == [rates[2], rates[1]]
    assert second.beyond_all("first", row) == rates[:1]
    *_, last = [list(stage()) for stage in second.tuning_stages()]
    assert [run.seed for run in last if run.row == row] == [100, 101, 102]
    assert {run.settings for run in last if run.row == row} == {second.settings_of(rates[0])}
    assert dict(second.chosen("first", row)[0]) == rates[1], "of three candidates the best over all seeds"
    second.chosen.cache_clear()


def test_hinge_is_its_formula():
    errors = [torch.tensor([[a, a], [b, b]]) for a, b in ((0.30, 0.10), (0.13, 0.20), (0.29, 0.12), (0.10, 0.21))]
    errors[0].requires_grad_()
    loss, told = second.hinge_loss(*errors, 2000.0, "none", margin=0.015)
    assert loss.item() == pytest.approx((0 + 0.015 - 0.02 + 0.01) / 2, rel=1e-5), "0.015 + 0.01 - 0.03 is below 0"
    far, _ = second.hinge_loss(*errors, 2000.0, "none", margin=-1.0)
    assert far.item() == 0 and torch.autograd.grad(far, errors[0])[0].abs().sum() == 0, "far enough is not pushed"
    assert told["gap/winner"].item() == pytest.approx((0.01 - 0.02) / 2, rel=1e-5)


def test_extrapolated_weights():
    base, sft = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 1.0])}
    assert second.extrapolated(base, sft, 1.5)["a"].tolist() == [1 + 1.5 * 2, 2 - 1.5]
    assert second.extrapolated(base, sft, 1.0)["a"].tolist() == [3, 1]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The runner in a folder of its own: runs of three updates on few winners, measured by few pictures."""
    monkeypatch.setattr(second, "WORK", tmp_path / "work")
    monkeypatch.setattr(second, "DATA", tmp_path / "data")
    monkeypatch.setattr(second, "PER_CAPTION", 1)
    pictures = {"tuning": {"aligned": 4}, "main": {"held out": 4}, "finer": {"held out": 4}}
    monkeypatch.setattr(second, "PICTURES", pictures)
    monkeypatch.setattr(second, "HELD_OUT", 1)
    monkeypatch.setattr(study, "heldout_error", functools.partial(study.heldout_error, per_caption=1))
    monkeypatch.setattr(second, "real", lambda caption: measures.real_features(caption, 4))
    monkeypatch.setattr(second, "COMMON", second.COMMON | {"train_batch_size": 2, "lr_warmup_steps": 0})
    short = {"max_train_steps": 3, "rollout_steps": 2, "replay_steps": 2, "draws_per_pair": 1}
    flags = second.Run.flags
    half = {"checkpointing_steps": 1}
    monkeypatch.setattr(second.Run, "flags", lambda run: flags(run) | short | (half if "half" in run.models else {}))
    start = second.Run("start", "first", "sft decaying", 100, second.settings_of(second.START_GRID[0]), ())
    monkeypatch.setattr(second, "start_of", lambda base, seed, share=0.0: start)
    return start


def test_a_run_is_trained_measured_counted_and_collected(tiny):
    run = second.Run("T1", "first", "sft constant", 100, (("learning_rate", 1e-3),), ("end", "average 0.5"), (1.0,))
    second.carry_out(run)
    told = json.loads(run.result.read_text())
    assert told["forwards"] == told["backwards"] == 3 * 2 and told["seconds"] > 0 and "commit" in told
    assert [line["model"] for line in told["captions"]] == ["end", "average 0.5"]
    assert set(told["captions"][0]) >= set(second.LINES) - {"run"}
    assert told["captions"][0]["mmd"] != told["captions"][1]["mmd"]
    start = second.start_folder(run)
    begun, base = second.weights_of(start), second.weights_of(study.BASES["first"])
    assert any((begun[name] != base[name]).any() for name in base), "it was trained"
    assert second.collect() == 2
    runs = second.read_csv(second.DATA / "runs.csv")
    assert {line["run"] for line in runs} == {run.name, tiny.name}
    assert len(second.read_csv(second.DATA / "captions.csv.gz")) == 2
    run.result.unlink()
    second.collected.cache_clear()
    assert second.told(run)["captions"][1]["mmd"] == told["captions"][1]["mmd"], "from data/, so it does not run again"
    assert second.collect() == 2, "what is no more in work/ stays in data/"
    second.collected.cache_clear()


def test_kept_weights_draw_once_more_in_more_steps(tiny, monkeypatch):
    """The same model and noise as the main run, so that only the steps differ; nothing is trained."""
    run = second.Run("T1", "first", "sft constant", 0, (("learning_rate", 1e-3),), ("half", "end"), (1.0,))
    monkeypatch.setattr(second, "main_run", lambda task, base, row, seed: run)
    assert [*second.finer_runs()] == [], "no weights are kept yet"
    second.carry_out(run)
    (finer,) = {*second.finer_runs()}
    monkeypatch.setattr(second, "train", None)
    second.carry_out(finer)
    main, again = (json.loads(one.result.read_text()) for one in (run, finer))
    assert (again["stage"], again["flags"], again["start"]) == ("finer", {}, main["start"])
    assert [line["model"] for line in again["captions"]] == ["end"]
    half, end = main["captions"]
    assert (half["model"], end["model"]) == ("half", "end") and half["mmd"] != end["mmd"]
    assert again["captions"][0]["mmd"] != end["mmd"]
    begun, *kept = (
        weights["conv_in.weight"]
        for weights in (
            second.weights_of(second.start_folder(run)),
            *(second.load_file(second.kept(run, model)) for model in ("half", "end")),
        )
    )
    assert (kept[0] != begun).any() and (kept[1] - begun).norm() > (kept[0] - begun).norm(), "further on its way"
    pipeline = study.load_pipeline(study.BASES["first"], "cpu")
    ((_, weights),) = second.models_of(finer, None, {})
    pipeline.unet.load_state_dict(weights)
    (measured,) = second.measure(pipeline, run, "end")
    assert measured["mmd"] == pytest.approx(end["mmd"], abs=0.02), "the main run's, in half precision"


def test_a_run_is_drawn_for_the_rows_that_share_it_alone():
    """Weights and their average are two runs on the first base, which chose two rates, and one on the second."""
    runs = {(base, row): second.main_run("T1", base, row, 5) for base in study.BASES for row in second.ROWS}
    assert runs["first", "sft constant"].models == ("half", "end")
    assert runs["first", "sft averaged"].models == ("half", "average 0.99")
    assert runs["second", "sft constant"] == runs["second", "sft averaged"]
    assert runs["second", "sft constant"].models == ("half", "average 0.995", "end")
    for (base, row), run in runs.items():
        _, model, guidance = second.chosen(base, row)
        assert model in run.models and {1.0, guidance} <= set(run.guidances), (base, row)


def test_a_table_shows_no_error_of_other_weights():
    """The runs of sft averaged were measured with the last weights after the average on the first five seeds."""
    runs = second.read_csv(STUDY / "data" / "runs.csv")
    names = {second.main_run("T1", "first", "sft constant", seed).name for seed in range(5)}
    errors = [float(line["error"]) for line in runs if line["run"] in names]
    assert len(errors) == 5
    for row, error in (("sft constant", f"{np.mean(errors):.4f}"), ("sft averaged", "")):
        head, _, *lines = second_report.measures_table("first", [row], range(5)).splitlines()
        column = [name.strip() for name in head.split("|")].index("error")
        assert [line.split("|")[column].strip() for line in lines] == [error] * 2, row


def test_a_sheet_shows_what_each_row_draws_from_the_same_noise(told, monkeypatch, tmp_path):
    """The start is the base here, and one row the other base: its line differs, and no other."""
    monkeypatch.setattr(second, "WORK", tmp_path)
    monkeypatch.setattr(second, "STEPS", 3)
    assert second_report.sheet("first") is None, "no weights are kept"
    (tmp_path / "weights").mkdir()
    rows, seed = ("start", second.best_sft("first"), *second.FAMILY), second_report.SHOWN
    for row in rows:
        run, model = second.main_run("T1", "first", row, seed), second.chosen("first", row)[1]
        weights = second.weights_of(study.BASES["second" if row == "hinge" else "first"])
        second.save_file({name: weight.half() for name, weight in weights.items()}, second.kept(run, model))
    lines = np.split(np.asarray(second_report.sheet("first").convert("RGB")), len(rows))
    pictures = [line[:64, -12 * 64 :] for line in lines]
    same = [np.array_equal(picture, pictures[0]) for picture in pictures]
    assert same == [row != "hinge" for row in rows]
    pipeline, caption = study.load_pipeline(study.BASES["first"], "cpu"), second.held_out(seed)[0][3]
    (drawn,) = second.draw(pipeline, [caption], second.first_noise(seed, "held out", 3), 1.0, second.STEPS)
    shown = pictures[0][:, 3 * 64 : 4 * 64].astype(int)
    assert np.abs(shown - np.asarray(drawn)).mean() < 6, "but for few colours and half precision"


def test_weights_average_and_the_base_is_a_reference(tiny, tmp_path):
    """The average is worked out again from the weights after each update; the bank's first entry is the base."""
    seen, notes = [], {}
    run = second.Run("T2", "first", "unpaired, base", 0, (("learning_rate", 1e-3),), ("end", "average 0.5"))
    start = second.start_folder(run)  # made by a run of its own, which does not count
    with second.patched(run, notes):
        args = second.script.parse_args(run.command_line(start, second.winners_of(run), tmp_path / "out"))
        args.cache_dir = str(tmp_path / "datasets")
        write_metrics, load, references = second.script.write_metrics, second.script.ReplayBank.load, []
        prepare = second.script.prepare_denoiser
        models = []

        def prepared(given, *others):
            prepare(given, *others)
            models.append(given)
            seen.append(given.denoiser.conv_in.weight.detach().clone())

        def written(*given):
            write_metrics(*given)
            seen.append(models[0].denoiser.conv_in.weight.detach().clone())

        def loaded(bank, index):
            references.append((index, load(bank, index)))
            return references[-1][1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(second.script, "prepare_denoiser", prepared)
            patch.setattr(second.script, "write_metrics", written)
            patch.setattr(second.script.ReplayBank, "load", loaded)
            second.script.main(args)
    average = seen[0]
    for weight in seen[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(notes["averages"][0.5]["conv_in.weight"], average)
    base = second.weights_of(study.BASES["first"])
    assert {index for index, _ in references} == {0}
    torch.testing.assert_close(references[0][1]["conv_in.weight"], base["conv_in.weight"])
    assert (seen[0] != base["conv_in.weight"]).any(), "the start is another model"
    assert notes["forwards"] == 3 * (2 * 2 + 2 * 4) and notes["backwards"] == 3 * 4


def test_degraded_winners_are_about_their_share(tiny, monkeypatch):
    monkeypatch.setattr(second, "PER_CAPTION", 4)
    clean, spoiled = (second.winners_of(second.Run("T2", "first", "unpaired", 0, share=share)) for share in (0.0, 0.4))
    names = sorted(path.name for path in clean.glob("*.png"))
    differ = [(clean / name).read_bytes() != (spoiled / name).read_bytes() for name in names]
    assert 0.25 < np.mean(differ) < 0.55 and len(names) == 4 * 39


def test_every_column_is_explained():
    text = (STUDY / "data" / "columns.md").read_text()
    first = study.report
    columns = {*second.RUNS, *second.LINES, *second.JUDGED, *second.POINTS}
    for name in columns | {*first.RUNS, *first.PICTURES, *first.POINTS}:
        assert name in text, name


def test_kept_weights_are_those_of_the_main_run():
    """What columns.md says of half precision, of every committed run that was drawn once more."""
    runs = {line["run"]: line for line in second.read_csv(STUDY / "data" / "runs.csv")}
    finer = [name for name, line in runs.items() if line["stage"] == "finer"]
    assert finer
    for name in finer:
        line, main = runs[name], runs[name.removesuffix(f" {second.FINER} steps")]
        assert line["start"] == main["start"] and main["stage"] == "main"
        assert abs(float(line["error"]) - float(main["error"])) < 2e-5, name


def test_what_is_committed_has_been_planned():
    runs = second.read_csv(STUDY / "data" / "runs.csv")
    assert len({line["run"] for line in runs}) == len(runs)
    for line in runs:
        flags = json.loads(line["flags"])
        assert line["commit"] and line["cpu"] and line["row"] in second.ROWS
        fresh = line["task"] != "start" and line["stage"] == "main"
        assert not flags or flags["seed"] == int(line["seed"]) + 1000 * fresh
        if line["task"] == "T1" and flags:
            assert flags["max_train_steps"] == second.ROWS[line["row"]].flags["max_train_steps"]


@pytest.fixture
def made_up(told, monkeypatch):
    """
    Main runs of T1: at guidance 1 unpaired is 0.05 better than SFT on both bases, hinge as much worse, indicator
    better on one base only, sign better at the price of recall, none with rival 0.3 and extrapolated are level.
    """
    gains = {"unpaired": (-0.05, -0.05), "hinge": (0.05, 0.05), "indicator": (-0.05, 0.05), "sign": (-0.05, -0.05)}
    tuning = second.told

    def main(run):
        if run.stage == "tuning":
            return tuning(run)
        if run.task == "T1" and run.row in second.T1_THEN and run.seed not in second.LATER:
            return None
        rng = RNG([run.seed, *run.base.encode(), *run.row.encode()])
        of_seed, lines = 0.002 * rng.normal(), []
        for model in run.models:
            for guidance in run.guidances:
                for caption in second.held_out(run.seed)[0]:
                    gain = gains.get(run.row, (0, 0))[run.base == "second"] if guidance == 1 else 0
                    line = {"model": model, "guidance": guidance, "part": "held out", "caption": caption}
                    line["mmd"] = 0.3 + gain + of_seed + 0.005 * rng.normal()
                    line |= {
                        "score": 0.92 if run.row == "unpaired" else 0.9,
                        "second score": 0.9,
                        "recall": 0.4 if run.row == "sign" else 0.5,
                    }
                    line |= {"precision": 0.7, "memorisation": 0.98, "spoiled": run.share / 2 + 0.002 * rng.normal()}
                    aligned = line["mmd"] - (0.12 if run.row == "unpaired" else 0.1)
                    lines += [line, line | {"part": "aligned", "mmd": aligned}]
        start = f"{run.seed}" if run.row != "extrapolated" or run.seed != 7 else "made again elsewhere"
        cost = {"seconds": 200.0, "forwards": 20_160, "backwards": 10_080}
        ways = {"dpo_fraction": [0.25] * 10 + [0.75] * 10} if "ssr" in run.flags() else {}
        ways |= dict.fromkeys(("implicit_accuracy", "gap/winner", "gap/rival"), [0.001] * 20) if ways else {}
        return {"captions": lines, "start": start, "error": 0.05, "curves": ways, **cost}

    monkeypatch.setattr(second, "told", functools.cache(main))


def test_the_family_is_told_as_the_plan_says(made_up):
    told = {(row, place): (p, word) for row, place, _, p, word in second_report.family()}
    assert len(told) == 12
    words = {row: told[row, "guidance 1"][1] for row in second.FAMILY}
    assert words["unpaired"] == "ahead" and words["hinge"] == "behind" and words["sign"] == "ahead, at a price"
    assert words["indicator"] == "not resolved" and told["indicator", "guidance 1"][0] == 1, "the bases disagree"
    assert {words[row] for row in ("none, rival 0.3", "extrapolated")} == {"equivalent"}
    assert {word for (_, place), (_, word) in told.items() if place == "own best"} == {"equivalent"}
    both = next(both for row, _, both, _, _ in second_report.family() if row == "unpaired")
    assert [one["seeds"] for one in both] == [10, 10] and both[0]["mean"] == pytest.approx(-0.05, abs=0.005)
    assert second_report.compare("first", "extrapolated", "guidance 1")["seeds"] == 9, "another start is left out"
    crossed = second_report.compare("first", "unpaired", "guidance 1", sft_place="own best")
    assert crossed["mean"] == pytest.approx(-0.05, abs=0.005)


def test_the_caption_that_carries_a_difference_is_found(made_up, monkeypatch):
    """Unpaired better on one caption alone: without it nothing is left."""
    main, special = second.told, second.held_out(0)[0][0]

    def one_caption(run):
        made = copy.deepcopy(main(run))
        for line in made["captions"]:
            if run.row == "unpaired" and line["guidance"] == 1 and line["part"] == "held out":
                line["mmd"] += 0.05 - (line["caption"] == special)
        return made

    monkeypatch.setattr(second, "told", one_caption)
    found = second_report.compare("first", "unpaired", "guidance 1")
    assert found["mean"] < -0.01
    assert found["without"][1] == special and abs(found["without"][0]) < 0.005


def test_tables_and_plots_hold_what_was_measured(made_up, monkeypatch, tmp_path):
    monkeypatch.setattr(second, "HERE", tmp_path)
    told = second_report.family()
    made = second_report.tables(told)
    page = tmp_path / "appendix.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in made))
    monkeypatch.setattr(second_report, "tables", lambda _: made)
    second_report.write(told)
    printed = page.read_text()
    assert all(f"<!-- {name} -->\n{text}\n<!-- end -->" in printed for name, text in made.items())
    line = next(line for line in printed.splitlines() if line.startswith("| unpaired | 1 "))
    guidance, seeds, mmd, precision, recall, *_, aligned, memorisation, error, latents, seconds = line.split(" | ")[1:]
    assert (guidance, seeds, precision, recall, memorisation) == ("1", "10", "0.700", "0.500", "0.980")
    assert (error, latents, seconds.strip(" |")) == ("0.0500", "40", "200")
    assert "\n| sft, 4 draws | 1 | 4 | " in printed and "\n| sft, 4 draws | 1 | 10 | " not in printed
    leads = [line.split(" | ") for line in printed.splitlines() if line.startswith("| unpaired, latest | guidance 1")]
    assert [line[2] for line in leads] == ["first", "second"] and leads[0][3] == "4"
    assert float(leads[0][5].split(" ")[0]) == pytest.approx(0.05, abs=0.01), "unpaired is better by that"
    rows = [line[2:-2].split(" | ") for line in printed.splitlines() if line.startswith("| 40% |")]
    degraded = {row: cells for _, row, guidance, *cells in rows if guidance == "1"}
    assert degraded["unpaired"][0] == "3" and degraded[second.best_sft("first")][-2:] == ["", ""]
    assert [float(cell) for cell in degraded["unpaired, base"][2:5:2]] == pytest.approx([0.2, 0.2], abs=2e-3)
    gain, spoiled = (float(cell.split(" ")[0]) for cell in degraded["unpaired"][-2:])
    assert gain == pytest.approx(-0.05, abs=0.01) and abs(spoiled) < 2e-3, "against SFT of the same share"
    assert made["mixed starts"] == "first 7, second 7"
    (way,) = [line.split(" | ") for line in made["way first"].splitlines() if line.startswith("| unpaired, latest ")]
    assert (way[1], way[2], way[6], way[-1]) == ("4", "0.25", "0.75", "0.00100 |")
    assert "| sft" not in made["way first"]
    assert float(mmd) == pytest.approx(0.25, abs=0.005)
    assert float(aligned) == pytest.approx(float(mmd) - 0.12, abs=2e-3)
    assert "rate 0.0001, β 200 | end | 2 |" in printed, "what the tuning chose"
    assert second_report.work_of("first", "unpaired") == (40.32, 200)
    beside = [
        line.split(" | ") for line in printed.splitlines() if line.startswith("| unpaired | guidance 1 | first ")
    ]
    assert beside[0][3:5] == ["+0.020 [+0.020, +0.020]", "yes"] and beside[0][5].startswith("-0.0")
    expected = 0.25**0.5 - 0.3**0.5
    assert float(beside[0][6]) == pytest.approx(0.03, abs=0.001), "a tenth of SFT's"
    assert beside[0][7] == "yes" and float(beside[0][9].split(" ")[0]) == pytest.approx(expected, abs=0.01)
    assert float(beside[0][10].split(" ")[0]) == pytest.approx(-0.07, abs=0.005), "on aligned captions"
    worse = next(line for line in made["beside"].splitlines() if line.startswith("| hinge | guidance 1 | first "))
    assert worse.split(" | ")[7] == "no"
    assert second_report.root(np.array([0.04, -0.04])) == pytest.approx([0.2, -0.2])
    (line,) = [line for line in second_report.finer_table("first").splitlines() if line.startswith("| unpaired | 1 ")]
    assert line.split(" | ")[2] == "3" and float(line.split(" | ")[3]) == pytest.approx(0.25, abs=0.01)
    axes = second_report.plot_work().axes
    ends = {line.get_label(): line.get_ydata()[-1] for line in axes[0].get_lines()}
    assert ends["unpaired"] == pytest.approx(0.25, abs=0.005) and ends["sft constant"] > 0.29
    assert {path.name for path in tmp_path.iterdir()} == {"appendix.md", "forest.png", "work.png"}


def test_what_guidance_brings_is_told_of_the_row_that_others_are_compared_with(made_up, monkeypatch):
    """Which is unpaired here: better by 0.05 without guidance alone."""
    monkeypatch.setattr(second, "best_sft", lambda _: "unpaired")
    *_, decaying, _, guided = [line.strip(" |").split(" | ") for line in second_report.sft_table().splitlines()]
    assert decaying[0] == "sft decaying − start, guidance 1"
    assert [float(cell.split(" ")[0]) for cell in decaying[1:3]] == pytest.approx([0, 0], abs=0.005)
    assert [float(cell.split(" ")[0]) for cell in guided[1:3]] == pytest.approx([0.05, 0.05], abs=0.005)


def test_a_row_with_few_seeds_is_told_beside_the_start_of_these_seeds(made_up, monkeypatch):
    """Seeds differ by more than rows do: here each seed adds its number to all rows' MMD."""
    main = second.told

    def by_seed(run):
        made = copy.deepcopy(main(run))
        for line in made["captions"] if made and run.stage == "main" else ():
            line["mmd"] += run.seed
        return made

    monkeypatch.setattr(second, "told", functools.cache(by_seed))
    table = second_report.tuned_table("first", ran=True)
    told = {line.split(" | ")[0]: float(line.strip(" |").split(" | ")[-1]) for line in table.splitlines()[2:]}
    assert told["| start"] == 0
    assert told["| unpaired, rival 4"] == pytest.approx(0, abs=0.01)
    assert told["| unpaired"] == pytest.approx(-0.025, abs=0.01), "ahead in one place of two"


def test_a_row_that_is_best_without_guidance_is_told_once(made_up, monkeypatch):
    settings, model, _ = second.chosen("first", "unpaired")
    with monkeypatch.context() as patch:
        patch.setattr(second, "chosen", lambda *_: (settings, model, 1.0))
        assert second_report.places_of("first", "unpaired") == {"guidance 1": 1.0}
        assert len(second_report.measures_table("first", ["unpaired"], second.SEEDS).splitlines()) == 3


def test_the_appendix_says_what_the_data_say():
    page = (STUDY / "appendix.md").read_text()
    told = second_report.family() if second_report.complete() else []
    assert page == study.report.fill_in({"appendix.md": page}, second_report.tables(told))["appendix.md"]
    for row in second.TUNED:
        assert second_report.tried_table("first").count(f"| {row} | ") >= (1 if row == "start" else 5), row


def test_nothing_is_concluded_before_the_main_runs(told, monkeypatch):
    tuning = second.told
    monkeypatch.setattr(second, "told", lambda run: tuning(run) if run.stage == "tuning" else None)
    assert second_report.family() == []


def test_the_stages_run_in_turn_and_a_failure_stops_them(tmp_path, monkeypatch):
    """Two stages of two runs, the second of which depends on the first; what is there is not run again."""
    monkeypatch.setattr(second, "WORK", tmp_path)
    runs = [second.Run("T1", "first", row, seed) for row in ("sign", "hinge") for seed in (0, 1)]

    def stages():
        yield lambda: runs[:2]
        yield lambda: runs[2:] if second.told(runs[1]) else []

    def carry_out(run):
        if run.row == "hinge" and run.seed == 1:
            raise RuntimeError("this one is broken")
        run.result.write_text('"made now"')

    monkeypatch.setattr(second, "carry_out", carry_out)
    (tmp_path / "runs").mkdir()
    runs[0].result.write_text('"kept"')
    assert second.run_all(1, stages()) == 1, "one failed"
    assert [second.told(run) for run in runs] == ["kept", "made now", "made now", None]
    with second.only_one("run"), pytest.raises(BlockingIOError):
        second.run_all(1, stages())


def test_power_from_the_tuning_is_that_of_its_variances(told, monkeypatch):
    """What is random has a known size, so the standard error over 96 cells of 40 captions is known."""
    tuning = second.told

    def noisy(run):
        record, rng = copy.deepcopy(tuning(run)), RNG([run.seed, *run.row.encode()])
        for line in record["captions"]:
            line["mmd"] += 0.01 * rng.normal()
        return record

    monkeypatch.setattr(second, "told", noisy)
    lines = [line.split(" | ") for line in second_report.tuning_power("first").splitlines()[2:]]
    assert [line[0].removeprefix("| ") for line in lines] == list(second.FAMILY)
    error = 0.01 * 2**0.5 * power.standard_error((0, 1, 0, 0), 8, 12, 24)
    assert np.median([float(line[2]) for line in lines]) == pytest.approx(power.seen(error, 8, 0.05), rel=0.5)
