"""The studies' data files: tables with a line for each run, caption, picture or point, the long ones compressed."""

import csv
import gzip
import io


def read_csv(path):
    """A list of dicts of text; empty where the file is missing."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return list(csv.DictReader(io.StringIO((gzip.decompress(data) if path.suffix == ".gz" else data).decode())))


def write_csv(path, columns, lines):
    """What a line has beside the columns is left out, what it lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def update(folder, tables, runs):
    """
    Puts what is new into the files of a folder, in the place of what they had of the same runs.

    Args:
        tables: {file name: (columns, new lines)}; a line's `run` tells to which run it belongs.
        runs: the names of the new runs. Files are sorted by run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (columns, lines) in tables.items():
        kept = [line for line in read_csv(folder / name) if line["run"] not in runs]
        write_csv(folder / name, columns, sorted(kept + lines, key=lambda line: line["run"]))
