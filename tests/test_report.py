"""Reports from fabricated run folders: figures that can be checked by hand, incomplete and damaged runs, the page."""

import base64
import builtins
import json
import math
import re
import sys

import pytest

from sparsebilevel.report import group_runs, make_report, print_table, read_run, read_runs

needs_matplotlib = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("matplotlib"), reason="matplotlib is not installed"
)


@pytest.fixture
def fabricate(tmp_path):
    """A function that writes the folder of a run: three epochs, two changes of topology, and a result."""

    def write(name, method="rigl", seed=0, sparsity=0.9, accuracy=0.9, complete=True, epochs=3, **config):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {
            **{"method": method, "arch": "resnet20", "data": "cifar10", "sparsity": sparsity, "distribution": "erk"},
            **{"pattern": "unstructured", "seed": seed, "epochs": 3, "output_dir": str(folder), "implicit": None},
            **{"versions": {"torch": "2"}, "resolved": {}},
            **config,
        }
        (folder / "config.json").write_text(json.dumps(config))
        real = 0.0 if method == "dense" else sparsity - 0.0002
        rows = []
        for epoch in range(1, epochs + 1):
            row = {"type": "epoch", "epoch": epoch, "phase": "train", "step": 100 * epoch, "lr": 0.1, "sparsity": real}
            row |= {"train_loss": math.exp(-epoch), "train_acc": 0.8, "test_acc": accuracy - 0.3 / epoch**2}
            if method == "bidst":
                row |= {"direct": 0.1 / epoch, "implicit": 0.01 / epoch}
            rows.append(row)
            if method not in ("dense", "static") and epoch < 3:
                rows.append(
                    {"type": "topology", "step": 100 * epoch, "iou": 1 - 0.2 / epoch, "grown": 5, "time_s": 0.1}
                )
        if complete:
            names = ["conv1", *(f"stages.{i // 6}.{i // 2 % 3}.conv{i % 2 + 1}" for i in range(18)), "fc"]
            layers = [
                {"name": n, "shape": [4, 4], "total": 16, "nonzero": 2, "density": max(1 - real - i / 300, 0.004)}
                for i, n in enumerate(names)
            ]
            density = 1 - real
            costs = {"sparsity": real, "compression": 1 / density, "speedup": 0.8 / density, "size_bytes": 1_234_567}
            costs |= {"flops_dense": 81e6, "flops_theoretical": 81e6 * density / 0.8, "flops_executed": 81e6}
            rows += [] if method == "dense" else [{"type": "layers", "layers": layers}]
            result = {"type": "result", "test_acc": accuracy, "test_acc_selected": accuracy - 0.01, "costs": costs}
            changes = 0 if method in ("dense", "static") else 2
            result |= {"topology_changes": changes, "time_total_s": 90.0, "time_step_ratio": 0.95, "sparsity": real}
            rows.append(result)
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def test_seeds_are_averaged_and_compared_with_dense(fabricate, tmp_path):
    for seed, accuracy in enumerate((0.92, 0.93)):
        fabricate(f"dense{seed}", "dense", seed, accuracy=accuracy)
    for seed, accuracy in enumerate((0.90, 0.91, 0.92)):
        fabricate(f"rigl{seed}", "rigl", seed, accuracy=accuracy, init_from=f"dense{seed}.pth")
    text = print_table(tmp_path)
    lines = text.splitlines()
    assert lines[0] == "resnet20 on cifar10"
    assert re.split(r"\s{2,}", lines[2].strip()) == [
        *(
            "dense",
            "2",
            "-",
            "-",
            "1.00x",
            "0.80x",
            "1.235",
            "92.50 ± 0.71",
            "-",
            "91.50 ± 0.71",
            "0",
            "0.95x",
            "90.0 s",
        )
    ]
    assert re.split(r"\s{2,}", lines[3].strip()) == [
        *("rigl", "3", "0.9", "0.8998", "9.98x", "7.98x", "1.235", "91.00 ± 1.00", "-1.50", "90.00 ± 1.00", "2"),
        *("0.95x", "90.0 s"),
    ]
    assert len(lines) == 4  # nothing to note


def test_masks_that_change_at_every_step_are_not_said_to_change_never(fabricate, tmp_path):
    fabricate("static", "static")
    for seed, overlap in enumerate((0.5, 0.7)):
        log = fabricate(f"bip{seed}", "bip", seed) / "log.jsonl"
        *others, result = log.read_text().splitlines()
        rows = [row for row in map(json.loads, others) if row["type"] != "topology"]
        rows[-2]["mask_iou_start"] = overlap  # of the last epoch; the layers come after it
        result = json.loads(result) | {"topology_changes": 0} | ({"mask_iou_start": overlap} if seed else {})
        log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, result]))
    rows = {line.split()[0]: line for line in print_table(tmp_path).splitlines() if line.strip()}
    assert "continuous, IoU 0.60" in rows["bip"]
    assert re.split(r"\s{2,}", rows["static"].strip())[-3] == "0"


