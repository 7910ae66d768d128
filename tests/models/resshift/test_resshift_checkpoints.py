"""Published checkpoints of the ResShift family: read strictly, from the cache or from files, and converted.

The networks are small ones with every part of the published; a slow test has the published sizes.
"""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from onestepsr.cli.main import app, main
from onestepsr.core.errors import UserError
from onestepsr.imaging.read import from_array
from onestepsr.imaging.write import write_image
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.loading import load_generator, load_network, load_residual_generator, resolve
from onestepsr.models.resshift.checkpoints import load_published
from onestepsr.models.resshift.config import MICRO, PUBLISHED, RANDOM_RESIDUAL
from onestepsr.models.resshift.generator import residual_shift_generator
from onestepsr.weights import catalog
from onestepsr.weights.files import read_weights
from weights_by_name import fill_by_name

KINDS = {"resshift-realsr-v1": 15, "resshift-realsr-v3": 4, "sinsr": 1, "tadsr-realsr": 1}
SIZES = [(5, 7), (33, 20), (70, 64)]
run = CliRunner().invoke


@pytest.fixture
def micro(monkeypatch):
    """The three kinds of published model with the sizes of a micro network, their files of any checksum."""
    sizes = {"unet": RANDOM_RESIDUAL[MICRO].unet, "autoencoder": RANDOM_RESIDUAL[MICRO].autoencoder}
    for alias in KINDS:
        monkeypatch.setitem(PUBLISHED, alias, replace(PUBLISHED[alias], **sizes))
        spec = catalog.get_model(alias)
        files = tuple(replace(file, sha256="", bytes=None) for file in spec.files)
        monkeypatch.setitem(catalog._MODELS, alias, replace(spec, files=files))


def made(alias):
    """A generator with the settings of an alias, with random weights."""
    torch.manual_seed(0)
    generator = residual_shift_generator(PUBLISHED[alias]).eval().requires_grad_(False)
    fill_by_name(generator)
    return generator


def publish(generator, folder, prefix="", under=None):
    """Its two files, as the authors would write them."""
    folder.mkdir(exist_ok=True)
    paths = folder / "unet.pth", folder / "autoencoder.pth"
    for path, network in zip(paths, (generator.unet, generator.autoencoder), strict=True):
        state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
        torch.save({under: state} if under else state, path)
    return paths


def fill_cache(alias, generator, folder):
    for path, download in zip(publish(generator, folder), catalog.get_model(alias).downloads, strict=True):
        download.path.parent.mkdir(parents=True, exist_ok=True)
        download.path.write_bytes(path.read_bytes())


def same(first, second) -> bool:
    lr = torch.rand(1, 3, 9, 5, generator=torch.Generator().manual_seed(1))
    expected, found = first(lr), second(lr)
    return bool((found - expected).abs().max() < 1e-4 * expected.std())


@pytest.mark.parametrize(
    ("alias", "prefix", "under"),
    [
        ("resshift-realsr-v1", "", None),
        ("resshift-realsr-v3", "module.", None),
        ("sinsr", "_orig_mod.", None),
        ("sinsr", "module._orig_mod.", "state_dict"),
        ("tadsr-realsr", "", "state_dict"),
        ("tadsr-realsr", "module.", None),
    ],
)
def test_published_files_load_under_every_wrapper(micro, tmp_path, alias, prefix, under):
    generator = made(alias)
    unet, autoencoder = publish(generator, tmp_path / "files", prefix, under)
    loaded = load_published(alias, unet=unet, autoencoder=autoencoder)
    assert loaded.schedule.steps == KINDS[alias]
    assert loaded.sampler == ("deterministic" if KINDS[alias] == 1 else "ancestral")
    for key, value in generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_files_of_tadsr_are_named_but_not_offered():
    for alias, scale in (("tadsr-realsr", 4), ("tadsr-face", 1)):
        config = PUBLISHED[alias]
        assert (config.sampling_schedule().kept, config.scale) == ([config.schedule.steps - 1], scale)
        with pytest.raises(
            UserError, match=r"github\.com/LearningHx/TAD-SR names the file without an address"
        ) as error:
            load_published(alias)
        assert "models convert" in str(error.value)
        assert catalog.get_model(alias).state == "its file is yours to bring"


