"""python -m launch.compare --workdir=runs/compare; with --plan_only it trains nothing"""

import sys

from sfl_jax.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
