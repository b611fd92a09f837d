"""The command line: what it prints, what it refuses and with which words."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import lt_kernels
from lt_kernels import cli, demo
from lt_kernels.bench import records, runner
from lt_kernels.demo import digits


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_no_command_prints_help(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert "lt-kernels demo" in out


@pytest.mark.parametrize("command", [[], ["info"], ["bench"], ["demo"]], ids=lambda c: " ".join(c) or "top")
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert "examples:\n  lt-kernels" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert lt_kernels.__version__ in capsys.readouterr().out


def test_info_json_is_the_dictionary(capsys):
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0
    assert json.loads(out) == json.loads(json.dumps(lt_kernels.info()))


def test_info_names_every_backend_and_reason(capsys):
    _, out, _ = run(capsys, "info")
    assert f"torch          {lt_kernels.info()['torch']}" in out
    for op, devices in lt_kernels.info()["backends"].items():
        assert op in out
        for backends in devices.values():
            for backend, reason in backends.items():
                assert backend in out
                assert reason is None or reason in out


def test_info_without_a_cuda_device_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("lt_kernels.ops._native.unavailable_reason", lambda device: None)  # built for CUDA
    for op, devices in lt_kernels.info()["backends"].items():
        assert devices["cuda"]["reference"] == devices["cuda"]["native"] == "no CUDA device here", op
        assert devices["cuda"]["triton"] is not None, op
        assert devices["cpu"]["reference"] is None, op
    _, out, _ = run(capsys, "info")
    assert "cuda   native     not available: no CUDA device here" in out
    assert "cuda   native     available" not in out


def test_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "lt_kernels", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"lt_kernels {lt_kernels.__version__}"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bench", "softmax"], ["unknown op 'softmax'", "margin_cross_entropy", "expert_fusion"]),
        (["bench", "margin_cross_entropy", "softmax"], ["unknown op 'softmax'", "margin_cross_entropy"]),
        (["bench", "expert_fusion", "--case", "tiny-3x5"], ["expert_fusion has none of the cases", "bench --list"]),
        (["bench", "--dirty"], ["--dirty goes with --save"]),
        (["bench", "--provider", "jax"], ["unknown provider 'jax'", "eager", "lt[native]"]),
        (["bench", "--case", "mnist"], ["unknown case 'mnist'", "inat18-n512"]),
        (["bench", "--dtype", "int8"], ["unknown dtype 'int8'", "bfloat16"]),
        (["bench", "--direction", "up"], ["unknown direction 'up'", "fwd_bwd"]),
        (["bench", "--device", "tpu"], ["unknown device 'tpu'", "cuda"]),
        (["bench", "--seconds", "0", "--device", "cuda"], ["no CUDA device is available"]),
        (["bench", "--repetitions", "0"], ["repetitions: got 0", "at least 1"]),
        (["bench", "--budget", "-1"], ["budget: got -1.0", "0 or more"]),
        (["demo", "--seeds", "0"], ["--seeds: got 0"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("bench", "demo") else "",
)
def test_bad_arguments_name_the_choices(capsys, monkeypatch, argv, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert err.startswith("lt-kernels: ")
    for word in words:
        assert word in err


def test_provider_asked_for_by_name_must_be_available(capsys, monkeypatch):
    monkeypatch.setattr("lt_kernels.bench.runner.unavailable_reason", lambda *_: "there is none here")
    status, _, err = run(capsys, "bench", "--provider", "lt[triton]", "--case", "tiny-3x5")
    assert status == 2
    assert "lt[triton] cannot run on cpu: there is none here" in err


def test_bench_list_names_all(capsys):
    _, out, _ = run(capsys, "bench", "--list")
    for op, module in runner.OPS.items():
        for name in (op, *module.cases, *module.providers):
            assert name in out


def test_bench_runs_and_writes(capsys, tmp_path):
    path = tmp_path / "out.json"
    argv = ["--case", "tiny-3x5", "--provider", "eager,lt[reference]", "--dtype", "float32", "--repetitions", "1"]
    status, out, _ = run(capsys, "bench", *argv, "--seconds", "0", "--json", str(path))
    assert status == 0
    for direction in ("fwd", "bwd", "fwd_bwd"):
        assert f"tiny-3x5           float32   {direction:8} lt[reference]" in out
    assert f"wrote {path}" in out


def test_bench_of_a_case_measures_the_op_that_has_it(capsys):
    argv = ["--case", "tiny-3x4x5", "--provider", "eager", "--dtype", "float32", "--direction", "fwd"]
    status, out, _ = run(capsys, "bench", *argv, "--repetitions", "1", "--seconds", "0")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "margin_cross_entropy has no case tiny-3x4x5: another op has"
    assert [line.split()[3] for line in lines if line.startswith("tiny")] == ["gemms", "eager"]
    assert len([line for line in lines if "has no case" in line]) == len(runner.OPS) - 1


QUICK = ["--dtype", "float32", "--direction", "fwd", "--repetitions", "1", "--seconds", "0", "--provider", "eager"]


def test_bench_of_several_ops_measures_each_once(capsys):
    ops = ["expert_fusion", "margin_cross_entropy", "expert_fusion"]
    status, out, _ = run(capsys, "bench", *ops, "--case", "tiny-3x5,tiny-2x3x5", *QUICK)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if " fwd " in line] == ["tiny-2x3x5", "tiny-3x5"]


def test_bench_saves_results_of_committed_code_alone(capsys, monkeypatch, tmp_path):
    results = tmp_path / records.RESULTS
    results.mkdir(parents=True)
    argv = ["bench", "margin_cross_entropy", "--root", str(tmp_path), "--case", "tiny-3x5", *QUICK, "--save"]
    monkeypatch.setattr(records, "git_revision", lambda: "0123-dirty")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", None)  # refused before anything is measured
        status, _, err = run(capsys, *argv)
    assert status == 2
    assert "--save: got revision 0123-dirty" in err
    assert "or give --dirty" in err
    assert list(results.iterdir()) == []
    path = results / records.device_slug("cpu") / "margin_cross_entropy.json"
    assert run(capsys, *argv, "--dirty")[0] == 0
    assert {one.provider for one in records.load(path)} == {"eager"}
    monkeypatch.setattr(records, "git_revision", lambda: "0123")
    assert run(capsys, *argv)[0] == 0


def test_bench_fails_if_a_provider_asked_for_disagrees(capsys, monkeypatch):
    providers = runner.OPS["margin_cross_entropy"].providers
    wrong = dataclasses.replace(providers["loop"], make=lambda inputs: lambda: inputs["logits"].sum())
    monkeypatch.setitem(providers, "loop", wrong)
    argv = ["--case", "tiny-3x5", "--dtype", "float32", "--direction", "fwd", "--repetitions", "1", "--seconds", "0"]
    status, out, err = run(capsys, "bench", *argv, "--provider", "eager,loop")
    assert status == 1
    assert "float32   fwd      eager" in out
    assert err.startswith("lt-kernels: loop on tiny-3x5 float32: AssertionError")


def test_demo_without_its_packages_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(demo, "missing_packages", lambda: ["scikit-learn"])
    status, _, err = run(capsys, "demo")
    assert status == 2
    assert "scikit-learn: pip install 'lt_kernels[demo]'" in err


def test_demo_trains_and_draws(capsys, tmp_path):
    for package in ("sklearn", "torchmetrics", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    status, out, _ = run(capsys, "demo", "--out", str(tmp_path), "--seeds", "1", "--epochs", "2", "--skip-throughput")
    assert status == 0
    for name in demo.LOSSES:
        assert f"\n{name:20}" in out
    rows = {line[:20].strip(): line[20:].split() for line in out.splitlines() if line[:20].strip() in demo.LOSSES}
    columns = len(demo.GROUPS) + len(demo.ERRORS) + len(demo.SPREADS)
    assert {len(row) for row in rows.values()} == {columns}
    for name, row in rows.items():
        spreads = row[-len(demo.SPREADS) :]
        assert spreads == ["-"] * 3 if name.startswith("BalPoE") else all(0 < float(each) < 100 for each in spreads)
    assert rows["logit adjustment"] != rows["logit adj. + views"]
    for plot in ("accuracy_per_class.png", "reliability.png", "embeddings.png"):
        assert str(tmp_path / plot) in out
        assert (tmp_path / plot).stat().st_size > 10_000


def test_demo_split_is_long_tailed_balanced_and_disjoint():
    pytest.importorskip("sklearn")
    counts = digits.class_counts()
    assert counts[0] / counts[-1] == digits.IMBALANCE
    split = digits.Split.make(0)
    assert split.labels.bincount().tolist() == counts.tolist()
    assert split.test_labels.bincount().tolist() == [digits.TEST_PER_CLASS] * digits.CLASSES
    train, test = ({tuple(image.flatten().tolist()) for image in part} for part in (split.images, split.test_images))
    assert not train & test


def test_demo_views_are_shifts_of_a_pixel_and_noise(monkeypatch):
    monkeypatch.setattr(digits, "NOISE", 0.0)
    images = torch.rand(50, 1, 8, 8)
    views = digits.view(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    shifts = torch.stack([padded[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)], 1)
    equal = (shifts == views[:, None]).flatten(2).all(2)
    assert equal.any(1).all()
    assert equal.any(0).all()


def test_demo_probe_leaves_the_network_as_it_is():
    torch.manual_seed(0)
    network = digits.Network("SupCon")
    before = [parameter.clone() for parameter in network.parameters()]
    split = digits.Split(*[torch.rand(20, 1, 8, 8), torch.arange(20) % digits.CLASSES] * 2)
    probed = digits.probe(network, split, lt_kernels.MarginCrossEntropyBase())
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    torch.testing.assert_close(probed.embed(split.images), network.embed(split.images))
    assert probed.predict(split.images).sum(1).allclose(torch.ones(20))
