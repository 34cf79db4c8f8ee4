"""python -m launch.study --vary=scheme=sfl,psl --vary=cut=1,2 --model=cnn --rounds=20"""

import sys

from sfl_jax.commands.study import main

if __name__ == "__main__":
    sys.exit(main())
