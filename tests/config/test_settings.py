"""Settings from flags and files, errors for bad ones, and their list in the help."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import CompareConfig, Config, SampleConfig
from fastgpt.config.settings import listing
from fastgpt.errors import UserError

PATH = Path("c.toml")


def flags(*args: str) -> Config:
    return settings.apply_flags(Config(), settings.split_flags(args)[1])


# Every name of nanoGPT's train.py and sample.py.
NANOGPT_TRAIN = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint
init_from wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size
block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2
grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile"""
NANOGPT_SAMPLE = """init_from out_dir start num_samples max_new_tokens temperature top_k seed device
dtype compile"""


def test_nanogpt_flags_are_taken_verbatim():
    assert set(NANOGPT_TRAIN.split()) <= set(settings.leaves(Config))
    assert set(NANOGPT_SAMPLE.split()) <= set(settings.leaves(SampleConfig))


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--n_layer", "3"], "n_layer", 3),
        (["--n-layer=3"], "n_layer", 3),
        (["--n_layer=2", "--n_layer=3"], "n_layer", 3),  # the last one counts
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--learning_rate=3e-4"], "learning_rate", 3e-4),
        (["--bias=true"], "bias", True),
        (["--compile=auto"], "compile", "auto"),
        (["--compile=True"], "compile", True),
        (["--op.attention=flash"], "op.attention", "flash"),
    ],
)
def test_forms_of_a_flag(args, name, value):
    got = settings.to_dict(flags(*args))[name]
    assert got == value and type(got) is type(value)
    positional, found = settings.split_flags(["gpt2", *args, "x"])
    assert positional == ["gpt2", "x"] and [*found] == [name]


def bad_values() -> list[tuple[str, str]]:
    """Returns values that each setting must refuse: outside its bounds, or of another type."""
    out = []
    for leaf in settings.leaves(Config).values():
        if leaf.options:
            texts = ["nonsense", "1", "", "None"]
        elif leaf.type is str:
            texts = ["a\0b"]
        else:
            texts = ["x", "", "nan", *(("1.5", "1e400") if leaf.type is int else ("inf", "-inf"))]
        step = 1 if leaf.type is int else 0.001
        away = {"ge": -step, "gt": 0, "le": step, "lt": 0}
        bounds = leaf.range.bounds if leaf.range else {}
        texts += [str(leaf.type(bound + away[sign])) for sign, bound in bounds.items()]
        out += [(leaf.name, text) for text in texts]
    return out


@pytest.mark.parametrize(("name", "text"), bad_values())
def test_bad_value_is_refused_in_one_line(name, text):
    with pytest.raises(UserError) as e:
        flags(f"--{name}={text}")
    message = str(e.value)
    assert message.startswith(f"--{name}=") and "wanted" in message and "\n" not in message
    bounds = settings.leaves(Config)[name].range
    assert bounds is None or str(bounds) in message


def test_bad_flags():
    """Others are in tests/test_cli.py."""
    for args, message in (
        (["--zzzzzz=3"], "--zzzzzz: no such setting; --help lists them all"),
        (["--n_layer", "--n_head=2"], "--n_layer: no value given; write --n_layer=VALUE"),
        (["--n_embd=770", "--n_head=12"], "must divide n_embd=770; the nearest that does is 11"),
        (["--n_embd=7", "--n_head=6"], "--n_head=6: must divide n_embd=7; the nearest that does"),
    ):
        with pytest.raises(UserError) as e:
            settings.check(flags(*args))
        assert message in str(e.value)
    settings.check(flags("--min_lr=1", "--learning_rate=0.1", "--decay_lr=False"))


def test_a_flag_replaces_settings_that_would_hide_it():
    """The text of a resumed run, and its search for a batch size; a preset's corpus stays."""
    run = flags("--input=t.txt", "--batch_size=auto")
    assert run.data.input == "t.txt" and run.optim.auto_batch_size and run.optim.batch_size == 12
    changed = settings.apply_flags(run, {"dataset": "python_stdlib", "batch_size": "3"})
    assert changed.data.input == "" and changed.data.dataset == "python_stdlib"
    speedrun = PRESETS["gpt2_speedrun"]()
    for given in ({"input": "t.txt"}, {"dataset": "mine"}):
        assert settings.change(speedrun, given, "--").data.shards == 10, "not the preset's"
    assert changed.optim.batch_size == 3 and not changed.optim.auto_batch_size
    text = settings.change(PRESETS["laptop"](), {"input": "t.txt", "batch_size": "auto"}, "")
    assert text.data.dataset == "python_stdlib" and text.optim.auto_batch_size


