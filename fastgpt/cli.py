"""Command line of fastgpt.

A command's module is imported once its arguments are known to be good. `--help` and mistakes
therefore answer at once, without PyTorch, which takes a second to load.
"""

from __future__ import annotations

import atexit
import contextlib
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
from fastgpt.config import presets, schema, settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config
from fastgpt.errors import RankError, SharedError, UserError, explained, one_line
from fastgpt.storage import run_dir as run

OVERVIEW = """\
fastgpt {version}: train GPT-2-class models as fast as one CUDA GPU allows

  fastgpt train [PRESET | FILE] [--key=value ...]        train; no preset: what fits this machine
  fastgpt sample [--out_dir=RUN] [--start=TEXT] ...      generate text from a trained model
  fastgpt eval [--out_dir=RUN] [--input=FILE] ...        its loss on a whole file, or HellaSwag
  fastgpt export --to=FOLDER [--out_dir=RUN]             write it as a Hugging Face GPT-2 folder
  fastgpt import CKPT.pt [--out_dir=RUN] ...             go on with a checkpoint of nanoGPT
  fastgpt prepare CORPUS [--key=value ...]               turn a corpus into token files
  fastgpt compare RUN RUN ... [--to=FILE.png]            their curves, figures, and a verdict
  fastgpt doctor [PRESET | FILE] [--key=value ...]       what this machine has and what will run
  fastgpt tune [PRESET | FILE] [--key=value ...]         measure which kernels are the fastest

presets   {presets}
corpora   python_stdlib  shakespeare_char  shakespeare  openwebtext  fineweb10B
          or any text file or folder: --input=PATH

`fastgpt COMMAND --help` lists all settings of a command.
"""

WAIT_FOR_RANK_0 = 10.0  # seconds

