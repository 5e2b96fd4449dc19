"""What a model can do and how far apart its modalities are: pure functions of features."""
