"""Score pictures of emoji: do they look clean, and do they show what the caption says?

A small CNN on 64x64 pixels, trained on renders that neither the base nor the winners contain, and independent of the
pipeline it judges. Two heads share one trunk: which of the captions, and clean or degraded. Three numbers come out:

    preference  mean P(clean)
    identity    mean P(the caption's emoji)
    score       mean over pictures of the product, so that clean pictures of the wrong thing do not count

    python scorer.py score pictures/          # an imagefolder with metadata.jsonl (file_name, text)
    python scorer.py train                    # train the shipped scorer again
    python scorer.py ceiling --base base      # what real pictures score, and the same through the base's autoencoder
"""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from glyphs import CAPTIONS, SCORER_SEEDS, SIZE, TEST_SEEDS, mixed_set
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn


WEIGHTS = Path(__file__).parent / "scorer.safetensors"


class Scorer(nn.Module):
    """Four strided convolutions, then the mean over positions, then the two heads."""

    def __init__(self, width=24):
        super().__init__()
        channels = [3, width, 2 * width, 3 * width, 4 * width]
        layers = []
        for before, after in zip(channels, channels[1:]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels[-1] * 4, 128)
        self.emoji = nn.Linear(128, len(CAPTIONS))
        self.clean = nn.Linear(128, 2)

    def forward(self, pictures):
        features = F.adaptive_avg_pool2d(self.trunk(pictures), 2).flatten(1)
        features = F.relu(self.hidden(features))
        return self.emoji(features), self.clean(features)


def to_tensor(pictures):
    """PIL pictures or arrays (n, 64, 64, 3), uint8, as the scorer wants them."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    if pixels.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"the scorer judges RGB pictures of {SIZE}x{SIZE}, not {pixels.shape[1:]}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@functools.cache
def load_scorer(path=WEIGHTS):
    scorer = Scorer()
    scorer.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=False)
    return scorer.eval()


@torch.no_grad()
def judge(scorer, pictures):
    """(P of every caption, P(clean)) for each picture."""
    logits = [scorer(batch) for batch in to_tensor(pictures).split(256)]
    return (
        torch.cat([emoji for emoji, _ in logits]).softmax(1),
        torch.cat([clean for _, clean in logits]).softmax(1)[:, 1],
    )


def scores(pictures, captions, scorer=None):
    """
    Preference, identity and score of each generated picture, a tensor of each; a scorer for examples/evaluate.

        python examples/evaluate/evaluate.py --scorer emoji=examples/quickstart/scorer.py:scores ...
    """
    emoji, clean = judge(scorer or load_scorer(), pictures)
    right = emoji[torch.arange(len(emoji)), [CAPTIONS.index(caption) for caption in captions]]
    return {"preference": clean, "identity": right, "score": clean * right}


def score(pictures, captions, scorer=None):
    """Preference, identity and score of generated pictures, each with the standard error of its mean."""
    result = {"pictures": len(pictures)}
    for name, values in scores(pictures, captions, scorer).items():
        result[name] = values.mean().item()
        result[f"{name}_error"] = values.std().item() / len(values) ** 0.5
    return result


def accuracy(scorer, per_caption=25):
    """Both heads' share of right answers on renders that nothing else has seen."""
    pictures, labels, degraded = mixed_set(per_caption, TEST_SEEDS, degraded_share=0.5)
    emoji, clean = judge(scorer, pictures)
    right_emoji = (emoji.argmax(1).numpy() == labels).mean()
    right_kind = ((clean.numpy() > 0.5) == ~degraded).mean()
    return {"pictures": len(labels), "emoji": float(right_emoji), "clean or degraded": float(right_kind)}


def disturb(pictures, rng):
    """What an autoencoder or a sampler does to any picture is no degradation: faint noise, a slight shift in tone."""
    noise = torch.randn(pictures.shape, generator=rng) * torch.rand((len(pictures), 1, 1, 1), generator=rng) * 0.08
    gain = 1 + 0.06 * (torch.rand((len(pictures), 3, 1, 1), generator=rng) - 0.5)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = 0.3 * torch.rand((len(pictures), 1, 1, 1), generator=rng)
    pictures = pictures * (1 - share) + soft * share
    return (1 - (1 - pictures) * gain + noise).clamp(-1, 1)


def train(args):
    torch.manual_seed(args.seed)
    pictures, labels, degraded = mixed_set(args.per_caption, SCORER_SEEDS, degraded_share=0.5)
    pictures, labels, clean = to_tensor(pictures), torch.as_tensor(labels), torch.as_tensor(~degraded).long()
    scorer, rng = Scorer(), torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    for step in range(args.steps):
        chosen = torch.randint(len(labels), (args.batch_size,), generator=rng)
        emoji_logits, clean_logits = scorer(disturb(pictures[chosen], rng))
        emoji_loss = F.cross_entropy(emoji_logits, labels[chosen], label_smoothing=0.02)
        clean_loss = F.cross_entropy(clean_logits, clean[chosen], label_smoothing=0.02)
        (emoji_loss + clean_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: emoji {emoji_loss.item():.3f}, clean {clean_loss.item():.3f}", flush=True)
    state = {name: value.half() for name, value in scorer.state_dict().items() if value.is_floating_point()}
    save_file(state, args.output)
    print(json.dumps({"bytes": Path(args.output).stat().st_size, "accuracy": accuracy(load_scorer(args.output))}))


@torch.no_grad()
def ceiling(args):
    """The best that a sampler of this base can do: real clean pictures, as they are and through its autoencoder."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae")
    for kind, share in (("clean", 0.0), ("degraded", 1.0)):
        pictures, labels, _ = mixed_set(12, TEST_SEEDS + 1000, degraded_share=share)
        captions = [CAPTIONS[label] for label in labels]
        decoded = vae.decode(vae.encode(to_tensor(pictures)).latent_dist.mode()).sample
        decoded = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        print(json.dumps({"real": kind} | score(pictures, captions)))
        print(json.dumps({"real": f"{kind}, through the autoencoder"} | score(decoded, captions)))


def score_folder(args):
    rows = [json.loads(line) for line in (args.folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [Image.open(args.folder / row["file_name"]).convert("RGB") for row in rows]
    print(json.dumps(score(pictures, [row["text"] for row in rows])))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("score", help="score an imagefolder with metadata.jsonl")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=score_folder)
    command = commands.add_parser("train", help="train the scorer and print its test accuracy")
    command.add_argument("--output", default=str(WEIGHTS))
    command.add_argument("--per_caption", type=int, default=250)
    command.add_argument("--steps", type=int, default=1500)
    command.add_argument("--batch_size", type=int, default=64)
    command.add_argument("--lr", type=float, default=3e-3)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=train)
    command = commands.add_parser("test", help="print the shipped scorer's accuracy on fresh renders")
    command.set_defaults(run=lambda args: print(json.dumps(accuracy(load_scorer()))))
    command = commands.add_parser("ceiling", help="score real pictures, also through a base's autoencoder")
    command.add_argument("--base", default=str(Path(__file__).parent / "base"))
    command.set_defaults(run=ceiling)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
