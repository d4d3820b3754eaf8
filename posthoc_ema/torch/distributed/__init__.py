"""Several processes: sharded parameters, who tracks and writes what, snapshots of shards."""
