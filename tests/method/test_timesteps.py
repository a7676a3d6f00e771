"""How timesteps are drawn."""

from types import SimpleNamespace

import pytest
import torch
from helpers import SCRIPTS

import train_sspo_sd as script


MODELS = SimpleNamespace(noise_scheduler=SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000)))


def drawn(draws, times=4000):
    generators = (script.keyed_generator("timestep", 0, i) for i in range(times))
    return torch.stack([script.draw_timesteps(MODELS, generator, draws) for generator in generators])


def test_one_draw_is_randint():
    """So that runs of one draw keep their bits."""
    expected = torch.randint(1000, (1,), generator=script.keyed_generator("timestep", 0, 7))
    assert torch.equal(script.draw_timesteps(MODELS, script.keyed_generator("timestep", 0, 7), 1), expected)


@pytest.mark.parametrize("draws", [2, 3, 4, 8])
def test_several_draws_come_one_from_each_part_and_are_uniform(draws):
    timesteps = drawn(draws)
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and not timesteps.is_floating_point()
    for part, column in enumerate(timesteps.T):
        assert column.min() >= part * 1000 // draws and column.max() <= -(-(part + 1) * 1000 // draws)
    share = torch.histc(timesteps.float(), bins=10, min=0, max=1000) / timesteps.numel()
    assert (share - 0.1).abs().max() < 0.01, "each timestep is as likely as any other"


def test_no_timestep_is_past_the_schedule(monkeypatch):
    """The largest number that rand gives, times 1000 / 8, is 1000 in fp32."""
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 1 - 2**-24))
    for draws in range(2, 33):
        assert script.draw_timesteps(MODELS, None, draws).max() == 999


def test_all_scripts_draw_alike():
    for other in SCRIPTS.values():
        generator = script.keyed_generator("timestep", 0, 1)
        assert torch.equal(other.draw_timesteps(MODELS, generator, 4), drawn(4, 2)[1])
