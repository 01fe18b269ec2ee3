"""What every command line here has in common: the environment is checked, an error becomes one message and a status.

Not here: what a command does.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megatron_sft import log
from megatron_sft.config.help import help_of
from megatron_sft.core_compat import silence_missing_kernels
from megatron_sft.environment import allow_open_files, process_environment
from megatron_sft.errors import UserError, missing_package


def run(command: Callable[[Sequence[str], int], int], argv: Sequence[str], to_stderr: bool = False) -> int:
    """Runs a command of one or several processes. What all of them find wrong, rank 0 says once.

    Args:
        command: (argv, processes) -> exit status; its name is one of options.COMMANDS.
        argv: without the program's name.
        to_stderr: standard output is the command's own; messages go to standard error.

    Returns:
        The process's exit status.
    """
    rank, world_size = 0, 1
    if not sys.warnoptions:  # of packages, which a user cannot mend; python -W and PYTHONWARNINGS show them
        warnings.simplefilter("ignore")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable
    _open_streams()
    log.configure(rank, to_stderr)
    silence_missing_kernels()
    try:
        allow_open_files()
        rank, world_size, _ = process_environment()
        log.configure(rank, to_stderr)
        if text := help_of(getattr(command, "__name__", "").replace("_", "-"), argv):
            if rank == 0:
                print(text)
            return 0
        return command(argv, world_size)
    except ModuleNotFoundError as error:
        log.logger.error("%s", missing_package(error))
        return UserError.exit_status
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if rank == 0:
            log.logger.error("interrupted: nothing half-written is kept. Give the command again to go on.")
        return 128 + signal.SIGINT
    except UserError as error:
        if rank == 0 and not error.is_said:
            log.logger.error("%s", error)
        is_said = error.is_said
        if world_size > 1 and not is_said:
            from megatron_sft.parallel import tell_others  # torch: not for one process

            is_said = tell_others(error)
        if rank != 0 and not is_said:
            log.logger.error("%s", error)
        return error.exit_status


def _open_streams() -> None:
    """A standard stream that was closed (>&-) is /dev/null: a checkpoint would get its number, and prints of C code."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def _interrupt(*_: Any) -> None:
    """The first Ctrl-C is answered in good order; a second one ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
    """A Ctrl-C in the middle of a `__del__` or a weakref's callback, where Python drops every exception, comes again."""
    if what.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(what)
        return
    signal.signal(signal.SIGINT, _interrupt)
    again = threading.Timer(0.01, _press_again)
    again.daemon = True
    again.start()


def _press_again() -> None:
    """Unless a Ctrl-C is being answered, or has been: another one would then end the process at once."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        os.kill(os.getpid(), signal.SIGINT)


def leave(status: int) -> NoReturn:
    """Ends the process with an exit status. A Ctrl-C from now on ends it too, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)
