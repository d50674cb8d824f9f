"""The loop and where its shards run. Ray is imported by ``ray_executor`` alone, when it is used."""
