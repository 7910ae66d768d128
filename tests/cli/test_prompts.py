"""onestepsr prompts: a text for each photo, under the name that training looks for."""

from pathlib import Path

import pytest
from PIL import Image

from onestepsr.cli.main import main
from onestepsr.prompts import sources
from onestepsr.prompts.sources import FilePrompts


class Colours:
    """An extractor that names the colour of the first pixel, and knows no black."""

    def __init__(self, scale: int) -> None:
        self.scale, self.seen = scale, 0

    def describe(self, image: Image.Image) -> str:
        self.seen += 1
        red, green, _ = image.getpixel((0, 0))
        return "" if (red, green) == (0, 0) else "red" if red > green else "green"

    def release(self) -> None: ...


@pytest.fixture
def extractors(monkeypatch: pytest.MonkeyPatch) -> list[Colours]:
    made: list[Colours] = []

    def load(name: str, device: object = "cpu", *, scale: int = 4) -> Colours:
        made.append(Colours(scale))
        return made[-1]

    monkeypatch.setattr(sources, "load_extractor", load)
    return made


def photo(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), colour).save(path)
    return path


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["prompts", *words])
    return int(stopped.value.code or 0)


def test_every_photo_gets_its_text_and_none_is_looked_at_twice(tmp_path: Path, extractors: list[Colours]) -> None:
    red = photo(tmp_path / "photos" / "a" / "one.png", (200, 0, 0))
    green = photo(tmp_path / "photos" / "two.jpg", (0, 200, 0))
    words = (str(tmp_path / "photos"), "-o", str(tmp_path / "texts"))
    assert run(*words) == 0
    texts = FilePrompts(tmp_path / "texts")
    assert (texts.text(red), texts.text(green)) == ("red", "green")
    assert (extractors[0].seen, extractors[0].scale) == (2, 1), "photos are not enlarged for the tagger"
    assert run(*words) == 0
    assert extractors[1].seen == 0
    assert run(*words, "--overwrite", "--lr") == 0
    assert (extractors[2].seen, extractors[2].scale) == (2, 4)


def test_texts_of_lr_images_are_named_after_their_photos(tmp_path: Path, extractors: list[Colours]) -> None:
    photo(tmp_path / "LR" / "Canon_001_LR4.png", (200, 0, 0))
    hr = photo(tmp_path / "HR" / "Canon_001_HR.png", (9, 9, 9))
    places = (str(tmp_path / "LR"), "-o", str(tmp_path / "texts"), "--named-after", str(tmp_path / "HR"))
    assert run(*places, "--lr") == 0
    assert FilePrompts(tmp_path / "texts").text(hr) == "red"


def test_photos_in_which_nothing_is_recognised_are_named(
    tmp_path: Path, extractors: list[Colours], capsys: pytest.CaptureFixture[str]
) -> None:
    black = photo(tmp_path / "photos" / "night.png", (0, 0, 0))
    words = (str(tmp_path / "photos"), "-o", str(tmp_path / "texts"))
    assert run(*words) == 1
    assert "night.png: nothing was recognised" in capsys.readouterr().err
    assert run(*words, "--otherwise", "a photo") == 0
    assert FilePrompts(tmp_path / "texts").text(black) == "a photo"
    photo(tmp_path / "photos" / "more" / "night.jpg", (200, 0, 0))
    assert run(*words) == 2
    assert "has to differ" in capsys.readouterr().err
