"""Compile the Triton kernels for GPUs that aren't here, and print what the assembler says of them, as JSON lines.

    python tests/compile_kernels.py [sm_90 sm_80 ...]

In a process of its own: where TRITON_INTERPRET is set there is nothing to compile. tests/test_kernels.py asserts the
lines.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.gpu.logprob import dlogits_kernel, stats_kernel, tiling  # noqa: E402
from kernels.gpu.token_loss import scale_kernel  # noqa: E402

NAMES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}  # float16 compiles to the same with other tensor-core instructions


def compiled(kernel, arch: int, types: dict[str, str], constants: dict, options: dict) -> dict:
    """types: Triton's type of each argument that isn't a constant. Pointers, D and width are multiples of 16."""
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    even = [n for n, t in types.items() if t.startswith("*") or n in ("D", "width")]
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ([tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"])
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": result.metadata.shared,
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?!NOP)[@A-Z]", sass)),
        "spills": len(re.findall(r"\bSTL\b", sass)),  # stores to local memory
        "tensor_core": len(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass)),  # for products that run meanwhile
        "tma": len(re.findall(r"\bUTMALDG\b", sass)),
    }


def main(archs: list[int]) -> None:
    for arch in archs:
        for dtype, name in NAMES.items():
            t = tiling(dtype, arch // 10)
            blocks = {k: v for k, v in t.items() if k.startswith("BLOCK") or k == "TMA"}
            options = {k: v for k, v in t.items() if k not in blocks}
            M, N, K = t["BLOCK_M"], t["BLOCK_N"], t["BLOCK_D"]
            operand = lambda a, b: f"tensordesc<{name}[{a},{b}]>" if t["TMA"] else f"*{name}"  # noqa: B023, E731
            common = dict(
                x=operand(M, K), w=operand(N, K), y_ptr="*i64", lse_ptr="*fp32", N="i32", V="i32", D="i32", scale="fp32"
            )
            for entropy in (False, True):
                for store in (False, True):
                    types = common | dict(z_y_ptr="*fp32", width="i32")
                    constants = blocks | dict(ENTROPY=entropy, STORE=store)
                    types, constants = add(types, constants, "entropy_ptr", "*fp32", entropy)
                    types, constants = add(types, constants, "p_out", operand(M, N), store)
                    label = "stats" + "+entropy" * entropy + "+store" * store
                    show(label, arch, name, compiled(stats_kernel, arch, types, constants, options))
            rows = dict(a_ptr="*fp32", b_ptr="*fp32", c_ptr="*fp32")
            types = common | rows | dict(dz_out=operand(M, N), width="i32")
            show("dlogits", arch, name, compiled(dlogits_kernel, arch, types, blocks, options))
            types = dict(p_ptr=f"*{name}", width="i32", y_ptr="*i64", lse_t_ptr="*fp32", N="i32", T="i32")
            types |= dict.fromkeys(("logprob_ptr", "lse_ptr", "a_ptr", "b_ptr"), "*fp32")
            for entropy in (False, True):
                blocks = dict(BLOCK_T=4096 // N, BLOCK_N=N)
                with_c, constants = add(types, blocks, "c_ptr", "*fp32", entropy)
                label = "scale" + "+entropy" * entropy
                show(label, arch, name, compiled(scale_kernel, arch, with_c, constants, dict(num_warps=8)))


def add(types: dict, constants: dict, name: str, type: str, there: bool) -> tuple[dict, dict]:
    return (types | {name: type}, constants) if there else (types, constants | {name: None})


def show(kernel: str, arch: int, dtype: str, numbers: dict) -> None:
    print(json.dumps(dict(kernel=kernel, arch=arch, dtype=dtype, **numbers)), flush=True)


if __name__ == "__main__":
    main([int(a.removeprefix("sm_")) for a in sys.argv[1:]] or [90, 80])
