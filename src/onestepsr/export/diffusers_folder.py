"""A model on Stable Diffusion as a folder of diffusers, with a pipeline that needs no other package."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from onestepsr.core.errors import UserError
from onestepsr.models.generators import Generator, OneStepLatentGenerator
from onestepsr.models.stable_diffusion.config import StableDiffusionGeneratorConfig
from onestepsr.models.stable_diffusion.networks import StableDiffusionAutoencoder, StableDiffusionUNet

PIPELINE = "pipeline.py"


def export_folder(
    generator: Generator, name: str, folder: Path, *, licence: str = "", dtype: torch.dtype = torch.float32
) -> tuple[Path, ...]:
    """Write ``unet/``, ``vae/``, ``scheduler/``, ``model_index.json`` and the pipeline's code into ``folder``.

    The generator has its trained layers and its prompt, not yet frozen (:func:`load_trained`). The prompt embedding
    goes into the UNet, as the weight of its ``encoder_hid_proj``: a linear layer that the pipeline gives the unit
    vectors. Raises :class:`UserError` for a model on another backbone, and for one that draws noise.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel

    usable = isinstance(generator, OneStepLatentGenerator) and generator.noise_stage is None
    config = generator.config if isinstance(generator, OneStepLatentGenerator) else None
    if not usable or not isinstance(config, StableDiffusionGeneratorConfig):
        raise UserError(
            f"{name}: a {type(generator).__name__} on another backbone than Stable Diffusion has no parts that "
            "diffusers knows; export it as onnx, openvino, ncnn or torch"
        )
    assert isinstance(generator, OneStepLatentGenerator)
    autoencoder, unet, prompt = generator.autoencoder, generator.unet, generator.prompt.detach()
    assert isinstance(autoencoder, StableDiffusionAutoencoder)
    assert isinstance(unet, StableDiffusionUNet)
    tokens = prompt.shape[1]
    sizes = dataclasses.asdict(config.unet) | {"encoder_hid_dim": tokens, "encoder_hid_dim_type": "text_proj"}
    with torch.device("meta"):
        prompted = UNet2DConditionModel(**sizes)
    state = dict(unet.unet.state_dict())
    state["encoder_hid_proj.weight"] = prompt[0].T.contiguous()  # of unit vectors it gives the tokens, exactly
    state["encoder_hid_proj.bias"] = torch.zeros(prompt.shape[2])
    prompted.load_state_dict(state, assign=True)
    prompted.to(dtype).save_pretrained(folder / "unet")
    autoencoder.vae.to(dtype).save_pretrained(folder / "vae")
    schedule = config.schedule
    DDPMScheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
    ).save_pretrained(folder / "scheduler")
    shutil.copyfile(Path(__file__).with_name(PIPELINE), folder / PIPELINE)
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "OneStepSRPipeline"],
        "_diffusers_version": _version(),
        "prompt_tokens": tokens,
        "scale": config.scale,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "timestep": config.timestep,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    card = f"---\nlibrary_name: diffusers\npipeline_tag: image-to-image\nlicense: {licence or 'other'}\n---\n{name}\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file()))


def _version() -> str:
    from importlib.metadata import version

    return version("diffusers")


def load_trained(name: str) -> Generator:
    """The generator called ``name`` with all its layers as they were trained, in float32 on the CPU."""
    from onestepsr.models.loading import load_network

    network = load_network(name)
    if not isinstance(network, Generator):
        raise UserError(f"{name}: a {type(network).__name__} is no generator")
    return network.requires_grad_(False)


def load_pipeline(folder: Path) -> Any:
    """The folder's pipeline by diffusers alone."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
