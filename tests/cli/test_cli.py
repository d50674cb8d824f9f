"""What the commands print, where, and with which exit code; every mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml

from metadist.config.build import build
from metadist.config.document import requested, shipped_configs


def ok(result):
    assert result.exit_code == 0, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def mistake(result, *expected):
    """One line on stderr, exit code 2, and nothing else."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("WARNING", "meta-step", "resumed"))]
    assert result.exit_code == 2, f"{result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    for text in expected:
        assert text in lines[0], lines[0]
    return lines[0]


# Help and lists -------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "ray", "mlflow", "pyarrow", "numpy", "matplotlib", "yaml")


@pytest.mark.lane("services")
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], []])
def test_help_imports_nothing_heavy_and_is_quick(arguments, tmp_path):
    code = f"""
import sys
sys.argv = ["metadist", *{arguments!r}]
from metadist.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code or not {arguments!r}, end.code
print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=150)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip().splitlines()[-1] == "[]", done.stderr
    assert "train" in done.stdout + done.stderr
    # What it takes of a processor, however busy the machine is: half a second or so.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


@pytest.mark.parametrize("command", ["train", "evaluate", "verify", "list", "cache", "export", "ui"])
def test_every_command_has_help_with_an_example(cli, command):
    assert f"metadist {command}" in ok(cli(command, "--help")).stdout
    assert "Example" in cli(command, "--help").stdout


@pytest.mark.parametrize(
    ("what", "some"), [("algorithms", "maml"), ("tasks", "omniglot"), ("models", "conv4"), ("configs", "sinusoid_maml")]
)
def test_list_describes_each_in_a_line(cli, what, some):
    lines = ok(cli("list", what)).stdout.splitlines()
    assert any(line.split()[0] == some for line in lines)
    assert all(len(line.split()) > 2 for line in lines), "each with a description"
    assert lines == sorted(lines)


def test_list_alone_shows_all_kinds(cli):
    printed = ok(cli("list")).stdout
    for heading, name in (("algorithms", "maml"), ("environments", "bandit"), ("configs", "sinusoid_maml")):
        assert f"{heading}:" in printed.splitlines()
        assert any(line.startswith(name) for line in printed.splitlines())


def test_the_reference_of_keys_is_current_and_complete(cli):
    """Otherwise: metadist list keys > docs/config.md"""
    printed = ok(cli("list", "keys")).stdout
    assert (Path(__file__).parents[2] / "docs/config.md").read_text() == printed
    for name in shipped_configs():
        for section, value in requested(name, []).items():
            for key in value if isinstance(value, dict) and section != "metric" else ():
                if key != "name":
                    assert f"| `{key}` |" in printed or key == "freeze", f"{name}: {section}.{key}"


def test_the_cache(cli, tmp_path):
    assert "total           0 B" in ok(cli("cache")).stdout
    cache = tmp_path / "cache"
    (cache / "images-a").mkdir(parents=True)
    (cache / "images-a/pixels").write_bytes(bytes(3 << 20))
    (cache / "runs/r-1/tracking").mkdir(parents=True)
    (cache / "runs/r-1/tracking/spool.jsonl").write_text("{}\n")
    printed = ok(cli("cache")).stdout
    assert "3.0 MiB" in printed and "images-a" in printed and "runs/r-1" in printed
    assert "freed           0 B" in ok(cli("cache", "clean", "--days", "1")).stdout
    printed = ok(cli("cache", "clean")).stdout
    assert "freed           3.0 MiB" in printed
    assert "runs/r-1  kept: 1 records wait for MLflow" in printed
    assert not (cache / "images-a").exists() and (cache / "runs/r-1/tracking/spool.jsonl").exists()
    mistake(cli("cache", "clear"), "'clear' is not one of size, clean; did you mean 'clean'?")


def test_list_of_something_else(cli):
    mistake(
        cli("list", "algorithm"),
        "'algorithm' is not one of algorithms, tasks, environments, models, trackers, configs, keys; did you mean "
        "'algorithms'?",
    )


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train"], ["train", "x", "--wokers", "2"], ["verify"], ["ui", "--port", "x"], ["ui", "--port", "0"]],
)
def test_unknown_commands_and_options_exit_with_2(cli, arguments):
    result = cli(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


@pytest.mark.lane("services")
def test_python_dash_m_is_the_command(tmp_path):
    assert "meta-training" in tiny.run("--help", folder=tmp_path).stdout


# Train ----------------------------------------------------------------------------------------------------------------


def test_train_prints_results_to_stdout_and_progress_to_stderr(cli, config, tmp_path):
    result = ok(cli("train", config(), "--run-dir", tmp_path / "run", "--json"))
    about = tiny.last_json(result.stdout)
    assert set(about) >= {"run_id", "run_dir", "meta_step", "params_sha256", "tasks_per_second", "evaluation"}
    assert about["meta_step"] == 6
    assert Path(about["run_dir"]) == tmp_path / "run"
    assert about["params_sha256"] in result.stdout
    assert "meta-step 3  validation mse" in result.stderr
    assert "meta-step" not in result.stdout.replace('"meta_step"', "").replace("meta-steps ", "")
    evaluation = about["evaluation"]
    assert evaluation["split"] == "test"
    assert len(evaluation["mean"]) == 3
    assert "protocol" in result.stdout
    assert evaluation["protocol"]["task_list_sha256"] in result.stdout
    for name in ("config.yaml", "run.json", "result.json", "evaluation.json", "model.safetensors", "checkpoints"):
        assert (tmp_path / "run" / name).exists(), name
    assert json.loads((tmp_path / "run/evaluation.json").read_text())[0]["mean"] == evaluation["mean"]


def test_without_json_stdout_has_none(cli, config):
    assert not any(line.startswith("{") for line in ok(cli("train", config())).stdout.splitlines())


def test_one_task_has_no_interval_and_json_no_nan(cli, config, tmp_path):
    overrides = ["evaluate.tasks=1", "evaluate.test_tasks=1"]
    result = ok(cli("train", config(), *overrides, "--run-dir", tmp_path / "run", "--json"))
    about = tiny.last_json(result.stdout)
    assert about["evaluation"]["ci95"] == [None, None, None]
    assert about["validation"][0]["ci95"] is None
    text = (tmp_path / "run/result.json").read_text() + (tmp_path / "run/evaluation.json").read_text()
    assert "NaN" not in text
    again = tiny.last_json(
        ok(cli("train", config(), *overrides, "--run-dir", tmp_path / "run", "--resume", "--json")).stdout
    )
    assert again["validation"] == about["validation"]


def test_a_diverging_validation_ends_nothing(cli, config):
    result = ok(
        cli(
            "train",
            config(),
            "algorithm.inner_lr=1e30",
            "outer.lr=0.0",
            "algorithm.first_order=true",
            "engine.non_finite=skip",
            "algorithm.inner_steps=0",
            "evaluate.inner_steps=5",
            "--json",
        )
    )
    about = tiny.last_json(result.stdout)
    assert about["evaluation"]["divergence_rate"] is None
    assert about["evaluation"]["left_out"] == about["evaluation"]["tasks"]
    assert about["evaluation"]["mean"][-1] is None
    assert about["validation"][0]["mean"] is None


def test_print_config_is_itself_a_config(cli, config, tmp_path):
    printed = ok(cli("train", config(), "outer.lr=0.5", "--workers", "3", "--print-config")).stdout
    document = yaml.safe_load(printed)
    assert document["outer"]["lr"] == 0.5
    assert document["workers"][0]["max"] == 3
    assert document["engine"]["exact"] is True, "defaults are filled in"
    assert build(document).document == document
    (tmp_path / "printed.yaml").write_text(printed)
    assert ok(cli("train", tmp_path / "printed.yaml", "--print-config")).stdout == printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_print_config_of_every_shipped_one(cli, name, tmp_path):
    printed = ok(cli("train", name, "--print-config")).stdout
    (tmp_path / "printed.yaml").write_text(printed)
    assert ok(cli("train", tmp_path / "printed.yaml", "--print-config")).stdout == printed


def test_a_run_goes_on_where_it_stopped(cli, config, tmp_path):
    whole = tiny.last_json(ok(cli("train", config(), "--json")).stdout)
    half = ["outer.meta_steps=3", "--run-dir", tmp_path / "run"]
    ok(cli("train", config(), *half))
    result = ok(cli("train", config(), "--run-dir", tmp_path / "run", "--resume", "--json"))
    assert "resumed at meta-step 3" in result.stderr
    about = tiny.last_json(result.stdout)
    assert about["params_sha256"] == whole["params_sha256"]
    assert about["evaluation"]["mean"] == whole["evaluation"]["mean"]
    assert about["run_id"] != whole["run_id"]
    assert json.loads((tmp_path / "run/run.json").read_text())["run_id"] == about["run_id"]


def test_resume_without_a_folder_takes_the_newest_run_of_that_name(cli, config):
    first = tiny.last_json(ok(cli("train", config(), "--json")).stdout)
    ok(cli("train", config(), "name=other", "--json"))
    second = tiny.last_json(ok(cli("train", config(), "--resume", "--json")).stdout)
    assert second["run_id"] == first["run_id"]
    assert second["params_sha256"] == first["params_sha256"]


def test_resuming_a_finished_run_changes_nothing(cli, config, tmp_path):
    one, two = (
        tiny.last_json(ok(cli("train", config(), "--run-dir", tmp_path / "run", *more, "--json")).stdout)
        for more in ([], ["--resume"])
    )
    for key in ("run_id", "params_sha256", "meta_step", "best_meta_step", "evaluation", "validation"):
        assert one[key] == two[key], key


@pytest.mark.lane("numerics")
def test_init_from_is_needed_at_the_start_only(cli, config, tmp_path):
    ok(cli("train", config(), "--run-dir", tmp_path / "first"))
    ok(cli("export", tmp_path / "first", tmp_path / "start.safetensors"))
    more = [f"init_from={tmp_path / 'start.safetensors'}", "--run-dir", tmp_path / "second", "--json"]
    begun = tiny.last_json(ok(cli("train", config(), *more)).stdout)
    (tmp_path / "start.safetensors").unlink()
    assert (
        tiny.last_json(ok(cli("train", config(), *more, "--resume")).stdout)["params_sha256"] == begun["params_sha256"]
    )


@pytest.mark.lane("numerics")
def test_init_from_a_torch_file(cli, config, tmp_path):
    import torch
    from safetensors.torch import load_file

    ok(cli("train", config(), "--run-dir", tmp_path / "first"))
    ok(cli("export", tmp_path / "first", tmp_path / "start.safetensors"))
    state = load_file(tmp_path / "start.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "nested.ckpt")
    hashes = {
        tiny.last_json(ok(cli("train", config(f"init_from={tmp_path / name}"), "--json")).stdout)["params_sha256"]
        for name in ("start.safetensors", "plain.pt", "nested.ckpt")
    }
    assert len(hashes) == 1


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("it-ran"),))


def test_a_torch_file_with_code_is_refused_and_does_not_run(cli, config, tmp_path):
    import torch

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    mistake(cli("train", config(f"init_from={tmp_path}/evil.pt")), "evil.pt", "would run code", "safetensors")
    assert not (tmp_path / "it-ran").exists()
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    mistake(cli("train", config(f"init_from={tmp_path}/module.pt")), "module.pt", "would run code")
    torch.save([1, 2], tmp_path / "list.pt")
    mistake(cli("train", config(f"init_from={tmp_path}/list.pt")), "holds no parameters by name")
    (tmp_path / "bad.pth").write_bytes(b"not these")
    mistake(cli("train", config(f"init_from={tmp_path}/bad.pth")), "bad.pth")
    mistake(cli("train", config(f"init_from={tmp_path}/none.bin")), "there is no file")


def test_the_version(cli):
    import metadist

    assert ok(cli("--version")).stdout == f"metadist {metadist.__version__}\n"


def test_evaluate_repeats_the_test_exactly(cli, config, tmp_path):
    trained = tiny.last_json(ok(cli("train", config(), "--run-dir", tmp_path / "run", "--json")).stdout)["evaluation"]
    for workers in ([], ["--workers", "0"]):
        judged = tiny.last_json(ok(cli("evaluate", tmp_path / "run", *workers, "--json")).stdout)["evaluation"]
        assert judged == trained
    more = tiny.last_json(
        ok(
            cli("evaluate", tmp_path / "run", "--tasks", 9, "--inner-steps", 4, "--split", "validation", "--json")
        ).stdout
    )
    assert more["evaluation"]["protocol"]["task_list_sha256"] != trained["protocol"]["task_list_sha256"]
    assert more["evaluation"]["tasks"] == 9
    assert len(more["evaluation"]["mean"]) == 5
    zero = tiny.last_json(ok(cli("evaluate", tmp_path / "run", "--inner-steps", 0, "--json")).stdout)["evaluation"]
    assert zero["mean"] == trained["mean"][:1]
    assert zero["protocol"]["task_list_sha256"] == trained["protocol"]["task_list_sha256"]


def test_export_writes_the_best_parameters(cli, config, tmp_path):
    from safetensors.torch import load_file

    ok(cli("train", config(), "--run-dir", tmp_path / "run"))
    assert ok(cli("export", tmp_path / "run", tmp_path / "model.safetensors")).stdout.strip() == str(
        tmp_path / "model.safetensors"
    )
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(load_file(tmp_path / "run/model.safetensors"))
    mistake(cli("export", tmp_path / "run", tmp_path / "run/run.json/model.safetensors"), "can't be written")


# Verify ---------------------------------------------------------------------------------------------------------------


def test_verify_in_this_process_compares_nothing(cli, config):
    mistake(cli("verify", config(), "--workers", "0", "--meta-steps", "2", "--json"), "--workers 0", "0,1,2")


def test_kills_are_due_at_different_meta_steps_of_the_run():
    from metadist.experiment.verify import due_meta_steps

    for meta_steps in range(1, 30):
        for kills in range(1, meta_steps + 1):
            due = due_meta_steps(kills, meta_steps)
            assert len(set(due)) == kills
            assert all(0 <= d < meta_steps for d in due), "a kill after the end would never come"


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_missing_data_says_which_variable_and_which_file(cli, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("METADIST_DATA", str(tmp_path / "empty"))
    mistake(cli("train", "omniglot_maml_5w1s", "--workers", "0"), "METADIST_DATA", "omniglot")
    monkeypatch.setenv("METADIST_DATA", str(tmp_path / "absent"))
    mistake(cli("train", "omniglot_maml_5w1s", "--workers", "0"), "METADIST_DATA")


@pytest.fixture
def images(tmp_path):
    """12 classes of 6 small images, as one folder each."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for label in range(12):
        folder = tmp_path / "images" / f"class{label:02d}"
        folder.mkdir(parents=True)
        for index in range(6):
            Image.fromarray(generator.integers(0, 255, (12, 12), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


def classification(images, *more):
    tasks = f"{{name: image_folder, path: '{images}', n_way: 3, k_shot: 1, query_shots: 1}}"
    return [f"tasks={tasks}", "model={name: mlp, hidden: [4]}", *more]


def test_a_model_that_does_not_fit_n_way(cli, config, images, tmp_path):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 7))\n\n"
        "def other():\n    return nn.Sequential(nn.Flatten(), nn.Linear(99, 3))\n"
    )
    mistake(
        cli("train", config(), *classification(images), "model={name: 'mynet:net'}"),
        "puts out shape [3, 7]",
        "n_way = 3",
    )
    mistake(cli("train", config(), *classification(images), "model={name: 'mynet:other'}"), "fails on", "784")
    assert not list((tmp_path / "runs").glob("*/checkpoints/*"))


