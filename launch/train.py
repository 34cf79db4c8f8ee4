"""python -m launch.train --flagfile=launch/flags/mnist.flags --workdir=runs/mnist"""

import sys

from sfl_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
