"""Compile the Triton kernels for GPUs that are not here, and report what the code needs: a process of its own.

``python -m tests.core.exact.ahead_of_time 80 90`` prints one JSON object per line: kernel, arch, variant, registers,
stack, local memory, instructions that spill, and the numbers of 16-byte loads, to registers and to shared
memory, in the machine code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kl_plugins.kernels.exact import triton_backend
from kl_plugins.kernels.exact.triton_kernels import gradient_kernel, row_sums_kernel, statistics_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

FLAGS = ("CAPPED", "REF_CAPPED", "SAME_CAP")
# Triton dtype of the logits, and the flags that are set.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16": ("bf16", ()),
    "fp32": ("fp32", ()),
    "bf16 capped": ("bf16", FLAGS),
    "bf16 capped unlike": ("bf16", FLAGS[:2]),
}


def compile_kernel(kernel: Any, arch: int, dtype: str, flags: tuple[str, ...], block: int, warps: int) -> Any:
    """Compile as a launch on contiguous logits would, 16-divisible where those are."""
    signature, constants, divisible = {}, {}, {}
    lanes, vector = 32 * warps, 4 if dtype == "fp32" else 8
    shape = {"BLOCK": block, "LANES": lanes, "VECTOR": vector, "REPEATS": block // (lanes * vector)}
    shape["STAGES"] = triton_backend.FORWARD_STAGES_32 if dtype == "fp32" else triton_backend.FORWARD_STAGES
    for position, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name] = "constexpr"
            constants[name] = shape.get(name, name in flags)
        elif name in ("z_ptr", "u_ptr", "out_ptr"):
            signature[name] = f"*{dtype}"
        elif name.endswith("_ptr"):
            signature[name] = {"labels_ptr": "*i64", "centre_ptr": "*fp64"}.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in ("scale", "cap", "ref_cap", "largest") else "i32"
        if name in ("z_ptr", "u_ptr", "out_ptr", "vocab") or name.endswith("_stride"):
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": warps, "enable_fp_fusion": True})


def report(kernel: Any, arch: int, variant: str, block: int, warps: int) -> dict[str, Any]:
    """What one variant of a kernel needs."""
    compiled = compile_kernel(kernel, arch, *VARIANTS[variant], block, warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    needs = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "variant": variant,
        **needs,
        "spilling": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "loads_ahead": len(re.findall(r"\bLDGSTS\.E\S*\.128\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.E\S*\.128\b", code)),
    }


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([str(CUOBJDUMP), *arguments], check=True, text=True, capture_output=True).stdout


def main(arches: list[str]) -> None:
    backend = triton_backend
    for arch in map(int, arches):
        for variant, (dtype, _) in VARIANTS.items():
            backward = (backend.BACKWARD_BLOCK, backend.BACKWARD_WARPS)
            if dtype == "fp32":
                backward = (backend.BACKWARD_BLOCK_32, backend.BACKWARD_WARPS_32)
            for kernel, block, warps in (
                (statistics_kernel, backend.FORWARD_BLOCK, backend.FORWARD_WARPS),
                (row_sums_kernel, backend.FORWARD_BLOCK, backend.FORWARD_WARPS),
                (gradient_kernel, *backward),
            ):
                print(json.dumps(report(kernel, arch, variant, block, warps)), flush=True)
    # A block that must spill: shows that the report would see it.
    large = report(statistics_kernel, int(arches[0]), "bf16", 32768, 4)
    print(json.dumps({**large, "variant": "too large"}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
