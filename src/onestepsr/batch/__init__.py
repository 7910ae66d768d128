"""Images by the million on Ray Data: the jobs of ``batch`` and ``evaluate --ray``, and the class behind them.

Ray schedules small tables of names onto a pool of actors, each with a model of its own; an actor reads, enlarges and
writes its images through the same pipeline as ``onestepsr upscale``, so outputs are equal to the byte where that has as
many threads. No image goes through Ray's object store, so memory does not grow with their number. Every image becomes
one row of a manifest in Parquet. The files themselves are the record of what is done: each appears under its name when
it is complete.
"""

from onestepsr.core.errors import MissingExtra

try:
    import pyarrow  # noqa: F401
except ImportError as error:
    raise MissingExtra("onestepsr batch", "batch") from error

from onestepsr.batch.images import UpscaleImages

__all__ = ["UpscaleImages"]
