# SPDX-License-Identifier: MIT
"""The center of a model that lies in a folder, for `tbq calibrate`."""

import pathlib

import torch
from transformers import AutoModelForCausalLM

from tbq.errors import TBQError, printable
from tbq.hf._center import KeyCenter


def measure_folder(folder: pathlib.Path, out: pathlib.Path) -> int:
    """Measures the keys of a model, on CUDA where there is one, writes the center file, and returns its layers.

    Raises TBQError if the folder holds no model that transformers can load.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except (OSError, ValueError) as error:
        raise TBQError(f"{folder} is no folder of a model: {printable(str(error))}") from None
    try:
        model.to(device)
    except torch.OutOfMemoryError:  # other programs may use the GPU
        model.to("cpu")
    try:
        center = KeyCenter.measure(model.eval())
    except torch.OutOfMemoryError as error:
        raise TBQError(f"measuring {folder}: {printable(str(error).splitlines()[0])}") from None
    center.save(out)
    return len(center.means)
