"""Check an MDS set: ``python convert/verify.py --help``."""

if __name__ == "__main__":
    from alignclip.verification.command import main

    main()
