"""The loss, the switch and the errors, against formulas written down a second time."""

import math

import numpy as np
import pytest
import torch

from train_sspo_sd import (
    Models,
    denoising_errors,
    join_conditions,
    keyed_generator,
    keyed_noise,
    repeat_condition,
    sspo_loss,
)


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
def test_loss_is_the_formula(ssr, shape, extra):
    four = errors(shape)
    loss, metrics = sspo_loss(*four, beta=2000.0, ssr=ssr, **extra)
    assert loss.item() == pytest.approx(by_hand(*[e.numpy() for e in four], 2000.0, ssr, **extra), rel=1e-9)
    x = (four[2] - four[0]).reshape(shape[0], -1).mean(1)
    assert 0 < (x < 0).sum() < shape[0], "the example must need the switch"
    expected = 1.0 if ssr == "none" else (x >= 0).double().mean().item()
    assert metrics["dpo_fraction"].item() == pytest.approx(expected)


@pytest.mark.parametrize("ssr", SWITCH)
@pytest.mark.parametrize("shape", [(6,), (3, 2)])
def test_gradient_is_the_derivative_of_the_formula(ssr, shape):
    four = errors(shape, seed=1)
    for tensor in four[:2]:
        tensor.requires_grad_(True)
    sspo_loss(*four, beta=2000.0, ssr=ssr, rival_weight=0.7, sft_weight=0.5)[0].backward()
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
def test_a_tie_keeps_the_rival(ssr):
    """At the first update x = 0: the loss is ln 2 and the rival is pushed as hard as the winner is pulled."""
    winner = torch.full((4,), 0.1, requires_grad=True)
    rival = torch.full((4,), 0.2, requires_grad=True)
    loss, metrics = sspo_loss(winner, rival, winner.detach(), rival.detach(), beta=2000.0, ssr=ssr)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["dpo_fraction"] == 1
    assert metrics["implicit_accuracy"] == 0.5
    torch.testing.assert_close(winner.grad, torch.full((4,), 2000 / 4 / 4))
    torch.testing.assert_close(rival.grad, torch.full((4,), -2000 / 4 / 4))


@pytest.mark.parametrize("ssr, slope", [("sign", 1), ("indicator", 0), ("none", -1)])
def test_a_likely_winner_is_pulled_closer_left_alone_or_pushed_away(ssr, slope):
    """x < 0 flips, drops or keeps the rival's gradient."""
    rival = torch.tensor([0.2], requires_grad=True)
    sspo_loss(torch.tensor([0.11]), rival, torch.tensor([0.10]), torch.tensor([0.2]), 2000.0, ssr)[0].backward()
    assert torch.sign(rival.grad).item() == slope


def test_draws_share_one_decision():
    """Draws that disagree about x are outvoted by their mean, which single draws are not."""
    policy, reference = torch.tensor([[0.10, 0.10]]), torch.tensor([[0.14, 0.09]])
    rival = torch.tensor([[0.2, 0.2]], requires_grad=True)
    loss, metrics = sspo_loss(policy, rival, reference, torch.full((1, 2), 0.2), 100.0, "indicator")
    loss.backward()
    assert metrics["dpo_fraction"] == 1
    assert (rival.grad < 0).all()
    apart = sspo_loss(policy[0], rival[0].detach(), reference[0], torch.full((2,), 0.2), 100.0, "indicator")[1]
    assert apart["dpo_fraction"] == 0.5


@pytest.mark.parametrize("ssr", SWITCH)
@pytest.mark.parametrize("x", [0.0, 1e-9, -1e-9])
def test_one_x_decides_for_every_example(ssr, x):
    """With x given (--ssr_scope iteration) the examples' own errors have no say in the switch."""
    four = errors((8, 2), seed=3)
    loss, metrics = sspo_loss(*four, beta=2000.0, ssr=ssr, x=x)
    s = 1.0 if x >= 0 else SWITCH[ssr]
    inside = -1000 * ((four[0] - four[2]) - s * (four[1] - four[3])).numpy()
    assert loss.item() == pytest.approx(np.log1p(np.exp(-inside)).mean(), rel=1e-9)
    assert metrics["dpo_fraction"] == (s == 1)


