"""python -m launch.train --preset=mnist --workdir=runs/mnist"""

import sys

from sfl_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
