"""Evaluate checkpoints: ``composer evaluate.py yamls/evaluate.yaml checkpoint=… key=value …``."""

import sys

if __name__ == "__main__":
    from alignclip.runtime.threads import set_thread_defaults

    set_thread_defaults()  # before torch is imported
    from alignclip.evaluation.command import main

    sys.exit(main(sys.argv[1:]))
