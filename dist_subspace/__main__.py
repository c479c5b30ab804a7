import sys

from dist_subspace.cli import main

sys.exit(main())
