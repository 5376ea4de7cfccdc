"""The loop: the loss is the model's own, training learns, and a killed run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from adapters import cli
from adapters.errors import Cancelled, RunInvalid, ServerUnreachable
from adapters.prompts import Example
from adapters.registry_door import RegistryDoor
from adapters.runs import TrainRun
from tests.train_case import TrainCase, train_case
from train import checkpoints, job, loop, models
from train.progress import Quiet, Reporter


@pytest.fixture
def case(tmp_path: Path, tiny_base: Path) -> TrainCase:
    return train_case(tmp_path, tiny_base)


def run_job(
    case: TrainCase, *overrides: str, resume: bool = False, force: bool = False, reporter: Reporter | None = None
) -> job.Trained:
    door = case.door()
    try:
        prepared = job.prepare(case.run(*overrides), case.home, door)
        return job.train(prepared, door, reporter or Quiet(), resume=resume, force=force, resume_command="go on")
    finally:
        door.close()


def child(case: TrainCase, *arguments: str) -> subprocess.Popen[str]:
    """`loraplane train` in a process of its own."""
    line = [sys.executable, "-m", "adapters.cli", "train", str(case.run_file), "--home", str(case.home.root)]
    return subprocess.Popen([*line, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def metrics(folder: Path) -> list[tuple[int, float, float, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(m["step"], m["loss"], m["lr"], m["grad_norm"]) for m in map(json.loads, lines)]


def when(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is so, at most a minute, and no longer than the process lives."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)


def folder_of(case: TrainCase) -> Path:
    (folder,) = case.home.runs.iterdir()
    return folder


EXAMPLES = [
    Example(tuple(range(10, 10 + n)), tuple([False] * (n - answer) + [True] * answer))
    for n, answer in ((9, 3), (23, 5), (14, 1), (20, 19))
] + [Example(tuple(range(30, 42)), (False,) * 4 + (True,) * 2 + (False,) * 3 + (True,) * 3)]


def test_the_loss_equals_the_models_own_on_the_same_labels(tiny_base: Path) -> None:
    """Left padding, answers' logits only, several turns: the figure is that of one plain pass for each sequence."""
    model = models.load_with_lora(tiny_base, train_run().lora, bf16=False, max_length=64, seed=0).eval()
    batch = loop.collate(EXAMPLES, pad_id=0)
    assert batch["logits_to_keep"] < batch["input_ids"].shape[1] + 1
    total = torch.tensor(0.0, dtype=torch.float64)
    with torch.no_grad():
        for example in EXAMPLES:
            ids = torch.tensor([example.ids])
            labels = torch.where(torch.tensor([example.loss]), ids, loop.IGNORED)
            count = sum(example.loss[1:])
            total += model(input_ids=ids, labels=labels).loss.double() * count
        plain = total / sum(sum(e.loss[1:]) for e in EXAMPLES)
        ours = loop.completion_loss(model, batch)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-6)


def test_only_the_logits_of_answers_are_computed() -> None:
    short = loop.collate([EXAMPLES[1], EXAMPLES[0]], pad_id=0)
    assert short["logits_to_keep"] == 6
    assert short["input_ids"].shape[1] == 32


def train_run() -> TrainRun:
    return TrainRun.model_validate({"name": "x", "data": {"source": "x.jsonl"}, "lora": {"r": 4}})


