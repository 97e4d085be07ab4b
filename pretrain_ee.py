"""Train an early-exit model on this rank: pretrain_ee.py CONFIG [key.path=value ...]; scripts/train.sh starts all."""

import sys

from megatron_ee.training.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