def test_a_model_that_does_not_fit_the_regression(cli, config, tmp_path):
    (tmp_path / "myregression.py").write_text(
        "from torch import nn\n\ndef wide():\n    return nn.Linear(1, 2)\n\ndef other():\n    return nn.Linear(3, 1)\n"
    )
    mistake(cli("train", config("model={name: 'myregression:wide'}")), "predicts shape [4, 2]", "[4, 1]")
    mistake(cli("train", config("model={name: 'myregression:other'}")), "Linear")


def test_more_shots_than_images(cli, config, images):
    mistake(cli("train", config(), *classification(images), "tasks.k_shot=6"), "6")
    mistake(cli("train", config(), *classification(images), "tasks.n_way=13"), "13")


def test_an_algorithm_that_does_not_suit_the_tasks(cli, config):
    mistake(cli("train", config(), "algorithm={name: protonet}"), "ProtoNet", "Sinusoid")


def test_unreadable_configs(cli, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "nul.yaml").write_text("name: \x00\n")
    (tmp_path / "broken.yaml").write_text("name: [x\nseed: 1")
    mistake(cli("train", "folder.yaml"), "folder.yaml", "is a folder")
    mistake(cli("train", "binary.yaml"), "binary.yaml", "can't be read")
    mistake(cli("train", "nul.yaml"), "not valid YAML")
    mistake(cli("train", "broken.yaml"), "broken.yaml, line 2")
    mistake(cli("train", "absent.yaml"), "neither a file nor a shipped config")
    mistake(cli("verify", "absent.yaml"), "neither a file")
    mistake(cli("train", "x" * 5000), "neither a file")


