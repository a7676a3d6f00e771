"""The loss with a log-sigmoid of its own for each half, against the formula written down a second time."""

import math

import pytest
import torch

from train_sspo_sd import sspo_loss


SWITCH = {"sign": -1.0, "indicator": 0.0, "none": 1.0}


def four_errors(batch=12, draws=3):
    generator = torch.Generator().manual_seed(0)
    errors = [0.1 + 0.002 * torch.randn(batch, draws, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [error.requires_grad_(i < 2) for i, error in enumerate(errors)]


def log_sigmoid(number):
    return -math.log1p(math.exp(-number))


@pytest.mark.parametrize("ssr", SWITCH)
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_unpaired_loss_and_gradient_are_the_formulas(ssr, w):
    pw, pr, rw, rr = four_errors()
    loss, metrics = sspo_loss(pw, pr, rw, rr, beta=200.0, ssr=ssr, rival_weight=w, unpaired=True)
    loss.backward()
    total, seen = 0.0, set()
    for i in range(len(pw)):
        s = 1.0 if (rw[i] - pw[i]).mean() >= 0 else SWITCH[ssr]
        seen.add(s)
        for j in range(pw.shape[1]):
            gap_w, gap_r = (pw - rw)[i, j].item(), (pr - rr)[i, j].item()
            total += -log_sigmoid(-100 * gap_w) - (w * log_sigmoid(s * 100 * gap_r) if s else 0)
            # d/dx of -log sigmoid(-x) is sigmoid(x)
            assert pw.grad[i, j] * pw.numel() == pytest.approx(100 / (1 + math.exp(-100 * gap_w)), rel=1e-9)
            expected = -w * s * 100 / (1 + math.exp(s * 100 * gap_r))
            assert pr.grad[i, j] * pr.numel() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert loss.item() == pytest.approx(total / pw.numel(), rel=1e-9)
    assert seen == {1.0, SWITCH[ssr]}, "the errors must need the switch"


@pytest.mark.parametrize("w", [0.3, 1.0])
def test_first_update_has_the_paired_gradient_and_its_own_loss(w):
    """So that the two forms can be compared at one learning rate."""
    gradients = []
    for unpaired in (False, True):
        pw, pr, _, _ = four_errors()
        loss, _ = sspo_loss(pw, pr, pw.detach(), pr.detach(), beta=2000.0, rival_weight=w, unpaired=unpaired)
        loss.backward()
        gradients.append((pw.grad, pr.grad))
    assert loss.item() == pytest.approx((1 + w) * math.log(2), rel=1e-12)
    for paired, own in zip(*gradients):
        torch.testing.assert_close(paired, own, rtol=1e-12, atol=0)


def test_what_unpaired_is_for():
    """A winner that got worse beside a rival that is far away: the paired loss lets it go, this one does not."""
    pulls = []
    for unpaired in (False, True):
        pw = torch.tensor([0.11], dtype=torch.float64, requires_grad=True)
        pr = torch.tensor([0.30], dtype=torch.float64, requires_grad=True)
        sspo_loss(pw, pr, pw.detach() - 0.01, pr.detach() - 0.2, beta=200.0, ssr="none", unpaired=unpaired)[
            0
        ].backward()
        pulls.append((pw.grad.item(), abs(pr.grad.item())))
    (paired_winner, _), (own_winner, own_rival) = pulls
    assert paired_winner < 1e-5 and own_winner > 50
    assert own_rival < 1e-5, "a rival that is far away is no longer pushed"
