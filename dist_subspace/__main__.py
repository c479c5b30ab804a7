import socket
import sys

from dist_subspace.launchers import without_local_rank

if __name__ == "__main__":
    try:
        from dist_subspace.cli import main
    except ImportError as error:  # of typer, say; the doctor finds out what else is missing
        given = without_local_rank(sys.argv[1:])
        if given[:1] != ["doctor"]:
            sys.exit(
                f"error: {socket.gethostname()}: {error} (with {sys.executable}); `dist_subspace doctor` says more"
            )
        from dist_subspace.doctor.arguments import main as doctor

        sys.exit(doctor(given[1:]))
    sys.exit(main())
