# SPDX-License-Identifier: MIT
"""TurboQuant's algorithms in NumPy, for any dimension: to explore them, and to check and compare other implementations.

    >>> import numpy as np
    >>> from tbq import turboquant as tq
    >>> x = np.random.default_rng(0).standard_normal((1000, 128), dtype=np.float32)
    >>> quantizer = tq.MSEQuantizer(128, 4)
    >>> code = quantizer.quantize(x)
    >>> code.nbytes
    68000
    >>> error = x - quantizer.dequantize(code)
    >>> bool(np.mean(error**2) / np.mean(x**2) < tq.mse_upper_bound(4))
    True

Arrays are float32 or float64, and vectors are along the last axis.  Results have the dtype of the vectors.  Every
random choice follows from a seed.  Errors are TBQErrors.  For the tensor types of llama.cpp use tbq.quantize instead.

TurboQuant: arXiv 2504.19874.  QJL: arXiv 2406.03482.  PolarQuant: arXiv 2502.02617.
"""

from tbq.turboquant.bounds import (
    inner_product_distortion,
    inner_product_lower_bound,
    inner_product_upper_bound,
    mse_distortion,
    mse_lower_bound,
    mse_upper_bound,
    polar_distortion,
    qjl_rows,
)
from tbq.turboquant.codebooks import (
    Codebook,
    angle_codebook,
    angle_density,
    gaussian_codebook,
    sphere_codebook,
    sphere_density,
)
from tbq.turboquant.mixed import MixedCode, MixedQuantizer, outlier_channels
from tbq.turboquant.packing import pack, packed_bytes, unpack
from tbq.turboquant.polar import PolarCode, PolarQuantizer, from_polar, to_polar
from tbq.turboquant.quantizers import QJL, InnerProductCode, InnerProductQuantizer, MSECode, MSEQuantizer, QJLCode
from tbq.turboquant.rotations import HaarRotation, HadamardRotation, Rotation

__all__ = [
    "Codebook",
    "HaarRotation",
    "HadamardRotation",
    "InnerProductCode",
    "InnerProductQuantizer",
    "MSECode",
    "MSEQuantizer",
    "MixedCode",
    "MixedQuantizer",
    "PolarCode",
    "PolarQuantizer",
    "QJL",
    "QJLCode",
    "Rotation",
    "angle_codebook",
    "angle_density",
    "from_polar",
    "gaussian_codebook",
    "inner_product_distortion",
    "inner_product_lower_bound",
    "inner_product_upper_bound",
    "mse_distortion",
    "mse_lower_bound",
    "mse_upper_bound",
    "outlier_channels",
    "pack",
    "packed_bytes",
    "polar_distortion",
    "qjl_rows",
    "sphere_codebook",
    "sphere_density",
    "to_polar",
    "unpack",
]