def test_metrics_are_means_of_the_errors():
    four = errors((5, 2), seed=2)
    metrics = sspo_loss(*four, 2000.0)[1]
    winner, rival = four[0] - four[2], four[1] - four[3]
    assert metrics["mse/policy_winner"] == four[0].mean()
    assert metrics["mse/policy_rival"] == four[1].mean()
    assert metrics["gap/winner"] == winner.mean()
    assert metrics["gap/rival"] == rival.mean()
    assert metrics["implicit_accuracy"] == (winner < rival).double().mean()


def test_unknown_switch_is_refused():
    with pytest.raises(ValueError, match="sign, indicator or none"):
        sspo_loss(*errors((2,)), 2000.0, ssr="sigmoid")


class Linear(torch.nn.Module):
    """A stand-in for the UNet whose answer is known: noisy times a factor that hangs on time and caption."""

    def forward(self, noisy, timesteps, encoder_hidden_states):
        factor = timesteps.float() / 1000 + encoder_hidden_states.mean((1, 2))
        return Answer(noisy * factor.view(-1, 1, 1, 1))


class Answer:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_errors_are_means_over_all_but_the_batch(prediction_type):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=prediction_type)
    models = Models(None, None, None, Linear(), None, scheduler)
    latents, noise = torch.randn(3, 4, 6, 5), torch.randn(3, 2, 4, 6, 5)
    timesteps = torch.tensor([[0, 999], [500, 1], [20, 700]])
    condition = {"prompt_embeds": torch.randn(3, 7, 8)}
    result = denoising_errors(models.denoiser, models, latents, noise, timesteps, condition)
    assert result.dtype == torch.float32
    for i in range(3):
        for draw in range(2):
            alpha = scheduler.alphas_cumprod[timesteps[i, draw]].double()
            z, eps = latents[i].double(), noise[i, draw].double()
            noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * eps
            answer = noisy * (timesteps[i, draw] / 1000 + condition["prompt_embeds"][i].double().mean())
            target = eps if prediction_type == "epsilon" else alpha.sqrt() * eps - (1 - alpha).sqrt() * z
            assert result[i, draw].item() == pytest.approx(((answer - target) ** 2).mean().item(), rel=1e-4)


def test_conditions_repeat_in_step_with_latents():
    condition = {"embeds": torch.tensor([[1.0], [2.0]]), "names": ["a", "b"]}
    twice = repeat_condition(condition, 2)
    assert twice["embeds"].flatten().tolist() == [1, 1, 2, 2]
    assert twice["names"] == ["a", "a", "b", "b"]
    joined = join_conditions(condition, twice)
    assert joined["embeds"].flatten().tolist() == [1, 2, 1, 1, 2, 2]
    assert joined["names"] == ["a", "b", "a", "a", "b", "b"]


def test_draws_hang_on_their_key_alone():
    """The noise of a row is the same in any batch, and differs by purpose, seed, epoch and row."""
    shape = (4, 8, 8)
    together = keyed_noise("noise", 0, [(0, 3), (0, 5), (1, 3)], shape)
    assert torch.equal(keyed_noise("noise", 0, [(0, 5)], shape)[0], together[1])
    others = [*together, keyed_noise("rival", 0, [(0, 3)], shape)[0], keyed_noise("noise", 1, [(0, 3)], shape)[0]]
    assert all(not torch.equal(others[i], others[j]) for i in range(5) for j in range(i))
    assert abs(keyed_noise("noise", 0, [(0, i) for i in range(100)], shape).mean()) < 0.02
    assert keyed_generator("a", 1).initial_seed() == keyed_generator("a", 1).initial_seed()
