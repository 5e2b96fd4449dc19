"""A run from configuration to trained model; the only place, beside the ComposerModel, that imports Composer."""