def test_unequal_conditions_are_noted(fabricate, tmp_path):
    fabricate("dense", "dense", distribution="uniform", epochs=3)
    fabricate("a", "rigl")
    assert "differ in" not in print_table(tmp_path)
    fabricate("b", "static", distribution="uniform", lr=0.2)
    assert "beside method and sparsity, rows differ in distribution, lr." in print_table(tmp_path)


def test_sparsity_by_layer_is_said(fabricate, tmp_path):
    fabricate("a", "rigl", layer_sparsity=["fc=0"])
    assert "0.9, by layer" in print_table(tmp_path)


def test_of_several_dense_runs_the_one_of_the_same_recipe_is_the_baseline(fabricate, tmp_path):
    fabricate("other", "dense", accuracy=0.5, lr=0.01)
    fabricate("same", "dense", accuracy=0.9, lr=0.1)
    fabricate("rigl", "rigl", accuracy=0.91, lr=0.1)
    fabricate("set", "set", accuracy=0.91, lr=0.5)
    rows = {line.split()[0]: line for line in print_table(tmp_path).splitlines() if line.strip()}
    assert "+1.00" in rows["rigl"]  # and not +41.00, against the other one
    assert "+" not in rows["set"]


def test_configurations_that_differ_stay_apart_and_say_in_what(fabricate):
    runs = [
        fabricate("a", "bidst", implicit="derived"),
        fabricate("b", "bidst", implicit="none"),
        fabricate("c", "bidst", implicit="none", seed=1),
        fabricate("d", "bidst", sparsity=0.95, implicit="none"),
        fabricate("e", "rigl", arch="vgg19_bn_cifar"),
    ]
    groups = group_runs(read_runs(runs))
    assert [(g.label, len(g.runs), g.config["sparsity"]) for g in groups] == [
        ("bidst (implicit=derived)", 1, 0.9),
        ("bidst (implicit=none)", 2, 0.9),
        ("bidst (implicit=none)", 1, 0.95),
        ("rigl", 1, 0.9),
    ]
    text = print_table(runs)
    assert "vgg19_bn_cifar on cifar10" in text
    assert "no complete dense run is among these" in text


def test_labels_say_what_differs_and_no_more(fabricate):
    runs = [
        fabricate("default", "bidst"),
        fabricate("older", "bidst", seed=1, tau=None),
        fabricate("tau", "bidst", tau=2.0),
        fabricate("both", "bidst", search_space=0.1, lr_min=0.01, lr_gamma=0.5),
    ]
    assert [(g.label, len(g.runs)) for g in group_runs(read_runs(runs))] == [
        ("bidst", 2),
        ("bidst (tau=2.0)", 1),
        ("bidst (search_space=0.1)", 1),  # the other fields differ together with it
    ]


def test_runs_of_one_seed_are_no_seeds(fabricate):
    runs = [fabricate(f"s{seed}", seed=seed) for seed in (0, 1)]
    assert seeds_of(runs) == "2"
    runs += [fabricate(f"again{i}", seed=1, init_from=f"other{i}.pth") for i in (0, 1)]
    labels = {group.label: len(group.runs) for group in group_runs(map(read_run, runs))}
    assert labels == {"rigl": 2, "rigl (init_from)": 2}
    assert seeds_of(runs[2:]) == "2 runs, 1 seed"
    cut = fabricate("cut", seed=2, max_steps=50)
    assert [len(group.runs) for group in group_runs(map(read_run, [*runs[:2], cut]))] == [2, 1]


def seeds_of(runs):
    """What stands under "seeds", in the first row."""
    return re.split(r"\s{2,}", print_table(runs).splitlines()[2].strip())[1]


def test_incomplete_runs_are_listed_and_do_not_count(fabricate, tmp_path):
    fabricate("full", seed=0, accuracy=0.9)
    fabricate("cut", seed=1, accuracy=0.1, complete=False, epochs=2)
    fabricate("new", seed=2, complete=False, epochs=0)
    text = print_table(tmp_path)
    assert "1 of 3" in text
    assert "90.00" in text
    assert "cut is incomplete (after epoch 2)" in text
    assert "new is incomplete (before its first epoch ended)" in text