@pytest.mark.parametrize("assignment", ["outer.lr=x", "outer.rl=1", "outer.lr", "workers.7.cpus=1"])
def test_bad_overrides(cli, config, assignment):
    mistake(cli("train", config(), assignment))
    mistake(cli("verify", config(), assignment))


@pytest.mark.parametrize(
    "option",
    [["--workers", "two"], ["--workers", "actors=2"], ["--seeds", "a,b"], ["--seeds", "1,1"], ["--seeds", "²"]],
)
def test_bad_options(cli, config, option):
    mistake(cli("train", config(), *option), option[0])


@pytest.mark.parametrize("option", [["--workers", "a"], ["--workers", "1,1"], ["--workers", "-1"]])
def test_bad_options_of_verify(cli, config, option):
    mistake(cli("verify", config(), *option), option[0])


def test_more_kills_than_meta_steps(cli, config):
    mistake(cli("verify", config(), "--workers", "0,2", "--kill", "3", "--meta-steps", "2"), "--kill 3")


def test_run_dirs_that_cannot_be(cli, config, tmp_path):
    (tmp_path / "file").write_text("no run")
    mistake(cli("train", config(), "--run-dir", tmp_path / "file"), "file")
    mistake(cli("train", config(), "--run-dir", tmp_path / "file/below"), "file/below")
    mistake(cli("train", config(), "--run-dir", "/proc/nothing/here"), "/proc/nothing/here")
    mistake(cli("train", config(), "--run-dir", "nosuchstore://bucket/x"), "nosuchstore")
    mistake(cli("train", config(), "--run-dir", "/proc/nothing/here", "tracking.uri=auto"), "/proc/nothing/here")
    assert (tmp_path / "file").read_text() == "no run"


