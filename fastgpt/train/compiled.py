"""What torch.compile has kept from earlier runs, and may have kept broken."""

from __future__ import annotations

import shutil


def failures() -> tuple[type[Exception], ...]:
    """What a compilation raises, and the loading of what was compiled before."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second
    from torch._inductor.exc import CppCompileError, InductorError

    return TorchDynamoException, InductorError, CppCompileError, OSError, ImportError


def mendable(error: BaseException) -> bool:
    """Whether another try without the cache may help: it does not where there is no compiler."""
    from torch._inductor.exc import InvalidCxxCompiler

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InvalidCxxCompiler) or "InvalidCxxCompiler" in str(seen):
            return False
        seen = seen.__cause__ or seen.__context__
    return True


def clear() -> str:
    """Forget and remove it all, in memory and on disk; the folder that was removed.

    A library that was cut off, by a kill or a full disk, is found again by every later run.
    """
    import torch
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = cache_dir()
    shutil.rmtree(folder, ignore_errors=True)
    torch.compiler.reset()
    return folder
