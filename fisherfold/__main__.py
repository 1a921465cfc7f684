import sys

from fisherfold.cli import main

sys.exit(main())
