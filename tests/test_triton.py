"""The Triton kernels without a GPU: run by the interpreter, and compiled ahead of time for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from ahead_of_time import MOST_SHARED, compile_kernel  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from sparsebilevel.kernels import (  # noqa: E402
    gpu,
    triton_block_sparse,
    triton_conv2d,
    triton_elementwise,
    triton_matmul,
    triton_tiles,
)
from sparsebilevel.kernels.block_sparse import BLOCKS  # noqa: E402

# Spills depend on the version of the compiler: with these numbers of registers, version 3.6 has none.
GATED = triton.__version__.startswith("3.6.")


def test_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, cwd=file.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


def test_the_host_is_timed_without_a_gpu():
    file = Path(__file__).parents[1] / "benchmarks" / "gpu_host.py"
    ran = subprocess.run([sys.executable, str(file), "--quick"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "| blocks of 64, search space" in ran.stdout


class Kernel:
    """How a kernel is compiled, and what is asked of it."""

    def __init__(self, kernel, types, constants, most, needs=(), warps=4, stages=3):
        self.kernel, self.types, self.constants = kernel, types, constants
        self.most, self.needs, self.options = most, needs, {"num_warps": warps, "num_stages": stages}


def _types(pointers, numbers="", scalars="", i32=""):
    types = dict(entry.split("=") for entry in pointers.split())
    types = {name: f"{kind}:16" if kind.startswith("*") else kind for name, kind in types.items()}
    types |= dict.fromkeys(numbers.split(), "i32:16")
    return types | dict.fromkeys(scalars.split(), "fp32") | dict.fromkeys(i32.split(), "i32")


TABLE = "table=*i64 chunks=*i32"
ELEMENTWISE = {"ALIGN": 16, "ROWS": triton_elementwise.ROWS}
WARPS, WARPS_OF_COPY = triton_elementwise.WARPS, triton_elementwise.WARPS_OF_COPY
STEP = {"GRAD": tl.float32, "MASK": tl.int8, "COPY": tl.bfloat16, "HAS_COPY": True, **ELEMENTWISE}
STEP |= {"SIGN": 1, "HAS_SCORES": False, "SCORES_SIGN": 1}
SGD = STEP | {"NESTEROV": False, "MOMENTUM": True, "SCORES_NESTEROV": False, "SCORES_MOMENTUM": True, "FRESH": False}
SGD_NUMBERS = "lr momentum dampening weight_decay"
ADAMW_NUMBERS = "lr rest1 beta2 rest2 eps weight_decay"
MATMUL = {"DESCRIPTOR": False, "PRECISION": "ieee", "UPCAST": False}
MASKED = {"BLOCK_T": 128, "BLOCK_M": 128, "BLOCK_C": 64, "GROUP": 8, "HAS_BIAS": True, **MATMUL}
GRAD = {"BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_K": 128, "BITS": False, **MATMUL}
GRAD |= {"HAS_WEIGHT": True, "HAS_SCORES": True, "HAS_SINK": False, "sink": None}
PRODUCT = "x=*bf16 weight=*bf16 mask=*i32 bias=*bf16 out=*bf16"
LISTS = "order=*i32 starts=*i32 index=*i32"
GRADS = "weight=*fp32 mask=*i8 grad_weight=*fp32 grad_scores=*fp32"
# Channels are multiples of 16; the rest is not.
MAPS = ("N C", "pixels H W SH SW R S groups stride_y stride_x pad_y pad_x dil_y dil_x")
WIDE = (r"LDG\.E\.128", r"STG\.E\.128")  # 16 bytes
TENSOR_CORES = r"HGMMA|HMMA|UTCHMMA"


def _both(numbers):
    """Settings of weights, and of scores."""
    return " ".join([numbers, *(f"scores_{number}" for number in numbers.split())])


def _sgd(most, **constants):
    types = _types(TABLE, scalars=_both(SGD_NUMBERS))
    return Kernel(triton_elementwise._sgd_step, types, SGD | constants, most, WIDE, WARPS)


def _adamw(most, **constants):
    types = _types(f"{TABLE} corrections=*fp32", scalars=_both(ADAMW_NUMBERS))
    return Kernel(triton_elementwise._adamw_step, types, STEP | constants, most, WIDE, WARPS)


def _maps(conv, stride=1):
    """Types and constants of the maps of a convolution 3x3, or of a product of matrices."""
    names = "images H W SH SW pad_y pad_x dil_y dil_x"
    window = {"CONV": conv, "R": 3 if conv else 1, "S": 3 if conv else 1, "STRIDE_Y": stride, "STRIDE_X": stride}
    return ("", window | dict.fromkeys(names.split())) if not conv else (names, window)


def _block(block, input_grad=False, descriptor=False, conv=False, stride=1):
    summed = min(block, 64)
    x, w = ("x=*bf16", "weight=*bf16")
    rows = triton_block_sparse.tile_rows(torch.bfloat16, conv, block)
    constants = {"INPUT_GRAD": input_grad, "HAS_BIAS": False, "BLOCK": block, "BLOCK_T": rows, "BLOCK_C": summed}
    constants |= {"bias": None, **MATMUL, "DESCRIPTOR": descriptor, "GROUP": 2048 // rows}
    if descriptor:
        shape = (summed, block) if input_grad else (block, summed)
        x = x if conv else f"x=tensordesc<bf16[{rows},{summed}]>"
        w = f"weight=tensordesc<bf16[{shape[0]},{shape[1]}]>"
    i32, window = _maps(conv, stride)
    constants |= window
    types = _types(f"{x} {w} out=*bf16 {LISTS}", "T N K", i32=i32)
    needs = (TENSOR_CORES, "UTMALDG" if descriptor else "LDGSTS|UTMALDG")
    needs += (r"LDGSTS\.E\S*\.128",) if conv else ()  # pixels, 16 bytes at a time
    options = triton_block_sparse.options(block, conv)
    kernel = triton_block_sparse._block_matmul
    return Kernel(kernel, types, constants, 192, needs, options["num_warps"], options["num_stages"])


def _conv(input_grad=False):
    constants = {"INPUT_GRAD": input_grad, "HAS_BIAS": False, "bias": None, "PRECISION": "ieee", "UPCAST": False}
    constants |= {"BLOCK_T": triton_conv2d.BLOCK_T, "BLOCK_M": triton_conv2d.BLOCK_M, "BLOCK_C": 64}
    types = _types("source=*bf16 weight=*bf16 mask=*i8 out=*bf16", MAPS[0], i32=MAPS[1])
    return Kernel(triton_conv2d._masked_conv2d, types, constants, 255, (TENSOR_CORES,), 8)


def _block_grad(block, descriptor=False, conv=False, splits=1):
    i32, window = _maps(conv)
    window = {name: value for name, value in window.items() if name != "images"}
    rows = triton_block_sparse.grad_rows(torch.bfloat16, block, conv)
    constants = {"BLOCK": block, "BLOCK_T": rows, "HAS_MASK": True, "SPLITS": splits, **MATMUL, **window}
    constants["DESCRIPTOR"] = descriptor
    x, dy = ("x=*bf16", "dy=*bf16")
    if descriptor:
        x, dy = x if conv else f"x=tensordesc<bf16[{rows},{block}]>", f"dy=tensordesc<bf16[{rows},{block}]>"
    pointers = f"{dy} {x} mask=*i8 grad=*fp32 starts=*i32 index=*i32 rows=*i32"
    if splits > 1:
        pointers += " workspace=*fp32 turns=*i32"
    else:
        constants |= {"workspace": None, "turns": None}
    types = _types(pointers, "T N K split_rows", i32=i32.replace("images ", ""))
    needs = (TENSOR_CORES if block >= 64 else "HMMA|UTCHMMA", "UTMALDG" if descriptor else "LDGSTS|UTMALDG")
    needs += (r"LDGSTS\.E\S*\.128",) if conv else ()
    options = triton_block_sparse.grad_options(block, descriptor and not conv).values()
    return Kernel(triton_block_sparse._block_weight_grad, types, constants, 255, needs, *options)


def _grad(splits=1, descriptor=False, rows=None):
    x, dy = ("x=*bf16", "dy=*bf16")
    if descriptor:
        x, dy = ("x=tensordesc<bf16[64,128]>", "dy=tensordesc<bf16[64,128]>")
    constants = GRAD | {"SPLITS": splits, "DESCRIPTOR": descriptor}
    pointers = f"{dy} {x} weight=*fp32 mask=*i8 grad_weight=*fp32 grad_scores=*fp32"
    if splits > 1:
        pointers += " workspace=*fp32 turns=*i32"
    else:
        constants |= {"workspace": None, "turns": None}
    needs = (TENSOR_CORES, "UTMALDG" if descriptor else "LDGSTS|UTMALDG")
    types = _types(pointers, "T N K split_rows")
    fixed, stages = _fixed(types, constants, rows), triton_matmul.grad_stages(descriptor)
    return Kernel(triton_matmul._weight_grad, *fixed, 255, needs, 8, stages)


def _fixed(types, constants, rows):
    """Types and constants for a number of rows that is compiled in, as Triton does with ones."""
    if rows is None:
        return types, constants
    return {name: type for name, type in types.items() if name != "T"}, constants | {"T": rows}


def _masked(input_grad=False, bits=True, descriptor=False, rows=None, block_t=128):
    pointers = PRODUCT if bits else PRODUCT.replace("*i32", "*i8")
    if descriptor:
        pointers = pointers.replace("x=*bf16", f"x=tensordesc<bf16[{block_t},64]>")
    constants = MASKED | {"BLOCK_T": block_t} | {"INPUT_GRAD": input_grad, "BITS": bits, "DESCRIPTOR": descriptor}
    needs = (TENSOR_CORES, "UTMALDG" if descriptor else "LDGSTS|UTMALDG")
    fixed = _fixed(_types(pointers, "T N K"), constants, rows)
    return Kernel(triton_matmul._masked_matmul, *fixed, 255, needs, 8)


def _list(kernel, pairs, settled=False):
    pointers = "occupied=*i8 counts=*i32" + (" members=*i32" if pairs else "")
    constants = {"REPEAT": 1, "PAIRED": pairs, "HAS_MEMBERS": settled, "WIDTH": triton_tiles._WIDTH, "stride_col": 1}
    constants |= {} if pairs else {"members": None}
    if kernel is triton_tiles._list_tiles:
        pointers += " order=*i32 starts=*i32 tiles=*i32 rows=*i32"
    return Kernel(kernel, _types(pointers, "height cols stride_row"), constants, 96)


KERNELS = {
    "occupied_tiles": Kernel(
        triton_tiles._occupied_tiles,
        _types("mask=*i8 tiles=*i8 sides=*i8", "N K stride_n"),
        {"TAPS": 1, "stride_k": 1, "stride_tap": 1, "BLOCK": 32, "ABREAST": triton_tiles._ABREAST, "SIDES": True}
        | {"PER_WORD": 1},
        128,
        (r"LDG\.E\.128",),
    ),
    "occupied_tiles_rows_of_taps": Kernel(
        triton_tiles._occupied_tiles,
        _types("mask=*i8 tiles=*i8 sides=*i8", "N K stride_n", i32="TAPS stride_k"),
        {"stride_tap": 1, "BLOCK": 32, "ABREAST": 1, "SIDES": True, "PER_WORD": 1},
        128,
    ),
    "occupied_tiles_by_words": Kernel(
        triton_tiles._occupied_tiles,
        _types("mask=*i32 tiles=*i8", "N K stride_n"),
        {"TAPS": 1, "stride_k": 1, "stride_tap": 1, "BLOCK": 32, "ABREAST": triton_tiles._ABREAST_WORDS}
        | {"SIDES": False, "sides": None, "PER_WORD": 4},
        64,
        (r"LDG\.E\.128",),
    ),
    "mark_positions": Kernel(
        triton_tiles._mark_positions,
        _types("positions=*i64 tiles=*i8 sides=*i8", "size N K", i32="limit") | {"limit": "i64"},
        {"TAPS": 1, "BLOCK": 32, "WIDTH": triton_tiles._WIDTH, "SIDES": True},
        96,
        (r"LDG\.E\.128",),
    ),
    "count_tiles": _list(triton_tiles._count_tiles, pairs=False),
    "list_tiles": _list(triton_tiles._list_tiles, pairs=False),
    "count_tiles_of_pairs": _list(triton_tiles._count_tiles, pairs=True),
    "list_tiles_of_pairs": _list(triton_tiles._list_tiles, pairs=True),
    "list_tiles_of_settled_pairs": _list(triton_tiles._list_tiles, pairs=True, settled=True),
    "apply_mask": Kernel(
        triton_elementwise._apply_mask,
        _types(TABLE),
        {"WEIGHT": tl.float32, "MASK": tl.int8, "OUT": tl.bfloat16, **ELEMENTWISE},
        48,
        (r"LDG\.E\.128", r"STG\.E\.128|STG\.E\.64"),
        WARPS_OF_COPY,
    ),
    "apply_mask_one": Kernel(
        triton_elementwise._apply_mask_one,
        _types("weight=*fp32 mask=*i8 out=*bf16", i32="size"),
        {"ROWS": triton_elementwise.ROWS},
        48,
        (r"LDG\.E\.128", r"STG\.E\.128|STG\.E\.64"),
        WARPS_OF_COPY,
    ),
    "split_gradient_one": Kernel(
        triton_elementwise._split_gradient_one,
        _types("grad=*bf16 weight=*fp32 mask=*i8 grad_weight=*fp32 grad_scores=*fp32", i32="size"),
        {"sink": None, "HAS_WEIGHT": True, "HAS_SCORES": True, "HAS_SINK": False, "ROWS": triton_elementwise.ROWS},
        48,
        (r"LDG\.E\.128", r"STG\.E\.128"),
        WARPS,
    ),
    "gather_support": Kernel(
        triton_elementwise._gather_support,
        _types("grad=*bf16 positions=*i64 out=*fp32", i32="size limit channels taps"),
        {"CHANNELS_LAST": True, "ROWS": triton_elementwise.ROWS},
        48,
        (r"LDG\.E\.128|LDG\.E\.64",),
        WARPS,
    ),
    "apply_mask_packed": Kernel(
        triton_elementwise._apply_mask,
        _types(TABLE),
        {"WEIGHT": tl.bfloat16, "MASK": tl.int32, "OUT": tl.bfloat16, **ELEMENTWISE},
        64,
        WIDE,
        WARPS_OF_COPY,
    ),
    "split_gradient": Kernel(
        triton_elementwise._split_gradient,
        _types(TABLE),
        {"GRAD": tl.float32, "WEIGHT": tl.float32, "MASK": tl.int8, "GRAD_WEIGHT": tl.float32, **ELEMENTWISE}
        | {"HAS_WEIGHT": True, "HAS_SCORES": True, "HAS_SINK": True},
        48,
        WIDE,
        WARPS,
    ),
    "sgd_step": _sgd(48),
    "sgd_step_scores": _sgd(64, HAS_SCORES=True),
    "adamw_step": _adamw(64),
    "adamw_step_scores": _adamw(80, HAS_SCORES=True),
    "masked_matmul": _masked(),
    "masked_matmul_bytes": _masked(bits=False),
    "masked_matmul_descriptor": _masked(descriptor=True),
    "masked_matmul_input_grad": _masked(input_grad=True),
    "masked_matmul_bytes_input_grad": _masked(bits=False, input_grad=True),
    "masked_matmul_one_row": _masked(rows=1),
    **{
        f"masked_matmul_{rows}_rows{name}": _masked(block_t=rows, **options)
        for rows in (16, 32, 64)
        for name, options in (
            ("", {}),
            ("_descriptor", {"descriptor": True}),
            ("_bytes_input_grad", {"input_grad": True, "bits": False}),
        )
    },
    "weight_grad": _grad(),
    "weight_grad_one_row": _grad(rows=1),
    "weight_grad_split": _grad(splits=2),
    "weight_grad_descriptor": _grad(descriptor=True),
    "block_matmul_128": _block(128),
    "block_matmul_64": _block(64),
    "block_matmul_32": _block(32),
    "block_matmul_128_descriptor": _block(128, descriptor=True),
    "block_matmul_64_input_grad_descriptor": _block(64, input_grad=True, descriptor=True),
    "masked_conv2d": _conv(),
    "masked_conv2d_input_grad": _conv(input_grad=True),
    "conv2d_weight_grad": Kernel(
        triton_conv2d._conv2d_weight_grad,
        _types(f"dy=*bf16 source=*bf16 {GRADS}", MAPS[0], i32=MAPS[1]),
        {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 64, "HAS_WEIGHT": True, "HAS_SCORES": True, "HAS_SINK": False}
        | {"sink": None, "PRECISION": "ieee", "UPCAST": False},
        255,
        (TENSOR_CORES,),
    ),
    "block_weight_grad_128": _block_grad(128),
    "block_weight_grad_64": _block_grad(64),
    "block_weight_grad_32": _block_grad(32),  # HGMMA takes 64 rows
    "block_weight_grad_128_split_descriptor": _block_grad(128, descriptor=True, splits=2),
    **{f"block_conv2d_{block}": _block(block, conv=True) for block in BLOCKS},
    **{f"block_conv2d_{block}_descriptor": _block(block, descriptor=True, conv=True) for block in BLOCKS},
    "block_conv2d_64_stride_2": _block(64, conv=True, stride=2),
    **{
        f"block_conv2d_{block}_input_grad{name}": _block(block, input_grad=True, conv=True, **options)
        for block in BLOCKS
        for name, options in (("_descriptor", {"descriptor": True}), ("_stride_2", {"stride": 2}))
    },
    **{f"block_conv2d_weight_grad_{block}": _block_grad(block, conv=True, splits=2) for block in BLOCKS},
    **{
        f"block_conv2d_weight_grad_{block}_descriptor": _block_grad(block, descriptor=True, conv=True)
        for block in BLOCKS
    },
}


def _float32(kernel):
    """The same with operands of float32, and less of them at a time, multiplied exactly."""
    types = {name: type.replace("*bf16", "*fp32") for name, type in kernel.types.items()}
    constants = dict(kernel.constants)
    summed = "BLOCK_T" if "dy" in types else "BLOCK_C"
    constants[summed] //= 2
    if kernel.kernel is triton_block_sparse._block_matmul:
        constants["BLOCK_T"] = triton_block_sparse.tile_rows(torch.float32, constants["CONV"], constants["BLOCK"])
    return Kernel(kernel.kernel, types, constants, 255, ("FFMA",), *kernel.options.values())


KERNELS |= {
    f"{name}_float32": _float32(KERNELS[name])
    for name in ("masked_matmul", "masked_matmul_bytes", "weight_grad", "block_matmul_128", "masked_conv2d")
    + ("masked_matmul_input_grad", "masked_matmul_bytes_input_grad")
    + ("block_conv2d_128", "block_conv2d_64_input_grad_stride_2", "block_conv2d_weight_grad_128")
}

# What is always compiled, by compute capability: the others are much like these.
FEW = {
    90: """
        apply_mask split_gradient gather_support adamw_step_scores occupied_tiles list_tiles_of_pairs
        masked_matmul_descriptor masked_matmul_input_grad masked_matmul_16_rows_descriptor
        weight_grad_split weight_grad_descriptor masked_conv2d conv2d_weight_grad
        block_matmul_64_input_grad_descriptor block_weight_grad_64
        block_conv2d_64_descriptor block_conv2d_64_input_grad_stride_2 block_conv2d_weight_grad_64_descriptor
    """.split(),
    120: ["weight_grad_split", "block_weight_grad_128"],
}
SPILLED = {  # bytes
    ("block_weight_grad_128", 120): 8,  # one register is stored and loaded once
    **{("masked_matmul_bytes_input_grad", arch): size for arch, size in ((80, 8), (86, 32), (89, 32), (120, 56))},
    ("masked_matmul_bytes_input_grad_float32", 120): 8,
}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(name, arch, marks=() if name in FEW.get(arch, ()) else pytest.mark.slow)
        for name in KERNELS
        for arch in MOST_SHARED
    ],
)
def test_ahead_of_time(name, arch, tmp_path, monkeypatch):
    capability = divmod(arch, 10)
    if "descriptor" in name and not gpu.has_large_tiles(capability):
        pytest.skip("descriptors are not used there")
    if ("conv2d" in name or "bytes" in name) and name.endswith("_float32") and arch == 100:
        pytest.skip("compiled to TF32: gpu.fuses_exactly says so")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = KERNELS[name]
    constants = dict(kernel.constants)
    if name.startswith("weight_grad"):
        constants["BLOCK_K"] = triton_matmul.weight_tile(capability)
    elif name.startswith("masked_conv2d"):
        constants["BLOCK_T"] = triton_conv2d.tile_pixels(capability)
    compiled = compile_kernel(kernel.kernel, arch, kernel.types, constants, **kernel.options)
    print(f"{name} sm_{arch}: {compiled.registers} registers, {compiled.stack} stack, {compiled.shared} shared")
    assert compiled.shared <= MOST_SHARED[arch]
    for pattern in kernel.needs:
        assert compiled.count(pattern), f"no {pattern}"
    if arch == 90 and TENSOR_CORES in kernel.needs:
        assert compiled.count("HGMMA")
    if GATED:
        assert compiled.registers <= kernel.most
        spilled = SPILLED.get((name, arch), 0)
        assert compiled.stack == spilled
        assert spilled or not compiled.count(r"\b(LDL|STL)\b")


class Launches:
    """Triton's driver, which writes down what is launched; launcher and library in one."""

    def __init__(self):
        self.utils, self.made = self, []

    def launcher_cls(self, source, metadata):
        return lambda *launch: self.made.append((metadata.hash, *launch[:6], *launch[9:]))  # but for hooks

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def load_binary(self, name, *_):
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _device):
        return {"max_shared_mem": 232448}


