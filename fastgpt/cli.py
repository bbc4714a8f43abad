"""The command line: prepare, train, sample, eval, export, import, compare, doctor.

A command's module is imported once its arguments are known to be good: `--help` and mistakes answer
at once, without PyTorch, which takes a second to load.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastgpt import __version__
from fastgpt.config import settings
from fastgpt.config.presets import PRESETS, default_name
from fastgpt.config.schema import (
    CompareConfig,
    Config,
    EvalConfig,
    ExportConfig,
    ImportConfig,
    PrepareConfig,
    SampleConfig,
    SourceConfig,
)
from fastgpt.errors import RankError, SharedError, UserError, explained, one_line
from fastgpt.storage import run

OVERVIEW = """\
fastgpt {version}: train GPT-2-class models as fast as one CUDA GPU allows

  fastgpt train [PRESET | FILE] [--key=value ...]        train; no preset: what fits this machine
  fastgpt sample [--out_dir=RUN] [--start=TEXT] ...      generate text from a trained model
  fastgpt eval [--out_dir=RUN] [--input=FILE] ...        its loss on a whole file, or HellaSwag
  fastgpt export --to=FOLDER [--out_dir=RUN]             write it as a Hugging Face GPT-2 folder
  fastgpt import CKPT.pt [--out_dir=RUN] ...             go on with a checkpoint of nanoGPT's
  fastgpt prepare CORPUS [--key=value ...]               turn a corpus into token files
  fastgpt compare RUN RUN ... [--to=FILE.png]            their curves, figures, and a verdict
  fastgpt doctor [PRESET | FILE] [--key=value ...]       what this machine has and what will run

presets   {presets}
corpora   python_stdlib  shakespeare_char  shakespeare  openwebtext  fineweb10B
          or any text file or folder: --input=PATH

