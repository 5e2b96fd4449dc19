"""Encoders, optimizer and the ComposerModel."""
