"""Blind comparison of two folders of images: sheets with left and right shuffled, a sealed key, a count of choices.

    python scripts/blind.py sheets OURS THEIRS OUT --seed 0     # OUT/000.png, OUT/001.png, ... and OUT/key.json
    python scripts/blind.py score OUT                           # reads OUT/choices.txt

Images are matched by name. choices.txt has a line per sheet: "000 l" or "000 r" for the better one, "000 =" where they
are level. Nobody should read key.json before choosing.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image

GAP = 12
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def by_stem(folder: Path) -> dict[str, Path]:
    """Images of a folder by their name without suffix."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}


def make_sheets(ours: Path, theirs: Path, out: Path, seed: int) -> None:
    """One sheet for every name that both folders have, in shuffled order, and the key."""
    first, second = by_stem(ours), by_stem(theirs)
    names = sorted(first.keys() & second.keys())
    if not names:
        raise SystemExit(f"{ours} and {theirs}: no image name in common")
    rng = random.Random(seed)
    rng.shuffle(names)
    out.mkdir(parents=True, exist_ok=True)
    key: dict[str, dict[str, str]] = {}
    for number, name in enumerate(names):
        ours_left = rng.random() < 0.5
        pair = [Image.open(path).convert("RGB") for path in (first[name], second[name])]
        left, right = pair if ours_left else pair[::-1]
        sheet = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
        sheet.paste(left, (0, 0))
        sheet.paste(right, (left.width + GAP, 0))
        sheet.save(out / f"{number:03d}.png")
        key[f"{number:03d}"] = {"name": name, "ours": "l" if ours_left else "r"}
    (out / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    print(f"{len(names)} sheets in {out}; write choices.txt there")


def score(out: Path) -> None:
    """Count for how many sheets ours was preferred, was level, and was not."""
    key = json.loads((out / "key.json").read_text(encoding="utf-8"))
    counts = {"ours": 0, "level": 0, "theirs": 0}
    for line in (out / "choices.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        number, choice = line.split()[:2]
        if number not in key or choice not in ("l", "r", "="):
            raise SystemExit(f"choices.txt: '{line}', expected a sheet's number and l, r or =")
        kind = "level" if choice == "=" else "ours" if choice == key[number]["ours"] else "theirs"
        counts[kind] += 1
        print(f"{number}  {key[number]['name']:24s} {kind}")
    print(f"of {sum(counts.values())}: ours {counts['ours']}, level {counts['level']}, theirs {counts['theirs']}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sheets = commands.add_parser("sheets")
    for name in ("ours", "theirs", "out"):
        sheets.add_argument(name, type=Path)
    sheets.add_argument("--seed", type=int, default=0)
    commands.add_parser("score").add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "sheets":
        make_sheets(options.ours, options.theirs, options.out, options.seed)
    else:
        score(options.out)


if __name__ == "__main__":
    main()
