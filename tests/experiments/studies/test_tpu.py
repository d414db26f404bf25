import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.studies.cost import tpu
from experiments.studies.cost.programs import Setting

TINY = ["--networks", "convnet", "--batch-sizes", "4", "--num-experts", "3"]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed: pip install -e '.[experiments,tpu]'",
)
def test_both_steps_compile_for_a_tpu_without_one(tmp_path):
    # In a process of its own: the compiler's environment must be set before JAX is.
    command = [sys.executable, "-m", "experiments.studies.cost.tpu", *TINY, "--out-dir", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert first.rstrip().splitlines()[-1] == f"written: {tmp_path / 'tpu.json'}"
    written = (tmp_path / "tpu.json").read_text()
    (row,) = json.loads(written)["rows"]
    # Two forward passes against one and its backward pass.
    assert 0.6 < row["flops"]["spsa_step_vmapped"] / row["flops"]["full_step"] < 0.7
    # So small a network's activations stay in the core's own memory; the blended models of both probes do not.
    assert row["temporary_bytes"]["full_step"] >= 0
    assert row["temporary_bytes"]["spsa_step"] > 0
    assert min(row["compile_seconds"].values()) > 0
    # The seconds of compilation would differ, were it done again.
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "tpu.json").read_text() == written


def test_without_libtpu_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        tpu.main([*TINY, "--out-dir", str(tmp_path / "out")])
    assert "pip install -e '.[experiments,tpu]'" in str(stopped.value.code)
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_what_is_read(tmp_path, monkeypatch, capsys):
    # In the place of the compiler, which may not be installed: the programs of this machine.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setattr(tpu, "_one_chip", lambda: SingleDeviceSharding(jax.devices()[0]))
    assert tpu.read(tmp_path) is None
    written = tpu.main([*TINY, "--out-dir", str(tmp_path)])
    assert tpu.read(tmp_path) == written
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == f"written: {tmp_path / 'tpu.json'}"


def test_each_network_is_compiled_at_each_batch_size():
    settings = tpu.Arguments(networks=("vit", "resnet20"), batch_sizes=(512, 64)).settings()
    assert settings == [
        Setting(network=network, batch_size=batch_size, matmul_precision="default")
        for network in ("vit", "resnet20")
        for batch_size in (64, 512)
    ]