C = TypeVar("C")


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 2 a user's mistake, 128 + N a signal, 1 a bug."""
    args = list(sys.argv[1:] if args is None else args)
    _mend_streams()
    try:
        code = _run(args)
        sys.stdout.flush()
    except UserError as e:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        _print_mistake(e)
        code = e.code
    except KeyboardInterrupt:
        print("fastgpt: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of the output is gone (`| head`), which is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as e:
        code = _failed(e)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # FSDP's device mesh keeps Gloo's threads beyond destroy_process_group. One of them that
        # frees a tensor while Python shuts down aborts the process, so leave before it does.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _mend_streams() -> None:
    """Sends closed output nowhere, and escapes characters that an output's encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _failed(e: Exception) -> int:
    """Explains an error that is no UserError. Returns the exit code."""
    try:
        sys.stdout.flush()
    except OSError:  # its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if (said := explained(e)) is not None:
        _print_mistake(UserError(said))
        return 2
    traceback.print_exception(e)
    print(
        f"fastgpt: a bug in fastgpt {__version__} ({one_line(repr(e))[:200]}): please report it "
        "with the lines above, the command, and the output of `fastgpt doctor`",
        file=sys.stderr,
    )
    return 1


def _print_mistake(mistake: UserError) -> None:
    """Prints a mistake. One that all ranks of torchrun make is printed once, by rank 0.

    torchrun ends all ranks once one has left, so the others wait until rank 0 has printed. A rank
    that still runs after this time was alone with its mistake, and prints it.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not isinstance(mistake, RankError):
        time.sleep(WAIT_FOR_RANK_0)
        if isinstance(mistake, SharedError):
            return
        mistake = UserError(f"rank {rank}: {mistake}")
    print(f"fastgpt: {mistake}", file=sys.stderr, flush=True)


# --- commands ------------------------------------------------------------------------------------


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        names = textwrap.fill("  ".join(PRESETS), 88, subsequent_indent=" " * 10)
        print(OVERVIEW.format(version=__version__, presets=names), end="")
        return 0
    if args[0] in ("--version", "version"):
        print(f"fastgpt {__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        raise settings.unknown_key(name, list(COMMANDS), "fastgpt ", what="command")
    function, defaults = COMMANDS[name]
    if not {"-h", "--help"} & {*rest}:
        return function(rest)
    line = next(li for li in OVERVIEW.splitlines() if li.startswith(f"  fastgpt {name} "))
    usage, about = line.strip().split("  ", 1)
    listing = settings.listing(PRESETS.get(rest[0], defaults)())
    print(f"usage: {usage}\n\n{about.strip()}\n{listing}")
    return 0


def _training(args: list[str]) -> tuple[Config, str]:
    """Returns config and name of a run: resumed, from a file or preset, or this machine's."""
    positional, flags = settings.split_flags(args)
    if len(positional) > 1:
        raise UserError(f"{' '.join(positional)}: one preset or file is wanted")
    auto = flags.get("init_from") == "auto"
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not auto:
        raise UserError(
            "torchrun --max-restarts: a restart has to find its run: --out_dir=RUN --init_from=auto"
        )
    if auto:
        del flags["init_from"]
    settings.apply_flags(Config(), flags)  # names and values first: the preset may ask PyTorch
    source = positional[0] if positional else None
    if flags.get("init_from") != "resume":
        if source is None:
            source = presets.default_name()
        config, name = presets.load(source)
        if auto:
            flags |= run.continuation(settings.apply_flags(config, flags))
    if auto and flags.get("init_from") == "resume":  # without the flags that only begin a run
        split = {"batch_size", "gradient_accumulation_steps"}
        done = {"weights"} | (split if flags.get("batch_size") == "auto" else set())
        flags = {name: value for name, value in flags.items() if name not in done}
    if flags.get("init_from") == "resume":
        run_dir = run.find(flags.get("out_dir", ""))
        if source is not None:
            print(f"resume: settings come from {run_dir / 'config.toml'}, not from {source}")
        config, name = run.load_config(run_dir), run_dir.name
    config = settings.apply_flags(config, flags)
    settings.check(config)
    return config, name


def _train(args: list[str]) -> int:
    config, name = _training(args)
    if "RANK" not in os.environ:  # ranks find out together, and rank 0 speaks
        _check_places(config)
    from fastgpt.train.main import train

    return train(config, name)[0]


def _check_places(config: Config) -> None:
    """Raises UserError for files and folders that a run cannot use, before PyTorch is loaded."""
    from fastgpt.data.prepare import check_data

    r = config.run
    if r.dry_run:
        return
    if r.init_from != "resume":
        run.check_free(r.out_dir, r.overwrite)
    if r.weights and not Path(r.weights).exists():
        raise UserError(f"--weights={r.weights}: there is no such file or folder")
    check_data(schema.PrepareConfig.of(config.data))


def _read(
    config: C, args: list[str], wanted: str, least: int = 0, most: int = 0
) -> tuple[list[str], C]:
    """Returns positional arguments and the config. Raises UserError for too few or too many."""
    positional, flags = settings.split_flags(args)
    if not least <= len(positional) <= most:
        given = f"{wanted}, {len(positional)} given"
        raise UserError(given if most else f"{positional[0]}: not a flag; {wanted}")
    config = settings.apply_flags(config, flags)
    settings.check(config)
    if isinstance(config, schema.SourceConfig) and config.init_from == "resume":
        run.find(config.out_dir)
    return positional, config


def _sample(args: list[str]) -> int:
    _, config = _read(schema.SampleConfig(), args, "the prompt is given as --start=TEXT")
    from fastgpt.inference.generate import sample

    return sample(config)


def _eval(args: list[str]) -> int:
    _, config = _read(schema.EvalConfig(), args, "the file is given as --input=FILE")
    from fastgpt.inference.evaluate import evaluate

    return evaluate(config)


def _export(args: list[str]) -> int:
    _, config = _read(schema.ExportConfig(), args, "the new folder is given as --to=FOLDER")
    from fastgpt.weights.source import export

    return export(config)


def _import(args: list[str]) -> int:
    (path,), config = _read(schema.ImportConfig(), args, "import: one checkpoint is wanted", 1, 1)
    if not Path(path).is_file():
        raise UserError(f"{path}: cannot be read: there is no such file")
    from fastgpt.weights.nanogpt import import_checkpoint

    return import_checkpoint(path, config)


def _compare(args: list[str]) -> int:
    wanted = "compare: two runs or more are wanted"
    folders, config = _read(schema.CompareConfig(), args, wanted, 2, max(2, len(args)))
    for folder in folders:
        run.find(folder or ".", flag="")
    from fastgpt.train.compare import compare

    return compare(folders, config)


def _prepare(args: list[str]) -> int:
    positional, flags = settings.split_flags(args)
    named = [*positional, *filter(None, [flags.get("dataset")])]
    if len(named) > 1:
        raise UserError(f"{' '.join(named)}: one corpus is wanted")
    if not (named or "input" in flags):
        raise UserError("prepare: which corpus? name one, or a text with --input=PATH")
    if named:
        flags["dataset"] = named[0]
    config = settings.apply_flags(schema.PrepareConfig(), flags)
    from fastgpt.data.prepare import prepare

    prepare(config)
    return 0


def _doctor(args: list[str]) -> int:
    config, name = _training(args)
    from fastgpt.doctor import doctor

    doctor(config, name)
    return 0


def _tune(args: list[str]) -> int:
    config, _ = _training(args)
    from fastgpt.model.build import tune
    from fastgpt.train.main import as_trained

    return tune(as_trained(config))


# Each command's function, and the config that its --help lists.
COMMANDS: dict[str, tuple[Callable[[list[str]], int], Callable[[], Any]]] = {
    "train": (_train, PRESETS["laptop"]),
    "sample": (_sample, schema.SampleConfig),
    "eval": (_eval, schema.EvalConfig),
    "export": (_export, schema.ExportConfig),
    "import": (_import, schema.ImportConfig),
    "prepare": (_prepare, schema.PrepareConfig),
    "compare": (_compare, schema.CompareConfig),
    "doctor": (_doctor, PRESETS["laptop"]),
    "tune": (_tune, PRESETS["laptop"]),
}
