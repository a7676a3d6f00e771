"""The errors, the switch and the loss, against formulas written down a second time."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler


SWITCH = {"sign": -1.0, "indicator": 0.0, "none": 1.0}


def errors(shape, seed=0):
    """Four tensors of errors near 0.1, in float64 so that differences can be taken."""
    generator = torch.Generator().manual_seed(seed)
    return [0.1 + 0.001 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]


def by_hand(policy_winner, policy_rival, reference_winner, reference_rival, beta, ssr, rival_weight=1, sft_weight=0):
    """The loss of the paper, one number at a time."""
    total, count = 0.0, 0
    for pw, pr, rw, rr in zip(policy_winner, policy_rival, reference_winner, reference_rival):
        x = float(np.mean(rw) - np.mean(pw))
        s = 1.0 if x >= 0 else SWITCH[ssr]
        for a, b, c, d in zip(*map(np.atleast_1d, (pw, pr, rw, rr))):
            inside = -beta / 2 * ((a - c) - s * rival_weight * (b - d))
            total += -math.log(1 / (1 + math.exp(-inside))) + sft_weight * a
            count += 1
    return total / count


@pytest.mark.parametrize("ssr", SWITCH)
@pytest.mark.parametrize("shape", [(16,), (16, 1), (8, 5)])
@pytest.mark.parametrize("extra", [{}, {"rival_weight": 0.3, "sft_weight": 2.0}])
def test_loss_is_the_formula(script, ssr, shape, extra):
    four = errors(shape)
    loss, metrics = script.sspo_loss(*four, beta=2000.0, ssr=ssr, **extra)
    assert loss.item() == pytest.approx(by_hand(*[e.numpy() for e in four], 2000.0, ssr, **extra), rel=1e-9)
    x = (four[2] - four[0]).reshape(shape[0], -1).mean(1)
    assert 0 < (x < 0).sum() < shape[0], "the example must need the switch"
    expected = 1.0 if ssr == "none" else (x >= 0).double().mean().item()
    assert metrics["dpo_fraction"].item() == pytest.approx(expected)


@pytest.mark.parametrize("ssr", SWITCH)
@pytest.mark.parametrize("shape", [(6,), (3, 2)])
def test_gradient_is_the_derivative_of_the_formula(script, ssr, shape):
    four = errors(shape, seed=1)
    for tensor in four[:2]:
        tensor.requires_grad_(True)
    script.sspo_loss(*four, beta=2000.0, ssr=ssr, rival_weight=0.7, sft_weight=0.5)[0].backward()
    arrays = [tensor.detach().numpy().copy() for tensor in four]
    for which in (0, 1):
        for place in np.ndindex(shape):
            step, values = 1e-8, []
            for sign in (1, -1):
                shifted = [array.copy() for array in arrays]
                shifted[which][place] += sign * step
                values.append(by_hand(*shifted, 2000.0, ssr, 0.7, 0.5))
            slope = (values[0] - values[1]) / (2 * step)
            assert four[which].grad[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("ssr", SWITCH)
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_a_tie_keeps_the_rival(script, ssr, shape):
    """At the first update x = 0: the loss is ln 2 and the rival is pushed as hard as the winner is pulled."""
    winner = torch.full(shape, 0.1, requires_grad=True)
    rival = torch.full(shape, 0.2, requires_grad=True)
    loss, metrics = script.sspo_loss(winner, rival, winner.detach(), rival.detach(), beta=2000.0, ssr=ssr)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["dpo_fraction"] == 1
    assert metrics["implicit_accuracy"] == 0.5
    torch.testing.assert_close(winner.grad, torch.full(shape, 2000 / 4 / 4))
    torch.testing.assert_close(rival.grad, torch.full(shape, -2000 / 4 / 4))


@pytest.mark.parametrize("ssr, slope", [("sign", 1), ("indicator", 0), ("none", -1)])
def test_a_likely_winner_is_pulled_closer_left_alone_or_pushed_away(script, ssr, slope):
    """x < 0 flips, drops or keeps the rival's gradient; the winner's stays."""
    winner, rival = (torch.tensor([value], requires_grad=True) for value in (0.11, 0.2))
    script.sspo_loss(winner, rival, torch.tensor([0.10]), torch.tensor([0.2]), 2000.0, ssr)[0].backward()
    assert torch.sign(rival.grad).item() == slope
    assert winner.grad.item() > 0


def test_draws_share_one_decision(script):
    """Draws that disagree about x are outvoted by their mean, which single draws are not."""
    policy, reference = torch.tensor([[0.10, 0.10]]), torch.tensor([[0.14, 0.09]])
    rival = torch.tensor([[0.2, 0.2]], requires_grad=True)
    loss, metrics = script.sspo_loss(policy, rival, reference, torch.full((1, 2), 0.2), 100.0, "indicator")
    loss.backward()
    assert metrics["dpo_fraction"] == 1
    assert (rival.grad < 0).all()
    apart = script.sspo_loss(policy[0], rival[0].detach(), reference[0], torch.full((2,), 0.2), 100.0, "indicator")[1]
    assert apart["dpo_fraction"] == 0.5


def test_metrics_are_means_of_the_errors(script):
    four = errors((5, 2), seed=2)
    metrics = script.sspo_loss(*four, 2000.0)[1]
    winner, rival = four[0] - four[2], four[1] - four[3]
    assert metrics["mse/policy_winner"] == four[0].mean()
    assert metrics["mse/policy_rival"] == four[1].mean()
    assert metrics["gap/winner"] == winner.mean()
    assert metrics["gap/rival"] == rival.mean()
    assert metrics["implicit_accuracy"] == (winner < rival).double().mean()


def test_unknown_switch_is_refused(script):
    with pytest.raises(KeyError, match="sigmoid"):
        script.sspo_loss(*errors((2,)), 2000.0, ssr="sigmoid")


class Linear(torch.nn.Module):
    """A stand-in for the denoiser whose answer is known: noisy times a factor of the time and of all it is told."""

    def forward(self, noisy, timesteps, encoder_hidden_states, added_cond_kwargs=None):
        frames = noisy.shape[2] if noisy.ndim == 5 else 1
        factor = (timesteps.float() / 1000)[:, None] + encoder_hidden_states.mean((1, 2)).view(-1, frames)
        for told in (added_cond_kwargs or {}).values():
            factor = factor + told.mean(1, keepdim=True)
        return SimpleNamespace(sample=noisy * factor.view(len(noisy), 1, frames, *[1] * (noisy.ndim - 3)))


@pytest.fixture
def pairs(script):
    """Three examples with latents of the script's kind and conditions that differ."""
    torch.manual_seed(0)
    shape = (4, 2, 6, 5) if script.MODALITY == "video" else (4, 6, 5)
    condition = {"prompt_embeds": torch.randn(3, 7, 8)}
    if hasattr(script, "latent_statistics"):
        condition.update(pooled_prompt_embeds=torch.randn(3, 9), time_ids=torch.randn(3, 6))
    return torch.randn(3, *shape), torch.randn(3, 2, *shape), condition


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_errors_are_means_over_all_but_the_batch(script, pairs, prediction_type):
    """For each draw of each example, with its own noise, timestep and condition."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    models = SimpleNamespace(noise_scheduler=scheduler)
    latents, noise, condition = pairs
    timesteps = torch.tensor([[0, 999], [500, 1], [20, 700]])
    result = script.denoising_errors(Linear(), models, latents, noise, timesteps, condition)
    assert result.dtype == torch.float32 and result.shape == (3, 2)
    for i in range(3):
        told = sum(value[i].double().mean() for value in condition.values())
        for draw in range(2):
            alpha = scheduler.alphas_cumprod[timesteps[i, draw]].double()
            z, eps = latents[i].double(), noise[i, draw].double()
            noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * eps
            answer = noisy * (timesteps[i, draw] / 1000 + told)
            target = eps if prediction_type == "epsilon" else alpha.sqrt() * eps - (1 - alpha).sqrt() * z
            assert result[i, draw].item() == pytest.approx(((answer - target) ** 2).mean().item(), rel=1e-4)


@pytest.mark.parametrize("split", [False, True])
def test_both_halves_of_a_pair_see_the_same_draws_and_caption(script, pairs, split):
    """The errors of winners and rivals, in one call or two, are those of each half by itself."""
    winner, noise, condition = pairs
    models = SimpleNamespace(noise_scheduler=DDPMScheduler(), denoiser=Linear())
    batch = {"winner": winner, "rival": torch.randn_like(winner), "condition": condition}
    draws = noise, torch.tensor([[0, 999], [500, 1], [20, 700]])
    result = script.pair_errors(models.denoiser, models, batch, *draws, split)
    for half, found in zip(("winner", "rival"), result):
        alone = script.denoising_errors(models.denoiser, models, batch[half], *draws, condition)
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)


def test_conditions_are_joined_in_their_order(script):
    first, second = {"a": torch.tensor([[1.0], [2.0]])}, {"a": torch.tensor([[3.0]])}
    assert script.join(first, second, first)["a"].flatten().tolist() == [1, 2, 3, 1, 2]


# The draws


def test_draws_hang_on_their_key_alone(script):
    """The noise of a row is the same in any batch, and differs by purpose, seed, epoch and row."""
    shape, noise = (4, 8, 8), script.keyed_noise
    together = noise("noise", 0, [(0, 3), (0, 5), (1, 3)], shape)
    assert torch.equal(noise("noise", 0, [(0, 5)], shape)[0], together[1])
    others = [*together, noise("rival", 0, [(0, 3)], shape)[0], noise("noise", 1, [(0, 3)], shape)[0]]
    assert all(not torch.equal(others[i], others[j]) for i in range(5) for j in range(i))
    many = noise("noise", 0, [(0, i) for i in range(100)], shape)
    assert abs(many.mean()) < 0.02 and many.std().item() == pytest.approx(1, abs=0.02)
    assert script.keyed_generator("a", 1).initial_seed() == script.keyed_generator("a", 1).initial_seed()


def test_timesteps_are_uniform_over_the_whole_schedule(script):
    """0 and the last one too: of 2000 examples each within 80 of 500, about four standard deviations."""
    models = SimpleNamespace(noise_scheduler=DDPMScheduler(num_train_timesteps=4))
    generators = [script.keyed_generator("timestep", 0, row) for row in range(2000)]
    counts = Counter(script.draw_timesteps(models, generator, 1).item() for generator in generators)
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(420 < count < 580 for count in counts.values())