def test_damaged_last_line_is_left_out_with_a_warning(fabricate):
    folder = fabricate("run", complete=False)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"type": "epoch", "epo')
    with pytest.warns(UserWarning, match=r"last line of .*log\.jsonl is damaged"):
        assert len(read_run(folder).epochs) == 3


def test_seeds_of_which_one_has_no_finite_accuracy(fabricate):
    assert "nan ± nan" in print_table([fabricate("a", accuracy=math.nan), fabricate("b", seed=1)])
    plots = pytest.importorskip("sparsebilevel._plots", exc_type=ImportError)
    assert all(map(math.isnan, plots._percent([math.nan, 0.5])))


def test_damaged_files_are_named(fabricate, tmp_path):
    folder = fabricate("run")
    log = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text("nonsense\n" + log)
    with pytest.raises(ValueError, match=r"line 1 of .*log\.jsonl is damaged: 'nonsense'"):
        read_run(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_run(folder)


def test_folders_without_a_run_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{folder} holds no run")):
            print_table(folder)
        with pytest.raises(FileNotFoundError, match="holds no run"):
            make_report([folder], tmp_path / "out")
    with pytest.raises(ValueError, match="run_dirs is empty"):
        print_table([])
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_among_runs_is_passed_over(fabricate, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match="empty holds no run"):
        assert "rigl" in print_table([tmp_path / "empty", fabricate("a", "rigl")])


@pytest.fixture
def of_other_commands(tmp_path):
    """Folders as `federated` and `decentralized` leave them: settings, and a log for each method or algorithm."""
    folders = []
    for command, own, config in (
        ("federated", "dwnp", {"method": ["dwnp"], "data": "digits", "arch": "resnet20"}),
        ("decentralized", "dsgd", {"algorithm": "dsgd", "data": "digits"}),
    ):
        folder = tmp_path / command
        (folder / own).mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / own / "log.jsonl").write_text('{"round": 1}\n')
        folders += [folder, folder / own]
    (tmp_path / "federated" / "facts.json").write_text("{}")
    return folders


def test_runs_of_other_commands_are_passed_over(fabricate, of_other_commands, tmp_path):
    fabricate("a", "rigl")
    for folders, count in ((tmp_path, 2), ([tmp_path / "a", *of_other_commands], 4)):
        with pytest.warns(UserWarning, match="is left out") as warned:
            assert [run.path.name for run in read_runs(folders)] == ["a"]
        assert len(warned) == count
        for command in ("federated", "decentralized"):
            assert any(f"is of a {command} run, which has" in str(w.message) for w in warned)


def test_runs_of_other_commands_alone_are_refused(of_other_commands):
    for folder in of_other_commands:
        with pytest.raises(ValueError, match=r"is of a (federated|decentralized) run.*expected runs of `sparsebil"):
            read_runs(folder)
    with pytest.raises(ValueError, match=r"none of .* holds a run: .*federated run.*; .*decentralized run"):
        read_runs(of_other_commands)


@needs_matplotlib
def test_page_is_one_file_with_its_pictures_beside_it(fabricate, tmp_path):
    fabricate("runs/dense", "dense", accuracy=0.93)
    for seed in range(2):
        for sparsity in (0.9, 0.95):
            for method in ("rigl", "bidst"):
                accuracy = 1 - sparsity + 0.8 + 0.01 * seed
                fabricate(f"runs/{method}-{sparsity}-{seed}", method, seed, sparsity, accuracy)
    page = make_report(tmp_path / "runs", tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    text = page.read_text()
    pictures = re.findall(r'<img alt="(\w+)" src="data:image/png;base64,([^"]+)"', text)
    assert [name for name, _ in pictures] == ["accuracy", "course", "iou", "density", "flops", "terms"]
    for name, data in pictures:
        assert base64.b64decode(data) == (page.parent / f"report_{name}.png").read_bytes()
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)  # nothing is fetched
    assert "<td>90.50 ± 0.71</td>" in text
    assert "Compression is all parameters / non-zero parameters" in text


@needs_matplotlib
def test_many_curves_look_different(fabricate):
    from sparsebilevel import _plots

    runs = [fabricate(f"{i}", "bidst", search_space=i / 100) for i in range(35)]
    groups = group_runs(read_runs(runs))
    styles = _plots._styles(groups)
    looks = [(styles[g.label].colour, _plots._with_sparsity(g, groups, styles[g.label])[1]) for g in groups]
    assert len(set(map(str, looks))) == 35  # where there are no markers
    assert len({(style.colour, style.marker) for style in styles.values()}) == 35  # where there are no lines
    assert sum(len(picture) > 1000 for _, _, picture in _plots.draw(groups)) >= 4


