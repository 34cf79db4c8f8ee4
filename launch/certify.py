"""python -m launch.certify --model=efficientnetv2-b0 --batch_size=4"""

import sys

from sfl_jax.commands.certify import main

if __name__ == "__main__":
    sys.exit(main())
