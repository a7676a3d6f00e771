"""The replay bank, and the reference that is made of an entry."""

from collections import Counter

import pytest
import torch
from helpers import with_shared_code


def weights(value):
    return {"layer": torch.full((2, 3), float(value))}


def entries(directory):
    return sorted(int(path.stem.split("-")[1]) for path in directory.iterdir())


def test_random_reference_is_uniform_over_the_kept(script, tmp_path):
    """Five entries, 4000 draws with fixed seeds: each within 80 of 800, about three standard deviations."""
    counts = Counter(script.ReplayBank(tmp_path, 8, "random", seed).draw(5) for seed in range(4000))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert all(720 < count < 880 for count in counts.values())


def test_draw_is_a_function_of_seed_and_iteration(script, tmp_path):
    def draws(directory, seed):
        return [script.ReplayBank(directory, 8, "random", seed).draw(k) for k in range(1, 60)]

    assert draws(tmp_path, 3) == draws("elsewhere", 3)
    assert draws(tmp_path, 3) != draws(tmp_path, 4)
    assert all(0 <= index < k for k, index in enumerate(draws(tmp_path, 3), start=1))


def test_latest_and_initial(script, tmp_path):
    assert [script.ReplayBank(tmp_path, 8, "latest").draw(k) for k in (1, 2, 9, 20)] == [0, 1, 8, 19]
    assert [script.ReplayBank(tmp_path, 8, "initial").draw(k) for k in (1, 2, 9, 20)] == [0, 0, 0, 0]
    assert script.ReplayBank(tmp_path, 1, "latest").draw(9) == 0


def test_bank_is_bounded_and_keeps_the_base(script, tmp_path):
    """The base and the newest three; an entry leaves only when neither the run nor a checkpoint draws from it."""
    bank = script.ReplayBank(tmp_path / "replay", 4)
    for index in range(10):
        bank.push(index, weights(index))
        bank.evict([index + 1])
        assert entries(bank.directory) == bank.live(index + 1)
        assert len(bank.live(index + 1)) == min(index + 1, 4)
    assert entries(bank.directory) == [0, 7, 8, 9]
    assert torch.equal(bank.load(7)["layer"], weights(7)["layer"])
    assert script.ReplayBank(tmp_path, 1).live(9) == [0]


def test_entries_that_a_checkpoint_needs_outlive_the_bound(script, tmp_path):
    bank = script.ReplayBank(tmp_path, 3)
    for index in range(8):
        bank.push(index, weights(index))
    bank.evict([8, 5])  # the run is in iteration 8, an old checkpoint in iteration 5
    assert entries(tmp_path) == [0, 3, 4, 6, 7]


def test_an_entry_that_is_made_again_has_none_of_the_former_ones_rivals(script, tmp_path):
    """A run that went back to an older checkpoint makes the entry again, maybe not to the last bit."""
    bank = script.ReplayBank(tmp_path, 8)
    bank.push(1, weights(1))
    kept = tmp_path / "iteration-1" / "rank-0" / "0" / "row-0-0.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    bank.push(2, weights(2))
    assert kept.exists()
    bank.push(1, weights(1))
    assert not kept.exists() and torch.equal(bank.load(1)["layer"], weights(1)["layer"])


def test_missing_and_damaged_entries_are_named(script, tmp_path):
    bank = script.ReplayBank(tmp_path, 8)
    with pytest.raises(script.UserError, match="iteration-3.*is missing or damaged"):
        bank.load(3)
    bank.push(3, weights(3))
    bank.path(3).write_bytes(bank.path(3).read_bytes()[:-8])
    with pytest.raises(script.UserError, match="iteration-3.*is missing or damaged"):
        bank.load(3)


@with_shared_code
def test_references_of_a_run(each):
    """The reference changes with the iteration, and metrics say which entry it is."""
    run = each(max_train_steps=8, replay_steps=2, replay_size=3, reference="latest", rollout_steps=1)
    assert run.column("reference/index") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert entries(run.path / "replay") == [0, 3, 4]
    # A reference that was pushed a moment ago is the policy itself.
    assert [step for step, gap in enumerate(run.column("gap/winner"), start=1) if gap == 0] == [1, 3, 5, 7]
    run = each("random", max_train_steps=5, replay_steps=1, seed=5, rollout_steps=1)
    bank = each.script.ReplayBank(run.path / "replay", 8, "random", 5)
    assert run.column("reference/index") == [bank.draw(k) for k in (1, 2, 3, 4, 5)]


