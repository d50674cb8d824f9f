"""The processes that compute shards, and their executors."""
