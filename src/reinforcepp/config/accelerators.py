"""Accelerators that ``plan`` knows by name. Imports no torch.

Values are from the vendor's data sheets, for the SXM module if there are several: memory, TFLOP/s of matrix products in
bfloat16 or float16 (dense, half of the values "with sparsity", accumulated in float32) and in float32 outside the tensor
cores (the default of torch), memory bandwidth, and bandwidth to the other GPUs of the node in one direction (data sheets
add both directions): NVLink if a switch connects all GPUs, otherwise PCIe with 16 lanes.

    b200        NVIDIA DGX B200 datasheet, one eighth of the system
    h200, h100  NVIDIA H200 and H100 Tensor Core GPU datasheets
    a100        NVIDIA A100 Tensor Core GPU datasheet, 80 GB
    l40s, l4    NVIDIA L40S and L4 Tensor Core GPU datasheets
    a10         NVIDIA A10 Tensor Core GPU datasheet
    rtx4090     NVIDIA Ada GPU Architecture whitepaper, appendix A
    rtx3090     NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DeviceName = Literal["auto", "cpu", "b200", "h200", "h100", "a100", "l40s", "l4", "a10", "rtx4090", "rtx3090"]


@dataclass(frozen=True)
class Accelerator:
    """Values of a data sheet."""

    title: str
    gigabytes: float
    """Memory in units of 10^9 bytes. The usable memory is a few percent below this number of GiB."""
    half_tflops: float
    float32_tflops: float
    gigabytes_per_second: float
    link_gigabytes_per_second: float


ACCELERATORS = {
    "b200": Accelerator("NVIDIA B200", 180, 2250, 75, 8000, 900),
    "h200": Accelerator("NVIDIA H200", 141, 989, 67, 4800, 450),
    "h100": Accelerator("NVIDIA H100", 80, 989, 67, 3350, 450),
    "a100": Accelerator("NVIDIA A100", 80, 312, 19.5, 2039, 300),
    "l40s": Accelerator("NVIDIA L40S", 48, 362, 91.6, 864, 32),
    "l4": Accelerator("NVIDIA L4", 24, 121, 30.3, 300, 32),
    "a10": Accelerator("NVIDIA A10", 24, 125, 31.2, 600, 32),
    "rtx4090": Accelerator("NVIDIA GeForce RTX 4090", 24, 165.2, 82.6, 1008, 32),
    "rtx3090": Accelerator("NVIDIA GeForce RTX 3090", 24, 71, 35.6, 936, 32),
}
assert ("auto", "cpu", *ACCELERATORS) == get_args(DeviceName)
