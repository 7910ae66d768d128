import json
from pathlib import Path

import pytest
from PIL import Image

from onestepsr.core.errors import UserError
from onestepsr.prompts.sources import ExtractedPrompts, FilePrompts, FixedPrompt

IMAGE = Image.new("RGB", (8, 8))


class Namer:
    """Sees how wide an image is."""

    def __init__(self):
        self.released = 0

    def describe(self, image):
        return f"{image.width} wide"

    def release(self):
        self.released += 1


def test_a_fixed_prompt_is_the_same_for_all():
    assert FixedPrompt("a cat").text(Path("x.png")) == "a cat"
    assert FixedPrompt().text(Path("x.png")) == ""


def test_a_folder_holds_one_text_per_image(tmp_path):
    (tmp_path / "a.b.txt").write_text("a cat,\n sitting\n")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text("x" * 20_000)
    prompts = FilePrompts(tmp_path)
    assert prompts.text(Path("elsewhere/a.b.png")) == "a cat, sitting"
    for name, message in (("none", "no"), ("broken", "UTF-8"), ("empty", "empty; .* --prompt ''"), ("long", "larger")):
        with pytest.raises(UserError, match=message):
            prompts.text(Path(f"{name}.png"))


def test_one_file_holds_the_prompt_of_all_or_a_table(tmp_path):
    (tmp_path / "all.txt").write_text("a photo")
    assert FilePrompts(tmp_path / "all.txt").text(Path("x.png")) == "a photo"
    (tmp_path / "table.json").write_text(json.dumps({"a.png": "a cat", "b": "a dog", "c": ""}))
    table = FilePrompts(tmp_path / "table.json")
    assert [table.text(Path(name)) for name in ("in/a.png", "b.jpg", "c.jpg")] == ["a cat", "a dog", ""]
    with pytest.raises(UserError, match=r"no prompt for d.png"):
        table.text(Path("d.png"))
    (tmp_path / "table.json").write_text(json.dumps({"a.png": 3}))
    with pytest.raises(UserError, match=r"prompt of 'a.png' is '3', expected a text"):
        FilePrompts(tmp_path / "table.json")
    with pytest.raises(UserError, match="cannot be read"):
        FilePrompts(tmp_path / "nowhere.txt")


def test_what_is_seen_comes_before_the_words_of_the_user():
    extractor = Namer()
    assert ExtractedPrompts(extractor).text(Path("x.png"), IMAGE) == "8 wide, ,"
    prompts = ExtractedPrompts(extractor, "sharp")
    assert prompts.text(Path("x.png"), IMAGE) == "8 wide, sharp,"
    prompts.release()
    assert extractor.released == 1
    with pytest.raises(ValueError, match="needs the image"):
        prompts.text(Path("x.png"), None)
