"""The scaling model: its volumes are the ring's, its limits are the obvious ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench import scaling
from bench.scaling import Cluster, Job, job, ring_ms, step
from fastgpt.model.gpt import GPT, ModelShape

FREE = Cluster(nvlink_gbs=1e9, link_gbs=1e9, latency_us=1e-9)


def test_jobs_are_the_presets() -> None:
    shape = ModelShape(2, 2, 32, 16, 50, bias=False)
    flops = scaling.job("gpt2").flops_per_token
    assert flops == pytest.approx(854.8e6, rel=1e-3)
    assert job("gpt2").rows == 480 and job("gpt2").parameters == pytest.approx(124.5e6, rel=2e-3)
    assert scaling.memory.n_parameters(shape) == sum(p.numel() for p in GPT(shape).parameters())


def test_one_gpu_only_computes() -> None:
    """480 x 1024 tokens of 854.8 MFLOPs at half of 989.4 TFLOP/s."""
    alone = step(job("gpt2"), Cluster(), 1)
    assert alone.total == alone.compute == pytest.approx(849.3, rel=1e-3)


@pytest.mark.parametrize("fsdp", [False, True])
def test_free_links_scale_perfectly(fsdp: bool) -> None:
    work = replace(job("gpt2_xl"), rows=512)
    alone = step(work, FREE, 1).total
    for n in (2, 8, 64, 512):
        assert step(work, FREE, n, fsdp=fsdp).total == pytest.approx(alone / n, rel=1e-4)


def test_ring_volumes() -> None:
    """Inside a node 2 (g - 1) / g; between nodes the GPUs' links work together."""
    cluster = Cluster(nvlink_gbs=100, link_gbs=10, latency_us=1e-12)
    assert ring_ms(1e9, cluster, 2, 2.0) == pytest.approx(10.0)
    assert ring_ms(1e9, cluster, 8, 2.0) == pytest.approx(17.5)
    assert ring_ms(1e9, cluster, 16, 2.0) == pytest.approx(17.5 + 12.5)
    assert ring_ms(1e9, cluster, 8, 1.0) == pytest.approx(17.5 / 2)


def test_what_the_backward_pass_hides() -> None:
    """Fast links leave one bucket; slow ones all but two thirds of the last micro-batch."""
    work = Job("w", parameters=10**9, flops_per_token=6e9, rows=64, block_size=1024, batch_size=8)
    slow = Cluster(nvlink_gbs=1.0, latency_us=1e-9)
    found = step(work, slow, 2)
    assert found.exposed == pytest.approx(found.communication - found.compute / 4 * 2 / 3)
    fast = step(work, Cluster(latency_us=1e-9), 2)
    assert fast.exposed == pytest.approx(ring_ms(25e6, Cluster(latency_us=1e-9), 2, 2.0))


def test_a_batch_that_does_not_divide() -> None:
    assert "480 sequences do not divide by 512" in step(job("gpt2"), Cluster(), 512).problem


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([]) == 0
    said = capsys.readouterr().out
    assert "on paper, not a measurement" in said and "stops paying at" in said
    rows = [line.split() for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows[:10]] == [
        "1",
        "2",
        "4",
        "8",
        "16",
        "32",
        "64",
        "128",
        "256",
        "512",
    ]
    efficiencies = [int(row[5].rstrip("%")) for row in rows[:10]]
    assert efficiencies == sorted(efficiencies, reverse=True)


def test_bad_arguments() -> None:
    with pytest.raises(SystemExit) as e:
        scaling.main(["--mfu=0"])
    assert e.value.code == 2


def test_the_documented_table_is_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([]) == 0
    text = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
    assert capsys.readouterr().out.strip() in text
