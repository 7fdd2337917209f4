"""Compiles the Triton kernels for GPUs that need not be there: python tests/triton_compiles.py; prints one
line a kernel. Not interpreted."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aquabit.kernels.backends import triton_attention_device, triton_device, triton_int8_device

USQ = {
    "BITS": 4,
    "WIDTH": 8,
    "FUSED": 2,
    "GROUP": 1,
    "BOOKS": 1,
    "UNIFORM": True,
    "PER_ROW": False,
    "BY_GROUP": False,
    "IN_TILE": True,
    "HAS_SCALE": True,
    "HAS_OFFSET": True,
    "SCALE_SIZE": 0,
    "OFFSET_SIZE": 0,
    "HAS_BIAS": True,
}
AQ = USQ | {
    "BITS": 8,
    "FUSED": 1,
    "GROUP": 8,
    "BOOKS": 2,
    "UNIFORM": False,
    "BY_GROUP": True,
    "IN_TILE": False,
    "HAS_OFFSET": False,
}
FORMATS = {
    "usq4": USQ,
    "usq1": USQ | {"BITS": 1, "FUSED": 8},
    "usq8g64": USQ | {"BITS": 8, "FUSED": 1, "SCALE_SIZE": 64, "OFFSET_SIZE": 64},
    "vq2c": USQ | {"BITS": 2, "FUSED": 4, "UNIFORM": False, "PER_ROW": True, "HAS_OFFSET": False},
    "aq2x8g8": AQ,
    "aq1x4k": AQ | {"BITS": 4, "WIDTH": 4, "GROUP": 9, "BOOKS": 1, "BY_GROUP": False},
}
LINEAR = {
    "CONV": False,
    "KERNEL_ORDER": False,
    "KERNEL_H": 1,
    "KERNEL_W": 1,
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "BLOCK_K": 64,
    "SWIZZLE": 8,
}
CONV = LINEAR | {"CONV": True, "KERNEL_H": 3, "KERNEL_W": 3}
FEW = {"SPLIT": True, "TOKENS": 8, "BLOCK_N": 8, "BLOCK_K": 128}
INT8 = LINEAR | {"HAS_CENTRE": True, "CENTRE_SIZE": 0}
ATTENTION = {"MASK": 0, "D": 64, "E": 64, "BLOCK_Q": 64, "BLOCK_K": 64}
CASES: list[tuple[str, Any, str, str, dict[str, Any]]] = [
    ("linear", triton_device.matmul, "usq4", "bf16", LINEAR | {"EXACT": False}),
    ("linear", triton_device.matmul, "usq1", "fp16", LINEAR | {"EXACT": False}),
    ("linear", triton_device.matmul, "usq8g64", "fp32", LINEAR | {"EXACT": True, "BLOCK_K": 16}),
    ("linear", triton_device.matmul, "aq2x8g8", "fp32", LINEAR | {"EXACT": False}),
    ("conv2d", triton_device.matmul, "vq2c", "bf16", CONV | {"EXACT": False}),
    ("conv2d", triton_device.matmul, "aq1x4k", "bf16", CONV | {"EXACT": False, "KERNEL_ORDER": True}),
    ("few", triton_device.few_tokens, "aq2x8g8", "bf16", FEW),
    ("few", triton_device.few_tokens, "usq1", "fp32", FEW | {"SPLIT": False}),
    ("add", triton_device.add_parts, "usq4", "bf16", {"TOKENS": 4, "BLOCK_N": 128}),
    ("int8", triton_int8_device.int8_matmul, "usq4", "bf16", INT8),
    ("int8", triton_int8_device.int8_matmul, "usq8g64", "bf16", INT8 | {"CENTRE_SIZE": 64}),
    (
        "tokens",
        triton_int8_device.quantize_tokens,
        "usq4",
        "bf16",
        {"LEVELS": 254, "SYMMETRIC": True, "BLOCK": 1024},
    ),
    ("attention", triton_attention_device.attention, "usq4", "bf16", ATTENTION),
    ("attention", triton_attention_device.attention, "usq4", "fp16", ATTENTION | {"MASK": 1, "D": 128}),
    ("attention", triton_attention_device.attention, "usq4", "fp32", ATTENTION | {"MASK": 2, "BLOCK_K": 32}),
]


def compiled(kernel: Any, constants: dict[str, Any], dtype: str, target: GPUTarget) -> Any:
    pointers = {
        "codes_ptr": "*u8",
        "tables_ptr": "*fp16",
        "scale_ptr": "*fp16",
        "offset_ptr": "*fp16",
        "parts_ptr": "*fp32",
        "q_ptr": "*i8",
        **dict.fromkeys(("centre_ptr", "total_ptr", "step_ptr", "shift_ptr", "sum_ptr"), "*fp32"),
        "mask_ptr": "*u8",
    }
    known = {name: value for name, value in constants.items() if name in kernel.arg_names} | (
        {"x_c": 1} if "x_c" in kernel.arg_names else {}
    )
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = (
            "constexpr"
            if name in known
            else pointers.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        )
        if name.endswith("_ptr") or name in ("row", "row_bytes", "out", "x_b", "y_b"):
            divisible[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in known.items()}
    return triton.compile(
        ASTSource(kernel, signature, values, divisible),
        target=target,
        options={"num_warps": 4, "num_stages": 3},
    )


def main() -> None:
    for capability in (80, 90):
        for name, kernel, format, dtype, constants in CASES:
            code = compiled(kernel, FORMATS[format] | constants, dtype, GPUTarget("cuda", capability, 32)).asm
            unit = next((u for u in ("wgmma.mma", "mma.sync") if u in code["ptx"]), "none")
            print(
                capability,
                name,
                format,
                dtype,
                "exact" if constants.get("EXACT") else "fast",
                f"{unit=}",
                len(code["cubin"]),
            )


if __name__ == "__main__":
    main()
