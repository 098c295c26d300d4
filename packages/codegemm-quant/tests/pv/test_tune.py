import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from codegemm_kernels import BadInput, CheckpointError, NumericalError
from codegemm_quant.pv import tune as tune_module
from codegemm_quant.pv.config import TokenizeConfig, TuneConfig
from codegemm_quant.pv.processes import Processes
from codegemm_quant.pv.state import StateStore
from codegemm_quant.pv.student import load_student
from codegemm_quant.pv.tokens import TokenCache, tokenize
from codegemm_quant.pv.tune import micro_batch, tune

KEEP_A_STATE = """
import json, os, shutil, sys
from pathlib import Path
import torch.distributed
from codegemm_quant.pv.config import TuneConfig
from codegemm_quant.pv.state import StateStore
from codegemm_quant.pv.tune import tune

torch.distributed.init_process_group("gloo")  # one for all runs: torchrun's store does not serve a second
kept = sys.argv[1]
save = StateStore.save
def save_and_keep(store, step, *rest):
    save(store, step, *rest)
    if store.processes.leads and step == 8:
        shutil.copytree(store.folder, kept)
        shutil.copytree(str(store.folder).replace(".work", ".logs"), kept + ".logs")
StateStore.save = save_and_keep
for config in sys.argv[2:]:
    result = tune(TuneConfig(**json.loads(config)))
    assert (result is None) == (os.environ["RANK"] != "0")
torch.distributed.destroy_process_group()
"""


