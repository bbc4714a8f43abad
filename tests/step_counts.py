"""Launches and bytes of the compiled training step: none may come back that was got rid of.

    make ledger

Steps of two layers of GPT-2 124M's width are compiled for an H100 that need not be here, with and
without biases and dropout, on our kernels and on Inductor's; what they launch is counted. They run
on fake tensors, which have no values: a step that waited for the device to read one would fail.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from bench import fake_step, ledger, setup

# (bias, dropout, kernels): launches a layer forward and backward, bytes a token of both.
MOST = {
    ("True", "0.0", "auto"): (8, 15, 788_685, 316_375),
    ("False", "0.0", "auto"): (8, 14, 788_675, 306_026),
    ("True", "0.1", "auto"): (8, 13, 805_245, 300_633),
    ("False", "0.1", "auto"): (8, 12, 805_235, 299_498),
    ("True", "0.0", "eager"): (8, 24, 477_314, 754_165),
    ("False", "0.1", "eager"): (8, 14, 481_149, 720_050),
}
# Launches of Muon's in a step of two layers; of twelve there are nine more.
MUON = 79
SMALL = {
    "n_layer": "2", "batch_size": "8", "gradient_accumulation_steps": "1", "dtype": "bfloat16"
}  # fmt: skip


@pytest.fixture(scope="module")
def steps() -> dict[tuple[str, ...], fake_step.Step]:
    """The steps of `MOST`, Muon's, one of two micro-batches, a small and a deterministic one."""
    names = "bias", "dropout", "kernels"
    flags: dict[tuple[str, ...], dict[str, str]]
    flags = {k: dict(zip(names, k, strict=True)) for k in MOST}
    more = {
        **flags,
        ("muon",): {"optimizer": "muon"},
        ("adding",): {"gradient_accumulation_steps": "2"},
    }
    asked = {k: fake_step.Request("gpt2", {**SMALL, **f}) for k, f in more.items()}
    asked["small",] = fake_step.Request("shakespeare_char", {"dtype": "bfloat16"})
    last = {**SMALL, "deterministic": "True"}  # it holds for the process
    asked["deterministic",] = fake_step.Request("gpt2", last)

    def recorded(keys: list[tuple[str, ...]]) -> dict[tuple[str, ...], fake_step.Step]:
        return dict(zip(keys, fake_step.record(*(asked[k] for k in keys)), strict=True))

    with ThreadPoolExecutor(2) as pool:  # each half in a process of its own
        first, second = pool.map(recorded, ([*asked][::2], [*asked][1::2]))
    return first | second


def test_a_small_models_step_has_few_launches(steps) -> None:
    """shakespeare_char: forward, backward, clipping and update, 150 in all."""
    step = steps[("small",)]
    assert len(step.forward) + len(step.backward) + len(step.rest) <= 150
    assert len([x for x in step.rest if x.what == "triton"]) == 1  # clipping's and guard's scalars


def counts(step: fake_step.Step, kernels: str) -> tuple[float, ...]:
    config = setup.preset_of("gpt2", {**SMALL, "kernels": kernels, "device": "cpu"})
    sizes = ledger.sizes_of(config, setup.GPT2_VOCAB)
    p = ledger.predict(step, config, sizes, ledger.Rates(ledger.find("h100")))
    return tuple(f(phase) for f in (p.a_layer, p.bytes_a_token) for phase in ledger.PHASES[:2])


@pytest.mark.parametrize("key", MOST, ids="-".join)
def test_nothing_was_added(key: tuple[str, str, str], steps) -> None:
    most, found = MOST[key], counts(steps[key], key[2])
    assert all(x <= m for x, m in zip(found[:2], most[:2], strict=True)), (found, most)
    assert all(x <= 1.005 * m for x, m in zip(found[2:], most[2:], strict=True)), (found, most)


def test_a_deterministic_step_sums_in_one_order(steps) -> None:
    """dq has a kernel of its own, not only where that is faster, and PyTorch sorts tokens."""
    plain, dropout, deterministic = (
        {launch.what for launch in steps[key].backward}
        for key in (("False", "0.0", "auto"), ("False", "0.1", "auto"), ("deterministic",))
    )
    assert "attention_query" in plain & deterministic - dropout
    assert any("index_put" in name for name in deterministic - plain)


def test_gradients_of_weights_add_up_in_their_products(steps) -> None:
    """And the head's in its op: no pass adds them or copies sums, and they are zeroed once."""
    step = steps[("adding",)]
    adds = [x for x in step.rest if x.what == "add_"]
    assert adds and max(x.writes for x in adds) <= 4 * 1024 * 768  # vectors and positions
    zeroed = sum(x.writes for x in step.rest if x.what == "_foreach_zero_")
    weights = 4 * (50304 + 1024 + 2 * 12 * 768) * 768
    assert weights <= zeroed < 1.01 * weights
    graph = step.forward + step.backward
    assert not any("copy_" in op for x in step.backward for op in (x.what, *x.ops))
    assert sum(x.what == "addmm" and x.shape[2] == 8 * 1024 for x in step.backward) == 2 * 4
    assert [x.what for x in graph if "fastgpt.add_scaled" in x.ops] == ["addcmul_"]
    assert [x.what for x in graph if "fastgpt.add_rows" in x.ops] == ["index_add_"]


def test_muon_takes_few_launches(steps) -> None:
    """None a layer: matrices of one shape are multiplied together. It is no model FLOP's time."""
    step = steps[("muon",)]
    config = setup.preset_of("gpt2", {**SMALL, "optimizer": "muon", "device": "cpu"})
    sizes, rates = ledger.sizes_of(config, setup.GPT2_VOCAB), ledger.Rates(ledger.find("h100"))
    p = ledger.predict(step, config, sizes, rates)
    assert [f(phase) for f in (p.a_layer,) for phase in ("forward", "backward")] == [8, 14]
    muon = [line for line in p.lines if line.category == "muon"]
    assert {line.phase for line in muon} == {"rest"}
    assert sum(line.times for line in muon) <= MUON
    products = [line for line in muon if line.launch.shape]
    assert sum(line.times for line in products) == 2 * 5 * 3
    flops = sum(line.times * line.launch.flops for line in products)
    assert flops == 2 * 5 * (4 * 3 + 2 * 9) * 2 * 768**3
    found = ledger.as_ladder(p, config, setup.GPT2_VOCAB, rates)
    assert found.work.muon_flops == flops
    (rung,) = [r for r in found.rungs if r.name == "Muon"]
    assert (
        rung.ms == pytest.approx(sum(line.ms for line in muon)) and (rung.bound_ms or 0) <= rung.ms
    )
    assert found.work.total_flops < 1.01 * setup.flops_per_token(config, 50257).mfu * p.tokens
