"""Runs a script's `main`.

    run_main    expected errors end it with one sentence, others with a traceback
"""

import errno
import os
import re
import sys
import traceback

import torch
from accelerate.utils import get_cpu_distributed_information
from safetensors import SafetensorError

from harness.config import UserError
from dataset import DataError, end_workers

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
PEER_ENDED = "closed by peer|reset by peer|Broken pipe|remote process exited"


def run_main(main):
    """Runs a script. If it is one of several processes, ends this process."""
    # As stderr has it: file names need not be UTF-8.
    sys.stdout.reconfigure(errors="backslashreplace")
    status = 0
    try:
        _check_processes()
        main()
    except (Exception, KeyboardInterrupt) as error:
        end_workers()  # now: torch would give each of them five seconds
        sentence = _sentence(error)
        status = 1
        if not torch.distributed.is_initialized():
            if sentence is None:
                raise
            sys.exit(sentence)
        print(sentence or traceback.format_exc(), file=sys.stderr)
    if torch.distributed.is_initialized():
        # destroy_process_group can deadlock on Python's lock. Everything is written, so exit
        # directly.
        end_workers()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _sentence(error):
    """What to tell the user instead of a traceback."""
    message = str(error)
    if isinstance(error, (UserError, DataError)):
        return f"error: {error}"
    if isinstance(error, UnicodeEncodeError):
        return (f"error: the name {error.object!r} is not UTF-8, which is needed here; "
                "choose another")
    cannot_write = isinstance(error, OSError) and error.errno in CANNOT_WRITE
    if cannot_write or isinstance(error, SafetensorError):
        return f"error: {error}; what was saved before is whole, and --resume auto continues it"
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or re.search("(can't allocate|not enough) memory", message):
        why = message.partition("\n")[0] or "of the CPU"
        return (f"error: out of memory ({why}); halve the batch size (in training double "
                "train.gradient_accumulation_steps), or choose a smaller model or image_size; "
                "what was saved before is whole")
    if isinstance(error, RuntimeError) and re.search(PEER_ENDED, message):
        return ("error: another process has ended; what it said is above, or on its machine "
                "(training continues by --resume auto)")
    return "interrupted" if isinstance(error, KeyboardInterrupt) else None


def _check_processes():
    """Lets torchrun's processes train together on CPUs, too. `accelerate launch --cpu` leaves the
    starting of several processes to MPI, and without MPI starts one."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if "RANK" in os.environ:
        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
    elif (on_cpu and "MASTER_PORT" in os.environ
            and get_cpu_distributed_information().world_size == 1):
        raise UserError("accelerate was asked for several processes on CPUs, but without MPI it "
                        "starts one; use torchrun --nproc-per-node NUMBER in place of "
                        "accelerate launch")
