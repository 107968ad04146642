"""The command ``sparsebilevel``. Every field of `Config` is a flag; bad input ends in one line and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..training.config import SECTIONS, Config, check_fields, field_types, read_config

ALIASES = {"arch": ("--model",), "batch_size": ("-b",), "weight_decay": ("--wd",), "workers": ("-j",)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 and 143 stopped by a signal."""
    parser = make_parser(argv)
    args = parser.parse_args(argv)
    if not hasattr(args, "command"):
        parser.print_help()
        return
    try:
        args.command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever was to read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if args.traceback:
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Print an expected error as one line and return its exit code; anything else is a bug, and raised again."""
    text = " ".join(str(error).split())
    try:
        from ..comm import CommunicationError
        from ..training.loop import Interrupted, TrainingError
    except (ImportError, ValueError):  # what is wrong is in the way of these, too
        print(f"error: {text}", file=sys.stderr)
        return 2
    if isinstance(error, Interrupted):
        print(text, file=sys.stderr)
        return error.exit_code
    if _is_out_of_memory(error):
        print(f"error: out of memory; smaller batches, images or networks take less ({text})", file=sys.stderr)
        return 1
    if not isinstance(error, (ValueError, OSError, ImportError, TrainingError, CommunicationError)):
        raise error
    print(f"error: {text}", file=sys.stderr)
    return 1 if isinstance(error, (TrainingError, CommunicationError)) else 2


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    told = ("can't allocate memory", "Storage size calculation overflowed")  # torch has no class for these on a CPU
    is_told = isinstance(error, RuntimeError) and any(text in str(error) for text in told)
    return is_told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """All commands and flags; ``decentralized``'s and ``federated``'s if ``argv`` (default: the process's) names it."""
    from .. import __version__

    parser = _Parser(prog="sparsebilevel", description="Train neural networks whose sparsity mask is learned.")
    parser.add_argument("--version", action="version", version=f"sparsebilevel {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str, **kwargs: Any) -> _Parser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False, **kwargs)
        sub.set_defaults(command=run)
        return sub

    train = command("train", run_train, "Train a network (torchrun ... --no-python sparsebilevel train ...)")
    add_config_flags(train)

    demo = command("demo", run_demo, "Train a small network dense and sparse on the embedded digits, and compare.")
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="folder of the runs and the report")
    demo.add_argument("--epochs", type=int, help="epochs of each run")
    demo.add_argument("--sparsity", type=float, default=0.9, help="fraction of zeros")
    demo.add_argument("--resume", action="store_true", help="continue a demo that was interrupted")

    ablate = command("ablate", run_ablate, "Vary one setting at a time; one run each, in sub-folders of --output-dir.")
    ablate.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="repeat every setting with these seeds")
    help = "values of a field (of lists: 'a b,c'), instead of the method's usual ablations; may be given several times"
    ablate.add_argument("--grid", action="append", metavar="FIELD=V1,V2", help=help)
    add_config_flags(ablate)

    report = command("report", run_report, "Make a page with tables and pictures from run folders.")
    report.add_argument("runs", type=Path, nargs="+", help="run folders, or folders of run folders")
    report.add_argument(
        "-o", "--output", type=Path, default=Path("report"), help="folder, or .html file, to write to [%(default)s]"
    )

    export = command("export", run_export, "Write the trained network for use elsewhere.")
    export.add_argument("run", type=Path, help="run folder or checkpoint")
    export.add_argument(
        "-o", "--output", type=Path, required=True, help="file to write: .pth, .pt, .safetensors or .onnx"
    )
    formats = ("dense", "safetensors", "onnx", "sliced", "2:4")
    export.add_argument("--format", choices=formats, help="form of the network; default by the suffix of the output")
    export.add_argument("--client", type=int, help="of a federated run, the device whose network to write")

    bench = command("bench", run_bench, "Measure every sparse layer, and a training step, against the dense network.")
    bench.add_argument("model", help="name of a model, or folder of a run")
    bench.add_argument("--sparsity", type=float, help="fraction of zeros of a named model [0.9]")
    bench.add_argument("--distribution", help="uniform, er, erk or global [uniform]")
    bench.add_argument("--pattern", help="as for train [unstructured]")
    bench.add_argument("-b", "--batch-size", type=int, default=64, help="samples in a batch")
    bench.add_argument("--image-size", type=int, help="height and width of the images")
    bench.add_argument("--num-classes", type=int, help="size of the output [10]")
    bench.add_argument("--device", default="auto", help="cpu, cuda or auto")
    bench.add_argument("--threads", type=int, help="CPU threads")
    bench.add_argument(
        "--tune", metavar="TYPE", help="fp32, bf16 or fp16: first measure the GPU's kernels for it, and keep the times"
    )

    help = "Workers on a graph learn one sparse model (torchrun ... --no-python sparsebilevel decentralized ...)"
    decentralized = command("decentralized", run_decentralized, help)
    if "decentralized" in (sys.argv[1:] if argv is None else argv):  # its choices are torch's side of the package
        from .decentralized import add_flags

        add_flags(decentralized)

    help = (
        "Clients with data of their own learn a pruned model with a sub-network for every device (torchrun shares work)"
    )
    federated = command("federated", run_federated, help)
    if "federated" in (sys.argv[1:] if argv is None else argv):
        from .federated import add_flags as add_federated_flags

        add_federated_flags(federated)

    command("config", run_config, "Show what was built, what is installed, and what each part needs.")
    command("presets", run_presets, "List the recipes that --preset takes.")
    return parser