def test_a_run_dir_in_use(cli, config, tmp_path):
    ok(cli("train", config(), "--run-dir", tmp_path / "run"))
    before = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    mistake(cli("train", config(), "--run-dir", tmp_path / "run"), "holds a run already", "--resume")
    mistake(cli("train", config(), "--seeds", "0,1", "--run-dir", tmp_path / "run"), "holds a run already")
    mistake(cli("train", config(), "--seeds", "0,1", "--run-dir", tmp_path / "run", "--resume"), "for 2 seeds")
    (tmp_path / "group").mkdir()
    (tmp_path / "group/group.json").write_text('{"group_id": "g", "seeds": [0, 1]}')
    mistake(cli("train", config(), "--run-dir", tmp_path / "group"), "--seeds")
    mistake(cli("train", config(), "--seeds", "0,1", "--run-dir", tmp_path / "group"), "holds runs already")
    mistake(
        cli("train", config(), "--seeds", "0,1,2", "--run-dir", tmp_path / "group", "--resume"), "has the seeds [0, 1]"
    )
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == before


def test_resume_with_nothing_to_resume(cli, config):
    mistake(cli("train", config(), "--resume"), "there is no run of 'tiny'")
    mistake(cli("train", config(), "--seeds", "0,1", "--resume"), "there is no group")


