"""A matrix of experiments: cells, their table, and where they run; wrong input is one sentence and writes nothing."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from semalign_geometry.base import SemalignError
from semalign_harness import load_experiment
from semalign_harness.cli.main import main
from semalign_harness.grid import jobs as grid
from semalign_harness.grid import submit
from semalign_harness.grid.matrix import Matrix, read_matrix
from semalign_harness.results.run import Environment
from semalign_harness.util.console import Console
from semalign_train import StepRecord
from semalign_train._loop import Loop
from submitit.core.submission import process_job

SEEDS = ("--over", "train.seed=0,1")
ONE_FAILS = ("--over", "method.layers=[[1], [9]]")


def submitted(tmp_path: Path, overrides: list[str], *more: str) -> int:
    return main(["submit", "tiny", *overrides, *more, "--out", str(tmp_path / "matrix")])


def table(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "matrix" / "matrix.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells run in this process, whose imports are done; gives which ran."""
    names: list[str] = []

    def run_here(folder: Path, todo: Sequence[str], at_once: int, console: Console) -> None:
        for name in todo:
            names.append(name)
            with contextlib.suppress(SemalignError):
                submit.CellRun(str(folder))(name)

    monkeypatch.setattr(submit, "_run_here", run_here)
    return names


def test_cells_are_the_product(tmp_path: Path) -> None:
    over = ["train.passes=1,2", "method.layers=[[1, 2], [3]]", "pairing={kind: uniform},{kind: random, seed: 4}"]
    matrix = read_matrix("tiny", over=over, overrides=["train.seed=7"])
    assert [
        (c.experiment.train.passes, c.experiment.method.layers, c.experiment.pairing.kind) for c in matrix.cells
    ] == [(passes, layers, kind) for passes in (1, 2) for layers in ((1, 2), (3,)) for kind in ("uniform", "random")]
    assert all(cell.experiment.train.seed == 7 for cell in matrix.cells)
    assert matrix.cells[-1].values == {
        "train.passes": 2,
        "method.layers": [3],
        "pairing": {"kind": "random", "seed": 4},
    }
    assert Matrix.read(matrix.write(tmp_path / "matrix.json")) == matrix


def test_a_list_in_brackets_holds_the_values() -> None:
    assert read_matrix("tiny", over=["train.seed=[4, 5]"]).over == read_matrix("tiny", over=["train.seed=4,5"]).over
    assert read_matrix("tiny", over=["method.layers=[1, 2],[3]"]).over == {"method.layers": [[1, 2], [3]]}


