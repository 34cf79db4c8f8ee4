"""python -m launch.profile_device --model=efficientnetv2-b0 --batch_size=32 --device_file=device.json"""

import sys

from sfl_jax.commands.profile_device import main

if __name__ == "__main__":
    sys.exit(main())
