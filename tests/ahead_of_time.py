"""Triton kernels compiled for GPUs that are not there, and what the machine code shows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

MOST_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory a block may have, by compute capability."""


class Compiled(NamedTuple):
    """What a kernel takes, and its machine code."""

    registers: int
    stack: int  # bytes: more than none are spills
    shared: int
    sass: str

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression."""
        return len(re.findall(pattern, self.sass))


def compile_kernel(
    kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], **options: int
) -> Compiled:
    """Compile ``kernel`` for compute capability ``arch`` / 10; needs neither GPU nor driver.

    Args:
        kernel: a ``triton.jit`` function, or one under ``triton.autotune``.
        types: of its arguments in Triton's spelling; with ``:16`` behind it, a multiple of 16, which is what pointers
            and sizes must be for loads of 16 bytes.
        constants: of its constexpr arguments.
        options: ``num_warps``, ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernel, "fn", kernel) if not hasattr(kernel, "arg_names") else kernel
    names = kernel.arg_names
    missing = set(names) ^ {*types, *constants}
    assert not missing, f"arguments given twice, unknown or missing: {sorted(missing)}"
    source = ASTSource(
        kernel,
        signature={name: types[name].split(":")[0] if name in types else "constexpr" for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, type in types.items() if type.endswith(":16")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin = Path(compiled.metadata_group[f"{kernel.fn.__name__}.cubin"])
    usage = subprocess.run(
        [tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Compiled(int(found[1]), int(found[2]), compiled.metadata.shared, sass)
