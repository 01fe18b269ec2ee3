"""Starts the processes of a run with torchrun, of whose command line it has all flags, and ends as they end.

    python -m megatron_sft.launch --standalone --nproc_per_node 8 finetune.py --tensor-model-parallel-size 2 ...

What differs from torchrun: after SIGTERM or Ctrl-C the processes may take a day to save, not 30 s (a second signal ends them);
the exit status is that of the first process that failed, not 1; no traceback follows the process's own message.
"""

import signal
import sys
from collections.abc import Sequence

from megatron_sft.environment import be_patient_launcher
from megatron_sft.errors import ConfigError, TrainingError, missing_package


def main(argv: Sequence[str]) -> int:
    """Runs the processes of this machine; returns the exit status."""
    be_patient_launcher()
    import logging

    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
    except ModuleNotFoundError as error:
        print(f"launch: {missing_package(error)}", file=sys.stderr)
        return ConfigError.exit_status

    logging.disable(logging.CRITICAL)  # torch's, each of whose modules has a logger of its own
    try:
        run.main(list(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(rank, failure.pid, failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RendezvousError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        print(
            f"launch: the processes cannot be started ({reason}); expected a free port and machines that reach each other. Check "
            "--nproc_per_node, --master-addr and --master-port, and that the loopback interface is up (ip link set lo up).",
            file=sys.stderr,
        )
        return ConfigError.exit_status
    return 0


def _status(rank: int, pid: int, status: int) -> int:
    """A process says itself why it ends, unless a signal ended it (a negative status)."""
    if status > 0:
        return status
    name = signal.Signals(-status).name
    print(f"launch: rank {rank} (process {pid}) was ended by {name}. Look into dmesg if nobody did it.", file=sys.stderr)
    return TrainingError.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
