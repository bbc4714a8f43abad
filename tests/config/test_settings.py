"""Settings from flags and files, and what happens to bad ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config, PrepareConfig, Range, SampleConfig
from fastgpt.errors import UserError


def flags(*args: str) -> Config:
    return settings.apply_flags(Config(), settings.split_flags(args)[1])


LAPTOP = """--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64
--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000
--dropout=0.0"""


def test_nanogpt_flags_are_taken_verbatim():
    c = flags(*LAPTOP.split())
    assert (c.system.device, c.system.compile, c.log.eval_iters) == ("cpu", False, 20)
    assert (c.model.block_size, c.optim.batch_size, c.run.max_iters) == (64, 12, 2000)
    assert c.model.dropout == 0.0


# Every name of nanoGPT's train.py and sample.py.
NANOGPT_TRAIN = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint
init_from wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size
block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2
grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile"""
NANOGPT_SAMPLE = """init_from out_dir start num_samples max_new_tokens temperature top_k seed device
dtype compile"""


def test_every_nanogpt_name_is_a_setting():
    assert set(NANOGPT_TRAIN.split()) <= set(settings.leaves(Config))
    assert set(NANOGPT_SAMPLE.split()) <= set(settings.leaves(SampleConfig))


def test_forms_of_a_flag():
    assert flags("--n_layer", "3").model.n_layer == 3
    assert flags("--n-layer=3").model.n_layer == 3
    assert flags("--n_layer=2", "--n_layer=3").model.n_layer == 3, "the last one counts"
    assert flags("--learning_rate=1").optim.learning_rate == 1.0
    assert flags("--learning_rate=3e-4").optim.learning_rate == 3e-4
    assert flags("--bias=true").model.bias is True
    assert flags("--compile=auto").system.compile == "auto"
    assert flags("--compile=True").system.compile is True
    assert settings.split_flags(["gpt2", "--bias", "True", "x"]) == (
        ["gpt2", "x"],
        {"bias": "True"},
    )


def bad_values() -> list[tuple[str, str]]:
    """For every setting values that it must refuse: outside its bounds, or of another type."""
    out = []
    for leaf in settings.leaves(Config).values():
        if settings._options(leaf.type):
            out += [(leaf.name, "nonsense"), (leaf.name, "1"), (leaf.name, "")]
        elif leaf.type is int:
            out += [(leaf.name, t) for t in ("x", "1.5", "", "1e400", "nan")]
        elif leaf.type is float:
            out += [(leaf.name, t) for t in ("x", "", "nan", "inf", "-inf")]
        elif leaf.type is bool:
            out += [(leaf.name, t) for t in ("yes", "1", "", "None")]
        elif leaf.type is str:
            out.append((leaf.name, "a\0b"))
        if leaf.range:
            r, step = leaf.range, 1 if leaf.type is int else 0.001
            for bound, away in ((r.ge, -step), (r.gt, 0), (r.le, step), (r.lt, 0)):
                if bound is not None:
                    out.append((leaf.name, str(leaf.type(bound + away))))
    return out


@pytest.mark.parametrize(("name", "text"), bad_values())
def test_bad_value_is_refused_in_one_line(name, text):
    with pytest.raises(UserError) as e:
        flags(f"--{name}={text}")
    message = str(e.value)
    assert message.startswith(f"--{name}=") and "wanted" in message and "\n" not in message
    bounds = settings.leaves(Config)[name].range
    assert bounds is None or str(bounds) in message


def test_every_setting_was_tried():
    assert {name for name, _ in bad_values()} == set(settings.leaves(Config))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n_laye=3"], "--n_laye: no such setting; did you mean --n_layer?"),
        (["--learningrate=3"], "did you mean --learning_rate?"),
        (["--zzzzzz=3"], "--zzzzzz: no such setting; --help lists them all"),
        (["--n_layer"], "--n_layer: no value given; write --n_layer=VALUE"),
        (["--n_layer", "--n_head=2"], "--n_layer: no value given"),
    ],
)
def test_bad_flags(args, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        flags(*args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n_embd=770", "--n_head=12"], "must divide n_embd=770; the nearest that does is 11"),
        (["--n_embd=7", "--n_head=6"], "--n_head=6: must divide n_embd=7; .* is 7"),
        (["--min_lr=1", "--learning_rate=0.1"], "--min_lr=1: must not exceed learning_rate=0.1"),
    ],
)
def test_settings_that_do_not_fit_together(args, message):
    with pytest.raises(UserError, match=message):
        settings.check(flags(*args))


