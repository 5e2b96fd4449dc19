"""Raw data sets to MDS shards, local or in object storage."""