def in_two_processes(folder: Path, *configs: TuneConfig) -> None:
    """Run them one after the other; the state that the first saves after 8 steps is copied to `folder`/kept."""
    script = folder / "run.py"
    script.write_text(KEEP_A_STATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [str(script), str(folder / "kept"), *(json.dumps(asdict(config)) for config in configs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(config: TuneConfig) -> list[float]:
    """The loss of every step, in order and without gaps, then the evaluations'."""
    lines = (Path(f"{config.out}.logs") / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, config.steps + 1))
    return [record["loss"] for record in steps] + [r["divergence"] for r in records if "divergence" in r]


@pytest.fixture(scope="module")
def alone(folders, short_run, tmp_path_factory):
    """Config, result and losses of an undisturbed run in one process, and its state after 8 steps."""
    folder = tmp_path_factory.mktemp("alone")
    config = replace(short_run(folders, folder), micro_batch=2)
    save = StateStore.save

    def save_and_keep(store, step, *rest):
        save(store, step, *rest)
        if step == 8:
            shutil.copytree(store.folder, folder / "kept")
            shutil.copytree(f"{config.out}.logs", folder / "kept.logs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateStore, "save", save_and_keep)
        result = tune(config)
    return config, result, losses(config), folder / "kept"


def test_it_gets_better_and_says_so(alone):
    config, result, curve, _ = alone
    assert len(curve) == 23  # 20 steps, evaluations at the start, in the middle and at the end
    assert result["start"]["step"] == 0
    assert result["end"]["step"] == 20
    assert result["best"]["divergence"] == min(curve[20:])
    assert result["best"]["divergence"] < 0.9 * result["start"]["divergence"]
    logs = Path(f"{config.out}.logs")
    assert (logs / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert list(logs.glob("events.out.tfevents*"))
    records = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert sum(record.get("codes_changed", 0) for record in records) > 0
    assert not Path(f"{config.out}.work").exists()


def test_the_written_checkpoint_is_the_best_state(alone, folders):
    config, result, _, _ = alone
    before, after = (load_file(Path(path) / "model.safetensors") for path in (config.student, config.out))
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all(name.endswith((".codes", "norm.weight")) for name in same)  # fp16 norms may round back to 1
    assert any(name.endswith(".codes") and name not in same for name in before)
    for name in ("config.json", "tokenizer.json"):
        assert (Path(config.out) / name).read_text() == (Path(config.student) / name).read_text()
    card = (Path(config.out) / "README.md").read_text()
    for measured in ("divergence", "perplexity"):
        assert f" | {result['start'][measured]:.4f} | {result['best'][measured]:.4f} |" in card
    again = replace(config, student=config.out, out=f"{config.out}-again", steps=1, freeze=("codes",))
    assert tune(again)["start"]["divergence"] == pytest.approx(result["best"]["divergence"], rel=1e-5)


def test_two_processes_do_as_one_and_each_resumes_the_other(alone, tmp_path):
    config, _, curve, kept = alone
    both = replace(config, out=str(tmp_path / "both"), micro_batch=None)
    two = replace(config, out=str(tmp_path / "two"), resume=True, micro_batch=2)
    shutil.copytree(kept, f"{tmp_path}/two.work")  # saved by one, continued by two
    shutil.copytree(f"{kept}.logs", f"{tmp_path}/two.logs")
    in_two_processes(tmp_path, both, two)
    for config in (both, two):
        assert losses(config) == pytest.approx(curve, abs=1e-3)

    shutil.copytree(tmp_path / "kept", f"{tmp_path}/one.work")  # saved by two, continued by one
    shutil.copytree(tmp_path / "kept.logs", f"{tmp_path}/one.logs")
    one = replace(config, out=str(tmp_path / "one"), resume=True)
    tune(one)
    assert losses(one) == pytest.approx(curve, abs=1e-3)


def test_a_killed_run_continues_to_the_bit(alone, tmp_path, monkeypatch):
    config, _, curve, _ = alone
    config = replace(config, out=str(tmp_path / "tuned"))
    gradients = tune_module._Run._gradients

    def die(run, number):
        if number == 13:
            raise KeyboardInterrupt
        return gradients(run, number)

    with monkeypatch.context() as patch:
        patch.setattr(tune_module._Run, "_gradients", die)
        with pytest.raises(KeyboardInterrupt):
            tune(config)
    half = tmp_path / "tuned.work" / ".state-00000016.partial"  # killed while saving: never trusted
    half.mkdir()
    with pytest.raises(BadInput, match="continue it with --resume"):
        tune(config)
    with pytest.raises(BadInput, match=r"learning_rate was 0\.001, now 0\.1"):
        tune(replace(config, learning_rate=0.1, resume=True))
    tune(replace(config, resume=True))
    assert losses(config) == curve
    assert not Path(f"{config.out}.work").exists()


def test_never_worse_than_the_start(config):
    result = tune(replace(config, steps=4, learning_rate=0.9, code_learning_rate=0.9, schedule="constant"))
    assert result["end"]["divergence"] > result["start"]["divergence"]
    assert result["best"] == result["start"]
    before, after = (load_file(Path(path) / "model.safetensors") for path in (config.student, config.out))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_a_teacher_it_learns_the_text(config):
    result = tune(replace(config, teacher=None, resample=None, freeze=("codes",), steps=30, learning_rate=1e-2))
    assert result["best"]["perplexity"] < 0.8 * result["start"]["perplexity"]
    assert "divergence" not in result["start"]
    before, after = (load_file(Path(path) / "model.safetensors") for path in (config.student, config.out))
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(".codes"))


def test_every_pass_is_over_another_text_unless_it_is_told_not_to(config):
    one = replace(config, steps=1)
    text = replace(one, out=f"{config.out}-text", resample=0.0)
    other = replace(one, out=f"{config.out}-other", resample=1.0)
    first = []
    for way in (replace(one, resample=0.5), text, other):
        tune(way)
        first.append(losses(way)[0])
    assert len(set(first)) == 3  # other tokens, other losses


def test_memory_savers_change_nothing(config, monkeypatch):
    plain = tune(replace(config, steps=2))
    monkeypatch.setattr("codegemm_quant.pv.divergence.MAX_LOGITS", 257 * 40)  # four chunks a batch
    other = replace(config, steps=2, gradient_checkpointing=True, out=f"{config.out}-saving")
    saving = tune(other)
    for name in ("start", "end"):
        assert saving[name]["divergence"] == pytest.approx(plain[name]["divergence"], rel=1e-4)
        assert saving[name]["perplexity"] == pytest.approx(plain[name]["perplexity"], rel=1e-4)


def test_perplexity_is_that_of_the_text(config):
    """Against transformers' own loss, on windows of another text."""
    start = tune(replace(config, steps=1, eval_data=config.data, eval_windows=5))["start"]
    out = f"{config.out}-tokens"
    tokenize(TokenizeConfig(config.data, config.student, out))
    windows = TokenCache.open(Path(out)).windows(list(range(5)), 32)
    model = load_student(Path(config.student), Processes()).model.eval()
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert start["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def edited(config, tmp_path, tensors):
    """The student with some tensors replaced."""
    folder = tmp_path / "edited"
    shutil.copytree(config.student, folder)
    stored = load_file(folder / "model.safetensors") | tensors
    save_file({n: t for n, t in stored.items() if t.numel()}, folder / "model.safetensors", {"format": "pt"})
    return replace(config, student=str(folder))


def test_bad_models(config, tmp_path, folders):
    AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "other")
    shutil.copy(folders / "dense" / "tokenizer.json", tmp_path / "other")
    with pytest.raises(BadInput, match="knows 257 tokens and the teacher 300"):
        tune(replace(config, teacher=str(tmp_path / "other")))
    with pytest.raises(BadInput, match="not quantised"):
        tune(replace(config, student=str(folders / "dense")))
    with pytest.raises(BadInput, match="is quantised already"):
        tune(replace(config, teacher=config.student))
    scaled = edited(config, tmp_path / "scaled", {})
    settings = Path(scaled.student) / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"logits_scaling": 2.0}))
    with pytest.raises(BadInput, match="changes its logits after the head"):
        tune(scaled)
    norm = "model.norm.weight"
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        tune(edited(config, tmp_path / "a", {norm: torch.empty(0)}))
    with pytest.raises(CheckpointError, match="the model has no such matrix"):
        tune(edited(config, tmp_path / "b", {"model.extra.codes": torch.zeros(2, 4, 64, dtype=torch.int32)}))
    with pytest.raises(NumericalError, match="not finite"):
        tune(edited(config, tmp_path / "c", {norm: torch.full((64,), float("nan"), dtype=torch.float16)}))


