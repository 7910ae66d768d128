"""Text encoders, captioners and taggers of a few thousand random weights, in the folders that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WIDTH = 16
CHARACTERS = "abcdefghijklmnopqrstuvwxyz,."
WORDS = ("cat", "dog", "tree", "blue")


def write_text_encoder(folder: Path, seed: int = 0, width: int = WIDTH) -> Path:
    """A diffusers folder with ``text_encoder`` and ``tokenizer``; as in Stable Diffusion 2.1, "!" fills up prompts."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = _write_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=0,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def _write_tokenizer(folder: Path) -> dict[str, int]:
    folder.mkdir(parents=True)
    merges = [f"{word[:end]} {word[end]}" for word in WORDS for end in range(1, len(word) - 1)]
    merges += [f"{word[:-1]} {word[-1]}</w>" for word in WORDS]
    pieces = ["!", *CHARACTERS, *(f"{letter}</w>" for letter in f"!{CHARACTERS}")]
    pieces += [merge.replace(" ", "") for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "!"}))
    settings = {**special, "pad_token": "!", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def write_captioner(folder: Path) -> Path:
    """BLIP in miniature; its words are those of a list, drawn at random."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 64,
        "bos_token_id": 5,
        "initializer_range": 0.5,
    }
    # Started as usual (1e-10, 0.02), every image would give the same words.
    vision = {**sizes, "image_size": 32, "patch_size": 8, "initializer_range": 0.5}
    torch.manual_seed(0)
    network = BlipForConditionalGeneration(
        BlipConfig(text_config={**sizes, **text, "pad_token_id": 0, "sep_token_id": 3}, vision_config=vision)
    )
    network.save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_tagger(folder: Path) -> Path:
    """A classifier of four classes, whose probabilities are 0.9, 0.1, 0.6 and 0.8 for every image."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    network = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            id2label=dict(enumerate(WORDS)),
            problem_type="multi_label_classification",
        )
    )
    network.classifier.weight.data.zero_()
    network.classifier.bias.data.copy_(torch.logit(torch.tensor([0.9, 0.1, 0.6, 0.8])))
    network.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