# The reference


def sample(script, models, args):
    """Two noisy latents, timesteps and conditions, as `predict` takes them."""
    prompts = [{**script.uncropped(args), **row} for row in script.encode_prompt(models, ["a red circle", ""])]
    latents = torch.randn(2, *script.latent_shape(models, args), generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([1, 900]), script.collate_condition(prompts, "cpu")


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_reference_has_the_kept_weights_and_the_policy_gets_its_own_back(script, load, mode):
    """The base as reference does without the adapter, which would add nothing; a later checkpoint has its own."""
    args, models = load(script, train_mode=mode)
    script.prepare_denoiser(models, args, "cpu")
    used = []
    for name, module in models.denoiser.named_modules():
        if name.endswith(f"lora_A.{script.POLICY}"):
            module.register_forward_hook(lambda *_: used.append(True))
    inputs = sample(script, models, args)
    base = {name: weight.clone() for name, weight in script.policy_weights(models, args).items()}
    later = {name: weight + 0.1 for name, weight in base.items()}
    with torch.no_grad():
        without = script.predict(models.denoiser, *inputs)
    everywhere = len(used)
    assert (everywhere > 0) == (mode == "lora")
    for weights in (base, later):
        script.load_reference(models, weights, args)
        used.clear()
        with script.as_reference(models) as reference:
            prediction = script.predict(reference, *inputs)
        assert len(used) == (0 if weights is base else everywhere)
        policy = script.predict(models.denoiser, *inputs)
        assert torch.equal(policy, without)
        assert torch.equal(policy, prediction) == (weights is base)
        assert policy.requires_grad and not prediction.requires_grad
        kept = script.policy_weights(models, args)
        assert all(torch.equal(weight, base[name]) for name, weight in kept.items())
    policy.square().mean().backward()
    trained = [parameter for parameter in models.denoiser.parameters() if parameter.requires_grad]
    assert len(trained) == len(base) and any(parameter.grad.any() for parameter in trained)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_error_in_the_reference_leaves_the_policy_whole(script, load, mode):
    """Out of memory, say, which a user of the functions may catch."""
    args, models = load(script, train_mode=mode)
    script.prepare_denoiser(models, args, "cpu")
    base = {name: weight.clone() for name, weight in script.policy_weights(models, args).items()}
    for weights in (base, {name: weight + 0.1 for name, weight in base.items()}):
        script.load_reference(models, weights, args)
        with pytest.raises(MemoryError), script.as_reference(models):
            raise MemoryError
        assert all(torch.equal(w, base[name]) for name, w in script.policy_weights(models, args).items())
        assert not any(layer.disable_adapters for layer in models.adapted_layers)


def test_changing_places_copies_nothing(script, load):
    """There are two sets of trained weights in memory, and never a third."""
    args, models = load(script, train_mode="full")
    script.prepare_denoiser(models, args, "cpu")
    trained = [parameter for parameter in models.denoiser.parameters() if parameter.requires_grad]
    kept = {name: weight + 0.1 for name, weight in script.policy_weights(models, args).items()}
    script.load_reference(models, kept, args)
    policy, reference = [w.data_ptr() for w in trained], [models.reference[w].data_ptr() for w in trained]
    with script.as_reference(models):
        assert [w.data_ptr() for w in trained] == reference
        assert [models.reference[w].data_ptr() for w in trained] == policy
    assert [w.data_ptr() for w in trained] == policy


def test_loading_a_reference_looks_for_the_device_once(script, load, monkeypatch):
    """diffusers walks over all modules each time: once for each tensor, that was 18 seconds a load for SDXL's LoRA."""
    args, models = load(script)
    script.prepare_denoiser(models, args, "cpu")
    kept = {name: weight + 0.1 for name, weight in script.policy_weights(models, args).items()}
    kind, asked = type(models.denoiser), []
    device = kind.device.fget
    monkeypatch.setattr(kind, "device", property(lambda self: asked.append(True) or device(self)))
    script.load_reference(models, kept, args)
    assert len(models.reference) == len(kept) > 50
    assert len(asked) <= 2
