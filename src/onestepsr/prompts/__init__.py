"""Text prompts for generators that read text: which words belong to an image, and what they become.

Three steps, each behind one small surface:

1. A :class:`~onestepsr.prompts.base.PromptSource` gives the text of an image: a fixed one, one from a file beside it,
   or what a :class:`~onestepsr.prompts.base.PromptExtractor` (a captioner or a tagger) sees in it.
2. A :class:`~onestepsr.prompts.base.Embedder` turns texts into embeddings: ``embed(["a cat", ""]) -> (2, 77, C)``,
   float32 on the CPU, C = 1024 for Stable Diffusion 2.1. :class:`~onestepsr.prompts.embedder.PromptEmbedder` does it by
   the text encoder of a diffusers folder, which is loaded for the first text that no cache holds and dropped again.
3. A generator that is conditioned on text takes them: its ``forward(lr, ..., prompt=None)`` accepts
   (1 or N, 77, C), moved to its own device and dtype by the caller, and uses the prompt it was saved with when
   there is none; its attribute ``prompt_width`` is C. ``Upscaler`` hands an embedding on to generators with such an
   argument and refuses it for others in one line. A generator whose text layers were folded into constants for
   inference (``freeze_prompt``) is not conditioned on text any more and must not have the argument.

Nothing in here is imported unless a prompt is asked for, and transformers only by what needs it (the extra
``prompts``). Docs: ``docs/prompts.md``.
"""