def test_resume_in_an_empty_folder_begins_with_a_warning(cli, config, tmp_path):
    assert ok(cli("train", config(), "--run-dir", tmp_path / "run", "--resume")).exit_code == 0


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("outer.lr=0.5", "outer.lr"),
        ("algorithm.inner_lr=0.5", "algorithm.inner_lr"),
        ("tasks.k_shot=7", "tasks.k_shot"),
        ("outer.shard_size=3", "outer.shard_size"),
        ("seed=4", "seed"),
        ("model.activation=tanh", "model.activation"),
        ("name=else", "name"),
    ],
)
def test_resume_with_a_changed_config(cli, config, tmp_path, assignment, key):
    ok(cli("train", config(), "--run-dir", tmp_path / "run"))
    kept = (tmp_path / "run/config.yaml").read_text()
    mistake(cli("train", config(), assignment, "--run-dir", tmp_path / "run", "--resume"), "--resume: ", key)
    assert (tmp_path / "run/config.yaml").read_text() == kept, "nothing is lost"


@pytest.mark.lane("numerics")
def test_resume_with_what_may_change(cli, config, tmp_path):
    one = tiny.last_json(ok(cli("train", config(), "--run-dir", tmp_path / "run", "--json")).stdout)
    changed = [
        "evaluate.tasks=3",
        "checkpoint.keep=1",
        "tracking.log_every=3",
        "engine.shard_timeout=9",
        "outer.meta_steps=8",
    ]
    two = tiny.last_json(
        ok(cli("train", config(), *changed, "--run-dir", tmp_path / "run", "--resume", "--json")).stdout
    )
    assert two["meta_step"] == 8
    assert two["run_id"] == one["run_id"]
    whole = tiny.last_json(ok(cli("train", config(), "outer.meta_steps=8", "--json")).stdout)
    assert two["params_sha256"] == whole["params_sha256"]


