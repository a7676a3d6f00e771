"""Which frames of a clip are read, and how."""

import contextlib
import io

import av
import numpy as np
import pytest
import tiny
from helpers import SCRIPTS, open_winners, served
from PIL import Image


script = SCRIPTS["video"]


@pytest.fixture
def chosen(monkeypatch):
    """{(seed, epoch, row): the frames that were chosen}, as clips are read."""
    taken, choose = {}, script.choose_frames

    def spy(count, rate, args, key):
        taken[key] = choose(count, rate, args, key)
        return taken[key]

    monkeypatch.setattr(script, "choose_frames", spy)
    return taken


def test_frames_hang_on_seed_epoch_and_row(tmp_path, clips, chosen):
    """A random start, every second frame; the same again for the same key, and fixed if latents are cached."""

    def frames_of(**options):
        chosen.clear()
        served(open_winners(script, tmp_path, clips, **options), 30)
        return dict(chosen)

    first = frames_of()
    assert first == frames_of()
    assert sorted(first) == [(0, epoch, row) for epoch in range(5) for row in range(6)]
    assert {frames[0] for frames in first.values()} == set(range(12 - 6)), "every start comes up"
    assert all(np.diff(frames).tolist() == [2, 2, 2] for frames in first.values())
    assert sorted(frames_of(seed=1).values()) != sorted(first.values())
    assert sorted(frames_of(cache_latents=True)) == [(0, 0, row) for row in range(6)]


def test_frames_may_be_spread_over_the_whole_clip(tmp_path, clips, chosen):
    served(open_winners(script, tmp_path, clips, frame_stride=0, num_frames=5), 12)
    assert set(map(tuple, chosen.values())) == {(0, 3, 6, 8, 11)}
    one = open_winners(script, tmp_path, clips, frame_stride=0, num_frames=1)
    assert served(one, 1)[0]["pixels"].shape == (1, 3, 64, 64)


def test_all_frames_are_cropped_and_mirrored_alike(tmp_path):
    """A clip that stands still stays so, wherever it is cropped; height and width are free."""
    folder = tmp_path / "still"
    tiny.folder_of_clips(folder, 1)
    noise = np.random.default_rng(0).integers(0, 255, (10, 16, 3)).astype(np.uint8)
    picture = Image.fromarray(noise).resize((160, 96), Image.Resampling.BICUBIC)
    tiny.write_clip(folder / "0.mp4", [picture] * 12)
    options = dict(random_flip=True, height=48, width=64, resolution=None, center_crop=None)
    clips = [example["pixels"] for example in served(open_winners(script, tmp_path, folder, **options), 12)]
    assert all(clip.shape == (4, 3, 48, 64) for clip in clips)
    assert all((clip - clip[:1]).abs().mean() < 0.03 for clip in clips)
    assert sum((clip - clips[0]).abs().mean() > 0.1 for clip in clips) > 4, "another crop an epoch"


CONTAINERS = [
    ("mp4", "mpeg4", dict(g="3", bf="2")),
    ("mp4", "libx264", dict(g="5")),
    ("mp4", "libx264", dict(g="100", bf="3")),
    ("matroska", "libx264", dict(g="4")),
    ("webm", "libvpx-vp9", dict(g="4", deadline="realtime")),
    ("avi", "mpeg4", dict(g="4", bf="2")),
    ("mpegts", "mpeg2video", dict(g="4", bf="2")),
]


def places_of(frames):
    """How far the shape in frames of moving_frames has come: its left edges, in pixels."""
    dark = [(np.asarray(frame) < 128).any(2).mean(0) > 0.05 for frame in frames]
    return [int(np.nonzero(columns)[0].min()) for columns in dark]


@pytest.mark.parametrize("source", ["file", "bytes"])
@pytest.mark.parametrize("format, codec, options", CONTAINERS)
def test_the_frames_that_were_asked_for_are_read(tmp_path, format, codec, options, source):
    """Whatever the container knows of times and keyframes; each frame is known by where its shape is."""
    path = tmp_path / f"clip.{format}"
    tiny.write_clip(path, tiny.moving_frames("a black square", 14), format, codec, **options)
    read = (str(path), None) if source == "file" else (None, path.read_bytes())
    for wanted in ([0, 13], [13], [5, 6, 7], [2, 9, 12]):
        counted = []
        frames = script.read_frames(*read, lambda count, _, w=wanted, c=counted: c.append(count) or w)
        assert set(counted) == {14}
        assert places_of(frames) == pytest.approx([3 * i for i in wanted], abs=1)