def test_names_are_readable_safe_and_unique() -> None:
    def names(*over: str) -> list[str]:
        return [cell.name for cell in read_matrix("tiny", over=over).cells]

    assert names("train.seed=0,1", "train.learning_rate=0.001") == [
        "seed-0_learning_rate-0.001",
        "seed-1_learning_rate-0.001",
    ]
    assert names("train.seed=0", "data.seed=1") == ["train.seed-0_data.seed-1"], "the ends of the keys are the same"
    odd = names("source.path=a/b.gguf,a:b.gguf,../../b,A,a,é,''," + "x" * 200)
    assert len({name.casefold() for name in odd}) == 8
    long = names(*(f"{key}={'y' * 24}" for key in ("source.path", "target.path", "data.train.path", "device", "name")))
    for name in [*odd, *long, *names("method.layers=[[1, 2], [3]]")]:
        assert re.fullmatch(r"[\w+-][\w.+-]{0,120}", name, re.ASCII)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), ["--over key.key=value,value"]),
        (("--over", "train.sed=0,1"), ["train.sed", "did you mean 'seed'"]),
        (("--over", "train.seed=0,x"), ["train.seed", "'x'"]),
        (("--over", "train.seed="), ["names no values"]),
        (("--over", "train.seed=[]"), ["names no values"]),
        (("--over", "train.seed=0,,1"), ["not valid YAML"]),
        (("--over", "train.seed"), ["key.key=value,value"]),
        (("--over", "train.seed=0,0"), ["two cells are the same experiment (train.seed=0; train.seed=0)"]),
        (("--over", "train.learning_rate=1e-3,0.001"), ["same experiment"]),
        (("--over", "name=a,b"), ["same experiment"]),
        ((*SEEDS, "--over", "train.seed=2"), ["train.seed twice"]),
        ((*SEEDS, "train.seed=2"), ["train.seed is both varied by --over and set"]),
        ((*SEEDS, "--over", "train={passes: 1}"), ["varies both train and train.seed"]),
        ((*SEEDS, "train.lerning_rate=1"), ["learning_rate"]),
        ((*SEEDS, "--jobs", "0"), ["--jobs 0", "at least 1"]),
        ((*SEEDS, "--executor", "slrum"), ["slrum", "local, slurm, submitit-local"]),
        ((*SEEDS, "--slurm", "partition=a"), ["--executor slurm"]),
        ((*SEEDS, "--executor", "submitit-local", "--jobs", "2"), ["--jobs has no effect"]),
        ((*SEEDS, "--executor", "submitit-local", "--slurm", "partitoin=a"), ["did you mean 'partition'"]),
        ((*SEEDS, "--executor", "submitit-local", "--slurm", "zzz=a"), ["unknown parameter 'zzz'", "partition, qos"]),
        ((*SEEDS, "--executor", "submitit-local", "--slurm", "partition"), ["key=value"]),
        ((*SEEDS, "--executor", "submitit-local", "--slurm", "timeout_min=long"), ["timeout_min", "long"]),
        ((*SEEDS, "--executor", "submitit-local", "--slurm", "nodes=2"), ["nodes: a cell runs in one process"]),
        ((*SEEDS, "--executor", "slurm"), ["sbatch is not on this machine"]),
    ],
)
def test_wrong_input_is_one_sentence(
    more: tuple[str, ...],
    words: list[str],
    tmp_path: Path,
    overrides: list[str],
    ran: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    assert submitted(tmp_path, overrides, *more) == 2
    captured = capsys.readouterr()
    (sentence,) = captured.err.splitlines()
    assert sentence.startswith("semalign: ") and captured.out == ""
    for word in words:
        assert word in sentence
    assert not ran and list(tmp_path.iterdir()) == before, "nothing is written"


def test_without_an_experiment_or_submitit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["submit"]) == 2
    assert "submit needs an experiment" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert submitted(tmp_path, [], *SEEDS, "--executor", "slurm") == 2
    assert 'pip install "semalign-harness[slurm]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_cell_stops_no_other_and_finished_ones_are_kept(
    tmp_path: Path, overrides: list[str], ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(tmp_path, overrides, *SEEDS, *ONE_FAILS) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["seed", "layers", *"KL before KL after NLL after agreement seconds".split()]
    rows = table(tmp_path)
    reason = rows[1]["note"]
    assert reason.startswith("layers are (9,), expected ascending numbers from 1 to 3")
    assert [line.rpartition("  ")[2] for line in printed[1:5]] == ["finished", f"failed: {reason}"] * 2
    assert [(row["train.seed"], row["method.layers"], row["state"], row["note"]) for row in rows] == [
        (seed, layers, state, note)
        for seed in "01"
        for layers, state, note in (("[1]", "finished", ""), ("[9]", "failed", reason))
    ]
    result = json.loads((tmp_path / "matrix" / rows[2]["cell"] / "result.json").read_text(encoding="utf-8"))
    figures = [rows[2][key] for key in ("kl_before", "kl_after", "nll_after", "agreement")]
    after = result["after"]
    assert [*map(float, figures)] == [result["before"]["kl"], after["kl"], after["answer_nll"], after["agreement"]]
    assert rows[3]["kl_after"] == "" and not (tmp_path / "matrix" / rows[3]["cell"]).exists()

    assert ran == [row["cell"] for row in rows]
    assert submitted(tmp_path, overrides, *SEEDS, *ONE_FAILS) == 2
    assert ran[4:] == [rows[1]["cell"], rows[3]["cell"]], "finished cells do not run again, failed ones do"
    assert f"failed before, and is tried again: {reason}" in capsys.readouterr().err


