"""Convert a classification set to MDS shards: ``python convert/classification.py --help``."""

if __name__ == "__main__":
    from alignclip.conversion.classification import main

    main()
