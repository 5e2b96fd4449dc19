"""Convert a trained model: ``python convert/checkpoint.py --help``."""

if __name__ == "__main__":
    from alignclip.weights.export_command import main

    main()