def test_a_dry_run_shows_where_it_stands(
    tmp_path: Path, overrides: list[str], ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(tmp_path, overrides, *SEEDS, "--dry-run") == 0
    assert capsys.readouterr().out.count("not run") == 2
    assert not ran and not (tmp_path / "matrix").exists()


def test_other_folders_are_refused(
    tmp_path: Path, overrides: list[str], ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "matrix").rglob("*"))}
        ran.clear()
        assert submitted(tmp_path, overrides, *more) == 2
        assert not ran
        assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "matrix").rglob("*"))} == before
        return capsys.readouterr().err

    assert submitted(tmp_path, overrides, "--over", "method.layers=[[9]]") == 2
    (ran_before,) = ran
    capsys.readouterr()
    assert "varies method.layers there, train.seed here" in refused(*SEEDS)
    (tmp_path / "matrix" / ran_before).mkdir()
    assert f"{ran_before}: train.seed is 0 there, 5 here" in refused("--over", "method.layers=[[9]]", "train.seed=5")
    with FileLock(tmp_path / "matrix" / ".lock"):
        assert "another process works on" in refused("--over", "method.layers=[[9]]")
    (tmp_path / "matrix" / "matrix.json").write_text("{", encoding="utf-8")
    assert "cannot be read as JSON" in refused("--over", "method.layers=[[9]]")
    (tmp_path / "matrix" / "matrix.json").unlink()
    assert "is not empty, and holds no matrix.json" in refused("--over", "method.layers=[[9]]")
    file = tmp_path / "file"
    file.touch()
    assert main(["submit", "tiny", *SEEDS, "--out", str(file)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["submit", "tiny", *SEEDS, "--out", str(file / "below")]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_further_values_extend_a_matrix(tmp_path: Path, overrides: list[str], ran: list[str]) -> None:
    assert submitted(tmp_path, overrides, "--over", "train.seed=0") == 0
    assert submitted(tmp_path, overrides, "--over", "train.seed=1,0") == 0
    assert ran == ["seed-0", "seed-1"] and [row["cell"] for row in table(tmp_path)] == ["seed-1", "seed-0"]
    matrix = Matrix.read(tmp_path / "matrix" / "matrix.json")
    assert matrix.over == {"train.seed": [0, 1]} and [cell.name for cell in matrix.cells] == ran


def test_a_cell_that_another_process_runs_is_left_alone(
    tmp_path: Path, overrides: list[str], ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--over", "method.layers=[[8], [9]]"]
    assert submitted(tmp_path, overrides, *call) == 2
    first, second = ran
    ran.clear()
    capsys.readouterr()
    (tmp_path / "matrix" / first).mkdir()
    with FileLock(tmp_path / "matrix" / first / ".lock"):
        submitted(tmp_path, overrides, *call)
        assert ran == [second] and table(tmp_path)[0]["state"] == "running"
        assert "running: in another process" in capsys.readouterr().out
    submitted(tmp_path, overrides, *call)
    assert ran == [second, first, second], "once it is free it runs"


@pytest.mark.slow
def test_processes_share_the_supervision(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert submitted(tmp_path, overrides, *SEEDS, "--jobs", "2") == 0
    logs = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "matrix" / "logs").glob("*.log"))]
    assert len(logs) == 2
    assert sum("supervise 16 rows" in log for log in logs) == 1, "the source ran once"
    assert all("INFO semalign_train" in log for log in logs), "log lines are there, whatever the matrix shows"
    assert sum("check the supervision kept" in log for log in logs) == 1, "the other cell found what it left"
    assert len({row["kl_after"] for row in table(tmp_path)}) == 2


def instead_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Cells run a shell script, whose last argument is their name."""
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setattr(submit.sys, "executable", str(file))


@pytest.mark.parametrize(
    ("script", "words"), [("kill -9 $$", "ended by signal 9"), ("exit 3", "ended with exit code 3")]
)
def test_a_process_that_ends_without_a_word(
    script: str, words: str, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_python(tmp_path, monkeypatch, script)
    assert submitted(tmp_path, overrides, *SEEDS) == 2
    assert [row["note"].partition(":")[0] for row in table(tmp_path)] == [words] * 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_processes_as_wanted(
    jobs: int, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "events"
    instead_of_python(tmp_path, monkeypatch, f"echo 1 >> {events}; sleep 0.3; echo -1 >> {events}")
    assert submitted(tmp_path, overrides, "--over", "train.seed=0,1,2", "--jobs", str(jobs)) == 0
    steps = [int(line) for line in events.read_text().split()]
    assert len(steps) == 6 and max(sum(steps[:n]) for n in range(7)) == jobs


@pytest.mark.parametrize(
    ("given", "small", "expected"),
    [
        (None, False, ["8", "8", "4", "4", "1", "1"]),
        ("5", False, ["5"] * 6),
        (None, True, ["1"] * 6),
        ("5", True, ["5"] * 6),
    ],
)
def test_runs_at_the_same_time_share_the_processors(
    given: str | None,
    small: bool,
    expected: list[str],
    tmp_path: Path,
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit, "is_small", lambda model: small)
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(submit.torch, "get_num_threads", lambda: 8)
    instead_of_python(tmp_path, monkeypatch, f"echo $OMP_NUM_THREADS >> {tmp_path}/threads-$1")
    for jobs in (1, 2, 20):
        folder = tmp_path / f"matrix-{jobs}"
        assert main(["submit", "tiny", *overrides, *SEEDS, "--jobs", str(jobs), "--out", str(folder)]) == 0
    found = (tmp_path / "threads--m").read_text().split()
    assert found == expected


@pytest.mark.parametrize(
    ("count", "given", "shown"),
    [
        (0, None, [None, None, None]),
        (1, "3", [None, None, None]),
        (2, None, ["0", "1", "0"]),
        (2, "3, 1", ["3", "1", "3"]),
        (2, "GPU-a,GPU-b,-1,2", ["GPU-a", "GPU-b", "GPU-a"]),
        (4, None, ["0", "1", "2"]),
    ],
)
def test_slots_go_round_the_visible_devices(count: int, given: str | None, shown: list[str | None]) -> None:
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    found = [submit.device_of_slot(slot, count, environment) for slot in range(3)]
    assert found == [{} if name is None else {"CUDA_VISIBLE_DEVICES": name} for name in shown]


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_runs_at_the_same_time_have_devices_of_their_own(
    device: str, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    monkeypatch.setattr(submit.torch.cuda, "device_count", lambda: 2)
    events = tmp_path / "events"
    script = f"echo $CUDA_VISIBLE_DEVICES 1 >> {events}; sleep 0.3; echo $CUDA_VISIBLE_DEVICES -1 >> {events}"
    instead_of_python(tmp_path, monkeypatch, script)
    more = ("--over", "train.seed=0,1,2,3", "--jobs", "2", f"device={device}")
    assert submitted(tmp_path, overrides, *more) == 0
    steps = [line.split() for line in events.read_text().splitlines()]
    if device != "auto":
        assert {shown for shown, _ in steps} == {"6,7"}, "it names one of those that are here"
        return
    for name in ("6", "7"):
        busy = [int(step) for shown, step in steps if shown == name]
        assert busy and max(sum(busy[:n]) for n in range(len(busy) + 1)) == 1
    assert {shown for shown, _ in steps} == {"6", "7"}


@pytest.mark.parametrize("command", ["submit", "compare", "sweep"])
def test_a_launcher_of_several_processes_is_refused(
    command: str,
    tmp_path: Path,
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, "tiny", *overrides, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("semalign: WORLD_SIZE is 2") and printed.err.count("\n") == 1
    assert f"start semalign {command} once" in printed.err and not (tmp_path / "out").exists()
    assert main(["presets"]) == 0, "what starts no runs is as it was"


def test_an_interrupted_run_keeps_its_number_of_threads(tmp_path: Path) -> None:
    environment = Environment(
        packages={},
        python="",
        platform="",
        device="cpu",
        dtypes=[],
        threads=3,
        data_sha256={},
        models=[],
        supervision_key="",
    )
    environment.write(tmp_path / "environment.json")
    assert submit._threads(tmp_path, load_experiment("tiny"), 100) == 3


def test_an_interrupted_matrix_leaves_no_process(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            started.append(self)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    instead_of_python(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(submit.subprocess, "Popen", Recorded)
    monkeypatch.setattr(submit.time, "sleep", interrupt)
    assert submitted(tmp_path, overrides, *SEEDS, "--jobs", "2") == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands as Slurm's: jobs are numbered and kept, states are what `states` says, requeues are noted."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    start = int.from_bytes(os.urandom(3)) * 10  # submitit remembers the states of jobs for the whole process
    (folder / "number").write_text(str(start))
    scripts = {
        "sbatch": f'n=$(($(cat {folder}/number) + 1)); echo $n > {folder}/number; cp "$1" {folder}/$n.sh\n'
        'echo "Submitted batch job $n"',
        "sacct": f"echo 'JobID|State|NodeList'; cat {folder}/states 2> /dev/null; true",
        "scontrol": f"echo $* >> {folder}/requeued",
        "srun": "exit 1",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a job of an array as its node does, in this process."""

    def run(job: str) -> None:
        array, index = job.split("_")
        for key, value in {
            "SUBMITIT_EXECUTOR": "slurm",
            "SUBMITIT_FOLDER": "",
            "SLURM_JOB_ID": array,
            "SLURM_ARRAY_JOB_ID": array,
            "SLURM_ARRAY_TASK_ID": index,
        }.items():
            monkeypatch.setenv(key, value)
        process_job(tmp_path / "matrix" / "jobs")

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)}
    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)