def test_training_learns_and_leaves_a_version_with_its_facts(case: TrainCase) -> None:
    done = run_job(case)
    facts = done.version.facts
    assert done.version.id == "backwards@1"
    assert done.version.prompt_format.prefix == "Turn: "
    assert float(str(facts["final_loss"])) < 0.7 * float(str(facts["first_loss"]))
    for key in ("run_digest", "data_digest", "eval_data_digest", "base_digest", "seed", "lr", "steps", "seconds"):
        assert facts[key] is not None, key
    assert [m[0] for m in metrics(done.folder)] == list(range(1, int(str(facts["steps"])) + 1))
    assert (done.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_constant_rate_warms_up_as_the_run_says(case: TrainCase) -> None:
    """optim.warmup was left out where the schedule is constant."""
    done = run_job(case, "optim.schedule=constant", "optim.warmup=4", "optim.max_steps=6")
    assert [m[2] for m in metrics(done.folder)] == pytest.approx([0.0, 0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_the_peft_folder_names_the_base_and_holds_nothing_of_this_machine(case: TrainCase) -> None:
    adapter = run_job(case).folder / "adapter"
    assert sorted(p.name for p in adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "golden_rows.json", "prompt_format.json",
    ]  # fmt: skip
    config = (adapter / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == "tiny"
    assert str(case.home.root) not in config


def test_the_same_run_is_not_trained_twice_unless_forced(case: TrainCase) -> None:
    first = run_job(case)
    again = run_job(case)
    assert (again.fresh, again.version.id) == (False, first.version.id)
    assert run_job(case, "note=only the note differs").fresh is False
    forced = run_job(case, force=True)
    # On a CPU in float32 the same run gives the same bytes, and the same bytes are the same version.
    assert (forced.fresh, forced.version.digest) == (True, first.version.digest)
    assert run_job(case, "optim.seed=1").version.number == 2


def test_an_earlier_step_can_be_published_and_does_not_pass_for_the_run(case: TrainCase) -> None:
    whole = run_job(case)
    door = case.door()
    try:
        prepared = job.prepare(case.run(), case.home, door)
        early = job.publish_step(prepared, door, Quiet(), 20)
        with pytest.raises(RunInvalid, match="kept are 20, 25"):
            job.publish_step(prepared, door, Quiet(), 5)
    finally:
        door.close()
    assert (early.version.number, early.version.facts["steps"]) == (2, 20)
    assert run_job(case).version.id == whole.version.id


def test_a_killed_run_resumes_to_the_very_weights_of_an_uninterrupted_one(tmp_path: Path, tiny_base: Path) -> None:
    """kill -9 after some steps, in a process of its own; dropout is on, so the random state must come back too."""
    cases = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        cases.append(
            train_case(tmp_path / name, tiny_base, data={"source": str(tmp_path / "rows.jsonl"), "holdout": 0.25})
        )
    (tmp_path / "whole" / "rows.jsonl").rename(tmp_path / "rows.jsonl")
    whole = run_job(cases[0])
    killed = child(cases[1], "--set", "optim.seed=0")
    when(lambda: any(cases[1].home.runs.glob("*/states/checkpoint-1?/" + checkpoints.MANIFEST)), killed)
    killed.kill()
    killed.communicate()
    assert not (folder_of(cases[1]) / "adapter").exists()
    resumed = run_job(cases[1], resume=True)
    assert metrics(resumed.folder) == metrics(whole.folder)
    assert resumed.version.digest == whole.version.digest
    ours, theirs = (load_file(d.folder / "adapter" / "adapter_model.safetensors") for d in (resumed, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_sigterm_saves_and_says_how_to_go_on(case: TrainCase) -> None:
    process = child(case, "--set", "optim.epochs=400", "--set", "checkpoint.every_steps=0")
    when(lambda: any(len(p.read_text().splitlines()) > 3 for p in case.home.runs.glob("*/metrics.jsonl")), process)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--set optim.epochs=400 --set checkpoint.every_steps=0" in said
    assert said.rstrip().endswith("--resume")
    with pytest.raises(RunInvalid, match="--resume"):
        run_job(case, "optim.epochs=400", "checkpoint.every_steps=0")
    (state,) = (folder_of(case) / "states").iterdir()
    digest = json.loads((state / checkpoints.MANIFEST).read_text())["run"]
    assert checkpoints.newest_state(state.parent, digest, print) == state


class CtrlC(Quiet):
    """Presses Ctrl-C, once or twice, when the third step is told."""

    def __init__(self, times: int) -> None:
        self.times = times

    def step(self, done: int, **figures: float) -> None:
        for _ in range(self.times if done == 3 else 0):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_after_the_step_in_hand_and_the_second_one_at_once(case: TrainCase) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Cancelled, match="stopped after step 4 of 26; go on with: go on"):
        run_job(case, reporter=CtrlC(1))
    assert [m[0] for m in metrics(folder_of(case))] == [1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt):
        run_job(case, reporter=CtrlC(2), force=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert run_job(case, force=True).version.number == 1


class Unreachable:
    """A door that fails to publish, as a server that has gone."""

    def __init__(self, door: RegistryDoor) -> None:
        self.door = door

    def __getattr__(self, name: str) -> object:
        return getattr(self.door, name)

    def publish(self, *_: object, **__: object) -> None:
        raise ServerUnreachable("gone")


@pytest.mark.parametrize("every", ["5", "0"])
@pytest.mark.parametrize("force", [False, True])
def test_a_run_that_could_not_be_published_is_published_without_training_again(
    case: TrainCase, every: str, force: bool
) -> None:
    """Where no states were saved, the finished adapter was deleted and trained again."""
    setting = f"checkpoint.every_steps={every}"
    told = Steps()
    door = case.door()
    try:
        prepared = job.prepare(case.run(setting), case.home, door)
        with pytest.raises(ServerUnreachable):
            job.train(prepared, Unreachable(door), told, resume=False, force=force, resume_command="")  # type: ignore[arg-type]
    finally:
        door.close()
    place = folder_of(case) / "again" if force else folder_of(case)
    assert f"it lies in {place / 'adapter'}" in told.said[-1]
    assert f"loraplane adapters publish backwards {place / 'adapter'} --base tiny" in told.said[-1]
    seen = metrics(place)
    again = Steps()
    done = run_job(case, setting, resume=force, force=force, reporter=again)
    assert done.version.id == "backwards@1"
    assert done.version.facts["final_loss"] is not None
    assert again.seen == []
    assert metrics(done.folder) == seen


def test_a_finished_adapter_whose_bytes_changed_is_not_published(case: TrainCase) -> None:
    door = case.door()
    try:
        prepared = job.prepare(case.run(), case.home, door)
        with pytest.raises(ServerUnreachable):
            job.train(prepared, Unreachable(door), Quiet(), resume=False, force=False, resume_command="")  # type: ignore[arg-type]
    finally:
        door.close()
    config = prepared.folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(RunInvalid, match="interrupted"):
        run_job(case)


def test_a_forced_training_leaves_the_finished_run_until_it_is_done(case: TrainCase) -> None:
    """Ctrl-C under --force left neither the published run's steps nor a command that went on."""
    whole = run_job(case)
    kept = sorted(p.name for p in (whole.folder / "steps").iterdir())
    with pytest.raises(Cancelled):
        run_job(case, reporter=CtrlC(1), force=True)
    assert sorted(p.name for p in (whole.folder / "steps").iterdir()) == kept
    assert len(metrics(whole.folder)) == 26
    steps = Steps()
    resumed = run_job(case, resume=True, force=True, reporter=steps)
    assert steps.seen == list(range(5, 27))
    assert (resumed.fresh, resumed.version.digest) == (True, whole.version.digest)
    assert not (whole.folder / "again").exists()
    assert len(metrics(whole.folder)) == 26


def test_ctrl_c_under_force_says_a_command_that_goes_on(case: TrainCase) -> None:
    process = child(case, "--force", "--set", "optim.epochs=400")
    when(lambda: any(len(p.read_text().splitlines()) > 3 for p in case.home.runs.glob("*/*/metrics.jsonl")), process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.rstrip().endswith("--force --resume")


def test_edited_settings_that_leave_the_weights_are_told_with_the_way_to_change_them(case: TrainCase) -> None:
    """They were ignored without a word, also where --force trained the same bytes again."""
    run_job(case)
    for force in (False, True):
        told = Steps()
        edits = ("gate.margin=0.5", "eval.max_tokens=9", "note=new", "data.eval_limit=9", "checkpoint.keep=9")
        run_job(case, *edits, force=force, reporter=told)
        lines = [line for line in told.said if "has no effect" in line]
        assert len(lines) == 4
        data, evaluation, gate, note = lines
        assert "backwards@1" in gate
        assert "gate.margin 0.5, not 0.0" in gate
        assert "loraplane adapters policy backwards" in gate
        assert "eval.max_tokens 9, not 8" in evaluation
        assert "data.eval_limit 9, not 8" in data
        assert "note 'new', not ''" in note
    told = Steps()
    run_job(case, reporter=told)
    assert not [line for line in told.said if "has no effect" in line]


class Steps(Quiet):
    """Remembers which steps were told, and what was said."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, done: int, **figures: float) -> None:
        self.seen.append(done)


def sealed_state(folder: Path, step: int) -> Path:
    state = folder / f"checkpoint-{step}"
    state.mkdir(parents=True)
    (state / "optimizer.pt").write_bytes(b"numbers")
    checkpoints.seal(state, "run")
    return state


@pytest.mark.parametrize("harm", ["change", "add", "remove", "unseal", "other run"])
def test_a_state_that_is_not_as_we_wrote_it_is_never_resumed_from(tmp_path: Path, harm: str) -> None:
    """States hold pickles of our own; a stranger's must not be opened."""
    older, newer = sealed_state(tmp_path, 9), sealed_state(tmp_path, 10)
    if harm == "change":
        (newer / "optimizer.pt").write_bytes(b"strange")
    elif harm == "add":
        (newer / "scheduler.pt").write_bytes(b"strange")
    elif harm == "remove":
        (newer / "optimizer.pt").unlink()
    elif harm == "unseal":
        (newer / checkpoints.MANIFEST).unlink()
    else:
        checkpoints.seal(newer, "another")
    said: list[str] = []
    assert checkpoints.newest_state(tmp_path, "run", said.append) == older
    assert "checkpoint-10 is not used" in said[0]


def test_a_run_that_another_process_trains_is_refused(case: TrainCase) -> None:
    done = run_job(case)
    with FileLock(done.folder / ".lock"), pytest.raises(RunInvalid, match="by another process"):
        run_job(case)


def test_a_loss_that_is_no_number_stops_the_run(case: TrainCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loop, "completion_loss", lambda model, batch: next(model.parameters()).sum() * 0 + model_nan(model)
    )
    with pytest.raises(RunInvalid, match=r"lower optim\.lr"):
        run_job(case)


def model_nan(model: torch.nn.Module) -> torch.Tensor:
    """A NaN that has a gradient."""
    return sum(p.sum() for p in model.parameters() if p.requires_grad) * torch.tensor(float("nan"))


def test_targets_that_fit_no_module_and_lengths_beyond_the_base_are_refused(case: TrainCase) -> None:
    with pytest.raises(RunInvalid, match=r"lora\.targets"):
        run_job(case, "lora.targets=[nothing_here]")
    with pytest.raises(RunInvalid, match="512 positions"):
        run_job(case, "max_length=4096")


def test_a_dry_run_shows_rows_and_trains_nothing(case: TrainCase, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", str(case.run_file), "--home", str(case.home.root), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["event"] == "plan"
    assert plan["rows"] + plan["held_out_rows"] <= 64
    assert "⟦" in plan["examples"][0]
    assert not case.home.runs.exists()


def test_rows_that_are_tested_on_are_not_trained_on(tmp_path: Path, tiny_base: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    case = train_case(tmp_path, tiny_base, data={"source": str(rows), "eval_source": str(tmp_path / "held.jsonl")})
    (tmp_path / "held.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:10]))
    door = case.door()
    try:
        prepared = job.prepare(case.run(), case.home, door)
    finally:
        door.close()
    assert (prepared.rows.leaked, len(prepared.rows.rows)) == (10, 54)


def test_cancelled_is_what_a_stop_raises() -> None:
    """The exit code of an interrupted run is an interrupt's, so that scripts can tell it from a failure."""
    assert cli.exit_code(Cancelled) == 128 + signal.SIGINT


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no CPU affinity on this system")
def test_torch_gets_the_cores_that_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert models.use_all_cores() == len(os.sched_getaffinity(0)) == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert models.use_all_cores() == 1 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