# -- flags from fields ------------------------------------------------------------------------------------------------


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """``--preset``, ``--config`` and a flag for every field; what is not given leaves no trace in the namespace."""
    group = parser.add_argument_group("where to start from (flags win over the file, and that over the preset)")
    group.add_argument("--preset", metavar="NAME", help="start from a recipe; `sparsebilevel presets` lists them")
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="start from a JSON file, such as a run's config.json"
    )
    types = field_types()
    for field in dataclasses.fields(Config):
        if field.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[field.name])
        kind, optional = types[field.name]
        flags = ("--" + field.name.replace("_", "-"), *ALIASES.get(field.name, ()))
        default = "" if field.default in (None, (), False) else f" [{field.default}]"
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        options["help"] = (field.metadata["help"] + default).replace("%", "%%")
        if kind is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
        elif kind is tuple:
            group.add_argument(*flags, nargs="*", metavar="NAME", **options)
        else:
            metavar = None if field.metadata["choices"] else kind.__name__.upper()
            convert = converter(field.name, kind, optional)
            group.add_argument(*flags, type=convert, choices=field.metadata["choices"], metavar=metavar, **options)


def converter(name: str, kind: type, optional: bool) -> Callable[[str], Any]:
    """What reads the values of a field: those of its flag, and of ``ablate --grid`` also true, false, and ``a b``."""
    from ..training.config import parse_amount

    own: dict[type, Callable[[str], Any]] = {bool: _parse_bool, tuple: lambda text: tuple(text.split())}
    read = parse_amount if name == "validation" else own.get(kind, kind)

    def convert(text: str) -> Any:
        is_unset = optional and text == "none" and name not in ("implicit", "rewind")  # of which it is a value
        return None if is_unset else read(text)

    convert.__name__ = kind.__name__  # argparse's messages say "invalid int value"
    return convert


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def config_from(args: argparse.Namespace) -> Config:
    """Explicit flags, over the file, over the preset, over the defaults."""
    from ..training.presets import PRESETS

    values: dict[str, Any] = {}
    if args.preset is not None:
        if args.preset not in PRESETS:
            raise ValueError(f"preset={args.preset!r} is not known; allowed: {', '.join(PRESETS)}")
        values |= PRESETS[args.preset]
    if args.config is not None:
        values |= read_config(args.config)
    if getattr(args, "resume", False) and args.preset is args.config is None:
        values |= _stored_config(getattr(args, "output_dir", Config.output_dir))
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if hasattr(args, field.name)}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if "method" in given:  # of another one's recipe what it has no use for goes
        foreign = Config(**values).options_unknown_to(given["method"])
        dropped = {name: value for name, value in foreign.items() if name not in given}
        values |= dropped
        if dropped and not given.get("quiet"):
            print(f"method={given['method']} has no {', '.join(dropped)}: left out")
    return Config(**check_fields(values | given, "configuration"))


def _stored_config(folder: str) -> dict[str, Any]:
    """What the run in ``folder`` was started with, so that resuming it needs no flags; empty where there is no run."""
    path = Path(folder) / "config.json"
    return read_config(path) if path.exists() else {}


# -- commands ---------------------------------------------------------------------------------------------------------


def run_train(args: argparse.Namespace) -> None:
    from ..training.loop import train

    config = config_from(args)
    result = train(config)
    if result.get("costs") and not config.quiet:
        from .tables import result_table

        print(result_table(result))
        print(f"run folder: {config.output_dir}")


def run_demo(args: argparse.Namespace) -> None:
    from .demo import demo

    demo(args.output_dir, args.sparsity, args.epochs, args.resume)


def run_ablate(args: argparse.Namespace) -> None:
    from .ablate import ablate

    ablate(config_from(args), args.grid, args.seeds)


def run_report(args: argparse.Namespace) -> None:
    from ..report import make_report, print_table, read_runs

    runs = [run.path for run in read_runs(find_runs(args.runs))]  # what it leaves out it says once
    page = make_report(runs, args.output)
    print(f"{print_table(runs)}\nreport: {page}")


def run_export(args: argparse.Namespace) -> None:
    from ..export import export_model

    path = export_model(args.run, args.output, args.format, client=args.client)
    print(f"written: {path}, {path.stat().st_size / 1e6:.3g} MB")


def run_bench(args: argparse.Namespace) -> None:
    from .bench import bench

    bench(**{k: v for k, v in vars(args).items() if k not in ("command", "traceback")})


def run_decentralized(args: argparse.Namespace) -> None:
    from .decentralized import decentralized

    decentralized(args)


def run_federated(args: argparse.Namespace) -> None:
    from .federated import federated

    federated(args)


def run_config(args: argparse.Namespace) -> None:
    from ..__config__ import show

    show()


def run_presets(args: argparse.Namespace) -> None:
    from ..training.presets import PRESETS

    for name, values in PRESETS.items():
        shown = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in values.items()}
        print(f"{name:28} {' '.join(f'{k}={v}' for k, v in shown.items())}")


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Folders with a log among ``paths`` and directly or indirectly below them, in order of name.

    Raises:
        FileNotFoundError: a path that is not there, or no log in any of them.
    """
    runs, empty = [], []
    for path in paths:
        found = sorted(file.parent for file in path.rglob("log.jsonl"))
        message = f"{path} is no run folder and holds none (no log.jsonl)"
        if not path.exists():
            raise FileNotFoundError(message)
        empty += [] if found else [message]
        runs += [run for run in found if run not in runs]
    if not runs:
        raise FileNotFoundError("; ".join(empty))
    for message in empty:
        warnings.warn(f"{message}; it is left out", stacklevel=2)
    return runs


if __name__ == "__main__":
    main()
