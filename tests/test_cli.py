"""The command line: flags are the fields of `Config`, bad input is one line, and every command does its work."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import sparsebilevel
from sparsebilevel import cli
from sparsebilevel.cli import ablate
from sparsebilevel.kernels import native
from sparsebilevel.training.config import Config, check_fields, field_types
from sparsebilevel.training.presets import PRESETS
from sparsebilevel.training.runlog import read_log

TINY = ["--epochs", "1", "--batch-size", "256", "--no-measure", "--quiet"]


def config_of(*arguments):
    return cli.config_from(cli.make_parser().parse_args(["train", *arguments]))


def refused(capsys, *arguments):
    """The one line with which the command refuses ``arguments``."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, arguments)))
    output = capsys.readouterr()
    assert (stopped.value.code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


# -- configuration ----------------------------------------------------------------------------------------------------


def test_version_and_help(capsys):
    for flag, text in (("--version", f"sparsebilevel {sparsebilevel.__version__}"), ("--help", "COMMAND")):
        with pytest.raises(SystemExit) as stopped:
            cli.main([flag])
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out
    cli.main([])
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["train"], ["bench"]])
def test_help_does_without_torch(command, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from sparsebilevel.cli import main; main()"
    start = [sys.executable, "-c", code]
    run = subprocess.run([*start, *command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "usage: sparsebilevel" in run.stdout


def test_every_field_is_a_flag():
    assert config_of() == Config()
    examples = {int: "3", float: "0.25", str: "text", bool: None, tuple: "a b"}
    for field in dataclasses.fields(Config):
        kind, _ = field_types()[field.name]
        value = (field.metadata["choices"] or [None])[-1] or examples[kind]
        arguments = ["--" + field.name.replace("_", "-"), *([] if value is None else value.split())]
        expected = {bool: True, tuple: ("a", "b")}.get(kind) or kind(value)
        assert getattr(config_of(*arguments), field.name) == expected, field.name
    assert all(field.metadata["help"] for field in dataclasses.fields(Config))


def test_help_lists_every_flag_under_a_title(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    _, *groups = capsys.readouterr().out.split("\n\n")
    titles = [group.split(":")[0].strip() for group in groups]
    assert titles[0].startswith("Train a network")
    assert {"sparsity", "training", "machine", "run"} < set(titles)
    own = groups[titles.index("options")]
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)}
    assert not any(f"{flag} " in own for flag in flags)
    assert all(any(f"{flag} " in group or f"{flag}," in group for group in groups) for flag in flags)
    assert "--lr-warmup-epochs" in groups[titles.index("training")]


def test_torchvision_names_and_numbers():
    config = config_of("--model", "resnet20", "-b", "8", "--wd", "1e-4", "-j", "2", "--validation", "500")
    assert (config.arch, config.batch_size, config.weight_decay, config.workers) == ("resnet20", 8, 1e-4, 2)
    assert config.validation == 500
    assert isinstance(config.validation, int)
    assert config_of("--validation", "0.1").validation == 0.1
    assert config_of("--finetune-lr", "none").finetune_lr is None
    assert config_of("--rewind", "none").rewind == "none"


def test_sparsity_by_layer():
    config = config_of("--sparsity", "0.9", "--layer-sparsity", "layer1.*=0.8", "fc=0")
    assert config.target() == {"layer1.*": 0.8, "fc": 0.0, "*": 0.9}
    assert config_of("--sparsity", "0.95").target() == 0.95


def test_flags_win_over_file_over_preset(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"lr": 0.5, "epochs": 7, "exclude": ["fc"], "versions": {}}))
    config = config_of("--preset", "bidst-resnet32x2-cifar10", "--config", str(file), "--epochs", "3")
    assert (config.batch_size, config.lr, config.epochs, config.exclude) == (64, 0.5, 3, ("fc",))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = config_of("--preset", name)
    config.validate()
    check_fields(PRESETS[name], name)
    if config.method != "dense":
        config.method_arguments(steps_per_epoch=100, total_steps=100 * config.epochs)
    if config.data.startswith(("cifar", "digits")):
        model = sparsebilevel.models.create_model(config.arch, 10)
        sparsebilevel.sparsify(model, 0.9, exclude=config.exclude)
        left = [name for name, m in model.named_modules() if type(m).__name__ in ("Conv2d", "Linear")]
        assert bool(left) == bool(config.exclude)