def job_ids(tmp_path: Path) -> list[str]:
    return [record.id for record in grid.Jobs.read(tmp_path / "matrix" / "jobs.json").cells.values()]


def test_an_array_of_jobs(
    tmp_path: Path,
    overrides: list[str],
    cluster: Path,
    node: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_slurm = [*SEEDS, *ONE_FAILS, "--executor", "slurm"]
    options = ["--jobs", "2", "--slurm", "partition=gpu", "gpus_per_node=1", "mem_gb=40", "timeout_min=30"]
    assert submitted(tmp_path, overrides, *on_slurm, *options) == 0
    captured = capsys.readouterr()
    array = (cluster / "number").read_text().strip()
    assert f"submitted 4 of 4 cells: job {array}\n" in captured.err
    assert [line.rpartition("  ")[2] for line in captured.out.splitlines()[1:5]] == [
        f"running: job {array}_{index}" for index in range(4)
    ]
    script = (cluster / f"{array}.sh").read_text()
    for flag in ("array=0-3%2", "partition=gpu", "gpus-per-node=1", "mem=40GB", "time=30", "job-name=semalign-tiny"):
        assert f"#SBATCH --{flag}\n" in script

    # What runs is not submitted again, and what is finished is shown.
    node(f"{array}_0")
    with pytest.raises(SemalignError):
        node(f"{array}_1")
    (cluster / "states").write_text(f"{array}_2|CANCELLED|\n{array}_3|PENDING|\n")
    assert submitted(tmp_path, overrides, *on_slurm) == 0
    captured = capsys.readouterr()
    again = (cluster / "number").read_text().strip()
    assert f"submitted 2 of 4 cells: job {again}\n" in captured.err, "the one that failed, and the one that is gone"
    assert "tried again: layers are (9,)" in captured.err
    assert f"tried again: job {array}_2 ended without a result: see " in captured.err
    assert not list((tmp_path / "matrix" / "logs").glob("*.failed")), "no reason stays for the job that follows"
    assert job_ids(tmp_path) == [f"{array}_0", f"{array}_3", f"{again}_0", f"{again}_1"]
    assert [(row["state"], row["note"]) for row in table(tmp_path)] == [
        ("finished", ""),
        *(("running", f"job {job}") for job in (f"{again}_0", f"{again}_1", f"{array}_3")),
    ]

    # With --wait, the table comes when all jobs have ended.
    def end(seconds: float) -> None:
        monkeypatch.undo()
        node(f"{again}_1")
        for job in (f"{again}_0", f"{array}_3"):
            with pytest.raises(SemalignError):
                node(job)

    monkeypatch.setattr(submit.time, "sleep", end)
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    assert submitted(tmp_path, overrides, *on_slurm, "--wait") == 2
    assert [row["state"] for row in table(tmp_path)] == ["finished", "failed"] * 2
    assert (cluster / "number").read_text().strip() == again


@pytest.mark.parametrize("minutes", ["240", "5"], ids=["preempted", "at its time limit"])
def test_a_job_that_is_stopped_goes_on(
    minutes: str, tmp_path: Path, overrides: list[str], cluster: Path, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under ten minutes, submitit takes any signal for the time limit's.
    limit = ["--slurm", f"timeout_min={minutes}"]
    assert submitted(tmp_path, overrides, *SEEDS, "--executor", "slurm", *limit) == 0
    job = job_ids(tmp_path)[1]
    steps: list[tuple[int, int]] = []
    step = Loop._step

    def preempted(self: Loop, number: int, *arguments: Any) -> StepRecord:
        steps.append((self._layer, number))
        if steps == [(1, 1), (1, 2), (2, 1)]:
            os.kill(os.getpid(), signal.SIGUSR2)
        return step(self, number, *arguments)

    monkeypatch.setattr(Loop, "_step", preempted)
    with pytest.raises(SystemExit):
        node(job)
    assert (cluster / "requeued").read_text() == f"requeue {job}\n"
    assert not list((tmp_path / "matrix" / "logs").glob("*.failed")), "it has not failed"
    node(job)
    assert steps[3:] == [(2, 1), (2, 2), (3, 1), (3, 2)], "finished stages do not run again"
    assert (tmp_path / "matrix" / "seed-1" / "result.json").is_file()


def test_jobs_that_slurm_refuses(
    tmp_path: Path, overrides: list[str], cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    assert submitted(tmp_path, overrides, *SEEDS, "--executor", "slurm", "--slurm", "partition=none") == 2
    assert "Slurm refused the jobs: sbatch: error: invalid partition" in capsys.readouterr().err
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'Submitted batch job 1234567'\n")
    assert submitted(tmp_path, overrides, *SEEDS, "--executor", "slurm") == 0, "the same matrix can be submitted then"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # submitit means its jobs to go on
def test_submitit_runs_the_cells_here(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert submitted(tmp_path, overrides, *ONE_FAILS, "--executor", "submitit-local") == 0
    assert [row["state"] for row in table(tmp_path)] == ["running"] * 2
    jobs = job_ids(tmp_path)
    assert submitted(tmp_path, overrides, *ONE_FAILS, "--executor", "submitit-local", "--wait") == 2
    assert job_ids(tmp_path) == jobs, "what runs is not submitted again"
    assert [(row["state"], row["note"][:15]) for row in table(tmp_path)] == [
        ("finished", ""),
        ("failed", "layers are (9,)"),
    ]