def test_no_more_is_decoded_than_is_needed(tmp_path, monkeypatch):
    """From the keyframe before the first frame to the last, and only those that are wanted become pictures."""
    frames = tiny.moving_frames("a red circle", 20) * 10
    tiny.write_clip(tmp_path / "clip.mp4", frames, "mp4", "libx264", g="10", bf="0")
    kept, decoded = [], []
    upright, decode, open_clip = script.upright, av.container.InputContainer.decode, script.open_clip
    monkeypatch.setattr(script, "upright", lambda frame, track: kept.append(frame.pts) or upright(frame, track))

    class Counting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, track):
            for frame in decode(self.container, track):
                decoded.append(frame.pts)
                yield frame

    @contextlib.contextmanager
    def counted(*source):
        with open_clip(*source) as (container, track):
            yield Counting(container), track

    monkeypatch.setattr(script, "open_clip", counted)
    assert len(script.read_frames(str(tmp_path / "clip.mp4"), None, lambda count, rate: [103, 105, 107])) == 3
    assert len(kept) == 3
    assert 3 <= len(decoded) <= 12


def test_a_clip_filmed_upright_is_turned(tmp_path):
    """A telephone writes the frames lying, and a matrix into the track's header that turns them by 90 degrees."""
    picture = Image.new("RGB", (96, 64))
    picture.paste((255, 255, 255), (64, 0, 96, 32))  # the top right corner, which belongs to the bottom right
    tiny.write_clip(tmp_path / "clip.mp4", [picture] * 4)
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30]
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    (frame,) = script.read_frames(None, bytes(content), lambda count, rate: [1])
    assert frame.size == (64, 96)
    assert frame.getpixel((56, 90))[0] > 200 > 50 > frame.getpixel((8, 8))[0]


def test_a_clip_of_oblong_pixels_is_as_wide_as_it_is_shown(tmp_path):
    """Those of DV and DVD: 64 columns twice as wide as the rows are high."""
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        track = container.add_stream("libx264", rate=8)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        track.codec_context.sample_aspect_ratio = 2
        for caption in ("a red circle", "a blue square"):
            container.mux(track.encode(av.VideoFrame.from_image(tiny.picture(caption))))
        container.mux(track.encode())
    frames = script.read_frames(str(tmp_path / "clip.mp4"), None, lambda count, rate: [0, 1])
    assert [frame.size for frame in frames] == [(128, 64)] * 2
    there = np.asarray(tiny.picture("a blue square").resize((128, 64))).astype(int)
    assert np.abs(np.asarray(frames[1]).astype(int) - there).mean() < 12, "all of it, and not the left half"


# Clips that cannot be used


def without_pictures():
    """A file with sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return file.getvalue()


def short(frames):
    file = io.BytesIO()
    tiny.write_clip(file, tiny.moving_frames("a red circle", frames))
    return file.getvalue()


TOO_SHORT = r"it has 5 frames, and 4 at --frame_stride 2 need 7; lower --frame_stride \(0 spreads them"
BAD = {
    "short": (lambda: short(5), {}, TOO_SHORT),
    "shorter": (lambda: short(3), dict(frame_stride=0), "it has 3 frames, and 4 .* need 4; lower --num_frames"),
    "nothing": (lambda: b"", {}, ".+"),
    "no clip": (lambda: b"no clip", {}, ".+"),
    "half": (lambda: short(12)[:1500], {}, ".+"),
    "sound": (without_pictures, {}, "it has no picture track"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_clips_are_named(tmp_path, bad):
    """By their file and row, with what is wrong, in one line; streamed or not."""
    make, options, reason = BAD[bad]
    folder = tmp_path / "data"
    tiny.folder_of_clips(folder, 3)
    (folder / "1.mp4").write_bytes(make())
    for streaming in (False, True):
        winners = open_winners(script, tmp_path, folder, streaming=streaming, **options)
        message = rf"the video .*1\.mp4 in row \d cannot be read: {reason}"
        with pytest.raises(script.BadExample, match=message) as error:
            served(winners, 3)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [dict(dataloader_num_workers=1), dict(cache_latents=True), {}])
def test_a_bad_clip_stops_a_run_or_is_skipped(trains, tmp_path, log, options):
    """In the run's own process or a loader's, cached or not. A skipped one is named once."""
    folder = tmp_path / "data"
    tiny.folder_of_clips(folder, 4)
    (folder / "0.mp4").write_bytes(b"no clip")
    (folder / "1.mp4").write_bytes(short(5))
    options = dict(options, data=folder, max_train_steps=4, rollout_steps=1)
    with pytest.raises(script.BadExample, match=r"[01]\.mp4 in row [01] cannot be read: "):
        trains["video"](**options)
    run = trains["video"](on_bad_example="skip", **options)
    assert len(run.metrics) == 4
    warnings = [line for line in log() if "Skipped: " in line]
    assert len(warnings) == 2
    assert all(sum(f"{i}.mp4 in row {i} cannot be read" in line for line in warnings) == 1 for i in (0, 1))


def test_a_clip_without_any_frame_is_refused(tmp_path, clips):
    args = open_winners(script, tmp_path, clips, num_frames=1).args
    with pytest.raises(ValueError, match="it has 0 frames"):
        script.choose_frames(0, None, args, (0, 0, 0))
