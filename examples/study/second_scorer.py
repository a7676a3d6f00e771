"""A second scorer of emoji pictures, as unlike examples/quickstart/scorer.py as it can be made from the same glyphs.

That one is a small CNN which learned clean against degraded. This one is a vision transformer which learned what was
done to a picture (nothing, or which of the degradations), from renders of other seeds, half of them as the first
base's autoencoder gives them back. P(clean) is P(nothing was done).

    python second_scorer.py train   # train the shipped weights again
    python second_scorer.py test    # accuracy on fresh renders, and how often both scorers agree
"""

# ruff: noqa: E402
import argparse
import functools
import json
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from glyphs import CAPTIONS, DEGRADATIONS, SCORER_SEEDS, SIZE, TEST_SEEDS, degrade, render
from safetensors.torch import load_file, save_file
from scorer import disturb, judge, load_scorer, to_tensor
from torch import nn
from transformers import ViTConfig, ViTModel


WEIGHTS = HERE / "second_scorer.safetensors"
KINDS = [None, *DEGRADATIONS]  # None: nothing was done
SEEDS = SCORER_SEEDS + 500_000  # the first scorer's begin at SCORER_SEEDS


class SecondScorer(nn.Module):
    """A transformer over patches of 8x8 pixels; the class token tells the emoji and what was done to it."""

    def __init__(self, width=96, layers=4):
        super().__init__()
        config = ViTConfig(
            image_size=SIZE,
            patch_size=8,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
        )
        self.trunk = ViTModel(config, add_pooling_layer=False)
        self.emoji = nn.Linear(width, len(CAPTIONS))
        self.kind = nn.Linear(width, len(KINDS))

    def logits(self, pictures):
        token = self.trunk(pictures).last_hidden_state[:, 0]
        return self.emoji(token), self.kind(token)

    def forward(self, pictures):
        """As the first scorer's: logits of the emoji, and of (degraded, clean)."""
        emoji, kind = self.logits(pictures)
        return emoji, torch.stack([kind[:, 1:].logsumexp(1), kind[:, 0]], dim=1)


@functools.cache
def load_second_scorer(path=WEIGHTS):
    scorer = SecondScorer()
    scorer.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return scorer.eval()


def labelled_set(per_caption, first_seed):
    """(pictures (n, 64, 64, 3) uint8, captions' indices, kinds' indices); half of the pictures are clean."""
    pictures, captions, kinds = [], [], []
    for seed in range(first_seed, first_seed + per_caption):
        for caption, name in enumerate(CAPTIONS):
            rng = np.random.default_rng([3, caption, seed])
            kind = 0 if rng.random() < 0.5 else 1 + rng.integers(len(DEGRADATIONS))
            picture = render(name, seed)
            pictures.append(np.asarray(degrade(picture, name, seed, [KINDS[kind]]) if kind else picture))
            captions.append(caption)
            kinds.append(kind)
    return np.stack(pictures), torch.tensor(captions), torch.tensor(kinds)


@torch.no_grad()
def through_autoencoder(pictures):
    """Pictures as (n, 3, 64, 64) in [-1, 1], as the first base's autoencoder gives them back."""
    vae = AutoencoderKL.from_pretrained(HERE.parent / "quickstart" / "base", subfolder="vae")
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pictures.split(64)])


def train(per_caption=250, steps=3000, batch_size=64, rate=1e-3, seed=1):
    """Trains and writes WEIGHTS. Returns what `test` says of them."""
    torch.manual_seed(seed)
    pictures, captions, kinds = labelled_set(per_caption, SEEDS)
    pictures = to_tensor(pictures)
    decoded = through_autoencoder(pictures).clamp(-1, 1)
    scorer, rng = SecondScorer(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(captions), (batch_size,), generator=rng)
        as_decoded = torch.rand((batch_size, 1, 1, 1), generator=rng) < 0.5
        seen = disturb(torch.where(as_decoded, decoded[chosen], pictures[chosen]), rng)
        emoji, kind = scorer.logits(seen)
        loss = F.cross_entropy(emoji, captions[chosen]) + F.cross_entropy(kind, kinds[chosen], label_smoothing=0.02)
        loss.backward()
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: {loss.item():.3f}", flush=True)
    save_file({name: value.half() for name, value in scorer.state_dict().items()}, WEIGHTS)
    return test()


def test(per_caption=25):
    """Shares of right answers on renders that nothing else has seen, and of those on which both scorers agree."""
    pictures, captions, kinds = labelled_set(per_caption, TEST_SEEDS + 700_000)
    decoded = ((through_autoencoder(to_tensor(pictures)) + 1) * 127.5).round().clamp(0, 255).byte()
    told = {}
    for name, shown in (("renders", pictures), ("decoded", decoded.permute(0, 2, 3, 1).numpy())):
        emoji, clean = judge(load_second_scorer(), shown)
        first = judge(load_scorer(), shown)[1]
        told[name] = {
            "emoji": (emoji.argmax(1) == captions).float().mean().item(),
            "clean or degraded": ((clean > 0.5) == (kinds == 0)).float().mean().item(),
            "agree": ((clean > 0.5) == (first > 0.5)).float().mean().item(),
        }
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "test"])
    print(json.dumps({"train": train, "test": test}[parser.parse_args().command]()))


if __name__ == "__main__":
    main()
