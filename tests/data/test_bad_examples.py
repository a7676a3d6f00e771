"""Winners that are damaged, odd or hostile: each is trained on correctly, or named; none is dropped in silence."""

import io
import itertools
import json
import re
import struct
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
from conftest import flags
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_training import assert_same_result

import train_sspo_sd as script


PICTURE = tiny.picture("a red circle")


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(content, width, height):
    """A PNG that claims to be of another size."""
    header = struct.pack(">II", width, height) + content[24:29]
    return content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]


PNG = encoded(PICTURE)
GOOD_PICTURES = {
    "plain": PNG,
    "grey": encoded(PICTURE.convert("L"), "JPEG"),
    "bits": encoded(PICTURE.convert("1")),
    "palette": encoded(PICTURE.convert("P"), transparency=0),
    "alpha": encoded(PICTURE.convert("RGBA")),
    "grey and alpha": encoded(PICTURE.convert("LA")),
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "16 bits": encoded(Image.fromarray(np.full((64, 72), 0x8000, np.uint16))),
    "animated": encoded(PICTURE, "GIF", save_all=True, append_images=[tiny.picture("a blue square")]),
    "one pixel": encoded(Image.new("RGB", (1, 1))),
}
BAD_PICTURES = {
    "nothing": b"",
    "truncated": PNG[:90],
    "damaged": PNG[:60] + bytes(40) + PNG[100:],
    "text": b"not a picture",
    "bomb": png_header(PNG, 60_000, 60_000),
    "endless": encoded(Image.new("1", (1_000_000, 1))),
    "no file": None,
}
GOOD_CAPTIONS = [
    "a red circle",
    "",
    "word " * 2000,
    "🦊 ❤️‍🔥 🇺🇳",
    "狐が雪の中に",
    "ثعلب أحمر",
    'a "quoted",\ncaption',
    "<|endoftext|>",
]


