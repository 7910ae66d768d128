from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onestepsr.core.errors import UserError
from onestepsr.prompts.ram.tagger import (
    format_tags,
    published_input,
    read_tag_names,
    read_thresholds,
    select_tags,
    tagger_input,
)

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "osediff_input.npz")


def test_prompts_have_the_published_form():
    assert format_tags(["cat", "tree"]) == "cat, tree, ,"
    assert format_tags(["cat", "tree"], "a photo") == "cat, tree, a photo,"
    assert format_tags([]) == ", ,"


def test_tags_above_their_own_threshold_in_the_order_of_the_list():
    names = ["cat", "dog", "tree", "sky"]
    probabilities = torch.tensor([0.7, 0.7, 0.9, 0.2])
    assert select_tags(probabilities, torch.tensor([0.6, 0.8, 0.9, 0.1]), names) == ["cat", "sky"]
    assert select_tags(probabilities, 0.5, names) == ["cat", "dog", "tree"]
    with pytest.raises(ValueError, match="expected \\(3,\\)"):
        select_tags(probabilities, 0.5, names[:3])


@pytest.mark.parametrize("name", ["small", "mid"])
def test_images_are_prepared_as_published(name):
    prepared = published_input(Image.fromarray(GOLDEN[f"{name}.in"]))
    assert prepared.size == tuple(GOLDEN[f"{name}.out_size_wh"])
    pixels = np.asarray(prepared).astype(int)
    assert (
        np.abs(pixels[:64, :64] - GOLDEN[f"{name}.out_corner"]).max() <= 1
    )  # other versions of Pillow round otherwise
    np.testing.assert_allclose(pixels.mean((0, 1)), GOLDEN[f"{name}.out_mean"], atol=0.05)


def test_faces_are_prepared_at_their_own_size():
    assert published_input(Image.new("RGB", (515, 530)), scale=1).size == (512, 528)


def test_the_tagger_sees_a_square_in_the_statistics_of_imagenet():
    flat = Image.new("RGB", (50, 20), (255, 0, 51))
    square = tagger_input(flat)
    assert square.shape == (1, 3, 384, 384)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(square, expected.expand_as(square))
    fine = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8))
    assert tagger_input(fine, antialias=True).std() < 0.6 * tagger_input(fine).std()


def test_lists_of_tags_and_thresholds(tmp_path):
    (tmp_path / "tags.txt").write_text("cat\nsea lion \n")
    (tmp_path / "numbers.txt").write_text("0.5\n0.75\n")
    assert read_tag_names(tmp_path / "tags.txt") == ["cat", "sea lion"]
    assert read_thresholds(tmp_path / "numbers.txt", 2).tolist() == [0.5, 0.75]
    with pytest.raises(UserError, match="2 thresholds for 3 tags"):
        read_thresholds(tmp_path / "numbers.txt", 3)
    with pytest.raises(UserError, match="expected one number per line"):
        read_thresholds(tmp_path / "tags.txt", 2)
    (tmp_path / "numbers.txt").write_text("0.5\n7\n")
    with pytest.raises(UserError, match="outside 0 to 1"):
        read_thresholds(tmp_path / "numbers.txt", 2)
    with pytest.raises(UserError, match="cannot be read"):
        read_tag_names(tmp_path / "none.txt")
