"""Builds, checks and times everything that runs on a GPU, in less than nine minutes.

    python benchmarks/gpu_check.py [--output FILE] [--quick] [--only STAGE ...]

It needs torch with CUDA, triton, nvcc and pytest, and takes the sources beside it, not an installed copy.
The checks run side by side, each in a process of its own: a kernel that hangs or that ends the process takes no other
check with it. The times are taken one after another, with nothing beside them. What each stage finds goes to one JSON,
``benchmarks/results/gpu_check.json``; its output, as it is written, to files in ``--logs``. Rows b, e and f of
gpu_training.py are not among the stages.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SHARDS = 12
CHECK_S = 240  # limit of each check: they run side by side, and the longest took 153 on 16 cores
STARTED = time.monotonic()


def note(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f} s] {text}", flush=True)


class Stage(NamedTuple):
    """A command, which may write a JSON file, and after how many seconds it is given up."""

    name: str
    command: list[str]
    limit: float
    env: dict[str, str] = {}


def checks(quick: bool) -> list[Stage]:
    """Kernels against float64, the kernels' own tests on the device, and small shapes under compute-sanitizer."""
    here = ROOT / "benchmarks"
    cuda, kernels = [sys.executable, str(here / "gpu_cuda.py")], [sys.executable, str(here / "gpu_kernels.py")]
    stages = [
        Stage(f"triton {i}", [*kernels, "check", "--shard", f"{i}/{SHARDS}"], CHECK_S)
        for i in range(1 if quick else SHARDS)
    ]
    stages += [Stage("cuda", [*cuda, "check", *(["--quick"] if quick else [])], CHECK_S)]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "--tb=short"]
    tests.append(str(ROOT / "tests" / "interpreted_kernels.py"))
    stages.append(Stage("tests", tests, CHECK_S, {"SPARSEBILEVEL_TEST_DEVICE": "cuda"}))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck"):
        # Without torch's pool, so that what lies behind a tensor is nobody's.
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        stages.append(Stage(f"cuda {tool}", [*command, *cuda, "sanitize"], CHECK_S, env))
        stages.append(Stage(f"triton {tool}", [*command, *kernels, "check", "--small"], CHECK_S, env))
    return stages


def timings(quick: bool) -> list[Stage]:
    """All benchmarks."""
    here, options = ROOT / "benchmarks", ["--quick"] if quick else []
    tune = [sys.executable, str(here / "gpu_kernels.py"), "tune", *options]
    stages = [Stage("tune", tune, 60)]  # what the others choose by
    limits = [sys.executable, str(here / "gpu_host.py"), "--limits", *options]
    stages.append(Stage("gpu_host limits", limits, 90))
    # The networks' other rows, which compile or slice, are calls of gpu_training.py by itself.
    budgets = {"gpu_cuda time": 40, "gpu_training --rows d,a,c": 100, "gpu_kernels steps": 70, "gpu_kernels time": 55}
    for name, seconds in budgets.items():
        file, *what = name.split()
        command = [sys.executable, str(here / f"{file}.py"), *what, "--budget", str(seconds), *options]
        stages.append(Stage(name, command, seconds + 60))
    return stages


def build(folder: Path) -> dict[str, Any]:
    """Lays the package out in a folder, without the C++ extension, which is for CPUs."""
    begin = time.monotonic()
    package = folder / "sparsebilevel"
    # Where one works without installing, kernels may be linked into the package.
    shutil.copytree(ROOT / "sparsebilevel", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "kernels"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC", "-Xptxas=-v", "--threads=2"]
    flags += [f"-gencode=arch=compute_{arch}" for arch in ("80,code=sm_80", "90a,code=sm_90a", "90,code=compute_90")]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    command = ["nvcc", "-shared", *flags, *map(str, sources), "-o", str(package / "_cuda.so")]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"the build failed:\n{built.stdout[-4000:]}\n{built.stderr[-4000:]}")
    spills = [int(bytes) for bytes in re.findall(r"(\d+) bytes spill stores", built.stderr + built.stdout)]
    return {"build_s": time.monotonic() - begin, "kernels": len(spills), "spilling": sum(map(bool, spills))}