def write_folder(folder, rows):
    """An imagefolder of (picture, caption) where a picture is the name of one in the two tables above."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, caption) in enumerate(rows):
        content = {**GOOD_PICTURES, **BAD_PICTURES}[picture]
        if content is not None:
            (folder / f"{i}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_table(folder, rows):
    """The same as a table, which is quicker to open."""
    content = {**GOOD_PICTURES, **BAD_PICTURES}
    pictures = [{"bytes": content[kind], "path": f"{i}.png"} for i, (kind, _) in enumerate(rows)]
    text = datasets.Value("string")
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": text}, "text": text})
    columns = {"image": pictures, "text": [caption for _, caption in rows]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(folder)
    return folder


def open_winners(folder, cache, **options):
    words = flags("unused", folder, cache / "out", cache_dir=cache, resolution=16, **options)
    return script.Winners(script.parse_args(words))


def one_epoch(winners, count, **options):
    """The first `count` examples, which is an epoch, in the order of the places."""
    stream = script.WinnerStream(winners, winners.load, 1, **options)
    return [examples[0] for examples, _ in itertools.islice(stream.micro_batches(), count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_picture_and_caption_is_served_or_named(tmp_path, streaming):
    """All of the tables at once: the good look like the drawing, the bad are named with their file."""
    rows = [(kind, "a red circle") for kind in [*GOOD_PICTURES, *BAD_PICTURES]]
    rows += [("plain", caption) for caption in [*GOOD_CAPTIONS, None]]
    folder = write_folder(tmp_path / "data", rows)
    winners = open_winners(folder, tmp_path, streaming=streaming, on_bad_example="skip", center_crop=True)
    examples = {(e["epoch"], e["row"]): e for e in one_epoch(winners, len(rows))}
    plain = script.crop_picture(PICTURE, winners.args, script.keyed_generator("x"))[0]
    # A stream's place is no row of the file: there a caption or a file's name tells what was served.
    reasons = [e["skipped"] for e in examples.values() if "skipped" in e]
    named = sorted(re.search(r"(\d+\.png in row|column text)", reason)[1] for reason in reasons)
    bad = [f"{i}.png in row" for i, (kind, _) in enumerate(rows) if kind in BAD_PICTURES]
    assert named == sorted([*bad, "column text"])
    served = Counter(e["caption"] for e in examples.values() if "skipped" not in e)
    assert served == Counter(caption for kind, caption in rows if kind in GOOD_PICTURES and caption is not None)
    if not streaming:
        for i in (0, 3, 4, 6, 8):
            assert (examples[0, i]["pixels"] - plain).abs().max() < 0.3, rows[i]
        assert examples[0, 7]["pixels"].mean() == pytest.approx(0x80 / 127.5 - 1, abs=0.01), "16 bits"


@pytest.mark.parametrize("captions", [[["one", "two"]] * 2, [["one"], []], [["one"], [None]], [["one"], None]])
def test_lists_of_captions(tmp_path, captions):
    datasets.Dataset.from_dict({"image": [PNG] * 2, "text": captions}).save_to_disk(tmp_path / "data")
    winners = open_winners(tmp_path / "data", tmp_path, on_bad_example="skip")
    skipped = [example["skipped"] for example in one_epoch(winners, 2) if "skipped" in example]
    assert len(skipped) == (captions[1] in ([], [None], None))
    assert all("the caption in row 1" in reason for reason in skipped)


rows_of_a_folder = st.lists(
    st.tuples(
        st.sampled_from([*GOOD_PICTURES, *BAD_PICTURES]),
        st.one_of(
            st.sampled_from([*GOOD_CAPTIONS, None]), st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
        ),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=rows_of_a_folder, streaming=st.booleans(), world=st.sampled_from([1, 2, 3]))
@example(rows=[("plain", "one row")], streaming=False, world=3)
@example(rows=[("nothing", "one row")], streaming=True, world=1)
def test_any_mixture_is_served_or_named(rows, streaming, world):
    """
    Whatever the rows are: with `skip` each is served in its place or named, by one process; a stand-in has the key of
    the place it stands in. With `stop` the run stops where a row is bad, and only there. Nothing but UserError comes.
    """
    bad = [kind in BAD_PICTURES or caption is None for kind, caption in rows]
    with tempfile.TemporaryDirectory() as directory:
        folder = write_table(Path(directory, "data"), rows)
        winners = open_winners(folder, Path(directory), streaming=streaming, on_bad_example="skip")
        ranks = [script.WinnerStream(winners, winners.load, 1, rank, world) for rank in range(world)]
        if all(bad):
            for stream in ranks:
                with pytest.raises(script.UserError, match="no winner can be read in a whole epoch"):
                    next(stream.micro_batches())
            return
        batches = [itertools.islice(stream.micro_batches(), len(rows)) for stream in ranks]
        examples = [examples[0] for turn in zip(*batches) for examples, _ in turn]
        for epoch in range(world):
            places = examples[epoch * len(rows) : (epoch + 1) * len(rows)]
            assert sorted((e["epoch"], e["row"]) for e in places) == [(epoch, row) for row in range(len(rows))]
            assert sum("skipped" in e for e in places) == sum(bad)
            assert len({e["skipped"] for e in places if "skipped" in e}) == sum(bad)
        winners.args.on_bad_example = "stop"
        stream = script.WinnerStream(winners, winners.load, len(rows)).micro_batches()
        if any(bad):
            with pytest.raises(script.UserError, match="--on_bad_example skip"):
                next(stream)
        else:
            next(stream)


@pytest.fixture
def damaged(tmp_path):
    """A folder of eight winners, three of them bad."""
    folder = tmp_path / "damaged"
    tiny.folder_of_winners(folder)
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").unlink()
    lines = (folder / "metadata.jsonl").read_text().replace('"a blue circle"', "null").splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_stand_in_is_the_next_of_the_order_and_keeps_the_key_of_its_place(tmp_path, damaged):
    winners = open_winners(damaged, tmp_path, on_bad_example="skip", random_flip=True)
    order = [row for row, _ in winners.rows(0)] + [row for row, _ in winners.rows(1)]
    bad = {1, 2, 4}
    captions = winners.dataset["text"]
    for i, served in enumerate(one_epoch(winners, 16)):
        epoch, row = i // 8, order[i]
        assert (served["epoch"], served["row"]) == (epoch, row)
        ahead = [r for r in [*order, *(row for row, _ in winners.rows(2))][i:] if r not in bad]
        expected = winners.load(ahead[0], ahead[0], (epoch, row))
        assert served["caption"] == captions[ahead[0]]
        assert (served["pixels"] == expected["pixels"]).all() and served["dropped"] == expected["dropped"]
        assert ("skipped" in served) == (row in bad)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_with_bad_rows_goes_on_from_any_cursor(tmp_path, damaged, streaming):
    winners = open_winners(damaged, tmp_path, on_bad_example="skip", streaming=streaming)
    batches = list(itertools.islice(script.WinnerStream(winners, winners.load, 3).micro_batches(), 6))
    for i in range(5):
        again = script.WinnerStream(winners, winners.load, 3, cursor=batches[i][1]).micro_batches()
        for (ours, cursor), (theirs, expected) in zip(again, batches[i + 1 :]):
            assert cursor == expected
            for one, other in zip(ours, theirs):
                assert (one["row"], one["caption"]) == (other["row"], other["caption"])
                assert (one["pixels"] == other["pixels"]).all()


SKIP = dict(on_bad_example="skip", max_train_steps=5, train_batch_size=4, proportion_empty_prompts=0.3)


def skipping(train, damaged, name, caplog, **options):
    """A run over the damaged folder; the warnings about it are counted."""
    caplog.clear()
    run = train(name, data=damaged, **{**SKIP, **options})
    return run, [record.message for record in caplog.records if "Skipped: " in record.message]


def test_a_run_skips_bad_rows_counts_them_and_names_each_once(train, damaged, caplog):
    run, warnings = skipping(train, damaged, "run", caplog)
    assert len(warnings) == len(set(warnings)) == 3
    assert {tuple(re.findall(r"row (\d)", warning)) for warning in warnings} == {("1",), ("2",), ("4",)}
    assert [a + b for a, b in zip(run.column("data/skipped")[::2], run.column("data/skipped")[1::2])] == [3, 3], (
        "an epoch is two updates"
    )
    for name, options in {
        "accumulated": dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=2),
        "workers": dict(dataloader_num_workers=2),
        "cached": dict(cache_latents=True),
    }.items():
        other, warned = skipping(train, damaged, name, caplog, **options)
        assert other.column("data/skipped") == run.column("data/skipped"), name
        assert other.column("mse/policy_winner") == pytest.approx(run.column("mse/policy_winner"), rel=1e-5), name
        assert sorted(warned) == sorted(warnings), name


@pytest.mark.parametrize("options", [dict(), dict(cache_latents=True), dict(streaming=True)])
def test_a_run_with_bad_rows_resumes_exactly(train, damaged, options):
    """From `stop`, too: the way to go on where a bad row has stopped a run."""
    options = dict(SKIP, data=damaged, checkpointing_steps=3, **options)
    whole = train("whole", **options)
    train("parts", **{**options, "max_train_steps": 3})
    (whole.path.parent / "parts" / "pytorch_lora_weights.safetensors").unlink()
    assert_same_result(whole, train("parts", resume_from_checkpoint="latest", **options))


def test_a_set_that_is_all_bad_stops_the_run(train, tmp_path):
    folder = write_folder(tmp_path / "data", [("nothing", "a"), ("truncated", "b"), ("no file", "c")])
    for cached in (False, True):
        with pytest.raises(script.UserError, match="no winner can be read in a whole epoch, .* row") as error:
            train(data=folder, on_bad_example="skip", cache_latents=cached)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "file:///etc/secret.png", "a/../../secret.png"])
def test_file_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    """datasets sees to that; streamed or not, it must come as one line that has the name."""
    folder = write_folder(tmp_path / "data", [("plain", "a"), ("plain", "b")])
    (tmp_path / "secret.png").write_bytes(PNG)
    line = json.dumps({"file_name": name, "text": "secret"})
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' + line + "\n")
    for streaming in (False, True):
        with pytest.raises(script.UserError, match=re.escape(name)):
            winners = open_winners(folder, tmp_path / str(streaming), streaming=streaming, on_bad_example="skip")
            one_epoch(winners, 2)


def test_a_file_may_be_named_twice(tmp_path):
    folder = write_folder(tmp_path / "data", [("plain", "a"), ("plain", "b")])
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": "0.png", "text": text}) for text in ("one", "two"))
    )
    assert {example["caption"] for example in one_epoch(open_winners(folder, tmp_path), 2)} == {"one", "two"}
    folder = write_folder(tmp_path / "nameless", [("plain", "a")])
    (folder / "metadata.jsonl").write_text('{"text": "no name"}\n')
    with pytest.raises(script.UserError, match="cannot be opened: .*file_name"):
        open_winners(folder, tmp_path)


def test_one_row_and_a_batch_that_is_larger(train, tmp_path):
    """The one row comes round again, every time with draws of its own."""
    folder = write_folder(tmp_path / "data", [("plain", "a red circle")])
    run = train(data=folder, train_batch_size=3, max_train_steps=2)
    assert len(set(run.column("mse/policy_winner"))) == 2
    examples = one_epoch(open_winners(folder, tmp_path, train_batch_size=3), 4)
    assert [(example["epoch"], example["row"]) for example in examples] == [(i, 0) for i in range(4)]
