"""Read MDS sets for training and evaluation; Streaming's insides are touched here alone."""
