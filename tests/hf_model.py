#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The demo model as a folder of transformers, and its center file.

    python3 tests/hf_model.py FOLDER [GGUF]

Needs transformers, torch, accelerate and gguf.  The weights are those of the GGUF file, in bfloat16.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def center_of(folder: pathlib.Path) -> pathlib.Path:
    """Its center file: beside the folder, because vLLM takes every .safetensors file in it for weights."""
    return folder.with_name(f"{folder.name}.center.safetensors")


def make(folder: pathlib.Path, path: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the folder and the center file unless they are there, and returns the folder."""
    import torch
    import transformers

    if center_of(folder).exists() and (folder / "model.safetensors").exists():
        return folder
    if path is None:
        from tbq.demo import fetch_model

        path = pathlib.Path(fetch_model(ROOT / "build" / "models"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = type(read.config).from_dict(
        {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    )
    model = type(read)(config)  # what was read from GGUF cannot be saved
    model.load_state_dict(read.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    if not center_of(folder).exists():
        from tbq.hf import KeyCenter

        KeyCenter.measure(model.float().eval(), tokenizer).save(center_of(folder))
    return folder


if __name__ == "__main__":
    print(make(*map(pathlib.Path, sys.argv[1:])))
