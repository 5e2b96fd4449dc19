"""Pretrain a model: ``composer pretrain.py yamls/alignclip.yaml key.sub=value …``."""

import sys

if __name__ == "__main__":
    # here, because the processes that upload checkpoints import this file, and need nothing of it
    from alignclip.training.command import main

    sys.exit(main(sys.argv[1:]))
