"""Every form in which winners may come: pictures, read by train_sspo_sd.py, and clips, read by train_sspo_video.py."""

import io
import shutil
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
import tiny
import torch
from helpers import SCRIPTS, open_winners, served
from PIL import Image


COUNT = 6
CAPTIONS = tiny.CAPTIONS[:COUNT]
COMMON = ["jsonl", "csv", "save_to_disk", "save_to_disk dict", "parquet file", "parquet folder", "arrow", "bytes"]
FORMS = [("sd", form) for form in [*COMMON, "webdataset", "img2dataset", "kohya", "pairs"]]
FORMS += [("video", form) for form in [*COMMON, "webdataset", "kohya", "magictime", "magictime file", "magictime hub"]]


def encoded(kind, caption):
    """The bytes of a drawing or a clip of what the caption says."""
    file = io.BytesIO()
    if kind == "sd":
        tiny.picture(caption).save(file, "PNG")
    else:
        tiny.write_clip(file, tiny.moving_frames(caption))
    return file.getvalue()


def as_table(kind):
    """The winners as a data set that knows that they are pictures or clips."""
    name, feature = ("image", datasets.Image) if kind == "sd" else ("video", datasets.Video)
    content = [{"bytes": encoded(kind, caption), "path": None} for caption in CAPTIONS]
    features = datasets.Features({name: feature(decode=False), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({name: content, "text": CAPTIONS}, features).cast_column(name, feature())


def as_pairs():
    """Pick-a-Pic's layout: the winner is jpg_0, then jpg_1, ...; every third pair is a tie, one has no label."""
    grey, rows = io.BytesIO(), []
    Image.new("RGB", (64, 64), "grey").save(grey, "PNG")
    for i, caption in enumerate(CAPTIONS):
        good, bad = encoded("sd", caption), grey.getvalue()
        rows.append({"jpg_0": good, "jpg_1": bad, "label_0": 1.0} if i % 2 else {"jpg_0": bad, "jpg_1": good})
        rows[-1] = {"label_0": 0.0, "label_1": 1.0, "has_label": True, "caption": caption, **rows[-1]}
        if i % 2:
            rows.append({**rows[-1], "label_0": 0.5})
    rows.append({**rows[-1], "label_0": 1.0, "has_label": False})
    return datasets.Dataset.from_list(rows)


def make(kind, form, directory):
    """Writes the winners in the given form and returns the flags that name them."""
    directory.mkdir(parents=True)
    place = directory / "data"
    if form in ("jsonl", "csv", "magictime", "magictime file", "magictime hub"):
        metadata = form.split()[0]
        folder = tiny.folder_of_winners if kind == "sd" else tiny.folder_of_clips
        folder(place, COUNT, metadata=metadata)
        if form == "magictime file":
            (place / "clips").mkdir()
            for clip in place.glob("*.mp4"):
                clip.rename(place / "clips" / clip.name)
            place = place / "captions.csv"
        elif form == "magictime hub":  # ChronoMagic's own folders
            for name, pattern in (("caption", "*.csv"), ("video", "*.mp4")):
                (place / name).mkdir()
                for file in place.glob(pattern):
                    file.rename(place / name / file.name)
    elif form == "kohya":
        (place / "10_shapes").mkdir(parents=True)
        for i, caption in enumerate(CAPTIONS):
            winner = place / "10_shapes" / f"{i}.{'PNG' if kind == 'sd' else 'mp4'}"
            winner.write_bytes(encoded(kind, caption))
            winner.with_suffix(".txt").write_text(f"\ufeff{caption}\n")
            winner.with_suffix(".npz").write_bytes(b"latents that kohya's tools keep beside it")
    elif form == "save_to_disk":
        as_table(kind).save_to_disk(place)
    elif form == "save_to_disk dict":
        datasets.DatasetDict({"train": as_table(kind)}).save_to_disk(place)
        return dict(train_data_dir=None, dataset_name=place)
    elif form == "parquet folder":
        place.mkdir()
        as_table(kind).to_parquet(place / "train-00000-of-00001.parquet")
        return dict(train_data_dir=None, dataset_name=place)
    elif form == "parquet file":
        place = directory / "winners.parquet"
        as_table(kind).to_parquet(place)
    elif form == "arrow":
        as_table(kind).save_to_disk(place)
        place = next(place.glob("*.arrow"))
    elif form == "bytes":
        name = "png" if kind == "sd" else "mp4"
        content = [encoded(kind, caption) for caption in CAPTIONS]
        datasets.Dataset.from_dict({name: content, "prompt": CAPTIONS}).save_to_disk(place)
    elif form == "pairs":
        place = directory / "pairs.parquet"
        as_pairs().to_parquet(place)
    else:
        assert form in ("webdataset", "img2dataset")
        place.mkdir()
        if form == "img2dataset":
            table = {"url": ["https://example.org"] * COUNT, "caption": CAPTIONS}
            datasets.Dataset.from_dict(table).to_parquet(place / "shard-000.parquet")
            (place / "shard-000_stats.json").write_text("{}")
        with tarfile.open(place / "shard-000.tar", "w") as tar:
            for i, caption in enumerate(CAPTIONS):
                winner = ("png" if kind == "sd" else "mp4", encoded(kind, caption))
                for suffix, content in (winner, ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{i:05}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return dict(train_data_dir=place)


def place_of(pixels):
    """How far the shape in a frame of moving_frames has come, in pixels: its left edge."""
    return ((pixels < 0).any(0).float().mean(0) > 0.05).nonzero().min().item()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind, form", FORMS)
def test_every_form_gives_every_winner_with_its_caption(tmp_path, kind, form, streaming):
    """Two epochs hold each caption twice, each time with the picture or the frames that were drawn for it."""
    script = SCRIPTS[kind]
    winners = open_winners(script, tmp_path, streaming=streaming, **make(kind, form, tmp_path / "data"))
    examples = served(winners, 2 * COUNT)
    assert Counter(example["caption"] for example in examples) == dict.fromkeys(CAPTIONS, 2)
    for example in examples:
        if kind == "sd":
            drawn, _ = script.crop_picture(tiny.picture(example["caption"]), winners.args, torch.Generator())
            assert (example["pixels"] - drawn).abs().max() < 1e-6
            continue
        indices = script.choose_frames(12, None, winners.args, (0, example["epoch"], example["row"]))
        frames = tiny.moving_frames(example["caption"])
        for taken, index in zip(example["pixels"], indices, strict=True):
            drawn, _ = script.crop_picture(frames[index], winners.args, torch.Generator())
            assert (taken - drawn).abs().mean() < 0.1, "but for the codec's blur"
            assert place_of(taken) == pytest.approx(place_of(drawn), abs=1)
    if not streaming:
        assert len(winners) == COUNT


def test_ties_are_counted(tmp_path, caplog):
    """Of a stream in the log, at the end of each epoch, once for all processes."""
    script, data = SCRIPTS["sd"], make("sd", "pairs", tmp_path / "data")
    assert open_winners(script, tmp_path, **data).ties == 4
    winners = open_winners(script, tmp_path, streaming=True, **data)
    with caplog.at_level("INFO", script.__name__):
        for rank in (0, 1):
            served(winners, 2 * COUNT, rank=rank, world=2)
    messages = [record.message for record in caplog.records]
    assert messages[:2] == [f"4 ties dropped in epoch {epoch}." for epoch in (0, 1)]
    assert len(messages) == len(set(messages)), "rank 1 is silent"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind, form", [("sd", "pairs"), ("sdxl", "webdataset"), ("video", "magictime")])
def test_a_run_on_files_and_on_a_stream(trains, tmp_path, caplog, kind, form, streaming):
    caplog.set_level("INFO", SCRIPTS[kind].__name__)
    data = make("video" if kind == "video" else "sd", form, tmp_path / "data")
    run = trains[kind](streaming=streaming, max_train_steps=4, rollout_steps=1, **data)
    assert len(run.metrics) == 4
    told = any("6 winners (4 ties dropped); 4 updates" in record.message for record in caplog.records)
    assert told == (form == "pairs" and not streaming)


def test_max_train_samples(tmp_path, winners):
    for streaming in (False, True):
        options = dict(streaming=streaming, max_train_samples=3)
        data = open_winners(SCRIPTS["sd"], tmp_path, winners, **options)
        assert {example["caption"] for example in served(data, 9)} == set(CAPTIONS[:3])


def test_named_columns(tmp_path):
    script = SCRIPTS["sd"]
    as_table("sd").rename_columns({"image": "photo", "text": "words"}).save_to_disk(tmp_path / "saved")
    named = dict(image_column="photo", caption_column="words", max_train_samples=1)
    data = open_winners(script, tmp_path, tmp_path / "saved", **named)
    assert served(data, 1)[0]["caption"] == CAPTIONS[0]
    with pytest.raises(script.UserError, match="no column image.*it has photo, words.*--image_column"):
        open_winners(script, tmp_path, tmp_path / "saved")


def test_columns_are_looked_for_in_the_order_that_the_help_tells(tmp_path):
    """Each holds its own name as the caption."""
    script, names = SCRIPTS["sd"], ["text", "caption", "txt", "prompt"]
    columns = {name: [name] for name in reversed(names)}
    data = datasets.Dataset.from_dict({"image": [encoded("sd", "a red circle")], **columns})
    while names:
        data.save_to_disk(tmp_path / names[0])
        winners = open_winners(script, tmp_path, tmp_path / names[0])
        assert served(winners, 1)[0]["caption"] == names[0]
        data = data.remove_columns(names.pop(0))


def test_a_column_that_is_named_is_taken_of_pairs_too(tmp_path, pairs):
    """Whichever picture won, and of ties."""
    data = open_winners(SCRIPTS["sd"], tmp_path, pairs, image_column="jpg_0")
    assert len(data) == 8 and not data.pairs


def named_by_captions(place):
    """Winners whose names have words that `datasets` reads as those of splits."""
    names = ["a train at night", "0001-val", "test", "a dev at work", "two foxes", "training day"]
    tiny.folder_of_winners(place, COUNT, metadata="csv")
    lines = (place / "metadata.csv").read_text().splitlines()
    for i, name in enumerate(names):
        file, caption = lines[i + 1].split(",", 1)
        (place / file).rename(place / f"{name}.png")
        (place / f"{name}.txt").write_text(caption)
        lines[i + 1] = f"{name}.png,{caption}"
    (place / "metadata.csv").write_text("\n".join(lines))
    return place


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("captions", ["metadata.csv", "*.txt"])
def test_a_word_in_a_name_is_no_split(tmp_path, captions, streaming):
    place = named_by_captions(tmp_path / "data")
    for other in {"metadata.csv", "*.txt"} - {captions}:
        for file in place.glob(other):
            file.unlink()
    winners = open_winners(SCRIPTS["sd"], tmp_path, place, streaming=streaming)
    assert Counter(example["caption"] for example in served(winners, COUNT)) == Counter(CAPTIONS)


@pytest.mark.parametrize(
    "files, count",
    [
        (["winners", "winners_test"], 2 * COUNT),
        (["train", "test"], COUNT),
        (["data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001"], 2 * COUNT),
        (["set/train/0000", "set/test/0000"], COUNT),
        (["a-train-ride", "b"], 2 * COUNT),
    ],
)
def test_tables_of_a_training_split_are_taken_or_else_all(tmp_path, files, count):
    for file in files:
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        as_table("sd").to_parquet(tmp_path / "data" / f"{file}.parquet")
    assert len(open_winners(SCRIPTS["sd"], tmp_path, tmp_path / "data")) == count


def test_the_training_split_of_a_saved_dictionary_is_taken(tmp_path):
    script, table = SCRIPTS["sd"], as_table("sd")
    datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(tmp_path / "both")
    assert len(open_winners(script, tmp_path, tmp_path / "both")) == COUNT
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "neither")
    with pytest.raises(script.UserError, match="no split called train, only a, b"):
        open_winners(script, tmp_path, tmp_path / "neither")


def test_files_that_a_folders_card_names_are_taken_alone(tmp_path):
    """As a copy of a data set of the hub has it."""
    place = tmp_path / "set"
    for name in ("one", "two"):
        (place / name).mkdir(parents=True)
        content = {"image": [encoded("sd", "a red circle")], "text": [name]}
        datasets.Dataset.from_dict(content).to_parquet(place / name / "0.parquet")
    (place / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: one/*.parquet\n---\n")
    winners = open_winners(SCRIPTS["sd"], tmp_path, place)
    assert [example["caption"] for example in served(winners, 2)] == ["one", "one"]


def test_a_folder_of_splits_gives_the_training_split(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        tiny.folder_of_winners(tmp_path / "data" / split, count)
    assert len(open_winners(SCRIPTS["sd"], tmp_path, tmp_path / "data")) == 3


def test_archives_are_all_read_whatever_their_names(tmp_path):
    place = make("sd", "webdataset", tmp_path / "data")["train_data_dir"]
    shutil.copy(place / "shard-000.tar", place / "val-000.tar")
    winners = open_winners(SCRIPTS["sd"], tmp_path, place, streaming=True)
    assert {example["epoch"] for example in served(winners, 2 * COUNT)} == {0}


def test_a_captioned_file_that_is_not_read_is_named(tmp_path):
    """Of a kind that `datasets` does not know, where the others would be trained on without a word."""
    place = make("sd", "kohya", tmp_path / "data")["train_data_dir"]
    (place / "10_shapes" / "notes.txt").write_text("no caption of anything")
    for name in ("._0.PNG", "._0.txt"):  # what a Mac leaves on other disks; datasets reads nothing that is hidden
        (place / "10_shapes" / name).write_bytes(b"a Mac's own notes")
    assert len(open_winners(SCRIPTS["sd"], tmp_path, place)) == COUNT
    (place / "10_shapes" / "3.PNG").rename(place / "10_shapes" / "3.avif")
    with pytest.raises(SCRIPTS["sd"].UserError, match=r"1 files with a caption .* first .*/3\.avif: convert them"):
        open_winners(SCRIPTS["sd"], tmp_path, place)


def test_fine_tuning_does_not_read_the_losers(tmp_path, pairs):
    winners = open_winners(SCRIPTS["sd"], tmp_path, pairs, loss_type="sft", rivals="given")
    assert "rival_pixels" not in served(winners, 1)[0]


def test_a_configuration_of_several(tmp_path):
    place = tmp_path / "set"
    lines = ["---", "configs:"]
    for name in ("one", "two"):
        content = {"image": [encoded("sd", "a red circle")], "text": [name]}
        (place / name).mkdir(parents=True)
        datasets.Dataset.from_dict(content).to_parquet(place / name / "train.parquet")
        lines += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (place / "README.md").write_text("\n".join([*lines, "---\n"]))
    for name in ("one", "two"):
        named = dict(train_data_dir=None, dataset_name=place, dataset_config_name=name)
        assert served(open_winners(SCRIPTS["sd"], tmp_path, **named), 1)[0]["caption"] == name


def test_one_of_several_captions_is_drawn(tmp_path):
    """Of a list, in each epoch anew, and the same again for the same row and epoch."""
    content = [encoded("sd", "a red circle")] * 40
    datasets.Dataset.from_dict({"image": content, "text": [["one", "two"]] * 40}).save_to_disk(tmp_path / "saved")
    data = open_winners(SCRIPTS["sd"], tmp_path, tmp_path / "saved")
    epochs = [served(data, 40), served(data, 80)[40:]]
    for epoch in epochs:
        counts = Counter(example["caption"] for example in epoch)
        assert set(counts) == {"one", "two"} and min(counts.values()) > 8
    first, second = ({example["row"]: example["caption"] for example in epoch} for epoch in epochs)
    assert first != second
    assert first == {example["row"]: example["caption"] for example in served(data, 40)}


def test_a_winner_without_its_caption_file_is_named(tmp_path):
    """Where there is another list of captions, that is taken."""
    folder = make("sd", "kohya", tmp_path / "data")["train_data_dir"]
    (folder / "10_shapes" / "3.txt").unlink()
    message = rf"1 of {COUNT} images have no caption beside them, first .*10_shapes/3\.txt"
    with pytest.raises(SCRIPTS["sd"].UserError, match=message):
        open_winners(SCRIPTS["sd"], tmp_path, folder)
    as_table("sd").to_parquet(folder / "train.parquet")
    assert len(open_winners(SCRIPTS["sd"], tmp_path, folder)) == COUNT
    (folder / "train.parquet").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n10_shapes/0.PNG,a shape\n")
    assert [example["caption"] for example in served(open_winners(SCRIPTS["sd"], tmp_path, folder), 1)] == ["a shape"]


@pytest.mark.parametrize("file", ["0.PNG", "0.txt"])
def test_captioned_files_that_are_edited_are_noticed(tmp_path, file):
    """By the cache of latents and prompts, whose folder is named by this."""
    folder = make("sd", "kohya", tmp_path / "data")["train_data_dir"]

    def known():
        return open_winners(SCRIPTS["sd"], tmp_path, folder).dataset._fingerprint

    before = known()
    assert known() == before
    edited = folder / "10_shapes" / file
    edited.write_bytes(encoded("sd", CAPTIONS[1]) if file == "0.PNG" else b"another caption")
    assert known() != before


# MagicTime's lists of clips


def test_leading_zeros_of_a_videoid_are_kept(tmp_path):
    folder = make("video", "magictime", tmp_path / "data")["train_data_dir"]
    table = SCRIPTS["video"].magictime_table(folder)
    assert sorted(table["video"]) == [f"{folder}/{i:03}.mp4" for i in range(COUNT)]


def test_wrong_lists_of_clips_are_refused_before_the_models_load(trains, tmp_path, monkeypatch):
    script = SCRIPTS["video"]
    monkeypatch.setattr(script, "load_models", lambda *a: pytest.fail("the models were loaded"))

    def refused(message, data, **options):
        with pytest.raises(script.UserError, match=message) as error:
            trains["video"](data=data, **options)
        assert "\n" not in str(error.value)

    folder = tmp_path / "data"
    tiny.folder_of_clips(folder, 3, metadata="magictime")
    (folder / "001.mp4").unlink()
    refused(r"captions.csv lists 1 clips that are not in its folder, first 001\.mp4", folder)
    for name in ("a", "b"):
        (folder / name).mkdir()
        shutil.copy(folder / "000.mp4", folder / name / "001.mp4")
    refused(r"lists 001, of which its folder holds several, .*a/001\.mp4, .*b/001\.mp4", folder)
    shutil.rmtree(folder / "b")
    shutil.copy(folder / "captions.csv", folder / "more.csv")
    refused(r"several lists of clips, captions\.csv, more\.csv", folder)
    (folder / "empty.csv").write_text("videoid,name,is_transmit\n")
    refused("is empty", folder / "empty.csv")
    (folder / "other.csv").write_text("a,b\n")
    refused("is not a folder, nor one of", folder / "other.csv")
    (folder / "latin.csv").write_bytes("videoid,name,is_transmit\n000,café,0\n".encode("latin-1"))
    refused(r"latin\.csv is not UTF-8", folder / "latin.csv")
    named = tmp_path / "named"
    tiny.folder_of_clips(named, 2)
    refused("no column film: it has video, text; .*--video_column", named, video_column="film")
    (named / "metadata.jsonl").unlink()
    refused("no column text or caption or txt or prompt: it has video", named)
    refused("nowhere does not exist", tmp_path / "nowhere")


def test_a_clip_inside_an_archive(tmp_path):
    """As streamed folders of the hub name their files."""
    script, folder = SCRIPTS["video"], tmp_path / "folder"
    tiny.folder_of_clips(folder, 1)
    shutil.make_archive(str(tmp_path / "clips"), "zip", folder)
    args = open_winners(script, tmp_path, folder).args
    read = [
        script.read_winner(name, args, (0, 0, 0))["pixels"]
        for name in (f"zip://0.mp4::{tmp_path}/clips.zip", f"{folder}/0.mp4")
    ]
    assert read[0].shape == (4, 3, 64, 64)
    assert np.array_equal(*read)
