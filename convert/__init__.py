"""Command-line converters: raw data sets → MDS shards, local or in object storage."""
