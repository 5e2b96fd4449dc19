"""Pretrain a model: ``composer pretrain.py yamls/alignclip.yaml key.sub=value …``."""

import sys

from alignclip.training import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
