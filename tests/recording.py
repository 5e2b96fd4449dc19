"""``pretrain.py`` with a recorder: ``composer tests/recording.py RECORDS config.yaml key=value …``.

Adds one callback that writes, on rank 0 and step by step, the global loss terms to the last bit
(``RECORDS/steps.jsonl``, appended, so that a resumed run goes on in it) and the reduced gradients
of the first ``ALIGNCLIP_TEST_GRADIENTS`` steps (``RECORDS/gradients-N.pt``, before clipping).
``ALIGNCLIP_TEST_STEP_SECONDS`` slows every step down, and after step ``ALIGNCLIP_TEST_HOLD_AT`` the
run does nothing but upload, until it is killed or ``RECORDS/go-on`` is there.
"""

import sys

if __name__ == "__main__":  # as in pretrain.py
    from recorder import main

    sys.exit(main(sys.argv[1:]))
