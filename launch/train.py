"""What a launcher starts on every rank: `deepspeed launch/train.py CONFIG [key=value ...]`.

`torchrun --nproc_per_node N launch/train.py ...`, `srun python launch/train.py ...` and `mpirun python launch/train.py ...` work
alike (dist_subspace/launchers.py reads which rank this is), and so does plain `python launch/train.py ...`, which runs one
process.
"""

import os
import socket
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def arguments(given: list[str]) -> list[str]:
    """The command line without what the deepspeed launcher adds (`--local_rank=N`, which is in the environment too)."""
    return [argument for argument in given if not argument.startswith("--local_rank")]


if __name__ == "__main__":
    try:
        from dist_subspace.cli import main
    except ImportError as error:  # on one node of several, as a rule: a page of traceback would not say on which
        sys.exit(
            f"error: {socket.gethostname()}: {error} (with {sys.executable}); accepted: the same environment on every node"
        )

    status = main(["train", *arguments(sys.argv[1:])])
    if status:  # everything is written and said; a library that cleans up would wait for ranks that are gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
