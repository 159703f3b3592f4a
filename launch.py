"""Runs a script's `main`.

    run_main    expected errors end it with one sentence, others with a traceback. Starts the processes of `accelerate launch --cpu`, and
                survives a full disk under its output
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any

import torch
from accelerate.utils import get_cpu_distributed_information
from safetensors import SafetensorError

from config import UserError
from dataset import DataError, end_workers
from gpt import NotFinite


def run_main(main: Callable[[], None]) -> None:
    """Runs a script. If it is one of several processes, ends this process."""
    _start_cpu_processes()
    threading.excepthook = _thread_ended
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: file names need not be UTF-8
    status = 0
    try:
        with redirect_stdout(_Unfailing(sys.stdout)), redirect_stderr(_Unfailing(sys.stderr)):
            main()
    except (Exception, KeyboardInterrupt) as error:
        end_workers()  # now: torch would give each of them five seconds
        sentence, status = _sentence(error), 1
        if not torch.distributed.is_initialized():
            if sentence is None:
                raise
            sys.exit(sentence)
        print(sentence or traceback.format_exc(), file=_Unfailing(sys.stderr))
    if torch.distributed.is_initialized():
        # destroy_process_group can deadlock on Python's lock. Everything is written, so exit directly.
        end_workers()
        _Unfailing(sys.stdout).flush()
        _Unfailing(sys.stderr).flush()
        os._exit(status)


class _Unfailing:
    """A stream that may be a file on a full disk, which must not end a training."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def _sentence(error: BaseException) -> str | None:
    """What to tell the user instead of a traceback."""
    if isinstance(error, (UserError, DataError, NotFinite)):
        return f"error: {error}"
    if isinstance(error, UnicodeEncodeError):
        return f"error: the name {error.object!r} is not UTF-8, which is needed here; choose another"
    if isinstance(error, SafetensorError):
        return f"error: {error}; what was saved before is whole"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return (f"error: {error.strerror} ({error.filename or 'while writing'}); what was saved before is whole (training continues from "
                "it by --resume auto)")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search("(can't allocate|not enough) memory", str(error)):
        why = str(error).partition("\n")[0] or "of the CPU"
        return (f"error: out of memory ({why}); halve the batch size (in training double train.gradient_accumulation_steps), or choose a "
                "smaller model or image_size; what was saved before is whole")
    if isinstance(error, RuntimeError) and re.search("closed by peer|reset by peer|Broken pipe|remote process exited", str(error)):
        return "error: another process has ended; what it said is above, or on its machine (training continues by --resume auto)"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else None


def _thread_ended(failure: threading.ExceptHookArgs) -> None:
    """Tensorboard writes in a thread of its own, which a full disk ends."""
    if isinstance(failure.exc_value, OSError):
        why = failure.exc_value.strerror or failure.exc_value
        print(f"the tracker's log could not be written ({why}); training goes on", file=sys.stderr)
    else:
        threading.__excepthook__(failure)


def _start_cpu_processes() -> None:
    """`accelerate launch --cpu --num_processes N` starts one process and leaves the others to MPI. Without MPI, this process becomes
    torch's launcher of N."""
    launched_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not launched_for_cpu or "RANK" in os.environ or get_cpu_distributed_information().world_size > 1:
        return
    import psutil

    launcher = argparse.ArgumentParser(add_help=False)
    launcher.add_argument("--num_processes", "--num-processes", type=int)
    number = launcher.parse_known_args(psutil.Process().parent().cmdline())[0].num_processes
    if number is None:
        sys.exit("error: accelerate was asked for several processes on the CPU but started one; say --num_processes on the command line")
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "--", *sys.argv])