def test_a_checkpoint_of_another_model(cli, config, tmp_path):
    ok(cli("train", config(), "--run-dir", tmp_path / "run"))
    mistake(
        cli("train", config(), "model.hidden=[9]", "--run-dir", tmp_path / "run", "--resume"),
        "another model",
        "step-00000006",
    )
    assert ok(cli("evaluate", tmp_path / "run"))


def test_a_damaged_checkpoint_is_skipped_with_a_message(cli, config, tmp_path, caplog):
    whole = tiny.last_json(ok(cli("train", config(), "--run-dir", tmp_path / "run", "--json")).stdout)
    [payload] = (tmp_path / "run/checkpoints/step-00000006").glob("*.safetensors")
    data = bytearray(payload.read_bytes())
    data[-9] ^= 4
    payload.write_bytes(bytes(data))
    caplog.clear()
    result = ok(cli("train", config(), "--run-dir", tmp_path / "run", "--resume", "--json"))
    assert tiny.last_json(result.stdout)["params_sha256"] == whole["params_sha256"]
    assert "resumed at meta-step 4" in result.stderr
    skipped = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(skipped) == 1, "said once"
    assert "step-00000006" in skipped[0]


def test_only_damaged_checkpoints_end_it_and_nothing_is_lost(cli, config, tmp_path):
    ok(cli("train", config(), "--run-dir", tmp_path / "run"))
    for manifest in (tmp_path / "run/checkpoints").glob("*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-5])
    before = {p: p.read_bytes() for p in (tmp_path / "run/checkpoints").glob("*/*")}
    mistake(cli("train", config(), "--run-dir", tmp_path / "run", "--resume"), "can be used")
    mistake(cli("evaluate", tmp_path / "run"), "can be used")
    assert {p: p.read_bytes() for p in (tmp_path / "run/checkpoints").glob("*/*")} == before


def test_damaged_run_files(cli, config, tmp_path):
    ok(cli("train", config(), "--run-dir", tmp_path / "run"))
    (tmp_path / "run/run.json").write_text('{"run_id": ')
    mistake(cli("train", config(), "--run-dir", tmp_path / "run", "--resume"), "run.json is damaged")
    mistake(cli("evaluate", tmp_path / "run"), "run.json is damaged")


def test_evaluate_what_is_no_run(cli, config, tmp_path):
    mistake(cli("evaluate", tmp_path / "nothing"), "no config.yaml")
    mistake(cli("export", tmp_path / "nothing", tmp_path / "x.safetensors"), "no config.yaml")
    ok(cli("train", config(), "--run-dir", tmp_path / "run"))
    mistake(cli("evaluate", tmp_path / "run", "--split", "tset"), "did you mean 'test'?")
    mistake(cli("evaluate", tmp_path / "run", "--normalization", "inductiv"), "did you mean 'inductive'?")
    shutil.rmtree(tmp_path / "run/checkpoints")
    mistake(cli("evaluate", tmp_path / "run"), "has no checkpoint yet")
    assert cli("evaluate", tmp_path / "run", "--tasks", 0).exit_code == 2


def test_init_from_what_does_not_fit(cli, config, tmp_path):
    mistake(cli("train", config(f"init_from={tmp_path}/none.safetensors")), "none.safetensors")
    mistake(
        cli("train", config(f"init_from={tmp_path}/nothing")),
        "neither a .safetensors file, nor a file of torch.save",
        "nor a run directory",
    )
    (tmp_path / "bad.safetensors").write_bytes(b"not these")
    mistake(cli("train", config(f"init_from={tmp_path}/bad.safetensors")), "bad.safetensors")
    ok(cli("train", config("model.hidden=[5]"), "--run-dir", tmp_path / "narrow"))
    mistake(cli("train", config(f"init_from={tmp_path}/narrow")), "init_from", "shape")


@pytest.mark.lane("services")  # one's own tasks are sampled in another process too
def test_an_error_in_ones_own_task_is_named_with_task_and_seed(cli, config, tmp_path):
    (tmp_path / "mybroken.py").write_text(
        "from metadist.tasks.sinusoid import Sinusoid\nfrom dataclasses import dataclass\n\n@dataclass(frozen=True, "
        "kw_only=True)\n"
        "class Broken(Sinusoid):\n    def sample(self, keys, split):\n"
        "        if split == 'train' and keys.meta_step == 4 and 5 in keys.tasks.tolist():\n            raise "
        "ValueError('no\\nsine')\n"
        "        return super().sample(keys, split)\n"
    )
    overrides = ["tasks={name: 'mybroken:Broken'}", "checkpoint.every=100"]
    line = mistake(
        cli("train", config(), *overrides, "--run-dir", tmp_path / "run"),
        "meta-step 4",
        "task 5: ValueError: no sine",
        "seed 3",
    )
    assert f"{tmp_path}/run/failure.txt" in line
    assert "mybroken.py" in (tmp_path / "run/failure.txt").read_text()
    assert (tmp_path / "run/checkpoints/step-00000004/manifest.json").exists(), "what was learned is not lost"


def test_non_finite_gradients_are_named(cli, config):
    line = mistake(cli("train", config(), "algorithm.inner_lr=1e38"), "NaN or Inf", "seed 3")
    assert "task" in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_of_results_never_has_nan(value):
    from metadist.learners.evaluation import as_json

    assert (
        json.dumps(as_json({"a": [1, value, {"b": (value, "x")}]}), allow_nan=False)
        == '{"a": [1, null, {"b": [null, "x"]}]}'
    )
