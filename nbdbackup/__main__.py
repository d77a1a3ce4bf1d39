"""`python -m nbdbackup`."""

import sys

from nbdbackup.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