def test_a_loss_that_stops_being_finite(config, monkeypatch):
    gradients = tune_module._Run._gradients
    monkeypatch.setattr(
        tune_module._Run,
        "_gradients",
        lambda run, number: gradients(run, number) * (float("nan") if number == 3 else 1),
    )
    with pytest.raises(NumericalError, match="not finite in step 3: lower learning_rate"):
        tune(config)


def test_bad_input(config, tmp_path):
    for changes, message in [
        ({"data": str(tmp_path / "none.txt")}, "does not exist"),
        ({"sequence_length": 129}, "more than the 128 positions"),
        ({"out": str(tmp_path)}, "exists already"),
        ({"micro_batch": 3}, "cannot be run 3 at a time"),
        ({"device": "cuda:77"}, "is not there"),
    ]:
        with pytest.raises(BadInput, match=message):
            tune(replace(config, **changes))
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(BadInput, match="too short to train on: it has 9 tokens"):
        tune(replace(config, data=str(tmp_path / "short.txt")))
    with pytest.raises(BadInput, match="cannot be shared by 3 processes"):
        micro_batch(config, 3)
    for changes, message in [
        ({"steps": 0}, "steps must be at least 1"),
        ({"max_code_change": 0.0}, "more than 0 and at most 1"),
        ({"trust_ratio": 2.0}, "trust_ratio must be"),
        ({"beta2": 1.0}, "beta2 must be"),
        ({"delta_decay": -0.1}, "between 0 and 1"),
        ({"resample": 1.5}, "between 0 and 1"),
        ({"teacher": None}, "give a teacher"),
        ({"freeze": ("codes", "codebooks", "others")}, "everything is frozen"),
    ]:
        with pytest.raises(BadInput, match=message):
            replace(config, **changes)


def test_token_budget(config):
    assert replace(config, tokens=8 * 32 * 7 + 5).total_steps == 7
    assert replace(config, tokens=10**9).total_steps == 20
    assert replace(config, tokens=1).total_steps == 1