def test_a_run_can_be_repeated_from_its_config(tmp_path):
    cli.main(["train", "--method", "rigl", "--update-freq", "2", *TINY, "--output-dir", str(tmp_path / "a")])
    file = str(tmp_path / "a" / "config.json")
    cli.main(["train", "--config", file, "--output-dir", str(tmp_path / "b")])
    a, b = (read_log(tmp_path / name)[-1]["test_acc"] for name in "ab")
    assert a == b


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--methd", "bidst"], "unrecognized arguments: --methd"),
        (["train", "--batch-size", "many"], "argument --batch-size/-b: invalid int value: 'many'"),
        (["train", "--batch-size", "0"], "batch_size=0 is not allowed"),
        (["train", "--sparsity", "1"], "sparsity=1.0 is not allowed; expected a number in [0, 1)"),
        (["train", "--method", "magic"], "invalid choice: 'magic'"),
        (["train", "--preset", "magic"], "preset='magic' is not known; allowed: bidst-resnet32x2-cifar10"),
        (["train", "--config", "nowhere.json"], "nowhere.json"),
        (["train", "--method", "static", "--tau", "1"], "method static has no such option"),
        (["report", "nowhere"], "nowhere is no run folder"),
        (["export", "nowhere", "-o", "x.pth"], "nowhere"),
        (["export", "nowhere", "-o", "x.foo"], "output='x.foo' is not allowed; expected a name that ends in .pth, .pt"),
        (["bench", "resnet20000"], "unknown model 'resnet20000'"),
        (["bench", "digits_cnn", "-b", "0"], "batch_size=0 is not allowed"),
        (
            ["bench", "digits_cnn", "--threads", "0"],
            "threads=0 is not allowed; expected a whole number, from 1 to 4096",
        ),
        (["bench", "digits_cnn", "--threads", "100000"], "threads=100000 is not allowed"),
        (["bench", "digits_cnn", "--num-classes", "-1"], "num_classes=-1 is not allowed"),
        (["ablate", "--method", "rigl"], "method='rigl' has no usual ablation"),
        (["ablate", "--grid", "colour=red"], "grid='colour=red' is not allowed"),
        (["ablate", "--grid", "method=rigl,magic"], "method='magic' is not known; allowed: dense, static"),
        (["ablate", "--grid", "tau=warm"], "tau takes values of type float"),
        (["ablate", "--grid", "gumbel=yes"], "gumbel takes values of type bool"),
        (["ablate", "--grid", "seed=0,1"], "grid='seed=0,1' is not allowed; every run has its own seed"),
        (["ablate", "--grid", "lr=0.1,0.10"], "lr=0.1 with seed 0 is asked for twice"),
        (["ablate", "--grid", "lr=0.1", "--seeds", "3", "3"], "default with seed 3 is asked for twice"),
        (["ablate", "--grid", "lr=0.1", "--seeds", "0", "-1", *TINY], "seed=-1 is not allowed"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list; expected an object"),
        ('{"colour": 1}', "has unknown fields colour"),
        ('{"epochs": "three"}', "epochs='three' is not allowed; expected int"),
        ('{"epochs": null}', "epochs=None is not allowed"),
        ('{"epochs": true}', "epochs=True is not allowed"),
        ('{"exclude": "fc"}', "exclude='fc' is not allowed; expected a list of texts"),
        ('{"layer_sparsity": [3]}', "layer_sparsity=(3,) is not allowed; expected a list of texts"),
    ],
)
def test_bad_config_file(content, message, capsys, tmp_path):
    (tmp_path / "c.json").write_text(content)
    assert message in refused(capsys, "train", "--config", tmp_path / "c.json", "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bugs_are_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "config_from", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_traceback_on_request():
    with pytest.raises(ValueError, match="batch_size=0"):
        cli.main(["--traceback", "train", "--batch-size", "0"])


# -- commands ---------------------------------------------------------------------------------------------------------


def test_train_prints_progress_and_a_table(tmp_path, capsys):
    flags = ["--method", "bidst", "--update-freq", "2", "--epochs", "1", "--batch-size", "256"]
    cli.main(["train", *flags, "--output-dir", str(tmp_path)])
    output = capsys.readouterr().out
    for text in ("epoch   1/1", "test accuracy", "compression ratio", "FLOPs, theoretical", "topology changes"):
        assert text in output
    assert "x, " in output.partition("time of a training step")[2]  # against dense, in words


def test_python_m(tmp_path):
    command = [sys.executable, "-m", "sparsebilevel", "train", "--batch-size", "0", "--output-dir", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: batch_size=0 is not allowed")


def test_resuming_needs_no_flags(tmp_path, capsys):
    flags = ["--method", "rigl", "--update-freq", "2", "--epochs", "2", "--batch-size", "256", "--no-measure"]
    cli.main(["train", *flags, "--max-steps", "6", "--output-dir", str(tmp_path)])
    cli.main(["train", "--resume", "--output-dir", str(tmp_path)])
    rows = read_log(tmp_path)
    assert (rows[-1]["type"], rows[-1]["epoch"], rows[-1]["method"]) == ("result", 2, "rigl")


def test_demo(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for _ in range(2):  # a second demo replaces the first
        cli.main(["demo", "--epochs", "2", "--output-dir", str(tmp_path)])
    output = capsys.readouterr().out
    for text in ("test accuracy", "same network dense", "realised sparsity", "compression ratio", "FLOPs, executed"):
        assert text in output
    assert "topology changes" in output
    assert (tmp_path / "report.html").exists()
    assert read_log(tmp_path / "bidst")[-1]["topology_changes"] == 19
    (before,) = (tmp_path / "dense").glob("log.jsonl")
    time = before.stat().st_mtime_ns
    cli.main(["demo", "--epochs", "2", "--resume", "--output-dir", str(tmp_path)])
    assert before.stat().st_mtime_ns == time  # it was complete


@pytest.mark.slow
def test_demo_is_within_a_point_of_dense(tmp_path):
    cli.main(["demo", "--output-dir", str(tmp_path)])
    dense, sparse = (read_log(tmp_path / name)[-1] for name in ("dense", "bidst"))
    assert sparse["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert sparse["test_acc"] >= dense["test_acc"] - 0.01


def test_ablate(tmp_path, capsys):
    flags = ["--method", "bip", *TINY, "--output-dir", str(tmp_path)]
    cli.main(["ablate", *flags, "--seeds", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "default",
        *("implicit_scale=0", "implicit_scale=1", "implicit_scale=2000"),
    ]
    assert all("+-" in line for line in lines[2:])
    assert all("continuous, IoU 0." in line for line in lines[2:])
    assert len(list(tmp_path.glob("*/log.jsonl"))) == 8
    cli.main(["ablate", *flags, "--grid", "implicit_scale=0", "--resume"])  # nothing is trained again
    again = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in again[2:]] == ["default", "implicit_scale=0"]


@pytest.mark.parametrize("size", [["-b", 10**11], ["-b", 2**62], ["--num-classes", 10**13]])
def test_what_does_not_fit_into_memory_is_one_line(size, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "digits_cnn", *map(str, size)])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: out of memory; smaller batches")


def test_the_runs_of_a_grid_over_paths_stay_in_the_folder(tmp_path, monkeypatch):
    folders = []
    result = {"test_acc": 0.5, "time_total_s": 1.0, "sparsity": 0.9}
    monkeypatch.setattr(ablate, "train", lambda run: folders.append(run.output_dir) or result)
    ablate.ablate(Config(method="static", output_dir=str(tmp_path), quiet=True), ["init_from=../../dense.pth"])
    assert folders == [str(tmp_path / name) for name in ("default-seed0", "init_from=.._.._dense.pth-seed0")]


def test_a_grid_over_methods_leaves_out_what_a_method_does_not_have(tmp_path, capsys):
    flags = ["--preset", "bip-resnet20-cifar10", "--arch", "mlp", "--data", "digits", "--epochs", "1", "-b", "256"]
    flags += ["--pretrain-epochs", "1", "--finetune-epochs", "1", "--no-measure", "--max-steps", "2"]
    cli.main(["ablate", *flags, "--grid", "method=dense,rigl,bidst", "--output-dir", str(tmp_path)])
    output = capsys.readouterr().out
    for method, options in (
        ("dense", "upper_split, finetune_epochs, pretrain_epochs"),
        ("rigl", "upper_split, finetune_epochs"),
        ("bidst", "upper_split, finetune_epochs"),
    ):
        assert output.count(f"method={method} has no {options}: left out") == 1
        config = json.loads((tmp_path / f"method={method}-seed0" / "config.json").read_text())
        assert (config["method"], config["upper_split"], config["finetune_epochs"]) == (method, None, 0)
    assert json.loads((tmp_path / "default-seed0" / "config.json").read_text())["upper_split"] == "same"


def test_usual_ablations():
    grid = ablate.usual_grid(Config(method="bidst"))
    assert {0.01, 0.1} <= set(grid["search_space"])
    assert {1e1, 1e7} <= set(grid["implicit_scale"])  # lambda from 1e-1 to 1e-7
    assert ablate.usual_grid(Config(method="bip", weight_decay=1.0)) == {"implicit_scale": [0.0, 1.0]}
    assert ablate.parse_grid(["gumbel=true,false", "update-freq=8ep"]) == {
        "gumbel": [True, False],
        "update_freq": ["8ep"],
    }


def test_a_grid_reads_values_as_the_flags_do():
    texts = ["exclude=fc,fc conv1", "validation=100,0.2", "clip_grad_norm=none,1", "rewind=none,init", "lr=1"]
    assert ablate.parse_grid([*texts, "lr=2"]) == {
        "exclude": [("fc",), ("fc", "conv1")],
        "validation": [100, 0.2],
        "clip_grad_norm": [None, 1.0],
        "rewind": ["none", "init"],
        "lr": [1.0, 2.0],
    }
    assert isinstance(ablate.parse_grid(texts)["validation"][0], int)


def test_close_values_have_folders_of_their_own(tmp_path, capsys):
    flags = ["--method", "static", "--arch", "mlp", *TINY, "--max-steps", "1", "--output-dir", str(tmp_path)]
    cli.main(["ablate", *flags, "--grid", "lr=0.1,0.10000001", "--grid", "exclude=1,1 3"])
    labels = ["default", "lr=0.1", "lr=0.10000001", "exclude=1", "exclude=1 3"]
    folders = sorted(f"{label}-seed0" for label in labels if label != "lr=0.1")  # which is the default
    assert sorted(path.name for path in tmp_path.iterdir()) == folders
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == labels
    assert [cell.strip() for cell in rows[0][1:] if cell] == [cell.strip() for cell in rows[1][1:] if cell]


def test_report_and_export(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    cli.main(["train", "--method", "static", *TINY, "--output-dir", str(tmp_path / "runs" / "a")])
    cli.main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    cli.main(["report", "runs"])
    assert set(tmp_path.iterdir()) - before == {tmp_path / "report"}  # all of it in one folder
    output = capsys.readouterr().out
    assert "digits_cnn on digits\n  method  seeds" in output
    assert "report: report/report.html" in output
    federated = tmp_path / "runs" / "federated" / "dwnp"
    federated.mkdir(parents=True)
    (federated / "log.jsonl").write_text('{"round": 1}\n')
    (federated.parent / "facts.json").write_text("{}")
    (tmp_path / "runs" / "empty").mkdir()
    with pytest.warns(UserWarning, match="left out") as warned:
        cli.main(["report", *(f"runs/{name}" for name in ("a", "empty", "federated"))])
    said = [str(w.message) for w in warned if "left out" in str(w.message)]
    assert ["empty is no run" in said[0], "dwnp is of a federated run" in said[1], len(said)] == [True, True, 2]
    assert "report: report/report.html" in capsys.readouterr().out
    assert "runs/empty is no run folder" in refused(capsys, "report", "runs/empty")
    assert "is of a federated run" in refused(capsys, "report", "runs/federated")
    cli.main(["export", str(tmp_path / "runs" / "a"), "-o", str(tmp_path / "dense.pth")])
    assert (tmp_path / "dense.pth").exists()
    size = (tmp_path / "dense.pth").stat().st_size / 1e6
    assert f"written: {tmp_path / 'dense.pth'}, {size:.3g} MB" in capsys.readouterr().out


def test_bench(tmp_path, capsys):
    cli.main(["train", "--method", "static", *TINY, "--output-dir", str(tmp_path)])
    for model in ("digits_cnn", str(tmp_path)):
        cli.main(["bench", model, "-b", "4"])
        output = capsys.readouterr().out
        assert "Static: sparsity 0.9000 over 5 weights" in output
        assert "not measured" not in output
        assert "training step, batch 4" in output
        last = output.splitlines()[-1]
        assert ("x; optimize_for_cpu " in last) == native.available()
        for part in ("cpu, ", "threads: dense ", " ms; sparse layers "):
            assert part in last
    cli.main(["bench", "mlp", "-b", "4"])
    assert "optimize_for_cpu" not in capsys.readouterr().out  # it has no convolution


def test_bench_measures_the_masks_of_a_run(tmp_path, capsys):
    """Which keep other counts than the target shares out evenly."""
    flags = ["--method", "omp", "--distribution", "global", *TINY]
    cli.main(["train", *flags, "--output-dir", str(tmp_path)])
    rows = next(row for row in read_log(tmp_path) if row["type"] == "layers")["layers"]
    config = json.loads((tmp_path / "config.json").read_text())
    del config["image_size"]  # as of a version that did not have the field yet
    (tmp_path / "config.json").write_text(json.dumps(config))
    cli.main(["bench", str(tmp_path), "-b", "4"])
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    for row in rows:
        assert table[row["name"]][2] == f"{1 - row['density']:.4f}"
    assert len({row["density"] for row in rows}) > 1


def test_bench_of_a_run_needs_no_data(tmp_path, capsys):
    flags = ["--method", "static", *TINY, "--data", "fake", "--num-samples", "256"]
    cli.main(["train", *flags, "--output-dir", str(tmp_path)])
    config = json.loads((tmp_path / "config.json").read_text()) | {"data": "cifar10", "data_path": str(tmp_path / "no")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    torch.save(checkpoint | {"config": checkpoint["config"] | {"data": "cifar10"}}, tmp_path / "checkpoint.pth")
    cli.main(["bench", str(tmp_path), "-b", "4"])
    assert "sparsity 0.9000 over 5 weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [("--sparsity", "0.5"), ("--pattern", "filter"), ("--image-size", "32"), ("--num-classes", "7")], ids=str
)
def test_bench_of_a_run_takes_no_flags_of_a_model(tmp_path, capsys, flags):
    (tmp_path / "config.json").write_text("{}")
    name = flags[0].strip("-").replace("-", "_")
    assert f"is not allowed with a run, which has its own: {tmp_path}" in (
        message := refused(capsys, "bench", tmp_path, *flags)
    )
    assert f"{name}=" in message


def test_bench_of_a_run_without_masks(tmp_path, capsys):
    cli.main(["train", "--method", "dense", "--arch", "mlp", *TINY, "--output-dir", str(tmp_path)])
    message = refused(capsys, "bench", tmp_path)
    assert f"the run in {tmp_path} has no masks; give the name of its model, mlp, and --sparsity" in message


def test_bench_tunes_on_gpus_only(capsys):
    assert "tune='int8' is not known; allowed: fp32, bf16, fp16" in refused(capsys, "bench", "mlp", "--tune", "int8")
    message = refused(capsys, "bench", "mlp", "--tune", "bf16", "--device", "cpu")
    assert "example_input is on cpu, where no kernel has to be measured; expected a GPU" in message


def test_bench_of_a_network_that_takes_one_image_size_only(capsys):
    try:
        sparsebilevel._torchvision.import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    message = refused(capsys, "bench", "vit_b_16", "--image-size", "96")
    assert "image_size=96 is not allowed; vit_b_16 takes images of 224x224 only" in message
    assert "image_size=0 is not allowed" in refused(capsys, "bench", "resnet20", "--image-size", "0")


def test_config_and_presets(capsys):
    cli.main(["config"])
    assert "C++ extension" in capsys.readouterr().out
    cli.main(["presets"])
    assert "bidst-resnet50-imagenet" in capsys.readouterr().out


def test_the_config_of_a_run_is_a_recipe_and_no_place(tmp_path, capsys):
    first = [
        "train",
        "--method",
        "static",
        *TINY,
        "--output-dir",
        str(tmp_path / "a"),
        "--overwrite",
        "--max-steps",
        "3",
    ]
    cli.main(first)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["overwrite"]
    args = cli.make_parser().parse_args(["train", "--config", str(tmp_path / "a" / "config.json")])
    config = cli.config_from(args)
    assert (config.method, config.overwrite, config.max_steps, config.output_dir) == (
        "static",
        False,
        None,
        "runs/train",
    )


def test_a_recipe_for_another_method(capsys):
    args = cli.make_parser().parse_args(["train", "--preset", "bidst-digits", "--method", "static"])
    config = cli.config_from(args)
    config.validate()
    assert (config.method, config.update_freq) == ("static", None)
    assert "method=static has no update_freq" in capsys.readouterr().out
    args = cli.make_parser().parse_args(["train", "--preset", "bidst-digits", "--update-freq", "none"])
    assert cli.config_from(args).update_freq is None
    args = cli.make_parser().parse_args(["train", "--preset", "bidst-digits", "--implicit", "none"])
    assert cli.config_from(args).implicit == "none"
    args = cli.make_parser().parse_args(["train", "--preset", "bidst-digits", "--method", "set", "--tau", "2"])
    with pytest.raises(ValueError, match="tau=2.0: method set has no such option"):
        cli.config_from(args).validate()


def test_runs_that_diverge_do_not_end_an_ablation(tmp_path, capsys):
    flags = ["--method", "static", *TINY, "--arch", "mlp", "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        cli.main(["ablate", *flags, "--grid", "lr=1e30,0.05"])
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert "1 of 3 runs did not come to an end: lr=1e+30, seed 0" in captured.err
    rows = {line.split("  ")[0]: line for line in captured.out.splitlines()}
    assert rows["lr=1e+30"].split()[1] == "diverged"
    assert (tmp_path / "lr=0.05-seed0" / "log.jsonl").exists()


def test_runs_that_differ_in_where_and_how_long_are_not_the_same(tmp_path):
    flags = ["--method", "static", "--arch", "mlp", *TINY, "--max-steps", "1", "--output-dir", str(tmp_path)]
    cli.main(["ablate", *flags, "--grid", "max_steps=1,2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["default-seed0", "max_steps=2-seed0"]