def test_a_learning_rate_that_stays_is_fine():
    settings.check(flags("--min_lr=0.1", "--learning_rate=0.1"))
    settings.check(flags("--min_lr=1", "--learning_rate=0.1", "--decay_lr=False"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_toml(name, tmp_path: Path):
    config = PRESETS[name]()
    settings.check(config)
    for leaf in settings.leaves(Config).values():
        settings.check_value(leaf, settings.get(config, leaf), "")
    path = tmp_path / "config.toml"
    path.write_text(settings.to_toml(config))
    assert settings.load_toml(path) == config


@pytest.mark.parametrize("text", ['say "hi"', "back\\slash", "tab\tnew\nline", "Zoë \x7f 東京"])
def test_toml_keeps_any_text(text, tmp_path: Path):
    config = settings.replace(Config(), input=text)
    path = tmp_path / "c.toml"
    path.write_text(settings.to_toml(config))
    assert settings.load_toml(path).data.input == text


def test_toml_flat_or_in_sections(tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text("n_layer = 3\nlearning_rate = 1\n[data]\ndataset = 'x'\n")
    c = settings.load_toml(path)
    assert (c.model.n_layer, c.optim.learning_rate, c.data.dataset) == (3, 1.0, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer = ", "not a TOML file"),
        ("n_layr = 3", "n_layr: no such setting; did you mean n_layer"),
        ("n_layer = 0", "n_layer=0: wanted a whole number >= 1"),
        ("n_layer = '3'", "n_layer=3: wanted a whole number"),
        ("bias = 1", "bias=1: wanted one of|bias=1: wanted True or False"),
        ("[model]\nx = 1", "x: no such setting"),
        ("[modle]\nn_layer = 1", "modle: no such setting"),
        ("n_layer = [1]", "wanted a whole number"),
    ],
)
def test_bad_toml(text, message, tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as e:
        settings.load_toml(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    "number", [2**63, -(2**63) - 1, 10**5000], ids=["one more", "one less", "5,000 digits"]
)
def test_whole_numbers_beyond_64_bits_are_not_printed(number: int):
    for name in ("n_layer", "learning_rate"):
        with pytest.raises(UserError) as e:
            settings.check_value(settings.leaves(Config)[name], number, "")
        assert f"{name}=(a number of {number.bit_length()} bits): wanted" in str(e.value)
    with pytest.raises(UserError, match=f"n_layer={-(2**63)}: wanted"):
        settings.check_value(settings.leaves(Config)["n_layer"], -(2**63), "")


def test_names_are_listed_while_they_are_few():
    names = [f"name{i}" for i in range(12)]
    assert str(settings.unknown_key("zzz", names, "")).endswith("--help lists them all")
    assert str(settings.unknown_key("zzz", names[:11], "")).endswith(", name9, name10")


@pytest.mark.parametrize("name", settings.REMOVED)
def test_a_removed_flag_is_answered_and_old_files_may_hold_it(name: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"^--{name}: was removed: .+"):
        settings.apply_flags(Config(), {name: "triton"})
    path = tmp_path / "config.toml"
    section, _, key = name.rpartition(".")
    path.write_text(f'n_layer = 3\n[{section or "system"}]\n{key} = "triton"\n')
    assert settings.load_toml(path) == settings.replace(Config(), n_layer=3)
    flat = {**settings.to_dict(Config()), name: "triton"}
    assert settings.from_dict(flat, "state.json") == Config()


def test_a_toml_file_has_its_size(tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text("n_layer = 3\n#".ljust(1 << 20))
    assert settings.load_toml(path).model.n_layer == 3
    path.write_text("n_layer = 3\n#".ljust((1 << 20) + 1))
    with pytest.raises(UserError, match=str(path)):
        settings.load_toml(path)


def test_missing_and_binary_toml(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        settings.load_toml(tmp_path / "no.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a TOML file"):
        settings.load_toml(tmp_path / "b.toml")


def test_other_config_trees_have_flat_names_too():
    table = settings.leaves(PrepareConfig)
    assert "dataset" in table and table["overwrite"].section == ""
    c = settings.apply_flags(PrepareConfig(), {"dataset": "x", "overwrite": "True"})
    assert (c.dataset, c.overwrite) == ("x", True)


def test_replace_makes_a_new_config_and_knows_its_names():
    before = Config()
    after = settings.replace(before, n_layer=3, **{"op.attention": "flash"})
    assert (after.model.n_layer, after.op.attention) == (3, "flash") and before == Config()
    assert settings.replace(PrepareConfig(), dataset="x").dataset == "x"
    for name in ("n_layr", "attention", "model"):
        with pytest.raises(KeyError, match=name):
            settings.replace(before, **{name: 3})
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.model.n_layer = 3  # type: ignore[misc]


def test_range_says_itself():
    assert str(Range(ge=0, lt=1)) == ">= 0 and < 1"
