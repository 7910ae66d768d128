"""Published OSEDiff models as generators: adapters, read and added to the backbone that they were trained on."""

from __future__ import annotations

import logging
from pathlib import Path

from onestepsr.errors import UserError, did_you_mean
from onestepsr.models.backbones import load_backbone
from onestepsr.models.catalog import get_model
from onestepsr.models.osediff import OSEDiffGenerator, Posterior
from onestepsr.models.osediff_adapters import Adapters, merge
from onestepsr.models.osediff_catalog import OSEDIFF_SCALES
from onestepsr.models.osediff_file import ARCHITECTURE, looks_published, read_any
from onestepsr.models.registry import architecture_of
from onestepsr.models.sources import obtain_all
from onestepsr.models.stable_diffusion_config import PromptConfig

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "sd21-base"


def holds_adapters(name_or_path: str | Path) -> bool:
    """Whether it is the alias of a published OSEDiff model, its pickle, or a file of adapters of ours."""
    path = Path(name_or_path)
    if not path.is_file():
        return str(name_or_path) in OSEDIFF_SCALES
    return architecture_of(path) == ARCHITECTURE or looks_published(path)


def load_published(
    source: str | Path,
    *,
    backbone: str | Path | None = None,
    prompt_file: Path | None = None,
    published_as: str | None = None,
    posterior: Posterior = "mean",
) -> OSEDiffGenerator:
    """The generator that the weights ``source`` make of ``backbone``, in float32 on the CPU, in eval mode.

    ``source`` is an alias, the published pickle or a file of adapters of ours; ``backbone`` is what
    :func:`load_backbone` takes, by default Stable Diffusion 2.1-base. ``published_as`` is the alias of a file, which
    says whether it enlarges; ``posterior`` is that of :class:`OSEDiffGeneratorConfig`. ``prompt_file`` (see
    :func:`read_prompt`) holds the embedding for pictures that come without one; zeros stand in for it. Raises
    :class:`UserError` in one line for weights of another backbone.
    """
    scale = _scale(source, published_as)
    path, own_backbone = _files(source, backbone)
    adapters = read_any(path)
    network = load_backbone(own_backbone, prompt=PromptConfig(std=0.0), prompt_file=prompt_file)
    if prompt_file is None:
        logger.info("%s: no prompt embedding is given: zeros stand in for it, which is not that of an empty text", path)
    generator = OSEDiffGenerator.of(network, scale=scale, posterior=posterior)
    merge(generator, adapters, str(path))
    return generator.eval()


def adapters_of(source: str | Path) -> Adapters:
    """The adapters behind an alias or in a file; the backbone is not fetched."""
    return read_any(_files(source, DEFAULT_BACKBONE)[0])


def _scale(source: str | Path, published_as: str | None) -> int:
    alias = published_as or (str(source) if not Path(source).is_file() else "osediff")
    if alias not in OSEDIFF_SCALES:
        raise UserError(f"--as {alias}: no published model of OSEDiff: {did_you_mean(alias, OSEDIFF_SCALES)}")
    return OSEDIFF_SCALES[alias]


def _files(source: str | Path, backbone: str | Path | None) -> tuple[Path, str | Path]:
    """File of adapters and backbone: those that are given, or else the alias's own, fetched if they are missing."""
    if Path(source).is_file():
        return Path(source), backbone or DEFAULT_BACKBONE
    wanted = get_model(str(source)).downloads
    adapters, *rest = obtain_all(wanted if backbone is None else wanted[:1])
    return adapters, backbone or rest[0]
