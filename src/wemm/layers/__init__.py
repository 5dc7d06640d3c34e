"""Building blocks that own their weights and how ranks share them (`shard_dims`)."""