@needs_matplotlib
def test_page_of_what_little_there_is(fabricate, tmp_path):
    folder = fabricate("<b>run", "static", complete=False, epochs=1)
    page = make_report(folder, tmp_path / "page.html")
    assert page == tmp_path / "page.html"
    assert "&lt;b&gt;run is incomplete" in page.read_text()
    assert [p.name for p in tmp_path.glob("*.png")] == ["page_course.png"]
    fabricate("new", "static", complete=False, epochs=0)
    make_report(tmp_path / "new", tmp_path / "empty.html")


def test_missing_matplotlib_says_what_to_install(fabricate, tmp_path, monkeypatch):
    folder = fabricate("run")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "sparsebilevel._plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"sparsebilevel\[report\]"):
        make_report(folder, tmp_path / "out")
    assert "rigl" in print_table(folder)  # the table needs nothing


def test_other_data_processes_and_origins_are_no_repetitions(fabricate):
    """Each may be of the same configuration."""
    facts = {"data_digest": "00000001", "processes": 1}

    def grouped(**resolved):
        runs = [fabricate(f"a{len(list(tmp))}", seed=0, data="imagefolder", data_path="one", resolved=facts)]
        runs.append(fabricate(f"b{len(list(tmp))}", seed=1, data="imagefolder", **resolved))
        tmp.append(runs)
        return [group.label for group in group_runs(map(read_run, runs))], print_table(runs)

    tmp = []
    assert grouped(data_path="copy", resolved=facts)[0] == ["rigl"]
    labels, table = grouped(data_path="two", resolved=facts | {"data_digest": "00000002"})
    assert labels == ["rigl", "rigl"]
    assert "resnet20 on imagefolder in one\n" in table
    assert "resnet20 on imagefolder in two\n" in table
    labels, table = grouped(data_path="one", resolved=facts | {"processes": 2})
    assert labels == ["rigl (1 process)", "rigl (2 processes)"]
    assert "rows differ in the number of processes." in table


def test_networks_pruned_from_others_are_compared_with_those(fabricate):
    dense = {
        epochs: fabricate(f"dense{epochs}", "dense", 0, accuracy=epochs / 100, n_epochs=epochs) for epochs in (1, 50)
    }
    runs = [*dense.values()]
    for epochs, folder in dense.items():
        for seed in (0, 1):
            config = json.loads((folder / "config.json").read_text()) | {"seed": 7 + seed}
            resolved = {"init_from_config": config}
            name = f"omp{epochs}-{seed}"
            runs.append(fabricate(name, "omp", seed, accuracy=0.6, init_from=f"{folder}{seed}", resolved=resolved))
    groups = {group.label: len(group.runs) for group in group_runs(map(read_run, runs))}
    assert groups == {
        "dense (n_epochs=1)": 1,
        "dense (n_epochs=50)": 1,
        "omp (init_from n_epochs=1)": 2,
        "omp (init_from n_epochs=50)": 2,
    }
    rows = [line.split() for line in print_table(runs).splitlines() if line.startswith("  omp")]
    assert ["+59.00" in row for row in rows] == [True, False]
    assert ["+10.00" in row for row in rows] == [False, True]


def test_copies_of_a_run_do_not_count(fabricate):
    runs = [fabricate("one", seed=0, accuracy=0.8), fabricate("two", seed=1, accuracy=0.9)]
    before = print_table(runs)
    runs.append(fabricate("copy", seed=1, accuracy=0.9))
    after = print_table(runs)
    assert after.startswith(before.split("\n\n")[0])
    assert f"{runs[2]} repeats another run, with the same figures, and does not count." in after


def test_of_several_dense_runs_of_one_recipe_none_is_the_baseline(fabricate, tmp_path):
    """Which of them is meant nobody says; a change against the first would be one against chance."""
    fabricate("a", "dense", accuracy=0.5, momentum=0.0)
    fabricate("b", "dense", accuracy=0.9, momentum=0.9)
    fabricate("rigl", "rigl", accuracy=0.91)
    rows = {line.split()[0]: line for line in print_table(tmp_path).splitlines() if line.strip()}
    assert "+" not in rows["rigl"]


def test_runs_that_ended_before_their_first_epoch_are_no_copies(fabricate, tmp_path):
    """They have the same figures, none."""
    for name in "ab":
        fabricate(name, complete=False, epochs=0)
    text = print_table(tmp_path)
    assert text.count("is incomplete (before its first epoch ended)") == 2
    assert "repeats another run" not in text
