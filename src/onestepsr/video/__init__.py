"""Video: films, animations and image sequences, enlarged frame by frame in memory of constant size.

A source gives frames with exact time stamps, a sink takes the enlarged ones. Films are encoded in segments that are
kept until the last one is there and are then joined, beside the copied audio, into the result: a run that was killed
goes on after its last whole segment, and ends in the same bytes as one that was not. The tiles are planned once, and
every frame is drawn with the same seed, so that nothing but the film itself changes between frames.
"""

from onestepsr.core.errors import MissingExtra

try:
    import av  # noqa: F401
except ImportError as error:
    raise MissingExtra("onestepsr video", "video") from error
