"""Convert an image–caption set to MDS shards: ``python convert/retrieval.py --help``."""

if __name__ == "__main__":
    from alignclip.conversion.retrieval import main

    main()