`fastgpt COMMAND --help` lists all settings of a command.
"""

WAIT_FOR_RANK_0 = 10.0  # seconds

C = TypeVar("C", bound=SourceConfig)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a mistake of the user's, 128 + N a signal, 1 our fault."""
    args = list(sys.argv[1:] if args is None else args)
    _mend_streams()
    try:
        code = _command(args)
        sys.stdout.flush()
    except UserError as e:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        _say(e)
        code = e.code
    except KeyboardInterrupt:
        print("fastgpt: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): nothing more to say, and nothing went wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as e:
        code = _failed(e)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # FSDP's device mesh keeps Gloo's threads beyond destroy_process_group, and one of them that
        # lets go of a tensor while Python shuts down aborts the process: leave before it does.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _mend_streams() -> None:
    """Output that is closed goes nowhere; a character that it does not have is shown escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _failed(e: Exception) -> int:
    """Say what an error that nobody turned into a UserError means. Returns the exit code."""
    try:
        sys.stdout.flush()
    except OSError:  # its disk is full: what it holds is lost, and asked for again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if (said := explained(e)) is not None:
        _say(UserError(said))
        return 2
    traceback.print_exception(e)
    print(
        f"fastgpt: a fault of fastgpt {__version__}'s ({one_line(repr(e))[:200]}), not of yours: "
        "please report it with the lines above, the command, and what `fastgpt doctor` says",
        file=sys.stderr,
    )
    return 1


def _say(mistake: UserError) -> None:
    """Print a mistake; what all ranks of torchrun find out is said once, by rank 0.

    torchrun ends all ranks as soon as one has left: the others wait until rank 0 has spoken. One
    that is still there after this time was alone with its mistake, and says so.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not isinstance(mistake, RankError):
        time.sleep(WAIT_FOR_RANK_0)
        if isinstance(mistake, SharedError):
            return
        mistake = UserError(f"rank {rank}: {mistake}")
    print(f"fastgpt: {mistake}", file=sys.stderr, flush=True)


def _command(args: list[str]) -> int:
    commands: dict[str, tuple[Callable[[], Any], str, Callable[[list[str]], int]]] = {
        "train": (PRESETS["laptop"], "[PRESET | FILE]", _train),
        "sample": (SampleConfig, "", _sample),
        "eval": (EvalConfig, "", _eval),
        "export": (ExportConfig, "", _export),
        "import": (ImportConfig, "CKPT.pt", _import),
        "prepare": (PrepareConfig, "CORPUS", _prepare),
        "compare": (CompareConfig, "RUN RUN ...", _compare),
        "doctor": (dict, "[PRESET | FILE]", _doctor),
    }
    if not args or args[0] in ("-h", "--help", "help"):
        presets = textwrap.fill("  ".join(PRESETS), 88, subsequent_indent=" " * 10)
        print(OVERVIEW.format(version=__version__, presets=presets), end="")
        return 0
    if args[0] == "--version":
        print(f"fastgpt {__version__}")
        return 0
    name, *rest = args
    if name not in commands:
        raise settings.unknown_key(name, list(commands), "fastgpt ", what="command")
    defaults, positional, command = commands[name]
    if "--help" not in rest and "-h" not in rest:
        return command(rest)
    if name == "doctor":
        print(
            "fastgpt doctor [PRESET | FILE] [--key=value ...]: Python, torch, triton, GPU and "
            "peak, disk, data, and the ops of `fastgpt train` with the same arguments"
        )
        return 0
    if name == "train":
        defaults = PRESETS.get(rest[0], defaults)
    return _help(defaults(), name, positional)


def _help(config: Any, command: str, positional: str) -> int:
    import tyro

    # A default that is a line break, as --start's, would be one in the help.
    texts = {k: v for k, v in settings.to_dict(config).items() if isinstance(v, str)}
    config = settings.replace(config, **{k: one_line(v) for k, v in texts.items()})
    # Sections only group the settings, but for op: its names are --op.NAME.
    kind = type(config)
    sections = [
        f for f in dataclasses.fields(config) if dataclasses.is_dataclass(f.default_factory)
    ]
    if sections:
        bare = tyro.conf.OmitArgPrefixes
        parts = [
            (f.name, f.default_factory if f.name == "op" else bare[f.default_factory])  # type: ignore
            for f in sections
        ]
        kind = dataclasses.make_dataclass(kind.__name__, parts, namespace={"__doc__": kind.__doc__})
        config = kind(**{f.name: getattr(config, f.name) for f in sections})
    tyro.cli(
        kind,
        prog=f"fastgpt {command} {positional}".strip(),
        args=["--help"],
        default=config,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    return 0


def _training(args: list[str]) -> tuple[Config, str]:
    """The config of a run, and what it is called."""
    positional, flags = settings.split_flags(args)
    if len(positional) > 1:
        raise UserError(f"{' '.join(positional)}: one preset or file is wanted")
    flags = _weights_alone(flags)
    settings.apply_flags(Config(), flags)  # names and values first: the preset may ask PyTorch
    config, name = _base(positional[0] if positional else None, flags)
    config = settings.apply_flags(config, flags)
    settings.check(config)
    return config, name


def _train(args: list[str]) -> int:
    config, name = _training(args)
    if "RANK" not in os.environ:  # ranks find out together, and rank 0 speaks
        _check_places(config)
    from fastgpt.train.main import train

    return train(config, name)


def _check_places(config: Config) -> None:
    """Raise UserError for files and folders that are not as a run needs them, PyTorch unloaded."""
    from fastgpt.data import prepare

    r = config.run
    if r.init_from != "resume":
        run.check_free(r.out_dir, r.overwrite)
    if r.weights and not Path(r.weights).exists():
        raise UserError(f"--weights={r.weights}: there is no such file or folder")
    prepare.check(PrepareConfig.of(config.data))


def _base(source: str | None, flags: dict[str, str]) -> tuple[Config, str]:
    """What the flags apply to: the run to resume, a file, a preset, this machine's preset."""
    if flags.get("init_from") == "resume":
        run_dir = run.find(flags.get("out_dir", ""))
        if source is not None:
            print(f"resume: settings come from {run_dir / 'config.toml'}, not from {source}")
        return run.load_config(run_dir), run_dir.name
    if source is None:
        name = default_name()
        print(f"preset {name}: {PRESETS[name].__doc__}")
        return PRESETS[name](), name
    if source in PRESETS:
        return PRESETS[source](), source
    if source.endswith(".toml"):
        path = Path(source)
        return settings.load_toml(path), path.parent.name if path.stem == "config" else path.stem
    if source.endswith(".py"):
        stem = Path(source).stem.removeprefix("train_")
        try:
            return settings.load_python(Path(source)), stem
        except UserError as e:
            if isinstance(e.__cause__, FileNotFoundError) and stem in PRESETS:
                raise UserError(f"{e}; the preset {stem} is built in") from e
            raise
    raise settings.unknown_key(source, list(PRESETS), "", what="preset")


def _flags(config: C, args: list[str], positional_hint: str) -> C:
    """The config of a command that takes nothing but flags and works on a trained model."""
    positional, flags = settings.split_flags(args)
    if positional:
        raise UserError(f"{positional[0]}: not a flag{positional_hint}")
    config = settings.apply_flags(config, _weights_alone(flags))
    settings.check(config)
    if config.init_from == "resume":
        run.find(config.out_dir)
    return config


def _weights_alone(flags: dict[str, str]) -> dict[str, str]:
    """--weights without --init_from: those weights, whatever their size."""
    return {"init_from": "weights", **flags} if flags.get("weights") else flags


def _sample(args: list[str]) -> int:
    config = _flags(SampleConfig(), args, "; the prompt is given as --start=TEXT")
    from fastgpt.inference.sample import sample

    return sample(config)


def _eval(args: list[str]) -> int:
    config = _flags(EvalConfig(), args, "; the file is given as --input=FILE")
    from fastgpt.inference.evaluate import evaluate

    return evaluate(config)


def _export(args: list[str]) -> int:
    config = _flags(ExportConfig(), args, "; the new folder is given as --to=FOLDER")
    from fastgpt.weights.export import export

    return export(config)


def _import(args: list[str]) -> int:
    positional, flags = settings.split_flags(args)
    if len(positional) != 1:
        raise UserError(f"import: one checkpoint is wanted, {len(positional)} given")
    config = settings.apply_flags(ImportConfig(), flags)
    if not Path(positional[0]).is_file():
        raise UserError(f"{positional[0]}: cannot be read: there is no such file")
    from fastgpt.weights.nanogpt import import_checkpoint

    return import_checkpoint(positional[0], config)


def _compare(args: list[str]) -> int:
    folders, flags = settings.split_flags(args)
    if len(folders) < 2:
        raise UserError(f"compare: two runs or more are wanted, {len(folders)} given")
    config = settings.apply_flags(CompareConfig(), flags)
    from fastgpt.train.compare import compare

    return compare(folders, config)


def _prepare(args: list[str]) -> int:
    positional, flags = settings.split_flags(args)
    if len(positional) > 1:
        raise UserError(f"{' '.join(positional)}: one corpus is wanted")
    if positional and flags.setdefault("dataset", positional[0]) != positional[0]:
        raise UserError(f"{positional[0]} and --dataset={flags['dataset']}: one corpus is wanted")
    if not ("dataset" in flags or "input" in flags):
        raise UserError("prepare: which corpus? name one, or a text with --input=PATH")
    config = settings.apply_flags(PrepareConfig(), flags)
    from fastgpt.data.prepare import prepare

    prepare(config)
    return 0


def _doctor(args: list[str]) -> int:
    config, name = _training(args)
    from fastgpt.doctor import doctor

    doctor(config, name)
    return 0
