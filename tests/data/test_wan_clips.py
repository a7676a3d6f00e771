"""Which frames of a file train_sspo_wan.py reads: by the file's rate and the model's, or by a stride."""

from fractions import Fraction

import av
import numpy as np
import pytest
import tiny
from helpers import open_winners, served
from PIL import Image

import train_sspo_wan as script


def striped(count, rate, path, format="mp4", codec="libx264"):
    """A clip of `count` frames, `rate` a second, each of which is known by its grey."""
    frames = [Image.new("RGB", (64, 64), (5 + 4 * i,) * 3) for i in range(count)]
    with av.open(str(path), "w", format=format) as container:
        track = container.add_stream(codec, rate=rate)
        track.width, track.height, track.pix_fmt = 64, 64, "rgb8" if codec == "gif" else "yuv420p"
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_image(frame)))
        container.mux(track.encode())
    return path


def numbers(pixels):
    """Which frames of a striped clip these are."""
    grey = (pixels.mean(dim=(1, 2, 3)) + 1) * 127.5
    return [round((value - 5) / 4) for value in grey.tolist()]


# Seconds of the model's 9 frames at 16 a second: 0, 1/16, ..., 8/16.
TAKEN = {
    8: [0, 1, 1, 2, 2, 3, 3, 4, 4],
    16: [0, 1, 2, 3, 4, 5, 6, 7, 8],
    24: [0, 2, 3, 5, 6, 8, 9, 11, 12],
    30: [0, 2, 4, 6, 8, 9, 11, 13, 15],
    Fraction(30000, 1001): [0, 2, 4, 6, 7, 9, 11, 13, 15],
}


@pytest.mark.parametrize("rate", TAKEN)
def test_frames_are_those_that_the_model_would_show(tmp_path, rate):
    """From a random start, whatever the rate of the file: so that things move as fast as they did."""
    folder = tmp_path / "clips"
    tiny.folder_of_clips(folder, 1)
    striped(TAKEN[rate][-1] + 4, rate, folder / "0.mp4")
    winners = open_winners(script, tmp_path, folder, num_frames=9)
    found = [numbers(example["pixels"]) for example in served(winners, 16)]
    starts = {frames[0] for frames in found}
    assert starts == {0, 1, 2, 3}, "every start comes up"
    assert all(frames == [frames[0] + place for place in TAKEN[rate]] for frames in found)


def test_another_rate_of_the_model(tmp_path):
    """Wan 2.2 5B's: of a file with 24 a second each frame is taken."""
    folder = tmp_path / "clips"
    tiny.folder_of_clips(folder, 1)
    striped(9, 24, folder / "0.mp4")
    winners = open_winners(script, tmp_path, folder, num_frames=9, fps=24)
    assert numbers(served(winners, 1)[0]["pixels"]) == list(range(9))


@pytest.mark.parametrize("stride, taken", [(1, range(5)), (3, range(0, 15, 3)), (0, (0, 3, 6, 9, 12))])
def test_a_stride_does_not_look_at_the_rate(tmp_path, stride, taken):
    folder = tmp_path / "clips"
    tiny.folder_of_clips(folder, 1)
    striped(13, 30, folder / "0.mp4")
    winners = open_winners(script, tmp_path, folder, num_frames=5, frame_stride=stride)
    frames = numbers(served(winners, 1)[0]["pixels"])
    assert np.diff(frames).tolist() == np.diff(list(taken)).tolist()
    assert stride or frames == list(taken)


@pytest.mark.parametrize(
    "format, codec",
    [("mp4", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("gif", "gif")],
)
@pytest.mark.parametrize("source", ["file", "bytes"])
def test_containers_tell_their_rate(tmp_path, format, codec, source):
    path = striped(20, 20, tmp_path / f"clip.{format}", format, codec)
    read = (str(path), None) if source == "file" else (None, path.read_bytes())
    assert float(rate_of(*read)) == pytest.approx(20, rel=0.01)


def rate_of(path, content=None):
    told = []
    script.read_frames(path, content, lambda count, rate: told.append(rate) or [0])
    return told[0]


def test_the_rate_is_that_of_the_frames_times(tmp_path):
    """Browsers record about 30 frames a second into files whose header says nothing, or 1000."""
    path = tmp_path / "clip.webm"
    with av.open(str(path), "w") as container:
        track = container.add_stream("libvpx", rate=1000)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        for i in range(31):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (4 * i,) * 3))
            frame.pts, frame.time_base = 33 * i + i % 3, Fraction(1, 1000)
            container.mux(track.encode(frame))
        container.mux(track.encode())
    assert float(rate_of(str(path))) == pytest.approx(1000 / 33, rel=0.01)


def test_a_file_that_does_not_tell_its_rate_is_named(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(script, "read_frames", lambda path, content, choose: choose(100, None))
    winners = open_winners(script, tmp_path, clips)
    with pytest.raises(
        script.BadExample, match=r"\d.mp4 in row \d .* does not tell its frames .* give --frame_stride"
    ):
        served(winners, 1)


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "it has 12 frames of 8 a second, and 33 at 16 a second need 17; lower --num_frames"),
        (dict(frame_stride=1), "it has 12 frames, and 33 at --frame_stride 1 need 33; lower --frame_stride"),
        (dict(frame_stride=0), "it has 12 frames, and 33 at --frame_stride 0 need 33; lower --num_frames"),
    ],
)
def test_a_clip_that_is_too_short_is_named(tmp_path, clips, options, told):
    winners = open_winners(script, tmp_path, clips, num_frames=33, **options)
    with pytest.raises(script.BadExample, match=rf"the video .*\d.mp4 in row \d cannot be read: {told}") as error:
        served(winners, 1)
    assert "\n" not in str(error.value)


def test_height_and_width_are_free(tmp_path, clips):
    winners = open_winners(script, tmp_path, clips, height=48, width=80)
    assert served(winners, 1)[0]["pixels"].shape == (5, 3, 48, 80)
