"""Convert image–caption pairs to MDS shards: ``python convert/cc12m.py --help``."""

import signal

if __name__ == "__main__":
    from alignclip.conversion.cc12m import main

    # SIGTERM ends a conversion as Ctrl-C does: workers end, temporary files are removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