def machine() -> dict[str, Any]:
    """What this ran on."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    facts["triton"] = importlib.import_module("triton").__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        facts["cudnn"] = torch.backends.cudnn.version()
    if shutil.which("nvidia-smi"):
        fields = "clocks.sm,clocks.mem,driver_version,power.limit"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        facts["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return facts


def label(stage: Stage) -> str:
    """As a name of files."""
    return stage.name.replace(" ", "_")


def run(stage: Stage, folder: Path, logs: Path) -> dict[str, Any]:
    """Runs a stage to its end or its limit.

    Returns:
        ``status`` (exit status, or "no result in N s"), ``seconds``, ``output`` (its end, where it failed) and what the
        stage wrote.
    """
    begin = time.monotonic()
    written, log = folder / f"{label(stage)}.json", logs / f"{label(stage)}.log"
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "SPARSEBILEVEL_NATIVE": "0"}
    env |= {"SPARSEBILEVEL_MEASUREMENTS": str(folder / "measurements.json")} | stage.env
    takes_output = any(argument.endswith(".py") and "benchmarks" in argument for argument in stage.command)
    command = [*stage.command, *(["--output", str(written)] if takes_output else [])]
    with log.open("w") as file:
        try:
            status: Any = subprocess.run(
                command, env=env, cwd=folder, stdout=file, stderr=subprocess.STDOUT, timeout=stage.limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"no result in {stage.limit:.0f} s"
        except OSError as error:
            status = str(error)
    result: dict[str, Any] = {"status": status, "seconds": time.monotonic() - begin, "date": time.strftime("%Y-%m-%d")}
    if written.exists():
        result |= json.loads(written.read_text())
    if status != 0:
        output = log.read_text(errors="replace")[-3000:]
        for place, name in ((ROOT, "."), (folder, "."), (sys.prefix, "python")):  # whose folders are nobody's business
            output = output.replace(str(place), name)
        result["output"] = output
    note(f"{stage.name}: {'passed' if status == 0 else status}, {result['seconds']:.0f} s")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_check.json")
    parser.add_argument("--logs", type=Path, help="folder for the output of every stage; by default it is not kept")
    parser.add_argument("--quick", action="store_true", help="few and small sizes")
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help="stages whose name begins so; in the file the others stay"
    )
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs = args.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        wanted = [
            [stage for stage in stages if not args.only or stage.name.startswith(tuple(args.only))]
            for stages in (checks(args.quick), timings(args.quick))
        ]
        result: dict[str, Any] = {"build": {}, "machine": machine(), "checks": {}, "times": {}}
        if args.only and args.output.exists():
            before = json.loads(args.output.read_text())
            for fact in ("gpu", "torch", "cuda", "triton"):
                then, now = before["machine"].get(fact), result["machine"].get(fact)
                if then != now:
                    sys.exit(f"{args.output} is of {fact} {then}; with --only expected {now}, as this machine has")
            result |= {part: before[part] for part in ("checks", "times")}
        result["build"] = build(folder)
        note(f"{result['build']}, {result['machine']}")

        def save() -> None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

        with concurrent.futures.ThreadPoolExecutor(max(len(wanted[0]), 1)) as pool:
            for stage, found in zip(wanted[0], pool.map(lambda s: run(s, folder, logs), wanted[0]), strict=True):
                result["checks"][stage.name] = found
        save()
        for stage in wanted[1]:
            result["times"][stage.name] = run(stage, folder, logs)
            save()
            print((logs / f"{label(stage)}.log").read_text(errors="replace")[-6000:], flush=True)
        ran = {
            stage.name: result[part][stage.name]
            for part, stages in zip(("checks", "times"), wanted, strict=True)
            for stage in stages
        }
        failed = [name for name, found in ran.items() if found["status"] != 0]
        for name in failed:
            found = ran[name]
            print(f"--- {name}\n{found['output']}")
        note(f"{'failed: ' + ', '.join(failed) if failed else 'all passed'}; written to {args.output}")
        return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