@triton.jit
def _some_kernel(x, y, size, other, real, SIZE: tl.constexpr, HAS_Y: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at, mask=at < size, other=0) * real + other
    if HAS_Y:
        value += tl.load(y + at, mask=at < size, other=0)
    tl.store(x + at, value, mask=at < size)


def test_launches_what_triton_would(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = Launches()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(gpu, "_launched", {})
    x, wide = torch.zeros(64), torch.zeros(64, dtype=torch.float64)
    cases = [
        ((x, x, 64, 3, 0.5), {"SIZE": 64, "HAS_Y": True}),
        ((x, x, 17, 33, 0.5), {"SIZE": 64, "HAS_Y": True}),
        ((x, x, 1, 1, 1.0), {"SIZE": 64, "HAS_Y": True}),
        ((x, x, 64, (1 << 31) + 3, 2.0), {"SIZE": 64, "HAS_Y": True}),
        ((x, x, 64, -3, 2.0), {"SIZE": 64, "HAS_Y": True}),
        ((x[1:], x, 64, 3, 0.5), {"SIZE": 64, "HAS_Y": True}),
        ((x, x[2:], 64, 3, 0.5), {"SIZE": 64, "HAS_Y": True}),
        ((wide, x, 64, 3, 0.5), {"SIZE": 64, "HAS_Y": True}),
        ((x, None, 64, 3, 0.5), {"SIZE": 64, "HAS_Y": False}),
        ((x, x, 64, 3, 0.5), {"SIZE": 32, "HAS_Y": True}),
        ((torch.nn.Parameter(x), x, 64, 3, 0.5), {"SIZE": 32, "HAS_Y": True, "num_warps": 2}),
    ]
    for grid in ((3,), (2, 5)):
        for arguments, constants in cases:
            _some_kernel[grid](*arguments, **constants)
    expected, driver.made = driver.made, []
    with monkeypatch.context() as later:
        for grid in ((3,), (2, 5)):
            for arguments, constants in cases:
                gpu.launch(torch.device("cpu"), _some_kernel, grid, *arguments, **constants)
            later.setattr(_some_kernel, "run", None)  # from the second time on nothing is looked for

    def said(launches):
        return [tuple(id(a) if isinstance(a, torch.Tensor) else a for a in launch) for launch in launches]

    assert said(driver.made) == said(expected)
    assert len({launch[0] for launch in expected}) > 5
    with pytest.raises(TypeError, match="constants SIZE, HAS_Y must be keywords"):
        gpu.launch(torch.device("cpu"), _some_kernel, (1,), x, x, 64, 3, 0.5, 64, HAS_Y=True)
    with pytest.raises(TypeError, match="arguments must not"):
        gpu.launch(torch.device("cpu"), _some_kernel, (1,), x, x, 64, 3, real=0.5, SIZE=64, HAS_Y=True)
