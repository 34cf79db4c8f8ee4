"""python -m launch.plan --fleet=fleet.csv --model=efficientnetv2-b0 --server_flops=1e12 --output=plan.json"""

import sys

from sfl_jax.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