@pytest.mark.parametrize("alias", KINDS)
def test_a_converted_checkpoint_upscales_images_of_any_size(micro, tmp_path, alias):
    unet, autoencoder = publish(made(alias), tmp_path / "files")
    target = tmp_path / "model.safetensors"
    arguments = ["--as", alias, "--autoencoder", autoencoder, "--json"]
    result = run(app, ["models", "convert", str(unet), str(target), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["architecture"] == "residual-shift"
    assert same(load_generator(target), made(alias))
    images, rng = tmp_path / "pictures", np.random.default_rng(0)
    images.mkdir()
    for height, width in SIZES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        write_image(from_array(pixels), images / f"{height}.png")
    command = ["upscale", str(images), "-o", str(tmp_path / "out"), "--model", str(target), "--tile", "48", "--json"]
    results = json.loads(run(app, command).stdout)["results"]
    assert [tuple(row["output_size"]) for row in results] == [
        (4 * width, 4 * height) for height, width in sorted(SIZES, key=str)
    ]


def test_an_alias_works_from_the_files_in_the_cache(micro, tmp_path):
    fill_cache("sinsr", made("sinsr"), tmp_path / "files")
    assert same(load_generator("sinsr"), made("sinsr"))
    assert load_generator("sinsr", steps=15).schedule.steps == 15
    assert isinstance(load_residual_generator("sinsr"), type(made("sinsr")))
    write_image(from_array(np.zeros((5, 7, 3), np.uint8)), tmp_path / "in.png")
    command = ["upscale", str(tmp_path / "in.png"), "--model", "sinsr", "-o", str(tmp_path / "out.png")]
    assert run(app, command).exit_code == 0
    outputs = [np.asarray(Image.open(tmp_path / "out.png"))]
    for sampling in (["--steps", "15"], ["--steps", "15", "--sampler", "ancestral"]):
        assert run(app, [*command, "--overwrite", *sampling]).exit_code == 0
        outputs.append(np.asarray(Image.open(tmp_path / "out.png")))
    assert len({output.tobytes() for output in outputs}) == 3
    assert run(app, ["models", "convert", "sinsr", str(tmp_path / "own.safetensors")]).exit_code == 0
    assert same(load_generator(tmp_path / "own.safetensors"), made("sinsr"))
    assert catalog.get_model("sinsr").state == "cached"
    assert run(app, ["models", "verify", "sinsr"]).stdout.count(",") == 2


def test_a_model_that_does_not_enlarge_works_at_any_size(tmp_path):
    sizes = RANDOM_RESIDUAL[MICRO]
    unet = replace(sizes.unet, latent_channels=8, lq_size=128)
    autoencoder = replace(sizes.autoencoder, multipliers=(1, 1, 1, 2), blocks=(1, 1, 1, 1), latent_channels=8)
    config = replace(PUBLISHED["resshift-face"], unet=unet, autoencoder=autoencoder)
    torch.manual_seed(0)
    generator = residual_shift_generator(config)
    fill_by_name(generator)
    image = from_array(np.random.default_rng(0).integers(0, 256, (33, 20, 3), dtype=np.uint8))
    for scale, expected in ((1.0, (33, 20, 3)), (2.0, (66, 40, 3))):
        out = Upscaler(generator, "cpu", "float32").upscale_image(image, UpscaleOptions(scale=scale))
        assert out.pixels.shape == expected


def test_a_file_of_ours_changes_its_number_format(micro, tmp_path):
    unet, autoencoder = publish(made("sinsr"), tmp_path / "files")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    files = ["--as", "sinsr", "--autoencoder", str(autoencoder)]
    assert run(app, ["models", "convert", str(unet), str(first), *files]).exit_code == 0
    assert run(app, ["models", "convert", str(first), str(second), "--dtype", "bfloat16"]).exit_code == 0
    assert load_network(second).config == PUBLISHED["sinsr"]
    kinds = {tensor.dtype for tensor in read_weights(second)[2].values()}
    assert kinds == {torch.bfloat16, torch.int64}


def test_the_autoencoder_is_shared_and_the_terms_are_said_once(micro, tmp_path, monkeypatch, caplog):
    first, second = catalog.get_model("resshift-realsr-v1"), catalog.get_model("resshift-realsr-v3")
    assert first.downloads[1].path == second.downloads[1].path
    assert first.downloads[0].path.parent != second.downloads[0].path.parent
    publish(made(first.id), tmp_path / "files")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (tmp_path / "files" / "unet.pth").rename(mirror / first.files[0].file)
    (tmp_path / "files" / "autoencoder.pth").rename(mirror / first.files[1].file)
    monkeypatch.setenv("ONESTEPSR_MIRROR", str(mirror))
    with caplog.at_level(logging.WARNING, "onestepsr"):
        load_generator(first.id)
    terms = [record.getMessage() for record in caplog.records if "licence" in record.getMessage()]
    assert len(terms) == 1
    assert "S-Lab" in terms[0]
    assert "non-commercial" in terms[0]
    assert second.downloads[1].path.is_file()


@pytest.mark.parametrize("alias", PUBLISHED)
def test_info_shows_licence_and_every_file_and_downloads_nothing(alias, tmp_path):
    document = json.loads(run(app, ["models", "info", alias, "--json"]).stdout)
    assert "non-commercial" in document["notice"]
    assert "S-Lab" in document["licence"]
    unlinked = alias.startswith("tadsr")
    assert document["state"].startswith("its file is yours to bring" if unlinked else "not downloaded")
    assert len(document["files"]) == 2
    addresses = [[*file["sources"], file.get("named_at", "")][0] for file in document["files"]]
    assert all(address.startswith("https://github.com/") for address in addresses)
    assert not (tmp_path / "cache").exists()


def test_a_name_of_several_files_is_no_single_file():
    with pytest.raises(UserError, match=r"'sinsr' is published in 2 files, one is wanted here"):
        resolve("sinsr")


def spoiled(network, change):
    state = dict(network.state_dict())
    change(state)
    return state


def test_every_key_and_shape_must_be_the_published_one(micro, tmp_path):
    generator = made("sinsr")
    unet, autoencoder = publish(generator, tmp_path / "files")

    def message(unet_change=None, autoencoder_change=None) -> str:
        for path, network, change in (
            (unet, generator.unet, unet_change),
            (autoencoder, generator.autoencoder, autoencoder_change),
        ):
            torch.save(spoiled(network, change or (lambda state: None)), path)
        with pytest.raises(UserError) as raised:
            load_published("sinsr", unet=unet, autoencoder=autoencoder)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    def without_swin_mlp(state):
        for key in [key for key in state if ".mlp." in key]:
            del state[key]
        state["extra.bias"] = torch.zeros(1)

    said = message(without_swin_mlp)
    assert said.count(".mlp.") == 10
    assert "unexpected weight 'extra.bias'" in said
    assert "1 unexpected)" in said
    said = message(lambda state: state.update({"out.2.bias": torch.zeros(4)}))
    assert "weight 'out.2.bias' has shape (4,), expected (3,)" in said
    said = message(lambda state: state.pop("input_blocks.1.1.patch_embed.proj.weight"))
    assert "holds another network" in said
    said = message(None, lambda state: state.update({"quantize.embedding.weight": torch.zeros(32, 8)}))
    assert "a codebook of 32 of 8 numbers, expected 64 of 3" in said
    said = message(None, lambda state: state.update({"quant_conv.bias": torch.full((3,), torch.nan)}))
    assert "not finite" in said
    with pytest.raises(UserError, match=r"UNet of 'sinsr': holds an autoencoder"):
        load_published("sinsr", unet=autoencoder, autoencoder=unet)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unet.pth"], "--as says which of the published models it is: resshift-realsr-v1"),
        (["unet.pth", "--as", "resshift-v3"], "no published model 'resshift-v3'"),
        (["unet.pth", "--as", "sinsr", "--part", "discriminator"], "--part discriminator is for Stable Diffusion"),
        (["unet.pth", "--autoencoder", "autoencoder.pth"], "needs --as with one of"),
        (["sinsr", "--as", "resshift-realsr-v1"], "'sinsr' is a published model itself"),
        (["missing.pth", "--as", "sinsr", "--autoencoder", "autoencoder.pth"], "missing.pth: no such weights file"),
        (["unet.pth", "--as", "sinsr"], "autoencoder_vq_f4.pth"),
    ],
)
@pytest.mark.usefixtures("micro")
def test_bad_conversions_are_one_line_and_code_two(tmp_path, monkeypatch, capsys, arguments, message):
    publish(made("sinsr"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONESTEPSR_OFFLINE", "1")
    source, *options = arguments
    with pytest.raises(SystemExit) as stopped:
        main(["models", "convert", source, "out.safetensors", *options])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out.safetensors").exists()


def test_a_pickle_as_model_says_what_to_do(micro, tmp_path):
    unet, _ = publish(made("sinsr"), tmp_path)
    with pytest.raises(UserError, match=r"'onestepsr models convert' takes .* the ResShift family"):
        load_generator(unet)


@pytest.mark.slow
def test_the_published_size_converts_and_upscales(tmp_path):
    generator = residual_shift_generator(PUBLISHED["sinsr"]).eval().requires_grad_(False)
    unet, autoencoder = publish(generator, tmp_path / "files", "module.")
    target = tmp_path / "sinsr.safetensors"
    arguments = ["--as", "sinsr", "--autoencoder", str(autoencoder), "--json"]
    document = json.loads(run(app, ["models", "convert", str(unet), str(target), *arguments]).stdout)
    assert document["parameters"] == 118_593_583 + 55_322_782
    out = load_generator(target)(torch.rand(1, 3, 5, 7))
    assert out.shape == (1, 3, 20, 28)
    assert out.isfinite().all()
