"""Every form in which winners may come, the order in which they are served, and what is made of a picture."""

import io
import itertools
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
import tiny
import torch
from conftest import flags
from PIL import Image

import train_sspo_sd as script


COUNT = 6


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_table():
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(tiny.picture(caption)), "path": None} for caption in tiny.CAPTIONS[:COUNT]],
            "text": tiny.CAPTIONS[:COUNT],
        },
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )


def as_pairs():
    """Pick-a-Pic's layout: the winner is jpg_0, then jpg_1, ...; every third pair is a tie, one has no label."""
    rows = []
    for i, caption in enumerate(tiny.CAPTIONS[:COUNT]):
        good, bad = png(tiny.picture(caption)), png(Image.new("RGB", (64, 64), "grey"))
        rows.append({"jpg_0": good, "jpg_1": bad, "label_0": 1.0} if i % 2 else {"jpg_0": bad, "jpg_1": good})
        rows[-1] = {"label_0": 0.0, "label_1": 1.0, "has_label": True, "caption": caption, **rows[-1]}
        if i % 2:
            rows.append({**rows[-1], "label_0": 0.5})
    rows.append({**rows[-1], "label_0": 1.0, "has_label": False})
    return datasets.Dataset.from_list(rows)


def make(form, directory):
    """Writes COUNT winners in the given form and returns the flags that name them."""
    directory.mkdir(parents=True, exist_ok=True)
    if form in ("jsonl", "csv"):
        return dict(train_data_dir=tiny.folder_of_winners(directory / "folder", COUNT, form))
    if form == "save_to_disk":
        as_table().save_to_disk(directory / "saved")
        return dict(train_data_dir=directory / "saved")
    if form == "save_to_disk dict":
        datasets.DatasetDict({"train": as_table()}).save_to_disk(directory / "saved")
        return dict(dataset_name=directory / "saved")
    if form == "parquet folder":
        (directory / "parquet").mkdir()
        as_table().to_parquet(directory / "parquet" / "train-00000-of-00001.parquet")
        return dict(dataset_name=directory / "parquet")
    if form == "parquet file":
        as_table().to_parquet(directory / "winners.parquet")
        return dict(train_data_dir=directory / "winners.parquet")
    if form == "arrow":
        as_table().save_to_disk(directory / "saved")
        return dict(train_data_dir=next((directory / "saved").glob("*.arrow")))
    if form == "pairs":
        as_pairs().to_parquet(directory / "pairs.parquet")
        return dict(train_data_dir=directory / "pairs.parquet")
    assert form == "webdataset"
    with tarfile.open(directory / "shard-000.tar", "w") as tar:
        for i, caption in enumerate(tiny.CAPTIONS[:COUNT]):
            for suffix, content in (("png", png(tiny.picture(caption))), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{i:05}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return dict(train_data_dir=directory)


def winners_of(tmp_path, **options):
    options = {"train_data_dir": None, "dataset_name": None, "cache_dir": tmp_path / "cache", **options}
    args = script.parse_args(flags("unused", None, tmp_path / "out", **options))
    return args, script.Winners(args)


def served(winners, count, **options):
    """The first `count` examples of the stream."""
    options = {"batch_size": 1, **options}
    stream = script.WinnerStream(winners, winners.load, **options)
    batches = itertools.islice(stream.micro_batches(), count // options["batch_size"])
    return [example for examples, _ in batches for example in examples]


FORMS = [
    "jsonl",
    "csv",
    "save_to_disk",
    "save_to_disk dict",
    "parquet folder",
    "parquet file",
    "arrow",
    "webdataset",
    "pairs",
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_every_winner_with_its_caption(tmp_path, form, streaming):
    """Two epochs hold each caption twice, each time with the picture that was drawn for it."""
    args, winners = winners_of(tmp_path, streaming=streaming, **make(form, tmp_path / "data"))
    examples = served(winners, 2 * COUNT)
    assert Counter(example["caption"] for example in examples) == dict.fromkeys(tiny.CAPTIONS[:COUNT], 2)
    for example in examples:
        drawn, _ = script.crop_picture(tiny.picture(example["caption"]), args, torch.Generator())
        assert (example["pixels"] - drawn).abs().max() < 1e-6
    if not streaming:
        assert winners.ties == (4 if form == "pairs" else 0)
        assert len(winners) == COUNT


def test_ties_of_a_stream_are_counted(tmp_path, caplog):
    """At the end of each epoch, once for all processes."""
    _, winners = winners_of(tmp_path, streaming=True, **make("pairs", tmp_path / "data"))
    with caplog.at_level("INFO", "train_sspo_sd"):
        for rank in (0, 1):
            served(winners, 2 * COUNT, rank=rank, world=2)
    assert [record.message for record in caplog.records][:2] == [f"4 ties dropped in epoch {i}." for i in (0, 1)]
    assert len({record.message for record in caplog.records}) == len(caplog.records), "rank 1 is silent"


@pytest.mark.parametrize("form", ["jsonl", "pairs"])
def test_runs_on_files_and_on_streams(train, tmp_path, form):
    for streaming in (False, True):
        data = make(form, tmp_path / f"data-{streaming}")
        run = train(f"{form}-{streaming}", data=None, streaming=streaming, max_train_steps=5, **data)
        assert len(run.metrics) == 5


def test_streaming_reads_no_more_than_it_needs(tmp_path):
    """A stream of 100,000 rows serves its first batch from the shuffle buffer, not from the whole set."""
    touched = []

    def rows():
        for i in range(100_000):
            touched.append(i)
            yield {"image": tiny.picture("a red circle"), "text": "a red circle"}

    args, winners = winners_of(tmp_path, streaming=True, **make("jsonl", tmp_path / "data"))
    winners.dataset = datasets.IterableDataset.from_generator(rows).shuffle(0, buffer_size=script.SHUFFLE_BUFFER)
    assert len(served(winners, 4)) == 4
    assert len(touched) <= script.SHUFFLE_BUFFER + 5


def test_order_is_a_permutation_that_changes_with_the_epoch(tmp_path, winners):
    for streaming in (False, True):
        _, data = winners_of(tmp_path, train_data_dir=winners, streaming=streaming)
        order = [example["caption"] for example in served(data, 24)]
        epochs = [order[:8], order[8:16], order[16:]]
        assert all(sorted(epoch) == sorted(tiny.CAPTIONS[:8]) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_share_the_same_sequence(tmp_path, winners, streaming):
    """1 x 6, 2 x 3 and 3 x 2 processes x batch see the same global batches; an epoch of 8 is no multiple of 6."""
    args, data = winners_of(tmp_path, train_data_dir=winners, streaming=streaming)

    def global_batches(world):
        ranks = [served(data, 24 // world, batch_size=6 // world, rank=rank, world=world) for rank in range(world)]
        keys = [[(example["epoch"], example["caption"]) for example in examples] for examples in ranks]
        size = 6 // world
        return [sorted(key for rank in keys for key in rank[i * size : (i + 1) * size]) for i in range(4)]

    assert global_batches(1) == global_batches(2) == global_batches(3)
    assert len({key for batch in global_batches(2) for key in batch}) == 24, "no row twice in an epoch"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_goes_on_from_any_cursor(tmp_path, winners, streaming):
    _, data = winners_of(tmp_path, train_data_dir=winners, streaming=streaming)
    stream = script.WinnerStream(data, data.load, 3)
    batches = list(itertools.islice(stream.micro_batches(), 8))
    for i in (0, 1, 2, 5):
        again = script.WinnerStream(data, data.load, 3, cursor=batches[i][1])
        for (ours, cursor), (theirs, expected) in zip(again.micro_batches(), batches[i + 1 :]):
            assert cursor == expected
            assert [(e["epoch"], e["row"]) for e in ours] == [(e["epoch"], e["row"]) for e in theirs]


def test_max_train_samples(tmp_path, winners):
    for streaming in (False, True):
        _, data = winners_of(tmp_path, train_data_dir=winners, streaming=streaming, max_train_samples=3)
        assert {example["caption"] for example in served(data, 9)} == set(tiny.CAPTIONS[:3])


def test_named_columns(tmp_path):
    table = as_table().rename_columns({"image": "photo", "text": "words"})
    table.save_to_disk(tmp_path / "saved")
    _, data = winners_of(
        tmp_path, train_data_dir=tmp_path / "saved", image_column="photo", caption_column="words", max_train_samples=1
    )
    assert served(data, 1)[0]["caption"] == tiny.CAPTIONS[0]
    with pytest.raises(script.UserError, match="no column image.*it has photo, words.*--image_column"):
        winners_of(tmp_path, train_data_dir=tmp_path / "saved")


def test_one_of_several_captions_is_drawn(tmp_path):
    datasets.Dataset.from_dict(
        {"image": [png(tiny.picture("a red circle"))] * 40, "text": [["one", "two"]] * 40}
    ).save_to_disk(tmp_path / "saved")
    _, data = winners_of(tmp_path, train_data_dir=tmp_path / "saved")
    counts = Counter(example["caption"] for example in served(data, 40))
    assert set(counts) == {"one", "two"} and min(counts.values()) > 8


def stripes(width, height):
    """A picture whose red is its column and whose green is its row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None, :], np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("size", [(160, 64), (64, 200)])
def test_crop_is_where_its_geometry_says(tmp_path, winners, center_crop, random_flip, size):
    args, _ = winners_of(tmp_path, train_data_dir=winners, center_crop=center_crop, random_flip=random_flip)
    corners, flips = set(), set()
    for seed in range(12):
        pixels, geometry = script.crop_picture(stripes(*size), args, torch.Generator().manual_seed(seed))
        colors = ((pixels + 1) * 127.5).round()
        assert pixels.shape == (3, 64, 64)
        flipped = bool(colors[0, 0, 0] > colors[0, 0, 1])
        top, left = geometry["crop_top_left"]
        left = size[0] - 64 - left if flipped else left
        assert colors[1, 0, 0] == top
        assert colors[0, 0].min() == left
        assert geometry["original_size"] == (size[1], size[0])
        corners.add((top, left))
        flips.add(flipped)
    middle = ((size[1] - 64) // 2, (size[0] - 64) // 2)
    assert corners == {middle} if center_crop else len(corners) > 6
    assert flips == ({True, False} if random_flip else {False})


def test_large_pictures_are_resized_before_the_crop(tmp_path, winners):
    args, _ = winners_of(tmp_path, train_data_dir=winners, center_crop=True)
    picture = Image.new("RGB", (400, 200), "blue")
    picture.paste("red", (100, 0, 300, 200))  # the middle square, which is all that may be left
    pixels, geometry = script.crop_picture(picture, args, torch.Generator())
    assert geometry["original_size"] == (200, 400) and geometry["crop_top_left"] == (0, 32)
    assert (pixels[0, :, 4:-4] > 0.9).all() and (pixels[2, :, 4:-4] < -0.9).all()


def test_pictures_look_as_in_a_viewer():
    """Transparency on white, rotation as the camera noted it, 16 bits scaled, palettes and CMYK converted."""
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert script.to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert script.to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert script.to_rgb(deep).getpixel((0, 0)) == (128, 128, 128)
    assert script.to_rgb(Image.new("CMYK", (4, 4))).mode == "RGB"
    turned = Image.new("RGB", (6, 4))
    turned.getexif()[0x0112] = 6  # the camera was held upright
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=turned.getexif())
    assert script.to_rgb(Image.open(buffer)).size == (4, 6)
