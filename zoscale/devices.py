"""Published peak rates of devices, for estimates."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What a data sheet promises; dense arithmetic, no sparsity.

    Args:
        flops_16: peak FLOP/s of bf16 and fp16 matrix products.
        flops_32: peak FLOP/s in fp32, as torch computes by default (without TF32).
        bandwidth: of the memory, bytes/s.
        link: to other devices of the machine in one direction, bytes/s.
        memory: bytes.
        copies: whether a gather needs its output once more (gloo's does).
    """

    flops_16: float
    flops_32: float
    bandwidth: float
    link: float
    memory: float
    copies: bool = False

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s in a compute dtype."""
        return self.flops_32 if dtype == "float32" else self.flops_16


DEVICES: dict[str, Device] = {
    "a100": Device(312e12, 19.5e12, 2.039e12, 300e9, 80e9),  # A100 80GB SXM data sheet; NVLink 600 GB/s both ways
    "h100": Device(989e12, 67e12, 3.35e12, 450e9, 80e9),  # H100 SXM data sheet; NVLink 900 GB/s both ways
    "h200": Device(989e12, 67e12, 4.8e12, 450e9, 141e9),  # H200 SXM data sheet; NVLink 900 GB/s both ways
    # EPYC 9654: 96 cores x 2.4 GHz x 32, 12 x DDR5-4800; 100 Gb/s
    "cpu": Device(7.4e12, 7.4e12, 460.8e9, 12.5e9, 768e9, copies=True),
}
"""By the name that `--device` takes; memory as the data sheet has it."""
