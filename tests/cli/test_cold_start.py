"""One small photo from a cold start: nothing is loaded that takes time and is not needed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

NEEDLESS = ("diffusers", "peft", "accelerate", "transformers", "scipy", "sympy", "torch._dynamo", "torch._inductor")
CODE = """
import sys
from onestepsr.cli.main import main
try:
    main(["upscale", sys.argv[1], "-o", sys.argv[2], "--device", "cpu"])
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print(" ".join(name for name in sys.argv[3:] if name in sys.modules))
"""


def test_upscaling_one_photo_loads_neither_a_compiler_nor_a_model_library(tmp_path: Path) -> None:
    source, target = tmp_path / "photo.png", tmp_path / "large.png"
    Image.fromarray(np.full((12, 20, 3), 90, np.uint8)).save(source)
    command = [sys.executable, "-c", CODE, str(source), str(target), *NEEDLESS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(target), ""]
    assert Image.open(target).size == (80, 48)
