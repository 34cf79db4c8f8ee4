"""python -m launch.report --workdir=runs/demo"""

import sys

from sfl_jax.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