@pytest.mark.parametrize("name", settings.REMOVED)
def test_a_removed_flag_is_answered_and_old_files_may_hold_it(name: str):
    with pytest.raises(UserError, match=f"^--{name}: was removed: .+"):
        flags(f"--{name}=triton")
    section, _, key = name.rpartition(".")
    text = f'n_layer = 3\n[{section or "system"}]\n{key} = "triton"\n'
    assert settings.parse_toml(text, PATH) == settings.replace(Config(), n_layer=3)
    flat = {**settings.to_dict(Config()), name: "triton", "op.attention": "fa3"}
    assert settings.from_dict(flat, "") == Config()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = PRESETS[name]()
    settings.check(config)
    assert settings.parse_toml(settings.to_toml(config), PATH) == config


@pytest.mark.parametrize(
    ("name", "cost", "hours"), [("gpt2", "six days", 144), ("gpt2_speedrun", "1.9 hours", 1.9)]
)
def test_a_preset_states_its_cost(name: str, cost: str, hours: float):
    """At the speed of the table in README."""
    config, about = PRESETS[name](), PRESETS[name].about
    tokens = config.run.max_iters * config.optim.rows * config.model.block_size
    assert f"{tokens / 1e9:.3g}B tokens" in about and f" {cost} " in about
    assert hours == pytest.approx(tokens / 576_000 / 3600, rel=0.03)


def test_toml_keeps_any_text():
    for text in ('say "hi"', "back\\slash", "tab\tnew\nline", "Zoë \x7f 東京"):
        config = settings.replace(Config(), input=text)
        assert settings.parse_toml(settings.to_toml(config), PATH) == config


def test_toml_is_flat_or_in_sections_and_of_limited_size(tmp_path: Path):
    text = "n_layer = 3\nlearning_rate = 1\n[data]\ndataset = 'x'\n#"
    wanted = settings.replace(Config(), n_layer=3, learning_rate=1.0, dataset="x")
    path = tmp_path / "c.toml"
    path.write_text(text.ljust(1 << 20))
    assert settings.load_toml(path) == wanted
    path.write_text(text.ljust((1 << 20) + 1))
    with pytest.raises(UserError, match=str(path)):
        settings.load_toml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer = ", "not a TOML file"),
        ("n_layer = '3'", "n_layer=3: wanted a whole number"),
        ("n_layer = [1]", "wanted a whole number"),
        ("bias = 1", "bias=1: wanted one of True, False"),
        ("[model]\nx = 1", "x: no such setting"),
        ("[modle]\nn_layer = 1", "modle: no such setting"),
        ("\xff", "not a TOML file"),
    ],
)
def test_bad_toml(text, message, tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message) as e:
        settings.load_toml(path)
    assert str(path) in str(e.value)


def test_whole_numbers_beyond_64_bits_are_not_printed():
    for number in (2**63, -(2**63) - 1, 10**5000):
        for name in ("n_layer", "learning_rate"):
            with pytest.raises(UserError) as e:
                settings.check_value(settings.leaves(Config)[name], number, "")
            assert f"{name}=(a number of {number.bit_length()} bits): wanted" in str(e.value)


def test_replace_makes_a_new_config_and_knows_its_names():
    before = Config()
    after = settings.replace(before, n_layer=3, **{"op.attention": "flash"})
    assert (after.model.n_layer, after.op.attention) == (3, "flash") and before == Config()
    for name in ("n_layr", "attention", "model"):
        with pytest.raises(KeyError, match=name):
            settings.replace(before, **{name: 3})


def test_help_lists_settings_with_their_values(monkeypatch):
    """Wrapped for a narrow terminal, which a long name or list of options overflows."""
    monkeypatch.setenv("COLUMNS", "60")
    lines = listing(PRESETS["gpt2_xl"]()).splitlines()
    assert max(map(len, (line for line in lines if not line.startswith("  --")))) <= 60
    assert [line for line in lines if line[:1].isalpha()][:2] == ["run options:", "data options:"]
    assert "  --n_layer INT           Transformer blocks. (default: 48)" in lines
    assert listing(CompareConfig()).startswith("\noptions:\n  --to STR")
    assert r"(default: '\n')" in listing(SampleConfig())
